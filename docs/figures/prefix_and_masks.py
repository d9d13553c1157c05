"""Draws what a kv prefix keeps and who attends to what, for docs/concepts/prefix.md: an SVG for light, one for dark.

python docs/figures/prefix_and_masks.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Shape
from pages import save_for_pages

TOKENS = ["Input:", "great", "film", "Output", ":", "good", "↵↵", "Input:", "a", "bore", "Output", ":", "bad", "↵↵"]
ANCHORS = [4, 5, 6, 11, 12, 13]
QUERY = ["Input:", "so", "dull", "Output", ":"]
NUM_PLACEHOLDERS = 2

# Colours that stay apart for colour-blind eyes (Okabe and Ito, 2008), and the letter on each.
SINK, ANCHOR, PLACEHOLDER, ASKED = (
    ("#E69F00", "black"),
    ("#0072B2", "white"),
    ("#009E73", "white"),
    ("#CC79A7", "black"),
)
BAR = 1.9  # height of a token's cell, where its width is 1


@dataclass(frozen=True)
class Look:
    """Colours that depend on what is behind the picture."""

    ink: str
    pale: str
    line: str


LOOKS = {"light": Look("#24292f", "#e4e7eb", "#9aa3ad"), "dark": Look("#e6e8eb", "#34383f", "#79828c")}


@dataclass(frozen=True)
class Cell:
    """One position: what stands there, where, and in which colours; without a colour it is not kept."""

    text: str
    position: int
    colours: tuple[str, str] | None


def read_cells() -> list[Cell]:
    """Return what is read when demonstrations are distilled: the text and the placeholders behind it."""
    colours = {0: SINK} | dict.fromkeys(ANCHORS, ANCHOR)
    text = [Cell(token, place, colours.get(place)) for place, token in enumerate(TOKENS)]
    steps = range(1, NUM_PLACEHOLDERS + 1)
    return text + [Cell(f"v{j}", len(TOKENS) * j // NUM_PLACEHOLDERS - 1, PLACEHOLDER) for j in steps]


def query_cells() -> list[Cell]:
    """Return the query, which follows the text's last position."""
    return [Cell(token, len(TOKENS) + place, ASKED) for place, token in enumerate(QUERY)]


def draw_row(axes: Axes, look: Look, cells: Sequence[Cell], left: float, bottom: float) -> None:
    """Draw cells side by side, their positions below."""
    for place, cell in enumerate(cells):
        x, (fill, ink) = left + place, cell.colours or (look.pale, look.ink)
        axes.add_patch(Rectangle((x + 0.05, bottom), 0.9, BAR, facecolor=fill, linewidth=0))
        axes.text(x + 0.5, bottom + BAR / 2, cell.text, color=ink, rotation=90, ha="center", va="center", fontsize=9)
        axes.text(x + 0.5, bottom - 0.12, cell.position, color=look.ink, ha="center", va="top", fontsize=8)


def draw_slots(axes: Axes, look: Look) -> None:
    """Draw what is read above what is kept, with a line from each that is kept to its slot."""
    read = read_cells()
    kept = [(place, cell) for place, cell in enumerate(read) if cell.colours]
    top, left = 4.4, 1.0
    draw_row(axes, look, read, 0, top)
    draw_row(axes, look, [cell for _, cell in kept], left, 0)
    draw_row(axes, look, query_cells(), left + len(kept) + 0.3, 0)
    for slot, (place, cell) in enumerate(kept):
        colour = (cell.colours or ANCHOR)[0]
        axes.plot([place + 0.5, left + slot + 0.5], [top - 0.95, BAR + 0.15], color=colour, linewidth=1.2)
    write(axes, look, 0, top + BAR + 0.35, "Distilling, once: the demonstrations, and placeholders v1, v2")
    write(axes, look, 0, -1.75, "Asking: nine slots in place of 14 tokens; the query goes on at position 14")
    axes.set_xlim(-0.1, 16.1)
    axes.set_ylim(-2.1, top + BAR + 1.2)


def draw_mask(axes: Axes, look: Look, columns: Sequence[Cell | None], rows: Sequence[int], title: str) -> None:
    """Draw which columns each row sees: all that count and stand no later than itself; None counts for nobody."""
    squares: dict[str, list[Shape]] = {}
    for line, row in enumerate(rows):
        for place, cell in enumerate(columns):
            is_seen = cell is not None and place <= row
            fill = (cell.colours or (look.line,))[0] if cell is not None and is_seen else "none"
            corners = [(place + x, y - line) for x, y in ((0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92))]
            squares.setdefault(fill, []).append(Shape([*corners, corners[0]], closed=True))
        seeing = columns[row]
        if seeing is not None:
            axes.text(-0.25, 0.5 - line, seeing.text, color=look.ink, ha="right", va="center", fontsize=7.5)
    for fill, shapes in squares.items():
        edge = {"edgecolor": look.line, "linewidth": 0.4} if fill == "none" else {"linewidth": 0}
        axes.add_patch(PathPatch(Shape.make_compound_path(*shapes), facecolor=fill, **edge))
    write(axes, look, 0, 1.35, title)
    axes.set_xlim(-2.6, len(columns) + 0.1)
    axes.set_ylim(-len(rows) + 0.8, 2.5)


def write(axes: Axes, look: Look, x: float, y: float, text: str) -> None:
    """Write a line of explanation."""
    axes.text(x, y, text, color=look.ink, ha="left", va="bottom", fontsize=9)


def draw(look: Look) -> Figure:
    """Return the whole picture."""
    figure = Figure(figsize=(6.6, 7.0))
    slots = figure.add_axes((0.02, 0.48, 0.96, 0.46))
    reading = figure.add_axes((0.02, 0.01, 0.46, 0.45))
    first, second = figure.add_axes((0.51, 0.27, 0.47, 0.19)), figure.add_axes((0.51, 0.06, 0.47, 0.19))
    read = read_cells()
    draw_slots(slots, look)
    draw_mask(reading, look, read, range(len(read)), "Distilling: who sees what")

    kept = [cell for cell in read if cell.colours]
    whole: list[Cell | None] = [*kept, *query_cells()]
    draw_mask(first, look, whole, range(len(kept), len(whole)), "Asking, row 1 of a batch")
    # Another task, distilled from one demonstration, with a query that is one token shorter.
    fewer: list[Cell | None] = [None] * 3 + kept[:4] + kept[-2:] + [None, whole[len(kept)], *query_cells()[2:]]
    draw_mask(second, look, fewer, range(len(kept) + 1, len(fewer)), "Row 2: fewer slots, a shorter query")
    for axes in (slots, reading, first, second):
        axes.set_axis_off()
        axes.set_aspect("equal", anchor="NW")

    names = {"sink": SINK, "anchor": ANCHOR, "placeholder": PLACEHOLDER, "query": ASKED, "not kept": (look.pale, "")}
    for x, (name, (fill, _)) in zip((0.025, 0.135, 0.275, 0.48, 0.605), names.items(), strict=True):
        figure.add_artist(Rectangle((x, 0.96), 0.022, 0.021, facecolor=fill, linewidth=0))
        figure.text(x + 0.03, 0.97, name, color=look.ink, va="center", fontsize=9)
    return figure


def main() -> None:
    """Draw the picture for a light and for a dark page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    save_for_pages(__file__, draw, LOOKS, args.output_dir)


if __name__ == "__main__":
    main()
