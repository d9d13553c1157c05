"""Language models of a few thousand weights, made from configs: one of every shape that a prefix has to fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

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
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
