from __future__ import annotations

import pytest
import torch

from mend_hf import Demonstration, MendConfig, get_mend_model
from mend_hf.errors import DataError, ShapeError
from mend_hf.scoring import score_options

DEMONSTRATIONS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
QUERIES = ["moving and funny", "bad", "the film was good and the food was not"]
OPTIONS = [["positive", "negative"], ["very good", "bad", "a bore and a bore"], ["positive", "negative"]]


@pytest.fixture(params=["gpt2", "llama", "opt", "gemma3_text", "mistral", "bloom", "mamba"])
def name(request):
    return request.param


@pytest.fixture
def model(name, tiny_model, tokenizer):
    """The adapter is as if trained: a new one changes nothing, and nobody would see it left on."""
    model = get_mend_model(tiny_model(name), MendConfig(num_virtual_tokens=3), tokenizer).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for _, parameter in model.distiller.trained_tensors():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def bare(name, tiny_model):
    return tiny_model(name)


def score_slowly(model, bare, demonstrations):
    """The bare base model reads the whole text again for every option, one at a time."""
    shots = []
    if demonstrations:
        [chunk] = model.prompt.encode_demonstrations([Demonstration(*pair) for pair in demonstrations]).chunks
        shots = chunk.input_ids
    scores = []
    for query, options in zip(QUERIES, OPTIONS, strict=True):
        scores.append([])
        for option in options:
            before, answer = shots + model.prompt.encode_query(query), model.prompt.encode_answer(option)
            with torch.no_grad():
                logits = bare(torch.tensor([before + answer])).logits[0].log_softmax(-1)
            tokens = [logits[len(before) + i - 1, token].item() for i, token in enumerate(answer)]
            scores[-1].append(sum(tokens) / len(tokens))
    return scores


def assert_close(scores, expected):
    for row, expected_row in zip(scores, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-5)


def one_by_one(model, prefixes):
    return [
        score_options(model, [query], [options], prefix)[0]
        for query, options, prefix in zip(QUERIES, OPTIONS, prefixes, strict=True)
    ]


def test_zero_shot_scores_equal_the_obvious_loop(model, bare):
    assert_close(score_options(model, QUERIES, OPTIONS), score_slowly(model, bare, []))


def test_in_context_scores_equal_the_obvious_loop(model, bare):
    prefix = model.read(DEMONSTRATIONS).prefix
    assert_close(score_options(model, QUERIES, OPTIONS, prefix), score_slowly(model, bare, DEMONSTRATIONS))


def test_many_options_are_read_in_parts_that_equal_the_obvious_loop(model, bare, monkeypatch):
    monkeypatch.setattr("mend_hf.scoring.OPTIONS_PER_QUERY", 1)
    prefix = model.read(DEMONSTRATIONS).prefix
    assert_close(score_options(model, QUERIES, OPTIONS, prefix), score_slowly(model, bare, DEMONSTRATIONS))


@pytest.mark.parametrize("name", ["llama"])
def test_the_rows_of_a_pass_do_not_grow_with_the_options(model):
    rows = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    options = [
        f"good {word}" for word in ("film", "food", "boy", "girl", "day", "walk", "town", "home", "bad", "bore")
    ]
    score_options(model, QUERIES[:2], [options] * 2, batch_size=2)
    assert sum(rows) == 2 + 20
    assert max(rows) <= 8


def test_a_prefix_for_every_query_scores_as_each_alone(model):
    distilled = model.distill([DEMONSTRATIONS, DEMONSTRATIONS[:1], DEMONSTRATIONS[1:]])
    together = score_options(model, QUERIES, OPTIONS, distilled.prefix, batch_size=2)
    assert_close(together, one_by_one(model, [task.prefix for task in distilled]))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("options", [[["positive"], []], [["positive"]]])
def test_queries_without_options_are_refused(model, options):
    with pytest.raises(DataError, match="give every query its own"):
        score_options(model, ["bad", "good"], options)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_one_option_alone_scores_as_among_others_and_a_long_one_is_cut(model):
    [[alone]] = score_options(model, ["bad"], [["good " * 300]])
    among = score_options(model, ["bad"], [["positive", "good " * 256]])[0][1]
    assert alone == pytest.approx(among, abs=1e-5)


@pytest.mark.parametrize("name", ["llama"])
def test_the_embeds_form_scores_as_its_own_keys_and_values(name, tiny_model, tokenizer):
    config = MendConfig(num_virtual_tokens=3, prefix_form="embeds")
    model = get_mend_model(tiny_model(name), config, tokenizer).eval()
    prefix = model.distill(DEMONSTRATIONS).prefix
    expected = score_options(model, QUERIES, OPTIONS, model.route.prepare(prefix))
    assert_close(score_options(model, QUERIES, OPTIONS, prefix), expected)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_prefix_of_some_of_the_queries_is_refused(model, batch_size):
    prefix = model.distill([DEMONSTRATIONS, DEMONSTRATIONS[:1]]).prefix
    with pytest.raises(ShapeError, match="pick one a query"):
        score_options(model, QUERIES, OPTIONS, prefix, batch_size=batch_size)


@pytest.mark.parametrize("name", ["gpt2"])
def test_options_that_overrun_the_position_table_are_refused(name, tiny_model, tokenizer):
    config = MendConfig(num_virtual_tokens=0, max_demonstration_tokens=4000)
    model = get_mend_model(tiny_model(name), config, tokenizer)
    room = model.config.max_position_embeddings - len(model.prompt.encode_query("good"))
    query = " ".join(["good"] * (room - 1))
    assert score_options(model, [query], [["good", "bad"]])
    with pytest.raises(ShapeError, match="a shorter query"):
        score_options(model, [query], [["good " * 20, "bad"]])
