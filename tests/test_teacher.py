"""Losses of the trainer that look at the teacher, its answers on disk, and training without a distiller."""

from __future__ import annotations

import sqlite3

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mend_hf import Demonstration, MendCollator, MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.errors import CheckpointError, ConfigError
from mend_hf.teacher_cache import TeacherCache
from mend_hf.training_args import RECIPES

PAIRS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
ROWS = [
    {
        "demonstrations": [{"input": a, "output": b} for a, b in PAIRS[: 2 + index % 3]],
        "query": ["the film was good", "very bad"][: 1 + index % 2],
        "target": ["positive", "negative"][: 1 + index % 2],
    }
    for index in range(6)
]


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_model, tokenizer):
    torch.manual_seed(0)
    return get_mend_model(tiny_model(request.param), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)


@pytest.fixture
def arguments(tmp_path):
    def arguments(recipe="finetune", **settings):
        defaults = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "max_steps": 4,
            "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
            "disable_tqdm": True, "use_cpu": True, "seed": 3,
        }  # fmt: skip
        return MendTrainingArguments.from_recipe(recipe, **{**defaults, **settings})

    return arguments


def loss_of(model, args, rows=ROWS[:3]):
    trainer = MendTrainer(model=model, args=args, train_dataset=ROWS)
    return trainer.compute_loss(model, trainer.data_collator(rows)).item()


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {"kd_divergence": "reverse_kl"},
        {"kd_divergence": "jensen_shannon"},
        {"kd_top_k": 3},
        {"hidden_loss_weight": 1.0},
    ],
)
def test_every_setting_of_the_teacher_changes_the_loss(model, arguments, settings):
    assert loss_of(model, arguments(**settings)) != pytest.approx(loss_of(model, arguments()), rel=1e-4)


def test_the_hidden_loss_is_between_the_states_of_teacher_and_student(model, arguments):
    args = arguments(nll_loss_weight=0.0, kd_loss_weight=0.0, hidden_loss_weight=2.0, hidden_loss_layers=[1, -1])
    [row] = rows = ROWS[:1]
    query = model.prompt.encode_query(row["query"][0]) + model.prompt.encode_answer(row["target"][0])
    query += model.prompt.separator_ids
    shots = model.read(row["demonstrations"])
    ids = torch.tensor([query])
    teacher = model(ids, demonstrations=shots, output_hidden_states=True).hidden_states
    student = model(ids, demonstrations=row["demonstrations"], output_hidden_states=True).hidden_states
    distances = [
        ((student[layer] - teacher[layer])[0, :-1].square().sum(-1) / teacher[layer][0, :-1].square().sum(-1)).mean()
        for layer in (1, -1)
    ]
    assert loss_of(model, args, rows) == pytest.approx(2 * sum(distances).item() / 2, rel=1e-4)


def test_hidden_layers_that_are_not_there_are_refused(model, arguments):
    with pytest.raises(ConfigError, match="from 1 to 3"):
        loss_of(model, arguments(hidden_loss_weight=1.0, hidden_loss_layers=[4]))


def test_training_from_kept_answers_equals_training_from_the_teacher_itself(
    tiny_model, tokenizer, arguments, tmp_path
):
    histories = []
    for folder in (None, "kept", "kept"):
        torch.manual_seed(0)
        model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
        cache = {} if folder is None else {"teacher_cache_dir": str(tmp_path / folder)}
        trainer = MendTrainer(model=model, args=arguments(kd_top_k=4, **cache), train_dataset=ROWS)
        if len(histories) == 2:
            trainer._objective.teacher.cache.put = None  # nothing is worked out anew
        trainer.train()
        histories.append(losses_of(trainer))
    assert histories[1] == pytest.approx(histories[0], rel=1e-6)
    assert histories[2] == pytest.approx(histories[1], rel=1e-6)


def test_kept_answers_of_an_encoder_decoder_are_of_its_targets(tiny_encoder_decoder, tokenizer, arguments, tmp_path):
    model = get_mend_model(tiny_encoder_decoder("t5"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
    args = arguments(kd_top_k=4, teacher_cache_dir=str(tmp_path / "kept"))
    first = loss_of(model, args)
    assert loss_of(model, args) == pytest.approx(first, rel=1e-6)
    assert loss_of(model, arguments(kd_top_k=4)) == pytest.approx(first, rel=1e-6)
    changed = [{**row, "target": ["negative", "positive"][: len(row["target"])]} for row in ROWS[:3]]
    assert loss_of(model, args, changed) == pytest.approx(loss_of(model, arguments(kd_top_k=4), changed), rel=1e-6)


def test_padding_does_not_change_a_kept_answers_key_and_the_teacher_does(model, tokenizer, tmp_path):
    collator = MendCollator(tokenizer, model.mend_config)
    cache = TeacherCache(tmp_path, "a teacher")
    together = cache.keys_of(collator(ROWS[:3]))
    assert together == [key for row in ROWS[:3] for key in cache.keys_of(collator([row]))]
    assert len({*together}) == len(together)
    assert not {*together} & {*TeacherCache(tmp_path, "another").keys_of(collator(ROWS[:3]))}


def test_a_damaged_file_of_kept_answers_is_refused(tmp_path, model, arguments):
    (tmp_path / "teacher.sqlite").write_text("nothing of the kind " * 100)
    with pytest.raises(CheckpointError, match="or remove teacher"):
        loss_of(model, arguments(kd_top_k=4, teacher_cache_dir=str(tmp_path)))


def test_a_full_disk_is_reported_while_answers_are_kept(model, arguments, tmp_path, monkeypatch):
    trainer = MendTrainer(
        model=model, args=arguments(kd_top_k=300, teacher_cache_dir=str(tmp_path)), train_dataset=ROWS
    )
    connect = trainer._objective.teacher.cache._connect

    def connect_to_little_room():
        connection = connect()
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(trainer._objective.teacher.cache, "_connect", connect_to_little_room)
    with pytest.raises(CheckpointError, match="without teacher_cache_dir") as caught:
        trainer.compute_loss(model, trainer.data_collator(ROWS))
    assert isinstance(caught.value.__cause__, sqlite3.Error)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"kd_divergence": "euclidean"}, "expected forward_kl or reverse_kl"),
        ({"kd_top_k": -1}, "kd_top_k: expected 0 or more"),
        ({"hidden_loss_weight": -1.0}, "hidden_loss_weight: expected 0 or more"),
        ({"hidden_loss_layers": []}, "or None for all"),
        ({"teacher_cache_dir": "kept"}, "kd_top_k above 0"),
        ({"recipe": "mend"}, "a recipe among pretrain, finetune"),
    ],
)
def test_impossible_settings_are_refused(arguments, settings, remedy):
    with pytest.raises(ConfigError, match=remedy):
        arguments(**settings)


def test_more_top_tokens_than_the_vocabulary_are_refused(model, arguments):
    with pytest.raises(ConfigError, match="leave it at 0"):
        loss_of(model, arguments(kd_top_k=10**6))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "metaicl"])
def test_every_recipe_trains_a_distiller(model, arguments, name):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    args = arguments(name, max_steps=2)
    trainer = MendTrainer(model=model, args=args, train_dataset=ROWS)
    trainer.train()
    assert any(not before[key].equal(tensor) for key, tensor in model.state_dict().items())
    logged = {key for entry in trainer.state.log_history for key in entry if key.endswith("_loss")}
    expected = {key for key in ("nll_loss", "kd_loss") if RECIPES[name][f"{key}_weight"]}
    assert logged - {"train_loss"} == expected | {"nll_loss"}


class TestMetaICL:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mamba"])
    def test_the_loss_is_that_of_the_text_written_out(self, name, tiny_model, tokenizer, arguments):
        base = tiny_model(name)
        trainer = MendTrainer(model=base, args=arguments("metaicl"), train_dataset=ROWS, processing_class=tokenizer)
        rows = ROWS[:1] if name == "mamba" else ROWS[:3]
        prompt = get_mend_model(tiny_model(name), MendConfig(num_virtual_tokens=1), tokenizer).prompt
        total, count = 0.0, 0
        for row in rows:
            text = prompt.encode_demonstrations(_pairs(row)).chunks[0].input_ids
            for query, target in zip(row["query"], row["target"], strict=True):
                head, answer = prompt.encode_query(query), prompt.encode_answer(target)
                ids = torch.tensor([[*text, *head, *answer]])
                log_probs = base(ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
                total -= log_probs.gather(1, torch.tensor(answer)[:, None]).sum().item()
                count += len(answer)
        got = trainer.compute_loss(base, trainer.data_collator(rows)).item()
        assert got == pytest.approx(total / count, rel=1e-4)

    def test_the_base_model_itself_learns_and_is_saved_whole(self, tiny_model, tokenizer, arguments, tmp_path):
        base = tiny_model("llama")
        args = arguments("metaicl", max_steps=8, learning_rate=1e-2, save_strategy="steps", save_steps=4)
        trainer = MendTrainer(model=base, args=args, train_dataset=ROWS, processing_class=tokenizer)
        trainer.train()
        assert losses_of(trainer)[-1] < 0.5 * losses_of(trainer)[0]
        trainer.save_model(str(tmp_path / "tuned"))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
        assert all(again.state_dict()[name].equal(tensor) for name, tensor in base.state_dict().items())
        resumed = MendTrainer(model=tiny_model("llama"), args=args, train_dataset=ROWS, processing_class=tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
        assert losses_of(resumed)[-1] == pytest.approx(losses_of(trainer)[-1], abs=1e-6)

    def test_an_encoder_decoder_reads_the_text_in_its_encoder(
        self, tiny_encoder_decoder, tokenizer, arguments, tmp_path
    ):
        base = tiny_encoder_decoder("bart")
        args = arguments("metaicl", max_steps=8)
        trainer = MendTrainer(model=base, args=args, train_dataset=ROWS, processing_class=tokenizer)
        alone = [trainer.compute_loss(base.eval(), trainer.data_collator([row])).item() for row in ROWS[:2]]
        together = trainer.compute_loss(base, trainer.data_collator(ROWS[:2])).item()
        batches = [trainer.data_collator([row])["labels"] for row in ROWS[:2]]
        sizes = [(labels != -100).sum().item() for labels in batches]
        expected = sum(a * b for a, b in zip(alone, sizes, strict=True)) / sum(sizes)
        assert together == pytest.approx(expected, rel=1e-4)
        trainer.train()
        assert losses_of(trainer)[-1] < losses_of(trainer)[0]
        trainer.save_model(str(tmp_path / "tuned"))
        assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "tuned").config.model_type == "bart"

    def test_a_teacher_and_a_missing_tokenizer_are_refused(self, tiny_model, arguments):
        with pytest.raises(ConfigError, match='from_recipe\\("metaicl"'):
            MendTrainer(model=tiny_model("llama"), args=arguments(), train_dataset=ROWS)
        with pytest.raises(ConfigError, match="processing_class"):
            MendTrainer(model=tiny_model("llama"), args=arguments("metaicl"), train_dataset=ROWS)


def _pairs(row):
    return [Demonstration(shot["input"], shot["output"]) for shot in row["demonstrations"]]
