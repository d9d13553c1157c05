"""Partitions load, and no task is on two sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from mend_hf.data.partition import Partition, check_disjoint, hold_out_tasks, list_partitions, load_partition
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
        ('{"train": [', r"got text that is no JSON \(Expecting value: .*\): check the path and the file"),
    ],
)
def test_a_bad_partition_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "partition.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_partition(path)


def test_the_seven_settings_come_with_the_package_and_share_no_task_between_their_sides() -> None:
    names = list_partitions()
    assert names == [
        "class_to_class", "hr_to_lr", "non_class_to_class", "non_nli_to_nli", "non_paraphrase_to_paraphrase",
        "non_qa_to_qa", "qa_to_qa",
    ]  # fmt: skip
    sizes = [(len(sides.train), len(sides.test)) for sides in map(load_partition, names)]  # loading checks the rest
    assert sizes == [(70, 18), (91, 26), (66, 18), (86, 6), (89, 4), (80, 14), (31, 14)]
    # Settings with the same target have the same test tasks; a substring of a name is another task.
    assert load_partition("class_to_class").test == load_partition("non_class_to_class").test
    assert load_partition("qa_to_qa").test == load_partition("non_qa_to_qa").test


def test_an_unknown_setting_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(DataError, match=r"class_to_class, hr_to_lr, .* or a JSON file, got 'class_to_clas'"):
        load_partition("class_to_clas")


def test_a_task_named_twice_is_refused() -> None:
    with pytest.raises(DataError, match="Expected every task once, got b twice"):
        Partition(("a",), ("b", "c", "b"))


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
