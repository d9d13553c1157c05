"""The prefix as a frozen base model meets it: keys and values, embeddings, caches, masks and positions.

Caches that `generate` goes on from are in caches.py.

Shapes: B tasks or rows, V virtual tokens, S prefix slots, T query tokens, E embedding width, H key/value heads, K head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from mend_hf.architectures import CACHE_NAME, accepts, get_backbone, get_embedding_width
from mend_hf.errors import ShapeError
from mend_hf.guards import check_length

CacheType = TypeVar("CacheType", bound=Cache)


@dataclass(frozen=True)
class KeyValuePrefix:
    """Keys and values that queries attend to as if their tokens had been read.

    Slots that a row does not use stand on the left and are masked. The first slot that counts is the sink.

    Attributes:
        keys: One tensor (B, H, S, K) a layer, already rotated where the base model rotates its keys.
        values: One tensor (B, H, S, K) a layer.
        mask (B, S): True where a slot counts.
        next_positions (B,): The position at which a query goes on.
        anchor_labels (B, S): Equal numbers at anchors that say the same, 0 at every other slot; None: no anchors are
            known, and none can be pooled.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    next_positions: Tensor
    anchor_labels: Tensor | None = None

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

    @property
    def labels(self) -> Tensor:
        """The anchors' labels (B, S), 0 everywhere where none are known."""
        return torch.zeros_like(self.mask, dtype=torch.long) if self.anchor_labels is None else self.anchor_labels

    def select(self, rows: Tensor | Sequence[int]) -> KeyValuePrefix:
        """Return the given rows, which may repeat; slots that none of them uses are dropped."""
        rows = torch.as_tensor(rows, device=self.mask.device)
        mask = self.mask[rows]
        start = self.num_slots - int(mask.sum(1).max()) if len(rows) else 0
        return KeyValuePrefix(
            *map_layers(lambda states: states[rows, :, start:], self),
            mask[:, start:],
            self.next_positions[rows],
            self.labels[rows, start:],
        )

    def expand(self, num_rows: int) -> KeyValuePrefix:
        """Return the one row of this prefix seen `num_rows` times, without copying it."""
        return KeyValuePrefix(
            *map_layers(lambda states: states.expand(num_rows, -1, -1, -1), self),
            self.mask.expand(num_rows, -1),
            self.next_positions.expand(num_rows),
            self.labels.expand(num_rows, -1),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> KeyValuePrefix:
        """Return the prefix on a device, its keys and values in a floating-point type."""
        labels = None if self.anchor_labels is None else self.anchor_labels.to(device)
        layers = map_layers(lambda states: states.to(device, dtype), self)
        return KeyValuePrefix(*layers, self.mask.to(device), self.next_positions.to(device), labels)


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

    def to(self, device: torch.device, dtype: torch.dtype) -> EmbeddingPrefix:
        """Return the prefix on a device, its vectors in a floating-point type."""
        return EmbeddingPrefix(self.vectors.to(device, dtype), self.mask.to(device))


Prefix = KeyValuePrefix | EmbeddingPrefix


def map_layers(
    change: Callable[..., Tensor], *prefixes: KeyValuePrefix
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return keys and values, layer by layer, after a change that takes the tensor (B, H, S, K) of every prefix."""
    keys = tuple(change(*layer) for layer in zip(*(prefix.keys for prefix in prefixes), strict=True))
    return keys, tuple(change(*layer) for layer in zip(*(prefix.values for prefix in prefixes), strict=True))


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
        return EmbeddingPrefix(gather_tokens(vectors, index), mask)
    parts = [prefix for prefix in prefixes if isinstance(prefix, KeyValuePrefix)]
    has_sink = parts[0].mask.any(1)  # [B]
    masks = [parts[0].mask]
    for part in parts[1:]:
        is_sink = part.mask & (part.mask.cumsum(1) == 1)
        masks.append(part.mask & ~(is_sink & has_sink[:, None]))
        has_sink = has_sink | part.mask.any(1)
    index, mask = pack_right(torch.cat(masks, dim=1))
    return KeyValuePrefix(
        *map_layers(lambda *layer: gather_slots(torch.cat(layer, dim=2), index), *parts),
        mask,
        torch.stack([part.next_positions for part in parts]).amax(0),
        torch.cat([part.labels for part in parts], dim=1).gather(1, index),
    )


def join_tasks(prefix: Prefix, task_rows: Sequence[int]) -> Prefix:
    """Join the chunks of every task.

    Args:
        prefix: One row a chunk.
        task_rows: The task of every chunk, ascending from 0 without a gap.

    Returns:
        A prefix of one row a task; the given one where every task has one chunk.
    """
    num_tasks = task_rows[-1] + 1
    if len(task_rows) == num_tasks:
        return prefix
    chunks_of_task: list[list[Prefix]] = [[] for _ in range(num_tasks)]
    for chunk, task in enumerate(task_rows):
        chunks_of_task[task].append(prefix.select([chunk]))
    return stack_rows([join_chunks(chunks) for chunks in chunks_of_task])


def stack_rows(prefixes: Sequence[Prefix]) -> Prefix:
    """Put prefixes of several tasks, with different numbers of slots, below one another as rows of one prefix."""
    num_slots = max(prefix.num_slots for prefix in prefixes)
    mask = torch.cat([_pad_left(prefix.mask, num_slots, dim=1) for prefix in prefixes])
    if isinstance(prefixes[0], EmbeddingPrefix):
        parts = [_pad_left(p.vectors, num_slots, dim=1) for p in prefixes if isinstance(p, EmbeddingPrefix)]
        return EmbeddingPrefix(torch.cat(parts), mask)
    rows = [prefix for prefix in prefixes if isinstance(prefix, KeyValuePrefix)]
    return KeyValuePrefix(
        *map_layers(lambda *layer: torch.cat([_pad_left(states, num_slots, dim=2) for states in layer]), *rows),
        mask,
        torch.cat([row.next_positions for row in rows]),
        torch.cat([_pad_left(row.labels, num_slots, dim=1) for row in rows]),
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
    index = order_tokens(keep, side="right")[:, keep.shape[1] - num_slots :]
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
    index = order_tokens(mask, side="left")[:, :num_positions]
    return index, mask.gather(1, index)


def order_tokens(mask: Tensor, *, side: Literal["left", "right"]) -> Tensor:
    """Return the order (B, N) that moves what counts to one side of every row, and padding to the other.

    Args:
        mask (B, N): 1 or True where a position counts.
        side: Where what counts goes to; on the left a causal mask hides the padding from it.
    """
    goes_last = mask.bool() if side == "right" else mask == 0
    return torch.argsort(goes_last.to(torch.uint8), dim=1, stable=True)


def gather_tokens(states: Tensor, index: Tensor) -> Tensor:
    """Pick positions of states (B, N, ...) of tokens by indices (B, S), and return (B, S, ...)."""
    return states.gather(1, index.reshape(*index.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:]))


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
    check_vectors(model, embeddings)
    check_length(model, mask.sum(1))
    cache = DynamicCache()
    get_backbone(model)(
        inputs_embeds=embeddings,
        attention_mask=mask.long(),
        **position_inputs(model, positions_of(mask)),
        **{CACHE_NAME: cache},
        use_cache=True,
    )
    return KeyValuePrefix(
        tuple(layer.keys for layer in cache.layers),
        tuple(layer.values for layer in cache.layers),
        mask.bool(),
        mask.sum(1),
    )


def check_vectors(model: PreTrainedModel, vectors: Tensor) -> None:
    """Refuse vectors that are not (B, V, E) in the width of the model's input embeddings.

    Raises:
        ShapeError: They are of another shape.
    """
    width = get_embedding_width(model)
    if vectors.dim() != 3 or vectors.shape[-1] != width:
        raise ShapeError(
            f"Expected vectors of shape (tasks, virtual tokens, {width}) for this base model, got "
            f"{tuple(vectors.shape)}. They were distilled for another base model: distil again with this one."
        )


def position_inputs(model: PreTrainedModel, positions: Tensor) -> dict[str, Tensor]:
    """Return positions (B, T) as an argument of the model's forward pass; nothing where the mask says it all (ALiBi).

    A model with ALiBi counts the slots that the mask keeps: to it, the slots of a prefix stand side by side.
    """
    return {"position_ids": positions} if accepts(model, "position_ids") else {}


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
    return write_prefix(DynamicCache() if model is None else DynamicCache(config=model.config), prefix)


def write_prefix(cache: CacheType, prefix: KeyValuePrefix) -> CacheType:
    """Write the prefix behind what a cache holds, and return the cache."""
    for layer_index, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(keys, values, layer_index)
    return cache


def _pad_left(tensor: Tensor, length: int, dim: int) -> Tensor:
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
