"""`mend evaluate`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mend_hf.cli.options import BaseModel, Device, Distiller, load_for_answering
from mend_hf.config import MendConfig
from mend_hf.errors import ConfigError, DataError
from mend_hf.files import check_output_folder, read_json, write_json

if TYPE_CHECKING:
    from mend_hf.evaluation.evaluator import TaskResult

RESULTS_NAME, SETTINGS_NAME = "results.jsonl", "settings.json"


def evaluate(
    tasks: Annotated[str, typer.Option(help="Tasks in MetaICL's format, with train and test sides.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for results; a run that was stopped goes on from there.")],
    partition: Annotated[
        Path | None, typer.Option(help='JSON {"train": [...], "test": [...]}: only its test tasks are used.')
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")] = None,
    distiller: Distiller = None,
    base_model: BaseModel = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated. Default: all.")] = None,
    num_demonstrations: Annotated[int, typer.Option(help="Demonstrations of a task.", min=1)] = 16,
    seeds: Annotated[str, typer.Option(help="Seeds of the demonstrations.")] = "13,21,42,87,100",
    max_queries: Annotated[int | None, typer.Option(help="Queries of a task. Default: all.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Queries read at once.", min=1)] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop results of other settings.")] = False,
    device: Device = None,
) -> None:
    """Compare the distiller with zero-shot, in-context learning and other baselines on tasks.

    `mend evaluate --distiller stage2 --tasks my-tasks --partition partition.json --output-dir results`
    """
    from mend_hf.data.metaicl import load_tasks
    from mend_hf.data.partition import load_partition
    from mend_hf.evaluation.evaluator import TaskResult, evaluate_methods
    from mend_hf.evaluation.methods import METHODS, pick_methods
    from mend_hf.evaluation.report import method_rows, summarise, task_rows, to_markdown, to_table

    left_out = {"MEND", "random prefix"} if distiller is None else set()
    if distiller is not None and MendConfig.from_pretrained(distiller).task_type == "SEQ_2_SEQ_LM":
        left_out = {"training-free anchors"}  # they are keys and values, which an encoder does not read
    names = method or [name for name in METHODS if name not in left_out]
    methods = pick_methods(names)
    check_output_folder(output_dir)
    wanted = only or (list(load_partition(partition).test) if partition else None)
    test_tasks = load_tasks(tasks, split="test", tasks=wanted)
    train_tasks = load_tasks(tasks, split="train", tasks=sorted(test_tasks))
    settings = {
        "tasks": tasks, "distiller": distiller, "base_model": base_model, "num_demonstrations": num_demonstrations,
        "max_queries": max_queries,
    }  # fmt: skip
    results = [] if overwrite else [TaskResult(**row) for row in _read_results(output_dir, settings)]
    chosen_seeds = _parse_seeds(seeds)
    model = load_for_answering(distiller, base_model, device)
    console = Console()
    new_results = evaluate_methods(
        model,
        train_tasks,
        test_tasks,
        methods,
        num_demonstrations=num_demonstrations,
        seeds=chosen_seeds,
        max_queries=max_queries,
        batch_size=batch_size,
        finished={(result.task, result.method, result.seed) for result in results},
    )
    for number, result in enumerate(new_results):
        if number == 0:
            _start_results(output_dir, settings, results)
        with (output_dir / RESULTS_NAME).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(dataclasses.asdict(result)) + "\n")
        results.append(result)
        console.print(
            f"{result.task}, seed {result.seed}, {result.method}: {100 * result.score:.1f} ({result.metric})"
        )
    order = {name: index for index, name in enumerate(METHODS)}
    results.sort(key=lambda result: (result.task, order[result.method], result.seed))
    by_method, by_task = method_rows(summarise(results)), task_rows(results)
    (output_dir / "results.md").write_text(f"{to_markdown(by_method)}\n{to_markdown(by_task)}", encoding="utf-8")
    console.print(to_table(by_task, title="Points of 100, mean over seeds"))
    console.print(to_table(by_method, title=f"{len(by_task) - 1} tasks, {num_demonstrations} demonstrations"))


def _read_results(output_dir: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results that a run with the same settings left in the folder."""
    path, settings_path = output_dir / RESULTS_NAME, output_dir / SETTINGS_NAME
    if settings_path.exists() and (before := read_json(settings_path)) != settings:
        different = [key for key in settings if before.get(key) != settings[key]]
        raise ConfigError(
            f"Expected results of the same settings in {output_dir}, got other {', '.join(different)}: choose another "
            "--output-dir, or give --overwrite."
        )
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # what follows the last line end, a killed run left half
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"Expected one JSON object a line in {path}, got {error}: give --overwrite.") from error


def _start_results(output_dir: Path, settings: dict[str, Any], results: list[TaskResult]) -> None:
    """Write down the settings and the results so far, whole lines only."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / SETTINGS_NAME, settings)
    lines = "".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in results)
    (output_dir / RESULTS_NAME).write_text(lines, encoding="utf-8")


def _parse_seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"Expected seeds as numbers with commas, such as 13,21,42, got {text!r}.") from error
