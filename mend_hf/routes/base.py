"""What every route offers to the model above it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mend_hf.errors import ConfigError, ShapeError
from mend_hf.prefix import Prefix

_TOKEN_OUTPUTS = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}


class Route(ABC):
    """The way a prefix takes into one base model, whose weights and code stay as they are.

    Shapes: B rows, T query tokens, N tokens of a text.

    Args:
        base_model: The frozen base model.
    """

    def __init__(self, base_model: PreTrainedModel) -> None:
        self.base_model = base_model

    @abstractmethod
    def prepare(self, prefix: Prefix) -> Prefix:
        """Return the prefix on the base model's device, and do what need not be done again for every query."""

    @abstractmethod
    def read_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Prefix:
        """Return the prepared prefix that stands for token ids (B, N), padded on the left, as plain text."""

    def target_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return what `forward` takes beside the query so that its logits predict labels that stand apart from it.

        Decoder-only models read a target as a part of the query and need nothing.
        """
        return {}

    @abstractmethod
    def forward(self, prefix: Prefix, input_ids: Tensor | None, attention_mask: Tensor, **kwargs: Any) -> ModelOutput:
        """Run the base model over queries behind a prepared prefix.

        Args:
            prefix: B rows.
            input_ids (B, T): The queries' tokens; None: `inputs_embeds` is among the other arguments.
            attention_mask (B, T): Of the queries alone.
            **kwargs: `labels` and whatever else the base model takes.

        Returns:
            The base model's output for the query's positions alone.

        Raises:
            ShapeError: The base model cannot read this query behind this prefix.
        """

    @abstractmethod
    def generate(self, prefix: Prefix, input_ids: Tensor | None, attention_mask: Tensor, **generation: Any) -> Any:
        """Let the base model generate behind a prepared prefix; arguments and errors as in `forward`.

        Returns:
            What the base model's `generate` returns; the prefix never appears in it.
        """


def change_tokens(output: ModelOutput, change: Callable[[Tensor], Tensor]) -> None:
    """Change, in place, all that an output holds for every token: logits, hidden states, starts and ends of spans.

    The logits of a head that classifies whole queries are not for tokens and stay.
    """
    for name, num_axes in _TOKEN_OUTPUTS.items():
        states = output.get(name)
        if states is not None and states.dim() == num_axes:
            output[name] = change(states)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(change(states) for states in output["hidden_states"])


def check_spans(kwargs: Mapping[str, Any]) -> None:
    """Refuse answers given as places in the query where the query's places are not what the model reads.

    Raises:
        ConfigError: Some are given.
    """
    given = [name for name in ("start_positions", "end_positions") if kwargs.get(name) is not None]
    if given:
        raise ConfigError(
            f"Expected no {' or '.join(given)}, because the base model does not read the query's tokens at the places "
            "that they count: compute the loss from the logits, or, under a sliding window, give rows of one length."
        )


def match_rows(prefix: Prefix, num_rows: int) -> Prefix:
    """Give every row of a batch its prefix: each its own, or all the same.

    Raises:
        ShapeError: There are neither one nor as many tasks as rows.
    """
    if len(prefix) == num_rows:
        return prefix
    if len(prefix) == 1:
        return prefix.expand(num_rows)
    raise ShapeError(
        f"Expected distilled demonstrations of 1 task or of {num_rows}, one a row, got {len(prefix)} tasks: "
        "pick one a row with .select([...])."
    )
