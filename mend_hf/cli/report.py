"""`mend report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mend_hf.cli.options import OutputFolder
from mend_hf.errors import DataError
from mend_hf.files import check_output_folder

if TYPE_CHECKING:
    from mend_hf.evaluation.export import Groups


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of mend evaluate; each is a column, by its name.")],
    output_dir: OutputFolder,
    against: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "in-context",
    by_setting: Annotated[
        bool,
        typer.Option(
            "--by-setting",
            help="One folder only: a column for each of MetaICL's seven settings all of whose test tasks it has.",
        ),
    ] = False,
) -> None:
    """Write tables, pictures and a page of HTML about evaluations.

    `mend report results/class_to_class results/qa_to_qa --output-dir report`
    """
    from mend_hf.evaluation.export import write_report
    from mend_hf.evaluation.report import split_methods, to_table

    check_output_folder(output_dir)
    groups = _split_by_setting(folders) if by_setting else _read_each(folders)
    tables = write_report(groups, output_dir, against)
    console = Console()
    for title, rows in tables.items():
        if title == "Scores":  # a setting a line: there may be seven, with names that cannot be broken
            methods, *settings = zip(*rows, strict=True)
            parts = split_methods([("setting", *methods[1:]), *settings], num_fixed=1)
        else:
            parts = split_methods(rows) if title.startswith("Tasks") else [rows]
        for part in parts:
            console.print(to_table(part, title=title))
    console.print(f"Wrote the report: open {output_dir / 'index.html'}", soft_wrap=True, highlight=False)


def _read_each(folders: list[Path]) -> Groups:
    from mend_hf.evaluation.results import read_results

    groups = {}
    for folder in folders:
        name = folder.resolve().name
        if name in groups:
            raise DataError(f"Expected folders of different names, got {name} twice: rename one of them.")
        groups[name] = read_results(folder)
    return groups


def _split_by_setting(folders: list[Path]) -> Groups:
    """Return one folder's results once for every setting of MetaICL's whose test tasks are all among them."""
    from mend_hf.data.partition import list_partitions, load_partition
    from mend_hf.evaluation.results import read_results

    if len(folders) > 1:
        raise DataError(
            f"Expected one folder with --by-setting, got {len(folders)}: give one, or leave the option out."
        )
    results = read_results(folders[0])
    tasks = {result.task for result in results}
    tests = {name: set(load_partition(name).test) for name in list_partitions()}
    groups = {
        name: [result for result in results if result.task in own] for name, own in tests.items() if own <= tasks
    }
    if not groups:
        name, missing = min(((name, own - tasks) for name, own in tests.items()), key=lambda pair: len(pair[1]))
        raise DataError(
            f"Expected results of all test tasks of a setting in {folders[0]}, got none of "
            f"{', '.join(sorted(missing))} for {name}, which lacks fewest: evaluate them, or leave --by-setting out."
        )
    return groups
