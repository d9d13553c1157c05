"""`mend report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mend_hf.cli.options import OutputFolder
from mend_hf.errors import DataError
from mend_hf.files import check_output_folder


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of mend evaluate; each is a column, by its name.")],
    output_dir: OutputFolder,
    against: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "in-context",
) -> None:
    """Write tables, pictures and a page of HTML about evaluations.

    `mend report results/class_to_class results/qa_to_qa --output-dir report`
    """
    from mend_hf.evaluation.export import write_report
    from mend_hf.evaluation.report import split_methods, to_table
    from mend_hf.evaluation.results import read_results

    check_output_folder(output_dir)
    groups = {}
    for folder in folders:
        name = folder.resolve().name
        if name in groups:
            raise DataError(f"Expected folders of different names, got {name} twice: rename one of them.")
        groups[name] = read_results(folder)
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
