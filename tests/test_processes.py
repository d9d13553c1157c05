"""Trainings in two processes, which must be those of one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mend_hf.errors import ConfigError
from mend_hf.sharding import check_sharding

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


def train(folder, num_processes, rows_a_process, accumulation, *options):
    folder.mkdir(exist_ok=True)
    launch(num_processes, folder, rows_a_process, accumulation, *options)
    return json.loads((folder / "result.json").read_text()), load_file(folder / "mend_model.safetensors")


def assert_same(one, two, weights, weights_of_two):
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


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one_with_the_same_rows_a_step(tmp_path, accumulation):
    one, weights = train(tmp_path / "one", 1, 4 // accumulation, accumulation, "kv")
    two, weights_of_two = train(tmp_path / "two", 2, 2 // accumulation, accumulation, "kv")
    assert_same(one, two, weights, weights_of_two)
    assert (tmp_path / "two" / "out" / "checkpoint-3" / "rng_state_1.pth").exists()


def test_two_processes_read_a_stream_as_one_does(tmp_path):
    one, weights = train(tmp_path / "one", 1, 4, 1, "kv", "stream")
    two, weights_of_two = train(tmp_path / "two", 2, 2, 1, "kv", "stream")
    losses, losses_of_two = ([entry["loss"] for entry in run["logs"]] for run in (one, two))
    assert len({*losses}) == 3
    assert losses_of_two == pytest.approx(losses, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(weights_of_two[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("form", "accumulation"), [("kv", 2), ("embeds", 1)])
def test_a_sharded_training_saves_and_loads_the_distiller_of_an_unsharded_one(tmp_path, form, accumulation):
    one, weights = train(tmp_path / "one", 1, 4 // accumulation, accumulation, form)
    two, weights_of_two = train(tmp_path / "two", 2, 2 // accumulation, accumulation, form, "sharded")
    assert two["parameters"] == ["DTensor"]
    assert_same(one, two, weights, weights_of_two)


def test_a_sharded_training_that_goes_on_is_one_that_never_stopped(tmp_path):
    whole, weights = train(tmp_path / "whole", 2, 2, 1, "kv", "sharded", "adamw")
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-2"
    assert not list(checkpoint.glob("*model*.bin"))  # no base model beside the distiller
    shutil.copytree(checkpoint, tmp_path / "stopped" / "out" / "checkpoint-2")
    resumed, weights_of_resumed = train(tmp_path / "stopped", 2, 2, 1, "kv", "sharded", "adamw", "resume")
    assert resumed["logs"][-1]["loss"] == pytest.approx(whole["logs"][-1]["loss"], abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(weights_of_resumed[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("state", "settings", "message"),
    [
        (
            {"fsdp_plugin": {"fsdp_version": 1, "cpu_ram_efficient_loading": False}},
            {"nonfinite_loss": "stop"},
            "fsdp_version: expected 2",
        ),
        (
            {"fsdp_plugin": {"fsdp_version": 2, "cpu_ram_efficient_loading": True}},
            {"nonfinite_loss": "stop"},
            "loading: expected false",
        ),
        (
            {"fsdp_plugin": {"fsdp_version": 2, "cpu_ram_efficient_loading": False}},
            {"nonfinite_loss": "skip"},
            "nonfinite_loss: expected 'stop'",
        ),
        ({"deepspeed_plugin": {"zero_stage": 3}}, {"nonfinite_loss": "stop"}, "zero_stage to be at most 2"),
    ],
)
def test_ways_of_sharding_that_do_not_go_are_refused(state, settings, message):
    plugins = {name: SimpleNamespace(**values) for name, values in state.items()}
    accelerator = SimpleNamespace(state=SimpleNamespace(**plugins))
    with pytest.raises(ConfigError, match=message):
        check_sharding(accelerator, **settings)
