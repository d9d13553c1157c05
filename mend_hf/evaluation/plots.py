"""Pictures of results: score against cost, score against the number of demonstrations, differences task by task."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from mend_hf.errors import import_extra
from mend_hf.evaluation.report import MethodSummary, summarise
from mend_hf.evaluation.results import TaskResult
from mend_hf.evaluation.statistics import bootstrap_interval, make_table
from mend_hf.files import write_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light pages, and dark ones: what stands behind a picture, and what matplotlib draws letters, axes and grids in.
_DARK = "#e8e8e8"
_LOOKS: dict[str, tuple[tuple[str, ...], str, dict[str, str]]] = {
    "": ((".png", ".svg"), "white", {}),
    "_dark": (
        (".svg",),
        "none",
        dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _DARK)
        | {"axes.facecolor": "none", "grid.color": "#888888"},
    ),
}

# Colours that stay apart for colour-blind eyes (Okabe and Ito, 2008), on white and on black; methods also differ by
# their marks.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#999999")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot_results(results: Sequence[TaskResult], folder: Path, against: str) -> dict[str, str]:
    """Draw what results allow, each as PNG and SVG, and as `NAME_dark.svg` for dark pages.

    Args:
        results: Of one or more methods.
        folder: Made if need be.
        against: The method that task differences are taken from.

    Returns:
        What each picture shows, by its name without suffix.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "eval")
    drawn: dict[str, tuple[str, Callable[[], Figure]]] = {
        "score_against_time": ("Score against time a query", partial(_plot_cost, summarise(results)))
    }
    if len({result.num_demonstrations for result in results}) > 1:
        drawn["score_against_demonstrations"] = (
            "Score against the number of demonstrations",
            partial(_plot_demonstrations, results),
        )
    differences = {method: _take_differences(results, method, against) for method in _methods_beside(results, against)}
    farthest = max(
        (abs(value) for own in differences.values() for values in own.values() for value in values), default=0
    )
    for method, own in differences.items():
        drawn[f"differences_{name_file(method)}"] = (
            f"{method} less {against}, task by task",
            partial(_plot_differences, own, method, against, farthest),
        )
    with write_folder(folder) as temporary:
        for ending, (suffixes, background, colours) in _LOOKS.items():
            with matplotlib.rc_context(colours):
                for name, (_, draw) in drawn.items():
                    figure = draw()
                    for suffix in suffixes:
                        figure.savefig(temporary / f"{name}{ending}{suffix}", dpi=160, facecolor=background)
    return {name: title for name, (title, _) in drawn.items()}


def find_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return which points no other one beats in both cost and score, by rising cost."""
    front: list[int] = []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], -scores[place])):
        if not front or scores[place] > scores[front[-1]]:
            front.append(place)
    return front


def name_file(title: str) -> str:
    """Return a title as a file's name: small letters, digits, hyphens, points, and an underscore for all between."""
    return re.sub(r"[^\w.-]+|_+", "_", title.lower()).strip("_")


def _methods_beside(results: Sequence[TaskResult], against: str) -> list[str]:
    names = dict.fromkeys(result.method for result in results)
    return [name for name in names if name != against] if against in names else []


def _make_figure(height: float = 3.8) -> tuple[Figure, Axes]:
    """Return a figure no wider than it must be: a telephone shows it whole, and its letters shrink with it."""
    figure = import_extra("matplotlib.figure", "eval").Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _plot_cost(summaries: Sequence[MethodSummary]) -> Figure:
    figure, axes = _make_figure()
    costs = [summary.milliseconds_per_query for summary in summaries]
    scores = [100 * summary.score for summary in summaries]
    front = find_front(costs, scores)
    axes.plot(
        [costs[i] for i in front], [scores[i] for i in front], color="#bbbbbb", zorder=1, label="best for its cost"
    )
    for place, summary in enumerate(summaries):
        low, high = 100 * summary.interval.low, 100 * summary.interval.high
        axes.errorbar(
            costs[place],
            scores[place],
            yerr=[[max(scores[place] - low, 0)], [max(high - scores[place], 0)]],
            color=_COLOURS[place % len(_COLOURS)],
            marker=_MARKS[place % len(_MARKS)],
            linestyle="none",
            elinewidth=0.8,
            markersize=7,
            label=f"{summary.method} ({summary.prefix_slots:.0f} slots)",
        )
    axes.set_xlabel("milliseconds a query, demonstrations read before")
    axes.set_ylabel("score, points of 100")
    axes.set_xlim(left=0)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.set_figheight(3.6 + 0.11 * len(summaries))
    return figure


def _plot_demonstrations(results: Sequence[TaskResult]) -> Figure:
    figure, axes = _make_figure()
    for place, method in enumerate(dict.fromkeys(result.method for result in results)):
        own = [result for result in results if result.method == method]
        counts = sorted({result.num_demonstrations for result in own})
        tables = [make_table([result for result in own if result.num_demonstrations == count]) for count in counts]
        intervals = [bootstrap_interval(table) for table in tables]
        means = [100 * float(np.nanmean(np.nanmean(table, axis=1))) for table in tables]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot(counts, means, color=colour, marker=_MARKS[place % len(_MARKS)], label=method)
        axes.fill_between(
            counts, [100 * i.low for i in intervals], [100 * i.high for i in intervals], color=colour, alpha=0.12
        )
    counts = sorted({result.num_demonstrations for result in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("demonstrations")
    axes.set_ylabel("score, points of 100")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _take_differences(results: Sequence[TaskResult], method: str, against: str) -> dict[str, list[float]]:
    """Return by task what a method has over another one with every seed, in points of 100."""
    keyed = {(r.task, r.seed, r.num_demonstrations, r.variation, r.scoring): r for r in results if r.method == against}
    by_task: dict[str, list[float]] = {}
    for result in results:
        other = keyed.get((result.task, result.seed, result.num_demonstrations, result.variation, result.scoring))
        if result.method == method and other is not None:
            by_task.setdefault(result.task, []).append(100 * (result.score - other.score))
    return by_task


def _plot_differences(by_task: Mapping[str, Sequence[float]], method: str, against: str, farthest: float) -> Figure:
    """Draw what a method has over another one on every task, most on top; lines span the seeds.

    Args:
        by_task: The differences with every seed.
        method: The one that is drawn.
        against: The other one.
        farthest: Where the axis ends on both sides, so that pictures of several methods can be compared.
    """
    tasks = sorted(by_task, key=lambda task: fmean(by_task[task]))
    figure, axes = _make_figure(1.6 + 0.24 * len(tasks))
    ink = axes.xaxis.label.get_color()
    means = [fmean(by_task[task]) for task in tasks]
    axes.barh(tasks, means, color=[_COLOURS[0] if mean >= 0 else _COLOURS[1] for mean in means], height=0.7)
    for place, task in enumerate(tasks):
        axes.plot([min(by_task[task]), max(by_task[task])], [place, place], color=ink, linewidth=1)
    axes.axvline(0, color=ink, linewidth=0.8)
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    if farthest:
        axes.set_xlim(-1.05 * farthest, 1.05 * farthest)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(f"{method} less {against}, points\n(line: lowest to highest seed)")
    return figure
