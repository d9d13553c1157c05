"""MendTrainer: the transformers Trainer with a teacher.

Shapes: R tasks, B queries, P predicted tokens, W vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    TrainOutput,
    get_last_checkpoint,
    rotate_checkpoints,
)
from transformers.utils import ModelOutput

from mend_hf.architectures import check_base_model
from mend_hf.checkpoints import (
    ARGUMENTS_NAME,
    STAGING_NAME,
    check_resumed,
    clear_staging,
    publish_checkpoint,
    report_failed_save,
)
from mend_hf.config import MendConfig
from mend_hf.data.collator import MendCollator
from mend_hf.errors import ConfigError, DataError, TrainingError
from mend_hf.files import check_output_folder, write_json
from mend_hf.fingerprint import hash_tensors
from mend_hf.losses import IGNORE_INDEX, hidden_loss, kd_loss, nll_loss
from mend_hf.model import MendModel
from mend_hf.nonfinite import write_batch
from mend_hf.routes import get_route
from mend_hf.teacher import Teacher, join_text, pick_layers
from mend_hf.teacher_cache import TeacherCache
from mend_hf.training_args import MendTrainingArguments

LOSSES = ("nll_loss", "kd_loss", "hidden_loss")


class MendTrainer(Trainer):
    """Trains a distiller; the base model is teacher (with the text) and student (with the prefix), and never changes.

    loss = nll_loss_weight * NLL(target) + kd_loss_weight * divergence(teacher, student) + hidden_loss_weight *
    distance(teacher, student), means over the tokens that count.

    Given a bare language model in place of a distiller, it tunes that model itself on the demonstrations' full text,
    with the targets' NLL alone (MetaICL, the recipe "metaicl").

    Args:
        model: The distiller on its base model; or a language model of transformers.
        args: The same as for `Trainer`, with the losses' weights.
        train_dataset: Rows {"demonstrations", "query", "target"}, see `MendCollator`.
        eval_dataset: Rows of the same form; `eval_kd_loss` and `eval_nll_loss` are reported beside `eval_loss`.
        data_collator: None: a `MendCollator` for the model.
        **kwargs: Passed to `Trainer`. A bare language model without a collator needs `processing_class`, its
            tokenizer.

    Raises:
        ConfigError: The model has no language-model head, or an argument does not go with it.
        CheckpointError: The output folder is a file.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: MendModel | PreTrainedModel,
        args: MendTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        _check_model(model, args)
        check_output_folder(args.output_dir)
        if data_collator is None:
            data_collator = _make_collator(model, args, kwargs.get("processing_class"))
        self._sums: dict[str, float] = defaultdict(float)
        self._num_logged_steps = self._num_skipped = 0
        self._eval_sums: dict[str, float] = defaultdict(float)
        self._num_kd_tokens: Tensor | None = None
        self._staging: Path | None = None  # where a checkpoint is written while it is not whole
        self._teacher = _make_teacher(model, args) if isinstance(model, MendModel) and args.needs_teacher else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            **kwargs,
        )

    @property
    def _inner_model(self) -> MendModel | PreTrainedModel:
        """The model without what Accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted loss, divided by the tokens of all accumulated batches."""
        batch = dict(inputs)
        labels, mask = self._align(batch)
        in_training = model.training
        num_items = num_items_in_batch if in_training else None
        num_kd_items = self._num_kd_tokens if in_training else None
        if self._teacher is not None and "teacher_input_ids" not in batch:
            raise DataError(
                "Expected teacher_input_ids in the batch because kd_loss_weight or hidden_loss_weight is above 0, got "
                "none: use MendCollator(..., with_teacher=True), or set both to 0."
            )
        outputs = self._run_student(model, batch)
        logits = outputs.logits[:, : labels.shape[1]]
        losses: dict[str, Tensor] = {}
        if (labels != IGNORE_INDEX).any():
            losses["nll_loss"] = nll_loss(logits, labels, num_items=num_items)
        if self._teacher is not None:
            targets = self._inner_model.route.target_inputs(batch["labels"])
            teacher = self._teacher(self._inner_model, batch | targets, mask)
            if self.args.kd_loss_weight:
                losses["kd_loss"] = kd_loss(
                    logits,
                    teacher.predictions,
                    mask,
                    kd_divergence=self.args.kd_divergence,
                    kd_temperature=self.args.kd_temperature,
                    num_items=num_kd_items,
                )
            if self.args.hidden_loss_weight:
                states = pick_layers(outputs, self.args.hidden_loss_layers, labels.shape[1])
                losses["hidden_loss"] = hidden_loss(states, teacher.hidden_states, mask, num_items=num_kd_items)
        weighted = [getattr(self.args, f"{name}_weight") * value for name, value in losses.items()]
        loss = sum(weighted, start=logits.new_zeros(()))
        values = {name: value.item() for name, value in losses.items()}
        if in_training and not all(map(math.isfinite, values.values())):
            loss, values = self._pass_over(batch, values), {}
        self._note(values, in_training, num_rows=len(logits))
        if in_training and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _pass_over(self, batch: dict[str, Tensor], values: dict[str, float]) -> Tensor:
        """Return a loss without a gradient in place of one that is not finite, and count it; or stop.

        Raises:
            TrainingError: The arguments say so, or the weights themselves are not finite any more.
        """
        nothing = sum(parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad) * 0.0
        is_lost = not bool(nothing.isfinite())
        if self.args.nonfinite_loss == "stop" or is_lost:
            tokenizer = self._inner_model.tokenizer if isinstance(self._inner_model, MendModel) else None
            path = write_batch(self.args.output_dir, batch, values, self.state.global_step, tokenizer)
            what = "weights that are finite numbers" if is_lost else "a finite loss"
            raise TrainingError(
                f"Expected {what} in step {self.state.global_step + 1}, got {values}. The batch is in {path}: look at "
                "it, lower the learning rate and go on from the last checkpoint"
                + ("." if is_lost else ', or pass over such batches with nonfinite_loss="skip".')
            )
        self._num_skipped += 1
        return nothing

    def _run_student(self, model: nn.Module, batch: dict[str, Tensor]) -> ModelOutput:
        """Return what is trained to say, at the query's positions: behind a prefix, or behind the text itself."""
        inner = self._inner_model
        if isinstance(inner, MendModel):
            inputs = {name: value for name, value in batch.items() if name != "labels" and "teacher" not in name}
            inputs |= inner.route.target_inputs(batch["labels"])
            return model(**inputs, output_hidden_states=self.args.hidden_loss_weight > 0)
        targets = get_route(inner).target_inputs(batch["labels"])
        outputs = model(**join_text(batch, inner), **targets, use_cache=False)
        if not targets:
            outputs.logits = outputs.logits[:, -batch["input_ids"].shape[1] :]
        return outputs

    def _align(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the first P logits of every row predict, and where the teacher's distribution counts.

        A decoder-only model predicts query and target, each token from those before it; the decoder of an
        encoder-decoder predicts the target alone.

        Returns:
            Labels (B, P) and a mask (B, P).
        """
        if self._inner_model.config.is_encoder_decoder:
            return batch["labels"], batch["labels"] != IGNORE_INDEX
        mask = batch["attention_mask"].bool()
        return batch["labels"][:, 1:], mask[:, 1:] & mask[:, :-1]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect the batches of one step and count the tokens that each loss is averaged over."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_logged_steps += 1
        count = sum(self._align(batch)[1].sum() for batch in batches)
        if isinstance(count, Tensor):
            count = count.to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
            self._num_kd_tokens = count
        return batches, num_items

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Return the loss alone: logits of a whole vocabulary are not gathered."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and report the losses apart."""
        sums = self._eval_sums = defaultdict(float)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name in LOSSES:
            if name in sums:
                output.metrics[f"{metric_key_prefix}_{name}"] = sums[name] / sums[f"num_{name}"]
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the losses apart beside the training loss."""
        if "loss" in logs:
            sums = self._add_up_processes([self._sums.get(name, math.nan) for name in LOSSES])
            for name, total in zip(LOSSES, sums, strict=True):
                if not math.isnan(total):
                    logs[name] = round(total / max(self._num_logged_steps, 1), 6)
            if self._num_skipped:
                logs["skipped_batches"] = self._num_skipped  # since the training started
            self._sums, self._num_logged_steps = defaultdict(float), 0
        super().log(logs, start_time)

    def _add_up_processes(self, parts: list[float]) -> list[float]:
        """Return what the processes' parts of the losses make together; NaN where no process has one.

        Each process divides by the tokens of all, so parts add up; without `average_tokens_across_devices` each
        divides by its own, and the mean is what is trained.
        """
        if self.args.world_size == 1:
            return parts
        gathered = self.accelerator.gather(torch.tensor([parts], device=self.args.device))  # [processes, losses]
        totals = gathered.nansum(0) if self.args.average_tokens_across_devices else gathered.nanmean(0)
        return totals.masked_fill(gathered.isnan().all(0), math.nan).tolist()

    def _note(self, losses: dict[str, float], in_training: bool, num_rows: int) -> None:
        """Add up the losses: in training of one step's batches, in evaluation weighted by rows as `eval_loss` is."""
        if in_training:
            for name, value in losses.items():
                self._sums[name] += value
            return
        rows = torch.tensor([[losses.get(name, math.nan) for name in LOSSES]] * num_rows, device=self.args.device)
        rows = self.accelerator.gather_for_metrics(rows)  # [rows of all processes, losses]; none of them twice
        for name, values in zip(LOSSES, rows.T, strict=True):
            if not values.isnan().all():
                self._eval_sums[name] += values.nansum().item()
                self._eval_sums[f"num_{name}"] += int(values.isnan().logical_not().sum())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if isinstance(self._inner_model, MendModel):
            self._inner_model.save_pretrained(folder)
        else:
            super()._save(str(folder), state_dict)
        write_json(folder / ARGUMENTS_NAME, self.args.to_dict())

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint in a staging folder, and move it to its place once it is whole."""
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = folder / STAGING_NAME
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process has written its random numbers' state
            if self.state.best_model_checkpoint == str(self._staging / name):
                self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(self._staging / name / TRAINER_STATE_NAME))
                publish_checkpoint(self._staging / name, folder / name)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have their own for a full disk
            raise report_failed_save(folder, error) from error
        finally:
            if self.args.should_save:
                clear_staging(folder)
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, or go on from a checkpoint that the same settings made; see `Trainer.train`.

        Raises:
            CheckpointError: The checkpoint was made with other settings, which the message names.
        """
        if self.args.should_save:
            clear_staging(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str):
            config = self._inner_model.mend_config if isinstance(self._inner_model, MendModel) else None
            check_resumed(resume_from_checkpoint, self.args.to_dict(), config)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self._inner_model, MendModel):
            self.accelerator.unwrap_model(model or self.model).load_distiller(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self._inner_model, MendModel):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def _check_model(model: Any, args: MendTrainingArguments) -> None:
    """Refuse what this trainer cannot train."""
    if not isinstance(model, MendModel | PreTrainedModel):
        raise ConfigError(
            f"Expected a MendModel or a language model of transformers, got {type(model).__name__}: wrap the base "
            "model with get_mend_model first."
        )
    if not model.can_generate():
        head = type(model.base_model if isinstance(model, MendModel) else model).__name__
        raise ConfigError(
            "Expected a base model with a language-model head, because teacher and student are compared token by "
            f"token, got {head}: train with transformers' Trainer and a collator that gives demo_input_ids and the "
            "head's labels; the loss that the model then returns is the head's own."
        )
    if isinstance(model, PreTrainedModel):
        if args.needs_teacher:
            raise ConfigError(
                "Expected kd_loss_weight=0 and hidden_loss_weight=0 for a language model that is tuned itself and has "
                f"no teacher, got {args.kd_loss_weight} and {args.hidden_loss_weight}: use "
                'MendTrainingArguments.from_recipe("metaicl", ...), or, to train a distiller, wrap the model with '
                "get_mend_model first."
            )
    elif args.to_dict().get("activation_checkpointing") or args.to_dict().get("gradient_checkpointing"):
        raise ConfigError(
            "Expected gradient_checkpointing=False, got True: it drops the cache that the prefix is in. Save "
            "memory with smaller batches and gradient_accumulation_steps instead."
        )


def _make_collator(model: MendModel | PreTrainedModel, args: MendTrainingArguments, tokenizer: Any) -> MendCollator:
    if isinstance(model, MendModel):
        return MendCollator(
            model.prompt.tokenizer, model.mend_config, model.distiller_tokenizer, with_teacher=args.needs_teacher
        )
    if tokenizer is None:
        raise ConfigError(
            "Expected processing_class, the tokenizer, or a data_collator beside a bare language model, got neither: "
            "give one."
        )
    return MendCollator(tokenizer, MendConfig(task_type=check_base_model(model)))


def _make_teacher(model: MendModel, args: MendTrainingArguments) -> Teacher:
    cache = None
    if args.teacher_cache_dir is not None:
        frozen = {name: p.flatten()[:64] for name, p in model.base_model.named_parameters() if not p.requires_grad}
        identity = f"{hash_tensors(frozen)} {args.kd_top_k} {args.kd_temperature}"
        cache = TeacherCache(args.teacher_cache_dir, identity)
    return Teacher(
        top_k=args.kd_top_k,
        kd_temperature=args.kd_temperature,
        with_hidden_states=args.hidden_loss_weight > 0,
        layers=args.hidden_loss_layers,
        cache=cache,
    )
