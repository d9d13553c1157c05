from __future__ import annotations

import copy
import json

import pytest
import torch
from command_line import run_mend
from tiny_encoder_decoders import MAX_POSITIONS, TINY_ENCODER_DECODERS
from tiny_models import wrap_tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, WhisperConfig, WhisperForConditionalGeneration

from mend_hf import (
    AutoMendModel,
    Demonstration,
    DistilledDemonstrations,
    MendCollator,
    MendConfig,
    MendModel,
    MendTrainer,
    MendTrainingArguments,
    get_mend_model,
)
from mend_hf.cli.options import load_base_model
from mend_hf.errors import ConfigError, DataError, ShapeError, UnsupportedModelError
from mend_hf.evaluation.methods import METHODS, TRAINED_METHODS
from mend_hf.losses import IGNORE_INDEX
from mend_hf.prefix import EmbeddingPrefix, KeyValuePrefix
from mend_hf.scoring import score_options

SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
TASKS = [SHOTS, SHOTS[:1], SHOTS[1:]]
QUERIES = ["moving and funny", "bad", "the film was good and the food was bad"]
OPTIONS = [["positive", "negative"], ["very good", "bad", "a bore and a bore"], ["positive", "negative"]]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
ROWS = [
    {"demonstrations": [{"input": a, "output": b} for a, b in SHOTS[: 1 + i % 3]], "query": q, "target": t}
    for i, (q, t) in enumerate([("bad food", "negative"), ("very funny", "positive"), ("the film was bad", "a bore")])
] * 2


@pytest.fixture(params=TINY_ENCODER_DECODERS)
def base(request, tiny_encoder_decoder):
    return tiny_encoder_decoder(request.param)


@pytest.fixture(scope="module")
def ending_tokenizer(tokenizer):
    """Puts an end behind every text, as T5's does."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def wrap(base, tokenizer, **settings):
    return wrap_tiny_model(base, tokenizer, num_virtual_tokens=4, lora_r=4, **settings)


def short(model, **settings):
    return {"max_new_tokens": 6, "do_sample": False, "pad_token_id": model.prompt.pad_token_id, **settings}


def embed(model, vectors, ids):
    """What the encoder reads; Pegasus scales tokens behind its embedding layer, and so `inputs_embeds` never."""
    scale = 32**0.5 if model.base_model.config.model_type == "pegasus" else 1.0
    embeddings = torch.cat([vectors, scale * model.base_model.get_input_embeddings()(ids)], dim=1)
    return {"inputs_embeds": embeddings, "attention_mask": torch.ones(embeddings.shape[:2], dtype=torch.long)}


class TestThePrefixStandsInFrontOfTheEncodersEmbeddings:
    def test_logits_and_loss(self, base, tokenizer):
        model = wrap(base, tokenizer)
        distilled, query = model.distill(SHOTS), model.tokenize(QUERIES[0])
        inputs = embed(model, distilled.vectors, query["input_ids"])
        for targets in ({"labels": torch.tensor([[9, 8, 7]])}, {"decoder_input_ids": torch.tensor([[2, 9, 8]])}):
            answer, expected = model(**query, demonstrations=distilled, **targets), base(**inputs, **targets)
            torch.testing.assert_close(answer.logits, expected.logits, **CLOSE)
            assert ("loss" in answer) == ("labels" in targets)
        bare = base(**query, labels=torch.tensor([[9, 8, 7]])).logits
        assert not torch.allclose(
            bare, model(**query, demonstrations=distilled, labels=targets and bare.argmax(-1)).logits
        )

    @pytest.mark.parametrize(
        "settings", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}]
    )
    def test_generated_tokens(self, base, tokenizer, settings):
        model = wrap(base, tokenizer)
        distilled, query = model.distill(SHOTS), model.tokenize(QUERIES[0])
        torch.manual_seed(3)
        answer = model.generate(**query, demonstrations=distilled, **short(model, **settings))
        torch.manual_seed(3)
        expected = base.generate(**embed(model, distilled.vectors, query["input_ids"]), **short(model, **settings))
        assert answer.equal(expected)

    def test_the_encoder_runs_once_for_all_beams(self, base, tokenizer):
        model, rows = wrap(base, tokenizer), []
        distilled = model.distill(SHOTS)
        base.get_encoder().register_forward_hook(lambda *arguments: rows.append(arguments[2][0].shape[0]))
        model.generate(**model.tokenize(QUERIES[0]), demonstrations=distilled, **short(model, num_beams=3))
        assert rows == [1]

    def test_the_query_may_come_as_embeddings(self, base, tokenizer):
        model, labels = wrap(base, tokenizer), torch.tensor([[9, 8]])
        distilled, query = model.distill(SHOTS), model.tokenize(QUERIES[0])
        embeddings = embed(model, distilled.vectors[:, :0], query["input_ids"])["inputs_embeds"]
        given = model(inputs_embeds=embeddings, demonstrations=distilled, labels=labels).logits
        assert given.equal(model(**query, demonstrations=distilled, labels=labels).logits)


class TestABatchEqualsEachRowAlone:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_with_other_tasks_lengths_and_paddings(self, base, tokenizer, side):
        model, labels = wrap(base, tokenizer), torch.tensor([[9, 8, 7], [6, 5, 4], [9, 9, 5]])
        distilled, batch = model.distill(TASKS), model.tokenize(QUERIES)
        prefix = EmbeddingPrefix(distilled.vectors, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]).bool())
        if side == "left":
            num_pads = (batch["attention_mask"] == 0).sum(1).tolist()
            for name in batch:
                rows = zip(batch[name], num_pads, strict=True)
                batch[name] = torch.stack([row.roll(num) for row, num in rows])
        logits = model(**batch, demonstrations=prefix, labels=labels).logits
        tokens = model.generate(**batch, demonstrations=prefix, **short(model))
        for row, query in enumerate(QUERIES):
            own, alone = model.tokenize(query), prefix.select([row])
            expected = model(**own, demonstrations=alone, labels=labels[row : row + 1]).logits[0]
            torch.testing.assert_close(logits[row], expected, **CLOSE)
            generated = model.generate(**own, demonstrations=alone, **short(model))[0]
            assert tokens[row, : len(generated)].equal(generated)

    @pytest.mark.parametrize("overflow", ["truncate", "concat", "recurrent"])
    def test_in_distilling(self, base, tokenizer, overflow):
        model = wrap(base, tokenizer, overflow=overflow, max_distiller_tokens=18)
        together = model.distill(TASKS)
        slots = [model.distill(task).num_slots for task in TASKS]
        assert together.num_slots == max(slots)
        assert slots == ([4, 4, 4] if overflow == "truncate" else [8, 4, 4])
        for row, task in enumerate(TASKS):
            torch.testing.assert_close(together[row].vectors, model.distill(task).vectors, **CLOSE)


class TestWithoutDemonstrationsItIsTheBaseModel:
    def test_bit_for_bit(self, base, tokenizer):
        # torch multiplies in another order where weights want gradients, and so rounds otherwise
        bare, labels = copy.deepcopy(base).requires_grad_(False), torch.tensor([[9, 8, 7]])
        model = wrap(base, tokenizer)
        query = model.tokenize(QUERIES[0])
        expected = bare(**query, labels=labels).logits
        assert model(**query, labels=labels).logits.equal(expected)
        with model.use_demonstrations(SHOTS), model.disable_adapter():
            assert model(**query, labels=labels).logits.equal(expected)
            assert model.generate(**query, **short(model)).equal(bare.generate(**query, **short(model)))
        unloaded = model.unload()
        assert [type(m) for m in unloaded.modules()] == [type(m) for m in bare.modules()]
        assert all(tensor.equal(bare.state_dict()[name]) for name, tensor in unloaded.state_dict().items())
        assert not hasattr(unloaded.get_encoder(), "peft_config")

    def test_in_batches_too(self, base, tokenizer):
        model, labels = wrap(base, tokenizer), torch.tensor([[9, 8]] * 3)
        together = model(**model.tokenize(QUERIES), labels=labels).logits
        for row, query in enumerate(QUERIES):
            torch.testing.assert_close(
                together[row], base(**model.tokenize(query), labels=labels[:1]).logits[0], **CLOSE
            )


def test_saving_and_loading_changes_no_bit(base, tokenizer, tmp_path):
    bare, labels = copy.deepcopy(base), torch.tensor([[9, 8, 7]])
    model = wrap(base, tokenizer)
    query, distilled = model.tokenize(QUERIES[0]), model.distill(SHOTS)
    model.save_pretrained(tmp_path / "distiller")
    distilled.save_pretrained(tmp_path / "task")
    loaded = MendModel.from_pretrained(bare, tmp_path / "distiller", tokenizer)
    assert (loaded.mend_config.task_type, loaded.mend_config.prefix_form) == ("SEQ_2_SEQ_LM", "embeds")
    expected = model(**query, demonstrations=distilled, labels=labels).logits
    assert loaded(**query, demonstrations=SHOTS, labels=labels).logits.equal(expected)
    kept = DistilledDemonstrations.from_pretrained(tmp_path / "task")
    assert loaded(**query, demonstrations=kept, labels=labels).logits.equal(expected)


def test_gradients_reach_everything_that_is_trained_and_nothing_else(base, tokenizer):
    model = wrap(base, tokenizer).train()
    model(**model.tokenize(QUERIES[0]), labels=torch.tensor([[9, 8, 7]]), demonstrations=SHOTS).loss.backward()
    trained = dict(model.distiller.trained_tensors())
    assert not {name for name, tensor in trained.items() if tensor.grad is None or not tensor.grad.any()}
    assert not any("decoder" in name for name in trained)
    ids = {id(tensor) for tensor in trained.values()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in ids)


@pytest.mark.parametrize("reader", ["gpt2", "t5", "bart", "pegasus"])
def test_a_reader_of_its_own_distils_for_t5(tiny_model, tiny_encoder_decoder, tokenizer, tmp_path, reader):
    (tiny_model if reader == "gpt2" else tiny_encoder_decoder)(reader).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = MendConfig(num_virtual_tokens=4, lora_r=0, distiller_name_or_path=str(tmp_path))
    model = get_mend_model(tiny_encoder_decoder("t5"), settings, tokenizer)
    with torch.no_grad():
        model.distiller.projection.weight.normal_(std=0.2)
    together = model.distill(TASKS)
    assert not torch.allclose(together.vectors[0], together.vectors[1], atol=1e-3)
    for row, task in enumerate(TASKS):
        torch.testing.assert_close(together[row].vectors, model.distill(task).vectors, **CLOSE)
    model(**model.tokenize("bad"), labels=torch.tensor([[9]]), demonstrations=SHOTS).loss.backward()
    assert all(tensor.grad.any() for name, tensor in model.distiller.trained_tensors() if "fc" in name or "wo" in name)


class TestText:
    def test_a_query_ends_as_the_tokenizer_ends_a_text(self, tiny_encoder_decoder, tokenizer, ending_tokenizer):
        plain = wrap(tiny_encoder_decoder("t5"), tokenizer).prompt
        ending = wrap(tiny_encoder_decoder("t5"), ending_tokenizer).prompt
        assert ending.encode_query("bad") == [*plain.encode_query("bad"), tokenizer.eos_token_id]
        assert ending.target_frame == plain.target_frame == ([], [tokenizer.eos_token_id])
        shots = [Demonstration(*shot) for shot in SHOTS]
        assert ending.encode_demonstrations(shots).chunks == plain.encode_demonstrations(shots).chunks

    def test_queries_are_padded_on_the_right(self, tiny_encoder_decoder, ending_tokenizer):
        mask = wrap(tiny_encoder_decoder("bart"), ending_tokenizer).tokenize(QUERIES)["attention_mask"]
        assert mask[:, 0].all()
        assert not mask[1, -1]

    def test_reading_equals_feeding_the_text(self, base, ending_tokenizer):
        model, labels = wrap(base, ending_tokenizer), torch.tensor([[9, 8, 7]])
        query = model.tokenize(QUERIES[0])
        [chunk] = model.prompt.encode_demonstrations([Demonstration(*shot) for shot in SHOTS]).chunks
        whole = torch.cat([torch.tensor([chunk.input_ids]), query["input_ids"]], dim=1)
        read = model.read(SHOTS)
        assert read.prefix_form == "embeds"
        logits = model(**query, demonstrations=read, labels=labels).logits
        torch.testing.assert_close(logits, base(whole, labels=labels).logits, **CLOSE)
        generated = model.generate(**query, demonstrations=read, **short(model))
        assert generated.equal(base.generate(whole, **short(model)))

    def test_answers_are_what_the_decoder_writes(self, base, ending_tokenizer):
        model = wrap(base, ending_tokenizer)
        answers = model.answer(QUERIES, SHOTS, max_new_tokens=5)
        for query, answer in zip(QUERIES, answers, strict=True):
            ids = model.generate(**model.tokenize(query), demonstrations=SHOTS, **short(model, max_new_tokens=5))
            assert answer == ending_tokenizer.decode(ids[0], skip_special_tokens=True).split("\n\n")[0].strip()


class TestCollator:
    def test_the_decoder_gets_the_target_and_its_end(self, tiny_encoder_decoder, ending_tokenizer):
        model = wrap(tiny_encoder_decoder("t5"), ending_tokenizer)
        batch = MendCollator(ending_tokenizer, model.mend_config)(ROWS[:3])
        prompt, end = model.prompt, ending_tokenizer.eos_token_id
        for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            query, target = prompt.encode_query(ROWS[row]["query"]), prompt.encode_answer(ROWS[row]["target"])
            assert ids.tolist() == query + [0] * (len(ids) - len(query))
            assert labels.tolist() == [*target, end] + [IGNORE_INDEX] * (len(labels) - len(target) - 1)

    def test_plain_text_leaves_the_encoder_the_end_of_an_empty_query(self, tiny_encoder_decoder, ending_tokenizer):
        model = wrap(tiny_encoder_decoder("t5"), ending_tokenizer)
        row = {"demonstrations": ["great film"], "query": "", "target": " was good"}
        batch = MendCollator(ending_tokenizer, model.mend_config)([row])
        assert batch["input_ids"].tolist() == [[ending_tokenizer.eos_token_id]]
        assert batch["labels"].tolist() == [[*model.prompt.encode_text(" was good"), ending_tokenizer.eos_token_id]]


class TestTraining:
    def arguments(self, folder, **settings):
        defaults = {
            "output_dir": str(folder), "per_device_train_batch_size": 3, "max_steps": 16, "learning_rate": 1e-2,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
            "seed": 3,
        }  # fmt: skip
        return MendTrainingArguments(**{**defaults, **settings})

    @pytest.mark.parametrize("stage", ["pretrain", "finetune"])
    def test_lowers_the_loss_and_moves_the_distiller_alone(self, base, tokenizer, tmp_path, stage):
        bare = copy.deepcopy(base).state_dict()
        model = wrap(base, tokenizer)
        before = {name: tensor.detach().clone() for name, tensor in model.distiller.trained_tensors()}
        texts = [{"demonstrations": ["the film was"], "query": "", "target": " good and funny"}] * 3
        rows = ROWS if stage == "finetune" else texts
        trainer = MendTrainer(model=model, args=self.arguments(tmp_path), train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
        assert not [name for name, tensor in model.distiller.trained_tensors() if tensor.equal(before[name])]
        assert all(tensor.equal(bare[name]) for name, tensor in model.unload().state_dict().items())

    def test_losses_are_those_of_plain_forwards(self, base, tokenizer, tmp_path):
        model = wrap(base, tokenizer)
        batch = MendCollator(tokenizer, model.mend_config)(ROWS[:3])
        values, kd, num_tokens = [], 0.0, 0
        for weights in ((1.0, 0.0), (0.0, 1.0)):
            arguments = self.arguments(tmp_path, nll_loss_weight=weights[0], kd_loss_weight=weights[1])
            with torch.no_grad():
                values.append(MendTrainer(model=model, args=arguments).compute_loss(model, dict(batch)).item())
        nll = 0.0
        for row in ROWS[:3]:
            shots, query = [tuple(shot.values()) for shot in row["demonstrations"]], model.tokenize(row["query"])
            labels = torch.tensor([[*model.prompt.encode_answer(row["target"]), tokenizer.eos_token_id]])
            with torch.no_grad():
                student = model(**query, demonstrations=shots, labels=labels)
                teacher = model(**query, demonstrations=model.read(shots), labels=labels).logits.log_softmax(-1)
            nll += student.loss.item() * labels.numel()
            kd += (teacher.exp() * (teacher - student.logits.log_softmax(-1))).sum().item()
            num_tokens += labels.numel()
        assert values == pytest.approx([nll / num_tokens, kd / num_tokens], rel=1e-4)

    def test_accumulating_batches_equals_one_large_batch(self, tiny_encoder_decoder, tokenizer, tmp_path):
        results = []
        for size, accumulation in ((6, 1), (2, 3)):
            model = wrap(tiny_encoder_decoder("bart"), tokenizer)
            arguments = self.arguments(
                tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=2,
                optim="sgd", max_grad_norm=0.0,
            )  # fmt: skip
            trainer = MendTrainer(model=model, args=arguments, train_dataset=ROWS)
            trainer.train()
            results.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert results[0] == pytest.approx(results[1], rel=1e-4)


class TestEvaluation:
    @pytest.mark.parametrize(
        "method", ["zero-shot", "in-context", "in-context, cut", "random prefix", "MEND", "MEND + 2 raw"]
    )
    def test_scores_are_those_of_plain_forwards(self, base, ending_tokenizer, method):
        model = wrap(base, ending_tokenizer)
        prefix = METHODS[method](model, [Demonstration(*shot) for shot in SHOTS]).prefix
        scores = score_options(model, QUERIES, OPTIONS, prefix, batch_size=2)
        vectors = torch.zeros(1, 0, 32) if prefix is None else prefix.vectors
        for query, options, row in zip(QUERIES, OPTIONS, scores, strict=True):
            for option, score in zip(options, row, strict=True):
                answer = model.prompt.encode_answer(option)
                inputs = embed(model, vectors, torch.tensor([model.prompt.encode_query(query)]))
                labels = torch.tensor([[*answer, ending_tokenizer.eos_token_id]])
                with torch.no_grad():
                    logits = base(**inputs, labels=labels).logits[0].log_softmax(-1)
                expected = sum(logits[i, token].item() for i, token in enumerate(answer)) / len(answer)
                assert score == pytest.approx(expected, abs=2e-5)

    def test_the_encoder_reads_a_query_once_for_all_its_options(self, base, tokenizer):
        model, calls = wrap(base, tokenizer), []
        base.get_encoder().register_forward_hook(lambda *arguments: calls.append(1))
        score_options(model, QUERIES, [[*OPTIONS[1], "good", "food", "funny"]] * 3, None)
        assert len(calls) == 1

    def test_anchors_without_training_are_refused(self, base, tokenizer):
        with pytest.raises(ConfigError, match="leave the method"):
            METHODS["training-free anchors"](wrap(base, tokenizer), [Demonstration(*shot) for shot in SHOTS])


def test_loading_by_name_finds_the_class_of_the_base_model(base, tokenizer, tmp_path):
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded, loaded_tokenizer = load_base_model(str(tmp_path / "base"), "cpu")
    assert type(loaded) is type(base)
    model = wrap(loaded, loaded_tokenizer)
    model.save_pretrained(tmp_path / "distiller")
    again = AutoMendModel.from_pretrained(tmp_path / "distiller")
    assert again.answer(QUERIES, SHOTS) == model.answer(QUERIES, SHOTS)


def test_the_command_line_trains_answers_and_evaluates(tiny_encoder_decoder, tokenizer, tmp_path, capsys):
    for part in (tiny_encoder_decoder("t5"), tokenizer):
        part.save_pretrained(tmp_path / "base")
    adjectives, nouns = ("good", "bad", "great"), ("film", "food", "day", "town")
    examples = [
        {"task": "films", "input": f"{a} {n}", "output": OPTIONS[0][a == "bad"], "options": OPTIONS[0]}
        for a in adjectives
        for n in nouns
    ]
    (tmp_path / "tasks").mkdir()
    for split, rows in (("train", examples), ("test", examples[::2])):
        text = "\n".join(json.dumps(row | {"input": f"{split} {row['input']}"}) for row in rows)
        (tmp_path / "tasks" / f"films_16_13_{split}.jsonl").write_text(text)
    tasks, made = ["--tasks", tmp_path / "tasks"], ["--distiller", tmp_path / "made"]
    few, short = ["--num-virtual-tokens", "3", "--num-rows", "2", "--batch-size", "2"], ["--num-demonstrations", "2"]
    base = ["--base-model", tmp_path / "base"]
    assert run_mend(["finetune", *base, *tasks, *few, *short, "--output-dir", tmp_path / "made"]) == 0
    capsys.readouterr()
    asked = ["--demonstrations", tmp_path / "tasks" / "films_16_13_train.jsonl", "--max-new-tokens", "3"]
    assert run_mend(["generate", "bad town", *made, *asked]) == 0
    assert run_mend(["evaluate", *made, *tasks, *short, "--seeds", "13", "--output-dir", tmp_path / "scores"]) == 0
    results = (tmp_path / "scores" / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["method"] for line in results} == {*METHODS} - TRAINED_METHODS - {"training-free anchors"}


class TestRefusals:
    def test_keys_and_values(self, base, tokenizer):
        with pytest.raises(ConfigError, match="leave prefix_form out"):
            get_mend_model(base, MendConfig(num_virtual_tokens=2, prefix_form="kv"), tokenizer)
        model = wrap(base, tokenizer)
        nothing = torch.zeros(1, 1, dtype=torch.bool)
        with pytest.raises(ShapeError, match="distil again with this model"):
            model.generate("bad", demonstrations=KeyValuePrefix((), (), nothing, torch.zeros(1)))

    def test_vectors_of_another_width(self, base, tokenizer):
        prefix = EmbeddingPrefix(torch.zeros(1, 2, 7), torch.ones(1, 2, dtype=torch.bool))
        with pytest.raises(ShapeError, match="distil again with this one"):
            wrap(base, tokenizer).generate("bad", demonstrations=prefix)

    @pytest.mark.parametrize("name", ["bart", "mbart", "pegasus"])
    def test_more_than_the_position_table_holds(self, tiny_encoder_decoder, tokenizer, name):
        model = wrap(tiny_encoder_decoder(name), tokenizer)
        distilled, labels = model.distill(SHOTS), torch.tensor([[9]])
        ids = torch.full((1, MAX_POSITIONS - 4), 9)
        assert model(ids, demonstrations=distilled, labels=labels).logits.isfinite().all()
        with pytest.raises(ShapeError, match="shorter query"):
            model(torch.full((1, MAX_POSITIONS - 3), 9), demonstrations=distilled, labels=labels)
        with pytest.raises(ShapeError, match="fewer demonstrations"):
            model.distill(torch.full((1, MAX_POSITIONS), 9))

    def test_a_decoder_without_input(self, base, tokenizer):
        model = wrap(base, tokenizer)
        with pytest.raises(DataError, match="or call generate"):
            model(**model.tokenize("bad"), demonstrations=SHOTS)

    def test_a_base_model_without_a_language_model_head(self, tiny_encoder_decoder, tokenizer):
        with pytest.raises(UnsupportedModelError, match="AutoModelForSeq2SeqLM"):
            get_mend_model(AutoModel.from_config(tiny_encoder_decoder("t5").config), MendConfig(), tokenizer)

    def test_an_encoder_of_sound(self, tokenizer):
        config = WhisperConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=50,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        with pytest.raises(UnsupportedModelError, match="reads text"):
            get_mend_model(WhisperForConditionalGeneration(config), MendConfig(), tokenizer)

    def test_a_tokenizer_without_an_end(self, tiny_encoder_decoder, tokenizer):
        endless = copy.deepcopy(tokenizer)
        endless.eos_token = None
        model = wrap(tiny_encoder_decoder("t5"), endless)
        with pytest.raises(ConfigError, match=r"set tokenizer\.eos_token"):
            MendCollator(endless, model.mend_config)(ROWS[:1])
