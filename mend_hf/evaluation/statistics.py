"""How sure a score is: intervals over tasks and seeds, and whether one method differs from another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mend_hf.errors import DataError, import_extra
from mend_hf.evaluation.results import TaskResult

Scores = NDArray[np.float64]

_NUM_RESAMPLES = 10_000
_NUM_PERMUTATIONS = 2**14  # exact up to 14 tasks


@dataclass(frozen=True)
class Interval:
    """Between which values a mean lies in 95 of 100 resamples.

    Attributes:
        low: The 2.5th percentile.
        high: The 97.5th.
    """

    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """What one method has over another one, on the tasks and seeds that both have.

    Attributes:
        difference: Of the means over seeds, then over tasks.
        interval: Of that difference.
        p_value: How often a difference as large comes about when both are equal and chance alone decides which one is
            ahead on a task.
        num_tasks: How many tasks both have.
        num_pairs: How many results, of a task with a seed, both have.
    """

    difference: float
    interval: Interval
    p_value: float
    num_tasks: int
    num_pairs: int


def bootstrap_interval(scores: Scores, *, seed: int = 0) -> Interval:
    """Return the interval of the mean over tasks of the mean over seeds.

    Tasks and seeds are drawn anew with replacement, both, because another set of tasks and other demonstrations would
    have done as well (a pigeonhole bootstrap: Owen, 2007, arXiv 0712.1111).

    Args:
        scores (tasks, seeds): NaN where a task has not been run with a seed.
        seed: Fixes the resamples.
    """
    rng = np.random.default_rng(seed)
    num_tasks, num_seeds = scores.shape
    tasks = rng.multinomial(num_tasks, np.full(num_tasks, 1 / num_tasks), _NUM_RESAMPLES)  # [resamples, tasks]
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _NUM_RESAMPLES)  # [resamples, seeds]
    is_there = ~np.isnan(scores)
    weights = seeds @ is_there.T  # [resamples, tasks]: how many scores of a task were drawn
    with np.errstate(invalid="ignore"):
        of_tasks = (seeds @ np.where(is_there, scores, 0.0).T) / weights
    drawn = np.where(weights > 0, tasks, 0)
    total = drawn.sum(1)
    means = (drawn * np.nan_to_num(of_tasks)).sum(1)[total > 0] / total[total > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(low), float(high))


def make_table(results: Sequence[TaskResult]) -> Scores:
    """Return scores (tasks, seeds) of one method, NaN where one is missing."""
    tasks, seeds = _names(result.task for result in results), _names(result.seed for result in results)
    table = np.full((len(tasks), len(seeds)), np.nan)
    for result in results:
        table[tasks[result.task], seeds[result.seed]] = result.score
    return table


def compare_paired(own: Sequence[TaskResult], other: Sequence[TaskResult]) -> PairedComparison:
    """Return what a method has over another one.

    The p-value is that of a permutation test over tasks (two-sided): the signs of the tasks' differences change at
    random, in all ways up to 14 tasks.

    Args:
        own: Results of one method.
        other: Results of the other one; what only one of them has is left out.

    Raises:
        DataError: No task has been run by both with the same seed.
        MissingExtraError: scipy is not installed.
    """
    others = {(result.task, result.seed): result.score for result in other}
    pairs = [result for result in own if (result.task, result.seed) in others]
    if not pairs:
        raise DataError(
            "Expected results of both methods on the same tasks and seeds, got none in common: evaluate both with the "
            "same --tasks and --seeds."
        )
    table = make_table(pairs)
    tasks, seeds = _names(result.task for result in pairs), _names(result.seed for result in pairs)
    for result in pairs:
        table[tasks[result.task], seeds[result.seed]] -= others[result.task, result.seed]
    differences = np.nanmean(table, axis=1)
    p_value = _permute_signs(differences) if len(differences) > 1 else 1.0
    return PairedComparison(float(differences.mean()), bootstrap_interval(table), p_value, len(tasks), len(pairs))


def _permute_signs(differences: Scores) -> float:
    stats = import_extra("scipy.stats", "eval")
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=_NUM_PERMUTATIONS,
        rng=np.random.default_rng(0),
        vectorized=True,
    )
    return float(test.pvalue)


def _names(values: Iterable[object]) -> dict[object, int]:
    return {value: place for place, value in enumerate(dict.fromkeys(values))}
