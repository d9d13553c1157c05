"""`mend evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mend_hf.cli.comparison import load_comparisons, parse_comparisons
from mend_hf.cli.options import BaseModel, Device, Distiller, Dtype, load_base_of, wrap_for_answering
from mend_hf.cli.processes import choose_device, join_processes
from mend_hf.config import CONFIG_NAME, MendConfig
from mend_hf.errors import CheckpointError, ConfigError
from mend_hf.files import fetch_json


def evaluate(
    tasks: Annotated[str, typer.Option(help="Tasks in MetaICL's format, with train and test sides.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for results; a run that was stopped goes on from there.")],
    partition: Annotated[
        str | None,
        typer.Option(
            help='One of MetaICL\'s settings, such as class_to_class, or a JSON file {"train": [...], "test": [...]}: '
            "only its test tasks are used."
        ),
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")] = None,
    distiller: Distiller = None,
    base_model: BaseModel = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this method; may be repeated: zero-shot; zero-shot, batch-calibrated; in-context; in-context, "
            "cut; in-context, calibrated; in-context, batch-calibrated; training-free anchors; random prefix; prompt "
            "tuning; prefix tuning; MEND; MEND, calibrated; MEND, batch-calibrated; MEND + 2 raw. Default: all that "
            "train nothing."
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER_OR_HUB_ID, a further method; may be repeated: another distiller for the same base "
            "model, or a language model that reads the demonstrations in context."
        ),
    ] = None,
    num_demonstrations: Annotated[str, typer.Option(help="Demonstrations of a task: 16, or several, 1,4,16.")] = "16",
    seeds: Annotated[str, typer.Option(help="Seeds of the demonstrations.")] = "13,21,42,87,100",
    max_queries: Annotated[int | None, typer.Option(help="Queries of a task. Default: all.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Queries read at once.", min=1)] = 8,
    scoring: Annotated[
        Literal["direct", "channel"],
        typer.Option(help="How likely an option is behind the input, or the input behind an option."),
    ] = "direct",
    variations: Annotated[
        list[str] | None,
        typer.Option(
            "--variation",
            help="Change the demonstrations; may be repeated: as given; no input; no label; random labels; wrong "
            "labels; permuted order; other prompt format.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="macro_f1, accuracy, exact_match or rouge_l. Default: macro-F1 where all examples of a task have the "
            "same options, accuracy where they have not, ROUGE-L where there are none."
        ),
    ] = None,
    on_missing_gold: Annotated[
        Literal["error", "wrong"],
        typer.Option(help="A query whose gold answer is not among its options is an error, or is answered wrongly."),
    ] = "error",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop results of other settings.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare the distiller with zero-shot, in-context learning and other baselines on tasks.

    `mend evaluate --distiller stage2 --tasks my-tasks --partition partition.json --output-dir results`
    """
    from mend_hf.data.metaicl import check_sides, load_tasks
    from mend_hf.data.partition import load_partition
    from mend_hf.evaluation.evaluator import evaluate_methods
    from mend_hf.evaluation.methods import DISTILLING_METHODS, METHODS, TRAINED_METHODS, pick_methods
    from mend_hf.evaluation.report import label_result, print_tables, write_tables
    from mend_hf.evaluation.results import ResultFolder
    from mend_hf.evaluation.variations import AS_GIVEN

    config = MendConfig() if distiller is None else MendConfig.from_pretrained(distiller)
    left_out = TRAINED_METHODS | (DISTILLING_METHODS if distiller is None else set())
    if config.task_type == "SEQ_2_SEQ_LM":
        left_out = left_out | {"training-free anchors"}  # they are keys and values, which an encoder does not read
    names = method or [name for name in METHODS if name not in left_out]
    methods = pick_methods(names)
    chosen_seeds, counts = _parse_numbers("seeds", seeds), _parse_numbers("num-demonstrations", num_demonstrations)
    compared = parse_comparisons(compare or [], taken=METHODS)
    settings = {
        "tasks": tasks, "base_model": base_model, "distiller": distiller, "compare": compared,
        "distiller_hashes": [_hash_distiller(place) for place in (distiller, *compared.values())],
        "max_queries": max_queries, "metric": metric, "on_missing_gold": on_missing_gold,
    }  # fmt: skip
    if dtype is not None:  # as its default, it is no setting: folders from before there was one go on
        settings["dtype"] = dtype
    with join_processes(device) as processes:
        folder = ResultFolder(output_dir, settings, overwrite=overwrite, process_index=processes.index)
        wanted = only or (list(load_partition(partition).test) if partition else None)
        on_missing: Literal["error", "keep"] = "keep" if on_missing_gold == "wrong" else "error"
        test_tasks = load_tasks(tasks, split="test", tasks=wanted, on_missing_gold=on_missing)
        train_tasks = load_tasks(tasks, split="train", tasks=sorted(test_tasks))
        check_sides(train_tasks, test_tasks)
        base, tokenizer = load_base_of(distiller, base_model, choose_device(device), dtype)
        methods |= load_comparisons(compared, base, tokenizer, config)
        new_results = evaluate_methods(
            wrap_for_answering(base, tokenizer, distiller),
            train_tasks,
            test_tasks,
            methods,
            num_demonstrations=counts,
            seeds=chosen_seeds,
            variations=variations or [AS_GIVEN],
            max_queries=max_queries,
            batch_size=batch_size,
            scoring=scoring,
            metric=metric,
            finished={result.key for result in folder.results},
            share=(processes.index, processes.number),
        )
        processes.wait()  # all know what is there
        if processes.is_first:
            folder.start()
        processes.wait()
        console = Console()
        for result in new_results:
            folder.add(result)
            label = label_result(result, folder.results)
            console.print(f"{result.task}, seed {result.seed}, {label}: {100 * result.score:.1f} ({result.metric})")
        processes.wait()
        if processes.is_first:
            folder.finish()
            order = {name: index for index, name in enumerate([*METHODS, *compared])}
            results = sorted(folder.results, key=lambda result: (result.task, order[result.method], result.seed))
            write_tables(results, output_dir)
            print_tables(results, console)


def _parse_numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"Expected --{name} as numbers with commas, such as 13,21,42, got {text!r}.") from error


def _hash_distiller(place: str | None) -> str | None:
    """Return what tells a distiller from another one in the same place; None: there is none."""
    from mend_hf.fingerprint import hash_json

    try:
        return None if place is None else hash_json(fetch_json(place, CONFIG_NAME))
    except CheckpointError:
        return None  # a language model
