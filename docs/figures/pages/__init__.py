"""Saves a picture for light pages and for dark ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Look = TypeVar("Look")


def save_for_pages(script: str, draw: Callable[[Look], Figure], looks: Mapping[str, Look], folder: Path) -> None:
    """Write an SVG for every look, named after the script and the look.

    Letters are kept as shapes, so that a picture looks the same with any fonts; it has the same ids in every run.
    """
    name = Path(script).stem
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        for page, look in looks.items():
            draw(look).savefig(folder / f"{name}_{page}.svg", transparent=True, metadata={"Date": None})


def dress_axes(axes: Axes, ink: str, line: str) -> None:
    """Give ticks, grid and edges the colours of a page, and leave out the edges that nothing is read from."""
    axes.tick_params(colors=ink, which="both")
    axes.grid(color=line, linewidth=0.6, alpha=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(line)
