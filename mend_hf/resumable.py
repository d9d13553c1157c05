"""A Trainer that can be killed: its checkpoints appear whole or not at all, and it goes on only where it may."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    TrainOutput,
    rotate_checkpoints,
)

from mend_hf.checkpoints import (
    RUN_NAME,
    STAGING_NAME,
    check_resumed,
    check_unused,
    clear_staging,
    describe_rows,
    find_last_checkpoint,
    publish_checkpoint,
    report_failed_save,
)
from mend_hf.config import MendConfig
from mend_hf.errors import CheckpointError
from mend_hf.files import check_output_folder, write_json


class ResumableTrainer(Trainer):
    """`Trainer` with checkpoints to rely on.

    Raises:
        CheckpointError: The output folder cannot be written into.
    """

    _staging: Path | None = None  # where a checkpoint is written while it is not whole
    _rows: dict[str, Any] | None = None  # by what the training's rows are known again

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        check_output_folder(args.output_dir)
        super().__init__(model, args, **kwargs)

    def _mend_config(self) -> MendConfig | None:
        """Return the config that a checkpoint must have been made with; None: any."""
        return None

    def _describe_run(self) -> dict[str, Any]:
        """Return what decides the next losses: the arguments, the processes and the training rows."""
        return {
            "arguments": self.args.to_dict(),
            "num_processes": self.args.world_size,
            "training_rows": self._rows,
        }

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, or go on from a checkpoint that the same settings made; see `Trainer.train`.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True: the last one in the output folder.
            *args: As in `Trainer.train`.
            **kwargs: As in `Trainer.train`.

        Raises:
            CheckpointError: There is no such checkpoint, it was made with other settings, which the message names, or
                the output folder has an earlier run's checkpoints and none of them is to be gone on from.
        """
        if self.args.should_save:
            clear_staging(self.args.output_dir)
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = find_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise CheckpointError(
                    f"Expected a checkpoint to go on from in {self.args.output_dir}, got none: start without "
                    "resume_from_checkpoint, or name the checkpoint's folder."
                )
        self._rows = describe_rows(self.train_dataset)
        if checkpoint:
            check_resumed(str(checkpoint), self._describe_run(), self._mend_config())
        elif self.state.global_step == 0:  # this trainer's own checkpoints it may write anew
            check_unused(self.args.output_dir)
        return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, num_epochs: int, *args: Any) -> Any:
        """Return where training begins: behind all epochs where the checkpoint has done all steps."""
        start = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, *args)
        return (num_epochs, 0) if self.state.global_step >= max_steps else start

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log also where a checkpoint is saved: who goes on from it logs the means that an unbroken run does."""
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # transformers calls this in every process
            return
        folder = Path(output_dir or self.args.output_dir)
        self._save_model(folder, state_dict)
        write_json(folder / RUN_NAME, self._describe_run())

    def _save_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        super()._save(str(folder), state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint once it is in its place."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _do_together(self, work: Callable[[], None]) -> None:
        """Do something in every process, wait for all, and fail in all where it failed in one."""
        error: Exception | None = None
        try:
            work()
        except (OSError, RuntimeError, SafetensorError) as own:  # torch's and safetensors' own for a full disk
            error = own
        failed = torch.tensor([error is not None], dtype=torch.long, device=self.args.device)
        num_failed = int(self.accelerator.gather(failed).sum())
        if error is not None:
            raise error
        if num_failed:
            raise OSError(f"an error in {num_failed} of {self.args.world_size} processes, which says it itself")

    def _publish(self, staged: Path, folder: Path) -> None:
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            publish_checkpoint(staged, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint in a staging folder, and move it to its place once it is whole."""
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = folder / STAGING_NAME
        try:
            self._do_together(partial(super()._save_checkpoint, model, trial))  # each writes its random numbers' state
            if self.state.best_model_checkpoint == str(self._staging / name):
                self.state.best_model_checkpoint = str(folder / name)
            self._do_together(partial(self._publish, self._staging / name, folder / name))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise report_failed_save(folder, error) from error
        finally:
            if self.args.should_save:
                clear_staging(folder)
            self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
