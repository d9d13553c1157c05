"""Prompt tuning and prefix tuning: PEFT's soft prompts as prefixes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig
from tiny_models import wrap_tiny_model

from mend_hf import Demonstration, MendConfig, get_mend_model
from mend_hf.architectures import embed_tokens
from mend_hf.errors import ConfigError, DataError, UnsupportedModelError
from mend_hf.evaluation import tuned
from mend_hf.evaluation.methods import METHODS
from mend_hf.prefix import EmbeddingPrefix

SHOTS = [
    Demonstration("great film", "positive"),
    Demonstration("a bore", "negative"),
    Demonstration("the food was good and the film was funny", "positive"),
]
QUERY = "moving and funny"
OPTIONS = ("positive", "negative")


@pytest.fixture
def few_epochs(monkeypatch):
    monkeypatch.setattr(tuned, "NUM_EPOCHS", 2)


def wrap_by_peft(base, reader, vectors):
    """Return PEFT's own model with a reader's numbers as its soft prompt: vectors, else its keys and values."""
    kind = PrefixTuningConfig if vectors is None else PromptTuningConfig
    model = PeftModelForCausalLM(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=reader.num_slots))
    if vectors is None:
        layers = zip(reader.prefix.keys, reader.prefix.values, strict=True)
        states = torch.stack([states[0] for layer in layers for states in layer])  # [2 L, H, V, K]
        vectors = states.permute(2, 0, 1, 3).reshape(1, reader.num_slots, -1)
    model.prompt_encoder["default"].embedding.weight.data.copy_(vectors[0])
    return model.eval()


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "qwen3", "gemma3_text", "mistral", "bloom"])
@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
@pytest.mark.filterwarnings("ignore:A query of")
def test_a_tuned_prefix_answers_as_pefts_own_model(name, method, tiny_model, tokenizer, few_epochs, monkeypatch):
    model = wrap_tiny_model(tiny_model(name), tokenizer, num_virtual_tokens=5)
    found = []
    prepare = model.route.prepare
    monkeypatch.setattr(model.route, "prepare", lambda prefix: found.append(prefix) or prepare(prefix))
    reader = METHODS[method](model, SHOTS)
    assert reader.num_slots == 5
    vectors = found[0].vectors if isinstance(found[0], EmbeddingPrefix) else None
    assert (vectors is None) == (method == "prefix tuning")
    theirs = wrap_by_peft(tiny_model(name), reader, vectors)
    ids = torch.tensor([model.prompt.encode_query(QUERY)])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        got = model(ids, demonstrations=reader.prefix).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_training_makes_the_demonstrations_answers_likelier(method, tiny_model, tokenizer, monkeypatch):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=4)
    losses = []
    for num_epochs in (0, 5, 20):
        monkeypatch.setattr(tuned, "NUM_EPOCHS", num_epochs)
        reader = METHODS[method](model, SHOTS)
        scores = reader.score_options([shot.input for shot in SHOTS], [[shot.output] for shot in SHOTS], batch_size=3)
        losses.append(-sum(score for [score] in scores) / len(scores))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_training_starts_from_the_answers_in_the_prompt_format(method, tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(tuned, "NUM_EPOCHS", 0)
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=40)
    answers = [Demonstration("", "positive"), Demonstration("", "negative")]
    [chunk] = model.prompt.encode_demonstrations(answers * 4).chunks
    ids = torch.tensor([chunk.input_ids[:40]])
    text, started = model.read_tokens(ids, torch.ones_like(ids)), METHODS[method](model, SHOTS).prefix
    for layer, other in zip((*started.keys, *started.values), (*text.keys, *text.values), strict=True):
        torch.testing.assert_close(layer, other)
    assert started.next_positions.tolist() == [40]


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_step_is_one_of_adamw_on_the_mean_nll_of_all_answer_tokens(name, tiny_model, tokenizer, monkeypatch):
    model = wrap_tiny_model(tiny_model(name), tokenizer, num_virtual_tokens=4)
    monkeypatch.setattr(
        model.route, "prepare", lambda prefix: prefix
    )  # so that the vectors themselves can be looked at
    vectors = []
    for num_epochs in (0, 1):
        monkeypatch.setattr(tuned, "NUM_EPOCHS", num_epochs)
        vectors.append(METHODS["prompt tuning"](model, SHOTS).prefix.vectors)
    start = torch.nn.Parameter(vectors[0].clone())
    losses = []
    for shot in SHOTS:  # every row alone, so without padding
        query, answer = model.prompt.encode_query(shot.input), model.prompt.encode_answer(shot.output)
        inputs = torch.cat([start, embed_tokens(model.base_model, torch.tensor([query + answer]))], dim=1)
        logits = model.base_model(inputs_embeds=inputs).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        losses += [-logits[place, token] for place, token in enumerate(answer)]
    torch.stack(losses).mean().backward()
    torch.optim.AdamW([start], lr=tuned.LEARNING_RATE).step()
    torch.testing.assert_close(vectors[1], start.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_a_base_model_of_half_precision_is_tuned_too(method, tiny_model, tokenizer, few_epochs):
    model = wrap_tiny_model(tiny_model("llama").bfloat16(), tokenizer, num_virtual_tokens=4)
    reader = METHODS[method](model, SHOTS)
    assert {states.dtype for states in reader.prefix.keys} == {torch.bfloat16}
    assert reader.score_options([QUERY], [OPTIONS], batch_size=1)[0][0] < 0


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_the_base_model_is_left_as_it_was(method, tiny_model, tokenizer, few_epochs):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3, lora_r=2)
    base = model.base_model

    def look():
        return [
            {name: tensor.clone() for name, tensor in base.state_dict().items()},
            [(name, parameter.requires_grad, parameter.grad) for name, parameter in base.named_parameters()],
            [(name, type(module), module.training) for name, module in base.named_modules()],
            base.config.to_dict(),
            torch.get_rng_state().tolist(),
        ]

    (weights, *before), reader, (weights_after, *after) = look(), METHODS[method](model, SHOTS), look()
    assert weights.keys() == weights_after.keys()
    assert [name for name in weights if not weights[name].equal(weights_after[name])] == []
    assert before == after
    assert any(wanted for _, wanted, _ in before[0])  # the distiller's LoRA matrices, as before
    assert not any(states.requires_grad for states in (*reader.prefix.keys, *reader.prefix.values))


def test_the_same_demonstrations_are_trained_on_in_the_same_order(tiny_model, tokenizer, monkeypatch, few_epochs):
    monkeypatch.setattr(tuned, "BATCH_SIZE", 1)
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3)
    first, second = METHODS["prompt tuning"](model, SHOTS), METHODS["prompt tuning"](model, SHOTS)
    assert all(map(torch.equal, first.prefix.keys, second.prefix.keys))


def test_a_model_without_virtual_tokens_gets_20(tiny_model, tokenizer, few_epochs):
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=0, lora_r=0), tokenizer).eval()
    assert METHODS["prompt tuning"](model, SHOTS).num_slots == 20


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_what_cannot_be_tuned_is_refused(method, tiny_model, tiny_encoder_decoder, tokenizer):
    for base in (tiny_encoder_decoder("t5"), tiny_model("mamba")):
        model = get_mend_model(base, MendConfig(num_virtual_tokens=3), tokenizer).eval()
        with pytest.raises(UnsupportedModelError, match=f"{type(base).__name__}: leave these methods out"):
            METHODS[method](model, SHOTS)
    model = get_mend_model(tiny_model("mistral"), MendConfig(num_virtual_tokens=16), tokenizer).eval()
    with pytest.raises(ConfigError, match="sliding window of 16, got 16: lower num_virtual_tokens"):
        METHODS[method](model, SHOTS)
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3), tokenizer).eval()
    with pytest.raises(DataError, match="got none for 'a film'"):
        METHODS[method](model, [*SHOTS, Demonstration("a film", "")])
    model.base_model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="call gradient_checkpointing_disable"):
        METHODS[method](model, SHOTS)


def test_layers_of_unlike_shapes_have_no_prefix_to_train(tiny_model, tokenizer, monkeypatch):
    read = tuned.read_embeddings

    def read_with_a_wider_layer(*arguments):
        prefix = read(*arguments)
        return dataclasses.replace(prefix, keys=(prefix.keys[0].repeat(1, 1, 1, 2), *prefix.keys[1:]))

    monkeypatch.setattr(tuned, "read_embeddings", read_with_a_wider_layer)
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3)
    with pytest.raises(UnsupportedModelError, match=r"\(2, 3, 8\), \(2, 3, 16\)\]: leave the method out"):
        METHODS["prefix tuning"](model, SHOTS)
