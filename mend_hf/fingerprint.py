"""How a base model, a distiller or a list of demonstrations is told from another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mend_hf.architectures import get_embedding_width
from mend_hf.errors import CheckpointError


def get_fingerprint(base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Describe a base model so that vectors made for another one are recognised.

    Fine-tunes of one model share a fingerprint: widths, counts and the vocabulary decide, not the weights.
    """
    config = base_model.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_attention_heads", None)  # a state-space model has none
    fingerprint: dict[str, Any] = {
        "architecture": type(base_model).__name__,
        "embedding_width": get_embedding_width(base_model),
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or num_heads,
        "vocabulary_size": base_model.get_input_embeddings().weight.shape[0],
    }
    if tokenizer is not None:
        fingerprint["vocabulary_hash"] = hash_json(sorted(tokenizer.get_vocab().items()))
    return fingerprint


def check_fingerprint(expected: dict[str, Any] | None, got: dict[str, Any], what: str) -> None:
    """Refuse what was made for another base model.

    Args:
        expected: Fingerprint that was saved with `what`; None where it was never recorded.
        got: Fingerprint of the base model at hand.
        what: Names the saved thing in the message, e.g. "The distiller".

    Raises:
        CheckpointError: A fact that both fingerprints state differs.
    """
    expected = expected or {}
    different = [key for key in got if key in expected and expected[key] != got[key]]
    if different:
        lines = "\n".join(f"- {key}: expected {expected[key]}, got {got[key]}" for key in different)
        raise CheckpointError(
            f"{what} belongs to another base model:\n{lines}\n"
            "Load the base model that it was made for, or make it again with this one."
        )


def hash_json(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of a value's JSON text."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the first 16 hex digits of a SHA-256 over named tensors, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else str(tensor.item()).encode())
    return digest.hexdigest()[:16]
