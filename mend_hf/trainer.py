"""MendTrainer: the transformers Trainer with a teacher.

Shapes: R tasks, B queries, P predicted tokens, W vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from mend_hf.data.collator import MendCollator
from mend_hf.errors import ConfigError, DataError
from mend_hf.files import check_output_folder, write_json
from mend_hf.losses import IGNORE_INDEX, kd_loss, nll_loss
from mend_hf.model import MendModel
from mend_hf.training_args import MendTrainingArguments


class MendTrainer(Trainer):
    """Trains a distiller; the base model is teacher (with the text) and student (with the prefix), and never changes.

    loss = nll_loss_weight * NLL(target) + kd_loss_weight * KL(teacher || student), means over the tokens that count.

    Args:
        model: The distiller on its base model.
        args: The same as for `Trainer`, with the losses' weights.
        train_dataset: Rows {"demonstrations", "query", "target"}, see `MendCollator`.
        eval_dataset: Rows of the same form; `eval_kd_loss` and `eval_nll_loss` are reported beside `eval_loss`.
        data_collator: None: a `MendCollator` for the model.
        **kwargs: Passed to `Trainer`.

    Raises:
        ConfigError: The model is no MendModel, or gradient checkpointing is asked for.
        CheckpointError: The output folder is a file.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: MendModel,
        args: MendTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, MendModel):
            raise ConfigError(
                f"Expected a MendModel, got {type(model).__name__}: wrap the base model with get_mend_model first."
            )
        if not model.can_generate():
            raise ConfigError(
                "Expected a base model with a language-model head, because teacher and student are compared token by "
                f"token, got {model.mend_config.task_type}: train with transformers' Trainer and a collator that "
                "gives demo_input_ids and the head's labels; the loss that the model then returns is the head's own."
            )
        if args.to_dict().get("activation_checkpointing") or args.to_dict().get("gradient_checkpointing"):
            raise ConfigError(
                "Expected gradient_checkpointing=False, got True: it drops the cache that the prefix is in. Save "
                "memory with smaller batches and gradient_accumulation_steps instead."
            )
        check_output_folder(args.output_dir)
        if data_collator is None:
            data_collator = MendCollator(
                model.prompt.tokenizer,
                model.mend_config,
                model.distiller_tokenizer,
                with_teacher=args.kd_loss_weight > 0,
            )
        self._sums: dict[str, float] = defaultdict(float)
        self._num_logged_steps = 0
        self._eval_sums: dict[str, float] = defaultdict(float)
        self._num_kd_tokens: Tensor | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            **kwargs,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted loss, divided by the tokens of all accumulated batches."""
        inputs = dict(inputs)
        labels, kd_mask = self._align(inputs)
        inputs |= self.accelerator.unwrap_model(model).route.target_inputs(inputs.pop("labels"))
        teacher_ids, teacher_mask = inputs.pop("teacher_input_ids", None), inputs.pop("teacher_attention_mask", None)
        outputs = model(**inputs)
        logits = outputs.logits[:, : labels.shape[1]]
        in_training = model.training
        losses: dict[str, Tensor] = {}
        if (labels != IGNORE_INDEX).any():
            num_items = num_items_in_batch if in_training else None
            losses["nll_loss"] = nll_loss(logits, labels, num_items=num_items)
        if self.args.kd_loss_weight:
            if teacher_ids is None:
                raise DataError(
                    "Expected teacher_input_ids in the batch because kd_loss_weight is above 0, got none: use "
                    "MendCollator(..., with_teacher=True), or set kd_loss_weight=0."
                )
            teacher_logits = self._teacher_logits(model, teacher_ids, teacher_mask, inputs)[:, : labels.shape[1]]
            losses["kd_loss"] = kd_loss(
                logits,
                teacher_logits,
                kd_mask,
                kd_temperature=self.args.kd_temperature,
                num_items=self._num_kd_tokens if in_training else None,
            )
        weights = {"nll_loss": self.args.nll_loss_weight, "kd_loss": self.args.kd_loss_weight}
        loss = sum((weights[name] * value for name, value in losses.items()), start=logits.new_zeros(()))
        self._note(losses, in_training, num_rows=len(logits))
        if in_training and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_logits(
        self, model: nn.Module, teacher_ids: Tensor, teacher_mask: Tensor | None, inputs: dict[str, Tensor]
    ) -> Tensor:
        """Return the base model's logits (B, P, W) where the demonstrations' full text stands before the queries."""
        mend_model: MendModel = self.accelerator.unwrap_model(model)
        if teacher_mask is None:
            teacher_mask = torch.ones_like(teacher_ids)
        text = mend_model.read_tokens(teacher_ids, teacher_mask).select(inputs["query_task_rows"])
        decoder = {name: value for name, value in inputs.items() if name == "decoder_input_ids"}
        return mend_model.route.forward(text, inputs["input_ids"], inputs["attention_mask"], **decoder).logits

    def _align(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the first P logits of every row predict, and where the teacher's distribution counts.

        A decoder-only model predicts query and target, each token from those before it; the decoder of an
        encoder-decoder predicts the target alone.

        Returns:
            Labels (B, P) and a mask (B, P).
        """
        model: MendModel = self.accelerator.unwrap_model(self.model)
        if model.mend_config.task_type == "SEQ_2_SEQ_LM":
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
        """Evaluate, and report the two losses apart."""
        sums = self._eval_sums = defaultdict(float)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name in ("nll_loss", "kd_loss"):
            if name in sums:
                output.metrics[f"{metric_key_prefix}_{name}"] = sums[name] / sums[f"num_{name}"]
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the two losses apart beside the training loss."""
        if "loss" in logs:
            for name in ("nll_loss", "kd_loss"):
                if name in self._sums:
                    logs[name] = round(self._sums[name] / max(self._num_logged_steps, 1), 6)
            self._sums, self._num_logged_steps = defaultdict(float), 0
        super().log(logs, start_time)

    def _note(self, losses: dict[str, Tensor], in_training: bool, num_rows: int) -> None:
        """Add up the losses: in training of one step's batches, in evaluation weighted by rows as `eval_loss` is."""
        for name, value in losses.items():
            if in_training:
                self._sums[name] += value.item()
            else:
                self._eval_sums[name] += value.item() * num_rows
                self._eval_sums[f"num_{name}"] += num_rows

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        write_json(folder / "training_args.json", self.args.to_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.accelerator.unwrap_model(model or self.model).load_distiller(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
