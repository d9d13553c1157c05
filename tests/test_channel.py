"""Channel scoring: how likely the input is behind every option."""

from __future__ import annotations

import pytest
import torch
from tiny_models import wrap_tiny_model

from mend_hf import Demonstration
from mend_hf.data.metaicl import Example
from mend_hf.errors import ConfigError, DataError
from mend_hf.evaluation.channel import score_by_channel, swap_demonstrations
from mend_hf.evaluation.evaluator import evaluate_methods
from mend_hf.evaluation.methods import METHODS, pick_methods
from mend_hf.evaluation.readers import Reader

SHOTS = [Demonstration("great film", "positive"), Demonstration("a bore", "negative")]
QUERIES = ["moving and funny", "bad", "the film was good and the food was not", "bad"]
OPTIONS = [("positive", "negative"), ("very good", "bad", "positive"), ("negative", "positive"), ("a bore", "bad")]


@pytest.fixture
def model(tiny_model, tokenizer):
    return wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3)


def examples(task, *inputs):
    return [
        Example(task, text, ("positive", "negative")[i % 2], ("positive", "negative")) for i, text in enumerate(inputs)
    ]


def score_slowly(model, bare, shots, query, option):
    """The bare base model reads demonstrations with their output first, then the option, then the query's text."""
    [chunk] = model.prompt.encode_demonstrations(shots).chunks if shots else [None]
    before = ([] if chunk is None else chunk.input_ids) + model.prompt.encode_query(option)
    text = model.prompt.encode_answer(query)
    with torch.no_grad():
        logits = bare(torch.tensor([before + text])).logits[0].log_softmax(-1)
    return sum(logits[len(before) + i - 1, token].item() for i, token in enumerate(text)) / len(text)


def test_demonstrations_are_swapped():
    assert swap_demonstrations(SHOTS) == [Demonstration("positive", "great film"), Demonstration("negative", "a bore")]


@pytest.mark.parametrize("method", ["zero-shot", "in-context"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_channel_scores_equal_the_obvious_loop(model, tiny_model, method, batch_size):
    shots = [Demonstration(shot.output, shot.input) for shot in SHOTS]
    bare = tiny_model("llama")
    scores = score_by_channel(METHODS[method](model, shots), QUERIES, OPTIONS, batch_size=batch_size)
    for query, options, row in zip(QUERIES, OPTIONS, scores, strict=True):
        read = shots if method == "in-context" else []
        assert row == pytest.approx([score_slowly(model, bare, read, query, option) for option in options], abs=1e-5)


def test_channel_scores_of_an_encoder_decoder_equal_the_obvious_loop(tiny_encoder_decoder, tokenizer):
    model, bare = (
        wrap_tiny_model(tiny_encoder_decoder("t5"), tokenizer, num_virtual_tokens=3),
        tiny_encoder_decoder("t5"),
    )
    [row] = score_by_channel(Reader(model), ["moving and funny"], [("positive", "very bad")], batch_size=2)
    for option, score in zip(("positive", "very bad"), row, strict=True):
        before, behind = model.prompt.target_frame
        text = model.prompt.encode_answer("moving and funny")
        with torch.no_grad():
            labels = torch.tensor([before + text + behind])
            logits = bare(torch.tensor([model.prompt.encode_query(option)]), labels=labels).logits[0].log_softmax(-1)
        tokens = [logits[len(before) + i, token].item() for i, token in enumerate(text)]
        assert score == pytest.approx(sum(tokens) / len(tokens), abs=1e-5)


def test_a_query_of_several_options_is_read_once_behind_each_option(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Reader,
        "score_options",
        lambda self, queries, options, **_: [
            asked.append((q, o)) or [0.0] * len(o) for q, o in zip(queries, options, strict=True)
        ],
    )
    score_by_channel(Reader(model), ["bad", "bad"], [("positive", "negative"), ("negative", "positive")], batch_size=1)
    assert asked == [("positive", ["bad"]), ("negative", ["bad"])]


def test_methods_read_swapped_demonstrations_and_results_say_so(model):
    tasks = {"films": examples("films", "great film", "a bore", "good food", "bad food")}
    read = []

    def spy(model, demonstrations):
        read.extend(demonstrations)
        return METHODS["MEND"](model, demonstrations)

    run = {"num_demonstrations": 2, "seeds": [1], "scoring": "channel"}
    [result] = evaluate_methods(model, tasks, tasks, {"MEND": spy}, **run)
    assert (result.scoring, result.key.scoring) == ("channel", "channel")
    assert {shot.input for shot in read} <= {"positive", "negative"}
    assert list(evaluate_methods(model, tasks, tasks, {"MEND": spy}, **run, finished={result.key})) == []
    direct = {**run, "scoring": "direct"}
    assert len(list(evaluate_methods(model, tasks, tasks, {"MEND": spy}, **direct, finished={result.key}))) == 1


def test_channel_scoring_chooses_the_option_that_makes_the_input_likeliest(model, monkeypatch):
    likely = {
        ("positive", "good"): -1.0,
        ("negative", "good"): -2.0,
        ("positive", "bad"): -4.0,
        ("negative", "bad"): -3.0,
    }
    monkeypatch.setattr(
        Reader,
        "score_options",
        lambda self, queries, options, **_: [
            [likely[query, text] for text in row] for query, row in zip(queries, options, strict=True)
        ],
    )
    tasks = {"films": examples("films", "good", "bad")}
    run = {"num_demonstrations": 1, "seeds": [1], "scoring": "channel"}
    [result] = evaluate_methods(model, tasks, tasks, pick_methods(["zero-shot"]), **run)
    assert result.score == 1


def test_what_has_no_channel_is_refused(model):
    free = {"free": [Example("free", "a film", "good")] * 2}
    run = {"num_demonstrations": 1, "seeds": [1]}
    with pytest.raises(DataError, match='free-form task free: leave it out, or use scoring="direct"'):
        next(evaluate_methods(model, free, free, METHODS, **run, scoring="channel"))
    with pytest.raises(ConfigError, match="direct or channel, got 'sideways'"):
        next(evaluate_methods(model, free, free, METHODS, **run, scoring="sideways"))
    with pytest.raises(DataError, match="got an empty one"):
        score_by_channel(Reader(model), [" "], [("good", "bad")], batch_size=1)
    with pytest.raises(DataError, match="got the text 'plain'"):
        swap_demonstrations([Demonstration("plain")])
