"""Few-shot rows: each is fixed by the seed, tasks are drawn as often as asked, and bad input is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mend_hf.data.few_shot import FewShotDataset, mixing_weights
from mend_hf.data.metaicl import Example
from mend_hf.errors import ConfigError, DataError


def make_tasks(**sizes: int) -> dict[str, list[Example]]:
    return {
        task: [Example(task, f"{task} {number}", f"answer {number}") for number in range(size)]
        for task, size in sizes.items()
    }


def list_rows(dataset: FewShotDataset) -> list[dict[str, Any]]:
    return [dataset[index] for index in range(len(dataset))]


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


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"num_demonstrations": (4, 2)}, r"give a range as \(low, high\), here \(2, 4\)"),
        ({"num_demonstrations": 0}, "got 0: raise it"),
        ({"num_demonstrations": (0, 2)}, r"got \(0, 2\): raise it"),
        ({"queries_per_demonstrations": 0}, "got 0: raise it"),
        ({"num_rows": 0}, "got 0: raise it"),
    ],
)
def test_the_one_impossible_number_is_named(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"Expected {next(iter(settings))} .*{remedy}") as refused:
        FewShotDataset(make_tasks(a=20), **{"num_rows": 1, "seed": 0} | settings)
    names = ("num_rows", "queries_per_demonstrations", "num_demonstrations")
    assert [name for name in names if name in str(refused.value)] == [*settings]


class TestMixing:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, (1 / 3, 1 / 3, 1 / 3)),
            ({"mixing": "proportional"}, (10 / 140, 40 / 140, 90 / 140)),
            ({"mixing": "proportional", "mixing_limit": 30}, (10 / 70, 30 / 70, 30 / 70)),
            ({"mixing": 2.0, "mixing_limit": 40}, (1 / 5, 2 / 5, 2 / 5)),
        ],
    )
    def test_tasks_are_drawn_with_the_probabilities_of_the_mixing(self, settings, expected):
        num_rows, tasks = 3000, make_tasks(a=10, b=40, c=90)
        dataset = FewShotDataset(tasks, num_demonstrations=1, num_rows=num_rows, seed=1, **settings)
        counts = Counter(row["task"] for row in list_rows(dataset))
        for task, share in zip(tasks, expected, strict=True):
            assert abs(counts[task] / num_rows - share) < 4 * (share * (1 - share) / num_rows) ** 0.5

    def test_weights_are_those_of_the_formula(self):
        assert mixing_weights([1, 4, 100], "uniform") == [1, 1, 1]
        assert mixing_weights([1, 4, 100], "proportional") == mixing_weights([1, 4, 100], 1.0) == [1, 4, 100]
        assert mixing_weights([1, 4, 100], 2.0, mixing_limit=25) == [1, 2, 5]

    @pytest.mark.parametrize(
        ("settings", "remedy"),
        [
            ({"mixing": "size"}, "'size': choose one"),
            ({"mixing": 0.0}, r"0\.0: choose one"),
            ({"mixing_limit": 3}, "leave it out, or mix in proportion"),
            ({"mixing": 2.0, "mixing_limit": 0}, "1 or more examples"),
        ],
    )
    def test_impossible_mixings_are_refused(self, settings, remedy):
        with pytest.raises(ConfigError, match=remedy):
            FewShotDataset(make_tasks(a=20), num_rows=1, seed=0, **settings)


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


class TestPromptFormats:
    FORMATS = ("chat", {"input_prefix": "Q: "}, "plain")

    def rows(self, **settings):
        return list_rows(FewShotDataset(make_tasks(a=9), num_demonstrations=2, num_rows=60, seed=4, **settings))

    def test_every_row_gets_one_and_is_the_same_otherwise(self):
        rows = self.rows(prompt_formats=self.FORMATS)
        drawn = Counter(str(row.pop("prompt_format")) for row in rows)
        assert rows == self.rows()
        assert {*drawn} == {*map(str, self.FORMATS)}
        assert min(drawn.values()) > 8

    def test_impossible_formats_are_refused_at_once(self):
        with pytest.raises(ConfigError, match="got 'question'"):
            self.rows(prompt_formats=["plain", {"question": "Q: "}])
        with pytest.raises(ConfigError, match="prompt_format: expected 'plain' or 'chat', got 'latin'"):
            self.rows(prompt_formats=["latin"])
