"""Which tasks are for training and which for testing, and that no task is both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mend_hf.data.rows import is_list_of_text
from mend_hf.errors import DataError


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
    if not isinstance(sides, dict) or not all(is_list_of_text(sides.get(side)) for side in ("train", "test")):
        raise DataError(f'Expected {{"train": [...], "test": [...]}} in {path}, got something else: write both lists.')
    return Partition(tuple(sides["train"]), tuple(sides["test"]))
