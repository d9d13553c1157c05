"""What an evaluation measured, and the folder that keeps it: a run that was stopped goes on from there."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mend_hf.errors import ConfigError, DataError
from mend_hf.evaluation.variations import AS_GIVEN
from mend_hf.files import check_output_folder, read_json, write_json

RESULTS_NAME, SETTINGS_NAME = "results.jsonl", "settings.json"

Scoring = Literal["direct", "channel"]


class ResultKey(NamedTuple):
    """What tells a result of an evaluation from every other one."""

    task: str
    method: str
    seed: int
    num_demonstrations: int
    scoring: Scoring = "direct"
    variation: str = AS_GIVEN


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one method reached on one task with one seed's demonstrations.

    Attributes:
        method: Its name.
        task: The task's name.
        seed: Fixed the demonstrations.
        num_demonstrations: How many there were.
        metric: The score's name: `macro_f1` for classification, `accuracy` for multi-choice, `rouge_l` for free form,
            if no other was asked for.
        score: From 0 to 1.
        other_scores: By name: accuracy beside F1, exact match beside ROUGE-L.
        num_queries: How many were asked.
        num_unanswerable: Of these, how many have a gold answer that is not among their options.
        prefix_slots: Positions that every query attends to in place of the demonstrations.
        prefix_bytes: Size of what is kept for the task between queries.
        milliseconds_per_query: Median over the batches of queries, options included.
        prepare_milliseconds: Reading or distilling the demonstrations, once.
        flops_per_query: Floating-point operations, options included; None: the formula does not know the model.
        prepare_flops: The same for reading or distilling the demonstrations, once.
        scoring: "direct", an option behind the input, or "channel", the input behind an option.
        variation: How the demonstrations were changed.
    """

    method: str
    task: str
    seed: int
    num_demonstrations: int
    metric: str
    score: float
    num_queries: int
    prefix_slots: int
    prefix_bytes: int
    milliseconds_per_query: float
    prepare_milliseconds: float
    flops_per_query: float | None = None
    prepare_flops: float | None = None
    other_scores: dict[str, float] = field(default_factory=dict)
    num_unanswerable: int = 0
    scoring: Scoring = "direct"
    variation: str = AS_GIVEN

    @property
    def key(self) -> ResultKey:
        """What tells this result from every other one of its evaluation."""
        return ResultKey(**{name: getattr(self, name) for name in ResultKey._fields})


class ResultFolder:
    """The folder of an evaluation: its settings, and a line for every result.

    Args:
        path: Made with the first result.
        settings: What must be the same for results to be comparable, JSON-plain.
        overwrite: Pass over what is there; it is gone with the first new result.

    Raises:
        ConfigError: The folder cannot be written into, or holds results of other settings.
        DataError: What is there is damaged.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        check_output_folder(path)
        self.path = path
        self._settings = settings
        self.results: list[TaskResult] = [] if overwrite else [TaskResult(**row) for row in self._read()]
        self._is_started = False

    def add(self, result: TaskResult) -> None:
        """Keep one more result."""
        if not self._is_started:
            self._start()
        with (self.path / RESULTS_NAME).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(dataclasses.asdict(result)) + "\n")
        self.results.append(result)

    def _start(self) -> None:
        """Write down the settings and the results so far, whole lines only."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / SETTINGS_NAME, self._settings)
        lines = "".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in self.results)
        (self.path / RESULTS_NAME).write_text(lines, encoding="utf-8")
        self._is_started = True

    def _read(self) -> list[dict[str, Any]]:
        """Return the results that a run with the same settings left."""
        results, settings = self.path / RESULTS_NAME, self.path / SETTINGS_NAME
        if settings.exists() and (before := read_json(settings)) != self._settings:
            names = [*self._settings, *(name for name in before if name not in self._settings)]
            different = [name for name in names if before.get(name) != self._settings.get(name)]
            raise ConfigError(
                f"Expected results of the same settings in {self.path}, got other {', '.join(different)}: choose "
                "another --output-dir, or give --overwrite."
            )
        if not results.exists():
            return []
        *lines, _ = results.read_text(encoding="utf-8").split("\n")  # the last line end is a killed run's last word
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise DataError(f"Expected one JSON object a line in {results}, got {error}: give --overwrite.") from error
