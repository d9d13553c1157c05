"""Reports to hand on: tables as Markdown, CSV and LaTeX, all results as JSON, pictures, and a page of HTML."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean

from jinja2 import Environment

from mend_hf.errors import DataError, import_extra
from mend_hf.evaluation.plots import name_file, plot_results
from mend_hf.evaluation.report import (
    cost_rows,
    group_results,
    method_rows,
    show_interval,
    summarise,
    task_rows,
    to_markdown,
)
from mend_hf.evaluation.results import TaskResult
from mend_hf.evaluation.statistics import compare_paired
from mend_hf.files import write_folder, write_json

Rows = list[list[str]]
Groups = Mapping[str, Sequence[TaskResult]]


def make_tables(groups: Groups, against: str) -> dict[str, Rows]:
    """Return the tables of a report by title, each with its heading as the first row.

    Args:
        groups: Results by the name of what they are of, such as a partition; methods are compared within one.
        against: The method that others are compared with, where it is there.

    Raises:
        DataError: There are no results.
    """
    if not groups or not all(groups.values()):
        raise DataError("Expected results to report on, got none: run mend evaluate first.")
    tables: dict[str, Rows] = {}
    if len(groups) > 1:
        tables["Scores"] = score_rows(groups)
    for name, results in groups.items():
        behind = f": {name}" if len(groups) > 1 else ""
        summaries = summarise(results)
        tables[f"Methods{behind}"] = method_rows(summaries)
        tables[f"Cost{behind}"] = cost_rows(summaries)
        differences = difference_rows(results, against)
        if len(differences) > 1:
            tables[f"Against {against}{behind}"] = differences
        tables[f"Tasks{behind}"] = task_rows(results)
    return tables


def score_rows(groups: Groups) -> Rows:
    """Return a heading and one row a method: its score in every group, and the mean where it is in all of them."""
    scores = {name: {summary.method: summary.score for summary in summarise(own)} for name, own in groups.items()}
    methods = dict.fromkeys(method for own in scores.values() for method in own)
    rows = [["method", *groups, "mean"]]
    for method in methods:
        own = [each.get(method) for each in scores.values()]
        known = [score for score in own if score is not None]
        cells = ["" if score is None else f"{100 * score:.1f}" for score in own]
        rows.append([method, *cells, f"{100 * fmean(known):.1f}" if len(known) == len(own) else ""])
    return rows


def difference_rows(results: Sequence[TaskResult], against: str) -> Rows:
    """Return a heading and one row for every method that shares tasks and seeds with another one, `against`."""
    groups = group_results(results)
    rows = [["method", "difference", "95 %", "p", "tasks"]]
    for label, own in groups.items():
        other = groups.get(label.replace(own[0].method, against, 1))
        if other is None or other is own:
            continue
        try:
            compared = compare_paired(own, other)
        except DataError:
            continue
        interval = show_interval(compared.interval, compared.num_pairs, sign="+")
        p_value = "< 0.001" if compared.p_value < 0.001 else f"{compared.p_value:.3f}"
        if compared.num_tasks == 1:  # no signs of tasks to permute
            p_value = ""
        rows.append([label, f"{100 * compared.difference:+.1f}", interval, p_value, str(compared.num_tasks)])
    return rows


def write_report(groups: Groups, folder: Path, against: str) -> dict[str, Rows]:
    """Write a report into a folder, and return its tables.

    `report.md`, `report.tex`, a CSV file for every table, `results.json`, pictures as PNG and SVG, and `index.html`,
    which opens from the file system with the pictures beside it, in light and dark.

    Raises:
        DataError: There are no results.
        MissingExtraError: matplotlib or pandas is not installed.
    """
    tables = make_tables(groups, against)
    with write_folder(folder) as temporary:
        markdown = [f"## {title}\n\n{to_markdown(rows)}" for title, rows in tables.items()]
        (temporary / "report.md").write_text("\n".join(markdown), encoding="utf-8")
        (temporary / "report.tex").write_text(_to_latex(tables), encoding="utf-8")
        for title, rows in tables.items():
            with (temporary / f"{name_file(title)}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)
        plain = {name: [dataclasses.asdict(result) for result in own] for name, own in groups.items()}
        write_json(temporary / "results.json", plain)
        pictures: dict[str, dict[str, str]] = {}
        for place, (name, own) in enumerate(groups.items()):
            titles = plot_results(own, temporary / f".{place}", against)
            for picture in sorted((temporary / f".{place}").iterdir()):
                picture.rename(temporary / f"{name_file(name)}_{picture.name}")
            (temporary / f".{place}").rmdir()
            pictures[name] = {f"{name_file(name)}_{picture}": title for picture, title in titles.items()}
        facts = {name: describe(own) for name, own in groups.items()}
        (temporary / "index.html").write_text(_to_html(tables, pictures, facts), encoding="utf-8")
    return tables


def _to_latex(tables: Mapping[str, Rows]) -> str:
    pandas = import_extra("pandas", "eval")
    parts = []
    for title, (heading, *body) in tables.items():
        frame = pandas.DataFrame(body, columns=heading)
        columns = "l" + "r" * (len(heading) - 1)
        style = frame.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
        parts.append(style.to_latex(hrules=True, column_format=columns, caption=_escape(title), position="htbp"))
    return "\n".join(parts)


def _escape(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "_%&#$" else letter for letter in text)


def describe(results: Sequence[TaskResult]) -> str:
    """Return in one line what results are of: tasks, demonstrations, seeds and queries."""
    tasks = len({result.task for result in results})
    shots = ", ".join(map(str, sorted({result.num_demonstrations for result in results})))
    seeds = sorted({result.seed for result in results})
    queries = sorted({result.num_queries for result in results})
    asked = f"{queries[0]}" if len(queries) == 1 else f"{queries[0]} to {queries[-1]}"
    return (
        f"{tasks} task{'s' if tasks > 1 else ''}; demonstrations: {shots}; queries a task: {asked}; "
        f"seeds: {', '.join(map(str, seeds))}"
    )


def _to_html(tables: Mapping[str, Rows], pictures: Mapping[str, Mapping[str, str]], facts: Mapping[str, str]) -> str:
    template = files("mend_hf").joinpath("evaluation/report.html").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(template).render(tables=tables, pictures=pictures, facts=facts)
