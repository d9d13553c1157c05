"""The losses apart, as they are logged: means over steps in training, over rows in evaluation, of all processes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate import Accelerator

from mend_hf.objective import LOSSES


class LossLog:
    """Adds losses up until they are asked for.

    Args:
        accelerator: Of the processes that train together.
        parts_add_up: Each process has divided its losses by the tokens of all; otherwise by its own, and the mean of
            the processes is what is trained.
    """

    def __init__(self, accelerator: Accelerator, *, parts_add_up: bool) -> None:
        self._accelerator = accelerator
        self._parts_add_up = parts_add_up
        self._start()
        self._eval_sums: dict[str, float] = defaultdict(float)

    def _start(self) -> None:
        self._sums = dict.fromkeys(LOSSES, math.nan)
        self._num_steps = self._num_skipped = 0

    def begin_step(self) -> None:
        """Count one more step of training."""
        self._num_steps += 1

    def skip(self) -> None:
        """Count a batch that was passed over."""
        self._num_skipped += 1

    def add(self, losses: Mapping[str, float]) -> None:
        """Add one batch's part of a training step's losses."""
        for name, value in losses.items():
            self._sums[name] = value + (0.0 if math.isnan(self._sums[name]) else self._sums[name])

    def pop(self) -> tuple[dict[str, float], int]:
        """Return the mean losses a step, and how many batches were skipped, since the last time; start anew."""
        parts = [[*self._sums.values(), float(self._num_skipped)]]
        gathered = self._gather(parts)  # [processes, losses + 1]
        losses, num_skipped = gathered[:, :-1], int(gathered[:, -1].sum())
        totals = losses.nansum(0) if self._parts_add_up else losses.nanmean(0)
        totals = totals.masked_fill(losses.isnan().all(0), math.nan) / max(self._num_steps, 1)
        self._start()
        return {name: v for name, v in zip(LOSSES, totals.tolist(), strict=True) if not math.isnan(v)}, num_skipped

    def _gather(self, parts: list[list[float]]) -> torch.Tensor:
        rows = torch.tensor(parts, device=self._accelerator.device)
        return self._accelerator.gather(rows) if self._accelerator.num_processes > 1 else rows

    def begin_evaluation(self) -> None:
        """Forget what an earlier evaluation has added."""
        self._eval_sums = defaultdict(float)

    def add_evaluated(self, losses: Mapping[str, float], num_rows: int) -> None:
        """Add a batch's mean losses, weighted by its rows as `eval_loss` is."""
        values = [[losses.get(name, math.nan) for name in LOSSES]] * num_rows
        rows = torch.tensor(values, device=self._accelerator.device)
        rows = self._accelerator.gather_for_metrics(rows)  # [rows of all processes, losses]; none of them twice
        for name, column in zip(LOSSES, rows.T, strict=True):
            if not column.isnan().all():
                self._eval_sums[name] += column.nansum().item()
                self._eval_sums[f"num_{name}"] += int(column.isnan().logical_not().sum())

    def evaluated(self) -> dict[str, float]:
        """Return the mean losses of the evaluated rows."""
        sums = self._eval_sums
        return {name: sums[name] / sums[f"num_{name}"] for name in LOSSES if name in sums}
