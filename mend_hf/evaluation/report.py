"""Results as tables: means over seeds and tasks for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from rich import box
from rich.table import Table

from mend_hf.evaluation.results import TaskResult


@dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """One method over all tasks and seeds.

    Attributes:
        method: Its name.
        score: Mean over tasks of the mean over seeds, from 0 to 1.
        worst_seed: The lowest of the seeds' means over tasks.
        spread: Standard deviation of the seeds' means over tasks.
        prefix_slots: Mean.
        prefix_bytes: Mean.
        milliseconds_per_query: Mean.
        prepare_milliseconds: Mean.
    """

    method: str
    score: float
    worst_seed: float
    spread: float
    prefix_slots: float
    prefix_bytes: float
    milliseconds_per_query: float
    prepare_milliseconds: float


def summarise(results: Sequence[TaskResult]) -> list[MethodSummary]:
    """Return a summary of every method, in the order of their first results."""
    summaries = []
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        seeds = [fmean(r.score for r in own if r.seed == seed) for seed in dict.fromkeys(r.seed for r in own)]
        tasks = [fmean(r.score for r in own if r.task == task) for task in dict.fromkeys(r.task for r in own)]
        summaries.append(
            MethodSummary(
                method=method,
                score=fmean(tasks),
                worst_seed=min(seeds),
                spread=pstdev(seeds),
                prefix_slots=fmean(r.prefix_slots for r in own),
                prefix_bytes=fmean(r.prefix_bytes for r in own),
                milliseconds_per_query=fmean(r.milliseconds_per_query for r in own),
                prepare_milliseconds=fmean(r.prepare_milliseconds for r in own),
            )
        )
    return summaries


def method_rows(summaries: Sequence[MethodSummary]) -> list[list[str]]:
    """Return a heading and one row a method; scores in points of 100."""
    rows = [["method", "score", "worst seed", "spread", "slots", "MB", "ms a query", "ms once"]]
    for summary in summaries:
        rows.append(
            [
                summary.method,
                f"{100 * summary.score:.1f}",
                f"{100 * summary.worst_seed:.1f}",
                f"{100 * summary.spread:.1f}",
                f"{summary.prefix_slots:.0f}",
                f"{summary.prefix_bytes / 1e6:.1f}",
                f"{summary.milliseconds_per_query:.0f}",
                f"{summary.prepare_milliseconds:.0f}",
            ]
        )
    return rows


def task_rows(results: Sequence[TaskResult]) -> list[list[str]]:
    """Return a heading and one row a task with the mean over seeds of every method, in points of 100."""
    methods = list(dict.fromkeys(result.method for result in results))
    rows = [["task", "metric", *methods]]
    for task in dict.fromkeys(result.task for result in results):
        own = [result for result in results if result.task == task]
        scores = [[r.score for r in own if r.method == method] for method in methods]
        rows.append([task, own[0].metric, *(f"{100 * fmean(part):.1f}" if part else "" for part in scores)])
    return rows


def to_table(rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """Return rows, the first of which is the heading, as a table for the terminal; all methods fit in 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(rows[0][0], overflow="fold")
    for name in rows[0][1:]:
        table.add_column(name.replace("-", "-\n").replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of which is the heading, as a Markdown table."""
    heading, *body = rows
    lines = [heading, ["---", *("---:" for _ in heading[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def split_methods(rows: Sequence[Sequence[str]], num_at_once: int = 6) -> list[list[list[str]]]:
    """Return the tables of `task_rows` with a few methods each, so that every one fits a terminal."""
    starts = range(2, len(rows[0]), num_at_once)
    return [[[*row[:2], *row[start : start + num_at_once]] for row in rows] for start in starts]
