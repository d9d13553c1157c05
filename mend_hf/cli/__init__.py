"""The command line: `mend COMMAND`."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer

from mend_hf import __version__
from mend_hf.cli.answering import distill, generate, info
from mend_hf.cli.evaluation import evaluate
from mend_hf.cli.export import export_peft
from mend_hf.cli.report import report
from mend_hf.cli.sharing import pull, push
from mend_hf.cli.training import finetune, pretrain
from mend_hf.errors import MendError

app = typer.Typer(
    name="mend",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"mend_hf {__version__}")
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Few-shot prompting without paying for the shots: distil demonstrations into a prefix for a frozen model."""


for command in (pretrain, finetune, distill, generate, evaluate, report, info, push, pull, export_peft):
    app.command()(command)


def main() -> None:
    """Run the command line; a known error is one line on stderr and exit status 2.

    Of several processes that train together, each says its own error, and the first alone warns.
    """
    warnings.showwarning = _show_warning
    try:
        app(prog_name="mend")
    except MendError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" in process {rank}"
        print(f"error{where}: {error}", file=sys.stderr)
        sys.exit(2)


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning) and os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)
