"""`mend pretrain` and `mend finetune`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from mend_hf.cli.options import BaseModel, Device, Distiller, OutputFolder, load_base_model
from mend_hf.config import MendConfig
from mend_hf.errors import ConfigError
from mend_hf.files import check_output_folder, write_json

if TYPE_CHECKING:
    from mend_hf.data.metaicl import Example
    from mend_hf.model import MendModel

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
Accumulation = Annotated[int, typer.Option(help="Forward passes of one optimizer step.", min=1)]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate. Default: the stage's.")]
KdWeight = Annotated[float | None, typer.Option(help="Weight of KL(teacher || student). Default: the stage's.")]
NllWeight = Annotated[float | None, typer.Option(help="Weight of the targets' NLL. Default: the stage's.")]
SaveSteps = Annotated[int, typer.Option(help="Optimizer steps between checkpoints (the last two are kept).", min=1)]
Seed = Annotated[int, typer.Option(help="Fixes initial values, rows and their order.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")]
ReportTo = Annotated[str, typer.Option(help="none, tensorboard, wandb ...")]


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
    num_rows: NumRows = 30_000,
    batch_size: BatchSize = 8,
    gradient_accumulation_steps: Accumulation = 1,
    learning_rate: LearningRate = None,
    kd_loss_weight: KdWeight = None,
    nll_loss_weight: NllWeight = None,
    save_steps: SaveSteps = 50,
    seed: Seed = 13,
    resume: Resume = False,
    report_to: ReportTo = "none",
    device: Device = None,
) -> None:
    """Stage 1: learn on plain text to write a prefix that stands for the text before.

    `mend pretrain --base-model HuggingFaceTB/SmolLM2-135M-Instruct --text my-texts.jsonl --output-dir stage1`
    """
    from mend_hf.data.text import TextDataset, load_texts

    check_output_folder(output_dir)
    config = _make_config(distiller, base_model, num_virtual_tokens, prefix_form, settings)
    texts = load_texts(text, text_column=text_column)
    model = _load_for_training(config, distiller, base_model, base_model_id, device, seed)
    rows = TextDataset(texts, tokenizer=model.prompt.tokenizer, max_tokens=max_tokens, num_rows=num_rows, seed=seed)
    overrides = {
        "learning_rate": learning_rate, "kd_loss_weight": kd_loss_weight, "nll_loss_weight": nll_loss_weight,
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps,
        "save_steps": save_steps, "seed": seed, "report_to": report_to,
    }  # fmt: skip
    _train(model, "pretrain", output_dir, rows, None, None, overrides, resume)


def finetune(
    tasks: Annotated[str, typer.Option(help="Tasks in MetaICL's format: a folder, a file, or a Hub id.")],
    output_dir: OutputFolder,
    partition: Annotated[
        Path | None, typer.Option(help='JSON {"train": [...], "test": [...]}: only its training tasks are used.')
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
    learning_rate: LearningRate = None,
    kd_loss_weight: KdWeight = None,
    nll_loss_weight: NllWeight = None,
    save_steps: SaveSteps = 50,
    seed: Seed = 13,
    resume: Resume = False,
    report_to: ReportTo = "none",
    device: Device = None,
) -> None:
    """Stage 2: learn on many tasks to write a prefix that stands for their demonstrations.

    `mend finetune --distiller stage1 --tasks my-tasks --output-dir stage2`
    """
    from mend_hf.data.collator import MendCollator
    from mend_hf.data.few_shot import FewShotDataset

    check_output_folder(output_dir)
    config = _make_config(distiller, base_model, num_virtual_tokens, prefix_form, settings)
    train_examples, eval_examples = _load_sides(tasks, partition, eval_tasks, num_eval_tasks, seed)
    if load_best_model_at_end and not eval_examples:
        raise ConfigError(
            "Expected tasks to choose the best checkpoint by, got none: add --num-eval-tasks or --eval-tasks."
        )
    shape: dict[str, Any] = {
        "num_demonstrations": _parse_range(num_demonstrations),
        "queries_per_demonstrations": queries_per_demonstrations,
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
        **shape,
    )
    eval_rows = None
    if eval_examples:
        eval_rows = FewShotDataset(eval_examples, num_rows=4 * len(eval_examples), seed=seed + 1, **shape)
    model = _load_for_training(config, distiller, base_model, base_model_id, device, seed)
    config = model.mend_config
    if max_demonstration_tokens is not None:
        config = dataclasses.replace(config, max_demonstration_tokens=max_demonstration_tokens)
    collator = MendCollator(
        model.prompt.tokenizer, config, model.distiller_tokenizer, with_teacher=kd_loss_weight != 0
    )
    overrides = {
        "learning_rate": learning_rate, "kd_loss_weight": kd_loss_weight, "nll_loss_weight": nll_loss_weight,
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps,
        "save_steps": save_steps, "seed": seed, "report_to": report_to,
        "load_best_model_at_end": bool(eval_examples) and load_best_model_at_end is not False,
    }  # fmt: skip
    _train(model, "finetune", output_dir, rows, eval_rows, collator, overrides, resume)


def _load_sides(
    source: str, partition: Path | None, eval_source: str | None, num_eval_tasks: int, seed: int
) -> tuple[Tasks, Tasks]:
    """Return the tasks to train on, and those to measure the loss on: neither a test task nor one of the first."""
    from mend_hf.data.metaicl import load_tasks
    from mend_hf.data.partition import check_disjoint, hold_out_tasks, load_partition

    if eval_source and num_eval_tasks:
        raise ConfigError("Expected --num-eval-tasks or --eval-tasks, got both: leave one out.")
    sides = load_partition(partition) if partition else None
    test_tasks = sides.test if sides else ()
    train = load_tasks(source, split="train", tasks=sides.train if sides else None)
    if eval_source:
        held_out = load_tasks(eval_source, split="train")
        check_disjoint(training=train, evaluation=held_out, test=test_tasks)
        return train, held_out
    names = hold_out_tasks(train, num_eval_tasks, seed=seed, test_tasks=test_tasks)
    return {name: rows for name, rows in train.items() if name not in names}, {name: train[name] for name in names}


def _train(
    model: Any,
    stage: str,
    output_dir: Path,
    train_rows: Any,
    eval_rows: Any | None,
    collator: Any | None,
    overrides: dict[str, Any],
    resume: bool,
) -> None:
    from mend_hf.trainer import MendTrainer
    from mend_hf.training_args import RECIPES, MendTrainingArguments

    chosen = RECIPES[stage] | {key: value for key, value in overrides.items() if value is not None}
    rows_a_step = chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"]
    num_steps = max(len(train_rows) // rows_a_step, 1)
    args = MendTrainingArguments(
        output_dir=str(output_dir),
        max_steps=num_steps,
        warmup_steps=max(num_steps // 20, 1),
        lr_scheduler_type="linear",
        logging_steps=max(num_steps // 100, 1),
        save_total_limit=2,
        eval_strategy="steps" if eval_rows is not None else "no",
        eval_steps=chosen["save_steps"] if chosen.get("load_best_model_at_end") else max(num_steps // 5, 1),
        per_device_eval_batch_size=chosen["per_device_train_batch_size"],
        dataloader_pin_memory=model.device.type == "cuda",
        **chosen,
    )
    model.print_trainable_parameters()
    trainer = MendTrainer(
        model=model, args=args, train_dataset=train_rows, eval_dataset=eval_rows, data_collator=collator
    )
    checkpoint = _last_checkpoint(output_dir) if resume else None
    if resume and checkpoint is None:
        print(f"No checkpoint in {output_dir} yet: starting from the first step")
    trainer.train(resume_from_checkpoint=checkpoint)
    model.save_pretrained(output_dir)
    write_json(
        output_dir / "training_log.json", {"stage": stage, "arguments": chosen, "log": trainer.state.log_history}
    )
    print(f"Saved the distiller in {output_dir}")


def _last_checkpoint(output_dir: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None


def _make_config(
    distiller: str | None,
    base_model: str | None,
    num_virtual_tokens: int | None,
    prefix_form: str | None,
    settings: list[str] | None,
) -> MendConfig:
    """Return the config of a saved distiller, or of a new one."""
    changes = dict(_parse_setting(text) for text in settings or [])
    changes |= {} if num_virtual_tokens is None else {"num_virtual_tokens": num_virtual_tokens}
    changes |= {} if prefix_form is None else {"prefix_form": prefix_form}
    if distiller is None:
        if base_model is None:
            raise ConfigError(
                "Expected --base-model, or --distiller, which names one, got neither: name a Hub id or a folder."
            )
        return MendConfig(**changes)
    if changes:
        raise ConfigError(
            f"Expected no settings for a distiller that exists, got {', '.join(changes)}: leave them out, or train "
            "a new distiller without --distiller."
        )
    return MendConfig.from_pretrained(distiller)


def _load_for_training(
    config: MendConfig,
    distiller: str | None,
    base_model: str | None,
    base_model_id: str | None,
    device: str | None,
    seed: int,
) -> MendModel:
    import torch

    from mend_hf.auto import get_mend_model
    from mend_hf.model import MendModel

    torch.manual_seed(seed)
    base, tokenizer = load_base_model(base_model or config.base_model_name_or_path, device)
    if distiller is not None:
        return MendModel.from_pretrained(base, distiller, tokenizer, config=config)
    config = dataclasses.replace(config, base_model_name_or_path=base_model_id or base_model)
    return get_mend_model(base, config, tokenizer)


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


def _parse_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    known = [setting.name for setting in dataclasses.fields(MendConfig)]
    if not equals or name not in known:
        raise ConfigError(f"Expected name=value with a field of MendConfig ({', '.join(known)}), got {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
