"""Tasks in MetaICL's format and their examples."""

from __future__ import annotations

import difflib
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mend_hf.data.rows import SUFFIXES, Row, get_text, is_list_of_text, load_hub_splits, number_rows, read_rows
from mend_hf.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a task.

    Attributes:
        task: The task's name.
        input: What is asked.
        output: What should be answered.
        options: The answers to choose from, with `output` among them unless it was read so on purpose; empty for a
            free-form task.
    """

    task: str
    input: str
    output: str
    options: tuple[str, ...] = ()


def load_tasks(
    name_or_path: str | Path,
    *,
    split: str = "train",
    tasks: Collection[str] | None = None,
    on_missing_gold: Literal["error", "keep"] = "error",
    **hub: Any,
) -> dict[str, list[Example]]:
    """Return the examples of tasks in MetaICL's format, by task name in alphabetical order.

    A row has `input`, `output` and `options` (empty or missing for a free-form task), and `task` where the file's name
    does not tell it. A table of several tasks may have a `split` column; MetaICL's tables repeat an example for every
    seed, and it is kept once.

    Args:
        name_or_path: A folder of files `TASK.SPLIT.jsonl` or `TASK/SPLIT.jsonl`, also .jsonl.zst and .parquet, or with
            these in its subfolder `tasks`; one file; or a data set on the Hub, or in a folder that `datasets` reads.
        split: "train" or "test", or whatever the source calls a split of its own.
        tasks: The names wanted; None: all.
        on_missing_gold: What becomes of an example whose output is not among its options.
        **hub: Arguments of `datasets.load_dataset`.

    Raises:
        DataError: Nothing is there, a task is not known, or a row is not of this form; the message names its place.
        MissingExtraError: The package that reads the source is not installed.
    """
    path = Path(name_or_path)
    wanted = None if tasks is None else set(tasks)
    if path.is_dir() and any(_find_task_files(path, known) for known in ("train", "test", split)):
        files = _find_task_files(path, split)
        _check_known(wanted, files, split, path)
        names = sorted(files if wanted is None else wanted)
        return {task: _read_task(files[task], task, on_missing_gold) for task in names}
    rows: Iterable[tuple[str, Row]]
    if path.is_file():
        rows = ((place, row) for place, row in read_rows(path) if row.get("split", split) == split)
    else:
        rows = _select_hub_rows(load_hub_splits(name_or_path, **hub), split, name_or_path)
    return _group_by_task(rows, split, wanted, name_or_path, on_missing_gold)


def check_sides(train: Mapping[str, Sequence[Example]], test: Mapping[str, Sequence[Example]]) -> None:
    """Refuse tasks whose queries are all among the examples that demonstrations are drawn from.

    Raises:
        DataError: There are such tasks: a table without a `split` column has every row on both sides.
    """
    leaking = [task for task, examples in test.items() if set(examples) <= set(train.get(task, ()))]
    if leaking:
        raise DataError(
            f"Expected queries that are not demonstrations, got the same examples on both sides of "
            f"{', '.join(leaking[:8])}: give the rows a 'split' of train or test, or files TASK.train.jsonl and "
            "TASK.test.jsonl."
        )


def check_test_names(name_or_path: str | Path, names: Collection[str], *, training: Collection[str]) -> None:
    """Refuse names of test tasks that a folder of task files, or a table, does not have.

    Test tasks may as well live elsewhere: where training tasks are the only ones with a test side, as in a folder of
    files `TASK.train.jsonl` alone, every name passes; and so it does for a data set on the Hub, which is not asked.

    Args:
        name_or_path: As for `load_tasks`; of files in a folder only the names are read.
        names: Of the test tasks.
        training: Names of the training tasks.

    Raises:
        DataError: A name is not known.
    """
    path = Path(name_or_path)
    known: Collection[str] = ()
    if path.is_dir():
        known = _find_task_files(path, "test")
    elif path.is_file():
        known = {_get_task(row, place) for place, row in read_rows(path) if row.get("split") == "test"}
    if not set(known) <= set(training):
        _check_known(set(names), known, "test", path)


def sample_demonstrations(examples: Sequence[Example], k: int, seed: int) -> list[Example]:
    """Return k examples that the seed fixes; a smaller k gives the first of those that a larger one gives.

    Raises:
        DataError: There are fewer than k.
    """
    if not 0 <= k <= len(examples):
        raise DataError(f"Expected at least {k} examples, got {len(examples)}: ask for fewer demonstrations.")
    return random.Random(str(seed)).sample(examples, len(examples))[:k]


def _find_task_files(folder: Path, split: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for suffix in SUFFIXES:
        ending = f".{split}{suffix}"
        named = [(path.name.removesuffix(ending), path) for path in folder.glob(f"*{ending}")]
        named += [(path.name.removesuffix(ending), path) for path in folder.glob(f"tasks/*{ending}")]
        named += [(path.parent.name, path) for path in folder.glob(f"*/{split}{suffix}")]
        for task, path in named:
            if task in files:
                raise DataError(f"Expected one file for {task} ({split}), got {files[task]} and {path}: remove one.")
            files[task] = path
    return files


def _read_task(path: Path, task: str, on_missing_gold: str) -> list[Example]:
    examples = [_parse_example(place, row, task, on_missing_gold) for place, row in read_rows(path)]
    if not examples:
        raise DataError(f"Expected at least one example in {path}, got an empty file: add some or remove it.")
    return examples


def _select_hub_rows(splits: Mapping[str, Iterable[Row]], split: str, name: str | Path) -> Iterator[tuple[str, Row]]:
    if split in splits:
        yield from number_rows(splits[split], f"{name} ({split})")
    elif {"meta_train", "meta_eval_100shot"} <= {*splits}:
        # MetaICL on the Hub: a training table, and one with a few training rows, dev and test rows of every task.
        if split == "train":
            yield from number_rows(splits["meta_train"], f"{name} (meta_train)")
        for place, row in number_rows(splits["meta_eval_100shot"], f"{name} (meta_eval_100shot)"):
            if row.get("split") == split:
                yield place, row
    else:
        raise DataError(f"Expected a split {split!r} in {name}, got {', '.join(splits)}: name one of these.")


def _group_by_task(
    rows: Iterable[tuple[str, Row]],
    split: str,
    wanted: set[str] | None,
    source: str | Path,
    on_missing_gold: str,
) -> dict[str, list[Example]]:
    # Dictionaries as ordered sets: a row repeated for another seed is the same example.
    groups: dict[str, dict[Example, None]] = {}
    for place, row in rows:
        task = _get_task(row, place)
        group = groups.setdefault(task, {})
        if wanted is None or task in wanted:
            group[_parse_example(place, row, task, on_missing_gold)] = None
    _check_known(wanted, groups, split, source)
    return {task: list(groups[task]) for task in sorted(groups if wanted is None else wanted)}


def _get_task(row: Row, place: str) -> str:
    if "task" not in row:
        raise DataError(
            f"{place}: expected a field 'task', got only {', '.join(map(repr, row))}: add or rename it, or let the "
            "files' names tell the task: name a folder of TASK.train.jsonl and TASK.test.jsonl."
        )
    return get_text(row, "task", place)


def _check_known(wanted: set[str] | None, known: Collection[str], split: str, source: str | Path) -> None:
    if not known:
        raise DataError(f"Expected tasks with a {split!r} split in {source}, got none: name another split or source.")
    unknown = sorted((wanted or set()).difference(known))
    if not unknown:
        return
    nearest = {task: difflib.get_close_matches(task, known, n=3, cutoff=0.5) for task in unknown}
    hints = [f"{task!r} (nearest: {', '.join(near)})" if near else repr(task) for task, near in nearest.items()]
    raise DataError(
        f"Expected some of the {len(known)} tasks with a {split!r} split in {source}, got {'; '.join(hints)}: "
        "correct or remove the names."
    )


def _parse_example(place: str, row: Row, task: str, on_missing_gold: str) -> Example:
    if row.get("task", task) != task:
        raise DataError(
            f"{place}: expected the task {task!r} of the file's name, got {row['task']!r}: rename the file."
        )
    options = row.get("options") or []
    if not is_list_of_text(options):
        raise DataError(f"{place}: expected 'options' to be a list of strings, got {options!r}: convert them to text.")
    if len(set(options)) < len(options):
        raise DataError(f"{place}: expected options that differ, got {options!r}: remove the repeated ones.")
    output = get_text(row, "output", place)
    if options and output not in options and on_missing_gold == "error":
        raise DataError(
            f"{place}: expected an output among the options {options!r}, got {output!r}: add or correct it."
        )
    return Example(task, get_text(row, "input", place), output, tuple(options))
