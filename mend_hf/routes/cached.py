"""Decoder-only base models: the prefix stands in the key/value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

from mend_hf.architectures import CACHE_NAME, embed_tokens
from mend_hf.caches import (
    build_cache,
    count_copies,
    count_new_tokens,
    count_read_tokens,
    fill_cache,
    go_on_inputs,
    is_split_by_padding,
    new_token_limits,
    read_turned,
    repeat_rows,
)
from mend_hf.errors import ConfigError, ShapeError
from mend_hf.guards import check_positions, check_release
from mend_hf.prefix import EmbeddingPrefix, KeyValuePrefix, Prefix, gather_tokens, make_cache, read_embeddings
from mend_hf.routes.base import Route, change_tokens, check_spans

_UNEQUAL_ROWS = (
    "Expected rows that go on from a cache with equally many tokens, because the base model has a sliding "
    "window that padding would use up: go on with the rows one by one."
)


class CachedRoute(Route):
    """Keys and values in front of the query; vectors are read into them once."""

    def prepare(self, prefix: Prefix) -> KeyValuePrefix:
        """Return the prefix as keys and values on the base model's device."""
        prefix = prefix.to(self.base_model.device, self.base_model.dtype)
        if isinstance(prefix, EmbeddingPrefix):
            return read_embeddings(self.base_model, prefix.vectors, prefix.mask)
        return prefix

    def read_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> KeyValuePrefix:
        """Return the keys and values of a text as the base model computes them."""
        return read_embeddings(self.base_model, embed_tokens(self.base_model, input_ids), attention_mask)

    def forward(self, prefix: Prefix, input_ids: Tensor | None, attention_mask: Tensor, **kwargs: Any) -> ModelOutput:
        """Run the base model over the query; it attends to the cached prefix.

        With the cache of an earlier call, which holds the prefix, `input_ids` are the tokens that it does not
        hold yet and `attention_mask` covers all the user's tokens; an empty cache is filled with the prefix first.
        """
        cache: Cache | None = kwargs.pop(CACHE_NAME, None)
        num_tokens = (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[1]
        key_values = self._check(prefix, attention_mask, kwargs)
        is_first = cache is None or cache.get_seq_length() == 0
        num_read = 0 if cache is None or is_first else count_read_tokens(cache, key_values)
        _check_mask(attention_mask, num_read + num_tokens)
        if is_split_by_padding(self.base_model, attention_mask[:, num_read:]):
            if cache is not None:
                raise ShapeError(_UNEQUAL_ROWS)
            return self._forward_turned(key_values, input_ids, attention_mask, kwargs)
        if cache is None:
            cache = make_cache(key_values, self.base_model)
        elif is_first:
            fill_cache(cache, key_values, self.base_model)
        inputs = go_on_inputs(key_values, attention_mask, num_read, self.base_model)
        return self.base_model(input_ids=input_ids, **{CACHE_NAME: cache}, **inputs, **kwargs)

    def generate(self, prefix: Prefix, input_ids: Tensor | None, attention_mask: Tensor, **generation: Any) -> Any:
        """Generate from a cache that holds the prefix."""
        num_tokens = attention_mask.shape[1]
        embeddings = generation.pop("inputs_embeds", None)
        query: Any = input_ids if embeddings is None else embeddings
        _check_mask(attention_mask, query.shape[1])
        check_release(generation)
        if not attention_mask[:, -1].all():
            raise ShapeError("Expected queries padded on the left, got padding at a row's end: pad on the left.")
        num_new_tokens = count_new_tokens(num_tokens, self.base_model, generation)
        key_values = self._check(prefix, attention_mask, generation, max(num_new_tokens - 1, 0))
        num_tokens_in_all = num_tokens + num_new_tokens
        cache, num_read = self._read_ahead(key_values, query, attention_mask, num_tokens_in_all, generation)
        inputs: dict[str, Any] = go_on_inputs(key_values, attention_mask, num_read, self.base_model)
        if "position_ids" in inputs:  # `generate` slices the last ones
            unread = attention_mask.new_zeros(len(key_values), key_values.num_slots + num_read)
            inputs["position_ids"] = torch.cat([unread, inputs["position_ids"]], dim=1)
        if num_read or embeddings is not None:
            self._check_go_on(generation)
            inputs["inputs_embeds"] = self._embed_unread(query, num_read, key_values.num_slots)
            generation |= new_token_limits(num_tokens, self.base_model, generation)
        return self.base_model.generate(input_ids, **{CACHE_NAME: cache}, **inputs, **generation)

    def _forward_turned(
        self, prefix: KeyValuePrefix, input_ids: Tensor | None, attention_mask: Tensor, kwargs: dict[str, Any]
    ) -> ModelOutput:
        """Run the base model over padded queries under a sliding window, padding behind the queries."""
        if kwargs.get("output_attentions"):
            raise ConfigError(
                "Expected output_attentions=False for padded queries under a sliding window, whose keys stand in "
                "another order, got True: ask rows of different lengths one by one."
            )
        if input_ids is None and not self.base_model.can_generate():
            raise ConfigError(
                "Expected input_ids for padded queries under a sliding window, by which a head without a vocabulary "
                "finds a query's last token, got embeddings: ask rows of different lengths one by one."
            )
        check_spans(kwargs)
        kept = kwargs.pop("logits_to_keep", 0)
        queries = {} if input_ids is None else {"input_ids": input_ids}
        output, order = read_turned(self.base_model, prefix, attention_mask, **queries, **kwargs)
        back = order.argsort(1)
        change_tokens(output, lambda states: gather_tokens(states, back))
        if not isinstance(kept, int):
            output.logits = output.logits[:, kept]
        elif kept:
            output.logits = output.logits[:, -kept:]
        return output

    def _read_ahead(
        self,
        prefix: KeyValuePrefix,
        query: Tensor,
        attention_mask: Tensor,
        num_tokens_in_all: int,
        generation: dict[str, Any],
    ) -> tuple[Cache, int]:
        """Return the cache to generate from, and how many of the query's tokens it holds."""
        cache: Cache | None = generation.pop(CACHE_NAME, None)
        num_tokens, num_copies = attention_mask.shape[1], count_copies(self.base_model, generation)
        if cache is not None and cache.get_seq_length():
            num_read = count_read_tokens(cache, prefix)
            if num_read >= num_tokens:
                raise ShapeError(
                    f"Expected at least one token that the cache does not hold, got {num_tokens} tokens of which "
                    f"it holds {num_read}: pass the whole history and the new tokens behind it."
                )
            if is_split_by_padding(self.base_model, attention_mask[:, num_read:]):
                raise ShapeError(_UNEQUAL_ROWS)
            if num_copies > 1:
                cache.batch_repeat_interleave(num_copies)
            return cache, num_read
        if not is_split_by_padding(self.base_model, attention_mask):
            rows = repeat_rows(prefix, num_copies)
            if cache is not None:
                return fill_cache(cache, rows, self.base_model), 0
            cache = build_cache(rows, num_tokens_in_all, self.base_model, generation)
            if generation.get("cache_implementation") is not None:
                generation["cache_implementation"] = None  # the cache is there already
            return cache, 0
        if cache is not None or generation.get("cache_implementation") not in (None, "dynamic"):
            raise ConfigError(
                "Expected the default cache for padded queries under a sliding window, got another one: leave "
                "the cache and cache_implementation out, or ask rows of different lengths one by one."
            )
        generation.pop("cache_implementation", None)
        embeddings = self._embed(query[:, :-1])
        output, _ = read_turned(
            self.base_model, prefix, attention_mask[:, :-1], inputs_embeds=embeddings, use_cache=True
        )
        cache = output[CACHE_NAME]
        cache.batch_repeat_interleave(num_copies)
        return cache, num_tokens - 1

    def _embed_unread(self, query: Tensor, num_read: int, num_slots: int) -> Tensor:
        """Return the unread tokens' embeddings behind as many blanks as the cache is long.

        `generate` skips in embeddings what a cache holds; in ids it would only where the ids were as many as the mask.
        """
        embeddings = self._embed(query[:, num_read:])
        blank = embeddings.new_zeros(embeddings.shape[0], num_slots + num_read, embeddings.shape[2])
        return torch.cat([blank, embeddings], dim=1)

    def _embed(self, query: Tensor) -> Tensor:
        """Return the embeddings of a query, which may come as such."""
        return query if query.is_floating_point() else embed_tokens(self.base_model, query)

    def _check_go_on(self, generation: dict[str, Any]) -> None:
        given = [
            name
            for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")
            if generation.get(name) is not None
        ]
        if given:
            raise ConfigError(
                f"Expected no {' or '.join(given)} where generation goes on from embeddings or a cache that holds "
                "a part of the query, or where queries are padded under a sliding window, because transformers then "
                "reads the wrong tokens: leave it out, or ask one query at a time without a cache."
            )

    def _check(
        self, prefix: Prefix, attention_mask: Tensor, kwargs: dict[str, Any], num_new_tokens: int = 0
    ) -> KeyValuePrefix:
        if not isinstance(prefix, KeyValuePrefix):
            raise ShapeError("Expected keys and values, got vectors: call prepare first.")
        if kwargs.get("position_ids") is not None:
            raise ConfigError(
                "Expected no position_ids beside demonstrations, whose prefix decides where the query's positions "
                "begin: leave them out, and mark padding in attention_mask."
            )
        if attention_mask.dim() == 2 and not attention_mask.any(1).all():
            row = int((~attention_mask.any(1)).nonzero()[0])
            raise ShapeError(f"Expected at least one token in every row, got none in row {row}: remove the row.")
        check_positions(self.base_model, attention_mask, prefix.next_positions, num_new_tokens)
        return prefix


def _check_mask(attention_mask: Tensor, num_tokens: int) -> None:
    if attention_mask.dim() != 2 or attention_mask.shape[1] != num_tokens:
        raise ShapeError(
            f"Expected an attention_mask of shape (rows, {num_tokens}), one entry a token of the query and none for "
            f"the demonstrations, got {tuple(attention_mask.shape)}: pass the tokenizer's mask as it is."
        )
