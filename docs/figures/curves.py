"""Draws what scores do with more slots and with more demonstrations, and what training does to NLL and KL: two SVGs.

python docs/figures/curves.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import dress_axes, save_for_pages

from mend_hf.evaluation.report import summarise
from mend_hf.evaluation.results import read_results

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "results" / "data"
TRAINING = ROOT / "examples" / "distillers" / "smollm2-135m-general-kv" / "training_log.json"
# Colours that stay apart for colour-blind eyes (Okabe and Ito, 2008).
METHODS = {"in-context": "#0072B2", "MEND, batch-calibrated": "#009E73"}
PROBES = {"probe_nll": ("NLL of the targets", "#D55E00"), "probe_kl": ("KL from the teacher", "#0072B2")}
LOOKS = {"light": ("#24292f", "#d0d7de"), "dark": ("#e6e8eb", "#444c56")}

Line = tuple[str, str, list[float], list[float]]


def slots_lines() -> list[Line]:
    """Return the score of every budget of slots."""
    summaries = summarise(read_results(DATA / "slots"))
    points = sorted((each.prefix_slots, 100 * each.score) for each in summaries)
    slots, scores = zip(*points, strict=True)
    return [("MEND, batch-calibrated", METHODS["MEND, batch-calibrated"], [*slots], [*scores])]


def demonstrations_lines() -> list[Line]:
    """Return the score of every number of demonstrations, one line a method."""
    results, lines = read_results(DATA / "many_demonstrations"), []
    for method, colour in METHODS.items():
        own = [each for each in results if each.method == method]
        counts = sorted({each.num_demonstrations for each in own})
        scores = [100 * summarise([each for each in own if each.num_demonstrations == k])[0].score for k in counts]
        lines.append((method, colour, [*map(float, counts)], scores))
    return lines


def steps_lines() -> list[Line]:
    """Return the probes of the shipped distiller's second stage."""
    log = json.loads(TRAINING.read_text(encoding="utf-8"))["log"]
    probes = [entry for entry in log if "probe_kl" in entry]
    return [
        (label, colour, [e["step"] for e in probes], [e[name] for e in probes])
        for name, (label, colour) in PROBES.items()
    ]


def draw_panel(axes: Axes, lines: Sequence[Line], x_label: str, y_label: str, look: tuple[str, str]) -> None:
    """Draw lines with a legend, in the colours of a page."""
    ink, _ = look
    for label, colour, x, y in lines:
        axes.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.5, label=label)
    axes.set_xlabel(x_label, color=ink, fontsize=8)
    axes.set_ylabel(y_label, color=ink, fontsize=8)
    axes.tick_params(which="both", labelsize=8)
    dress_axes(axes, *look)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=ink, fontsize=7)


def draw(look: tuple[str, str]) -> Figure:
    """Return the picture in the colours of a page."""
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    slots, demonstrations, steps = figure.subplots(1, 3)
    draw_panel(slots, slots_lines(), "slots", "score, points of 100", look)
    lines = demonstrations_lines()
    draw_panel(demonstrations, lines, "demonstrations", "score, points of 100", look)
    counts = lines[-1][2]
    demonstrations.set_xscale("log")
    demonstrations.set_xticks(counts, [f"{count:g}" for count in counts])
    demonstrations.set_xticks([], minor=True)
    draw_panel(steps, steps_lines(), "steps of stage 2", "nats a token", look)
    return figure


def main() -> None:
    """Draw the picture for a light and for a dark page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    save_for_pages(__file__, draw, LOOKS, parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
