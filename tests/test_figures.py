"""The pictures in the documentation can be drawn again."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


@pytest.mark.parametrize("script", sorted(FIGURES.glob("*.py")), ids=lambda path: path.stem)
def test_a_figure_is_drawn_for_light_and_for_dark_pages(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FIGURES)  # as where the script is called
    monkeypatch.setattr(sys, "argv", [script.name, "--output-dir", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"{script.stem}_{look}.svg" for look in ("light", "dark")}
    for name in drawn:
        assert (FIGURES / name).is_file(), f"run python {script.relative_to(FIGURES.parents[1])}"
        sizes = [ElementTree.parse(folder / name).getroot().get("viewBox") for folder in (tmp_path, FIGURES)]
        assert sizes[0] == sizes[1]
