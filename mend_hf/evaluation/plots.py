"""Pictures of results: score against cost, score against the number of demonstrations, differences task by task."""

from __future__ import annotations

from collections.abc import Sequence
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

SUFFIXES = (".png", ".svg")

# Colours that stay apart for colour-blind eyes (Okabe and Ito, 2008); methods also differ by their marks.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot_results(results: Sequence[TaskResult], folder: Path, against: str) -> list[str]:
    """Draw what results allow, each as PNG and SVG, and return the pictures' names without suffix.

    Args:
        results: Of one or more methods.
        folder: Made if need be.
        against: The method that task differences are taken from.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = {"score_against_time": _plot_cost(summarise(results))}
    if len({result.num_demonstrations for result in results}) > 1:
        figures["score_against_demonstrations"] = _plot_demonstrations(results)
    for place, method in enumerate(_methods_beside(results, against)):
        figures[f"differences_{place}"] = _plot_differences(results, method, against)
    with write_folder(folder) as temporary:
        for name, figure in figures.items():
            for suffix in SUFFIXES:
                figure.savefig(temporary / f"{name}{suffix}", dpi=160, facecolor="white")
    return list(figures)


def find_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return which points no other one beats in both cost and score, by rising cost."""
    front: list[int] = []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], -scores[place])):
        if not front or scores[place] > scores[front[-1]]:
            front.append(place)
    return front


def _methods_beside(results: Sequence[TaskResult], against: str) -> list[str]:
    names = dict.fromkeys(result.method for result in results)
    return [name for name in names if name != against] if against in names else []


def _make_figure(height: float = 4.2) -> tuple[Figure, Axes]:
    figure = import_extra("matplotlib.figure", "eval").Figure(figsize=(6.4, height), layout="constrained")
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
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    figure.set_size_inches(8.0, 4.2)
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


def _plot_differences(results: Sequence[TaskResult], method: str, against: str) -> Figure:
    """Draw what a method has over another one on every task, most on top; lines span the seeds."""
    keyed = {(r.task, r.seed, r.num_demonstrations, r.variation, r.scoring): r for r in results if r.method == against}
    by_task: dict[str, list[float]] = {}
    for result in results:
        other = keyed.get((result.task, result.seed, result.num_demonstrations, result.variation, result.scoring))
        if result.method == method and other is not None:
            by_task.setdefault(result.task, []).append(100 * (result.score - other.score))
    tasks = sorted(by_task, key=lambda task: fmean(by_task[task]))
    figure, axes = _make_figure(1.6 + 0.24 * len(tasks))
    means = [fmean(by_task[task]) for task in tasks]
    axes.barh(tasks, means, color=[_COLOURS[0] if mean >= 0 else _COLOURS[1] for mean in means], height=0.7)
    for place, task in enumerate(tasks):
        axes.plot([min(by_task[task]), max(by_task[task])], [place, place], color="#333333", linewidth=1)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(f"{method} less {against}, points\n(line: lowest to highest seed)")
    return figure
