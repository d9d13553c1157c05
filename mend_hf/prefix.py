"""The prefix as a frozen base model meets it: keys and values, embeddings, caches, masks and positions.

The only file about caches.

Shapes: B tasks or rows, V virtual tokens, S prefix slots, T query tokens, E embedding width, H key/value heads, K head
width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mend_hf.architectures import check_length, get_backbone
from mend_hf.errors import ShapeError

DEFAULT_MAX_LENGTH = 20  # of `generate`, where neither the caller nor the model says how long


@dataclass(frozen=True)
class KeyValuePrefix:
    """Keys and values that queries attend to as if their tokens had been read.

    Slots that a row does not use stand on the left and are masked. The first slot that counts is the sink.

    Attributes:
        keys: One tensor (B, H, S, K) a layer, already rotated where the base model rotates its keys.
        values: One tensor (B, H, S, K) a layer.
        mask (B, S): True where a slot counts.
        next_positions (B,): The position at which a query goes on.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    next_positions: Tensor

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def num_slots(self) -> int:
        """S, the slots that every query attends to, unused ones included."""
        return self.mask.shape[1]

    @property
    def num_bytes(self) -> int:
        """Size of the keys and values, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def select(self, rows: Tensor | Sequence[int]) -> KeyValuePrefix:
        """Return the given rows, which may repeat; slots that none of them uses are dropped."""
        rows = torch.as_tensor(rows, device=self.mask.device)
        mask = self.mask[rows]
        start = self.num_slots - int(mask.sum(1).max()) if len(rows) else 0
        return KeyValuePrefix(
            tuple(key[rows, :, start:] for key in self.keys),
            tuple(value[rows, :, start:] for value in self.values),
            mask[:, start:],
            self.next_positions[rows],
        )

    def expand(self, num_rows: int) -> KeyValuePrefix:
        """Return the one row of this prefix seen `num_rows` times, without copying it."""
        return KeyValuePrefix(
            tuple(key.expand(num_rows, -1, -1, -1) for key in self.keys),
            tuple(value.expand(num_rows, -1, -1, -1) for value in self.values),
            self.mask.expand(num_rows, -1),
            self.next_positions.expand(num_rows),
        )


@dataclass(frozen=True)
class EmbeddingPrefix:
    """Vectors that stand in front of the input embeddings.

    Attributes:
        vectors (B, V, E): In the width and scale of the base model's input embeddings.
        mask (B, V): True where a vector counts; unused ones stand on the left.
    """

    vectors: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def num_slots(self) -> int:
        """V, the positions that the vectors take up, unused ones included."""
        return self.mask.shape[1]

    @property
    def num_bytes(self) -> int:
        """Size of the vectors, in bytes."""
        return self.vectors.nbytes

    def select(self, rows: Tensor | Sequence[int]) -> EmbeddingPrefix:
        """Return the given rows, which may repeat; positions that none of them uses are dropped."""
        rows = torch.as_tensor(rows, device=self.mask.device)
        mask = self.mask[rows]
        start = self.num_slots - int(mask.sum(1).max()) if len(rows) else 0
        return EmbeddingPrefix(self.vectors[rows, start:], mask[:, start:])

    def expand(self, num_rows: int) -> EmbeddingPrefix:
        """Return the one row of this prefix seen `num_rows` times, without copying it."""
        return EmbeddingPrefix(self.vectors.expand(num_rows, -1, -1), self.mask.expand(num_rows, -1))


Prefix = KeyValuePrefix | EmbeddingPrefix


def join_chunks(prefixes: Sequence[Prefix]) -> Prefix:
    """Join the prefixes of chunks that were distilled apart into one that holds them all, row by row.

    Embeddings follow one another. Keys and values keep the positions at which they were made, each chunk beginning at
    position 0 (as in Parallel Context Windows, Ratner et al., 2023, arXiv 2212.10947), so nothing is recomputed and no
    position table overruns; the query goes on after the longest chunk. In the prompt format every chunk has the same
    first token at the same position and so the same sink: only the first chunk's is kept.

    Args:
        prefixes: One or more, all of one form and of the same B rows. A row whose mask is empty adds nothing.
    """
    if isinstance(prefixes[0], EmbeddingPrefix):
        vectors = torch.cat([prefix.vectors for prefix in prefixes if isinstance(prefix, EmbeddingPrefix)], dim=1)
        mask = torch.cat([prefix.mask for prefix in prefixes], dim=1)
        index, mask = pack_right(mask)
        return EmbeddingPrefix(vectors.gather(1, index[..., None].expand(-1, -1, vectors.shape[-1])), mask)
    parts = [prefix for prefix in prefixes if isinstance(prefix, KeyValuePrefix)]
    has_sink = parts[0].mask.any(1)  # [B]
    masks = [parts[0].mask]
    for part in parts[1:]:
        is_sink = part.mask & (part.mask.cumsum(1) == 1)
        masks.append(part.mask & ~(is_sink & has_sink[:, None]))
        has_sink = has_sink | part.mask.any(1)
    index, mask = pack_right(torch.cat(masks, dim=1))
    return KeyValuePrefix(
        tuple(
            gather_slots(torch.cat(layer, dim=2), index) for layer in zip(*(part.keys for part in parts), strict=True)
        ),
        tuple(
            gather_slots(torch.cat(layer, dim=2), index)
            for layer in zip(*(part.values for part in parts), strict=True)
        ),
        mask,
        torch.stack([part.next_positions for part in parts]).amax(0),
    )


def stack_rows(prefixes: Sequence[Prefix]) -> Prefix:
    """Put prefixes of several tasks, with different numbers of slots, below one another as rows of one prefix."""
    num_slots = max(prefix.num_slots for prefix in prefixes)
    mask = torch.cat([_pad_left(prefix.mask, num_slots, dim=1) for prefix in prefixes])
    if isinstance(prefixes[0], EmbeddingPrefix):
        parts = [_pad_left(p.vectors, num_slots, dim=1) for p in prefixes if isinstance(p, EmbeddingPrefix)]
        return EmbeddingPrefix(torch.cat(parts), mask)
    rows = [prefix for prefix in prefixes if isinstance(prefix, KeyValuePrefix)]
    return KeyValuePrefix(
        tuple(
            torch.cat([_pad_left(key, num_slots, dim=2) for key in layer])
            for layer in zip(*(row.keys for row in rows), strict=True)
        ),
        tuple(
            torch.cat([_pad_left(value, num_slots, dim=2) for value in layer])
            for layer in zip(*(row.values for row in rows), strict=True)
        ),
        mask,
        torch.cat([row.next_positions for row in rows]),
    )


def pack_right(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the kept positions of every row stand, in order and right-aligned.

    Args:
        keep (B, N): True where a position is kept.

    Returns:
        Indices (B, S) into N, S being the largest number kept in a row, and a mask (B, S) that is False where a row
        keeps fewer.
    """
    num_slots = int(keep.sum(1).max())
    index = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, keep.shape[1] - num_slots :]
    return index, keep.gather(1, index)


def pack_left(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the positions that count stand in every row, in order and left-aligned.

    Args:
        mask (B, N): 1 where a position counts.

    Returns:
        Indices (B, P) into N, P being the largest number that count in a row, and a mask (B, P) of the same type that
        is 0 where a row has fewer.
    """
    num_positions = int((mask != 0).sum(1).max())
    index = torch.argsort((mask == 0).to(torch.uint8), dim=1, stable=True)[:, :num_positions]
    return index, mask.gather(1, index)


def gather_slots(states: Tensor, index: Tensor) -> Tensor:
    """Pick positions of keys or values.

    Args:
        states (B, H, N, K): Keys or values of one layer.
        index (B, S): Positions to pick.

    Returns:
        (B, H, S, K).
    """
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def read_embeddings(model: PreTrainedModel, embeddings: Tensor, mask: Tensor) -> KeyValuePrefix:
    """Let a decoder-only model compute its own keys and values for embeddings.

    Going on from the result gives the logits of a pass with `embeddings` in front of the query's; they are paid for
    once and not on every query.

    Args:
        model: Decoder-only model.
        embeddings (B, N, E): Distilled vectors, or token embeddings of a text.
        mask (B, N): True where an embedding counts; padding stands on the left.

    Returns:
        A prefix of N slots.

    Raises:
        ShapeError: The embeddings are of another width, or more than the model's position table holds.
    """
    width = model.get_input_embeddings().weight.shape[1]
    if embeddings.dim() != 3 or embeddings.shape[-1] != width:
        raise ShapeError(
            f"Expected vectors of shape (tasks, virtual tokens, {width}) for this base model, got "
            f"{tuple(embeddings.shape)}. They were distilled for another base model: distil again with this one."
        )
    check_length(model, mask.sum(1))
    cache = DynamicCache()
    get_backbone(model)(
        inputs_embeds=embeddings,
        attention_mask=mask.long(),
        position_ids=positions_of(mask),
        past_key_values=cache,
        use_cache=True,
    )
    return KeyValuePrefix(
        tuple(layer.keys for layer in cache.layers),
        tuple(layer.values for layer in cache.layers),
        mask.bool(),
        mask.sum(1),
    )


def positions_of(mask: Tensor, start: Tensor | None = None) -> Tensor:
    """Number the tokens that count from 0, or from `start` (B,), row by row; padding gets the first number.

    Args:
        mask (B, T): 1 or True where a token counts.
        start (B,): Number of the first token of every row.
    """
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return positions if start is None else positions + start[:, None]


def make_cache(prefix: KeyValuePrefix, model: PreTrainedModel | None = None) -> DynamicCache:
    """Return a fresh cache that holds the prefix; a forward pass appends to it and leaves the prefix alone.

    Args:
        prefix: What it holds.
        model: Decides which layers forget what a sliding window has left behind; None: every layer keeps everything.
    """
    cache = DynamicCache() if model is None else DynamicCache(config=model.config)
    for layer_index, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(keys, values, layer_index)
    return cache


def continue_inputs(prefix: KeyValuePrefix, attention_mask: Tensor, model: PreTrainedModel) -> dict[str, Any]:
    """Return what a forward pass over query tokens needs beside them to go on from a prefix.

    Args:
        prefix: B rows, on the model's device.
        attention_mask (B, T): Of the query alone.
        model: The base model that reads.

    Returns:
        `past_key_values` with S filled slots, `attention_mask` (B, S + T) and `position_ids` (B, T).
    """
    return {
        "past_key_values": make_cache(prefix, model),
        "attention_mask": torch.cat([prefix.mask.to(attention_mask.dtype), attention_mask], dim=1),
        "position_ids": positions_of(attention_mask, prefix.next_positions),
    }


def generation_inputs(
    prefix: KeyValuePrefix, attention_mask: Tensor, model: PreTrainedModel, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what `generate` needs beside the query's ids to go on from a prefix.

    Args:
        prefix: B rows, on the model's device.
        attention_mask (B, T): Of the query alone.
        model: The base model that generates.
        generation: What else goes to `generate`. It repeats masks and positions for every beam and returned sequence
            itself, but no cache.

    Returns:
        As `continue_inputs`, with `position_ids` (B, S + T), from which `generate` slices what a pass reads.
    """
    inputs = continue_inputs(prefix, attention_mask, model)
    settings = generation.get("generation_config") or model.generation_config
    num_copies = max(
        generation.get(name, getattr(settings, name)) or 1 for name in ("num_beams", "num_return_sequences")
    )
    if num_copies > 1:
        inputs["past_key_values"].batch_repeat_interleave(num_copies)
    unread = attention_mask.new_zeros(len(prefix), prefix.num_slots)
    inputs["position_ids"] = torch.cat([unread, inputs["position_ids"]], dim=1)
    return inputs


def count_new_tokens(num_tokens: int, model: PreTrainedModel, generation: Mapping[str, Any]) -> int:
    """Return how many new tokens `generate` reads at most behind a query of `num_tokens`; the last one is not read."""
    settings = generation.get("generation_config") or model.generation_config
    max_new_tokens = generation.get("max_new_tokens", settings.max_new_tokens)
    if max_new_tokens is None:
        max_new_tokens = (generation.get("max_length", settings.max_length) or DEFAULT_MAX_LENGTH) - num_tokens
    return max(max_new_tokens - 1, 0)


def move(prefix: Prefix, device: torch.device, dtype: torch.dtype) -> Prefix:
    """Return the prefix on a device, its tensors in a floating-point type; itself where nothing changes."""
    if isinstance(prefix, EmbeddingPrefix):
        return replace(prefix, vectors=prefix.vectors.to(device, dtype), mask=prefix.mask.to(device))
    return KeyValuePrefix(
        tuple(key.to(device, dtype) for key in prefix.keys),
        tuple(value.to(device, dtype) for value in prefix.values),
        prefix.mask.to(device),
        prefix.next_positions.to(device),
    )


def _pad_left(tensor: Tensor, length: int, dim: int) -> Tensor:
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
