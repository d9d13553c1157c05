"""The examples run with tiny weights, and print what they promise."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from nbclient import NotebookClient
from tiny import load_tiny

from mend_hf import DistilledDemonstrations, MendModel

EXAMPLES = Path(__file__).parents[1] / "examples"

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs an example in an empty folder, in a terminal of 80 columns, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run_example(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--tiny", *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def find_row(printed: str, name: str) -> list[str]:
    """Return the cells of the row of a table that begins with a name."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines()]
    [row] = [row for row in rows if row[0] == name and len(row) > 1]
    return row


@pytest.mark.parametrize("path", [*EXAMPLES.glob("*.py")], ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_three_tasks_are_asked_in_one_batch_each_with_labels_of_its_own(run: Run) -> None:
    printed = run("many_tasks_one_batch.py", "--num-queries", "1")
    assert "4 queries of 3 tasks, one batch" in printed
    assert "mails: 12 demonstrations" in printed
    assert find_row(printed, "restaurant_notes")[2] in ("keep", "fix")
    assert find_row(printed, "support_tickets")[2] in ("billing", "delivery", "account", "technical")


def test_chunks_keep_all_demonstrations_and_pooling_a_number_of_slots(run: Run) -> None:
    printed = run("long_demonstrations.py", "--num-demonstrations", "60", "--max-slots", "64", "--num-queries", "2")
    (_, read, lost, chunks, *_), (_, all_read, none_lost, more_chunks, slots, *_) = (
        find_row(printed, name) for name in ("cut", "in chunks")
    )
    assert int(read) < 60 == int(all_read)
    assert int(lost) > 0 == int(none_lost)
    assert int(chunks) == 1 < int(more_chunks)
    assert int(slots) > 64
    assert find_row(printed, "in chunks, pooled")[1:5] == ["60", "0", more_chunks, "64"]


def test_a_distiller_is_trained_on_a_file_of_ones_own(run: Run, tmp_path: Path) -> None:
    texts = {"sunny": "good", "foggy": "bad", "mild": "good", "wet": "bad"}
    lines = [{"input": f"A {word} day, {day}.", "output": label} for day in range(4) for word, label in texts.items()]
    (tmp_path / "weather.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    printed = run("own_data.py", "weather.jsonl", "--max-steps", "2", "--output-dir", "trained")
    assert "1 tasks, 8 examples to train on; one of 4 rows" in printed
    assert "after 2 steps" in printed
    model = MendModel.from_pretrained(load_tiny()[0], "trained", load_tiny()[1])
    assert any(tensor.any() for name, tensor in model.state_dict().items() if "lora_B" in name)


def test_the_service_starts_with_the_folder_and_port_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[FastAPI, int]] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, port: started.append((app, port)))
    run("serve.py", "--folder", "kept", "--port", "8123")
    [(app, port)] = started
    assert port == 8123
    posted = TestClient(app).post("/demonstrations", json={"demonstrations": [["great film", "positive"]]}).json()
    kept = DistilledDemonstrations.from_pretrained(tmp_path / "kept", name=posted["id"])
    assert (kept.num_slots, kept.provenance.num_tokens) == (posted["slots"], [posted["tokens_read"]])


def test_methods_are_compared_and_the_report_is_written(run: Run, tmp_path: Path) -> None:
    options = ("--max-queries", "2", "--seeds", "13", "--num-demonstrations", "6", "--output-dir", "report")
    printed = run("evaluate_methods.py", *options)
    assert "2 tasks, 6 demonstrations" in printed
    results = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))["examples"]
    slots = {result["method"]: result["prefix_slots"] for result in results}
    assert slots["zero-shot"] == 0 < slots["last 4"] < slots["in-context"]
    assert "last 4" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_the_notebook_runs_and_is_kept_without_outputs(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    [parameters] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += f"\ntiny, output_dir = True, {str(tmp_path / 'kept')!r}"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    printed = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stdout"]
    kept = DistilledDemonstrations.from_pretrained(tmp_path / "kept")
    assert f"16 demonstrations, {kept.provenance.num_tokens[0]} tokens -> {kept.num_slots} slots" in printed[0]
    assert "Has my order left the warehouse yet?" in printed[-1]
