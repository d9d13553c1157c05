"""Trainings in two processes, which must be those of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = str(Path(__file__).parent / "train_together.py")


def launch(num_processes, *arguments):
    """Run the script as torchrun would, over the loopback interface, and return what the processes wrote to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    world |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)} if num_processes > 1 else {}
    processes = []
    for rank in range(num_processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        processes.append(subprocess.Popen(command, env=os.environ | world | ranks, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * num_processes, errors


def train(folder, num_processes, rows_a_process, accumulation):
    folder.mkdir()
    launch(num_processes, folder, rows_a_process, accumulation)
    return json.loads((folder / "result.json").read_text()), load_file(folder / "mend_model.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one_with_the_same_rows_a_step(tmp_path, accumulation):
    one, weights = train(tmp_path / "one", 1, 4 // accumulation, accumulation)
    two, weights_of_two = train(tmp_path / "two", 2, 2 // accumulation, accumulation)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert len(one["logs"]) == len(two["logs"]) == 3
    for entry, other in zip(one["logs"], two["logs"], strict=True):
        for name in ("loss", "nll_loss", "kd_loss", "grad_norm"):
            assert other[name] == pytest.approx(entry[name], rel=1e-5, abs=1e-5)
        tokens_a_row = [logs["tokens_per_second"] / logs["rows_per_second"] for logs in (entry, other)]
        assert tokens_a_row[0] == pytest.approx(tokens_a_row[1], rel=1e-2)  # the rows of both processes count
    assert [entry["step"] for entry in two["probes"]] == [0, 2, 3]
    for entry, other in zip(one["probes"], two["probes"], strict=True):
        assert other == pytest.approx(entry, rel=1e-5, abs=1e-5)
    for name in ("eval_loss", "eval_nll_loss", "eval_kd_loss"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(weights_of_two[name], tensor, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "two" / "out" / "checkpoint-3" / "rng_state_1.pth").exists()
