from __future__ import annotations

import numpy as np
import pytest

from mend_hf.errors import DataError
from mend_hf.evaluation.results import TaskResult
from mend_hf.evaluation.statistics import bootstrap_interval, compare_paired, make_table


def result(method, task, seed, score):
    return TaskResult(
        method=method, task=task, seed=seed, num_demonstrations=2, metric="accuracy", score=score,
        num_queries=1, prefix_slots=2, prefix_bytes=1_000_000, milliseconds_per_query=3.0, prepare_milliseconds=4.0,
    )  # fmt: skip


def results(method, table):
    return [result(method, f"task {i}", j, score) for i, row in enumerate(table) for j, score in enumerate(row)]


def test_equal_scores_have_no_width():
    interval = bootstrap_interval(np.full((4, 3), 0.4))
    assert (interval.low, interval.high) == pytest.approx((0.4, 0.4))


def test_the_interval_of_two_tasks_is_worked_out_by_hand():
    # one seed: of two tasks with 0 and 1, a resample has mean 0 (1/4), 1/2 (1/2) or 1 (1/4)
    interval = bootstrap_interval(np.array([[0.0], [1.0]]))
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_the_interval_is_that_of_the_normal_distribution_where_that_is_known():
    rng = np.random.default_rng(1)
    scores = rng.normal(0.5, 0.1, (200, 1))
    interval = bootstrap_interval(scores)
    error = scores.std() / np.sqrt(200)
    assert interval.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.1 * error)


def test_seeds_widen_the_interval_as_tasks_do():
    by_task, by_seed = np.array([[0.2, 0.2], [0.6, 0.6]]), np.array([[0.2, 0.6], [0.2, 0.6]])
    assert bootstrap_interval(by_task) == bootstrap_interval(by_seed)
    assert bootstrap_interval(by_seed).high > bootstrap_interval(by_seed).low


def test_a_missing_score_is_left_out_and_counts_as_nothing():
    scores = np.array([[0.4, np.nan], [0.4, 0.4], [np.nan, 0.4]])
    interval = bootstrap_interval(scores)
    assert (interval.low, interval.high) == pytest.approx((0.4, 0.4))
    table = make_table([result("a", "x", 1, 0.1), result("a", "y", 2, 0.2)])
    assert np.isnan(table).tolist() == [[False, True], [True, False]]


def test_a_paired_comparison_is_worked_out_by_hand():
    own = results("a", [[0.5, 0.7], [0.6, 0.8], [0.4, 0.6]])
    other = results("b", [[0.4, 0.6], [0.5, 0.5], [0.3, 0.5]])
    compared = compare_paired(own, other)
    assert compared.difference == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    # of the eight ways to give three differences signs, two have a mean as large: all plus, all minus
    assert compared.p_value == pytest.approx(2 / 8)
    assert compared.num_tasks == 3
    assert compared.interval.low == pytest.approx(0.1)
    back = compare_paired(other, own)
    assert (back.difference, back.p_value) == pytest.approx((-compared.difference, compared.p_value))


def test_only_what_both_have_is_compared():
    own = results("a", [[0.5, 0.7], [0.6, 0.8]])
    other = results("b", [[0.4]])
    assert compare_paired(own, other).difference == pytest.approx(0.1)
    with pytest.raises(DataError, match="evaluate both with the same"):
        compare_paired(own, [result("b", "another task", 0, 0.5)])


def test_equal_methods_do_not_differ():
    own = results("a", [[0.5], [0.7], [0.2], [0.9]])
    other = results("b", [[0.7], [0.5], [0.9], [0.2]])
    compared = compare_paired(own, other)
    assert compared.difference == pytest.approx(0.0)
    assert compared.p_value == pytest.approx(1.0)
