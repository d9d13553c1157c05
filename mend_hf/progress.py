"""What a person sees of a training: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_LOSSES = {"loss": "loss", "nll_loss": "nll", "kd_loss": "kd", "option_loss": "options", "hidden_loss": "hidden"}
_SHARE = "_time_fraction"

Logs = Mapping[str, float]


class TrainingProgress(TrainerCallback):
    """Shows step, losses, rows a second and the time left; above the bar, what the probe and held-out rows say.

    In a terminal there is a bar; where the output goes elsewhere, or with `disable_tqdm`, a line for every log. Only
    the main process shows anything. As a context manager it takes the bar away also when the training breaks off.

    The Trainer has a display of its own: remove it with `trainer.remove_callback(ProgressCallback)`, or, with
    `disable_tqdm`, `PrinterCallback`.

    Args:
        console: Where to; None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._bar: Progress | None = None
        self._logs: list[dict[str, float]] = []
        self._start = self._first_step = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_bar_away()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the bar up."""
        self._logs, self._start, self._first_step = [], time.perf_counter(), state.global_step
        if not state.is_world_process_zero or args.disable_tqdm or not self._console.is_interactive:
            return
        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[said]}"),
            TextColumn("{task.fields[left]}", style="progress.remaining"),
        )
        self._bar = Progress(*columns, console=self._console, expand=True, refresh_per_second=4)
        self._bar.add_task("", total=state.max_steps, completed=state.global_step, said="", left="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar on."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, left=self._estimate_time_left(state))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say why the bar stands still."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], left="evaluating")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say again how much time is left."""
        self.on_step_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Logs | None = None, **_: Any) -> None:
        """Show what was logged."""
        if not state.is_world_process_zero or not logs:
            return
        self._logs.append({**logs})
        place = f"step {state.global_step}/{state.max_steps}"
        if "probe_nll" in logs:
            self._print(f"{place}  {_describe_probe(logs)}")
        elif "loss" in logs and self._bar is not None:
            self._bar.update(self._bar.task_ids[0], said=_describe_training(logs))
        elif "loss" in logs:
            rate = f"lr {logs['learning_rate']:.1e}  " if "learning_rate" in logs else ""
            self._print(f"{place}  {_describe_training(logs)}  {rate}{self._estimate_time_left(state)}")
        elif "eval_loss" in logs:
            self._print(f"{place}  held out: {_describe_losses(logs, 'eval_')}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar away and say what came of it."""
        self._take_bar_away()
        if not state.is_world_process_zero:
            return
        num_steps = state.global_step - int(self._first_step)
        self._print(f"{num_steps} steps in {_format_time(time.perf_counter() - self._start)}{self._describe_shares()}")
        losses = [logs for logs in self._logs if "loss" in logs]
        if losses:
            self._print(f"loss {losses[0]['loss']:.3f} -> {losses[-1]['loss']:.3f}")
        probes = [logs for logs in self._logs if "probe_nll" in logs]
        if probes:
            self._print(_describe_probe(probes[-1], probes[0]))

    def _take_bar_away(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _estimate_time_left(self, state: Any) -> str:
        num_done = state.global_step - self._first_step
        if not num_done:
            return ""
        seconds = (time.perf_counter() - self._start) / num_done * (state.max_steps - state.global_step)
        return f"{_format_time(seconds)} left"

    def _describe_shares(self) -> str:
        """Return the mean shares of the time, in brackets."""
        logs = [entry for entry in self._logs if f"rest{_SHARE}" in entry]
        if not logs:
            return ""
        names = [name for name in logs[0] if name.endswith(_SHARE)]
        shares = {name.removesuffix(_SHARE): sum(entry[name] for entry in logs) / len(logs) for name in names}
        return " (" + ", ".join(f"{part} {share:.0%}" for part, share in shares.items() if share) + ")"


def _describe_training(logs: Logs) -> str:
    speed = f"  {logs['rows_per_second']:.3g} rows/s" if "rows_per_second" in logs else ""
    return _describe_losses(logs) + speed


def _describe_losses(logs: Logs, prefix: str = "") -> str:
    return "  ".join(f"{word} {logs[prefix + name]:.3f}" for name, word in _LOSSES.items() if prefix + name in logs)


def _describe_probe(logs: Logs, before: Logs | None = None) -> str:
    """Return what the probe says, from a first time on if one is given."""
    measured = [(word, name) for word, name in (("nll", "probe_nll"), ("KL", "probe_kl")) if name in logs]
    parts = [
        f"{word} " + (f"{before[name]:.3f} -> " if before else "") + f"{logs[name]:.3f}" for word, name in measured
    ]
    marks = {"zero-shot": "probe_zero_shot_nll", "teacher": "probe_teacher_nll"}
    known = [f"{word} {logs[name]:.3f}" for word, name in marks.items() if name in logs]
    parts[0] += f" ({', '.join(known)})" if known else ""
    return "probe: " + ", ".join(parts)


def _format_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
