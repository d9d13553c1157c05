"""A fixed handful of rows that show, while it trains, how near the student has come to the teacher.

Shapes: R tasks, B queries, P predicted tokens, O opening tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mend_hf.data.collator import MendCollator
from mend_hf.errors import ConfigError, DataError
from mend_hf.losses import IGNORE_INDEX, kd_loss, nll_loss
from mend_hf.model import MendModel
from mend_hf.objective import Objective
from mend_hf.teacher import Teacher

Batch = dict[str, Tensor]


class Probe:
    """Measures the same rows again and again, without dropout, gradients or random numbers.

    `probe_kl`: KL(teacher || student) at temperature 1, whatever the training lowers; `probe_nll`: the student's NLL
    of the targets. Both are means over all tokens of the rows, in nats a token. Beside them stand, worked out once
    because they never change, the targets' NLL behind the demonstrations' full text (`probe_teacher_nll`) and behind
    nothing at all (`probe_zero_shot_nll`): a distiller starts near the second and should come to the first.

    Of a language model that is tuned itself there is only `probe_nll`.

    Args:
        objective: Whose student is measured.
        rows: As for training, with a length.
        collate: Makes a batch of a list of rows, with the teacher's columns: `MendCollator`, which adds them here.
        batch_size: Rows read at once.

    Raises:
        ConfigError: There are no rows.
        DataError: The batches have no columns for the teacher, or no targets.
    """

    def __init__(
        self, objective: Objective, rows: Sequence[Any], collate: Callable[[list[Any]], Batch], batch_size: int
    ) -> None:
        if not len(rows):
            raise ConfigError("Expected probe_dataset with at least one row, got an empty one: leave it out.")
        if isinstance(collate, MendCollator):
            collate = copy.copy(collate)
            collate.with_teacher, collate.with_options = True, False
        self._objective = objective
        indices = range(len(rows))
        with torch.random.fork_rng(devices=[]):
            self._batches = [
                collate([rows[index] for index in indices[start : start + batch_size]])
                for start in indices[::batch_size]
            ]
        if isinstance(objective.model, MendModel) and "teacher_input_ids" not in self._batches[0]:
            raise DataError(
                "Expected teacher_input_ids in the probe's batches, got none: use MendCollator(..., "
                "with_teacher=True), or train without probe_dataset."
            )
        pairs = [objective.align(batch) for batch in self._batches]
        self._num_labels = sum(int((labels != IGNORE_INDEX).sum()) for labels, _ in pairs)
        self._num_tokens = sum(int(mask.sum()) for _, mask in pairs)
        if not self._num_labels:
            raise DataError("Expected targets in the rows of probe_dataset, got none: add some, or leave it out.")
        self._teacher = Teacher()
        self._constants: dict[str, float] = {}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the means over all tokens of the rows, in nats a token."""
        model = self._objective.model
        was_training = model.training
        model.eval()
        try:
            values = self._add_up(self._measure_batch)  # first: a sharded model is called as a whole before its parts
            if isinstance(model, MendModel) and "probe_zero_shot_nll" not in self._constants:
                self._constants |= self._add_up(self._measure_zero_shot)
        finally:
            model.train(was_training)
        self._constants |= {name: values[name] for name in ("probe_teacher_nll",) if name in values}
        return values | self._constants

    def _add_up(self, measure: Callable[[Batch, Tensor, Tensor], dict[str, Tensor]]) -> dict[str, float]:
        """Return the sum over all batches of parts that are already divided by the tokens of all."""
        sums: dict[str, Tensor] = {}
        for batch in self._batches:
            there = {name: tensor.to(self._objective.model.device) for name, tensor in batch.items()}
            for name, value in measure(there, *self._objective.align(there)).items():
                sums[name] = sums.get(name, 0) + value
        return {name: float(value) for name, value in sums.items()}

    def _measure_batch(self, batch: Batch, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        model = self._objective.model
        logits = self._objective.run_student(model, batch).logits[:, : labels.shape[1]]
        values = {"probe_nll": nll_loss(logits, labels, num_items=self._num_labels)}
        if isinstance(model, MendModel):
            targets = model.route.target_inputs(batch["labels"])
            teacher = self._teacher(model, {**batch, **targets}, mask).predictions
            values["probe_kl"] = kd_loss(logits, teacher, mask, num_items=self._num_tokens)
            if isinstance(teacher, Tensor) and "probe_teacher_nll" not in self._constants:
                values["probe_teacher_nll"] = nll_loss(teacher, labels, num_items=self._num_labels)
        return values

    def _measure_zero_shot(self, batch: Batch, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        model = self._objective.model
        alone = Objective(model.base_model, self._objective.args)  # a language model that reads a text: almost none
        opening_ids, opening_mask = keep_opening(batch, model.prompt.opening_ids)
        batch = batch | {"teacher_input_ids": opening_ids, "teacher_attention_mask": opening_mask}
        logits = alone.run_student(model.base_model, batch).logits[:, : labels.shape[1]]
        return {"probe_zero_shot_nll": nll_loss(logits, labels, num_items=self._num_labels)}


def keep_opening(batch: Mapping[str, Tensor], opening_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return what stands in front of the first demonstration of every text: a begin-of-text id, or a chat's opening.

    Returns:
        Ids (R, O) and their mask (R, O), where O may be 0.
    """
    ids, mask = batch["teacher_input_ids"], batch["teacher_attention_mask"]
    num_kept = min(len(opening_ids), ids.shape[1])
    wanted = ids.new_tensor(opening_ids[:num_kept])
    places = mask.argmax(1, keepdim=True) + torch.arange(num_kept, device=ids.device)  # [R, O]; texts end on the right
    found = ids.gather(1, places.clamp(max=ids.shape[1] - 1))
    return found, (found == wanted).long().cumprod(1)
