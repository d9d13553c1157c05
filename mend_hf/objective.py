"""What a training step lowers: the losses of one batch, each a mean over the tokens that count.

Shapes: R tasks, B queries, P predicted tokens, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mend_hf.errors import DataError
from mend_hf.fingerprint import hash_tensors
from mend_hf.losses import IGNORE_INDEX, hidden_loss, kd_loss, nll_loss
from mend_hf.model import MendModel
from mend_hf.routes import get_route
from mend_hf.stopwatch import Stopwatch
from mend_hf.teacher import Teacher, join_text, pick_layers
from mend_hf.teacher_cache import TeacherCache
from mend_hf.training_args import MendTrainingArguments

LOSSES = ("nll_loss", "kd_loss", "hidden_loss")

Items = Tensor | int | None


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
        self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Items = None, num_kd_items: Items = None
    ) -> tuple[dict[str, Tensor], ModelOutput]:
        """Return the losses by name, without their weights, and what the student said.

        Args:
            model: The model as it is called in training, within what Accelerate puts around it.
            batch: Columns of `MendCollator`.
            num_items: Target tokens of all batches of the step; None: of this one.
            num_kd_items: The same for the tokens where student and teacher are compared.
        """
        labels, mask = self.align(batch)
        if self.teacher is not None and "teacher_input_ids" not in batch:
            raise DataError(
                "Expected teacher_input_ids in the batch because kd_loss_weight or hidden_loss_weight is above 0, got "
                "none: use MendCollator(..., with_teacher=True), or set both to 0."
            )
        outputs = self.run_student(model, batch)
        logits = outputs.logits[:, : labels.shape[1]]
        losses: dict[str, Tensor] = {}
        if (labels != IGNORE_INDEX).any():
            losses["nll_loss"] = nll_loss(logits, labels, num_items=num_items)
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
                num_items=num_kd_items,
            )
        if self.args.hidden_loss_weight:
            states = pick_layers(outputs, self.args.hidden_loss_layers, labels.shape[1])
            losses["hidden_loss"] = hidden_loss(states, teacher.hidden_states, mask, num_items=num_kd_items)
        return losses, outputs

    def weigh(self, losses: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Return the weighted sum; a zero like the given tensor where no loss counts."""
        weighted = [getattr(self.args, f"{name}_weight") * value for name, value in losses.items()]
        return sum(weighted, start=like.new_zeros(()))

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
            inputs = {name: value for name, value in batch.items() if name != "labels" and "teacher" not in name}
            inputs |= self.model.route.target_inputs(batch["labels"])
            return model(**inputs, output_hidden_states=self.args.hidden_loss_weight > 0)
        targets = get_route(self.model).target_inputs(batch["labels"])
        outputs = model(**join_text(batch, self.model), **targets, use_cache=False)
        if not targets:
            outputs.logits = outputs.logits[:, -batch["input_ids"].shape[1] :]
        return outputs


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
