"""What a base model must offer, and the few facts about it that transformers does not state in one place.

The only file that looks at model types.
"""

from __future__ import annotations

import inspect
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
        return _check_encoder_decoder(base_model)
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


def _check_encoder_decoder(base_model: PreTrainedModel) -> Literal["SEQ_2_SEQ_LM"]:
    """Return the task type of an encoder-decoder whose encoder reads embeddings in place of text.

    Raises:
        UnsupportedModelError: It has no language-model head, or its encoder reads sound or images.
    """
    if not base_model.can_generate():
        raise UnsupportedModelError(
            f"Expected a model with a language-model head, got {type(base_model).__name__}. "
            "Load it through AutoModelForSeq2SeqLM."
        )
    if not accepts(base_model, "inputs_embeds") or not accepts(base_model.get_encoder(), "inputs_embeds"):
        raise UnsupportedModelError(
            f"Expected an encoder that takes inputs_embeds, in front of which a prefix can stand; "
            f"{type(base_model).__name__} has none. Use an encoder-decoder that reads text, such as T5 or BART."
        )
    return "SEQ_2_SEQ_LM"


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


def embed_tokens(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return tokens as the model takes them in `inputs_embeds`.

    Some encoders (Pegasus, Marian, Blenderbot-small) scale what their embedding layer gives, but not `inputs_embeds`.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    if not model.config.is_encoder_decoder:
        return embeddings
    return embeddings * getattr(get_backbone(model), "embed_scale", 1.0)


def get_max_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a position table holds; None where positions are computed (rotary, ALiBi, T5)."""
    if model.config.model_type in ("gpt2", "opt", "gpt_bigcode", "codegen", "gptj", "ctrl", "xglm", "biogpt"):
        return model.config.max_position_embeddings
    if model.config.model_type in ("bart", "mbart", "pegasus", "plbart", "marian", "blenderbot", "blenderbot-small"):
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
    model: PreTrainedModel, attention_mask: Tensor, next_positions: Tensor, num_slots: int, num_new_tokens: int = 0
) -> None:
    """Refuse a query that would be answered wrongly behind a prefix.

    Args:
        model: The base model.
        attention_mask (B, T): Of the query.
        next_positions (B,): Each row's first position.
        num_slots: Prefix slots in front of the query.
        num_new_tokens: Tokens that will be generated and read behind the query.

    Raises:
        ShapeError: A learned position table has no room for the query, or padding between prefix and query would push
            the prefix out of a sliding window.
    """
    limit, window, num_tokens = get_max_positions(model), get_sliding_window(model), attention_mask.shape[1]
    if limit is not None and (num_before := int(next_positions.max())) + num_tokens > limit:
        raise ShapeError(
            f"Expected demonstrations and query to fit the base model's {limit} positions, got a query of "
            f"{num_tokens} tokens from position {num_before} on: use fewer demonstrations or a shorter query."
        )
    num_read = num_slots + num_tokens + num_new_tokens
    if window is not None and num_read > window and not attention_mask[:, 0].all():
        raise ShapeError(
            f"Expected queries of one length behind a prefix of {num_slots} slots, because padding would use up the "
            f"base model's sliding window of {window} tokens, got a batch padded on the left to {num_tokens} tokens "
            f"and {num_new_tokens} new ones: ask rows of different lengths one by one."
        )
