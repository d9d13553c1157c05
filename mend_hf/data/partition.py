"""Which tasks are for training, for choosing a checkpoint and for testing: no task is on two sides."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mend_hf.data.rows import is_list_of_text
from mend_hf.errors import ConfigError, DataError
from mend_hf.files import parse_json


@dataclass(frozen=True)
class Partition:
    """Tasks to train on, and others to test on.

    Attributes:
        train: Names of the training tasks.
        test: Names of the test tasks, none of them in `train`.

    Raises:
        DataError: A task is on both sides, or twice on one: it would count twice in a mean.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        """Keep test tasks out of training, and every task from counting twice."""
        check_disjoint(training=self.train, test=self.test)
        for side in (self.train, self.test):
            if repeated := sorted({task for task in side if side.count(task) > 1}):
                raise DataError(f"Expected every task once, got {', '.join(repeated)} twice: remove one of each.")


def load_partition(name_or_path: str | Path) -> Partition:
    """Return a partition that comes with this package, or the one in a JSON file.

    Args:
        name_or_path: One of `list_partitions()`, or a file `{"train": [...], "test": [...]}`, of which other keys are
            passed over.

    Raises:
        DataError: There is no such name or file, the file is of another form, or a task is on both sides.
    """
    known = list_partitions()
    path: Any = files("mend_hf") / "data" / "partitions" / f"{name_or_path}.json"
    if str(name_or_path) not in known:
        path = Path(name_or_path)
        if not path.exists():
            raise DataError(
                f"Expected the name of a partition ({', '.join(known)}) or a JSON file, got {str(name_or_path)!r}: "
                "check the name or the path."
            )
    try:
        sides = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        got = f"text that is no JSON ({error})" if isinstance(error, ValueError) else str(error)
        raise DataError(
            f"Expected a JSON partition file at {path}, got {got}: check the path and the file."
        ) from error
    if not isinstance(sides, dict) or not all(is_list_of_text(sides.get(side)) for side in ("train", "test")):
        raise DataError(f'Expected {{"train": [...], "test": [...]}} in {path}, got something else: write both lists.')
    return Partition(tuple(sides["train"]), tuple(sides["test"]))


def list_partitions() -> list[str]:
    """Return the names of MetaICL's seven settings (Min et al., 2022), as far as their tasks are to be had today."""
    folder = files("mend_hf") / "data" / "partitions"
    return sorted(path.name.removesuffix(".json") for path in folder.iterdir() if path.name.endswith(".json"))


def check_disjoint(**sides: Iterable[str]) -> None:
    """Refuse tasks that are on two sides.

    Args:
        **sides: Names of tasks by what they are for, such as `training=..., test=...`.

    Raises:
        DataError: Two sides share a task; the message names all that they share.
    """
    for (side, tasks), (other_side, others) in itertools.combinations(sides.items(), 2):
        if common := sorted({*tasks} & {*others}):
            raise DataError(
                f"Expected {side} and {other_side} tasks to differ, got {', '.join(common)} on both sides: "
                "remove each from one of them."
            )


def hold_out_tasks(
    tasks: Iterable[str],
    num_tasks: int,
    *,
    seed: int,
    groups: Mapping[str, str] | None = None,
    test_tasks: Iterable[str] = (),
) -> list[str]:
    """Return training tasks to choose a checkpoint by, in alphabetical order; train on the others.

    Args:
        tasks: Names of the training tasks, in any order.
        num_tasks: How many to hold out; of fewer, those are the first that a larger number gives.
        seed: Fixes which.
        groups: What kind of task each is. The kinds then take turns, so that as many as possible are represented.
        test_tasks: Tasks that results are reported on, and that must not decide anything.

    Raises:
        ConfigError: No task would be left to train on.
        DataError: A test task is among the training tasks.
    """
    names, test_names = sorted({*tasks}), [*test_tasks]
    check_disjoint(training=names, test=test_names)
    if not 0 <= num_tasks < len(names):
        raise ConfigError(
            f"Expected to hold out fewer than the {len(names)} training tasks, got {num_tasks}: hold out fewer."
        )
    random.Random(str(seed)).shuffle(names)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault((groups or {}).get(name, ""), []).append(name)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds.values()))
    return sorted(itertools.islice((name for name in turns if name is not None), num_tasks))
