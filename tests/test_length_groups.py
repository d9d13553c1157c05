"""Rows of like length stand in a step, in an order that the seed, the epoch and nothing else fixes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader

from mend_hf import MendCollator, MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.data.few_shot import FewShotDataset
from mend_hf.data.length_groups import LengthSampler, measure_rows
from mend_hf.data.metaicl import Example
from mend_hf.data.text import TextDataset
from mend_hf.errors import ConfigError

LENGTHS = [7 * number % 101 for number in range(101)]


@pytest.fixture
def rows():
    """Rows of 1 to 12 demonstrations."""
    tasks = {
        task: [Example(task, f"{task} film {i}", "good") for i in range(20)] for task in ("good", "very very bad")
    }
    return FewShotDataset(tasks, num_demonstrations=(1, 12), num_rows=48, seed=5)


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path, rows):
    def make_trainer(train_dataset=rows, **settings: Any) -> MendTrainer:
        torch.manual_seed(0)
        model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
        defaults = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "use_cpu": True, "seed": 3,
            "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "nll_loss_weight": 0.0,
            "train_sampling_strategy": "group_by_length",
        }  # fmt: skip
        collator = settings.pop("data_collator", None)
        args = MendTrainingArguments(**defaults | settings)
        return MendTrainer(model=model, args=args, train_dataset=train_dataset, data_collator=collator)

    return make_trainer


def spread(order, step_rows):
    """The mean distance of a step's longest row from its shortest."""
    steps = [[LENGTHS[row] for row in order[start : start + step_rows]] for start in range(0, len(order), step_rows)]
    return sum(max(step) - min(step) for step in steps) / len(steps)


def test_every_row_comes_once_and_steps_hold_rows_of_like_length():
    order = [*LengthSampler(LENGTHS, 4, seed=1)]
    assert sorted(order) == [*range(101)]
    assert spread(order, 4) < spread(range(101), 4) / 2
    assert max(LENGTHS) in [LENGTHS[row] for row in order[:4]]
    first_rows = [LENGTHS[row] for row in order[4:-1:4]]
    assert first_rows != sorted(first_rows, reverse=True)


def test_the_order_is_fixed_by_seed_and_epoch_alone():
    sampler = LengthSampler(LENGTHS, 4, seed=1)
    first = [*sampler]
    torch.manual_seed(9)
    assert [*sampler] == first == [*LengthSampler(LENGTHS, 4, seed=1)]
    sampler.set_epoch(1)
    assert [*sampler] != first
    assert [*LengthSampler(LENGTHS, 4, seed=2)] != first


def test_fewer_rows_than_a_step_come_once():
    assert sorted(LengthSampler([3, 1, 2], 8, seed=0)) == [0, 1, 2]


def test_lengths_go_with_the_tokens_that_a_batch_is_padded_to(rows, tokenizer):
    collate = MendCollator(tokenizer, MendConfig())
    tokens = [collate([rows[index]])["demo_input_ids"].shape[1] for index in range(len(rows))]
    lengths = measure_rows(rows, "length")
    assert torch.corrcoef(torch.tensor([tokens, lengths], dtype=torch.float))[0, 1] > 0.9
    texts = ["good film " * number for number in (10, 20, 30)]
    dataset = TextDataset(texts, tokenizer=tokenizer, min_tokens=8, num_rows=30, seed=0)
    measured = measure_rows(dataset, "length")
    assert measured == [len(dataset[i]["demonstrations"][0] + dataset[i]["target"]) for i in range(30)]


def test_a_column_of_lengths_is_taken_at_its_word():
    row = {"demonstrations": [("good", "bad")], "query": ["a", "the film"], "target": ["b", "cc"]}
    assert measure_rows([row, row | {"length": 3}], "length") == [8 + 2 + 7, 3]


def test_batches_of_a_training_are_padded_less(make_trainer):
    shares = {}
    for strategy in ("random", "group_by_length"):
        masks = [
            batch["demo_attention_mask"]
            for batch in make_trainer(train_sampling_strategy=strategy).get_train_dataloader()
        ]
        shares[strategy] = 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks)
    assert shares["group_by_length"] < 0.75 * shares["random"]


def read_epochs(trainer):
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append([row for batch in loader for row in batch])
    return epochs


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_rows_and_their_order_do_not_depend_on_workers_and_processes(make_trainer, monkeypatch, strategy, rows):
    settings = {"train_sampling_strategy": strategy, "data_collator": list}
    one = read_epochs(make_trainer(**settings))
    assert [sorted(map(str, epoch)) for epoch in one] == [sorted(str(rows[i]) for i in range(48))] * 2
    assert one[0] != one[1]
    assert read_epochs(make_trainer(**settings, dataloader_num_workers=2)) == one
    shares = []
    for process in range(2):
        trainer = make_trainer(**settings, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        prepare = partial(
            prepare_data_loader, num_processes=2, process_index=process, put_on_device=False, data_seed=3,
            use_seedable_sampler=True, dispatch_batches=False,
        )  # fmt: skip
        monkeypatch.setattr(trainer.accelerator, "prepare", prepare)
        shares.append(read_epochs(trainer))
    for epoch, share, other in zip(one, *shares, strict=True):
        pairs = zip(share[::2], share[1::2], other[::2], other[1::2], strict=True)
        assert [row for step in pairs for row in step] == epoch


def test_a_training_that_goes_on_in_its_second_epoch_makes_the_losses_of_one_never_stopped(make_trainer, rows):
    def train(checkpoint=None):
        trainer = make_trainer([rows[index] for index in range(16)], max_steps=7, save_steps=5)
        trainer.train(resume_from_checkpoint=checkpoint)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer

    losses, trainer = train()
    resumed, _ = train(f"{trainer.args.output_dir}/checkpoint-5")
    assert len({*losses}) == 7
    assert resumed == pytest.approx(losses, abs=1e-6)


def test_evaluation_keeps_the_order_of_the_rows(make_trainer, rows):
    trainer = make_trainer(data_collator=list)
    assert [row for batch in trainer.get_eval_dataloader(rows) for row in batch] == [rows[i] for i in range(48)]


def test_rows_of_a_stream_have_no_lengths(make_trainer, tokenizer):
    from mend_hf.data.streaming import StreamingTextDataset

    with pytest.raises(ConfigError, match="leave it out, or use max_tokens_per_pass"):
        make_trainer(StreamingTextDataset(["good film " * 40], tokenizer=tokenizer, num_rows=4, seed=0))
