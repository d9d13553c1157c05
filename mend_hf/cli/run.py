"""One training on the command line: its settings, its model, and what is printed and left behind."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mend_hf.cli.options import DtypeName, load_base_model
from mend_hf.cli.processes import choose_device
from mend_hf.config import MendConfig
from mend_hf.errors import ConfigError, MissingExtraError
from mend_hf.files import check_output_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mend_hf.curves import TrainingCurves
    from mend_hf.data.collator import MendCollator
    from mend_hf.model import MendModel
    from mend_hf.training_args import MendTrainingArguments


def make_config(
    distiller: str | None,
    base_model: str | None,
    num_virtual_tokens: int | None,
    prefix_form: str | None,
    settings: list[str] | None,
) -> MendConfig:
    """Return the config of a saved distiller, or of a new one."""
    changes = dict(parse_setting(text, MendConfig) for text in settings or [])
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


def make_arguments(
    recipe: str,
    output_dir: Path,
    num_rows: int,
    options: dict[str, Any],
    arguments: list[str] | None,
    *,
    num_probe_rows: int,
    has_evaluation: bool,
    resume: bool,
    device: str | None,
) -> MendTrainingArguments:
    """Return a recipe's arguments, changed by the options that were given and, above all, by `--arg`.

    The number of rows decides that of the steps, and on those depends how often is logged, and how often is probed: up
    to twenty times, and never more than a tenth of the training's rows, besides the first time.
    """
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    from mend_hf.checkpoints import check_unused
    from mend_hf.sharding import check_zero_stage
    from mend_hf.training_args import RECIPES, MendTrainingArguments

    check_output_folder(output_dir)
    if not resume:
        check_unused(output_dir)
    if recipe not in RECIPES:
        raise ConfigError(f"Expected a recipe among {', '.join(RECIPES)}, got {recipe!r}.")
    given = {name: value for name, value in options.items() if value is not None}
    given |= dict(parse_setting(text, MendTrainingArguments) for text in arguments or [])
    chosen = {name: value for name, value in RECIPES[recipe].items() if name != "max_steps"} | given
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows_a_step = chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"] * num_processes
    num_steps = max(num_rows // rows_a_step, 1)
    num_probes = min(max(num_rows // (10 * max(num_probe_rows, 1)), 1), 20)
    settings: dict[str, Any] = {
        "max_steps": num_steps,
        "probe_steps": math.ceil(num_steps / num_probes),
        "disable_tqdm": False,
        "warmup_steps": max(num_steps // 20, 1),
        "lr_scheduler_type": "linear",
        "logging_steps": max(num_steps // 100, 1),
        "save_total_limit": 2,
        "eval_strategy": "steps" if has_evaluation else "no",
        "eval_steps": chosen["save_steps"] if chosen.get("load_best_model_at_end") else max(num_steps // 5, 1),
        "per_device_eval_batch_size": chosen["per_device_train_batch_size"],
        "use_cpu": device == "cpu" or (device is None and not torch.accelerator.is_available()),
        "dataloader_pin_memory": torch.cuda.is_available() and device != "cpu",
    }
    try:
        args = MendTrainingArguments(output_dir=str(output_dir), **settings | chosen)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The training arguments do not go: {error}") from error
    check_zero_stage(3 if is_deepspeed_zero3_enabled() else 0)
    return args


def load_for_training(
    config: MendConfig,
    distiller: str | None,
    base_model: str | None,
    base_model_id: str | None,
    device: str | None,
    dtype: DtypeName | None,
    seed: int,
    recipe: str | None,
) -> tuple[MendModel | PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what is trained, a distiller on its base model or, by some recipes, the base model; and its tokenizer."""
    import torch

    from mend_hf.auto import get_mend_model
    from mend_hf.model import MendModel
    from mend_hf.training_args import RECIPES_WITHOUT_DISTILLER

    torch.manual_seed(seed)
    base, tokenizer = load_base_model(base_model or config.base_model_name_or_path, choose_device(device), dtype)
    if recipe in RECIPES_WITHOUT_DISTILLER:
        if distiller is not None:
            raise ConfigError(
                f"Expected no --distiller with the recipe {recipe}, which tunes the base model itself, got "
                f"{distiller}: leave it out."
            )
        return base, tokenizer
    if distiller is not None:
        return MendModel.from_pretrained(base, distiller, tokenizer, config=config), tokenizer
    config = dataclasses.replace(config, base_model_name_or_path=base_model_id or base_model)
    return get_mend_model(base, config, tokenizer), tokenizer


def train(
    model: MendModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: MendTrainingArguments,
    train_rows: Any,
    eval_rows: Any | None,
    collator: MendCollator,
    *,
    probe_rows: Any | None,
    recipe: str,
    resume: bool,
) -> None:
    """Train, and leave the result and the log in the output folder."""
    from transformers import PrinterCallback, ProgressCallback

    from mend_hf.checkpoints import find_last_checkpoint
    from mend_hf.model import MendModel
    from mend_hf.progress import TrainingProgress
    from mend_hf.trainer import MendTrainer

    output_dir = Path(args.output_dir)
    is_main = args.process_index == 0
    if is_main and isinstance(model, MendModel):
        model.print_trainable_parameters()
    progress = TrainingProgress()
    trainer = MendTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        probe_dataset=probe_rows,
        processing_class=None if isinstance(model, MendModel) else tokenizer,
        callbacks=[progress, *_make_curves(is_main)],
    )
    for display in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(display)
    checkpoint = find_last_checkpoint(output_dir) if resume else None
    if resume and checkpoint is None and is_main:
        print(f"No checkpoint in {output_dir} yet: starting from the first step")
    with progress:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if is_main:
        write_json(output_dir / "training_log.json", {"recipe": recipe, "log": trainer.state.log_history})
        what = "distiller" if isinstance(model, MendModel) else "model"
        print(f"Saved the {what} in {output_dir}")
    # A process that ends with its group in place may be aborted by a thread of it, though all is done and saved.
    trainer.accelerator.end_training()


def _make_curves(is_main: bool) -> list[TrainingCurves]:
    """Return what draws the curves, in a list; without matplotlib an empty one, and say so."""
    from mend_hf.curves import CURVES_NAME, TrainingCurves

    try:
        return [TrainingCurves()]
    except MissingExtraError as error:
        if is_main:
            print(f"No {CURVES_NAME}: {error}")
        return []


def parse_setting(text: str, fields_of: type) -> tuple[str, Any]:
    """Return a field's name and value of `name=value`; what is no JSON is text."""
    name, equals, value = text.partition("=")
    known = [field.name for field in dataclasses.fields(fields_of) if field.init]
    if not equals or name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"Expected name=value with a field of {fields_of.__name__}, got {text!r}{hint}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
