"""Runs methods over tasks: demonstrations fixed by a seed, one score a task, method and seed."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import get_args

from mend_hf.data.metaicl import Example, sample_demonstrations
from mend_hf.errors import ConfigError, DataError, import_extra
from mend_hf.evaluation.asking import Questions, run_method
from mend_hf.evaluation.channel import swap_demonstrations
from mend_hf.evaluation.methods import zero_shot
from mend_hf.evaluation.metrics import check_metric
from mend_hf.evaluation.readers import Method
from mend_hf.evaluation.results import ResultKey, Scoring, TaskResult
from mend_hf.evaluation.variations import AS_GIVEN, OTHER_FORMAT, vary
from mend_hf.model import MendModel

SEEDS = (13, 21, 42, 87, 100)

_BESIDE = {"macro_f1": ("accuracy",), "rouge_l": ("exact_match",)}

Tasks = Mapping[str, Sequence[Example]]


def evaluate_methods(
    model: MendModel,
    train_tasks: Tasks,
    test_tasks: Tasks,
    methods: Mapping[str, Method],
    *,
    num_demonstrations: int | Sequence[int] = 16,
    seeds: Sequence[int] = SEEDS,
    variations: Sequence[str] = (AS_GIVEN,),
    max_queries: int | None = None,
    batch_size: int = 8,
    scoring: Scoring = "direct",
    metric: str | None = None,
    finished: Collection[ResultKey] = (),
    share: tuple[int, int] = (0, 1),
) -> Iterator[TaskResult]:
    """Check what is asked for, and return results as they come: one for every task, seed and method.

    All methods get the same demonstrations, drawn from the task's training side, and the same queries.

    Args:
        model: Base model and distiller.
        train_tasks: Where demonstrations come from.
        test_tasks: Where queries come from; every task must be in `train_tasks` too.
        methods: By name.
        num_demonstrations: K, or several; fewer are the first of more.
        seeds: One set of demonstrations each.
        variations: How demonstrations are changed, names of `VARIATIONS`.
        max_queries: Ask only so many of a task, the same ones for every seed; None: all.
        batch_size: Queries read at once.
        scoring: How likely an option is behind the input, or, "channel", the input behind an option; methods then read
            demonstrations whose input and output changed places.
        metric: One of `METRICS` for all tasks; None: macro-F1 where all examples of a task have the same options,
            accuracy where they have not, ROUGE-L where there are none.
        finished: Keys of results to pass over.
        share: This process's number and how many there are: each takes its part of the tasks and seeds.

    Raises:
        ConfigError: A number is impossible, or there is no such scoring, metric or variation.
        DataError: A task has no queries, no training side, or fewer than `num_demonstrations` examples there; one has
            fewer than two options, or the same twice; or channel scoring is asked for a task without options.
        MissingExtraError: What computes a task's metric is not installed.
    """
    counts = [num_demonstrations] if isinstance(num_demonstrations, int) else [*num_demonstrations]
    if min([*counts, batch_size, 1 if max_queries is None else max_queries]) < 1 or not counts:
        raise ConfigError(
            "Expected 1 or more demonstrations, queries and rows of a batch, got "
            f"num_demonstrations={num_demonstrations}, max_queries={max_queries}, batch_size={batch_size}: raise them."
        )
    if scoring not in get_args(Scoring):
        raise ConfigError(f"Expected scoring to be {' or '.join(get_args(Scoring))}, got {scoring!r}.")
    _check_tasks(train_tasks, test_tasks, max(counts))
    questions = {
        task: _make_questions(task, examples, metric, max_queries, scoring) for task, examples in test_tasks.items()
    }
    if any("macro_f1" in (each.metric, *each.other_metrics) for each in questions.values()):
        import_extra("sklearn.metrics", "eval")
    for task, variation in itertools.product(test_tasks, variations):
        vary(train_tasks[task][:1], variation, seed=0)
    part = list(itertools.product(test_tasks, seeds))[share[0] :: share[1]]

    # What reads no demonstrations is asked once a task, and once more where the queries are written otherwise.
    without_demonstrations: dict[tuple[str, bool], TaskResult] = {}

    def run() -> Iterator[TaskResult]:
        for (task, seed), count, variation in itertools.product(part, counts, variations):
            demonstrations = vary(sample_demonstrations(train_tasks[task], count, seed), variation, seed)
            if scoring == "channel":
                demonstrations = swap_demonstrations(demonstrations)
            for name, method in methods.items():
                key = ResultKey(task, name, seed, count, scoring, variation)
                if key in finished:
                    continue
                asked = (task, variation == OTHER_FORMAT)
                without = without_demonstrations.get(asked) if method is zero_shot else None
                if without is not None:
                    yield dataclasses.replace(without, **key._asdict())
                    continue
                result = run_method(model, method, demonstrations, questions[task], key, batch_size=batch_size)
                if method is zero_shot:
                    without_demonstrations[asked] = result
                yield result

    return run()


def _check_tasks(train_tasks: Tasks, test_tasks: Tasks, num_demonstrations: int) -> None:
    empty = sorted(task for task, examples in test_tasks.items() if not examples)
    if empty:
        raise DataError(f"Expected test examples of every task, got none of {', '.join(empty)}: leave it out.")
    missing = sorted(set(test_tasks) - set(train_tasks))
    if missing:
        raise DataError(f"Expected training examples of every test task, got none of {', '.join(missing)}: add them.")
    for task in test_tasks:
        if len(train_tasks[task]) < num_demonstrations:
            raise DataError(
                f"Expected at least {num_demonstrations} training examples of {task}, got {len(train_tasks[task])}: "
                "ask for fewer demonstrations or leave the task out."
            )


def _make_questions(
    task: str, examples: Sequence[Example], metric: str | None, max_queries: int | None, scoring: Scoring
) -> Questions:
    is_free_form = not all(example.options for example in examples)
    if is_free_form and scoring == "channel":
        raise DataError(
            f"Expected options to choose from for channel scoring, got the free-form task {task}: leave it out, or "
            'use scoring="direct".'
        )
    for example in () if is_free_form else examples:
        if len(example.options) < 2 or len(set(example.options)) < len(example.options):
            raise DataError(
                f"Expected two or more different options to choose from, got {list(example.options)!r} for "
                f"{example.input!r} of {task}: correct the task's options."
            )
    has_classes = not is_free_form and len({frozenset(example.options) for example in examples}) == 1
    own_metric = "rouge_l" if is_free_form else "macro_f1" if has_classes else "accuracy"
    check_metric(metric or own_metric)
    return Questions(
        queries=random.Random(task).sample(list(examples), len(examples))[:max_queries],
        metric=metric or own_metric,
        other_metrics=_BESIDE.get(metric or own_metric, ()),
        is_free_form=is_free_form,
        labels=examples[0].options if has_classes else None,
    )
