"""What a base model says that reads the demonstrations' text: teacher of a distiller, and itself in MetaICL.

Shapes: R tasks, N demonstration tokens, B queries, T query tokens, P predicted tokens, W vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mend_hf.architectures import accepts
from mend_hf.errors import ConfigError
from mend_hf.losses import TopTokens, top_tokens
from mend_hf.model import MendModel
from mend_hf.prefix import gather_tokens, order_tokens, position_inputs, positions_of
from mend_hf.teacher_cache import TeacherCache


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says about the predicted tokens of a batch.

    Attributes:
        predictions: Logits (B, P, W), or the likeliest tokens of the same positions.
        hidden_states: Of the chosen layers (B, P, R); empty where no loss asks for them.
    """

    predictions: Tensor | TopTokens
    hidden_states: tuple[Tensor, ...] = ()


class Teacher:
    """The base model with the demonstrations' text in front of the queries.

    Args:
        top_k: Keep so many tokens of every distribution; 0: all.
        kd_temperature: Of the divergence that top tokens are for.
        with_hidden_states: Also return hidden states.
        layers: Outputs of these layers; None: all.
        cache: Where top tokens are kept from one epoch to the next.
    """

    def __init__(
        self,
        *,
        top_k: int = 0,
        kd_temperature: float = 1.0,
        with_hidden_states: bool = False,
        layers: list[int] | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        self.top_k = top_k
        self.kd_temperature = kd_temperature
        self.with_hidden_states = with_hidden_states
        self.layers = layers
        self.cache = cache

    @torch.no_grad()
    def __call__(self, model: MendModel, batch: Mapping[str, Tensor], mask: Tensor) -> TeacherOutput:
        """Read the demonstrations once and the queries behind them.

        Args:
            model: Its base model is the teacher.
            batch: `teacher_input_ids`, `teacher_attention_mask` (R, N), `query_task_rows` (B,), `input_ids`,
                `attention_mask` (B, T), and an encoder-decoder's `decoder_input_ids`.
            mask (B, P): Predicted tokens that count.
        """
        keys = [] if self.cache is None else self.cache.keys_of(batch)
        if self.cache is not None and (kept := self.cache.get(keys, mask)) is not None:
            return TeacherOutput(kept)
        text = model.read_tokens(batch["teacher_input_ids"], batch["teacher_attention_mask"])
        targets = {name: value for name, value in batch.items() if name == "decoder_input_ids"}
        output = model.route.forward(
            text.select(batch["query_task_rows"]),
            batch["input_ids"],
            batch["attention_mask"],
            output_hidden_states=self.with_hidden_states,
            **targets,
        )
        num_predicted = mask.shape[1]
        logits = output.logits[:, :num_predicted]
        layers = pick_layers(output, self.layers) if self.with_hidden_states else ()
        states = tuple(layer[:, :num_predicted] for layer in layers)
        if not self.top_k:
            return TeacherOutput(logits, states)
        if self.top_k >= logits.shape[-1]:
            raise ConfigError(
                f"Expected kd_top_k below the {logits.shape[-1]} tokens of the vocabulary, got {self.top_k}: lower "
                "it, or leave it at 0 for all of them."
            )
        top = top_tokens(logits, self.top_k, kd_temperature=self.kd_temperature)
        if self.cache is not None:
            self.cache.put(keys, top, mask)
        return TeacherOutput(top, states)


def pick_layers(output: ModelOutput, layers: list[int] | None) -> tuple[Tensor, ...]:
    """Return the hidden states (B, T, R) of chosen layers, of the decoder where there are two stacks.

    Raises:
        ConfigError: There is no such layer.
    """
    states = output.get("decoder_hidden_states") or output["hidden_states"]  # L + 1, the first before any layer
    num_layers = len(states) - 1
    chosen = range(1, num_layers + 1) if layers is None else layers
    unknown = [layer for layer in chosen if not (1 <= layer <= num_layers or -num_layers <= layer <= -1)]
    if unknown:
        raise ConfigError(
            f"Expected hidden_loss_layers from 1 to {num_layers}, or from -{num_layers} to -1, got {unknown}."
        )
    return tuple(states[layer] for layer in chosen)


def join_text(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor | int]:
    """Write every query behind its demonstrations' text, for a model that learns to read them in full.

    Returns:
        `input_ids` and `attention_mask` (B, N + T), padded as the queries are, and, where a decoder-only model takes
        them, `position_ids` and `logits_to_keep` for the last T positions.
    """
    rows, num_query_tokens = batch["query_task_rows"], batch["input_ids"].shape[1]
    mask = torch.cat([batch["teacher_attention_mask"][rows], batch["attention_mask"]], dim=1)
    ids = torch.cat([batch["teacher_input_ids"][rows], batch["input_ids"]], dim=1)
    is_encoder_decoder = model.config.is_encoder_decoder
    order = order_tokens(mask, side="left" if is_encoder_decoder else "right")
    joined: dict[str, Tensor | int] = {"input_ids": gather_tokens(ids, order), "attention_mask": mask.gather(1, order)}
    if is_encoder_decoder:
        return joined
    joined |= position_inputs(model, positions_of(mask.gather(1, order)))
    return joined | ({"logits_to_keep": num_query_tokens} if accepts(model, "logits_to_keep") else {})
