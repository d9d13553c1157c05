"""Keys and values out of a separate distiller's hidden states, on top of the base model's own.

Shapes: N chunks, V virtual tokens, E embedding width of the base model, R width of the reader, H key/value heads, K
head width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mend_hf.architectures import embed_tokens
from mend_hf.prefix import KeyValuePrefix, read_embeddings


class KeyValueProjection(nn.Module):
    """Adds to the base model's keys and values at V slots what a reader's hidden states say; nothing at birth.

    Of low rank: one matrix from the reader's width to `rank` for all layers, and behind it one to the keys and one to
    the values of every layer. Without it, those of GPT-2 for GPT-2-large alone would be 71 million weights (768 to 36
    times 2 times 1280); at rank 64 they are 6 million.

    Updates are added to keys that are rotated already, where the base model rotates. Nothing is lost by it: the slots
    stand at positions 0 to V in every chunk, so each has one rotation for ever, and the reader's hidden state at a
    placeholder tells which slot it is for.

    Args:
        width: R.
        own: Keys and values as the base model makes them: how many heads of what width every layer has.
        rank: Of the update; 0: full.
        is_bounded: Keep every entry of an update between -1 and 1 (tanh).
    """

    def __init__(self, width: int, own: KeyValuePrefix, rank: int, *, is_bounded: bool) -> None:
        super().__init__()
        self.is_bounded = is_bounded
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.reduction = nn.Linear(width, rank, bias=False) if rank else nn.Identity()
        self.keys = _zero_matrices(rank or width, own.keys)
        self.values = _zero_matrices(rank or width, own.values)

    def forward(self, hidden: Tensor, own: KeyValuePrefix) -> KeyValuePrefix:
        """Return the prefix of every chunk.

        Args:
            hidden (N, V, R): What the reader says at the placeholders.
            own: One row of 1 + V slots, the base model's own. The first is the sink and stays as it is.

        Returns:
            N rows of 1 + V slots, in the type of the base model's.
        """
        reduced = self.reduction(self.norm(hidden.to(next(self.keys.parameters()).dtype)))  # [N, V, rank]
        rows = own.expand(hidden.shape[0])
        return KeyValuePrefix(
            tuple(self._update(*layer, reduced) for layer in zip(rows.keys, self.keys, strict=True)),
            tuple(self._update(*layer, reduced) for layer in zip(rows.values, self.values, strict=True)),
            rows.mask,
            rows.next_positions,
        )

    def _update(self, states: Tensor, matrix: nn.Module, reduced: Tensor) -> Tensor:
        """Add a layer's update to its keys or values (N, H, 1 + V, K)."""
        update = matrix(reduced)  # [N, V, H * K]
        update = update.tanh() if self.is_bounded else update
        update = update.unflatten(-1, (states.shape[1], states.shape[3])).transpose(1, 2)  # [N, H, V, K]
        return (states + F.pad(update, (0, 0, 1, 0))).to(states.dtype)


def read_starting_vectors(base_model: PreTrainedModel, sink_id: int, vectors: Tensor) -> KeyValuePrefix:
    """Let the base model make its own keys and values of a sink and the vectors behind it.

    Args:
        base_model: Decoder-only model in evaluation mode.
        sink_id: A token.
        vectors (V, E): In the scale of the base model's input embeddings.

    Returns:
        One row of 1 + V slots.
    """
    sink = embed_tokens(base_model, torch.tensor([[sink_id]], device=base_model.device))  # [1, 1, E]
    row = torch.cat([sink, vectors.to(sink)[None]], dim=1)
    return read_embeddings(base_model, row, torch.ones(row.shape[:2], dtype=torch.bool, device=row.device))


def find_sink_id(base_model: PreTrainedModel) -> int:
    """Return the token that a text begins with by the model's own config; the first one where that names none."""
    token_id = base_model.config.get_text_config().bos_token_id
    num_tokens = base_model.get_input_embeddings().weight.shape[0]
    return token_id if isinstance(token_id, int) and token_id < num_tokens else 0


def _zero_matrices(width: int, layers: Iterable[Tensor]) -> nn.ModuleList:
    """Return a linear map to the keys or values (1, H, S, K) of every layer that gives zeros."""
    matrices = nn.ModuleList(nn.Linear(width, states.shape[1] * states.shape[3]) for states in layers)
    with torch.no_grad():
        for parameter in matrices.parameters():
            parameter.zero_()
    return matrices
