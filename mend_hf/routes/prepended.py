"""Decoder-only base models whose cache is more than keys and values: vectors stand in front of every query.

A state-space or linear-attention layer folds all it has read into one state, of which no slots can be kept, shared or
shifted. Such a model reads the vectors anew with every query; there are few of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from mend_hf.architectures import CACHE_NAME, accepts, embed_tokens
from mend_hf.caches import count_new_tokens
from mend_hf.errors import ShapeError, UnsupportedModelError
from mend_hf.guards import check_length, check_padding
from mend_hf.prefix import (
    EmbeddingPrefix,
    Prefix,
    check_vectors,
    gather_tokens,
    order_tokens,
    position_inputs,
    positions_of,
)
from mend_hf.routes.base import Route, change_tokens, check_spans


@dataclass(frozen=True)
class _Packed:
    """Vectors and query in one piece, row by row, with all padding on the left.

    Attributes:
        embeddings (B, S + T, E): What the base model reads.
        mask (B, S + T): 1 where it counts.
        places (B, T): Where the query's tokens went.
    """

    embeddings: Tensor
    mask: Tensor
    places: Tensor

    def cut_query(self, states: Tensor) -> Tensor:
        """Return the query's part of states (B, S + T, W), or of the last ones, in the order of the query: (B, T, W).

        What stands for padding, which may lie further in front, means nothing.
        """
        num_missing = self.mask.shape[1] - states.shape[1]
        return gather_tokens(states, (self.places - num_missing).clamp(min=0))


class PrependedRoute(Route):
    """Vectors in front of the query's embeddings, read with every query."""

    def prepare(self, prefix: Prefix) -> EmbeddingPrefix:
        """Return the vectors on the base model's device.

        Raises:
            ShapeError: They are keys and values, or of another width.
        """
        if not isinstance(prefix, EmbeddingPrefix):
            raise ShapeError(
                f"Expected vectors, got keys and values, which the cache of {type(self.base_model).__name__} cannot "
                'hold: distil with prefix_form="embeds".'
            )
        check_vectors(self.base_model, prefix.vectors)
        return prefix.to(self.base_model.device, self.base_model.dtype)

    def read_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> EmbeddingPrefix:
        """Return the embeddings of a text."""
        return EmbeddingPrefix(embed_tokens(self.base_model, input_ids), attention_mask.bool())

    def forward(self, prefix: Prefix, input_ids: Tensor | None, attention_mask: Tensor, **kwargs: Any) -> ModelOutput:
        """Run the base model over vectors and query, and return the query's part."""
        embeddings, labels = kwargs.pop("inputs_embeds", None), kwargs.pop("labels", None)
        num_kept, num_items = kwargs.pop("logits_to_keep", 0), kwargs.pop("num_items_in_batch", None)
        if input_ids is not None:
            embeddings = embed_tokens(self.base_model, input_ids)
        check_spans(kwargs)
        packed = self._pack(prefix, embeddings, attention_mask)
        kwargs |= position_inputs(self.base_model, positions_of(packed.mask)) | {"use_cache": False}
        if accepts(self.base_model, "logits_to_keep"):  # a query's tokens are among as many last ones
            kwargs["logits_to_keep"] = packed.places.shape[1]
        output = self.base_model(inputs_embeds=packed.embeddings, attention_mask=packed.mask, **kwargs)
        change_tokens(output, packed.cut_query)
        if labels is not None:
            output.loss = self._loss(output.logits, labels, num_items)
        if num_kept:
            output.logits = output.logits[:, -num_kept:]
        return output

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Return the head's own loss, of language or of classes."""
        if not self.base_model.can_generate():
            config = self.base_model.config
            return self.base_model.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=config)
        items = {} if num_items is None else {"num_items_in_batch": num_items}
        return self.base_model.loss_function(logits, labels, vocab_size=logits.shape[-1], **items)

    def generate(self, prefix: Prefix, input_ids: Tensor | None, attention_mask: Tensor, **generation: Any) -> Any:
        """Generate behind vectors and query; the base model's own cache carries on from there.

        Raises:
            UnsupportedModelError: transformers does not let this base model generate from embeddings, or not in this
                way.
        """
        self._check_way_of_generating(generation)
        embeddings = generation.pop("inputs_embeds", None)
        if input_ids is not None:
            embeddings = embed_tokens(self.base_model, input_ids)
            generation["inputs"] = input_ids
        num_tokens = embeddings.shape[1]
        num_new_tokens = max(count_new_tokens(num_tokens, self.base_model, generation) - 1, 0)
        packed = self._pack(prefix, embeddings, attention_mask, num_new_tokens)
        return self.base_model.generate(
            inputs_embeds=packed.embeddings,
            attention_mask=packed.mask,
            **self._lengths_of_new_tokens(num_tokens, generation),
        )

    def _check_way_of_generating(self, generation: Mapping[str, Any]) -> None:
        name = type(self.base_model).__name__
        if "inputs_embeds" not in inspect.signature(self.base_model.prepare_inputs_for_generation).parameters:
            raise UnsupportedModelError(
                f"Expected a base model that generates from inputs_embeds, got {name}, which transformers does "
                "not let: call the model itself for one forward pass, or use another base model."
            )
        settings = generation.get("generation_config") or self.base_model.generation_config
        for option in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", CACHE_NAME):
            if generation.get(option, getattr(settings, option, None)) is not None:
                raise UnsupportedModelError(
                    f"Expected {option} to be None for {name}, whose states behind vectors can neither be taken back "
                    "nor handed on: leave it out."
                )

    def _lengths_of_new_tokens(self, num_tokens: int, generation: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings with whole lengths in place of new ones: `generate` would count the vectors in."""
        settings = copy.deepcopy(generation.get("generation_config") or self.base_model.generation_config)
        changed = dict(generation)
        for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            length = changed.pop(whole, getattr(settings, whole))
            setattr(settings, whole, None)
            if length and changed.get(new, getattr(settings, new)) is None:
                changed[new] = max(length - num_tokens, 0)
        return changed | {"generation_config": settings}

    def _pack(self, prefix: Prefix, embeddings: Tensor, attention_mask: Tensor, num_new_tokens: int = 0) -> _Packed:
        if not isinstance(prefix, EmbeddingPrefix):
            raise ShapeError("Expected vectors, got keys and values: call prepare first.")
        embeddings = torch.cat([prefix.vectors.to(embeddings.dtype), embeddings], dim=1)  # [B, S + T, E]
        mask = torch.cat([prefix.mask.to(attention_mask.dtype), attention_mask], dim=1)
        check_length(self.base_model, mask.sum(1) + num_new_tokens)
        check_padding(self.base_model, mask)
        order = order_tokens(mask, side="right")
        places = order.argsort(1)[:, prefix.num_slots :]  # [B, T]
        return _Packed(gather_tokens(embeddings, order), mask.gather(1, order), places)
