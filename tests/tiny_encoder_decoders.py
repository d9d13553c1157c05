"""Encoder-decoder language models of a few thousand weights, made from configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import make_model
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

MAX_POSITIONS = 96

_RELATIVE: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}  # fmt: skip
_TABLE: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": MAX_POSITIONS, "forced_eos_token_id": None,
}  # fmt: skip

_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "t5": lambda **ids: T5Config(**_RELATIVE, decoder_start_token_id=ids["pad_token_id"], **ids),
    "mt5": lambda **ids: MT5Config(
        **_RELATIVE,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=ids["pad_token_id"],
        **ids,
    ),
    "bart": lambda **ids: BartConfig(**_TABLE, decoder_start_token_id=ids["eos_token_id"], **ids),
    "mbart": lambda **ids: MBartConfig(**_TABLE, scale_embedding=True, **ids),
    "pegasus": lambda **ids: PegasusConfig(
        **_TABLE, scale_embedding=True, decoder_start_token_id=ids["pad_token_id"], **ids
    ),
}

TINY_ENCODER_DECODERS = tuple(_CONFIGS)


def build_tiny_encoder_decoder(
    family: str, *, vocab_size: int, pad_token_id: int, bos_token_id: int, eos_token_id: int
) -> PreTrainedModel:
    """Return the same fp32 model in eval mode at every call; its logits differ clearly from input to input.

    Args:
        family: One of `TINY_ENCODER_DECODERS`.
        vocab_size: The tokenizer's.
        pad_token_id: The tokenizer's.
        bos_token_id: The tokenizer's.
        eos_token_id: The tokenizer's.
    """
    config = _CONFIGS[family](
        vocab_size=vocab_size, pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id
    )
    model = make_model(AutoModelForSeq2SeqLM, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):  # T5's attention leaves the division by the head's width to its weights
                parameter.mul_(config.d_kv**-0.5)
    return model
