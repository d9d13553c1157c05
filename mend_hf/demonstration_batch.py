"""The tokens of several tasks' demonstrations, cut into chunks, as the distiller reads them.

Shapes: N chunks, B tasks, D demonstration tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mend_hf.demonstrations import EncodedTask


@dataclass(frozen=True)
class DemonstrationBatch:
    """Token ids of the demonstrations of B tasks, cut into N chunks, padded on the left.

    Attributes:
        input_ids (N, D): Token ids.
        attention_mask (N, D): 1 where there is a token.
        anchor_mask (N, D): True at the tokens whose keys and values are kept.
        task_rows (N,): Which task a chunk belongs to, ascending from 0; a task's chunks follow one another.
    """

    input_ids: Tensor
    attention_mask: Tensor
    anchor_mask: Tensor
    task_rows: Tensor

    @classmethod
    def from_columns(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        anchor_mask: Tensor | None = None,
        task_rows: Tensor | None = None,
    ) -> DemonstrationBatch:
        """Take a collator's columns as they are; what is left out means no padding, no anchors, one chunk a task."""
        return cls(
            input_ids,
            torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            torch.zeros_like(input_ids, dtype=torch.bool) if anchor_mask is None else anchor_mask,
            torch.arange(input_ids.shape[0], device=input_ids.device) if task_rows is None else task_rows,
        )

    @classmethod
    def from_tasks(cls, tasks: list[EncodedTask], pad_token_id: int) -> DemonstrationBatch:
        """Pad the chunks of several tasks to one length."""
        chunks = [(row, chunk) for row, task in enumerate(tasks) for chunk in task.chunks]
        length = max(len(chunk.input_ids) for _, chunk in chunks)
        input_ids = torch.full((len(chunks), length), pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        anchor_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for index, (_, chunk) in enumerate(chunks):
            start = length - len(chunk.input_ids)
            input_ids[index, start:] = torch.tensor(chunk.input_ids)
            attention_mask[index, start:] = 1
            anchor_mask[index, [start + position for position in chunk.anchor_positions]] = True
        return cls(input_ids, attention_mask, anchor_mask, torch.tensor([row for row, _ in chunks]))

    def to(self, device: torch.device) -> DemonstrationBatch:
        """Return the batch on a device."""
        return DemonstrationBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def select(self, chunks: Tensor) -> DemonstrationBatch:
        """Return the chunks of the given numbers, each as a task of its own, without needless padding."""
        start = self.input_ids.shape[1] - int(self.attention_mask[chunks].sum(1).max())
        return DemonstrationBatch(
            self.input_ids[chunks, start:],
            self.attention_mask[chunks, start:],
            self.anchor_mask[chunks, start:],
            torch.arange(len(chunks), device=chunks.device),
        )

    def rounds(self) -> Iterator[tuple[DemonstrationBatch, Tensor]]:
        """Yield the first chunks of all tasks, then the second ones, ...: each with the rows of its tasks."""
        same = self.task_rows[:, None] == self.task_rows[None, :]
        chunk_number = same.tril(-1).sum(1)  # [N]
        for number in range(int(chunk_number.max()) + 1):
            index = (chunk_number == number).nonzero().squeeze(1)
            rows = self.task_rows[index]
            yield self.select(index), rows
