"""Demonstrations as users write them, and what stands for them as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mend_hf.errors import DataError
from mend_hf.fingerprint import hash_json
from mend_hf.messages import is_message, pair_messages


@dataclass(frozen=True)
class Demonstration:
    """One worked example of a task.

    Attributes:
        input: What is asked.
        output: What should be answered; None: `input` is plain text that stands for itself.
    """

    input: str
    output: str | None = None


@dataclass(frozen=True)
class EncodedChunk:
    """Demonstrations that the distiller reads at once.

    Attributes:
        input_ids: D token ids.
        anchor_positions: Ascending indices into `input_ids`.
        demonstrations: What tells every demonstration in it from others, in order: `name_demonstration`, and for the
            later pieces of a plain text that was cut, the same with "-1", "-2", ... behind it.
    """

    input_ids: list[int]
    anchor_positions: list[int]
    demonstrations: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedTask:
    """All demonstrations of one task as token ids.

    Attributes:
        chunks: One under `truncate`, otherwise as many as the distiller's window asks for.
        num_demonstrations: How many demonstrations were kept, at least in part.
        num_tokens: Tokens that the distiller reads.
        num_lost_tokens: Tokens that were cut away to hold the budgets.
    """

    chunks: list[EncodedChunk]
    num_demonstrations: int
    num_tokens: int
    num_lost_tokens: int

    @classmethod
    def from_ids(cls, input_ids: torch.Tensor) -> list[EncodedTask]:
        """Take token ids (B, D) as they are: a row is plain text of one piece, without anchors.

        Raises:
            DataError: The ids have another shape, or there are none.
        """
        if input_ids.dim() != 2 or not input_ids.numel():
            raise DataError(
                f"Expected token ids of shape (tasks, tokens), got {tuple(input_ids.shape)}: give one row a task, "
                "each with at least one token."
            )
        return [cls([EncodedChunk(row, [], (hash_json(row),))], 1, len(row), 0) for row in input_ids.tolist()]


def parse_demonstrations(demonstrations: Any) -> tuple[list[list[Demonstration]], bool]:
    """Bring every accepted way to write demonstrations into one.

    Args:
        demonstrations: One task: a list whose items are (input, output) tuples, {"input", "output"} mappings, strings
            (plain text) or `Demonstration`s; or chat messages, a user's and an assistant's in turn. Or a batch of
            tasks: a list of such lists.

    Returns:
        One list of demonstrations a task, and whether a batch of tasks was given.

    Raises:
        DataError: There are none, or one is not of these forms; the message names its place.
    """
    if isinstance(demonstrations, str | Mapping | Demonstration) or not isinstance(demonstrations, Sequence):
        raise DataError(
            'Expected a list of demonstrations such as [("great film", "positive")], '
            f"got {type(demonstrations).__name__}: put the demonstrations into a list; a folder of distilled ones is "
            "loaded with DistilledDemonstrations.from_pretrained(path)."
        )
    is_batch = bool(demonstrations) and all(isinstance(item, list) for item in demonstrations)
    tasks = demonstrations if is_batch else [demonstrations]
    parsed = []
    for task_index, task in enumerate(tasks):
        where = f"task {task_index}, " if is_batch else ""
        if not task:
            raise DataError(
                f"Expected at least one demonstration, got none ({where or 'an empty list'}): give one or more."
            )
        if is_batch and len(task) == 2 and all(isinstance(item, str) for item in task):
            raise DataError(
                f"{where}{task!r} is either one (input, output) pair or a task of two plain texts: "
                "write pairs as tuples or as {'input': ..., 'output': ...}."
            )
        items = pair_messages(task, where) if any(is_message(item) for item in task) else task
        parsed.append([_parse_one(item, f"{where}demonstration {index}") for index, item in enumerate(items)])
    return parsed, is_batch


def _parse_one(item: Any, where: str) -> Demonstration:
    if isinstance(item, Demonstration):
        demonstration = item
    elif isinstance(item, str):
        demonstration = Demonstration(item)
    elif isinstance(item, Mapping) and {"input", "output"} <= set(item):
        demonstration = Demonstration(item["input"], item["output"])
        if item["output"] is None:
            raise DataError(f'{where}: expected an "output" that is a string, got None: give the answer as text.')
    elif isinstance(item, tuple) and len(item) == 2:
        demonstration = Demonstration(*item)
        if item[1] is None:
            raise DataError(f"{where}: expected an output that is a string, got None: give the answer as text.")
    else:
        raise DataError(
            f"{where}: expected an (input, output) tuple, a mapping with input and output, a chat message with role "
            f"and content, or a string, got {item!r}."
        )
    for name in ("input", "output"):
        value = getattr(demonstration, name)
        if not isinstance(value, str) and not (name == "output" and value is None):
            raise DataError(
                f"{where}: expected an {name} that is a string, got {value!r} ({type(value).__name__}): "
                "convert it to text."
            )
    if not demonstration.input.strip() and not (demonstration.output or "").strip():
        raise DataError(f"{where}: expected text, got an empty demonstration: remove it.")
    return demonstration


def name_demonstration(demonstration: Demonstration) -> str:
    """Return a hash that tells a demonstration from every other one."""
    return hash_json((demonstration.input, demonstration.output))
