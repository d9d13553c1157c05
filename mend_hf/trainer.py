"""MendTrainer: the transformers Trainer with a teacher.

Shapes: B queries, P predicted tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from mend_hf.architectures import check_base_model
from mend_hf.config import MendConfig
from mend_hf.data.collator import MendCollator
from mend_hf.data.length_groups import LengthSampler, measure_rows
from mend_hf.errors import ConfigError, TrainingError
from mend_hf.loss_log import LossLog
from mend_hf.model import MendModel
from mend_hf.nonfinite import write_batch
from mend_hf.objective import Objective
from mend_hf.passes import split_batch
from mend_hf.pushing import PushingTrainer
from mend_hf.sharding import check_sharding, cut_up, fill_gradients, gather_whole, own_part, stay_whole_in_a_step
from mend_hf.training_args import MendTrainingArguments


class MendTrainer(PushingTrainer):
    """Trains a distiller; the base model is teacher (with the text) and student (with the prefix), and never changes.

    loss = nll_loss_weight * NLL(target) + kd_loss_weight * divergence(teacher, student) + hidden_loss_weight *
    distance(teacher, student), means over the tokens that count, + option_loss_weight * cross-entropy(target among the
    options), a mean over the queries that have some.

    Given a bare language model in place of a distiller, it tunes that model itself on the demonstrations' full text,
    with the targets' NLL, and the option loss where it has a weight (MetaICL, the recipe "metaicl").

    Args:
        model: The distiller on its base model; or a language model of transformers.
        args: The same as for `Trainer`, with the losses' weights.
        train_dataset: Rows {"demonstrations", "query", "target"}, see `MendCollator`.
        eval_dataset: Rows of the same form; `eval_kd_loss` and `eval_nll_loss` are reported beside `eval_loss`.
        data_collator: None: a `MendCollator` for the model.
        probe_dataset: A handful of rows on which, every `probe_steps`, student, teacher and zero-shot are compared;
            `probe_kl`, `probe_nll`, `probe_teacher_nll` and `probe_zero_shot_nll` are logged. None: no comparison.
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
        probe_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        _check_model(model, args)
        if args.train_sampling_strategy == "group_by_length" and isinstance(train_dataset, IterableDataset):
            raise ConfigError(
                'Expected train_sampling_strategy="random" for rows that come as a stream, whose lengths nobody knows '
                'yet, got "group_by_length": leave it out, or use max_tokens_per_pass.'
            )
        if data_collator is None:
            data_collator = make_collator(model, args, kwargs.get("processing_class"))
        self._earlier_stages = (model.mend_config.training_stages or []) if isinstance(model, MendModel) else []
        self._objective = Objective(model, args)
        self._num_items: dict[str, Tensor] = {}  # of the step at hand, by loss
        self._batches: list[Any] = []  # of the step at hand
        super().__init__(
            self._objective,
            probe_dataset,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            **kwargs,
        )
        if isinstance(model, MendModel):
            check_sharding(self.accelerator, args.nonfinite_loss)
        self._losses = LossLog(self.accelerator, parts_add_up=args.average_tokens_across_devices)

    @property
    def _inner_model(self) -> MendModel | PreTrainedModel:
        """The model without what Accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Return the order of the rows; our own where it depends on their lengths, which have no column."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        args, rows = self.args, self.train_dataset if train_dataset is None else train_dataset
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthSampler(measure_rows(rows, args.length_column_name), step_rows, seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the training rows in batches."""
        loader = super().get_train_dataloader()
        sampler = loader.batch_sampler
        while sampler is not None and not isinstance(sampler, LengthSampler):
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        if sampler is not None:
            loader.set_sampler(sampler)  # where Accelerate looks for whom it tells the epoch, also behind its shards
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        """Return the rows as they come, whatever the order of the training rows."""
        return SequentialSampler(eval_dataset)

    def _mend_config(self) -> MendConfig | None:
        return self._inner_model.mend_config if isinstance(self._inner_model, MendModel) else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted loss, divided by the tokens of all accumulated batches."""
        in_training = model.training
        num_items: dict[str, Tensor | int] = {}
        if in_training:
            num_items |= self._num_items
            if num_items_in_batch is not None:
                num_items["nll_loss"] = num_items_in_batch
        with self._objective.stopwatch.measure("student"):
            losses, outputs = self._objective(model, dict(inputs), num_items)
        loss = self._objective.weigh(losses, outputs.logits)
        values = {name: value.item() for name, value in losses.items()}
        if not in_training:
            self._losses.add_evaluated(values, len(inputs["labels"]))
        elif all(map(math.isfinite, values.values())):
            self._losses.add(values)
        elif self.accelerator.num_processes == 1:  # else all learn of it by the gradient, and pass over it together
            loss = self._pass_over([inputs], values)
        if in_training and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward over a batch, in several passes where it has more than `max_tokens_per_pass`."""
        *first, last = self._split(inputs, num_items_in_batch)
        loss = torch.zeros((), device=self.args.device)
        for part in first:
            with self.accelerator.no_sync(model):  # processes may have different numbers of passes
                loss += super().training_step(model, part, num_items_in_batch)
        loss += super().training_step(model, last, num_items_in_batch)
        if self._is_sharded:
            cut_up(self.model)
            fill_gradients(self.model)
        return loss

    def _split(self, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None) -> list[dict[str, Tensor]]:
        """Return a batch's passes; one where losses are not sums, or where every pass is an exchange of weights."""
        budget = self.args.tokens_per_pass
        if not budget or num_items_in_batch is None or "query_task_rows" not in inputs or self._is_sharded:
            return [inputs]
        return split_batch(inputs, budget, labels_apart=self._inner_model.config.is_encoder_decoder)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as `ResumableTrainer` does.

        Raises:
            ConfigError: The distiller has nothing to train.
        """
        model = self._inner_model
        if isinstance(model, MendModel) and not any(tensor.numel() for _, tensor in model.distiller.trained_tensors()):
            raise ConfigError(
                "Expected a distiller with something to train, got lora_r=0 and num_virtual_tokens=0, which leave the "
                "training-free anchors: answer from them as they are, or raise one of the two."
            )
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap the model, and let a sharded one stay whole within a step."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._is_sharded:
            stay_whole_in_a_step(self.model)
        return prepared

    def _pass_over(self, batches: list[Any], values: dict[str, float]) -> Tensor:
        """Return a loss without a gradient in place of one that is not finite, and count it; or stop.

        Raises:
            TrainingError: The arguments say so, or the weights themselves are not finite any more.
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        is_lost = not all(bool(own_part(parameter).isfinite().all()) for parameter in trained)
        if self.args.nonfinite_loss == "stop" or is_lost:
            tokenizer = self._inner_model.tokenizer if isinstance(self._inner_model, MendModel) else None
            folder = Path(self.args.output_dir)
            if self.accelerator.num_processes > 1:
                folder /= f"process-{self.args.process_index}"
            path = write_batch(folder, batches, values, self.state.global_step, tokenizer)
            what = "weights that are finite numbers" if is_lost else "a finite loss and finite gradients"
            raise TrainingError(
                f"Expected {what} in step {self.state.global_step + 1}, got {values}. What it read is in {path}: look "
                "at it, lower the learning rate and go on from the last checkpoint"
                + ("." if is_lost else ', or pass over such batches with nonfinite_loss="skip".')
            )
        for _ in batches:
            self._losses.skip()
        return sum((parameter.sum() for parameter in trained), start=torch.zeros((), device=self.args.device)) * 0.0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients; drop them where it is not finite, so that the optimizer changes nothing.

        A gradient scaler does so itself.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            self._pass_over(self._batches, {"grad_norm": float(norm)})
            model.zero_grad(set_to_none=True)
            return 0.0
        return norm

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect the batches of one step and count the tokens that each loss is averaged over."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches = batches
        self._losses.begin_step()
        counts = [self._objective.count(batch) for batch in batches]
        names = counts[0] if counts else ()
        self._num_items = {name: torch.stack([count[name] for count in counts]).sum().to(device) for name in names}
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            self._num_items = {name: self.accelerator.gather(count).sum() for name, count in self._num_items.items()}
        return batches, num_items

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Return the loss alone: logits of a whole vocabulary are not gathered."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and report the losses apart."""
        self._losses.begin_evaluation()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        apart = self._losses.evaluated()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in apart.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the losses apart, and all batches skipped so far, beside the training loss."""
        if "loss" in logs:
            losses, num_skipped = self._losses.pop()
            logs |= {name: round(value, 6) for name, value in losses.items()}
            num_skipped += max((entry.get("skipped_batches", 0) for entry in self.state.log_history), default=0)
            logs |= {"skipped_batches": num_skipped} if num_skipped else {}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the distiller, put together by all processes where each holds a part; see `Trainer.save_model`."""
        if not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        whole = {name: gather_whole(tensor) for name, tensor in self._inner_model.state_dict().items()}
        if self.args.should_save:
            self._save(output_dir, state_dict=whole)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @property
    def _is_sharded(self) -> bool:
        """Whether every process holds a part of a distiller."""
        return self.is_fsdp_enabled and isinstance(self._inner_model, MendModel)

    def _save_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        model = self._inner_model
        if isinstance(model, MendModel):
            stages = [*self._earlier_stages, *([self._describe_stage()] if self.state.global_step else [])]
            model.mend_config = dataclasses.replace(model.mend_config, training_stages=stages or None)
            model.save_pretrained(folder, state_dict=state_dict)
        else:
            super()._save_model(folder, state_dict)

    def _describe_stage(self) -> dict[str, Any]:
        """Return the numbers of this training, for the card."""
        args = self.args
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        return {
            "steps": self.state.global_step,
            "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "nll_loss_weight": args.nll_loss_weight,
            "kd_loss_weight": args.kd_loss_weight,
            "option_loss_weight": args.option_loss_weight,
            "hidden_loss_weight": args.hidden_loss_weight,
            "loss": losses[-1] if losses else None,
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save both; transformers would save the frozen base model beside a sharded optimizer."""
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        cut_up(self.model)  # evaluating leaves it whole
        self.accelerator.wait_for_everyone()  # what is still being gathered must not meet the states on its way
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

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
    if isinstance(model, PreTrainedModel) and args.needs_teacher:
        raise ConfigError(
            "Expected kd_loss_weight=0 and hidden_loss_weight=0 for a language model that is tuned itself and has "
            f"no teacher, got {args.kd_loss_weight} and {args.hidden_loss_weight}: use "
            'MendTrainingArguments.from_recipe("metaicl", ...), or, to train a distiller, wrap the model with '
            "get_mend_model first."
        )


def make_collator(
    model: MendModel | PreTrainedModel, args: MendTrainingArguments, tokenizer: Any = None, **changes: Any
) -> MendCollator:
    """Return the collator that gives what the arguments' losses need.

    Args:
        model: What is trained.
        args: The losses.
        tokenizer: That of a bare language model; a `MendModel` has its own.
        **changes: Fields of the config that are other ones for training rows, such as `max_demonstration_tokens`.

    Raises:
        ConfigError: A bare language model has no tokenizer with it.
    """
    what = {
        "with_teacher": args.needs_teacher or not isinstance(model, MendModel),
        "with_options": args.option_loss_weight > 0,
    }
    if isinstance(model, MendModel):
        config = dataclasses.replace(model.mend_config, **changes)
        return MendCollator(model.prompt.tokenizer, config, model.distiller_tokenizer, **what)
    if tokenizer is None:
        raise ConfigError(
            "Expected processing_class, the tokenizer, or a data_collator beside a bare language model, got neither: "
            "give one."
        )
    return MendCollator(tokenizer, MendConfig(task_type=check_base_model(model), **changes), **what)
