"""Checkpoints of a training that appear whole or not at all, and whether one may be gone on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers.trainer_utils import get_last_checkpoint

from mend_hf.config import MendConfig
from mend_hf.errors import CheckpointError
from mend_hf.files import flush_to_disk, read_json

STAGING_NAME = ".saving-checkpoint"
RUN_NAME = "training_run.json"

# What decides the next losses; all else may change when a training goes on.
_DECISIVE_ARGUMENTS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "train_sampling_strategy", "dataloader_drop_last", "ignore_data_skip", "average_tokens_across_devices", "bf16",
    "fp16", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "adam_beta1",
    "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "nll_loss_weight", "kd_loss_weight",
    "option_loss_weight", "calibrate_options", "kd_divergence", "kd_temperature", "kd_top_k", "hidden_loss_weight",
    "hidden_loss_layers", "nonfinite_loss",
)  # fmt: skip
_SETTINGS_THAT_DECIDE_NOTHING = frozenset(
    {"base_model_name_or_path", "base_model_revision", "mend_version", "training_stages"}
)


def publish_checkpoint(staged: Path, folder: Path) -> None:
    """Move a finished checkpoint from the staging folder to its place in one step, once it is on the disk."""
    flush_to_disk(*staged.rglob("*"), staged)
    if folder.exists():  # of an earlier run into the same folder
        os.replace(folder, staged.parent / "replaced")
    os.replace(staged, folder)
    flush_to_disk(folder.parent)


def clear_staging(output_dir: str | Path) -> None:
    """Remove what a killed training left half-written."""
    shutil.rmtree(Path(output_dir) / STAGING_NAME, ignore_errors=True)


def find_last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the folder of the last checkpoint in an output folder; None where there is none, or no such folder."""
    return get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None


def report_failed_save(output_dir: str | Path, error: Exception) -> CheckpointError:
    """Return the error to raise where a checkpoint could not be written."""
    free = shutil.disk_usage(output_dir).free
    last = find_last_checkpoint(output_dir)
    remains = f"{last} is whole: free some room and go on from it" if last else "there is none before it"
    return CheckpointError(
        f"Expected to write a checkpoint into {output_dir}, where {free / 1e6:.0f} MB are free, got {error}. Nothing "
        f"of it was kept; {remains}."
    )


def describe_rows(rows: Any) -> dict[str, Any] | None:
    """Return by what training rows are known again: their number and a hash of the first, a middle and the last.

    Of a stream, which has to be read to know more, the first row alone is hashed. None for rows that are not numbered;
    no hash for rows that are not plain values, or not the same twice.
    """
    if rows is None or not hasattr(rows, "__len__") or not len(rows):
        return None
    try:
        first, second = (json.dumps(_pick_rows(rows), sort_keys=True) for _ in range(2))
    except TypeError:
        first, second = "", "not plain values"
    digest = hashlib.sha256(first.encode()).hexdigest() if first == second else None
    return {"num_rows": len(rows), "sha256": digest}


def _pick_rows(rows: Any) -> list[Any]:
    if isinstance(rows, IterableDataset):
        return list(islice(rows, 1))
    return [rows[place] for place in (0, len(rows) // 2, len(rows) - 1)]


def check_unused(output_dir: str | Path) -> None:
    """Refuse to mix a new training's checkpoints with those of an earlier one.

    Raises:
        CheckpointError: There are some.
    """
    last = find_last_checkpoint(output_dir)
    if last is not None:
        raise CheckpointError(
            f"Expected an output folder without checkpoints for a new training, got {last}: go on from it (--resume, "
            "or resume_from_checkpoint=True), name another folder, or remove the old checkpoints."
        )


def check_resumed(checkpoint: str | Path, run: dict[str, Any], config: MendConfig | None) -> None:
    """Refuse to go on from a checkpoint that other settings made.

    Args:
        checkpoint: Its folder.
        run: What the training at hand is: `arguments`, `num_processes`, `training_rows`.
        config: Of the distiller at hand; None where the base model itself is trained.

    Raises:
        CheckpointError: A setting that decides the next losses differs; the message names all of them.
    """
    checkpoint, lines = Path(checkpoint), []
    if (checkpoint / RUN_NAME).exists():
        saved, given = read_json(checkpoint / RUN_NAME), json.loads(json.dumps(run, default=str))
        arguments = {name: given["arguments"].get(name) for name in _DECISIVE_ARGUMENTS}
        lines += _differences(saved.get("arguments") or {}, arguments)
        lines += _differences(saved, {name: given[name] for name in ("num_processes", "training_rows")})
    if config is not None:
        made_with = dataclasses.asdict(MendConfig.from_pretrained(checkpoint))
        at_hand = {k: v for k, v in dataclasses.asdict(config).items() if k not in _SETTINGS_THAT_DECIDE_NOTHING}
        lines += _differences(made_with, at_hand)
    if lines:
        raise CheckpointError(
            f"Expected the settings that {checkpoint} was made with, got others:\n" + "\n".join(lines) + "\n"
            "Go on with the old ones, or start anew in another folder, with the checkpoint as the distiller."
        )


def _differences(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    return [
        f"- {name}: the checkpoint has {saved[name]!r}, this training {value!r}"
        for name, value in given.items()
        if name in saved and saved[name] != value
    ]
