"""Tasks in MetaICL's format: their examples, the partition into training and test tasks, and few-shot rows of them."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import random
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mend_hf.data.rows import SUFFIXES, Row, get_text, load_hub_splits, number_rows, read_rows
from mend_hf.errors import ConfigError, DataError

_SYLLABLES = ("ba", "co", "di", "fe", "gu", "la", "mo", "ni", "pe", "ru", "sa", "to", "vi", "ze")
_SYMBOLS = ["".join(pair) for pair in itertools.product(_SYLLABLES, repeat=2)]


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a task.

    Attributes:
        task: The task's name.
        input: What is asked.
        output: What should be answered.
        options: The answers to choose from, with `output` among them; empty for a free-form task.
    """

    task: str
    input: str
    output: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Partition:
    """Tasks to train on, and others to test on.

    Attributes:
        train: Names of the training tasks.
        test: Names of the test tasks, none of them in `train`.

    Raises:
        DataError: A task is on both sides.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        """Keep test tasks out of training."""
        if common := sorted({*self.train} & {*self.test}):
            raise DataError(
                f"Expected training and test tasks to differ, got {', '.join(common)} on both sides: "
                "remove each from one of them."
            )


def load_partition(path: str | Path) -> Partition:
    """Return the partition in a JSON file `{"train": [...], "test": [...]}`; other keys are passed over.

    Raises:
        DataError: The file is missing or of another form, or a task is on both sides.
    """
    try:
        sides = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"Expected a JSON partition file at {path}, got {error}: check the path and the file."
        ) from error
    if not isinstance(sides, dict) or not all(_is_list_of_text(sides.get(side)) for side in ("train", "test")):
        raise DataError(f'Expected {{"train": [...], "test": [...]}} in {path}, got something else: write both lists.')
    return Partition(tuple(sides["train"]), tuple(sides["test"]))


def load_tasks(
    name_or_path: str | Path, *, split: str = "train", tasks: Collection[str] | None = None, **hub: Any
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
        return {task: _read_task(files[task], task) for task in sorted(files if wanted is None else wanted)}
    rows: Iterable[tuple[str, Row]]
    if path.is_file():
        rows = ((place, row) for place, row in read_rows(path) if row.get("split", split) == split)
    else:
        rows = _select_hub_rows(load_hub_splits(name_or_path, **hub), split, name_or_path)
    return _group_by_task(rows, split, wanted, name_or_path)


def sample_demonstrations(examples: Sequence[Example], k: int, seed: int) -> list[Example]:
    """Return k examples that the seed fixes; a smaller k gives the first of those that a larger one gives.

    Raises:
        DataError: There are fewer than k.
    """
    if not 0 <= k <= len(examples):
        raise DataError(f"Expected at least {k} examples, got {len(examples)}: ask for fewer demonstrations.")
    return random.Random(str(seed)).sample(examples, len(examples))[:k]


class FewShotDataset(Dataset[dict[str, Any]]):
    """Rows of demonstrations and a query of the same task; every task is as likely as every other.

    Row i depends on the seed, on i and on the tasks only. A row holds `demonstrations` (mappings with `input` and
    `output`), `query`, `target`, `task` and `options`; no example of it stands in two places.

    Args:
        tasks: Examples by task name. A task with too few for one row is left out with a warning.
        num_demonstrations: In a row; (low, high): drawn anew for every row, both ends included.
        queries_per_demonstrations: If more than 1, `query` and `target` are lists, and `options` is a list of lists.
        num_rows: Length of the data set.
        seed: Fixes the rows.
        balance_queries: Let every answer of the task be as likely a query's target as every other, as macro-F1 counts
            them; what is frequent in the task is then no better a guess than what is rare.
        permute_labels: Fraction of rows in which the labels trade places, the same way in the whole row, so that only
            the demonstrations say what a label stands for. Rows of free-form tasks, and of tasks whose examples have
            options of their own, stay as they are.
        symbol_labels: Fraction of rows in which other words of no meaning stand for the labels; the two fractions
            share no row ("Symbol tuning", Wei et al., EMNLP 2023, arXiv 2305.08298).

    Raises:
        ConfigError: A number is impossible.
        DataError: No task has enough examples.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Example]],
        *,
        num_demonstrations: int | tuple[int, int] = 16,
        queries_per_demonstrations: int = 1,
        num_rows: int,
        seed: int,
        balance_queries: bool = False,
        permute_labels: float = 0.0,
        symbol_labels: float = 0.0,
    ) -> None:
        low, high = (num_demonstrations,) * 2 if isinstance(num_demonstrations, int) else num_demonstrations
        if not 1 <= low <= high or queries_per_demonstrations < 1 or num_rows < 1:
            raise ConfigError(
                "Expected 1 or more rows, queries and demonstrations, got "
                f"num_rows={num_rows}, queries_per_demonstrations={queries_per_demonstrations}, "
                f"num_demonstrations={num_demonstrations}: raise them, and give a range as (low, high)."
            )
        if min(permute_labels, symbol_labels) < 0 or permute_labels + symbol_labels > 1:
            raise ConfigError(
                "Expected two fractions of the rows that make at most 1 together, got "
                f"permute_labels={permute_labels}, symbol_labels={symbol_labels}: lower one."
            )
        self.num_demonstrations = (low, high)
        self.queries_per_demonstrations = queries_per_demonstrations
        self.num_rows = num_rows
        self.seed = seed
        self.balance_queries = balance_queries
        self.permute_labels = permute_labels
        self.symbol_labels = symbol_labels
        needed = high + queries_per_demonstrations
        small = sorted(name for name, examples in tasks.items() if len(examples) < needed)
        self.tasks = {name: tasks[name] for name in sorted(tasks) if name not in small}
        if not self.tasks:
            raise DataError(
                f"Expected a task with at least {needed} examples ({high} demonstrations and "
                f"{queries_per_demonstrations} queries), got none among {len(tasks)} tasks: "
                "ask for fewer demonstrations or add examples."
            )
        if small:
            warnings.warn(
                f"{len(small)} of {len(tasks)} tasks have fewer than {needed} examples and are left out: "
                f"{', '.join(small)}.",
                stacklevel=2,
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return row `index`.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"Expected a row from 0 to {self.num_rows - 1}, got {index}.")
        # A string as the seed is hashed alike in every process and Python version; hash() is not.
        rng = random.Random(f"{self.seed}:{index}")
        task = rng.choice(list(self.tasks))
        k = rng.randint(*self.num_demonstrations)
        num_queries = self.queries_per_demonstrations
        if self.balance_queries:
            shuffled = rng.sample(self.tasks[task], len(self.tasks[task]))
            picked = shuffled[:k] + _pick_balanced(shuffled[k:], num_queries, rng)
        else:
            picked = rng.sample(self.tasks[task], k + num_queries)
        chance = rng.random()
        if chance < self.permute_labels + self.symbol_labels:
            picked = _rename_labels(picked, rng, with_symbols=chance >= self.permute_labels)
        queries: dict[str, list[Any]] = {
            "query": [example.input for example in picked[k:]],
            "target": [example.output for example in picked[k:]],
            "options": [list(example.options) for example in picked[k:]],
        }
        single = num_queries == 1
        return {
            "task": task,
            "demonstrations": [{"input": example.input, "output": example.output} for example in picked[:k]],
            **{column: values[0] if single else values for column, values in queries.items()},
        }


def _pick_balanced(examples: Sequence[Example], num_examples: int, rng: random.Random) -> list[Example]:
    """Return examples whose outputs are drawn evenly from those that are left."""
    by_output: dict[str, list[Example]] = {}
    for example in examples:
        by_output.setdefault(example.output, []).append(example)
    picked = []
    for _ in range(num_examples):
        output = rng.choice(list(by_output))
        picked.append(by_output[output].pop())
        if not by_output[output]:
            del by_output[output]
    return picked


def _rename_labels(examples: list[Example], rng: random.Random, *, with_symbols: bool) -> list[Example]:
    """Return the examples with their labels permuted or replaced; unchanged where they do not share their options."""
    labels = sorted(examples[0].options)
    words = _SYMBOLS if with_symbols else labels
    if not 0 < len(labels) <= len(words) or any(sorted(example.options) != labels for example in examples):
        return examples
    names = dict(zip(labels, rng.sample(words, len(labels)), strict=True))
    return [
        dataclasses.replace(
            example, output=names[example.output], options=tuple(names[option] for option in example.options)
        )
        for example in examples
    ]


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


def _read_task(path: Path, task: str) -> list[Example]:
    examples = [_parse_example(place, row, task) for place, row in read_rows(path)]
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
    rows: Iterable[tuple[str, Row]], split: str, wanted: set[str] | None, source: str | Path
) -> dict[str, list[Example]]:
    # Dictionaries as ordered sets: a row repeated for another seed is the same example.
    groups: dict[str, dict[Example, None]] = {}
    for place, row in rows:
        task = get_text(row, "task", place)
        group = groups.setdefault(task, {})
        if wanted is None or task in wanted:
            group[_parse_example(place, row, task)] = None
    _check_known(wanted, groups, split, source)
    return {task: list(groups[task]) for task in sorted(groups if wanted is None else wanted)}


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


def _parse_example(place: str, row: Row, task: str) -> Example:
    if row.get("task", task) != task:
        raise DataError(
            f"{place}: expected the task {task!r} of the file's name, got {row['task']!r}: rename the file."
        )
    options = row.get("options") or []
    if not _is_list_of_text(options):
        raise DataError(f"{place}: expected 'options' to be a list of strings, got {options!r}: convert them to text.")
    if len(set(options)) < len(options):
        raise DataError(f"{place}: expected options that differ, got {options!r}: remove the repeated ones.")
    output = get_text(row, "output", place)
    if options and output not in options:
        raise DataError(
            f"{place}: expected an output among the options {options!r}, got {output!r}: add or correct it."
        )
    return Example(task, get_text(row, "input", place), output, tuple(options))


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
