"""Runs methods over tasks: demonstrations fixed by a seed, option scoring, one score a task, method and seed."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import get_args

import torch

from mend_hf.data.metaicl import Example, sample_demonstrations
from mend_hf.demonstrations import Demonstration
from mend_hf.errors import ConfigError, DataError, import_extra
from mend_hf.evaluation.channel import score_by_channel, swap_demonstrations
from mend_hf.evaluation.metrics import compute_metric
from mend_hf.evaluation.readers import Method, Reader
from mend_hf.evaluation.results import ResultKey, Scoring, TaskResult
from mend_hf.model import MendModel

SEEDS = (13, 21, 42, 87, 100)


def evaluate_methods(
    model: MendModel,
    train_tasks: Mapping[str, Sequence[Example]],
    test_tasks: Mapping[str, Sequence[Example]],
    methods: Mapping[str, Method],
    *,
    num_demonstrations: int = 16,
    seeds: Sequence[int] = SEEDS,
    max_queries: int | None = None,
    batch_size: int = 8,
    scoring: Scoring = "direct",
    finished: Collection[ResultKey] = (),
) -> Iterator[TaskResult]:
    """Yield a result for every task, seed and method.

    All methods get the same demonstrations, drawn from the task's training side, and the same queries.

    Args:
        model: Base model and distiller.
        train_tasks: Where demonstrations come from.
        test_tasks: Where queries come from; every task must be in `train_tasks` too.
        methods: By name.
        num_demonstrations: K.
        seeds: One set of demonstrations each.
        max_queries: Ask only so many of a task, the same ones for every seed; None: all.
        batch_size: Queries read at once.
        scoring: How likely an option is behind the input, or, "channel", the input behind an option; methods then read
            demonstrations whose input and output changed places.
        finished: Keys of results to pass over.

    Raises:
        ConfigError: A number is impossible, or there is no such scoring.
        DataError: A task has no queries, no training side, or fewer than `num_demonstrations` examples there; one has
            fewer than two options, or the same twice; or channel scoring is asked for a task without options.
        MissingExtraError: What computes a task's metric is not installed.
    """
    if num_demonstrations < 1 or batch_size < 1 or (max_queries is not None and max_queries < 1):
        raise ConfigError(
            "Expected 1 or more demonstrations, queries and rows of a batch, got "
            f"num_demonstrations={num_demonstrations}, max_queries={max_queries}, batch_size={batch_size}: raise them."
        )
    if scoring not in get_args(Scoring):
        raise ConfigError(f"Expected scoring to be {' or '.join(get_args(Scoring))}, got {scoring!r}.")
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
    metrics = {task: _pick_metric(examples) for task, examples in test_tasks.items()}
    for task, examples in test_tasks.items():
        _check_options(task, examples, metrics[task], scoring)
    if "macro_f1" in metrics.values():
        import_extra("sklearn.metrics", "eval")
    for task, examples in test_tasks.items():
        queries = random.Random(task).sample(list(examples), len(examples))[:max_queries]
        for seed in seeds:
            shots = sample_demonstrations(train_tasks[task], num_demonstrations, seed)
            demonstrations = [Demonstration(shot.input, shot.output) for shot in shots]
            if scoring == "channel":
                demonstrations = swap_demonstrations(demonstrations)
            for name, method in methods.items():
                key = ResultKey(task, name, seed, num_demonstrations, scoring)
                if key not in finished:
                    yield _run(model, method, metrics[task], key, demonstrations, queries, batch_size)


def _run(
    model: MendModel,
    method: Method,
    metric: str,
    key: ResultKey,
    demonstrations: list[Demonstration],
    queries: list[Example],
    batch_size: int,
) -> TaskResult:
    start = _measure_time(model)
    reader = method(model, demonstrations)
    prepared = _measure_time(model)
    if metric == "rouge_l":
        predictions = _write(reader, queries, batch_size)
    else:
        predictions = _choose(reader, queries, batch_size, key.scoring)
    done = _measure_time(model)
    return TaskResult(
        **key._asdict(),
        metric=metric,
        score=compute_metric(metric, predictions, [query.output for query in queries]),
        num_queries=len(queries),
        prefix_slots=reader.num_slots,
        prefix_bytes=reader.num_bytes,
        milliseconds_per_query=1000 * (done - prepared) / len(queries),
        prepare_milliseconds=1000 * (prepared - start),
    )


def _measure_time(model: MendModel) -> float:
    """Return the seconds on the clock once all that was asked of an accelerator is done."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _pick_metric(examples: Sequence[Example]) -> str:
    if not all(example.options for example in examples):
        return "rouge_l"
    return "macro_f1" if len({frozenset(example.options) for example in examples}) == 1 else "accuracy"


def _check_options(task: str, examples: Sequence[Example], metric: str, scoring: Scoring) -> None:
    if metric == "rouge_l":
        if scoring == "channel":
            raise DataError(
                f"Expected options to choose from for channel scoring, got the free-form task {task}: leave it out, "
                'or use scoring="direct".'
            )
        return
    for example in examples:
        if len(example.options) < 2 or len(set(example.options)) < len(example.options):
            raise DataError(
                f"Expected two or more different options to choose from, got {list(example.options)!r} for "
                f"{example.input!r} of {task}: correct the task's options."
            )


def _choose(reader: Reader, queries: Sequence[Example], batch_size: int, scoring: Scoring) -> list[str]:
    inputs, options = [query.input for query in queries], [query.options for query in queries]
    if scoring == "channel":
        scores = score_by_channel(reader, inputs, options, batch_size=batch_size)
    else:
        scores = reader.score_options(inputs, options, batch_size=batch_size)
    return [query.options[row.index(max(row))] for query, row in zip(queries, scores, strict=True)]


def _write(reader: Reader, queries: Sequence[Example], batch_size: int) -> list[str]:
    return reader.generate([query.input for query in queries], batch_size=batch_size)
