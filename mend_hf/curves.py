"""A picture of a training's curves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mend_hf.errors import DataError, import_extra
from mend_hf.files import write_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_NAME = "training_curves.png"

# Colours that stay apart for colour-blind eyes and in grey (Okabe and Ito, 2008).
_BLACK, _BLUE, _ORANGE, _GREEN, _RED = "#333333", "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PINK = "#CC79A7"
_LOSSES = {
    "loss": ("loss (weighted sum)", _BLACK),
    "nll_loss": ("NLL of the targets", _BLUE),
    "kd_loss": ("divergence from the teacher", _RED),
    "option_loss": ("choice among the options (nats per query)", _PINK),
    "hidden_loss": ("distance of hidden states (no unit)", _GREEN),
}
_MAX_PLAIN_POINTS = 40  # more than these are smoothed

Log = Sequence[Mapping[str, Any]]
Points = tuple[list[int], list[float]]


class TrainingCurves(TrainerCallback):
    """Draws `training_curves.png` into the output folder at every save and at the end, see `plot_training`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """

    def __init__(self) -> None:
        _import_figure()
        self._num_drawn = 0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw what has been logged so far."""
        self._draw(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw all that has been logged."""
        self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        """Draw, in the main process; a picture that cannot be written is no reason to stop a training."""
        log = [entry for entry in state.log_history if "train_runtime" not in entry]  # the last, which is no curve's
        if not state.is_world_process_zero or not _points(log, "loss")[0] or len(log) == self._num_drawn:
            return
        self._num_drawn = len(log)
        try:
            plot_training(log, Path(args.output_dir) / CURVES_NAME)
        except OSError as error:
            warnings.warn(f"{CURVES_NAME} was not written: {error}", stacklevel=2)


def plot_training(log_history: Log, path: str | Path) -> None:
    """Draw the losses, the learning rate and, if there was a probe, how near it has come to the teacher.

    Args:
        log_history: `trainer.state.log_history`, or the entry "log" of a `training_log.json`.
        path: Of the picture; its suffix is the format, e.g. .png, .pdf or .svg. It is written whole or not at all.

    Raises:
        DataError: No training loss was logged.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if not _points(log_history, "loss")[0]:
        raise DataError("Expected a log with training losses, got none: train for at least logging_steps steps.")
    has_probe = bool(_points(log_history, "probe_nll")[0])
    has_divergence = bool(_points(log_history, "probe_kl")[0])
    figure = _import_figure()(figsize=(10, 7 if has_probe else 3.8), layout="constrained")
    grid = figure.subplots(2 if has_probe else 1, 2, squeeze=False).flatten().tolist()
    _draw_losses(grid[0], log_history)
    _draw_learning_rate(grid[1], log_history)
    if has_probe:
        _draw_probe_nll(grid[2], log_history)
        if has_divergence:
            _draw_probe_kl(grid[3], log_history)
        else:
            grid[3].set_axis_off()
    _describe_speed(figure, log_history)
    with write_folder(path.parent) as folder:
        figure.savefig(folder / path.name, dpi=130, facecolor="white")


def _import_figure() -> type[Figure]:
    """Return matplotlib's class of figures, which, other than pyplot, changes nothing outside itself."""
    return import_extra("matplotlib.figure", "train").Figure


def _points(log: Log, name: str) -> Points:
    """Return the steps at which a finite number was logged, and these numbers."""
    pairs = [(int(entry["step"]), float(entry[name])) for entry in log if name in entry]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _draw_losses(axes: Axes, log: Log) -> None:
    total, *names = [name for name in _LOSSES if _points(log, name)[0]]
    if not any(_are_alike(_points(log, total), _points(log, name)) for name in names):  # not one with a weight of 1
        names = [total, *names]
    for name in names:
        label, colour = _LOSSES[name]
        _draw_noisy(axes, _points(log, name), label, colour)
        held_out = _points(log, f"eval_{name}")
        if held_out[0]:
            axes.plot(*held_out, "o", markersize=4, markerfacecolor="white", color=colour, label=f"{label}, held out")
    _finish(axes, "Training", "nats per token")
    axes.legend(frameon=False, fontsize=8)


def _are_alike(one: Points, other: Points) -> bool:
    return one[0] == other[0] and all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(one[1], other[1], strict=True))


def _draw_noisy(axes: Axes, points: Points, label: str, colour: str) -> None:
    """Draw a curve; where it has many points, these faintly and their running mean over a tenth of all."""
    steps, values = points
    if len(steps) <= _MAX_PLAIN_POINTS:
        axes.plot(steps, values, color=colour, label=label, marker=_choose_marker(steps))
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    reach = len(values) // 20
    windows = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
    axes.plot(steps, [sum(window) / len(window) for window in windows], color=colour, label=label)


def _choose_marker(steps: list[int]) -> str | None:
    return "." if len(steps) < 10 else None


def _draw_learning_rate(axes: Axes, log: Log) -> None:
    steps, values = _points(log, "learning_rate")
    axes.plot(steps, values, color=_BLACK, marker=_choose_marker(steps))
    axes.yaxis.set_major_formatter("{x:.2g}")
    _finish(axes, "Learning rate", "learning rate")


def _draw_probe_nll(axes: Axes, log: Log) -> None:
    steps, values = _points(log, "probe_nll")
    for name, label, colour in (
        ("probe_zero_shot_nll", "zero-shot", _ORANGE),
        ("probe_teacher_nll", "teacher (full text)", _GREEN),
    ):
        constant = _points(log, name)[1]
        if constant:
            axes.axhline(constant[-1], color=colour, linestyle="--", label=f"{label}: {constant[-1]:.3g}")
    axes.plot(steps, values, color=_BLUE, marker="o", markersize=3, label=f"student (prefix): {values[-1]:.3g}")
    _finish(axes, "Probe: NLL of the targets", "nats per token")
    axes.legend(frameon=False, fontsize=8)


def _draw_probe_kl(axes: Axes, log: Log) -> None:
    steps, values = _points(log, "probe_kl")
    axes.plot(steps, values, color=_RED, marker="o", markersize=3, label=f"KL(teacher ‖ student): {values[-1]:.3g}")
    _finish(axes, "Probe: divergence from the teacher", "nats per token")
    axes.legend(frameon=False, fontsize=8)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    right, top = axes.dataLim.max
    if math.isfinite(right):  # there is something in the panel
        axes.set_xlim(-0.02 * max(right, 1), 1.02 * max(right, 1))
        axes.set_ylim(0, 1.08 * top or 1)
    axes.locator_params(axis="x", integer=True, nbins=7)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _describe_speed(figure: Figure, log: Log) -> None:
    """Say above the panels how fast the training was and where its time went, on the whole."""
    entries = [entry for entry in log if entry.get("rows_per_second")]
    if not entries:
        return
    rows, tokens = (harmonic_mean([entry[f"{unit}_per_second"] for entry in entries]) for unit in ("rows", "tokens"))
    end = "_time_fraction"
    means = {name.removesuffix(end): fmean(e[name] for e in entries) for name in entries[-1] if name.endswith(end)}
    shares = ", ".join(f"{part} {mean:.0%}" for part, mean in means.items())
    figure.suptitle(
        f"step {entries[-1]['step']:,}  ·  {rows:.3g} rows/s, {tokens:,.0f} tokens/s  ·  time: {shares}",
        fontsize=9,
        color=_BLACK,
    )
