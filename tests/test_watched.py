"""What a training logs of itself: its speed, where the time goes, and how near student and teacher are."""

from __future__ import annotations

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from mend_hf import MendCollator, MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.errors import ConfigError, DataError
from mend_hf.probe import keep_opening
from mend_hf.watched import PARTS

PAIRS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
ROWS = [
    {
        "demonstrations": [{"input": a, "output": b} for a, b in PAIRS[: 2 + index % 3]],
        "query": ["the film was good", "very bad"][: 1 + index % 2],
        "target": ["positive", "negative positive"][: 1 + index % 2],
    }
    for index in range(8)
]
PROBE = ROWS[1:4]
CONSTANTS = ("probe_teacher_nll", "probe_zero_shot_nll")


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path):
    def make_trainer(
        base="llama", probe_dataset=PROBE, config=None, data_collator=None, eval_dataset=None, **settings
    ):
        defaults = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "max_steps": 4, "seed": 3,
            "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
            "disable_tqdm": True, "probe_steps": 2, "per_device_eval_batch_size": 2,
        }  # fmt: skip
        torch.manual_seed(0)
        config = config or MendConfig(num_virtual_tokens=3, lora_r=2)
        model = get_mend_model(tiny_model(base), config, tokenizer)
        args = MendTrainingArguments(**{**defaults, **settings})
        return MendTrainer(model, args, ROWS, eval_dataset, data_collator, probe_dataset=probe_dataset)

    return make_trainer


def entries_with(trainer, name):
    return [entry for entry in trainer.state.log_history if name in entry]


def text_nll(model, text, target):
    """The targets' NLL, summed, and their number, of the bare base model that reads one unpadded text."""
    with torch.no_grad():
        logits = model.base_model(torch.tensor([text + target])).logits[0].log_softmax(-1)
    return -sum(logits[len(text) + i - 1, token].item() for i, token in enumerate(target)), len(target)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_teacher_and_zero_shot_are_the_base_model_on_unpadded_texts(make_trainer, base):
    trainer = make_trainer(base)
    model, prompt = trainer.model, trainer.model.prompt
    with_text, alone = [], []
    for row in PROBE:
        batch = trainer.data_collator([row])
        text = batch["teacher_input_ids"][0][batch["teacher_attention_mask"][0].bool()].tolist()
        for query, target in zip(row["query"], row["target"], strict=True):
            query_ids, target_ids = prompt.encode_query(query), prompt.encode_answer(target)
            with_text.append(text_nll(model, text + query_ids, target_ids))
            alone.append(text_nll(model, prompt.opening_ids + query_ids, target_ids))
    values = trainer._probe.measure()
    for name, parts in (("probe_teacher_nll", with_text), ("probe_zero_shot_nll", alone)):
        sums, counts = zip(*parts, strict=True)
        assert values[name] == pytest.approx(sum(sums) / sum(counts), rel=1e-4)


def test_what_stands_in_front_of_a_text_is_kept_and_no_more_of_it():
    batch = {
        "teacher_input_ids": torch.tensor([[0, 0, 1, 7, 8, 9], [1, 7, 5, 5, 5, 5], [0, 0, 0, 0, 0, 1]]),
        "teacher_attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]),
    }
    ids, mask = keep_opening(batch, [1, 7, 8])
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == [[1, 7, 8], [1, 7], [1]]
    assert keep_opening(batch, [])[0].shape == (3, 0)


@pytest.mark.parametrize("settings", [{}, {"kd_divergence": "reverse_kl", "kd_temperature": 3.0, "kd_top_k": 4}])
def test_the_student_is_measured_as_evaluation_measures_it_and_always_by_the_plain_divergence(make_trainer, settings):
    values = make_trainer(**settings)._probe.measure()
    expected = make_trainer(per_device_eval_batch_size=len(PROBE)).evaluate(PROBE)
    assert values["probe_kl"] == pytest.approx(expected["eval_kd_loss"], rel=1e-5)
    assert values["probe_nll"] == pytest.approx(expected["eval_nll_loss"], rel=1e-5)


def test_the_teacher_is_probed_also_where_the_training_has_none(make_trainer):
    without = make_trainer(kd_loss_weight=0.0)
    assert "teacher_input_ids" not in without.data_collator(ROWS[:1])
    assert without._probe.measure() == make_trainer()._probe.measure()


def test_a_student_that_reads_the_whole_text_is_at_the_teacher(make_trainer):
    trainer = make_trainer()
    model = trainer.model
    model.distiller.config = MendConfig(num_virtual_tokens=0, lora_r=0, prefix_form="kv")
    model.distiller.placeholders = torch.nn.Parameter(model.distiller.placeholders[:0])
    for batch in trainer._probe._batches:
        batch["demo_anchor_mask"] = batch["demo_attention_mask"].bool()  # every token an anchor; no adapter is trained
    values = trainer._probe.measure()
    assert values["probe_kl"] == pytest.approx(0, abs=1e-6)
    assert values["probe_nll"] == pytest.approx(values["probe_teacher_nll"], rel=1e-5)
    assert values["probe_nll"] != pytest.approx(values["probe_zero_shot_nll"], rel=1e-3)


def test_it_is_logged_before_the_first_step_every_probe_steps_and_at_the_end(make_trainer):
    trainer = make_trainer(max_steps=5)
    trainer.train()
    entries = entries_with(trainer, "probe_kl")
    assert [entry["step"] for entry in entries] == [0, 2, 4, 5]
    assert [entry["step"] for entry in entries_with(trainer, "loss")] == [1, 2, 3, 4, 5]
    for name in CONSTANTS:
        assert len({entry[name] for entry in entries}) == 1
    assert len({entry["probe_kl"] for entry in entries}) == len({entry["probe_nll"] for entry in entries}) == 4


def test_a_training_that_stops_early_is_probed_where_it_stops(make_trainer):
    watching = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ROWS, "metric_for_best_model": "loss"}
    saving = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(max_steps=9, probe_steps=8, learning_rate=0.0, **watching, **saving)
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    assert trainer.state.global_step == 3
    assert [entry["step"] for entry in entries_with(trainer, "probe_kl")] == [0, 3]


def test_a_training_with_a_probe_has_the_losses_and_weights_of_one_without(make_trainer):
    results = []
    for probe_dataset in (PROBE, None):
        trainer = make_trainer(
            probe_dataset=probe_dataset, config=MendConfig(num_virtual_tokens=3, lora_r=2, lora_dropout=0.5)
        )
        trainer.train()
        losses = [entry["loss"] for entry in entries_with(trainer, "loss")]
        results.append((losses, dict(trainer.model.distiller.trained_tensors())))
    (losses, weights), (other_losses, other_weights) = results
    assert losses == other_losses
    assert all(weights[name].equal(other_weights[name]) for name in weights)
    assert trainer.model.training


def test_a_resumed_training_logs_the_probe_as_an_unbroken_one(make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**saving)
    whole.train()
    resumed = make_trainer(**saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    [expected, entries] = [entries_with(trainer, "probe_kl") for trainer in (whole, resumed)]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    for entry, other in zip(entries, expected, strict=True):
        assert entry == pytest.approx(other, rel=1e-5)


def test_speed_and_shares_are_logged_beside_every_loss_and_the_shares_make_a_whole(make_trainer):
    trainer = make_trainer(gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2, eval_dataset=ROWS)
    trainer.train()
    entries = entries_with(trainer, "loss")
    assert len(entries) == 4
    for entry in entries:
        shares = [entry[f"{part}_time_fraction"] for part in PARTS]
        assert min(shares) > 0
        assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert not trainer.model.distiller._forward_hooks


def test_rows_and_tokens_a_second_are_those_of_the_batches_by_the_time_that_counts(make_trainer, monkeypatch):
    trainer = make_trainer(logging_steps=4, gradient_accumulation_steps=2, max_tokens_per_pass=20)
    batches, pop = [], trainer._stopwatch.pop
    collate = trainer.data_collator

    def keep(rows):
        batches.append(collate(rows))
        return batches[-1]

    trainer.data_collator = keep
    monkeypatch.setattr(trainer._stopwatch, "pop", lambda: pop() and {"rest": 1.5, "student": 0.5})
    trainer.train()
    [entry] = entries_with(trainer, "loss")
    tokens = sum(int(batch[name].sum()) for batch in batches for name in ("demo_attention_mask", "attention_mask"))
    assert entry["rows_per_second"] == 4 * 2 * 2 / 2
    assert entry["tokens_per_second"] == tokens / 2
    assert (entry["rest_time_fraction"], entry["student_time_fraction"]) == (0.75, 0.25)


def test_evaluation_probing_and_saving_take_no_training_time(make_trainer, monkeypatch):
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ROWS}
    trainer = make_trainer(max_steps=2, probe_steps=1, save_strategy="steps", save_steps=1, **evaluating)
    running = []
    for name in ("evaluate", "_save_checkpoint", "log_probe"):
        whole = getattr(trainer, name)
        monkeypatch.setattr(
            trainer,
            name,
            lambda *args, whole=whole, **k: (running.append(trainer._stopwatch._part), whole(*args, **k))[1],
        )
    trainer.train()
    assert running == [None] * 7


class Reporter(TrainerCallback):
    """Keeps what would go to a dashboard."""

    def __init__(self):
        self.reported = []

    def on_log(self, args, state, control, logs=None, **_):
        self.reported.append((state.global_step, dict(logs)))


def test_a_dashboard_gets_all_of_it_as_plain_numbers(make_trainer):
    trainer, reporter = make_trainer(max_steps=2), Reporter()
    trainer.add_callback(reporter)
    trainer.train()
    steps, logs = zip(*reporter.reported, strict=True)
    assert steps == (0, 1, 2, 2, 2)
    assert {type(value) for entry in logs for value in entry.values()} <= {int, float}
    reported = {name for entry in logs for name in entry}
    assert {"probe_kl", "probe_nll", *CONSTANTS, "rows_per_second", "tokens_per_second"} <= reported
    assert {f"{part}_time_fraction" for part in PARTS} <= reported


def test_tensorboard_shows_speed_and_probe(make_trainer, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(max_steps=2, report_to="tensorboard")
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    expected = [(entry["step"], entry["probe_kl"]) for entry in entries_with(trainer, "probe_kl")]
    assert [(event.step, event.value) for event in events.Scalars("train/probe_kl")] == [
        (step, pytest.approx(value)) for step, value in expected
    ]
    assert len(events.Scalars("train/teacher_time_fraction")) == len(events.Scalars("train/rows_per_second")) == 2


def test_of_a_language_model_that_is_tuned_itself_only_its_own_likelihood_is_probed(tiny_model, tokenizer, tmp_path):
    args = MendTrainingArguments.from_recipe(
        "metaicl", output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = MendTrainer(tiny_model("llama"), args, ROWS, probe_dataset=PROBE, processing_class=tokenizer)
    trainer.train()
    entries = entries_with(trainer, "probe_nll")
    assert [sorted(entry) for entry in entries] == [["epoch", "probe_nll", "step"]] * 2
    assert entries[1]["probe_nll"] != entries[0]["probe_nll"]
    assert entries_with(trainer, "loss")[-1]["distiller_time_fraction"] == 0


def test_an_encoder_decoder_is_probed_too(tiny_encoder_decoder, tokenizer, tmp_path):
    model = get_mend_model(tiny_encoder_decoder("t5"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
    args = MendTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = MendTrainer(model, args, ROWS, probe_dataset=PROBE)
    values = trainer._probe.measure()
    expected = trainer.evaluate(PROBE)
    assert values["probe_kl"] == pytest.approx(expected["eval_kd_loss"], rel=1e-5)
    assert len({round(value, 4) for value in values.values()}) == 4


def test_a_probe_without_rows_targets_or_a_teacher_is_refused(make_trainer, tokenizer):
    with pytest.raises(ConfigError, match="leave it out"):
        make_trainer(probe_dataset=[])
    with pytest.raises(DataError, match="add some, or leave it out"):
        make_trainer(probe_dataset=[{"demonstrations": ["the film"], "query": "was good", "target": ""}])
    collator = MendCollator(tokenizer, MendConfig(), with_teacher=False)
    with pytest.raises(DataError, match="with_teacher=True"):
        make_trainer(data_collator=lambda rows: collator(rows), kd_loss_weight=0.0)


def test_probe_steps_below_one_are_refused(make_trainer):
    with pytest.raises(ConfigError, match="probe_steps: expected 1 or more, got 0"):
        make_trainer(probe_steps=0)
