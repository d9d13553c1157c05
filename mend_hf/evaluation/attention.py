"""How much attention queries pay to what stands in front of them, and to themselves.

Shapes: S prefix slots, T query tokens, L layers, N query heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mend_hf.caches import continue_inputs
from mend_hf.errors import DataError, ShapeError, UnsupportedModelError
from mend_hf.model import MendModel
from mend_hf.prefix import KeyValuePrefix, Prefix


@dataclass(frozen=True)
class AttentionShares:
    """Where attention goes: one share a layer (L,), from 0 to 1; the four of a layer sum to 1.

    Attributes:
        sink: To the first slot that counts.
        anchors: To the answers' own tokens.
        placeholders: To all other slots: a distiller's vectors, and the first tokens of later chunks.
        query: To the query's own tokens.
    """

    sink: Tensor
    anchors: Tensor
    placeholders: Tensor
    query: Tensor


@dataclass(frozen=True)
class SlotAttention:
    """Which slots attention goes to.

    Attributes:
        shares: Of every layer's attention (L, S), from 0 to 1; what a layer's slots lack to 1 stays with the query.
        kinds: "sink", "anchor" or "placeholder", one a slot.
    """

    shares: Tensor
    kinds: tuple[str, ...]


@torch.no_grad()
def measure_attention(model: MendModel, prefix: Prefix, queries: Sequence[str]) -> AttentionShares:
    """Return the shares of attention that the tokens of queries pay, a mean over heads, tokens and then queries.

    Queries are read one by one, without padding, by plain ("eager") attention, the only one that tells its weights.
    The model's own attention is back afterwards.

    Args:
        model: Its base model reads, in its prompt format.
        prefix: One row.
        queries: One text or more.

    Raises:
        DataError: There are no queries.
        ShapeError: The prefix has not one row, or the base model has no positions left.
        UnsupportedModelError: The base model is an encoder-decoder, or does not tell attention to every token.
    """
    if not queries:
        raise DataError("Expected one query or more to measure attention, got none: add some.")
    slots = _prepare_slots(model, prefix)
    with _eager_attention(model.base_model):
        shares = torch.stack([_measure_query(model, slots, query) for query in queries]).mean(0)  # [L, 4]
    return AttentionShares(*shares.unbind(1))


@torch.no_grad()
def measure_slots(model: MendModel, prefix: Prefix, query: str) -> SlotAttention:
    """Return the share of attention that a query's tokens pay to every slot, a mean over heads and tokens.

    Takes and raises what `measure_attention` does, of one query.
    """
    slots = _prepare_slots(model, prefix)
    with _eager_attention(model.base_model):
        weights = _read_weights(model, slots, query)  # [L, S + T]
    names = ("sink", "anchor", "placeholder")
    kinds = _kinds_of_slots(slots, 0).tolist()
    return SlotAttention(weights[:, : slots.num_slots], tuple(names[kind] for kind in kinds))


def _prepare_slots(model: MendModel, prefix: Prefix) -> KeyValuePrefix:
    """Return a prefix of one row as keys and values."""
    if len(prefix) != 1:
        raise ShapeError(f"Expected a prefix of 1 row, got {len(prefix)} rows: pick one with .select([0]).")
    slots = model.route.prepare(prefix)
    if not isinstance(slots, KeyValuePrefix):
        raise UnsupportedModelError(
            "Expected a decoder-only base model that keeps keys and values of every token, got one that reads the "
            "prefix as embeddings: measure another model."
        )
    return slots


def _measure_query(model: MendModel, prefix: KeyValuePrefix, query: str) -> Tensor:
    """Return the shares (L, 4) of one query, in the order of `AttentionShares`."""
    weights = _read_weights(model, prefix, query)  # [L, S + T]
    kinds = _kinds_of_slots(prefix, weights.shape[1] - prefix.num_slots)
    return torch.stack([weights[:, kinds == kind].sum(1) for kind in range(4)], dim=1)


def _read_weights(model: MendModel, prefix: KeyValuePrefix, query: str) -> Tensor:
    """Return every layer's attention (L, S + T), a mean over heads and the query's tokens."""
    encoding = model.tokenize(query)
    inputs = continue_inputs(prefix, encoding["attention_mask"], model.base_model)
    read = model.base_model(input_ids=encoding["input_ids"], output_attentions=True, **inputs)
    num_tokens = encoding["input_ids"].shape[1]
    expected = (num_tokens, prefix.num_slots + num_tokens)
    layers = read.get("attentions") or ()
    if len(layers) != len(prefix.keys) or any(layer is None or layer.shape[-2:] != expected for layer in layers):
        raise UnsupportedModelError(
            f"Expected attention weights {expected} (query tokens, slots and query tokens) of {len(prefix.keys)} "
            f"layers, got {[None if layer is None else tuple(layer.shape[-2:]) for layer in layers]}: measure a model "
            "whose layers all attend to every token, or a shorter prefix and query."
        )
    return torch.stack([layer[0].float().mean((0, 1)) for layer in layers])  # [L, S + T] of [N, T, S + T] each


def _kinds_of_slots(prefix: KeyValuePrefix, num_tokens: int) -> Tensor:
    """Return for every slot and query token the place of its kind among the fields of `AttentionShares`."""
    kinds = torch.where(prefix.labels[0] > 0, 1, 2)
    kinds[int(prefix.mask[0].long().argmax())] = 0
    return torch.cat([kinds, kinds.new_full((num_tokens,), 3)])


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
