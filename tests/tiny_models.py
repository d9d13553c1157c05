"""Language models of a few thousand weights, made from configs: one of every shape that a prefix has to fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BioGptConfig,
    BloomConfig,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from mend_hf import MendConfig, MendModel, get_mend_model

MAX_POSITIONS = 512

_ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_GROUPED: dict[str, Any] = {**_ROTARY, "num_key_value_heads": 2}

_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "gpt2": lambda **ids: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=MAX_POSITIONS, **ids),
    "llama": lambda **ids: LlamaConfig(**_GROUPED, **ids),
    "qwen3": lambda **ids: Qwen3Config(**_GROUPED, head_dim=8, **ids),
    "opt": lambda **ids: OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        **ids,
    ),
    "gpt_neox": lambda **ids: GPTNeoXConfig(**_ROTARY, **ids),
    "gemma3_text": lambda **ids: Gemma3TextConfig(
        **_GROUPED,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **ids,
    ),
    "mistral": lambda **ids: MistralConfig(**_GROUPED, head_dim=8, sliding_window=16, **ids),
    "bloom": lambda **ids: BloomConfig(hidden_size=32, n_layer=3, n_head=4, **ids),
    "falcon": lambda **ids: FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **ids),
    "falcon_alibi": lambda **ids: FalconConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True, **ids
    ),
    "gpt_neo": lambda **ids: GPTNeoConfig(
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=12,
        max_position_embeddings=MAX_POSITIONS,
        **ids,
    ),
    "gpt_bigcode": lambda **ids: GPTBigCodeConfig(n_embd=32, n_layer=3, n_head=4, n_positions=MAX_POSITIONS, **ids),
    "biogpt": lambda **ids: BioGptConfig(**_ROTARY, **ids),
    "qwen2": lambda **ids: Qwen2Config(**_GROUPED, **ids),
    "gemma2": lambda **ids: Gemma2Config(
        **_GROUPED,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **ids,
    ),
    "phi3": lambda **ids: Phi3Config(**_GROUPED, **ids),
    "olmo2": lambda **ids: Olmo2Config(**_GROUPED, **ids),
    "mixtral": lambda **ids: MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2, **ids),
    "qwen2_moe": lambda **ids: Qwen2MoeConfig(
        **_GROUPED,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        **ids,
    ),
    "qwen3_moe": lambda **ids: Qwen3MoeConfig(
        **_GROUPED, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, **ids
    ),
    "mpt": lambda **ids: MptConfig(d_model=32, n_layers=3, n_heads=4, max_seq_len=MAX_POSITIONS, **ids),
    "mamba": lambda **ids: MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=3, **ids),
    "falcon_mamba": lambda **ids: FalconMambaConfig(hidden_size=32, state_size=8, num_hidden_layers=3, **ids),
    "mamba2": lambda **ids: Mamba2Config(
        hidden_size=32, state_size=8, num_hidden_layers=3, num_heads=4, head_dim=16, n_groups=1, chunk_size=8, **ids
    ),
    "jamba": lambda **ids: JambaConfig(
        **_GROUPED,
        num_experts=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        **ids,
    ),
    "bamba": lambda **ids: BambaConfig(
        **_GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=8,
        **ids,
    ),
    "qwen3_next": lambda **ids: Qwen3NextConfig(
        **_GROUPED,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        **ids,
    ),
    "lfm2": lambda **ids: Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention", "conv"], **ids),
    "recurrent_gemma": lambda **ids: RecurrentGemmaConfig(
        **{k: v for k, v in _ROTARY.items() if k != "max_position_embeddings"},
        lru_width=32,
        attention_window_size=MAX_POSITIONS,
        **ids,
    ),
}

TINY_MODELS = tuple(_CONFIGS)


def build_tiny_model(
    name: str, *, vocab_size: int, pad_token_id: int, bos_token_id: int, eos_token_id: int
) -> PreTrainedModel:
    """Return the same fp32 model in eval mode at every call; its logits differ clearly from input to input.

    Args:
        name: One of `TINY_MODELS`.
        vocab_size: The tokenizer's.
        pad_token_id: The tokenizer's.
        bos_token_id: The tokenizer's.
        eos_token_id: The tokenizer's.
    """
    config = _CONFIGS[name](
        vocab_size=vocab_size, pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id
    )
    return make_model(AutoModelForCausalLM, config)


def ids_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return what a config has to know of a tokenizer."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def make_model(auto_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of a config, equal at every call, whose weights are large enough to be told apart."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto_class.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def wrap_tiny_model(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 7, spread: float = 0.05, **settings: Any
) -> MendModel:
    """Return a base model with a distiller that training seems to have changed, equal at every call.

    Args:
        base: From `build_tiny_model`.
        tokenizer: Its tokenizer.
        seed: Fixes the distiller.
        spread: How far its weights are from a newborn's.
        **settings: Of `MendConfig`.
    """
    torch.manual_seed(seed)
    model = get_mend_model(base, MendConfig(**settings), tokenizer)
    with torch.no_grad():
        for _, parameter in model.distiller.trained_tensors():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()
