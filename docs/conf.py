"""Settings of Sphinx, and the two lists that are made from the code: commands and config fields."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from typing import Any

import typer
from sphinx.application import Sphinx

import mend_hf
from mend_hf.cli import app as mend

project = "mend_hf"
author = "The mend_hf authors"
version = release = mend_hf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"mend_hf {release}"
html_show_copyright = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write names as `name`
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

COMMANDS, FIELDS = "<!-- commands -->", "<!-- fields of MendConfig -->"
MADE_FROM_CODE = ["reference/cli", "reference/api"]


def describe_commands() -> Iterator[str]:
    """Yield Markdown that says of every command what it does and what its options are."""
    group = typer.main.get_command(mend)
    for name, command in group.commands.items():
        yield f"## mend {name}\n"
        yield inspect.cleandoc(command.help or "") + "\n"
        yield f"```{{program}} mend {name}\n```\n"
        for parameter in command.params:
            if "--help" not in parameter.opts:
                yield f"```{{option}} {name_of(parameter)}\n{describe_parameter(parameter)}\n```\n"


def name_of(parameter: Any) -> str:
    """Return how a parameter is written on the command line."""
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts]
    return ", ".join(names) if is_option else (parameter.metavar or parameter.name).upper()


def describe_parameter(parameter: Any) -> str:
    """Return what a parameter means, whether it has to be given, and what it is if it is not."""
    default = "**Required.**" if parameter.required else show(parameter.default)
    if not default or parameter.required:
        return f"{default} {parameter.help}".strip()
    return f"{parameter.help} Default: {default}."


def describe_fields() -> Iterator[str]:
    """Yield the rows of a Markdown table of MendConfig's fields."""
    yield "| field | default | meaning |\n|---|---|---|"
    for field in dataclasses.fields(mend_hf.MendConfig):
        yield f"| `{field.name}` | {show(field.default)} | {field.metadata['help']} |"


def show(value: Any) -> str:
    """Return a default as it is written, or a blank where nothing is set."""
    if value is None or value is False:
        return ""
    return f"`{json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value}`"


def fill_in(_: Sphinx, __: str, source: list[str]) -> None:
    """Put the lists where a page asks for them."""
    for mark, lines in ((COMMANDS, describe_commands), (FIELDS, describe_fields)):
        if mark in source[0]:
            source[0] = source[0].replace(mark, "\n".join(lines()))


def setup(sphinx: Sphinx) -> None:
    """Connect the lists, and read their pages in every build: the code may have changed where the page has not."""
    sphinx.connect("source-read", fill_in)
    sphinx.connect("env-get-outdated", lambda *_: MADE_FROM_CODE)
