"""The tasks and texts in examples/data, read by the package's own loaders."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import weights

from mend_hf.data.metaicl import load_tasks
from mend_hf.data.text import load_texts

FOLDER = Path(weights.__file__).parent / "data"


@pytest.mark.parametrize("task", ["support_tickets", "restaurant_notes"])
def test_example_task_is_balanced_and_shares_no_input_between_its_splits(task: str) -> None:
    train = load_tasks(FOLDER, split="train")[task]
    test = load_tasks(FOLDER, split="test")[task]
    assert (len(train), len(test)) == (32, 40)
    for examples in (train[:16], train, test[:20], test):
        assert len(set(Counter(example.output for example in examples).values())) == 1
    assert not {example.input for example in train} & {example.input for example in test}


def test_example_texts_and_own_demonstrations_load() -> None:
    assert len(load_texts(FOLDER / "text.jsonl")) == 12
    for name in ("my_demonstrations.jsonl", "library_questions.jsonl"):
        lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
        assert {tuple(json.loads(line)) for line in lines} == {("input", "output")}


def test_library_questions_are_balanced_and_all_different() -> None:
    lines = (FOLDER / "library_questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert Counter(row["output"] for row in rows) == {"loans": 20, "hours": 20, "events": 20}
    assert len({row["input"] for row in rows}) == 60
