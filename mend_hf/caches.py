"""Caches that a base model goes on from behind a prefix, and what `generate` needs beside them.

Shapes: B rows, S prefix slots, T query tokens, R tokens of them that a cache already holds, L = S + R, E embedding
width.

Under a sliding window padding between prefix and query would use up the window. There a row's padding stands to the
left of its prefix in every cache that is handed on: such a cache is *settled*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from mend_hf.architectures import CACHE_NAME, get_sliding_window, reads_static_cache
from mend_hf.errors import ConfigError, MissingExtraError, ShapeError
from mend_hf.prefix import (
    KeyValuePrefix,
    gather_slots,
    gather_tokens,
    make_cache,
    order_tokens,
    position_inputs,
    positions_of,
    write_prefix,
)

DEFAULT_NEW_TOKENS = 20  # of `generate`, where neither the caller nor the model says how long


def is_split_by_padding(model: PreTrainedModel, attention_mask: Tensor) -> bool:
    """Return whether padding of queries (B, T) would stand inside a sliding window of the model."""
    return get_sliding_window(model) is not None and not bool(attention_mask.all())


def settle_cache(cache: Cache, mask: Tensor, model: PreTrainedModel) -> DynamicCache:
    """Move every row's padding to the left of all that counts.

    Args:
        cache: Holds L entries, none of them forgotten.
        mask (B, L): True where an entry counts.
        model: Decides which layers forget what a sliding window has left behind.

    Returns:
        A new cache of length L.
    """
    index = order_tokens(mask, side="right")
    settled = DynamicCache(config=model.config)
    for layer_index, layer in enumerate(cache.layers):
        settled.update(gather_slots(layer.keys, index), gather_slots(layer.values, index), layer_index)
    return settled


def count_read_tokens(cache: Cache, prefix: KeyValuePrefix) -> int:
    """Return R, how many tokens of the user's a cache holds behind the prefix.

    Raises:
        ShapeError: It holds too little to hold the prefix.
    """
    num_held = int(cache.get_seq_length())
    if num_held < prefix.num_slots:
        raise ShapeError(
            f"Expected a cache that holds the prefix of {prefix.num_slots} slots, got {num_held} entries: pass "
            "what a call with these demonstrations returned, or an empty cache, which the prefix is written into."
        )
    return num_held - prefix.num_slots


def continue_inputs(prefix: KeyValuePrefix, attention_mask: Tensor, model: PreTrainedModel) -> dict[str, Any]:
    """Return what a forward pass over query tokens needs beside them to go on from a prefix.

    Args:
        prefix: B rows, on the model's device.
        attention_mask (B, T): Of the query alone.
        model: The base model that reads.

    Returns:
        A cache with S filled slots, `attention_mask` (B, S + T) and, where the model takes them,
        `position_ids` (B, T).
    """
    return {CACHE_NAME: make_cache(prefix, model), **go_on_inputs(prefix, attention_mask, 0, model)}


def go_on_inputs(
    prefix: KeyValuePrefix, attention_mask: Tensor, num_read: int, model: PreTrainedModel
) -> dict[str, Tensor]:
    """Return the mask and the positions of a pass over what a cache does not hold yet.

    Args:
        prefix: B rows.
        attention_mask (B, T): Of all the user's tokens.
        num_read: R, the first ones, which the cache holds.
        model: The base model that reads.

    Returns:
        `attention_mask` (B, S + T) and, where the model takes them, `position_ids` (B, T - R).
    """
    held = torch.cat([prefix.mask.to(attention_mask.dtype), attention_mask[:, :num_read]], dim=1)  # [B, L]
    if get_sliding_window(model) is not None:
        held = held.sort(dim=1).values
    positions = positions_of(attention_mask, prefix.next_positions)[:, num_read:]
    mask = torch.cat([held, attention_mask[:, num_read:]], dim=1)
    return {"attention_mask": mask} | position_inputs(model, positions)


def read_turned(
    model: PreTrainedModel, prefix: KeyValuePrefix, attention_mask: Tensor, **inputs: Any
) -> tuple[Any, Tensor]:
    """Read queries with their padding behind them, which is exact under a causal mask whatever the window.

    Args:
        model: The base model.
        prefix: B rows.
        attention_mask (B, T): Of the queries; padding anywhere.
        **inputs: What else the model takes; tensors (B, T, ...) are turned with the mask.

    Returns:
        The model's output in the turned order, its cache settled, and the order (B, T), whose `argsort` undoes it.
    """
    order = order_tokens(attention_mask, side="left")
    per_token = {
        name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.shape[:2] == order.shape
    }
    turned = inputs | {name: gather_tokens(value, order) for name, value in per_token.items()}
    mask = attention_mask.gather(1, order)
    whole = torch.cat([prefix.mask.to(mask.dtype), mask], dim=1)
    output = model(
        **turned,
        attention_mask=whole,
        **position_inputs(model, positions_of(mask, prefix.next_positions)),
        **{CACHE_NAME: make_cache(prefix)},
    )
    if output.get(CACHE_NAME) is not None:
        output[CACHE_NAME] = settle_cache(output[CACHE_NAME], whole, model)
    return output, order


def count_copies(model: PreTrainedModel, generation: Mapping[str, Any]) -> int:
    """Return how many rows `generate` makes of one: it repeats ids and masks for beams itself, but no cache."""
    return max(int(_setting(model, generation, name) or 1) for name in ("num_beams", "num_return_sequences"))


def count_new_tokens(num_tokens: int, model: PreTrainedModel, generation: Mapping[str, Any]) -> int:
    """Return how many tokens `generate` writes at most behind `num_tokens` of the user's."""
    max_new_tokens = _setting(model, generation, "max_new_tokens")
    if max_new_tokens is None:
        max_length = _setting(model, generation, "max_length")
        max_new_tokens = DEFAULT_NEW_TOKENS if max_length is None else max_length - num_tokens
    return max(max_new_tokens, 0)


def new_token_limits(num_tokens: int, model: PreTrainedModel, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the limits on the length as numbers of new tokens, whichever way the caller counts them."""
    minimum = _setting(model, generation, "min_new_tokens")
    if minimum is None:
        minimum = max((_setting(model, generation, "min_length") or 0) - num_tokens, 0)
    return {"max_new_tokens": count_new_tokens(num_tokens, model, generation), "min_new_tokens": minimum}


def build_cache(
    prefix: KeyValuePrefix, num_tokens: int, model: PreTrainedModel, generation: Mapping[str, Any]
) -> Cache:
    """Return a new cache of the kind that the caller asks for, which holds the prefix.

    Args:
        prefix: One row a row of the cache.
        num_tokens: Query and new tokens that there must be room for.
        model: The base model.
        generation: `cache_implementation` and `cache_config` as in `generate`.

    Raises:
        ConfigError: There is no such kind of cache, or not on this device.
        MissingExtraError: The package that quantises caches is not installed.
    """
    kind = _setting(model, generation, "cache_implementation")
    if kind is None or kind == "dynamic":
        return make_cache(prefix, model)
    if kind in ("offloaded", "offloaded_static") and prefix.mask.device.type != "cuda":
        raise ConfigError(
            f"Expected a CUDA device for cache_implementation={kind!r}, whose layers transformers copies by CUDA "
            f"streams, got {prefix.mask.device}: leave it out, the cache is in main memory already."
        )
    if kind == "offloaded":
        cache: Cache = DynamicCache(config=model.config, offloading=True)
    elif kind in ("static", "offloaded_static"):
        room = prefix.num_slots + num_tokens
        room = max(room, _setting(model, generation, "max_cache_len") or 0)
        cache = StaticCache(config=model.config, max_cache_len=room, offloading=kind == "offloaded_static")
    elif kind == "quantized":
        settings = {"backend": "quanto", "config": model.config, **(_setting(model, generation, "cache_config") or {})}
        try:
            cache = QuantizedCache(**settings)
        except ImportError as error:
            raise MissingExtraError(
                f"Expected the package behind the {settings['backend']!r} cache, which is not installed: run "
                'pip install optimum-quanto, or give cache_config={"backend": "hqq"} and pip install hqq.'
            ) from error
    else:
        raise ConfigError(
            f"Expected cache_implementation to be dynamic, offloaded, static, offloaded_static or quantized, got "
            f"{kind!r}: choose one of these, or pass an empty cache of your own as {CACHE_NAME}."
        )
    return fill_cache(cache, prefix, model)


def check_static_cache(model: PreTrainedModel) -> None:
    """Refuse a cache of fixed length for a model that would answer wrongly from it.

    Raises:
        ConfigError: The model would.
    """
    if not reads_static_cache(model):
        raise ConfigError(
            f"Expected another cache for {type(model).__name__}, which does not answer rightly from a static one in "
            "transformers, with or without a prefix: leave it out."
        )


def fill_cache(cache: Cache, prefix: KeyValuePrefix, model: PreTrainedModel) -> Cache:
    """Write the prefix into an empty cache and return it.

    Raises:
        ConfigError: The model would answer wrongly from a cache of this kind.
    """
    if isinstance(cache, StaticCache):
        check_static_cache(model)
    return write_prefix(cache, prefix)


def repeat_rows(prefix: KeyValuePrefix, num_copies: int) -> KeyValuePrefix:
    """Return a prefix whose rows each stand `num_copies` times, one below the other."""
    rows = torch.arange(len(prefix)).repeat_interleave(num_copies)
    return prefix if num_copies == 1 else prefix.select(rows)


def _setting(model: PreTrainedModel, generation: Mapping[str, Any], name: str) -> Any:
    settings = generation.get("generation_config") or model.generation_config
    return generation.get(name, getattr(settings, name, None))
