"""Tasks in MetaICL's format: every layout loads, every row is fixed by the seed, and bad input is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mend_hf.data.metaicl import (
    Example,
    FewShotDataset,
    Partition,
    load_partition,
    load_tasks,
    sample_demonstrations,
)
from mend_hf.errors import ConfigError, DataError


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


def list_rows(dataset: FewShotDataset) -> list[dict[str, Any]]:
    return [dataset[index] for index in range(len(dataset))]


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
    with pytest.raises(DataError, match=r"all\.jsonl:1: expected a field 'task', .*add or rename it"):
        load_tasks(path)


def test_an_unknown_task_is_answered_with_the_nearest_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "glue-sst2.train.jsonl", [make_row("glue-sst2", 1)])
    with pytest.raises(DataError, match=r"'glue-sts2' \(nearest: glue-sst2\); 'xyz': correct or remove the names"):
        load_tasks(tmp_path, tasks=["glue-sts2", "xyz"])


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


def test_sampled_demonstrations_are_fixed_by_the_seed_and_nested() -> None:
    examples = make_tasks(a=20)["a"]
    sixteen = sample_demonstrations(examples, 16, seed=13)
    assert [example.output for example in sixteen[:3]] == ["answer 19", "answer 1", "answer 6"]
    assert sample_demonstrations(examples, 4, seed=13) == sixteen[:4]
    assert sample_demonstrations(examples, 16, seed=21) != sixteen
    with pytest.raises(DataError, match="ask for fewer demonstrations"):
        sample_demonstrations(examples, 21, seed=13)


def test_a_few_shot_row_is_the_same_in_every_process() -> None:
    tasks = make_tasks(b=5, a=9)
    row = FewShotDataset(tasks, num_demonstrations=2, num_rows=5, seed=7)[3]
    assert row == {
        "task": "b",
        "demonstrations": [{"input": "b 0", "output": "answer 0"}, {"input": "b 1", "output": "answer 1"}],
        "query": "b 2",
        "target": "answer 2",
        "options": [],
    }
    reordered = dict(sorted(tasks.items()))
    assert FewShotDataset(reordered, num_demonstrations=2, num_rows=9, seed=7)[3] == row


def test_no_example_stands_twice_in_a_few_shot_row() -> None:
    dataset = FewShotDataset(
        make_tasks(a=9, b=90), num_demonstrations=(3, 6), queries_per_demonstrations=3, num_rows=200, seed=0
    )
    rows = list_rows(dataset)
    for row in rows:
        inputs = [demonstration["input"] for demonstration in row["demonstrations"]] + row["query"]
        assert len(set(inputs)) == len(inputs)
        assert len(row["target"]) == len(row["options"]) == 3
    assert {len(row["demonstrations"]) for row in rows} == {3, 4, 5, 6}
    assert 70 < Counter(row["task"] for row in rows)["a"] < 130


def test_tasks_with_too_few_examples_are_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"2 of 3 tasks have fewer than 5 examples and are left out: b, c\."):
        dataset = FewShotDataset(make_tasks(c=4, a=5, b=1), num_demonstrations=(1, 4), num_rows=3, seed=0)
    assert {row["task"] for row in list_rows(dataset)} == {"a"}
    with pytest.raises(DataError, match="none among 1 tasks: ask for fewer demonstrations or add examples"):
        FewShotDataset(make_tasks(a=5), num_demonstrations=5, num_rows=3, seed=0)


@pytest.mark.parametrize("settings", [{"num_demonstrations": (4, 2)}, {"num_rows": 0}])
def test_impossible_numbers_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"give a range as \(low, high\)"):
        FewShotDataset(make_tasks(a=20), **{"num_rows": 1, "seed": 0} | settings)


class TestRenamedLabels:
    def rows(self, tasks, **fractions):
        dataset = FewShotDataset(
            tasks, num_demonstrations=3, queries_per_demonstrations=2, num_rows=40, seed=5, **fractions
        )
        return [dataset[index] for index in range(len(dataset))]

    @pytest.fixture
    def tasks(self):
        labels = ("good", "bad", "so so")
        return {"mood": [Example("mood", f"text {i}", labels[i % 3], labels) for i in range(12)]}

    def renaming(self, row):
        """Which label stands for which, read off the row's own examples."""
        labels = ("good", "bad", "so so")
        pairs = [(item["input"], item["output"]) for item in row["demonstrations"]]
        pairs += [*zip(row["query"], row["target"], strict=True)]
        return {(labels[int(text.split()[1]) % 3], output) for text, output in pairs}

    @pytest.mark.parametrize("fraction", ["permute_labels", "symbol_labels"])
    def test_a_label_has_one_name_in_the_whole_row_and_is_an_option(self, tasks, fraction):
        for row in self.rows(tasks, **{fraction: 1.0}):
            names = self.renaming(row)
            assert len({before for before, _ in names}) == len({after for _, after in names}) == len(names)
            assert all(target in options for target, options in zip(row["target"], row["options"], strict=True))

    def test_permuted_labels_are_the_tasks_own_and_symbols_are_not(self, tasks):
        permuted = {after for row in self.rows(tasks, permute_labels=1.0) for _, after in self.renaming(row)}
        symbols = {after for row in self.rows(tasks, symbol_labels=1.0) for _, after in self.renaming(row)}
        assert permuted == {"good", "bad", "so so"}
        assert not symbols & permuted

    def test_only_a_fraction_of_the_rows_changes_and_the_examples_stay(self, tasks):
        plain, mixed = self.rows(tasks), self.rows(tasks, permute_labels=0.3, symbol_labels=0.2)
        assert [row["query"] for row in plain] == [row["query"] for row in mixed]
        num_changed = sum(row != other for row, other in zip(plain, mixed, strict=True))
        assert 8 <= num_changed <= 28
        assert self.rows(tasks, permute_labels=0.0) == plain

    def test_free_form_tasks_and_options_of_their_own_stay(self):
        free = {"free": [Example("free", f"text {i}", f"answer {i}") for i in range(8)]}
        own = {"own": [Example("own", f"text {i}", f"a{i}", (f"a{i}", f"b{i}")) for i in range(8)]}
        for tasks in (free, own):
            assert self.rows(tasks, permute_labels=1.0) == self.rows(tasks) == self.rows(tasks, symbol_labels=1.0)

    def test_impossible_fractions_are_refused(self, tasks):
        with pytest.raises(ConfigError, match="at most 1 together"):
            self.rows(tasks, permute_labels=0.7, symbol_labels=0.7)


class TestBalancedQueries:
    @pytest.fixture
    def tasks(self):
        outputs = ["common"] * 90 + ["rare"] * 10
        return {"task": [Example("task", f"text {i}", output, ("common", "rare")) for i, output in enumerate(outputs)]}

    def targets(self, tasks, balance_queries):
        dataset = FewShotDataset(
            tasks,
            num_demonstrations=4,
            queries_per_demonstrations=4,
            num_rows=50,
            seed=3,
            balance_queries=balance_queries,
        )
        rows = [dataset[index] for index in range(len(dataset))]
        for row in rows:
            shown = [item["input"] for item in row["demonstrations"]]
            assert len({*shown, *row["query"]}) == 8
        return Counter(target for row in rows for target in row["target"])

    def test_every_answer_is_equally_likely(self, tasks):
        assert 0.4 < self.targets(tasks, True)["rare"] / 200 < 0.6
        assert self.targets(tasks, False)["rare"] / 200 < 0.2

    def test_an_answer_that_runs_out_is_drawn_no_more(self):
        examples = [Example("task", f"text {i}", "rare" if i == 0 else "common") for i in range(8)]
        assert sum(self.targets({"task": examples}, True).values()) == 200
