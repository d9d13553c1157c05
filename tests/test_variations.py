from __future__ import annotations

import random

import pytest

from mend_hf import Demonstration, MendConfig, get_mend_model
from mend_hf.data.metaicl import Example
from mend_hf.errors import ConfigError, DataError
from mend_hf.evaluation.evaluator import evaluate_methods
from mend_hf.evaluation.methods import METHODS, pick_methods
from mend_hf.evaluation.variations import VARIATIONS, vary

OPTIONS = ("positive", "negative", "very bad")
SHOTS = [
    Example("films", text, OPTIONS[place % 2], OPTIONS)
    for place, text in enumerate(("great film", "a bore", "good food", "bad food", "very funny"))
]
PAIRS = [(shot.input, shot.output) for shot in SHOTS]


def pairs(demonstrations):
    return [(demonstration.input, demonstration.output) for demonstration in demonstrations]


def test_as_given_nothing_changes():
    assert pairs(vary(SHOTS, "as given", 1)) == PAIRS


def test_inputs_or_labels_are_left_out():
    assert pairs(vary(SHOTS, "no input", 1)) == [("", output) for _, output in PAIRS]
    assert pairs(vary(SHOTS, "no label", 1)) == [(text, "") for text, _ in PAIRS]


def test_wrong_labels_are_never_the_right_one_and_random_ones_sometimes_are():
    wrong = [pair for seed in range(20) for pair in zip(vary(SHOTS, "wrong labels", seed), SHOTS, strict=True)]
    assert all(changed.output in OPTIONS and changed.output != shot.output for changed, shot in wrong)
    drawn = [pair for seed in range(100) for pair in zip(vary(SHOTS, "random labels", seed), SHOTS, strict=True)]
    share = sum(changed.output == shot.output for changed, shot in drawn) / len(drawn)
    assert 0.25 < share < 0.42  # one of three
    assert all(changed.input == shot.input for changed, shot in [*wrong, *drawn])


def test_another_order_has_the_same_demonstrations():
    permuted = vary(SHOTS, "permuted order", 1)
    assert pairs(permuted) != PAIRS
    assert sorted(pairs(permuted)) == sorted(PAIRS)


@pytest.mark.parametrize("name", VARIATIONS)
def test_the_seed_fixes_what_is_drawn(name):
    assert vary(SHOTS, name, 3) == vary(SHOTS, name, 3)
    if name in ("random labels", "wrong labels", "permuted order"):
        assert any(vary(SHOTS, name, 3) != vary(SHOTS, name, seed) for seed in range(4, 8))


def test_labels_of_a_free_form_task_are_not_drawn():
    free = [Example("free", "a film", "good")]
    assert vary(free, "no label", 1) == [Demonstration("a film", "")]
    with pytest.raises(DataError, match="'a film' of free: leave the task out"):
        vary(free, "wrong labels", 1)


def test_an_unknown_variation_is_refused():
    with pytest.raises(ConfigError, match="among as given, no input"):
        vary(SHOTS, "upside down", 1)


def test_every_variation_reaches_the_methods_and_is_a_result_of_its_own(tiny_model, tokenizer):
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=2), tokenizer).eval()
    tasks = {"films": SHOTS}
    seen, before = [], model.mend_config

    def note(model, demonstrations):
        seen.append((tuple(demonstrations), model.mend_config.output_prefix))
        return METHODS["in-context"](model, demonstrations)

    settings = {"num_demonstrations": 4, "seeds": [1], "variations": list(VARIATIONS)}
    results = list(evaluate_methods(model, tasks, tasks, {"note": note} | pick_methods(["MEND"]), **settings))
    assert [result.variation for result in results[::2]] == list(VARIATIONS)
    assert len({result.key for result in results}) == 2 * len(VARIATIONS)
    assert len({*seen}) == len(VARIATIONS)
    assert {prefix for _, prefix in seen} == {before.output_prefix, "\nA:"}
    assert model.mend_config is before


def test_zero_shot_is_asked_again_only_where_the_queries_are_written_otherwise(tiny_model, tokenizer, monkeypatch):
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=2), tokenizer).eval()
    prefixes = []

    def note(reader, queries, options, batch_size):
        prefixes.append(reader.model.mend_config.output_prefix)
        return [[0.0, 1.0, 0.5] for _ in queries]

    monkeypatch.setattr("mend_hf.evaluation.readers.Reader.score_options", note)
    tasks, methods = {"films": SHOTS}, pick_methods(["zero-shot"])
    settings = {"num_demonstrations": 2, "seeds": [1, 2], "variations": list(VARIATIONS)}
    results = list(evaluate_methods(model, tasks, tasks, methods, **settings))
    assert len(results) == 2 * len(VARIATIONS)
    assert prefixes == [model.mend_config.output_prefix, "\nA:"]


def test_label_variations_are_refused_before_anything_runs(tiny_model, tokenizer):
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=2), tokenizer).eval()
    tasks = {"free": [Example("free", "a film", "good")]}
    with pytest.raises(DataError, match="or the variations of labels"):
        evaluate_methods(model, tasks, tasks, METHODS, num_demonstrations=1, variations=["random labels"])


def test_a_variation_leaves_the_callers_examples_alone():
    before = list(SHOTS)
    for change in VARIATIONS.values():
        change(SHOTS, random.Random(0))
    assert before == SHOTS
