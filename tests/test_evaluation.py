from __future__ import annotations

import dataclasses
import io
import sys

import pytest
import torch
from rich.console import Console

from mend_hf import Demonstration, MendConfig, get_mend_model
from mend_hf.data.metaicl import Example
from mend_hf.errors import ConfigError, DataError, MissingExtraError
from mend_hf.evaluation.evaluator import evaluate_methods
from mend_hf.evaluation.methods import METHODS, pick_methods
from mend_hf.evaluation.metrics import compute_metric
from mend_hf.evaluation.report import (
    cost_rows,
    method_rows,
    queries_to_pay_off,
    split_methods,
    summarise,
    task_rows,
    to_markdown,
    to_table,
)
from mend_hf.evaluation.results import ResultKey, TaskResult

OPTIONS = ("positive", "negative")
SHOTS = [
    Demonstration("great film", "positive"),
    Demonstration("a bore", "negative"),
    Demonstration("good", "positive"),
]


@pytest.fixture
def model(tiny_model, tokenizer):
    """The adapter is as if trained: a new one changes nothing, and nobody would see it left on."""
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3), tokenizer).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for _, parameter in model.distiller.trained_tensors():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def examples(task, options=OPTIONS):
    texts = ["great film", "a bore", "good food", "bad food", "very funny", "a very bad film"]
    return [Example(task, text, ("positive", "negative")[i % 2], options) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "score"),
    [
        ("accuracy", ["a", "b", "b", "b"], ["a", "a", "b", "b"], 0.75),
        # a: precision 1, recall 1/2, F1 2/3; b: precision 2/3, recall 1, F1 4/5
        ("macro_f1", ["a", "b", "b", "b"], ["a", "a", "b", "b"], (2 / 3 + 4 / 5) / 2),
        # c is no gold label: it costs recall of a and does not become a class of its own
        ("macro_f1", ["c", "a"], ["a", "a"], 2 / 3),
        ("exact_match", ["The  answer!", "no"], ["the answer", "yes"], 0.5),
        # common subsequence "the cat": 2 * 2 / (3 + 4)
        ("rouge_l", ["the black cat"], ["the cat sat down"], 4 / 7),
        ("rouge_l", [""], ["a word"], 0.0),
    ],
)
def test_metrics_give_the_values_worked_out_by_hand(metric, predictions, references, score):
    assert compute_metric(metric, predictions, references) == pytest.approx(score)


def test_an_unknown_metric_is_refused(model):
    with pytest.raises(ConfigError, match="among macro_f1"):
        compute_metric("f2", ["a"], ["a"])
    tasks = {"films": examples("films")}
    with pytest.raises(ConfigError, match="among macro_f1, accuracy, exact_match, rouge_l, got 'f2'"):
        evaluate_methods(model, tasks, tasks, METHODS, num_demonstrations=2, metric="f2")


def test_a_gold_answer_that_cannot_be_chosen_is_a_wrong_answer_and_no_class():
    # a: precision 1/2, recall 1, F1 2/3; b: precision and recall 1; as a class of its own c would make it 5/9
    predictions, references = ["a", "a", "b"], ["a", "c", "b"]
    assert compute_metric("macro_f1", predictions, references, labels=["a", "b"]) == pytest.approx((2 / 3 + 1) / 2)
    assert compute_metric("macro_f1", predictions, references) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert compute_metric("accuracy", predictions, references, labels=["a", "b"]) == pytest.approx(2 / 3)


def test_queries_whose_gold_answer_cannot_be_chosen_are_counted_apart(model):
    queries = [*examples("films"), Example("films", "good", "mixed", OPTIONS)]
    methods = pick_methods(["zero-shot"])
    tasks = ({"films": examples("films")}, {"films": queries})
    [result] = evaluate_methods(model, *tasks, methods, num_demonstrations=1, seeds=[1])
    [without] = evaluate_methods(model, tasks[0], tasks[0], methods, num_demonstrations=1, seeds=[1])
    assert (result.num_unanswerable, result.num_queries, without.num_unanswerable) == (1, 7, 0)
    assert result.other_scores["accuracy"] == pytest.approx(without.other_scores["accuracy"] * 6 / 7)


def test_another_metric_may_be_asked_for(model):
    tasks = {"films": examples("films")}
    methods = pick_methods(["zero-shot"])
    [usual] = evaluate_methods(model, tasks, tasks, methods, num_demonstrations=1, seeds=[1])
    [other] = evaluate_methods(model, tasks, tasks, methods, num_demonstrations=1, seeds=[1], metric="accuracy")
    assert usual.metric == "macro_f1"
    assert (other.metric, other.score) == ("accuracy", usual.other_scores["accuracy"])


def test_processes_share_the_work_and_lose_none_of_it(model):
    tasks = {name: examples(name) for name in ("films", "books", "songs")}
    settings = {"num_demonstrations": 2, "seeds": [1, 2]}
    methods = pick_methods(["zero-shot", "in-context"])
    whole = {result.key: result.score for result in evaluate_methods(model, tasks, tasks, methods, **settings)}
    parts = [list(evaluate_methods(model, tasks, tasks, methods, **settings, share=(part, 4))) for part in range(4)]
    assert [len(part) for part in parts] == [4, 4, 2, 2]
    assert {result.key: result.score for part in parts for result in part} == whole


def test_what_reads_no_demonstrations_is_asked_once_a_task(model, monkeypatch):
    tasks = {"films": examples("films"), "books": examples("books")}
    asked = []

    def note(reader, queries, options, batch_size):
        asked.append(reader.num_slots)
        return [[float(len(query)), 1.0] for query in queries]

    monkeypatch.setattr("mend_hf.evaluation.readers.Reader.score_options", note)
    methods = pick_methods(["zero-shot", "in-context"])
    results = list(evaluate_methods(model, tasks, tasks, methods, num_demonstrations=2, seeds=[1, 2, 3]))
    assert asked.count(0) == 2
    assert len({result.key for result in results}) == len(results) == 2 * 3 * 2
    assert {result.seed for result in results if result.method == "zero-shot"} == {1, 2, 3}


def test_fewer_demonstrations_are_the_first_of_more(model):
    tasks = {"films": examples("films")}
    seen = []

    def note(model, demonstrations):
        seen.append(demonstrations)
        return METHODS["zero-shot"](model, demonstrations)

    results = list(evaluate_methods(model, tasks, tasks, {"note": note}, num_demonstrations=[1, 4], seeds=[1]))
    assert [result.num_demonstrations for result in results] == [1, 4]
    assert len({result.key for result in results}) == 2
    assert seen[0] == seen[1][:1]


def test_a_distiller_and_the_methods_never_see_more_of_a_task_than_k_examples(model):
    """Nothing can be chosen on a task that is reported on: of its training side k examples are drawn, and no other."""
    shots = [Example("films", f"good {word}", "positive", OPTIONS) for word in ("film", "food", "bore", "funny")]
    seen = set()

    def note(model, demonstrations):
        seen.update(demonstrations)
        return METHODS["zero-shot"](model, demonstrations)

    list(evaluate_methods(model, {"films": shots}, {"films": examples("films")}, {"note": note}, num_demonstrations=2,
                          seeds=[1]))  # fmt: skip
    assert len(seen) == 2
    assert {shot.input for shot in seen} < {shot.input for shot in shots}


def test_what_a_query_and_the_demonstrations_cost_is_counted(model):
    tasks = {"films": examples("films")}
    methods = pick_methods(["zero-shot", "in-context", "MEND"])
    results = evaluate_methods(model, tasks, tasks, methods, num_demonstrations=6, seeds=[1])
    costs = {result.method: result for result in results}
    assert costs["zero-shot"].prepare_flops == 0 < costs["in-context"].prepare_flops < costs["MEND"].prepare_flops
    flops = [costs[name].flops_per_query for name in ("zero-shot", "MEND", "in-context")]
    assert flops == sorted(flops)
    assert all(result.milliseconds_per_query > 0 for result in costs.values())


def test_anchors_are_what_a_distiller_without_adapter_and_placeholders_keeps(model, tiny_model, tokenizer):
    plain = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=0, lora_r=0), tokenizer)
    expected, got = plain.distill(SHOTS).prefix, METHODS["training-free anchors"](model, SHOTS).prefix
    for layer, other in zip((*got.keys, *got.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(layer, other)
    assert got.next_positions.tolist() == expected.next_positions.tolist()


def test_a_random_prefix_keeps_the_sink_and_nothing_else(model):
    random_prefix, distilled = (METHODS[name](model, SHOTS).prefix for name in ("random prefix", "MEND"))
    for drawn, made in zip(random_prefix.keys, distilled.keys, strict=True):
        assert drawn.shape == made.shape
        assert drawn[:, :, 0].equal(made[:, :, 0])
        assert not torch.isclose(drawn[:, :, 1:], made[:, :, 1:]).all(-1).any()


def test_cut_text_has_no_more_tokens_than_the_prefix_has_slots(model):
    num_slots = METHODS["MEND"](model, SHOTS * 4).num_slots
    cut, full = METHODS["in-context, cut"](model, SHOTS * 4), METHODS["in-context"](model, SHOTS * 4)
    assert 0 < cut.num_slots <= num_slots < full.num_slots


def test_cut_text_counts_the_begin_of_text_once(model):
    whole = model.tokenizer
    model.tokenizer = model.distiller_tokenizer = WithBeginOfText(whole)
    shots = [Demonstration("good film", "positive")] * 20
    lengths = [METHODS["in-context"](model, shots[:num]).num_slots for num in range(1, 21)]
    budget = METHODS["MEND"](model, shots).num_slots
    assert METHODS["in-context, cut"](model, shots).num_slots == max(n for n in lengths if n <= budget)


class WithBeginOfText:
    """A tokenizer that puts a begin-of-text token in front of a text, as Llama's does."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, add_special_tokens=True):
        encoding = self._tokenizer(text, add_special_tokens=False)
        if add_special_tokens:
            encoding["input_ids"] = [self._tokenizer.bos_token_id, *encoding["input_ids"]]
        return encoding


def test_every_method_gives_scores_of_its_own(model):
    readers = [method(model, SHOTS) for method in METHODS.values()]
    scores = [tuple(reader.score_options(["a bore"], [OPTIONS], batch_size=1)[0]) for reader in readers]
    assert len(set(scores)) == len(METHODS)


def test_results_are_complete(model):
    tasks = {"films": examples("films")}
    results = list(evaluate_methods(model, tasks, tasks, METHODS, num_demonstrations=3, seeds=[1, 2], max_queries=4))
    assert len(results) == 2 * len(METHODS)
    assert {result.metric for result in results} == {"macro_f1"}
    slots = {result.method: result.prefix_slots for result in results}
    assert slots["zero-shot"] == 0 < slots["training-free anchors"] < slots["MEND"]
    assert slots["random prefix"] == slots["MEND"]
    assert all(result.num_queries == 4 and 0 <= result.score <= 1 for result in results)


def test_what_is_finished_is_not_run_again(model):
    tasks = {"films": examples("films")}
    methods = pick_methods(["zero-shot", "in-context"])
    finished = {ResultKey("films", "zero-shot", 1, 2)}
    results = evaluate_methods(model, tasks, tasks, methods, num_demonstrations=2, seeds=[1], finished=finished)
    assert [result.method for result in results] == ["in-context"]


def test_free_form_tasks_are_written_and_multi_choice_tasks_are_counted_by_accuracy(model):
    multi_choice = [
        Example("choice", "a film", "good", ("good", "bad")),
        Example("choice", "a food", "funny", ("funny", "very")),
        *examples("choice"),
    ]
    tasks = {"choice": multi_choice, "free": examples("free", ())}
    zero_shot = pick_methods(["zero-shot", "MEND"])
    results = list(evaluate_methods(model, tasks, tasks, zero_shot, num_demonstrations=2, seeds=[1]))
    assert {result.task: result.metric for result in results} == {"choice": "accuracy", "free": "rouge_l"}


def test_the_metric_is_the_tasks_and_not_that_of_the_queries_asked(model):
    multi_choice = [Example("choice", "a film", "good", ("good", word)) for word in ("bad", "funny", "very")]
    reordered = [Example("films", "good", "positive", OPTIONS), Example("films", "bad", "negative", OPTIONS[::-1])]
    tasks = {"choice": multi_choice, "films": reordered}
    methods = pick_methods(["zero-shot"])
    results = evaluate_methods(model, tasks, tasks, methods, num_demonstrations=1, seeds=[1], max_queries=1)
    assert {result.task: result.metric for result in results} == {"choice": "accuracy", "films": "macro_f1"}


def test_zero_shot_writing_is_the_bare_base_models_whatever_is_bound(model):
    examples_of_free = [Example("free", "a film", ""), Example("free", "bad", "")]
    for example in list(examples_of_free):  # the gold answers are what the bare base model writes
        with model.disable_adapter():
            answer = model.answer([example.input])[0].split("\n")[0]
        examples_of_free.append(Example("free", example.input, answer))
    tasks = {"free": examples_of_free[2:]}
    with model.use_demonstrations(SHOTS):
        [result] = evaluate_methods(model, tasks, tasks, pick_methods(["zero-shot"]), num_demonstrations=1, seeds=[1])
    assert result.score == pytest.approx(1)


def test_free_form_tasks_run_on_a_base_model_with_a_sliding_window(tiny_model, tokenizer):
    model = get_mend_model(tiny_model("mistral"), MendConfig(num_virtual_tokens=3), tokenizer).eval()
    tasks = {"free": examples("free", ())}
    methods = pick_methods(["in-context", "MEND"])
    results = list(evaluate_methods(model, tasks, tasks, methods, num_demonstrations=3, seeds=[1]))
    assert [result.metric for result in results] == ["rouge_l"] * 2


@pytest.mark.parametrize("numbers", [{"num_demonstrations": 0}, {"max_queries": 0}, {"batch_size": 0}])
def test_impossible_numbers_are_refused(model, numbers):
    tasks = {"films": examples("films")}
    with pytest.raises(ConfigError, match="raise them"):
        next(evaluate_methods(model, tasks, tasks, METHODS, **{"num_demonstrations": 2, **numbers}))


def test_a_task_without_queries_is_refused(model):
    with pytest.raises(DataError, match="films: leave it out"):
        next(evaluate_methods(model, {"films": examples("films")}, {"films": []}, METHODS, num_demonstrations=2))


@pytest.mark.parametrize("options", [("positive",), ("positive", "positive")])
def test_fewer_than_two_different_options_are_refused(model, options):
    films = [Example("films", "a bore", "positive", options)] * 2
    with pytest.raises(DataError, match="a bore' of films: correct the task's options"):
        next(evaluate_methods(model, {"films": films}, {"films": films}, METHODS, num_demonstrations=2))


def test_a_missing_package_is_named_before_anything_runs(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    monkeypatch.setattr(type(model), "distill", None)
    tasks = {"films": examples("films")}
    with pytest.raises(MissingExtraError, match=r'pip install "mend_hf\[eval\]"'):
        next(evaluate_methods(model, tasks, tasks, pick_methods(["MEND"]), num_demonstrations=2))


def test_too_few_training_examples_are_refused_before_anything_runs(model):
    tasks = {"films": examples("films")}
    with pytest.raises(DataError, match="ask for fewer demonstrations"):
        next(evaluate_methods(model, tasks, tasks, METHODS, num_demonstrations=16))


def test_a_task_without_a_training_side_is_refused(model):
    with pytest.raises(DataError, match="films: add them"):
        next(evaluate_methods(model, {}, {"films": examples("films")}, METHODS))


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match=r"among 'zero-shot', .*'in-context, cut', .*: correct the names"):
        pick_methods(["magic"])


def result(method, task, seed, score):
    return TaskResult(
        method=method, task=task, seed=seed, num_demonstrations=2, metric="accuracy", score=score,
        num_queries=1, prefix_slots=2, prefix_bytes=1_000_000, milliseconds_per_query=3.0, prepare_milliseconds=4.0,
    )  # fmt: skip


def test_summaries_average_seeds_then_tasks_and_name_the_worst_seed():
    results = [result("a", "x", 1, 0.2), result("a", "x", 2, 0.4), result("a", "y", 1, 0.6), result("a", "y", 2, 1.0)]
    [summary] = summarise(results)
    assert summary.score == pytest.approx((0.3 + 0.8) / 2)
    assert summary.worst_seed == pytest.approx((0.2 + 0.6) / 2)
    assert summary.spread == pytest.approx(0.15)
    assert task_rows(results) == [["task", "metric", "a"], ["x", "accuracy", "30.0"], ["y", "accuracy", "80.0"]]
    cells = to_markdown(method_rows([summary])).splitlines()[-1].strip("| ").split(" | ")
    assert cells[:2] + cells[3:] == ["a", "55.0", "40.0", "15.0", "2", "3"]
    assert summary.interval.low < summary.score < summary.interval.high


def test_results_of_unlike_demonstrations_are_never_averaged():
    few, many = result("a", "x", 1, 0.2), dataclasses.replace(result("a", "x", 1, 0.6), num_demonstrations=16)
    wrong = dataclasses.replace(few, score=0.0, variation="wrong labels")
    assert [(s.method, s.score) for s in summarise([few, many])] == [("a, k = 2", 0.2), ("a, k = 16", 0.6)]
    assert [s.method for s in summarise([few, wrong])] == ["a, as given", "a, wrong labels"]
    assert task_rows([few, many])[0] == ["task", "metric", "a, k = 2", "a, k = 16"]


@pytest.mark.parametrize(
    ("own", "other", "again", "kept"),
    [
        ((100, 5), (60, 20), 2, 3),  # 100 + 2 * 5 <= 2 * 80; 100 + 3 * 5 <= 60 + 3 * 20
        ((50, 5), (60, 20), 1, 0),
        ((100, 20), (60, 20), 2, float("inf")),
        ((100, 90), (60, 20), float("inf"), float("inf")),
    ],
)
def test_when_distilling_has_paid_off_is_worked_out_by_hand(own, other, again, kept):
    assert queries_to_pay_off(*own, *other, is_read_again=True) == again
    assert queries_to_pay_off(*own, *other, is_read_again=False) == kept


def test_the_cost_table_says_when_a_method_has_paid_off():
    text = dataclasses.replace(
        result("in-context", "x", 1, 0.5), prepare_milliseconds=60.0, milliseconds_per_query=20.0
    )
    distilled = dataclasses.replace(
        result("MEND", "x", 1, 0.5), prepare_milliseconds=100.0, milliseconds_per_query=5.0, flops_per_query=2.5e9
    )
    rows = cost_rows(summarise([text, distilled]))
    assert rows[1] == ["in-context", "1.0", "60", "", "", "", ""]
    assert rows[2] == ["MEND", "1.0", "100", "2.50", "", "2", "3"]


def test_a_table_of_all_methods_is_whole_in_80_columns():
    results = [result(method, "tweet_eval-stance_feminist", seed, 0.5) for method in METHODS for seed in (1, 2, 3)]
    tables = split_methods(task_rows(results))
    assert [name for rows in tables for name in rows[0][2:]] == list(METHODS)
    for rows in (method_rows(summarise(results)), cost_rows(summarise(results)), *tables):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(to_table(rows))
        text = console.export_text()
        assert "…" not in text
        heading = " ".join(text.split("─")[0].replace("-\n", " ").split())
        assert all(part in heading for name in rows[0] for part in name.replace("-", " ").split())
        assert all(row[2] in text and row[2] != "" for row in rows[1:])
        assert rows[1][0] in text
