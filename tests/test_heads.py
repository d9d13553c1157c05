"""Backbones and classification heads read a prefix as language models do; the head takes the right token."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    T5ForSequenceClassification,
)

from mend_hf import AutoMendModel, Demonstration, MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.architectures import check_base_model
from mend_hf.errors import ConfigError, ShapeError, UnsupportedModelError

SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
QUERIES = ["moving and funny", "bad", "the film was good and the food was bad"]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
FAMILIES = ["gpt2", "llama", "qwen3", "opt", "gpt_neox", "mistral", "gemma3_text"]
WITHOUT_WINDOW = FAMILIES[:5]
HEADS = {
    "FEATURE_EXTRACTION": AutoModel,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}


def wrap(tiny_model, tokenizer, name, task_type="SEQ_CLS", form="kv"):
    """A tiny model of a family with another head, and an untrained distiller that is not harmless."""
    config = tiny_model(name).config
    config.num_labels = 3
    torch.manual_seed(1)
    base = HEADS[task_type].from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.dim() > 1 else 0.05)
    model = get_mend_model(base, MendConfig(num_virtual_tokens=4, prefix_form=form), tokenizer)
    with torch.no_grad():
        for _, parameter in model.distiller.trained_tensors():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def output_of(model, **inputs):
    """Logits, hidden states, or the logits of start and end."""
    output = model(**inputs)
    return output.start_logits if "start_logits" in output else output[0]


def pad(model, side):
    """The queries as one batch, padded on a side."""
    rows = [model.prompt.encode_query(query) for query in QUERIES]
    length = max(map(len, rows))
    fill = model.config.pad_token_id
    ids, mask = [], []
    for row in rows:
        padding = [fill] * (length - len(row))
        ids.append(padding + row if side == "left" else row + padding)
        mask.append([0] * len(padding) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(padding))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_equal_embeddings_in_front_and_text_equals_the_text(tiny_model, tokenizer, name, task_type):
    model = wrap(tiny_model, tokenizer, name, task_type, "embeds")
    ids = model.tokenize(QUERIES[0])["input_ids"]
    distilled, base = model.distill(SHOTS), model.base_model
    assert model.mend_config.task_type == task_type
    [chunk] = model.prompt.encode_demonstrations([Demonstration(*shot) for shot in SHOTS]).chunks
    with torch.no_grad():
        embeddings = torch.cat([distilled.vectors, base.get_input_embeddings()(ids)], dim=1)
        expected = base(inputs_embeds=embeddings)[0]
        text = base(torch.cat([torch.tensor([chunk.input_ids]), ids], dim=1))[0]
    if task_type == "FEATURE_EXTRACTION":
        expected, text = expected[:, -ids.shape[1] :], text[:, -ids.shape[1] :]
    torch.testing.assert_close(output_of(model, input_ids=ids, demonstrations=distilled), expected, **CLOSE)
    torch.testing.assert_close(output_of(model, input_ids=ids, demonstrations=model.read(SHOTS)), text, **CLOSE)


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
def test_heads_for_every_token_equal_the_text(tiny_model, tokenizer, task_type):
    model = wrap(tiny_model, tokenizer, "llama", task_type)
    ids = model.tokenize(QUERIES[0])["input_ids"]
    [chunk] = model.prompt.encode_demonstrations([Demonstration(*shot) for shot in SHOTS]).chunks
    text = output_of(model.base_model, input_ids=torch.cat([torch.tensor([chunk.input_ids]), ids], dim=1))
    got = output_of(model, input_ids=ids, demonstrations=model.read(SHOTS))
    assert model.mend_config.task_type == task_type
    torch.testing.assert_close(got, text[:, -ids.shape[1] :], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["kv", "embeds"])
@pytest.mark.parametrize("name", WITHOUT_WINDOW)
def test_a_batch_is_classified_as_each_row_alone(tiny_model, tokenizer, name, form, side):
    model = wrap(tiny_model, tokenizer, name, form=form)
    tasks = model.distill([SHOTS, SHOTS[:1], SHOTS[1:]])
    together = model(**pad(model, side), demonstrations=tasks).logits
    assert together.shape == (3, 3)
    for row, query in enumerate(QUERIES):
        alone = model(**model.tokenize(query), demonstrations=tasks[row]).logits[0]
        torch.testing.assert_close(together[row], alone, **CLOSE)


@pytest.mark.filterwarnings("ignore:A query of")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "task_type"),
    [
        *((name, "FEATURE_EXTRACTION") for name in ("mistral", "gemma3_text", "gpt_neo", "jamba", "qwen3_next")),
        *((name, "SEQ_CLS") for name in ("mistral", "gemma3_text", "gpt_neo", "jamba", "qwen3_next")),
        *((name, "TOKEN_CLS") for name in ("mistral", "gpt_neo", "qwen3_next")),
        *((name, "QUESTION_ANS") for name in ("mistral", "qwen3_next")),
    ],
)
def test_padded_rows_equal_each_alone_under_windows_and_without_slots(tiny_model, tokenizer, name, task_type, side):
    model = wrap(tiny_model, tokenizer, name, task_type, form="embeds")
    distilled, batch = model.distill(SHOTS), pad(model, side)
    together = output_of(model, **batch, demonstrations=distilled)
    for row, query in enumerate(QUERIES):
        alone = output_of(model, **model.tokenize(query), demonstrations=distilled)[0]
        own = together[row] if task_type == "SEQ_CLS" else together[row, batch["attention_mask"][row].bool()]
        torch.testing.assert_close(own, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "jamba"])
def test_the_heads_own_loss_is_that_of_the_rows_alone(tiny_model, tokenizer, name):
    model = wrap(tiny_model, tokenizer, name, form="embeds")
    distilled, labels = model.distill(SHOTS), torch.tensor([2, 0, 1])
    loss = model(**pad(model, "left"), labels=labels, demonstrations=distilled).loss
    alone = [
        model(**model.tokenize(query), labels=labels[row : row + 1], demonstrations=distilled).loss
        for row, query in enumerate(QUERIES)
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean(), atol=1e-4, rtol=1e-4)


def test_places_and_embeddings_that_a_head_would_take_wrongly_are_refused(tiny_model, tokenizer):
    model = wrap(tiny_model, tokenizer, "mistral", "QUESTION_ANS", form="embeds")
    batch, places = pad(model, "left"), torch.tensor([0, 1, 2])
    with pytest.raises(ConfigError, match="compute the loss from the logits"):
        model(**batch, start_positions=places, end_positions=places, demonstrations=SHOTS)
    embeddings = model.base_model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ConfigError, match="one by one"):
        model(inputs_embeds=embeddings, **batch, demonstrations=SHOTS)


def test_without_demonstrations_it_is_the_base_model_bit_for_bit(tiny_model, tokenizer):
    for task_type in HEADS:
        model = wrap(tiny_model, tokenizer, "llama", task_type)
        batch = pad(model, "left")
        assert output_of(model, **batch).equal(output_of(model.base_model, **batch))
        assert not output_of(model, **batch, demonstrations=SHOTS).equal(output_of(model, **batch))


def test_a_token_that_the_head_would_not_take_is_refused(tiny_model, tokenizer):
    model = wrap(tiny_model, tokenizer, "llama")
    batch = pad(model, "right")
    other_padding = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    with pytest.raises(ShapeError, match="fill padding with the base model's pad_token_id"):
        model(input_ids=other_padding, attention_mask=batch["attention_mask"], demonstrations=SHOTS)
    embeddings = model.base_model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ShapeError, match="pad on the left"):
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], demonstrations=SHOTS)


def test_the_loss_is_the_heads_own_and_trains_the_distiller_alone(tiny_model, tokenizer):
    model = wrap(tiny_model, tokenizer, "llama")
    batch, labels = pad(model, "left"), torch.tensor([0, 2, 1])
    output = model(**batch, labels=labels, demonstrations=SHOTS)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    output.loss.backward()
    trained = dict(model.distiller.trained_tensors())
    assert trained["placeholders"].grad.any()
    assert not any("score" in name for name in trained)  # nothing of the head reads demonstrations
    assert model.base_model.score.weight.grad is None


def test_writing_with_a_classifier_is_refused(tiny_model, tokenizer):
    model = wrap(tiny_model, tokenizer, "llama")
    for write in (
        lambda: model.generate("bad", demonstrations=SHOTS),
        lambda: model.answer(["bad"], SHOTS),
        lambda: model.answer(["bad"], SHOTS, options=["positive", "negative"]),
    ):
        with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
            write()


def test_the_trainer_with_a_teacher_refuses_a_classifier(tiny_model, tokenizer, tmp_path):
    model = wrap(tiny_model, tokenizer, "llama")
    with pytest.raises(ConfigError, match="transformers' Trainer"):
        MendTrainer(model, MendTrainingArguments(output_dir=str(tmp_path)))


@pytest.mark.parametrize("task_type", list(HEADS))
def test_auto_mend_model_loads_the_head_that_the_distiller_was_made_for(tiny_model, tokenizer, tmp_path, task_type):
    wrap(tiny_model, tokenizer, "llama", task_type).unload().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = HEADS[task_type].from_pretrained(tmp_path / "base")
    model = get_mend_model(base, MendConfig(num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path / "distiller")
    loaded = AutoMendModel.from_pretrained(tmp_path / "distiller")
    query = loaded.tokenize("bad")
    assert output_of(loaded, **query, demonstrations=SHOTS).equal(output_of(model, **query, demonstrations=SHOTS))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: BertModel(BertConfig(vocab_size=8, **_SMALL)), "both directions"),
        (lambda: BertForSequenceClassification(BertConfig(vocab_size=8, **_SMALL)), "both directions"),
        (
            lambda: T5ForSequenceClassification(T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=2)),
            "encoder-decoder",
        ),
    ],
)
def test_heads_on_encoders_are_refused(build, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        get_mend_model(build(), MendConfig())


def test_a_vision_tower_beside_the_decoder_is_no_reason_to_refuse():
    text = {**_SMALL, "vocab_size": 8, "num_key_value_heads": 2, "head_dim": 4}
    config = Gemma3Config(text_config=text, vision_config={**_SMALL, "image_size": 28, "patch_size": 14})
    assert check_base_model(Gemma3ForConditionalGeneration(config)) == "CAUSAL_LM"


_SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
