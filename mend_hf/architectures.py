"""What a base model must offer, and the few facts about it that transformers does not state in one place.

The only file that looks at model types.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from mend_hf.errors import ShapeError, UnsupportedModelError


def check_base_model(base_model: nn.Module) -> Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"]:
    """Return PEFT's task type of a base model that can read a prefix.

    Raises:
        UnsupportedModelError: It is no transformers model, or its forward pass takes no embeddings or no cache.
    """
    if not isinstance(base_model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Expected a transformers model such as AutoModelForCausalLM gives, got {type(base_model).__name__}. "
            "Load the base model first and wrap that."
        )
    if base_model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"Expected a decoder-only base model, got the encoder-decoder {base_model.config.model_type!r}: this "
            "version cannot put a prefix in front of an encoder yet. Use a causal language model."
        )
    if not base_model.can_generate():
        raise UnsupportedModelError(
            f"Expected a model with a language-model head, got {type(base_model).__name__}. "
            "Load it through AutoModelForCausalLM."
        )
    missing = [name for name in ("inputs_embeds", "past_key_values", "position_ids") if not accepts(base_model, name)]
    if missing:
        raise UnsupportedModelError(
            f"Expected a base model whose forward pass takes inputs_embeds, past_key_values and position_ids; "
            f"{type(base_model).__name__} lacks {', '.join(missing)}. Use an attention model with explicit positions."
        )
    return "CAUSAL_LM"


def accepts(model: nn.Module, argument: str) -> bool:
    """Return whether the forward pass of a model has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def get_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part that turns tokens into hidden states: no language-model head, and of T5 or BART the encoder."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return model.base_model


def get_embedding_width(model: PreTrainedModel) -> int:
    """Return E, the width of what goes in as `inputs_embeds` (OPT-350M: not the hidden width)."""
    return model.get_input_embeddings().weight.shape[1]


def get_max_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a learned position table holds; None where positions are computed (rotary, ALiBi)."""
    if model.config.model_type in ("gpt2", "opt", "gpt_bigcode", "codegen", "gptj", "ctrl", "xglm", "biogpt"):
        return model.config.max_position_embeddings
    return None


def get_sliding_window(model: PreTrainedModel) -> int | None:
    """Return how far back a layer with sliding-window attention looks, in tokens; None where no layer has one."""
    config = model.config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def check_length(model: PreTrainedModel, lengths: Tensor) -> None:
    """Refuse to read more at once than a learned position table holds.

    Args:
        model: The base model, or the one that distils.
        lengths (B,): Positions that each row takes up.

    Raises:
        ShapeError: A row is too long.
    """
    limit = get_max_positions(model)
    if limit is not None and int(lengths.max()) > limit:
        raise ShapeError(
            f"Expected at most {limit} tokens at once, for which {type(model).__name__} has positions, got "
            f"{int(lengths.max())}: lower max_distiller_tokens or num_virtual_tokens, or give fewer demonstrations."
        )


def check_positions(
    model: PreTrainedModel, attention_mask: Tensor, next_positions: Tensor, num_new_tokens: int = 0
) -> None:
    """Refuse a query that would be answered wrongly behind a prefix, and warn of one that loses sight of it.

    Args:
        model: The base model.
        attention_mask (B, T): Of the query.
        next_positions (B,): Each row's first position.
        num_new_tokens: Tokens that will be generated and read behind the query.

    Raises:
        ShapeError: A learned position table has no room for the query and the new tokens.
    """
    limit, window = get_max_positions(model), get_sliding_window(model)
    if limit is None and window is None:
        return
    lengths = attention_mask.sum(1)  # [B]
    if limit is not None and int((next_positions + lengths).max()) + num_new_tokens > limit:
        raise ShapeError(
            f"Expected demonstrations, query and new tokens to fit the base model's {limit} positions, got a query of "
            f"{int(lengths.max())} tokens from position {int(next_positions.max())} on and {num_new_tokens} new ones: "
            "use fewer demonstrations, a shorter query or fewer new tokens."
        )
    if window is not None and int(next_positions.max()) and int(lengths.max()) + num_new_tokens >= window:
        warnings.warn(
            f"A query of {int(lengths.max())} tokens and {num_new_tokens} new ones is longer than the base model's "
            f"sliding window of {window}: in layers with that window its end no longer sees the demonstrations. "
            "Ask shorter queries or generate fewer tokens.",
            stacklevel=4,
        )
