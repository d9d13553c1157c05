"""Saves a picture for light pages and for dark ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import matplotlib
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
