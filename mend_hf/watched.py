"""A Trainer that says, in its logs, how fast it is, where the time goes, and how near student and teacher are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from mend_hf.model import MendModel
from mend_hf.objective import Objective
from mend_hf.probe import Probe
from mend_hf.resumable import ResumableTrainer
from mend_hf.stopwatch import REST

PARTS = ("teacher", "distiller", "student", "backward", REST)


class WatchedTrainer(ResumableTrainer):
    """`ResumableTrainer` that logs its speed, and what a probe measures.

    Beside the loss stand, of the time since the last such log, `rows_per_second` and `tokens_per_second` of all
    processes: a row is one distilling; its tokens are those of its demonstrations, counted once, of its queries and of
    their targets. Then the shares of that time, in the first process: `teacher_time_fraction`,
    `distiller_time_fraction`, `student_time_fraction` (the base model behind the prefix, and the losses),
    `backward_time_fraction` and `rest_time_fraction` (data, optimizer). Evaluating, probing and saving do not count.

    What the probe measures is logged before the first step, every `probe_steps` and at the end.

    Args:
        objective: The model to train, the arguments, and the stopwatch that times the parts of a forward pass.
        probe_dataset: Rows for a `Probe`; None: none.
        **kwargs: Passed to `Trainer`.
    """

    def __init__(self, objective: Objective, probe_dataset: Any = None, **kwargs: Any) -> None:
        super().__init__(objective.model, objective.args, **kwargs)
        self._stopwatch = objective.stopwatch
        self._num_seen: Tensor | int = 0  # rows and tokens (2,)
        self._probe: Probe | None = None
        self._probed_step: int | None = None
        if probe_dataset is not None:
            self._probe = Probe(objective, probe_dataset, self.data_collator, self.args.per_device_eval_batch_size)
        self.add_callback(_Starter(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as `ResumableTrainer` does."""
        model = self.accelerator.unwrap_model(self.model)
        is_mend = isinstance(model, MendModel)
        with self._stopwatch.measure_calls(model.distiller, "distiller") if is_mend else nullcontext():
            try:
                return super().train(*args, **kwargs)
            finally:
                self._stopwatch.stop()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect the batches of one step, and count what is in them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self._num_seen = self._num_seen + _count_rows_and_tokens(batch)
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward; what is not timed as a part of the forward pass is backward."""
        with self._stopwatch.measure("backward"):
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with speed and shares of the time beside the training loss."""
        if "loss" in logs:
            logs |= self._describe_speed()
        super().log(logs, start_time)

    def start_stopwatch(self) -> None:
        """Count time, rows and tokens from now on."""
        self._num_seen = 0
        self._stopwatch.start()

    def log_probe(self) -> None:
        """Log what the probe measures now, if there is one."""
        if self._probe is None:
            return
        with self.compute_loss_context_manager():
            values = self._probe.measure()
        should_log = self.control.should_log  # logging would take it for done
        self._probed_step = self.state.global_step
        self.log({name: round(value, 6) for name, value in values.items()})
        self.control.should_log = should_log

    def _describe_speed(self) -> dict[str, float]:
        seconds = self._stopwatch.pop()
        total = sum(seconds.values())
        seen, self._num_seen = self._num_seen, 0
        if not total or not isinstance(seen, Tensor):
            return {}
        if self.args.world_size > 1:
            seen = self.accelerator.gather(seen[None].to(self.args.device)).sum(0)
        num_rows, num_tokens = seen.tolist()
        speed = {"rows_per_second": round(num_rows / total, 4), "tokens_per_second": round(num_tokens / total, 2)}
        return speed | {f"{part}_time_fraction": round(seconds.get(part, 0.0) / total, 4) for part in PARTS}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Probe where it is time to, before a checkpoint keeps the log; nothing here counts as training time."""
        with self._stopwatch.pause():
            step = self.state.global_step
            is_due = step % self.args.probe_steps == 0 or self.control.should_training_stop
            if is_due and step != self._probed_step:
                self.log_probe()
            super()._maybe_log_save_evaluate(*args, **kwargs)


class _Starter(TrainerCallback):
    """Probes before the first step, and starts the stopwatch."""

    def __init__(self, trainer: WatchedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See the class."""
        if state.global_step == 0:
            self._trainer.log_probe()
        self._trainer.start_stopwatch()


def _count_rows_and_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return (2,): how many rows a batch has, and how many tokens."""
    tasks = batch.get("query_task_rows")
    rows = batch["labels"].new_tensor(len(batch["labels"])) if tasks is None else tasks.max() + 1
    texts = [batch[name].sum() for name in ("demo_attention_mask", "attention_mask") if name in batch]
    return torch.stack([rows, sum(texts, start=rows.new_zeros(()))])
