"""The benchmarks run with tiny weights and end with the line that they promise."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(name: str, *words: object) -> dict[str, float]:
        """Return the numbers of a benchmark's last line."""
        path = str(BENCHMARKS / name)
        monkeypatch.setattr(sys, "argv", [path, "--tiny", *map(str, words)])
        runpy.run_path(path, run_name="__main__")
        *_, last = capsys.readouterr().out.splitlines()
        assert last.startswith("RESULT ")
        return {key: float(value) for key, value in re.findall(r"(\w+)=(\S+)", last)}

    return run


@pytest.mark.parametrize("form", ["embeds", "kv"])
def test_a_training_step_has_the_losses_and_gradients_of_the_reference_formulation(run, form: str) -> None:
    result = run("training.py", "--form", form, "--num-rounds", 1, "--num-rows", 3, "--max-tokens-per-pass", 300)
    assert list(result) == ["training_speedup_1", "training_speedup_4", "training_memory_ratio", "loss_difference"]
    assert result["loss_difference"] < 1e-5


def test_cost_is_drawn_over_tokens(run, tmp_path: Path) -> None:
    picture = tmp_path / "cost.png"
    result = run("linear_cost.py", "--num-demonstrations", "2,4,20", "--num-rounds", 1, "--output", picture)
    assert set(result) == {"cost_per_token_ratio", "r_squared"}
    assert picture.stat().st_size > 0


def test_a_sweep_goes_on_where_it_was_stopped(run, tmp_path: Path) -> None:
    words = ["--num-eval-tasks", 1, "--num-rows", 8, "--max-queries", 4, "--output-dir", tmp_path]
    first = run("sweep.py", *words)
    assert first["num_trainings"] == 2
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(kept) == 3
    assert run("sweep.py", *words) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == kept


def test_a_store_is_asked_for_tasks_in_memory_and_on_disk(run) -> None:
    result = run("store.py")
    assert list(result) == ["warm_p99_ms", "cold_p99_ms", "growth_mb"]
    assert 0 < result["warm_p99_ms"] < result["cold_p99_ms"]


def test_options_are_chosen_as_by_reading_all_again_for_each(run) -> None:
    result = run("evaluation.py", "--num-queries", 6, "--num-demonstrations", 4, "--num-rounds", 1)
    assert list(result) == ["evaluation_speedup", "prediction_mismatches"]
    assert result["prediction_mismatches"] == 0


def test_options_are_calibrated_by_no_input_and_by_up_to_eight(run) -> None:
    result = run("own_options.py", "--task", "support_tickets", "--seeds", 13, "--num-queries", 5)
    assert list(result) == [f"{by}_{count}" for by in ("mend", "anchors") for count in (0, 1, 2, 4, 8)]
    assert all(value in {0, 20, 40, 60, 80, 100} for value in result.values())
