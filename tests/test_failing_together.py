"""Where one of two processes fails, the other must not wait for it for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = str(Path(__file__).parent / "train_and_fail.py")


def run(folder: Path, failure: str, rank: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    command += [str(folder), failure, str(rank)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"result-{process}.json").read_text()) for process in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_in_one_process_fails_in_all_and_leaves_nothing(tmp_path: Path, rank: int) -> None:
    results = run(tmp_path, "save", rank)
    assert "got disk full" in results[rank]["error"]
    assert "got an error in 1 of 2 processes" in results[1 - rank]["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result-0.json", "result-1.json"]


def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_each_keeps_its_batch(tmp_path: Path) -> None:
    for process, result in enumerate(run(tmp_path, "stop", 1)):
        assert result["error"].startswith("TrainingError: Expected a finite loss and finite gradients in step 1")
        assert (tmp_path / f"process-{process}" / "nonfinite_batch.safetensors").is_file()


def test_a_step_that_is_not_finite_in_one_process_is_passed_over_by_all(tmp_path: Path) -> None:
    results = run(tmp_path, "skip", 1)
    assert [result["error"] for result in results] == ["", ""]
    assert [result["skipped"] for result in results] == [4, 4]  # two steps of one batch in each of two processes
    assert (tmp_path / "checkpoint-2" / "mend_model.safetensors").is_file()
