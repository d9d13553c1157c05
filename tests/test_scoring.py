from __future__ import annotations

import pytest
import torch

from mend_hf import Demonstration, MendConfig, get_mend_model
from mend_hf.errors import DataError
from mend_hf.evaluation.scoring import score_options

DEMONSTRATIONS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
QUERIES = ["moving and funny", "bad", "the film was good and the food was not"]
OPTIONS = [["positive", "negative"], ["very good", "bad", "a bore and a bore"], ["positive", "negative"]]


@pytest.fixture(params=["gpt2", "llama", "opt", "gemma3_text"])
def model(request, tiny_model, tokenizer):
    return get_mend_model(tiny_model(request.param), MendConfig(num_virtual_tokens=3), tokenizer).eval()


def score_slowly(model, demonstrations):
    """The whole text is read again for every option, one at a time."""
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
                logits = model.base_model(torch.tensor([before + answer])).logits[0].log_softmax(-1)
            tokens = [logits[len(before) + i - 1, token].item() for i, token in enumerate(answer)]
            scores[-1].append(sum(tokens) / len(tokens))
    return scores


def assert_close(scores, expected):
    for row, expected_row in zip(scores, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-5)


def one_by_one(model, prefixes):
    """Sliding windows must not be filled with padding, so these models are asked row by row."""
    return [
        score_options(model, [query], [options], prefix)[0]
        for query, options, prefix in zip(QUERIES, OPTIONS, prefixes, strict=True)
    ]


def has_window(model):
    return getattr(model.config, "sliding_window", None) is not None


def test_zero_shot_scores_equal_the_obvious_loop(model):
    fast = one_by_one(model, [None] * 3) if has_window(model) else score_options(model, QUERIES, OPTIONS)
    assert_close(fast, score_slowly(model, []))


def test_in_context_scores_equal_the_obvious_loop(model):
    prefix = model.read(DEMONSTRATIONS).prefix
    fast = one_by_one(model, [prefix] * 3) if has_window(model) else score_options(model, QUERIES, OPTIONS, prefix)
    assert_close(fast, score_slowly(model, DEMONSTRATIONS))


def test_a_prefix_for_every_query_scores_as_each_alone(model):
    if has_window(model):
        pytest.skip("asked row by row in any case")
    distilled = model.distill([DEMONSTRATIONS, DEMONSTRATIONS[:1], DEMONSTRATIONS[1:]])
    together = score_options(model, QUERIES, OPTIONS, distilled.prefix, batch_size=2)
    assert_close(together, one_by_one(model, [task.prefix for task in distilled]))


@pytest.mark.parametrize("options", [["positive"], ["positive", "positive"]])
def test_fewer_than_two_different_options_are_refused(model, options):
    with pytest.raises(DataError, match="correct the task's options"):
        score_options(model, ["bad"], [options])
