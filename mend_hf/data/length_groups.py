"""Batches of rows of like length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from mend_hf.demonstrations import parse_demonstrations


@runtime_checkable
class Measurable(Protocol):
    """Rows that know their lengths more cheaply than by being made."""

    def row_lengths(self) -> list[int]:
        """Return a length for every row, by which rows can be put in order."""
        ...


class LengthSampler(LengthGroupedSampler):
    """Rows in random steps of like length, which seed and epoch alone fix; the step of the longest row comes first.

    transformers sorts pools of up to 50 steps by length; here their steps are then shuffled, so that lengths do not
    fall and rise while a training runs, and every process and every training that goes on draws the same ones.

    Args:
        lengths: Of every row.
        step_rows: Rows of an optimizer step, over all processes.
        seed: Fixes the order.
    """

    def __init__(self, lengths: list[int], step_rows: int, seed: int) -> None:
        super().__init__(step_rows, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the rows' numbers."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = [*super().__iter__()]
        steps = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        last = [steps.pop()] if len(steps[-1]) < self.batch_size else []
        others = torch.randperm(max(len(steps) - 1, 0), generator=self.generator).tolist()
        for step in [*steps[:1], *(steps[1 + place] for place in others), *last]:
            yield from step


def measure_rows(rows: Any, length_column: str) -> list[int]:
    """Return the lengths of rows, without tokenising them.

    Args:
        rows: A data set with a length.
        length_column: Where a row has its length, if it has one; otherwise its characters are counted.
    """
    if isinstance(rows, Measurable):
        return rows.row_lengths()
    return [_measure_row(rows[index], length_column) for index in range(len(rows))]


def _measure_row(row: Mapping[str, Any], length_column: str) -> int:
    if length_column in row:
        return int(row[length_column])
    [demonstrations], _ = parse_demonstrations(row.get("demonstrations", ()))
    longest = max(len(text) for text in _as_list(row["query"])) + max(len(text) for text in _as_list(row["target"]))
    return longest + sum(len(item.input) + len(item.output or "") for item in demonstrations)


def _as_list(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts
