"""Trainings that are killed, run out of disk, lose their numbers, or are gone on with by other settings."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mend_hf import MendConfig, MendTrainer, MendTrainingArguments, get_mend_model, objective
from mend_hf.checkpoints import describe_rows
from mend_hf.data.streaming import StreamingTextDataset
from mend_hf.errors import CheckpointError, TrainingError

SCRIPT = Path(__file__).parent / "train_and_die.py"
ROWS = [
    {"demonstrations": [("great film", "positive"), ("a bore", "negative")], "query": query, "target": target}
    for query, target in [("good food", "positive"), ("bad food", "negative")] * 4
]


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path):
    def make_trainer(config=None, rows=ROWS, **settings):
        torch.manual_seed(0)
        defaults = {
            "output_dir": str(tmp_path / "out"), "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2,
            "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        model = get_mend_model(tiny_model("llama"), config or MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
        args = MendTrainingArguments(**{**defaults, **settings})
        return MendTrainer(model=model, args=args, train_dataset=rows)

    return make_trainer


def run_script(folder, moment, step):
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), moment, str(step)], capture_output=True, text=True
    )


def logged(folder):
    """Return the last losses that were logged of every step."""
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return {entry.pop("step"): entry for entry in map(json.loads, lines)}


def test_a_training_killed_in_a_step_and_in_a_save_has_the_losses_of_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(whole, "never", 0).returncode == 0
    assert run_script(killed, "step", 4).returncode == -signal.SIGKILL
    assert get_last_checkpoint(str(killed)).endswith("checkpoint-2")
    assert run_script(killed, "save", 6).returncode == -signal.SIGKILL
    # nothing of checkpoint 6 is where a checkpoint is looked for
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    last = run_script(killed, "never", 0)
    assert last.returncode == 0, last.stderr
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint-6", "checkpoint-8", "losses.jsonl"]
    expected, got = logged(whole), logged(killed)
    assert got.keys() == expected.keys() == set(range(1, 9))
    for step, losses in expected.items():
        assert got[step] == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_nothing_half_written(
    make_trainer, monkeypatch, tmp_path, error
):
    save = torch.save

    def save_until_full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise error
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(CheckpointError, match=r"MB are free.*checkpoint-2 is whole"):
        make_trainer().train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    monkeypatch.setattr(torch, "save", save)
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_what_a_killed_save_left_is_cleared_by_the_next_training(make_trainer, tmp_path):
    left = tmp_path / "out" / ".saving-checkpoint" / "checkpoint-2"
    left.mkdir(parents=True)
    make_trainer(max_steps=1, save_strategy="no").train()
    assert not left.parent.exists()


def test_going_on_by_other_settings_is_refused_and_all_are_named(make_trainer, tmp_path):
    make_trainer().train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(
        CheckpointError, match=r"(?s)- seed: the checkpoint has 42, this training 7.*- learning_rate: "
    ):
        make_trainer(seed=7, learning_rate=1e-3).train(resume_from_checkpoint=checkpoint)
    other = MendConfig(num_virtual_tokens=3, lora_r=2, lora_alpha=1)
    with pytest.raises(CheckpointError, match="- lora_alpha: "):
        make_trainer(other).train(resume_from_checkpoint=checkpoint)
    make_trainer(logging_steps=2, save_steps=4).train(resume_from_checkpoint=checkpoint)


@pytest.fixture
def second_loss(monkeypatch):
    """Make the loss of the second batch of a training infinite; its list holds what was asked for."""
    calls = []

    def loss(*args, **kwargs):
        calls.append(real(*args, **kwargs))
        return calls[-1] * (math.inf if len(calls) == 2 else 1.0)

    real = objective.nll_loss
    monkeypatch.setattr(objective, "nll_loss", loss)
    return calls


def test_a_loss_that_is_not_finite_stops_the_training_with_its_batch_written_out(make_trainer, second_loss, tmp_path):
    with pytest.raises(TrainingError, match=r"in step 2, got .*inf.*nonfinite_loss=\"skip\""):
        make_trainer().train()
    tensors = load_file(tmp_path / "out" / "nonfinite_batch.safetensors")
    record = json.loads((tmp_path / "out" / "nonfinite_batch.json").read_text())
    assert len(tensors["0.input_ids"]) == len(record["batches"][0]["input_ids"]) == 2
    assert "great film" in record["batches"][0]["teacher_input_ids"][0]
    assert record["values"]["nll_loss"] == "inf"


def test_a_loss_that_is_not_finite_is_passed_over_and_counted(make_trainer, second_loss):
    training = make_trainer(nonfinite_loss="skip", optim="sgd", max_steps=2)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    after_first = {}
    step = training.training_step

    def watch(*args, **kwargs):
        if len(second_loss) == 1:
            after_first.update({name: t.clone() for name, t in training.model.state_dict().items()})
        return step(*args, **kwargs)

    training.training_step = watch
    training.train()
    entries = [entry for entry in training.state.log_history if "loss" in entry]
    assert "skipped_batches" not in entries[0]
    assert (entries[1]["skipped_batches"], entries[1]["loss"]) == (1, 0.0)
    assert any(not tensor.equal(before[name]) for name, tensor in after_first.items())
    assert all(tensor.equal(after_first[name]) for name, tensor in training.model.state_dict().items())


def test_weights_that_are_not_finite_stop_the_training_in_any_case(make_trainer):
    training = make_trainer(nonfinite_loss="skip")
    with torch.no_grad():
        training.model.distiller.placeholders.fill_(math.nan)
    with pytest.raises(TrainingError, match="weights that are finite"):
        training.train()


@pytest.mark.parametrize("max_steps", [3, 4])
def test_going_on_from_a_finished_training_trains_no_further(make_trainer, tmp_path, max_steps):
    first = make_trainer(max_steps=max_steps, save_steps=1)
    first.train()
    again = make_trainer(max_steps=max_steps, save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == max_steps
    weights = first.model.state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in again.model.state_dict().items())
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == max_steps


def test_a_checkpoint_given_as_a_path_is_checked_too(make_trainer, tmp_path):
    make_trainer().train()
    with pytest.raises(CheckpointError, match="- seed: "):
        make_trainer(seed=7).train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")


def test_going_on_without_a_checkpoint_is_refused(make_trainer):
    with pytest.raises(CheckpointError, match="got none: start without resume_from_checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


def test_a_new_training_does_not_mix_its_checkpoints_with_another_ones(make_trainer, tmp_path):
    first = make_trainer()
    first.train()
    with pytest.raises(CheckpointError, match=r"got .*checkpoint-4: go on from it"):
        make_trainer().train()
    first.train()  # its own it writes anew


@pytest.mark.parametrize("other", [ROWS[:6], [*ROWS[:-1], ROWS[0]]], ids=["fewer rows", "another last row"])
def test_going_on_with_other_rows_is_refused(make_trainer, other):
    make_trainer().train()
    with pytest.raises(CheckpointError, match="- training_rows: the checkpoint has"):
        make_trainer(rows=other).train(resume_from_checkpoint=True)


def test_going_on_with_a_stream_of_other_texts_is_refused(make_trainer, tokenizer):
    def read_stream(*texts):
        return StreamingTextDataset(texts, tokenizer=tokenizer, min_tokens=4, num_rows=8, seed=1)

    make_trainer(rows=read_stream("great film was good", "very funny was bad")).train()
    other = read_stream("great film was bad", "very funny was good")
    with pytest.raises(CheckpointError, match="- training_rows: the checkpoint has"):
        make_trainer(rows=other).train(resume_from_checkpoint=True)


def test_rows_that_are_not_the_same_twice_are_not_compared():
    class Noise:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"value": random.random()}

    assert describe_rows(Noise()) == {"num_rows": 3, "sha256": None}
    assert describe_rows([{"value": object()}] * 2) == {"num_rows": 2, "sha256": None}
    assert describe_rows(ROWS)["sha256"] == describe_rows(list(ROWS))["sha256"] is not None


def test_means_and_counts_in_the_log_are_those_of_a_training_that_was_not_stopped(make_trainer, tmp_path, monkeypatch):
    """Saved at 2 and 4, logged at 3: the steps before a stop count as well."""

    def losses_with_skipped_batch(folder, steps):
        calls = []
        real = objective.nll_loss

        def loss(*args, **kwargs):
            calls.append(1)
            return real(*args, **kwargs) * (math.inf if len(calls) == 1 else 1.0)

        settings = {"output_dir": str(folder), "logging_steps": 3, "nonfinite_loss": "skip"}
        with monkeypatch.context() as patch:
            patch.setattr(objective, "nll_loss", loss)
            training = make_trainer(**settings)
            if steps < 4:
                training.add_callback(StopAt(steps))
            training.train()
        if steps < 4:
            training = make_trainer(**settings)
            training.train(resume_from_checkpoint=True)
        return [
            {key: entry[key] for key in ("step", "loss", "kd_loss", "skipped_batches")}
            for entry in training.state.log_history
            if "loss" in entry
        ]

    whole, stopped = (losses_with_skipped_batch(tmp_path / str(steps), steps) for steps in (4, 2))
    assert [entry["step"] for entry in whole] == [2, 3, 4]
    assert [entry["skipped_batches"] for entry in whole] == [1, 1, 1]
    for expected, got in zip(whole, stopped, strict=True):
        assert got == pytest.approx(expected, abs=1e-6)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.fixture
def second_gradient():
    """Make a gradient infinite in the second step of a training, behind a loss that is finite."""

    def spoil(training):
        seen = []

        def infinite(gradient):
            seen.append(1)
            return gradient * (math.inf if len(seen) == 2 else 1.0)

        training.model.distiller.placeholders.register_hook(infinite)

    return spoil


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_gradients_that_are_not_finite_are_passed_over_before_they_reach_the_weights(
    make_trainer, second_gradient, max_grad_norm
):
    training = make_trainer(nonfinite_loss="skip", max_steps=3, max_grad_norm=max_grad_norm)
    second_gradient(training)
    training.train()
    assert all(bool(tensor.isfinite().all()) for tensor in training.model.state_dict().values())
    entries = [entry for entry in training.state.log_history if "loss" in entry]
    assert [entry.get("skipped_batches", 0) for entry in entries] == [0, 1, 1]


def test_gradients_that_are_not_finite_stop_the_training_with_the_steps_batches_written_out(
    make_trainer, second_gradient, tmp_path
):
    training = make_trainer(gradient_accumulation_steps=2)
    training.model.distiller.placeholders.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match=r"finite gradients in step 1, got {'grad_norm': nan}"):
        training.train()
    tensors = load_file(tmp_path / "out" / "nonfinite_batch.safetensors")
    assert {"0.input_ids", "1.input_ids"} < set(tensors)


def test_an_output_folder_that_must_not_be_written_is_refused_at_once(make_trainer, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="does not let you write: change its permissions"):
        make_trainer()
