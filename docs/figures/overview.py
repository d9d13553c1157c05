"""Draws the way from demonstrations to an answer, for the README: an SVG for light, one for dark.

python docs/figures/overview.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from pages import save_for_pages

DEMONSTRATIONS = [("great film", "positive"), ("a bore", "negative"), ("so slow", "negative"), ("...", "")]
QUERY, ANSWER = "moving and funny", "positive"

# Colours that stay apart for colour-blind eyes (Okabe and Ito, 2008), as in `prefix_and_masks.py`.
SINK, ANCHOR, PLACEHOLDER, ASKED = "#E69F00", "#0072B2", "#009E73", "#CC79A7"
SLOTS = [SINK, *[ANCHOR] * 9, *[PLACEHOLDER] * 2]


@dataclass(frozen=True)
class Look:
    """Colours that depend on what is behind the picture."""

    ink: str
    box: str
    line: str
    label: str


LOOKS = {
    "light": Look("#24292f", "#eef1f4", "#8c959f", ANCHOR),
    "dark": Look("#e6e8eb", "#262c33", "#79828c", "#56B4E9"),
}


def draw_box(axes: Axes, look: Look, corner: tuple[float, float], size: tuple[float, float], text: str) -> None:
    """Draw a part that computes."""
    shape = FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.12", facecolor=look.box)
    shape.set_edgecolor(look.line)
    axes.add_patch(shape)
    middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
    axes.text(*middle, text, color=look.ink, ha="center", va="center", fontsize=9.5, linespacing=1.5)


def draw_arrow(axes: Axes, look: Look, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw where something goes."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=look.line, linewidth=1.3))


def draw(look: Look) -> Figure:
    """Return the whole picture: what is done once in the upper line, what every query costs in the lower one."""
    figure = Figure(figsize=(7.4, 2.9))
    axes = figure.add_axes((0, 0, 1, 1))
    for place, (text, label) in enumerate(DEMONSTRATIONS):
        bottom = 4.35 - 0.42 * place
        axes.text(0.25, bottom, text, color=look.ink, va="center", fontsize=9.5)
        axes.text(1.65, bottom, label, color=look.label, va="center", fontsize=9.5, weight="bold")
    axes.text(0.25, 4.85, "16 demonstrations, 640 tokens", color=look.ink, va="center", fontsize=8.5, alpha=0.75)
    draw_box(axes, look, (3.75, 3.0), (2.3, 1.5), "distiller\nthe model, LoRA on")
    axes.text(4.9, 4.85, "once a task", color=look.ink, ha="center", va="center", fontsize=8.5, alpha=0.75)
    draw_arrow(axes, look, (2.85, 3.75), (3.7, 3.75))
    draw_arrow(axes, look, (6.1, 3.75), (6.9, 3.75))
    for place, colour in enumerate(SLOTS):
        axes.add_patch(Rectangle((7.0 + 0.24 * place, 3.4), 0.2, 0.7, facecolor=colour, linewidth=0))
    axes.text(8.42, 4.85, "prefix, 65 slots", color=look.ink, ha="center", va="center", fontsize=8.5, alpha=0.75)
    for place, (name, colour) in enumerate({"sink": SINK, "anchors": ANCHOR, "placeholders": PLACEHOLDER}.items()):
        left = (7.0, 7.62, 8.55)[place]
        axes.text(left, 3.1, name, color=look.ink, va="center", fontsize=8)
        axes.add_patch(Rectangle((left, 2.86), 0.3, 0.07, facecolor=colour, linewidth=0))

    axes.text(0.25, 2.0, "every query", color=look.ink, va="center", fontsize=8.5, alpha=0.75)
    draw_box(axes, look, (3.75, 0.35), (2.3, 1.5), "the same model\nfrozen, LoRA off")
    axes.text(0.25, 1.1, QUERY, color=look.ink, va="center", fontsize=9.5)
    axes.add_patch(Rectangle((0.25, 0.78), 2.05, 0.07, facecolor=ASKED, linewidth=0))
    draw_arrow(axes, look, (2.85, 1.1), (3.7, 1.1))
    axes.add_patch(
        FancyArrowPatch(
            (8.4, 2.75), (6.1, 1.4), connectionstyle="arc3,rad=-0.25", arrowstyle="-|>", mutation_scale=12,
            color=look.line, linewidth=1.3,
        )
    )  # fmt: skip
    axes.text(8.55, 1.95, "attended to,\nnever read again", color=look.ink, va="center", fontsize=8.5, alpha=0.75)
    draw_arrow(axes, look, (6.1, 0.75), (6.9, 0.75))
    axes.text(7.0, 0.75, ANSWER, color=look.ink, va="center", fontsize=9.5, weight="bold")
    axes.set_xlim(0, 11.2)
    axes.set_ylim(0.1, 5.1)
    axes.set_axis_off()
    return figure


def main() -> None:
    """Draw the picture for a light and for a dark page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    save_for_pages(__file__, draw, LOOKS, args.output_dir)


if __name__ == "__main__":
    main()
