"""`mend pretrain` and `mend finetune`."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from mend_hf.cli.options import BaseModel, Device, Distiller, Dtype, OutputFolder
from mend_hf.cli.run import load_for_training, make_arguments, make_config, train
from mend_hf.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mend_hf.data.metaicl import Example

Tasks: TypeAlias = "dict[str, list[Example]]"
NumTokens = Annotated[int | None, typer.Option(help="Virtual tokens of a new distiller.", min=0)]
Form = Annotated[str | None, typer.Option(help='Prefix form of a new distiller: "kv" or "embeds".')]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field of MendConfig for a new distiller, as name=value; may be repeated."),
]
BaseModelId = Annotated[
    str | None, typer.Option(help="Name of the base model to record, where it was loaded from a folder.")
]
NumRows = Annotated[int, typer.Option(help="Training rows in all; a row is one distilling.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Rows of one forward pass.", min=1)]
GroupByLength = Annotated[
    bool,
    typer.Option("--group-by-length", help="Put rows of like length into a step: less padding, less mixed batches."),
]
Accumulation = Annotated[int, typer.Option(help="Forward passes of one optimizer step.", min=1)]
Recipe = Annotated[
    str,
    typer.Option(
        help="Numbers that have proved themselves: pretrain, finetune, paper-pretrain, paper-finetune, hypertuning "
        "(no teacher), metaicl (the base model itself is tuned)."
    ),
]
Argument = Annotated[
    list[str] | None,
    typer.Option(
        "--arg",
        help="A field of MendTrainingArguments, as name=value: kd_divergence=reverse_kl, kd_top_k=64, "
        "teacher_cache_dir=FOLDER, nonfinite_loss=skip, bf16=true ...; may be repeated.",
    ),
]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate. Default: the recipe's.")]
KdWeight = Annotated[
    float | None, typer.Option(help="Weight of the divergence from the teacher. Default: the recipe's.")
]
NllWeight = Annotated[float | None, typer.Option(help="Weight of the targets' NLL. Default: the recipe's.")]
OptionWeight = Annotated[
    float | None,
    typer.Option(help="Weight of choosing the target among a query's options. Default: the recipe's, which is 0."),
]
SaveSteps = Annotated[int, typer.Option(help="Optimizer steps between checkpoints (the last two are kept).", min=1)]
ProbeRows = Annotated[
    int,
    typer.Option(
        help="Rows on which student, teacher and zero-shot are compared now and then, of held-out tasks if there are "
        "any; 0: none.",
        min=0,
    ),
]
Seed = Annotated[int, typer.Option(help="Fixes initial values, rows and their order.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")]
ReportTo = Annotated[str, typer.Option(help="none, tensorboard, wandb ...")]

# Of streamed documents, only so many of the first are looked through for probe rows.
_NUM_PROBED_TEXTS = 256


def pretrain(
    text: Annotated[
        str, typer.Option(help="Plain text: a .jsonl(.zst), .parquet or .txt file, a folder, or a Hub id.")
    ],
    output_dir: OutputFolder,
    base_model: BaseModel = None,
    base_model_id: BaseModelId = None,
    distiller: Distiller = None,
    num_virtual_tokens: NumTokens = None,
    prefix_form: Form = None,
    settings: Setting = None,
    text_column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    max_tokens: Annotated[int, typer.Option(help="Tokens of a document: 80 % demonstrations, the rest query.")] = 1024,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read documents as they come, for text too large to hold in memory.")
    ] = False,
    num_rows: NumRows = 30_000,
    batch_size: BatchSize = 8,
    gradient_accumulation_steps: Accumulation = 1,
    group_by_length: GroupByLength = False,
    recipe: Recipe = "pretrain",
    arguments: Argument = None,
    learning_rate: LearningRate = None,
    kd_loss_weight: KdWeight = None,
    nll_loss_weight: NllWeight = None,
    save_steps: SaveSteps = 50,
    probe_rows: ProbeRows = 8,
    seed: Seed = 13,
    resume: Resume = False,
    report_to: ReportTo = "none",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Stage 1: learn on plain text to write a prefix that stands for the text before.

    `mend pretrain --base-model HuggingFaceTB/SmolLM2-135M-Instruct --text my-texts.jsonl --output-dir stage1`
    """
    from mend_hf.data.documents import TextStream
    from mend_hf.data.streaming import StreamingTextDataset
    from mend_hf.data.text import TextDataset, load_texts
    from mend_hf.trainer import make_collator

    config = make_config(distiller, base_model, num_virtual_tokens, prefix_form, settings)
    args = make_arguments(
        recipe,
        output_dir,
        num_rows,
        {
            "learning_rate": learning_rate, "kd_loss_weight": kd_loss_weight, "nll_loss_weight": nll_loss_weight,
            "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps,
            "save_steps": save_steps, "seed": seed, "report_to": report_to,
            "train_sampling_strategy": "group_by_length" if group_by_length else None,
        },
        arguments,
        num_probe_rows=probe_rows,
        has_evaluation=False,
        resume=resume,
        device=device,
    )  # fmt: skip
    texts: Iterable[str]
    if streaming:
        texts = TextStream(text, text_column=text_column, streaming=True)
    else:
        texts = load_texts(text, text_column=text_column)
    model, tokenizer = load_for_training(config, distiller, base_model, base_model_id, device, dtype, seed, recipe)
    shape: dict[str, Any] = {"tokenizer": tokenizer, "max_tokens": max_tokens}
    rows: TextDataset | StreamingTextDataset
    if streaming:
        rows_of_all = args.train_batch_size * args.world_size
        rows = StreamingTextDataset(texts, batch_size=rows_of_all, num_rows=num_rows, seed=seed, **shape)
        known = list(itertools.islice(texts, _NUM_PROBED_TEXTS)) if probe_rows else []
    else:
        rows = TextDataset(texts, num_rows=num_rows, seed=seed, **shape)
        known = rows.texts
    probe = TextDataset(known, num_rows=probe_rows, seed=seed + 2, **shape) if probe_rows else None
    collator = make_collator(model, args, tokenizer)
    train(model, tokenizer, args, rows, None, collator, probe_rows=probe, recipe=recipe, resume=resume)


def finetune(
    tasks: Annotated[str, typer.Option(help="Tasks in MetaICL's format: a folder, a file, or a Hub id.")],
    output_dir: OutputFolder,
    partition: Annotated[
        str | None,
        typer.Option(
            help='One of MetaICL\'s settings, such as class_to_class, or a JSON file {"train": [...], "test": [...]}: '
            "only its training tasks are used."
        ),
    ] = None,
    base_model: BaseModel = None,
    base_model_id: BaseModelId = None,
    distiller: Distiller = None,
    num_virtual_tokens: NumTokens = None,
    prefix_form: Form = None,
    settings: Setting = None,
    num_demonstrations: Annotated[str, typer.Option(help="Demonstrations of a row: 16, or a range 4-16.")] = "16",
    queries_per_demonstrations: Annotated[int, typer.Option(help="Queries that share one distilling.", min=1)] = 4,
    max_demonstration_tokens: Annotated[
        int | None, typer.Option(help="Cut demonstrations of training rows to this; the saved config keeps its own.")
    ] = None,
    mixing: Annotated[
        str, typer.Option(help='How often a task is drawn: "uniform", "proportional" to its size, or a temperature.')
    ] = "uniform",
    mixing_limit: Annotated[
        int | None, typer.Option(help="Examples that a task counts for at most in the mixing.", min=1)
    ] = None,
    balance_queries: Annotated[
        bool, typer.Option("--balance-queries", help="Draw queries with every answer equally likely.")
    ] = False,
    permute_labels: Annotated[
        float, typer.Option(help="Fraction of rows whose labels trade places.", min=0.0, max=1.0)
    ] = 0.0,
    symbol_labels: Annotated[
        float, typer.Option(help="Fraction of rows whose labels become words of no meaning.", min=0.0, max=1.0)
    ] = 0.0,
    prompt_formats: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-format",
            help='Write every row in one of these: "chat", "plain", or texts such as \'{"input_prefix": "Q: "}\'; may '
            "be repeated. Default: the distiller's.",
        ),
    ] = None,
    option_loss_weight: OptionWeight = None,
    max_options: Annotated[
        int, typer.Option(help="Options of a query, the target among them, that its option loss compares.", min=2)
    ] = 4,
    num_eval_tasks: Annotated[int, typer.Option(help="Training tasks held out to measure the loss on.", min=0)] = 0,
    eval_tasks: Annotated[
        str | None, typer.Option(help="Other tasks to measure the loss on, in place of held-out ones.")
    ] = None,
    load_best_model_at_end: Annotated[
        bool | None,
        typer.Option(help="Save the checkpoint with the lowest loss on these tasks. Default: if there are any."),
    ] = None,
    num_rows: NumRows = 30_000,
    batch_size: BatchSize = 8,
    gradient_accumulation_steps: Accumulation = 1,
    group_by_length: GroupByLength = False,
    recipe: Recipe = "finetune",
    arguments: Argument = None,
    learning_rate: LearningRate = None,
    kd_loss_weight: KdWeight = None,
    nll_loss_weight: NllWeight = None,
    save_steps: SaveSteps = 50,
    probe_rows: ProbeRows = 8,
    seed: Seed = 13,
    resume: Resume = False,
    report_to: ReportTo = "none",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Stage 2: learn on many tasks to write a prefix that stands for their demonstrations.

    `mend finetune --distiller stage1 --tasks my-tasks --output-dir stage2`
    """
    from mend_hf.data.few_shot import FewShotDataset
    from mend_hf.trainer import make_collator

    has_evaluation = bool(num_eval_tasks or eval_tasks)
    if load_best_model_at_end and not has_evaluation:
        raise ConfigError(
            "Expected tasks to choose the best checkpoint by, got none: add --num-eval-tasks or --eval-tasks."
        )
    config = make_config(distiller, base_model, num_virtual_tokens, prefix_form, settings)
    args = make_arguments(
        recipe,
        output_dir,
        num_rows,
        {
            "learning_rate": learning_rate, "kd_loss_weight": kd_loss_weight, "nll_loss_weight": nll_loss_weight,
            "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps,
            "save_steps": save_steps, "seed": seed, "report_to": report_to,
            "train_sampling_strategy": "group_by_length" if group_by_length else None,
            "option_loss_weight": option_loss_weight,
            "load_best_model_at_end": has_evaluation and load_best_model_at_end is not False,
        },
        arguments,
        num_probe_rows=probe_rows,
        has_evaluation=has_evaluation,
        resume=resume,
        device=device,
    )  # fmt: skip
    train_examples, eval_examples = _load_sides(tasks, partition, eval_tasks, num_eval_tasks, seed)
    shape: dict[str, Any] = {
        "num_demonstrations": _parse_range(num_demonstrations),
        "queries_per_demonstrations": queries_per_demonstrations,
        "max_options": max_options,
    }
    rows = FewShotDataset(
        train_examples,
        num_rows=num_rows,
        seed=seed,
        mixing=_parse_mixing(mixing),
        mixing_limit=mixing_limit,
        balance_queries=balance_queries,
        permute_labels=permute_labels,
        symbol_labels=symbol_labels,
        prompt_formats=[_parse_prompt_format(text) for text in prompt_formats or []],
        **shape,
    )
    eval_rows = None
    if eval_examples:
        eval_rows = FewShotDataset(eval_examples, num_rows=4 * len(eval_examples), seed=seed + 1, **shape)
    probe = None
    if probe_rows:
        probe = FewShotDataset(eval_examples or train_examples, num_rows=probe_rows, seed=seed + 2, **shape)
    model, tokenizer = load_for_training(config, distiller, base_model, base_model_id, device, dtype, seed, recipe)
    cap = {} if max_demonstration_tokens is None else {"max_demonstration_tokens": max_demonstration_tokens}
    collator = make_collator(model, args, tokenizer, **cap)
    for choice in rows.prompt_formats:  # one that the tokenizer cannot write is refused now, and not in some step
        collator([rows[0] | {"prompt_format": choice}])
    train(model, tokenizer, args, rows, eval_rows, collator, probe_rows=probe, recipe=recipe, resume=resume)


def _load_sides(
    source: str, partition: str | None, eval_source: str | None, num_eval_tasks: int, seed: int
) -> tuple[Tasks, Tasks]:
    """Return the tasks to train on, and those to measure the loss on: neither a test task nor one of the first."""
    from mend_hf.data.metaicl import check_test_names, load_tasks
    from mend_hf.data.partition import check_disjoint, hold_out_tasks, load_partition

    if eval_source and num_eval_tasks:
        raise ConfigError("Expected --num-eval-tasks or --eval-tasks, got both: leave one out.")
    sides = load_partition(partition) if partition else None
    test_tasks = sides.test if sides else ()
    if sides:
        check_test_names(source, sides.test, training=sides.train)
    train_side = load_tasks(source, split="train", tasks=sides.train if sides else None)
    if eval_source:
        held_out = load_tasks(eval_source, split="train")
        check_disjoint(training=train_side, evaluation=held_out, test=test_tasks)
        return train_side, held_out
    names = hold_out_tasks(train_side, num_eval_tasks, seed=seed, test_tasks=test_tasks)
    remaining = {name: rows for name, rows in train_side.items() if name not in names}
    return remaining, {name: train_side[name] for name in names}


def _parse_range(text: str) -> int | tuple[int, int]:
    try:
        low, _, high = text.partition("-")
        return (int(low), int(high)) if high else int(low)
    except ValueError as error:
        raise ConfigError(f"Expected a number such as 16 or a range such as 4-16, got {text!r}.") from error


def _parse_mixing(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _parse_prompt_format(text: str) -> Any:
    try:
        return json.loads(text) if text.lstrip().startswith("{") else text
    except ValueError as error:
        raise ConfigError(
            f'Expected "chat", "plain" or a JSON object as --prompt-format, got {text!r} ({error}): correct it.'
        ) from error
