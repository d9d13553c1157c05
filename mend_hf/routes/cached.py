"""Decoder-only base models: the prefix stands in the key/value cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from mend_hf.architectures import check_positions
from mend_hf.errors import ShapeError
from mend_hf.prefix import (
    EmbeddingPrefix,
    KeyValuePrefix,
    Prefix,
    continue_inputs,
    count_new_tokens,
    generation_inputs,
    move,
    read_embeddings,
)
from mend_hf.routes.base import Route


class CachedRoute(Route):
    """Keys and values in front of the query; vectors are read into them once."""

    def prepare(self, prefix: Prefix) -> KeyValuePrefix:
        """Return the prefix as keys and values on the base model's device."""
        prefix = move(prefix, self.base_model.device, self.base_model.dtype)
        if isinstance(prefix, EmbeddingPrefix):
            return read_embeddings(self.base_model, prefix.vectors, prefix.mask)
        return prefix

    def read_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> KeyValuePrefix:
        """Return the keys and values of a text as the base model computes them."""
        return read_embeddings(self.base_model, self.base_model.get_input_embeddings()(input_ids), attention_mask)

    def forward(self, prefix: Prefix, input_ids: Tensor | None, attention_mask: Tensor, **kwargs: Any) -> ModelOutput:
        """Run the base model over the query; it attends to the cached prefix."""
        key_values = self._check(prefix, attention_mask)
        inputs = continue_inputs(key_values, attention_mask, self.base_model)
        return self.base_model(input_ids=input_ids, **inputs, **kwargs)

    def generate(self, prefix: Prefix, input_ids: Tensor, attention_mask: Tensor, **generation: Any) -> Any:
        """Generate from a cache that holds the prefix."""
        num_new_tokens = count_new_tokens(input_ids.shape[1], self.base_model, generation)
        key_values = self._check(prefix, attention_mask, num_new_tokens)
        inputs = generation_inputs(key_values, attention_mask, self.base_model, generation)
        return self.base_model.generate(input_ids, **inputs, **generation)

    def _check(self, prefix: Prefix, attention_mask: Tensor, num_new_tokens: int = 0) -> KeyValuePrefix:
        if not isinstance(prefix, KeyValuePrefix):
            raise ShapeError("Expected keys and values, got vectors: call prepare first.")
        check_positions(self.base_model, attention_mask, prefix.next_positions, prefix.num_slots, num_new_tokens)
        return prefix
