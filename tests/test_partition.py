"""Partitions load, and no task is on two sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from mend_hf.data.partition import Partition, check_disjoint, hold_out_tasks, load_partition
from mend_hf.errors import ConfigError, DataError


def test_a_partition_file_loads_without_its_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    path.write_text('{"train": ["a", "b"], "test": ["c"], "unseen_domain_test": []}')
    assert load_partition(path) == Partition(("a", "b"), ("c",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["a", "b"], "test": ["b", "c"]}', "got b on both sides: remove each from one"),
        ('{"train": ["a"]}', "write both lists"),
        ('{"train": [', "check the path and the file"),
    ],
)
def test_a_bad_partition_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "partition.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_partition(path)


def test_tasks_on_two_of_three_sides_are_named() -> None:
    check_disjoint(training=["a", "b"], evaluation=["c"], test=["d"])
    with pytest.raises(DataError, match="evaluation and test tasks to differ, got c, d on both sides: remove each"):
        check_disjoint(training=["a", "b"], evaluation=["d", "c"], test=["c", "d", "e"])


def test_held_out_tasks_are_fixed_by_the_seed_and_nested() -> None:
    names = [f"task {number}" for number in range(20)]
    held_out = hold_out_tasks(names, 6, seed=1)
    assert held_out == hold_out_tasks(reversed(names), 6, seed=1) == sorted({*held_out})
    assert len(held_out) == 6
    assert {*held_out} < {*names}
    assert {*hold_out_tasks(names, 3, seed=1)} < {*held_out}
    assert held_out != hold_out_tasks(names, 6, seed=2)


def test_held_out_tasks_are_spread_over_the_groups() -> None:
    groups = {
        f"{kind} {number}": kind for kind, size in (("qa", 17), ("nli", 2), ("topic", 1)) for number in range(size)
    }
    for seed in range(5):
        held_out = hold_out_tasks(groups, 5, seed=seed, groups=groups)
        assert sorted(groups[name] for name in held_out) == ["nli", "nli", "qa", "qa", "topic"]


def test_test_tasks_are_never_held_out_and_a_task_must_be_left() -> None:
    with pytest.raises(DataError, match="got b on both sides"):
        hold_out_tasks(["a", "b"], 1, seed=0, test_tasks=["b"])
    with pytest.raises(ConfigError, match="2 training tasks, got 2: hold out fewer"):
        hold_out_tasks(["a", "b"], 2, seed=0)
