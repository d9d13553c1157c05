"""What an evaluation measured, and the folder that keeps it: a run that was stopped goes on from there."""

from __future__ import annotations

import dataclasses
import json
import os
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

    Several processes may add results, each to a file of its own, until one of them gathers all in one file.

    Args:
        path: Made when the evaluation starts.
        settings: What must be the same for results to be comparable, JSON-plain.
        overwrite: Pass over what is there; it is gone once the evaluation starts.
        process_index: This process's number; the first one is 0.

    Raises:
        ConfigError: The folder cannot be written into, or holds results of other settings.
        DataError: What is there is damaged, or of another version.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], *, overwrite: bool = False, process_index: int = 0
    ) -> None:
        check_output_folder(path)
        self.path = path
        self._settings = settings
        self._own = path / (f"results-{process_index}.jsonl" if process_index else RESULTS_NAME)
        self.results: list[TaskResult] = [] if overwrite else self._read()

    def start(self) -> None:
        """Write down the settings and the results so far, in one file; one process alone does so, before any adds."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / SETTINGS_NAME, self._settings)
        self._gather()

    def add(self, result: TaskResult) -> None:
        """Keep one more result."""
        with self._own.open("a", encoding="utf-8") as lines:
            lines.write(_to_line(result))
        self.results.append(result)

    def finish(self) -> None:
        """Bring the results of all processes into one file; one process alone does so, once all have added theirs."""
        self.results = self._read()
        self._gather()

    def _gather(self) -> None:
        """Write the results into one file, whole lines only, and remove the others."""
        whole = self.path / f".{RESULTS_NAME}"
        whole.write_text("".join(map(_to_line, self.results)), encoding="utf-8")
        os.replace(whole, self.path / RESULTS_NAME)
        for path in self.path.glob("results-*.jsonl"):
            path.unlink()

    def _read(self) -> list[TaskResult]:
        """Return the results that a run with the same settings left."""
        settings = self.path / SETTINGS_NAME
        if settings.exists() and (before := read_json(settings)) != self._settings:
            names = [*self._settings, *(name for name in before if name not in self._settings)]
            different = [name for name in names if before.get(name) != self._settings.get(name)]
            raise ConfigError(
                f"Expected results of the same settings in {self.path}, got other {', '.join(different)}: choose "
                "another --output-dir, or give --overwrite."
            )
        return _read_all(self.path)


def read_results(folder: Path) -> list[TaskResult]:
    """Return the results in a folder of an evaluation.

    Raises:
        DataError: There are none, or they are damaged or of another version.
    """
    results = _read_all(folder)
    if not results:
        raise DataError(
            f"Expected a folder with {RESULTS_NAME}, which mend evaluate writes, got {folder}: check the path."
        )
    return results


def _read_all(folder: Path) -> list[TaskResult]:
    paths = [folder / RESULTS_NAME, *sorted(folder.glob("results-*.jsonl"))]
    results = [result for path in paths if path.exists() for result in _read_lines(path)]
    return list({result.key: result for result in results}.values())


def _to_line(result: TaskResult) -> str:
    return json.dumps(dataclasses.asdict(result)) + "\n"


def _read_lines(path: Path) -> list[TaskResult]:
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # the last line end is a killed run's last word
    try:
        return [TaskResult(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise DataError(
            f"Expected one result of this version of mend_hf a line in {path}, got {error}: give --overwrite."
        ) from error
