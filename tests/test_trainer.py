from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    GPT2Config,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from mend_hf import MendCollator, MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.errors import CheckpointError, ConfigError, DataError

TEXTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
ROWS = [
    {
        "demonstrations": [{"input": a, "output": b} for a, b in (TEXTS * 2)[start : start + 2 + start % 2]],
        "query": query,
        "target": target,
    }
    for start, (query, target) in enumerate([*TEXTS, ("very funny", "positive"), ("the film was bad", "negative")] * 2)
    if start < 8
]


@pytest.fixture
def model(tiny_model, tokenizer):
    torch.manual_seed(0)
    return get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)


@pytest.fixture
def arguments(tmp_path):
    def arguments(**settings):
        defaults = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "max_steps": 4,
            "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
            "disable_tqdm": True, "use_cpu": True, "seed": 3,
        }  # fmt: skip
        return MendTrainingArguments(**{**defaults, **settings})

    return arguments


def trained(model):
    return {name: tensor.detach().clone() for name, tensor in model.distiller.trained_tensors()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_moves_the_distiller_and_no_bit_of_the_base_model(model, tiny_model, arguments):
    before, bare = trained(model), tiny_model("llama").state_dict()
    trainer = MendTrainer(model=model, args=arguments(max_steps=8), train_dataset=ROWS)
    trainer.train()
    after = trained(model)
    # in the last layer only keys and values reach the student
    silent = {name for name in before if ".layers.2." in name and "k_proj" not in name and "v_proj" not in name}
    assert {name for name in before if before[name].equal(after[name])} == silent
    unloaded = model.unload().state_dict()
    assert all(unloaded[name].equal(tensor) for name, tensor in bare.items())


def test_training_lowers_the_loss(model, arguments):
    trainer = MendTrainer(model=model, args=arguments(max_steps=24), train_dataset=ROWS)
    trainer.train()
    history = losses(trainer)
    assert sum(history[-6:]) < 0.8 * sum(history[:6])


def test_the_loss_is_the_weighted_sum_of_both(model, arguments):
    batch = MendCollator(model.tokenizer, model.mend_config)(ROWS[:2])
    values = {}
    for nll, kd in ((1.0, 0.0), (0.0, 1.0), (2.0, 0.5)):
        trainer = MendTrainer(model=model, args=arguments(nll_loss_weight=nll, kd_loss_weight=kd), train_dataset=ROWS)
        with torch.no_grad():
            values[nll, kd] = trainer.compute_loss(model, batch).item()
    assert values[2.0, 0.5] == pytest.approx(2 * values[1.0, 0.0] + 0.5 * values[0.0, 1.0], rel=1e-5)


def test_the_divergence_is_zero_where_the_prefix_is_the_whole_text(tiny_model, tokenizer, arguments):
    """Every token an anchor, no adapter: the student reads what the teacher reads."""
    model = get_mend_model(
        tiny_model("llama"), MendConfig(num_virtual_tokens=1, lora_r=0, prefix_form="kv"), tokenizer
    )
    model.distiller.config = MendConfig(num_virtual_tokens=0, lora_r=0, prefix_form="kv")
    model.distiller.placeholders = torch.nn.Parameter(model.distiller.placeholders[:0])
    batch = MendCollator(tokenizer, model.mend_config)(ROWS[:3])
    batch["demo_anchor_mask"] = batch["demo_attention_mask"].bool()
    trainer = MendTrainer(model=model, args=arguments(nll_loss_weight=0.0), train_dataset=ROWS)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(0, abs=1e-6)


def test_kd_temperature_changes_the_loss(model, arguments):
    batch = MendCollator(model.tokenizer, model.mend_config)(ROWS[:2])
    trainers = [
        MendTrainer(model=model, args=arguments(nll_loss_weight=0.0, kd_temperature=t), train_dataset=ROWS)
        for t in (1.0, 4.0)
    ]
    plain, soft = (trainer.compute_loss(model, batch).item() for trainer in trainers)
    assert plain != pytest.approx(soft, rel=1e-2)


def test_accumulating_batches_equals_one_large_batch(tiny_model, tokenizer, arguments):
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
        args = arguments(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=2, optim="sgd",
            max_grad_norm=0.0,
        )  # fmt: skip
        trainer = MendTrainer(model=model, args=args, train_dataset=ROWS)
        trainer.train()
        results.append((losses(trainer), trained(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, atol=1e-5, rtol=1e-4)


def test_queries_that_share_a_distilling_give_the_loss_of_single_rows(model, arguments):
    shots = ROWS[0]["demonstrations"]
    queries, targets = [a for a, _ in TEXTS], [b for _, b in TEXTS]
    collator = MendCollator(model.tokenizer, model.mend_config)
    together = collator([{"demonstrations": shots, "query": queries, "target": targets}])
    apart = collator(
        [{"demonstrations": shots, "query": q, "target": t} for q, t in zip(queries, targets, strict=True)]
    )
    trainer = MendTrainer(model=model, args=arguments(), train_dataset=ROWS)
    with torch.no_grad():
        expected = trainer.compute_loss(model, apart).item()
        assert trainer.compute_loss(model, together).item() == pytest.approx(expected, rel=1e-5)


def test_checkpoints_hold_the_distiller_only_and_training_goes_on_from_them(
    tiny_model, tokenizer, arguments, tmp_path
):
    runs = {}
    for name in ("whole", "stopped"):
        torch.manual_seed(0)
        model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
        args = arguments(output_dir=str(tmp_path / name), max_steps=4, save_strategy="steps", save_steps=2)
        trainer = MendTrainer(model=model, args=args, train_dataset=ROWS)
        trainer.train()
        runs[name] = (losses(trainer), trained(model))
    checkpoint = tmp_path / "stopped" / "checkpoint-2"
    assert set(load_file(checkpoint / "mend_model.safetensors")) == set(runs["whole"][1])
    assert not list(checkpoint.glob("model*.safetensors"))
    assert json.loads((checkpoint / "training_run.json").read_text())["arguments"]["kd_loss_weight"] == 1.0
    torch.manual_seed(99)
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
    args = arguments(output_dir=str(tmp_path / "stopped"), max_steps=4, save_strategy="steps", save_steps=2)
    trainer = MendTrainer(model=model, args=args, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert losses(trainer)[-2:] == pytest.approx(runs["whole"][0][-2:], abs=1e-6)
    for name, tensor in trained(model).items():
        torch.testing.assert_close(tensor, runs["whole"][1][name], atol=1e-6, rtol=1e-5)


def test_evaluation_reports_both_losses_and_the_best_checkpoint_comes_back(model, arguments):
    args = arguments(
        max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_kd_loss", greater_is_better=False,
    )  # fmt: skip
    trainer = MendTrainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS[:3])
    trainer.train()
    evaluations = [entry["eval_kd_loss"] for entry in trainer.state.log_history if "eval_kd_loss" in entry]
    assert len(evaluations) == 4
    metrics = trainer.evaluate()
    assert metrics["eval_kd_loss"] == pytest.approx(min(evaluations), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll_loss"] + metrics["eval_kd_loss"], rel=1e-4)


def test_the_stock_trainer_trains_and_saves_a_distiller_too(model, tmp_path):
    before = trained(model)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", remove_unused_columns=False,
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    collator = MendCollator(model.tokenizer, model.mend_config, with_teacher=False)
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, data_collator=collator)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    after = trained(model)
    assert not before["placeholders"].equal(after["placeholders"])
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {n: t.tolist() for n, t in after.items()}


def test_the_teacher_and_the_base_model_have_no_dropout(tiny_model, tokenizer, arguments):
    base = tiny_model("gpt2")
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model = get_mend_model(base, MendConfig(num_virtual_tokens=3), tokenizer)
    trainer = MendTrainer(model=model.train(), args=arguments(), train_dataset=ROWS)
    batch = MendCollator(tokenizer, model.mend_config)(ROWS[:2])
    assert trainer.compute_loss(model, batch).item() == trainer.compute_loss(model, copy.copy(batch)).item()


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"nll_loss_weight": -1.0, "kd_temperature": 0.0}, "(?s)nll_loss_weight: .*kd_temperature: "),
        ({"nll_loss_weight": 0.0, "kd_loss_weight": 0.0}, "at least one above 0"),
        ({"remove_unused_columns": True}, "expected False"),
    ],
)
def test_impossible_arguments_are_refused(arguments, settings, remedy):
    with pytest.raises(ConfigError, match=remedy):
        arguments(**settings)


def test_an_output_folder_that_is_a_file_is_refused_before_training(model, arguments, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="give another path"):
        MendTrainer(model=model, args=arguments(output_dir=str(tmp_path / "taken")), train_dataset=ROWS)


def test_a_bare_base_model_is_refused(tiny_model, arguments):
    with pytest.raises(ConfigError, match="get_mend_model first"):
        MendTrainer(model=tiny_model("llama"), args=arguments(), train_dataset=ROWS)


def test_a_distiller_with_nothing_to_train_is_refused(tiny_model, tokenizer, arguments):
    anchors = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=0, lora_r=0), tokenizer)
    trainer = MendTrainer(model=anchors, args=arguments(), train_dataset=ROWS)
    with pytest.raises(ConfigError, match="something to train"):
        trainer.train()


def test_a_batch_without_a_teacher_is_refused_where_one_is_needed(model, arguments):
    trainer = MendTrainer(model=model, args=arguments(), train_dataset=ROWS)
    batch = MendCollator(model.tokenizer, model.mend_config, with_teacher=False)(ROWS[:2])
    with pytest.raises(DataError, match="with_teacher=True"):
        trainer.compute_loss(model, batch)


def test_the_losses_apart_add_up_to_the_whole_in_every_log_also_after_resuming(tiny_model, tokenizer, arguments):
    for resume in (False, True):
        torch.manual_seed(0)
        model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
        args = arguments(
            save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=1,
            logging_steps=2, max_steps=6,
        )  # fmt: skip
        trainer = MendTrainer(model=model, args=args, train_dataset=ROWS)
        trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2" if resume else None)
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(entries) == 3
        for entry in entries:
            assert entry["nll_loss"] + entry["kd_loss"] == pytest.approx(entry["loss"], rel=1e-4)


def test_evaluation_over_batches_of_different_sizes_adds_up_too(model, arguments):
    args = arguments(per_device_eval_batch_size=2, nll_loss_weight=0.5, kd_loss_weight=2.0)
    trainer = MendTrainer(model=model, args=args, train_dataset=ROWS)
    for prefix, metrics in {
        "eval": trainer.evaluate(ROWS[:5]),
        "other": trainer.evaluate(ROWS[:5], metric_key_prefix="other"),
        "test": trainer.predict(ROWS[:5]).metrics,
    }.items():
        parts = 0.5 * metrics[f"{prefix}_nll_loss"] + 2.0 * metrics[f"{prefix}_kd_loss"]
        assert parts == pytest.approx(metrics[f"{prefix}_loss"], rel=1e-4)


def test_several_evaluation_sets_are_reported_one_by_one(model, arguments):
    trainer = MendTrainer(
        model=model, args=arguments(), train_dataset=ROWS, eval_dataset={"a": ROWS[:2], "b": ROWS[2:5]}
    )
    metrics = trainer.evaluate()
    assert {name for name in metrics if name.endswith("_kd_loss")} == {"eval_a_kd_loss", "eval_b_kd_loss"}
    alone = trainer.evaluate(ROWS[:2])
    assert metrics["eval_a_kd_loss"] == pytest.approx(alone["eval_kd_loss"])


def test_early_stopping_may_watch_a_loss_of_ours(model, arguments):
    args = arguments(
        max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.0,
        load_best_model_at_end=True, metric_for_best_model="eval_kd_loss", greater_is_better=False,
    )  # fmt: skip
    trainer = MendTrainer(
        model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS[:3], callbacks=[EarlyStoppingCallback(1)]
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_stock_trainers_checkpoint_is_loaded_again(tiny_model, tokenizer, tmp_path):
    def train(folder, **resume):
        torch.manual_seed(0)
        model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=4, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            remove_unused_columns=False, disable_tqdm=True, learning_rate=1e-2, save_steps=2, seed=3,
            label_names=["labels"],
        )  # fmt: skip
        collator = MendCollator(tokenizer, model.mend_config, with_teacher=False)
        Trainer(model=model, args=args, train_dataset=ROWS, data_collator=collator).train(**resume)
        return trained(model)

    whole = train("out")
    resumed = train("out", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_a_separate_distiller_with_a_tokenizer_of_its_own_is_trained(
    tiny_model, tokenizer, arguments, tmp_path, lora_r
):
    reader_config = GPT2Config(vocab_size=200, n_embd=24, n_layer=2, n_head=2, n_positions=256)
    AutoModelForCausalLM.from_config(reader_config).save_pretrained(tmp_path / "reader")
    letters = {"[UNK]": 0, "</s>": 1} | {chr(code): code - 30 for code in range(32, 127)}
    backend = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]").save_pretrained(
        tmp_path / "reader"
    )
    config = MendConfig(distiller_name_or_path=str(tmp_path / "reader"), lora_r=lora_r, num_virtual_tokens=3)
    model = get_mend_model(tiny_model("llama"), config, tokenizer)
    bare = tiny_model("llama").state_dict()
    frozen = {name: p.detach().clone() for name, p in model.distiller.reader.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (lora_r > 0)
    before = trained(model)
    trainer = MendTrainer(model=model, args=arguments(max_steps=4, learning_rate=1e-2), train_dataset=ROWS)
    batch = trainer.data_collator(ROWS[:1])
    assert batch["demo_input_ids"].shape[1] > batch["teacher_input_ids"].shape[1]
    trainer.train()
    still = {name for name, tensor in trained(model).items() if tensor.equal(before[name])}
    # the reader gets embeddings of placeholders and of tokens: unread rows of its table may stay
    assert still == set()
    assert all(model.base_model.state_dict()[name].equal(tensor) for name, tensor in bare.items())
    parameters = dict(model.distiller.reader.named_parameters())
    assert all(parameters[name].equal(tensor) for name, tensor in frozen.items())
