"""Tasks in MetaICL's format: every layout loads, every row is fixed by the seed, and bad input is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mend_hf.data.metaicl import (
    Example,
    check_test_names,
    load_tasks,
    sample_demonstrations,
)
from mend_hf.errors import DataError


def make_row(task: str, number: int, **fields: Any) -> dict[str, Any]:
    row = {"task": task, "input": f"{task} {number}", "output": "yes", "options": ["yes", "no"]}
    return row | fields


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_bytes(zstandard.compress(lines) if path.suffix == ".zst" else lines)
    return path


def make_tasks(**sizes: int) -> dict[str, list[Example]]:
    return {
        task: [Example(task, f"{task} {number}", f"answer {number}") for number in range(size)]
        for task, size in sizes.items()
    }


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst", "parquet"])
@pytest.mark.parametrize(
    "layout", ["{task}.{split}.{ending}", "tasks/{task}.{split}.{ending}", "{task}/{split}.{ending}"]
)
def test_a_folder_of_task_files_loads(tmp_path: Path, layout: str, ending: str) -> None:
    names = ("unifiedqa:mctest", "glue-sst2")
    for task in names:
        for split in ("train", "test"):
            rows = [make_row(task, 1, output=split, options=[]), make_row(task, 2)]
            write_rows(tmp_path / layout.format(task=task, split=split, ending=ending), rows)
    tasks = load_tasks(tmp_path, split="test")
    assert list(tasks) == sorted(names)
    assert tasks["unifiedqa:mctest"] == [
        Example("unifiedqa:mctest", "unifiedqa:mctest 1", "test", ()),
        Example("unifiedqa:mctest", "unifiedqa:mctest 2", "yes", ("yes", "no")),
    ]
    assert list(load_tasks(tmp_path, tasks=["glue-sst2"])) == ["glue-sst2"]


def test_a_single_table_is_grouped_by_its_task_column(tmp_path: Path) -> None:
    rows = [make_row(task, 1, split=split, seed=seed) for seed in "13" for task in "ba" for split in ("train", "test")]
    path = write_rows(tmp_path / "all.parquet", rows)
    once = {task: [Example(task, f"{task} 1", "yes", ("yes", "no"))] for task in ("a", "b")}
    assert load_tasks(path, split="test") == once
    assert load_tasks(path, tasks=["b"]) == {"b": once["b"]}


def test_the_layout_of_metaicl_on_the_hub_loads(tmp_path: Path) -> None:
    def write_split(name: str, rows: Sequence[dict[str, Any]]) -> None:
        write_rows(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet", rows)

    write_split("meta_train", [make_row("a", 1, seed="100", split="train")])
    few_shot = [make_row("b", number, seed="13", split=split) for number, split in enumerate(("train", "dev", "test"))]
    write_split("meta_eval_100shot", [*few_shot, few_shot[-1] | {"seed": "21"}])
    write_split("meta_eval", few_shot)
    hub: dict[str, Any] = {"name_or_path": tmp_path / "hub", "cache_dir": str(tmp_path / "cache")}

    def load_inputs(split: str) -> dict[str, list[str]]:
        return {name: [example.input for example in task] for name, task in load_tasks(split=split, **hub).items()}

    assert load_inputs("train") == {"a": ["a 1"], "b": ["b 0"]}
    assert load_inputs("test") == {"b": ["b 2"]}
    assert load_inputs("meta_eval") == {"b": ["b 0", "b 1", "b 2"]}


def test_a_hub_data_set_without_the_split_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "hub" / "train.jsonl", [make_row("a", 1)])
    with pytest.raises(DataError, match=r"split 'test' in .*got train: name one of these"):
        load_tasks(tmp_path / "hub", split="test", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"output": "maybe"}, "output among the options .*'maybe': add or correct it"),
        ({"output": 1}, "'output' to be a string, got 1: convert it to text"),
        ({"options": ["yes", "no", "yes"]}, "options that differ, .*remove the repeated ones"),
        ({"options": "yes"}, "list of strings, got 'yes': convert them to text"),
        ({"task": "b"}, "expected the task 'a' of the file's name, got 'b': rename the file"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_rows(tmp_path / "a.train.jsonl", [make_row("a", 1), make_row("a", 2) | row])
    with pytest.raises(DataError, match=rf"a\.train\.jsonl:2: .*{message}"):
        load_tasks(tmp_path)


def test_a_missing_field_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "all.jsonl", [{"input": "x", "output": "y"}])
    with pytest.raises(
        DataError, match=r"all\.jsonl:1: expected a field 'task', .*or rename it, .*TASK\.train\.jsonl"
    ):
        load_tasks(path)


def test_an_unknown_task_is_answered_with_the_nearest_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "glue-sst2.train.jsonl", [make_row("glue-sst2", 1)])
    with pytest.raises(DataError, match=r"'glue-sts2' \(nearest: glue-sst2\); 'xyz': correct or remove the names"):
        load_tasks(tmp_path, tasks=["glue-sts2", "xyz"])


@pytest.mark.parametrize("layout", ["folder", "table"])
def test_an_unknown_test_task_is_answered_with_the_nearest_names(tmp_path: Path, layout: str) -> None:
    sides = [("a", "train"), ("a", "test"), ("glue-sst2", "train"), ("glue-sst2", "test")]
    rows = [make_row(task, 1, split=split) for task, split in sides]
    place = tmp_path if layout == "folder" else write_rows(tmp_path / "all.jsonl", rows)
    for row in rows if layout == "folder" else []:
        write_rows(tmp_path / f"{row['task']}.{row['split']}.jsonl", [row])
    check_test_names(place, ["glue-sst2"], training=["a"])
    with pytest.raises(
        DataError, match=r"2 tasks with a 'test' split .*'glue-sts2' \(nearest: glue-sst2\): correct or"
    ):
        check_test_names(place, ["glue-sts2"], training=["a"])
    check_test_names(place, ["elsewhere"], training=["a", "glue-sst2"])


def test_test_tasks_may_live_elsewhere(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.train.jsonl", [make_row("a", 1)])
    for place in (tmp_path, path, "someone/data"):
        check_test_names(place, ["elsewhere"], training=["a"])


def test_a_folder_without_the_split_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.train.jsonl", [make_row("a", 1)])
    with pytest.raises(DataError, match="name another split or source"):
        load_tasks(tmp_path, split="test")


def test_an_empty_task_file_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.train.jsonl", [])
    with pytest.raises(DataError, match=r"a\.train\.jsonl, got an empty file: add some or remove it"):
        load_tasks(tmp_path)


def test_two_files_for_one_task_are_refused(tmp_path: Path) -> None:
    for ending in ("jsonl", "parquet"):
        write_rows(tmp_path / f"a.train.{ending}", [make_row("a", 1)])
    with pytest.raises(DataError, match=r"one file for a .*remove one"):
        load_tasks(tmp_path)


def test_sampled_demonstrations_are_fixed_by_the_seed_and_nested() -> None:
    examples = make_tasks(a=20)["a"]
    sixteen = sample_demonstrations(examples, 16, seed=13)
    assert [example.output for example in sixteen[:3]] == ["answer 19", "answer 1", "answer 6"]
    assert sample_demonstrations(examples, 4, seed=13) == sixteen[:4]
    assert sample_demonstrations(examples, 16, seed=21) != sixteen
    with pytest.raises(DataError, match="ask for fewer demonstrations"):
        sample_demonstrations(examples, 21, seed=13)
