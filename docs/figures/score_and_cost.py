"""Draws what a query costs with every method, and what it scores, from stored results: an SVG for light, one for dark.

python docs/figures/score_and_cost.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from pages import dress_axes, save_for_pages

from mend_hf.evaluation.report import MethodSummary, summarise
from mend_hf.evaluation.results import read_results

RESULTS = Path(__file__).parents[1] / "results" / "data" / "general"
GIGA = 1e9
# Colours that stay apart for colour-blind eyes (Okabe and Ito, 2008), marks, and where a name
# stands from its mark, in points.
MARKS = {
    "zero-shot": ("#999999", "D", (9, -4)),
    "in-context, cut": ("#E69F00", "^", (9, -5)),
    "training-free anchors": ("#56B4E9", "s", (9, -11)),
    "MEND": ("#D55E00", "o", (9, -2)),
    "MEND, batch-calibrated": ("#009E73", "P", (9, -4)),
    "in-context": ("#0072B2", "v", (9, -3)),
    "in-context, read again": ("#0072B2", "v", (-9, 8)),
}
LOOKS = {"light": ("#24292f", "#d0d7de"), "dark": ("#e6e8eb", "#444c56")}


@dataclass(frozen=True)
class Point:
    """One method: what a query costs, in GFLOP, and what it scores, in points of 100."""

    name: str
    operations: float
    score: float


def make_points(summaries: Sequence[MethodSummary]) -> list[Point]:
    """Return a point for every method of the picture, and one for text that is read again with every query."""
    points = []
    for summary in summaries:
        if summary.method not in MARKS or summary.flops_per_query is None or summary.prepare_flops is None:
            continue
        costs = {summary.method: summary.flops_per_query}
        if summary.method == "in-context":
            costs["in-context, read again"] = summary.flops_per_query + summary.prepare_flops
        points += [Point(name, cost / GIGA, 100 * summary.score) for name, cost in costs.items()]
    return points


def draw(points: Sequence[Point], ink: str, line: str) -> Figure:
    """Return the picture in the colours of a page."""
    figure = Figure(figsize=(6.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for point in points:
        colour, mark, offset = MARKS[point.name]
        axes.plot(point.operations, point.score, color=colour, marker=mark, markersize=8, linestyle="none")
        axes.annotate(
            point.name,
            (point.operations, point.score),
            xytext=offset,
            textcoords="offset points",
            ha="left" if offset[0] > 0 else "right",
            color=ink,
            fontsize=9,
        )
    axes.set_xscale("log")
    ticks = [15, 20, 30, 50, 100, 200]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(point.operations for point in points) * 0.9, max(point.operations for point in points) * 1.25)
    axes.margins(y=0.15)
    axes.set_xlabel("GFLOP a query, its options included", color=ink)
    axes.set_ylabel("score, points of 100", color=ink)
    dress_axes(axes, ink, line)
    axes.set_axisbelow(True)
    return figure


def main() -> None:
    """Draw the picture for a light and for a dark page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder of mend evaluate")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    points = make_points(summarise(read_results(args.results)))
    save_for_pages(__file__, lambda colours: draw(points, *colours), LOOKS, args.output_dir)


if __name__ == "__main__":
    main()
