from __future__ import annotations

import itertools

import pytest
import torch

from mend_hf import MendCollator, MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.errors import ConfigError
from mend_hf.passes import split_batch

PAIRS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
# Rows of one to five demonstrations and of one to three queries, the long ones between the short ones.
ROWS = [
    {
        "demonstrations": (PAIRS * 2)[: 1 + length],
        "query": [
            PAIRS[place][0] + " and a very long and funny film" * (length % 2) for place in range(1 + length % 3)
        ],
        "target": [PAIRS[place][1] for place in range(1 + length % 3)],
    }
    for length in (0, 4, 1, 3, 2)
]


def count_tokens(part):
    return part["demo_input_ids"].numel() + part["input_ids"].numel()


@pytest.fixture
def arguments(tmp_path):
    def arguments(**settings):
        defaults = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 5, "max_steps": 2, "learning_rate": 1e-2,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
            "optim": "sgd", "max_grad_norm": 0.0,
        }  # fmt: skip
        return MendTrainingArguments(**{**defaults, **settings})

    return arguments


@pytest.mark.parametrize("form", ["kv", "embeds"])
@pytest.mark.parametrize("max_tokens", [1, 60, 100])
def test_training_in_several_passes_equals_training_in_one(tiny_model, tokenizer, arguments, form, max_tokens):
    results = []
    for budget in (0, max_tokens):
        torch.manual_seed(0)
        config = MendConfig(num_virtual_tokens=3, lora_r=2, prefix_form=form)
        model = get_mend_model(tiny_model("llama"), config, tokenizer)
        trainer = MendTrainer(model=model, args=arguments(max_tokens_per_pass=budget), train_dataset=ROWS)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, atol=1e-6, rtol=1e-5)


def test_chunks_stay_with_their_tasks(tiny_model, tokenizer, arguments):
    config = MendConfig(num_virtual_tokens=2, lora_r=2, overflow="concat", max_demonstrations_per_chunk=2)
    model = get_mend_model(tiny_model("llama"), config, tokenizer)
    batch = MendCollator(tokenizer, config)(ROWS)
    whole, parts = [], []
    for budget, losses in ((0, whole), (1, parts)):
        model.zero_grad()
        trainer = MendTrainer(model=model, args=arguments(max_tokens_per_pass=budget), train_dataset=ROWS)
        batches, num_items = trainer.get_batch_samples(iter([batch]), 1, model.device)
        losses += [trainer.training_step(model, batches[0], num_items), model.distiller.placeholders.grad.clone()]
    torch.testing.assert_close(parts, whole)


def test_a_part_has_rows_of_like_length_few_tokens_and_no_needless_padding(tokenizer):
    batch = MendCollator(tokenizer, MendConfig())(ROWS)
    parts = split_batch(batch, 110, labels_apart=False)
    assert 1 < len(parts) < len(ROWS)
    assert all(count_tokens(part) <= 110 for part in parts)
    assert sum(map(count_tokens, parts)) < count_tokens(batch)
    for part in parts:
        for name in ("demo_attention_mask", "teacher_attention_mask", "attention_mask"):
            assert part[name].any(0).all()
        num_tasks = len(part["teacher_input_ids"])
        assert part["demo_task_rows"].unique().tolist() == list(range(num_tasks))
        assert part["query_task_rows"].unique().tolist() == list(range(num_tasks))
    lengths = [part["demo_attention_mask"].sum(1) for part in parts]
    assert all(longer.min() >= shorter.max() for longer, shorter in itertools.pairwise(lengths))


def test_every_query_keeps_its_demonstrations_and_its_labels(tokenizer):
    batch = MendCollator(tokenizer, MendConfig())(ROWS)

    def read(part):
        """The tokens of text, query and target of every query."""
        return {
            tuple(
                tuple(ids[mask.bool()].tolist())
                for ids, mask in (
                    (part["teacher_input_ids"][task], part["teacher_attention_mask"][task]),
                    (part["input_ids"][row], part["attention_mask"][row]),
                    (part["labels"][row], part["labels"][row] != -100),
                )
            )
            for row, task in enumerate(part["query_task_rows"].tolist())
        }

    parts = split_batch(batch, 1, labels_apart=False)
    assert len(parts) == len(ROWS)
    assert set.union(*map(read, parts)) == read(batch)
    assert sum(len(part["input_ids"]) for part in parts) == len(batch["input_ids"])


def test_an_encoder_decoders_targets_are_cut_by_themselves(tokenizer):
    batch = MendCollator(tokenizer, MendConfig(task_type="SEQ_2_SEQ_LM"))(
        [ROWS[0], {**ROWS[1], "target": ["positive and a very long and funny film"] * 2}]
    )
    short = split_batch(batch, 1, labels_apart=True)[1]
    assert short["labels"].shape[1] < batch["labels"].shape[1]
    assert (short["labels"] != -100).all()


def test_a_budget_below_zero_is_refused_and_none_is_the_devices(arguments):
    with pytest.raises(ConfigError, match="max_tokens_per_pass: expected 0 or more, or None, got -1"):
        arguments(max_tokens_per_pass=-1)
    assert [arguments(max_tokens_per_pass=given).tokens_per_pass for given in (None, 0, 7)] == [1024, 0, 7]
