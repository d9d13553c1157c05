"""What a training step lowers: the losses of one batch, each a mean over the tokens that count.

Shapes: R tasks, B queries, O their wrong options, T query tokens, P predicted tokens, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mend_hf.errors import DataError
from mend_hf.fingerprint import hash_tensors
from mend_hf.losses import IGNORE_INDEX, hidden_loss, kd_loss, nll_loss, option_loss
from mend_hf.model import MendModel
from mend_hf.routes import get_route
from mend_hf.stopwatch import Stopwatch
from mend_hf.teacher import Teacher, join_text, pick_layers
from mend_hf.teacher_cache import TeacherCache
from mend_hf.training_args import MendTrainingArguments

LOSSES = ("nll_loss", "kd_loss", "option_loss", "hidden_loss")


class Objective:
    """The losses that the arguments ask for.

    Args:
        model: The distiller on its base model, student and teacher; or a language model that is tuned itself.
        args: The losses, their weights, and what the teacher keeps.
    """

    def __init__(self, model: MendModel | PreTrainedModel, args: MendTrainingArguments) -> None:
        self.model = model
        self.args = args
        self.stopwatch = Stopwatch(args.device)
        self.teacher = _make_teacher(model, args) if isinstance(model, MendModel) and args.needs_teacher else None

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Mapping[str, Tensor | int] | None = None
    ) -> tuple[dict[str, Tensor], ModelOutput]:
        """Return the losses by name, without their weights, and what the student said.

        Args:
            model: The model as it is called in training, within what Accelerate puts around it.
            batch: Columns of `MendCollator`.
            num_items: By loss, how much of all batches of the step it is a mean over, see `count`; None: of this one.
        """
        num_items = num_items or {}
        labels, mask = self.align(batch)
        if self.teacher is not None and "teacher_input_ids" not in batch:
            raise DataError(
                "Expected teacher_input_ids in the batch because kd_loss_weight or hidden_loss_weight is above 0, got "
                "none: use MendCollator(..., with_teacher=True), or set both to 0."
            )
        joined = self._join_options(batch) if self.args.option_loss_weight else batch
        outputs = self.run_student(model, joined)
        logits = self._at_queries(outputs.logits, batch)
        losses: dict[str, Tensor] = {}
        if (labels != IGNORE_INDEX).any():
            losses["nll_loss"] = nll_loss(logits, labels, num_items=num_items.get("nll_loss"))
        if self.args.option_loss_weight and len(batch["option_query_rows"]):
            option_labels, _ = self.align(joined)
            losses["option_loss"] = option_loss(
                outputs.logits[:, : option_labels.shape[1]],
                option_labels,
                joined["option_query_rows"],
                task_rows=joined["query_task_rows"] if self.args.calibrate_options else None,
                num_items=num_items.get("option_loss"),
            )
        if self.teacher is None or not isinstance(self.model, MendModel):
            return losses, outputs
        targets = self.model.route.target_inputs(batch["labels"])
        with self.stopwatch.measure("teacher"):
            teacher = self.teacher(self.model, {**batch, **targets}, mask)
        if self.args.kd_loss_weight:
            losses["kd_loss"] = kd_loss(
                logits,
                teacher.predictions,
                mask,
                kd_divergence=self.args.kd_divergence,
                kd_temperature=self.args.kd_temperature,
                num_items=num_items.get("kd_loss"),
            )
        if self.args.hidden_loss_weight:
            layers = pick_layers(outputs, self.args.hidden_loss_layers)
            states = [self._at_queries(layer, batch) for layer in layers]
            losses["hidden_loss"] = hidden_loss(
                states, teacher.hidden_states, mask, num_items=num_items.get("hidden_loss")
            )
        return losses, outputs

    def weigh(self, losses: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Return the weighted sum; a zero like the given tensor where no loss counts."""
        weighted = [getattr(self.args, f"{name}_weight") * value for name, value in losses.items()]
        return sum(weighted, start=like.new_zeros(()))

    def count(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return by loss how much of a batch it is a mean over: tokens, or queries with more than one option.

        The targets' tokens are not among it: `Trainer` counts them.
        """
        _, mask = self.align(batch)
        counts = {"kd_loss": mask.sum(), "hidden_loss": mask.sum()}
        if "option_query_rows" in batch:
            counts["option_loss"] = mask.new_tensor(len(batch["option_query_rows"].unique()), dtype=torch.long)
        return counts

    def align(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the first P logits of every row predict, and where the teacher's distribution counts.

        A decoder-only model predicts query and target, each token from those before it; the decoder of an
        encoder-decoder predicts the target alone.

        Returns:
            Labels (B, P) and a mask (B, P).
        """
        if self.model.config.is_encoder_decoder:
            return batch["labels"], batch["labels"] != IGNORE_INDEX
        mask = batch["attention_mask"].bool()
        return batch["labels"][:, 1:], mask[:, 1:] & mask[:, :-1]

    def run_student(self, model: nn.Module, batch: Mapping[str, Tensor]) -> ModelOutput:
        """Return what is trained to say, at the query's positions: behind a prefix, or behind the text itself."""
        if isinstance(self.model, MendModel):
            inputs = {
                name: value
                for name, value in batch.items()
                if name != "labels" and not name.startswith(("teacher_", "option_"))
            }
            inputs |= self.model.route.target_inputs(batch["labels"])
            return model(**inputs, output_hidden_states=self.args.hidden_loss_weight > 0)
        targets = get_route(self.model).target_inputs(batch["labels"])
        outputs = model(**join_text(batch, self.model), **targets, use_cache=False)
        if not targets:
            outputs.logits = outputs.logits[:, -batch["input_ids"].shape[1] :]
        return outputs

    def _join_options(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch in which every wrong option is a query more, behind the B queries with their targets.

        `option_query_rows` (B + O,) says of all of them which query they are.
        """
        if "option_input_ids" not in batch:
            raise DataError(
                "Expected option_input_ids in the batch because option_loss_weight is above 0, got none: use "
                "MendCollator(..., with_options=True), or set the weight to 0."
            )
        rows = batch["option_query_rows"]
        own = torch.arange(len(batch["input_ids"]), device=rows.device)
        joined = {name: value for name, value in batch.items() if not name.startswith("option_")}
        joined["query_task_rows"] = torch.cat([batch["query_task_rows"], batch["query_task_rows"][rows]])
        joined["option_query_rows"] = torch.cat([own, rows])
        for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
            columns = [batch[name], batch[f"option_{name}"]]
            joined[name] = torch.cat([self._widen(column, columns, filler) for column in columns])
        return joined

    def _widen(self, column: Tensor, columns: list[Tensor], filler: int) -> Tensor:
        """Pad a column to the widest one's width, where the collator pads, too."""
        missing = max(other.shape[1] for other in columns) - column.shape[1]
        return F.pad(column, (0, missing) if self.model.config.is_encoder_decoder else (missing, 0), value=filler)

    def _at_queries(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what was worked out at the predicted tokens (B, P, ...) of a batch, without its wrong options."""
        num_queries, num_tokens = batch["labels"].shape
        if self.model.config.is_encoder_decoder:
            return values[:num_queries, :num_tokens]
        return values[:num_queries, -num_tokens:][:, :-1]


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
