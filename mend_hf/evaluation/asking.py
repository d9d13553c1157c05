"""One method on one task: the demonstrations are read, the queries asked, and what that cost is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from mend_hf.data.metaicl import Example
from mend_hf.evaluation.channel import score_by_channel
from mend_hf.evaluation.comparison import BoundMethod
from mend_hf.evaluation.costs import count_flops
from mend_hf.evaluation.metrics import compute_metric
from mend_hf.evaluation.readers import Demonstrations, Method, Reader
from mend_hf.evaluation.results import ResultKey, Scoring, TaskResult
from mend_hf.evaluation.variations import in_format_of
from mend_hf.model import MendModel
from mend_hf.scoring import batch_by_length


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What all methods are asked on one task.

    Attributes:
        queries: With their options and gold answers.
        metric: The score's name.
        other_metrics: Scores beside it.
        is_free_form: Answers are written and not chosen.
        labels: The options of classification, all that F1 is averaged over at most; None: of other tasks.
    """

    queries: Sequence[Example]
    metric: str
    other_metrics: tuple[str, ...]
    is_free_form: bool
    labels: tuple[str, ...] | None


def run_method(
    model: MendModel,
    method: Method,
    demonstrations: Demonstrations,
    questions: Questions,
    key: ResultKey,
    *,
    batch_size: int,
) -> TaskResult:
    """Return what a method reaches.

    Time and operations are those of the model at work: of another one where the method brings its own.

    Args:
        model: What is evaluated.
        method: Reads the demonstrations.
        demonstrations: Of the task.
        questions: About it.
        key: What the result is to be known by.
        batch_size: Queries read at once.
    """
    own = method.model if isinstance(method, BoundMethod) else model
    queries = questions.queries
    predictions, milliseconds = [""] * len(queries), []
    with in_format_of(key.variation, own):
        with count_flops(own) as preparing:
            start = _measure_time(own)
            reader = method(model, demonstrations).for_labels(questions.labels)
            prepared = _measure_time(own)
        with count_flops(own) as asking:
            for rows in _make_batches(own, questions, key.scoring, batch_size):
                before = _measure_time(own)
                part = [queries[row] for row in rows]
                answers = _answer(reader, part, questions.is_free_form, key.scoring, batch_size)
                milliseconds.append(1000 * (_measure_time(own) - before) / len(rows))
                for row, answer in zip(rows, answers, strict=True):
                    predictions[row] = answer
    gold = [query.output for query in queries]
    score, *others = (
        compute_metric(name, predictions, gold, labels=questions.labels)
        for name in (questions.metric, *questions.other_metrics)
    )
    return TaskResult(
        **key._asdict(),
        metric=questions.metric,
        score=score,
        other_scores=dict(zip(questions.other_metrics, others, strict=True)),
        num_queries=len(queries),
        num_unanswerable=sum(bool(query.options) and query.output not in query.options for query in queries),
        prefix_slots=reader.num_slots,
        prefix_bytes=reader.num_bytes,
        milliseconds_per_query=median(milliseconds),
        prepare_milliseconds=1000 * (prepared - start),
        flops_per_query=_known(asking.total / len(queries)),
        prepare_flops=_known(preparing.total),
    )


def _make_batches(model: MendModel, questions: Questions, scoring: Scoring, batch_size: int) -> list[list[int]]:
    """Return the queries' indices; channel scoring turns options and queries around, and needs them all at once."""
    if scoring == "channel":
        return [[*range(len(questions.queries))]]
    return batch_by_length(model, [query.input for query in questions.queries], batch_size)


def _answer(
    reader: Reader, queries: Sequence[Example], is_free_form: bool, scoring: Scoring, batch_size: int
) -> list[str]:
    inputs, options = [query.input for query in queries], [query.options for query in queries]
    if is_free_form:
        return reader.generate(inputs, batch_size=batch_size)
    score = score_by_channel if scoring == "channel" else type(reader).score_options
    scores = score(reader, inputs, options, batch_size=batch_size)
    return [choices[row.index(max(row))] for choices, row in zip(options, scores, strict=True)]


def _measure_time(model: MendModel) -> float:
    """Return the seconds on the clock once all that was asked of an accelerator is done."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _known(count: float) -> float | None:
    return None if math.isnan(count) else count
