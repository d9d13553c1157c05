"""transformers' own pipeline on a bound model, and pipelines that take demonstrations with every call."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tiny_models import wrap_tiny_model
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines import base as pipelines_base

from mend_hf import (
    FewShotClassificationPipeline,
    FewShotTextGenerationPipeline,
    MendConfig,
    get_mend_model,
    register_pipelines,
)
from mend_hf.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from mend_hf.scoring import score_options

SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
TASKS = [SHOTS, SHOTS[:1], [("bad film", "positive"), ("funny", "negative")]]
QUERIES = ["moving and funny", "bad", "the film was good and the food was bad"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
OPTIONS = ["positive", "negative", "the film"]


def build(tiny_model, tokenizer, name="llama", form="kv"):
    settings = {"num_virtual_tokens": 3, "prefix_form": form}
    return wrap_tiny_model(tiny_model(name), tokenizer, seed=0, spread=0.05, **settings)


@pytest.fixture
def model(tiny_model, tokenizer):
    return build(tiny_model, tokenizer)


@pytest.fixture
def registered():
    tasks = dict(PIPELINE_REGISTRY.supported_tasks)
    peft_tasks = copy.deepcopy(pipelines_base.SUPPORTED_PEFT_TASKS)
    register_pipelines()
    yield
    PIPELINE_REGISTRY.supported_tasks.clear()
    PIPELINE_REGISTRY.supported_tasks.update(tasks)
    pipelines_base.SUPPORTED_PEFT_TASKS.update(peft_tasks)


def answers_alone(model, tasks, queries=QUERIES):
    return [model.answer([query], task, **GREEDY)[0] for query, task in zip(queries, tasks, strict=True)]


class TestTheTextGenerationPipelineOfTransformers:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_it_answers_as_generate_does(self, model, tokenizer, batch_size):
        expected = []
        for query in QUERIES:
            ids = tokenizer(query, return_tensors="pt")
            tokens = model.generate(**ids, demonstrations=SHOTS, pad_token_id=tokenizer.pad_token_id, **GREEDY)
            new = tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            expected.append([{"generated_text": query + new}])
        ask = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        bare = ask(QUERIES, batch_size=batch_size, **GREEDY)
        with model.use_demonstrations(SHOTS):
            assert ask(QUERIES, batch_size=batch_size, **GREEDY) == expected != bare
        model.set_demonstrations(SHOTS)
        assert ask(QUERIES[0], **GREEDY) == expected[0]

    def test_it_logs_no_error_once_the_pipelines_are_registered(self, model, tokenizer, registered, caplog):
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        finally:
            logger.removeHandler(caplog.handler)
        assert "is not supported" not in caplog.text


def test_registered_tasks_make_our_pipelines(model, registered):
    ask = pipeline("few-shot-text-generation", model=model, device="cpu")
    choose = pipeline("few-shot-classification", model=model, device="cpu", options=OPTIONS)
    assert type(ask) is FewShotTextGenerationPipeline
    assert type(choose) is FewShotClassificationPipeline
    assert ask("bad", demonstrations=SHOTS, **GREEDY) == [
        {"generated_text": model.answer(["bad"], SHOTS, **GREEDY)[0]}
    ]
    assert {choice["label"] for choice in choose("bad", demonstrations=SHOTS)} == set(OPTIONS)


@pytest.mark.parametrize("form", ["kv", "embeds"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rows_of_different_tasks_in_a_batch_are_answered_as_each_alone(tiny_model, tokenizer, form, batch_size):
    model = build(tiny_model, tokenizer, form=form)
    ask = FewShotTextGenerationPipeline(model, device="cpu")
    expected = answers_alone(model, TASKS)
    distilled = model.distill(TASKS)
    for demonstrations in (TASKS, distilled):
        results = ask(QUERIES, demonstrations=demonstrations, batch_size=batch_size, **GREEDY)
        assert [text for [text] in results] == [{"generated_text": text} for text in expected]


def test_a_sliding_window_is_no_obstacle_to_a_batch_of_different_lengths(tiny_model, tokenizer):
    model = build(tiny_model, tokenizer, "mistral")
    ask = FewShotTextGenerationPipeline(model, device="cpu")
    results = ask(QUERIES, demonstrations=SHOTS, batch_size=3, max_new_tokens=2)
    alone = [model.answer([query], SHOTS, max_new_tokens=2)[0] for query in QUERIES]
    assert [result[0]["generated_text"] for result in results] == alone


def test_demonstrations_of_an_input_come_before_the_calls_and_those_before_the_pipelines(model):
    ask = FewShotTextGenerationPipeline(model, device="cpu", demonstrations=TASKS[0], **GREEDY)
    expected = [model.answer(["bad"], task, **GREEDY)[0] for task in TASKS]
    assert len(set(expected)) == 3
    own = {"query": "bad", "demonstrations": TASKS[2]}
    assert ask("bad")[0]["generated_text"] == expected[0]
    assert ask("bad", demonstrations=TASKS[1])[0]["generated_text"] == expected[1]
    assert ask(own, demonstrations=TASKS[1])[0]["generated_text"] == expected[2]


def test_a_stream_is_read_one_batch_at_a_time(model):
    num_read = 0

    def stream():
        nonlocal num_read
        for query, task in zip(QUERIES, TASKS, strict=True):
            num_read += 1
            yield {"query": query, "demonstrations": task}

    results = FewShotTextGenerationPipeline(model, device="cpu")(stream(), batch_size=2, **GREEDY)
    first = next(results)
    assert num_read == 2
    assert [result[0]["generated_text"] for result in (first, *results)] == answers_alone(model, TASKS)


def test_every_returned_sequence_belongs_to_its_query(model):
    settings = {**GREEDY, "num_beams": 2, "num_return_sequences": 2}
    ask = FewShotTextGenerationPipeline(model, device="cpu")
    results = ask(QUERIES, demonstrations=TASKS, batch_size=3, **settings)
    for query, task, result in zip(QUERIES, TASKS, results, strict=True):
        assert [row["generated_text"] for row in result] == model.answer([query], task, **settings)


def test_options_are_ranked_by_their_mean_log_likelihood(model):
    choose = FewShotClassificationPipeline(model, device="cpu", options=OPTIONS)
    results = choose(QUERIES, demonstrations=TASKS, batch_size=2)
    for query, task, result in zip(QUERIES, TASKS, results, strict=True):
        prefix = model.route.prepare(model.distill(task).prefix)
        [scores] = score_options(model, [query], [OPTIONS], prefix)
        shares = dict(zip(OPTIONS, torch.tensor(scores).softmax(0).tolist(), strict=True))
        assert [row["label"] for row in result] == sorted(OPTIONS, key=shares.__getitem__, reverse=True)
        assert [row["score"] for row in result] == pytest.approx([shares[row["label"]] for row in result], abs=1e-5)
        assert sum(row["score"] for row in result) == pytest.approx(1)
    own = choose({"query": "bad", "options": ["good", "bad"]}, demonstrations=SHOTS)
    assert {row["label"] for row in own} == {"good", "bad"}


def test_bound_demonstrations_answer_where_none_are_given(model):
    ask = FewShotTextGenerationPipeline(model, device="cpu", **GREEDY)
    choose = FewShotClassificationPipeline(model, device="cpu", options=OPTIONS)
    given, bare = (ask("bad", demonstrations=SHOTS), choose("bad", demonstrations=SHOTS)), (ask("bad"), choose("bad"))
    with model.use_demonstrations(SHOTS):
        assert (ask("bad"), choose("bad")) == given
        with model.disable_adapter():
            assert (ask("bad"), choose("bad")) == bare
        for both in (ask, choose):
            with pytest.raises(DataError, match=r"set_demonstrations\(None\)"):
                both("bad", demonstrations=SHOTS)
    assert choose("bad") == bare[1] != given[1]


def test_an_empty_list_has_no_answers(model):
    assert FewShotTextGenerationPipeline(model, device="cpu")([], demonstrations=SHOTS) == []


@pytest.mark.parametrize(
    ("inputs", "settings", "remedy"),
    [
        (3, {}, "one of these forms"),
        ([{"text": "bad"}], {}, "one of these forms"),
        (QUERIES, {"demonstrations": TASKS[:2]}, "as many inputs as the 2 tasks"),
        ("bad", {"demonstrations": TASKS}, "in a stream, let every input be"),
        ("bad", {"demonstrations": []}, "give one or more"),
        ([{"query": "bad", "demonstrations": TASKS}], {}, "pick one with"),
        ([{"query": "bad", "demonstrations": SHOTS}, "good"], {"batch_size": 2}, "a call of their own"),
    ],
)
def test_malformed_inputs_are_refused(model, inputs, settings, remedy):
    with pytest.raises(DataError, match=remedy):
        FewShotTextGenerationPipeline(model, device="cpu")(inputs, **settings)


@pytest.mark.parametrize(
    ("options", "remedy"), [(None, r"pass options=\[...\]"), ("yes", "pass options"), (["yes"], "two or more")]
)
def test_options_that_leave_no_choice_are_refused(model, options, remedy):
    with pytest.raises(DataError, match=remedy):
        FewShotClassificationPipeline(model, device="cpu")("bad", options=options)


def test_demonstrations_of_another_base_model_are_refused(model, tiny_model, tokenizer):
    other = build(tiny_model, tokenizer, "gpt2").distill(SHOTS)
    with pytest.raises(CheckpointError, match="another base model"):
        FewShotTextGenerationPipeline(model, device="cpu")("bad", demonstrations=other)


def test_another_kind_of_model_is_refused(model, tiny_model):
    with pytest.raises(ConfigError, match="AutoMendModel"):
        FewShotTextGenerationPipeline(tiny_model("llama"), device="cpu")
    headless = get_mend_model(tiny_model("llama").base_model, MendConfig(num_virtual_tokens=2), model.tokenizer)
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        FewShotClassificationPipeline(headless, device="cpu")


def test_worker_processes_are_refused(model):
    with pytest.raises(ConfigError, match="num_workers=0"):
        FewShotTextGenerationPipeline(model, device="cpu")(QUERIES, num_workers=2)
