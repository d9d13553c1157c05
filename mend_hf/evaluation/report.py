"""Results as tables: means over seeds and tasks for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

from rich import box
from rich.console import Console
from rich.table import Table

from mend_hf.evaluation.results import TaskResult
from mend_hf.evaluation.statistics import Interval, bootstrap_interval, make_table

_TERMINAL_WIDTH = 80
READ_AGAIN = "in-context"  # what a distilled prefix has to pay off against


@dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """One method over all tasks and seeds.

    Attributes:
        method: Its name, and what tells it from the same method on other demonstrations.
        score: Mean over tasks of the mean over seeds, from 0 to 1.
        interval: Of the score, over tasks and seeds.
        worst_seed: The lowest of the seeds' means over tasks.
        spread: Standard deviation of the seeds' means over tasks.
        num_seeds: How many there are.
        num_results: Of all tasks and seeds.
        prefix_slots: Mean.
        prefix_bytes: Mean.
        milliseconds_per_query: Mean of the tasks' medians.
        prepare_milliseconds: Mean.
        flops_per_query: Mean; None: not known.
        prepare_flops: Mean; None: not known.
    """

    method: str
    score: float
    interval: Interval
    worst_seed: float
    spread: float
    num_seeds: int
    num_results: int
    prefix_slots: float
    prefix_bytes: float
    milliseconds_per_query: float
    prepare_milliseconds: float
    flops_per_query: float | None
    prepare_flops: float | None


def label_result(result: TaskResult, results: Sequence[TaskResult]) -> str:
    """Return a result's method, with what tells it apart among others: k, the variation, the scoring."""
    label = result.method
    if len({other.num_demonstrations for other in results}) > 1:
        label += f", k = {result.num_demonstrations}"
    if len({other.variation for other in results}) > 1:
        label += f", {result.variation}"
    if len({other.scoring for other in results}) > 1:
        label += f", {result.scoring}"
    return label


def group_results(results: Sequence[TaskResult]) -> dict[str, list[TaskResult]]:
    """Return results by label, in the order of the first of each; unlike ones are never averaged together."""
    groups: dict[str, list[TaskResult]] = {}
    for result in results:
        groups.setdefault(label_result(result, results), []).append(result)
    return groups


def summarise(results: Sequence[TaskResult]) -> list[MethodSummary]:
    """Return a summary of every method, in the order of their first results."""
    summaries = []
    for label, own in group_results(results).items():
        seeds = [fmean(r.score for r in own if r.seed == seed) for seed in dict.fromkeys(r.seed for r in own)]
        tasks = [fmean(r.score for r in own if r.task == task) for task in dict.fromkeys(r.task for r in own)]
        summaries.append(
            MethodSummary(
                method=label,
                score=fmean(tasks),
                interval=bootstrap_interval(make_table(own)),
                worst_seed=min(seeds),
                spread=pstdev(seeds),
                num_seeds=len(seeds),
                num_results=len(own),
                prefix_slots=fmean(r.prefix_slots for r in own),
                prefix_bytes=fmean(r.prefix_bytes for r in own),
                milliseconds_per_query=fmean(r.milliseconds_per_query for r in own),
                prepare_milliseconds=fmean(r.prepare_milliseconds for r in own),
                flops_per_query=_mean_if_known([r.flops_per_query for r in own]),
                prepare_flops=_mean_if_known([r.prepare_flops for r in own]),
            )
        )
    return summaries


def _mean_if_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def queries_to_pay_off(
    prepare: float, per_query: float, other_prepare: float, other_per_query: float, *, is_read_again: bool
) -> float:
    """Return after how many queries a method has cost no more than another one.

    Args:
        prepare: What it costs once, in any unit.
        per_query: What a query costs.
        other_prepare: What the other one costs once.
        other_per_query: What a query costs with the other one.
        is_read_again: Whether the other one pays `other_prepare` for every query, and not once.

    Returns:
        A whole number, 0 where it is cheaper from the start; infinity where it never pays.
    """
    if is_read_again:
        other_prepare, other_per_query = 0.0, other_prepare + other_per_query
    ahead = prepare - other_prepare
    if ahead <= 0 and per_query <= other_per_query:
        return 0.0
    return math.ceil(ahead / (other_per_query - per_query)) if per_query < other_per_query else math.inf


def method_rows(summaries: Sequence[MethodSummary]) -> list[list[str]]:
    """Return a heading and one row a method; scores in points of 100.

    What one seed, or fewer than three results, cannot tell is left empty.
    """
    rows = [["method", "score", "95 %", "worst seed", "spread", "slots", "ms a query"]]
    for summary in summaries:
        rows.append(
            [
                summary.method,
                f"{100 * summary.score:.1f}",
                show_interval(summary.interval, summary.num_results),
                f"{100 * summary.worst_seed:.1f}" if summary.num_seeds > 1 else "",
                f"{100 * summary.spread:.1f}" if summary.num_seeds > 1 else "",
                f"{summary.prefix_slots:.0f}",
                f"{summary.milliseconds_per_query:.0f}",
            ]
        )
    return rows


def show_interval(interval: Interval, num_results: int, sign: str = "") -> str:
    """Return an interval in points of 100; nothing where it was resampled from fewer than three results."""
    if num_results < 3:
        return ""
    return f"{100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f}"


def cost_rows(summaries: Sequence[MethodSummary]) -> list[list[str]]:
    """Return a heading and one row a method: memory, what is paid once, operations, and when it has paid off.

    Pays off means in time, against in-context learning that reads the demonstrations again for every query, or that
    keeps them.
    """
    rows = [["method", "MB", "ms once", "GFLOP a query", "GFLOP once", "pays, read again", "pays, kept"]]
    text = next((summary for summary in summaries if summary.method == READ_AGAIN), None)
    for summary in summaries:
        paid = ["", ""]
        if text is not None and summary.prefix_slots > 0 and summary is not text:
            own = (summary.prepare_milliseconds, summary.milliseconds_per_query)
            other = (text.prepare_milliseconds, text.milliseconds_per_query)
            counts = [queries_to_pay_off(*own, *other, is_read_again=again) for again in (True, False)]
            paid = ["never" if math.isinf(count) else f"{count:.0f}" for count in counts]
        flops = [summary.flops_per_query, summary.prepare_flops]
        rows.append(
            [
                summary.method,
                f"{summary.prefix_bytes / 1e6:.1f}",
                f"{summary.prepare_milliseconds:.0f}",
                *("" if count is None else f"{count / 1e9:.2f}" for count in flops),
                *paid,
            ]
        )
    return rows


def task_rows(results: Sequence[TaskResult]) -> list[list[str]]:
    """Return a heading and one row a task with the mean over seeds of every method, in points of 100."""
    groups = group_results(results)
    rows = [["task", "metric", *groups]]
    for task in dict.fromkeys(result.task for result in results):
        metric = next(result.metric for result in results if result.task == task)
        scores = [[r.score for r in own if r.task == task] for own in groups.values()]
        rows.append([task, metric, *(f"{100 * fmean(part):.1f}" if part else "" for part in scores)])
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


def split_methods(rows: Sequence[Sequence[str]], num_fixed: int = 2) -> list[list[list[str]]]:
    """Return the tables of `task_rows` with as many methods each as fit in 80 columns beside the longest name.

    Args:
        rows: The first is the header.
        num_fixed: Columns before the first method, which every table has.
    """
    console = Console(width=1000)
    parts: list[list[list[str]]] = []
    for place in range(num_fixed, len(rows[0])):
        wider = [[*row, full[place]] for row, full in zip(parts[-1], rows, strict=True)] if parts else []
        if not parts or console.measure(to_table(wider)).maximum > _TERMINAL_WIDTH:
            parts.append([[*row[:num_fixed], row[place]] for row in rows])
        else:
            parts[-1] = wider
    return parts


def print_tables(results: Sequence[TaskResult], console: Console) -> None:
    """Print the scores of every task, then those of every method and what they cost."""
    by_task, summaries = task_rows(results), summarise(results)
    for part in split_methods(by_task):
        console.print(to_table(part, title="Points of 100, mean over seeds"))
    console.print(to_table(cost_rows(summaries), title="Cost, mean over tasks and seeds"))
    counts = sorted({result.num_demonstrations for result in results})
    num_tasks = len(by_task) - 1
    shown = f"{num_tasks} task{'s' if num_tasks > 1 else ''}, {', '.join(map(str, counts))} demonstrations"
    console.print(to_table(method_rows(summaries), title=shown))


def write_tables(results: Sequence[TaskResult], folder: Path) -> None:
    """Write the same tables as Markdown into `results.md`."""
    summaries = summarise(results)
    tables = (method_rows(summaries), cost_rows(summaries), task_rows(results))
    (folder / "results.md").write_text("\n".join(map(to_markdown, tables)), encoding="utf-8")
