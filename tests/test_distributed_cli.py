"""`mend` in two processes: trained together, said and saved once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from command_line import run_mend
from safetensors.torch import load_file
from tiny import load_tiny
from torch.testing import assert_close

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = ["--num-virtual-tokens", 2, "--num-demonstrations", 2, "--num-rows", 8, "--save-steps", 2, "--arg", "optim=sgd"]


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    base, tokenizer = load_tiny()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def launch(launcher: list[str], *words: object) -> subprocess.CompletedProcess[str]:
    """Run `mend` in two processes, over the loopback interface."""
    command = [sys.executable, "-m", *launcher, "-m", "mend_hf.cli", *map(str, words)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    "accelerate.commands.launch", "--config_file", str(EXAMPLES / "distributed" / "ddp.yaml"), "--num_processes", "2",
    "--main_process_port", "0",
]  # fmt: skip


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_train_save_and_speak_as_one(launcher: list[str], base_folder: Path, tmp_path: Path) -> None:
    words = ["finetune", "--base-model", base_folder, "--tasks", EXAMPLES / "data", "--device", "cpu", *FEW]
    result = launch(launcher, *words, "--batch-size", 1, "--output-dir", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    for line in ("trainable params:", " steps in ", f"Saved the distiller in {tmp_path / 'two'}"):
        assert result.stdout.count(line) == 1
    assert run_mend([*words, "--batch-size", 2, "--output-dir", tmp_path / "one"]) == 0
    one, two = (json.loads((tmp_path / name / "training_log.json").read_text())["log"] for name in ("one", "two"))
    losses, losses_of_two = ([entry for entry in log if "loss" in entry] for log in (one, two))
    assert len(losses) == 4
    for entry, other in zip(losses, losses_of_two, strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert other[name] == pytest.approx(entry[name], rel=1e-3)
    assert json.loads((tmp_path / "two" / "training_run.json").read_text())["num_processes"] == 2
    assert sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    weights, of_two = (load_file(tmp_path / name / "mend_model.safetensors") for name in ("one", "two"))
    for name, tensor in weights.items():
        assert_close(of_two[name], tensor, atol=1e-5, rtol=1e-5)


def test_two_processes_evaluate_what_one_does(base_folder: Path, tmp_path: Path) -> None:
    words = [
        "evaluate",
        "--base-model",
        base_folder,
        "--tasks",
        EXAMPLES / "data",
        "--device",
        "cpu",
        "--seeds",
        "13,21",
    ]
    words += ["--num-demonstrations", 2, "--max-queries", 3, "--method", "zero-shot", "--method", "in-context"]
    result = launch(TORCHRUN, *words, "--output-dir", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 tasks, 2 demonstrations") == 1
    assert run_mend([*words, "--output-dir", tmp_path / "one"]) == 0
    one, two = (_read_results(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert len(one) == 8
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "results.jsonl",
        "results.md",
        "settings.json",
    ]


def test_an_evaluation_goes_on_with_another_number_of_processes(base_folder: Path, tmp_path: Path) -> None:
    words = [
        "evaluate",
        "--base-model",
        base_folder,
        "--tasks",
        EXAMPLES / "data",
        "--device",
        "cpu",
        "--seeds",
        "13,21",
    ]
    words += ["--num-demonstrations", 2, "--max-queries", 2, "--method", "zero-shot", "--output-dir", tmp_path]
    assert run_mend(words) == 0
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text(lines[0] + lines[1][:30])  # two processes, both killed
    (tmp_path / "results-1.jsonl").write_text(lines[2])
    assert run_mend(words) == 0
    after = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert {lines[0], lines[2]} < {*after}
    assert len(after) == len(lines) == 4
    assert not (tmp_path / "results-1.jsonl").exists()


def _read_results(folder: Path) -> dict[tuple[str, str, int], float]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {(row["task"], row["method"], row["seed"]): row["score"] for row in rows}


def test_an_error_says_which_process_it_is_of(tmp_path: Path) -> None:
    words = ["finetune", "--tasks", EXAMPLES / "data", "--output-dir", tmp_path / "out"]
    lines = launch(TORCHRUN, *words).stderr.splitlines()
    expected = "Expected --base-model, or --distiller, which names one, got neither: name a Hub id or a folder."
    said = [line for line in lines if line.endswith(expected)]
    assert said
    assert set(said) <= {f"error: {expected}", f"error in process 1: {expected}"}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_configurations_are_as_accelerate_reads_them(name: str) -> None:
    config = load_config_from_file(str(EXAMPLES / "distributed" / f"{name}.yaml"))
    assert config.num_processes == 2
    stage = getattr(config, "deepspeed_config", None) or {}
    assert stage.get("zero_stage") == {"zero2": 2}.get(name)
    sharding = getattr(config, "fsdp_config", None) or {}
    wanted = (2, False) if name == "fsdp2" else (None, None)
    assert (sharding.get("fsdp_version"), sharding.get("fsdp_cpu_ram_efficient_loading")) == wanted
