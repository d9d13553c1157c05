"""What a base model must offer, and the few facts about it that transformers does not state in one place.

The only file that looks at model types.
"""

from __future__ import annotations

import inspect
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mend_hf.errors import ShapeError, UnsupportedModelError

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"]

_TASK_OF_HEAD: dict[str, TaskType] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def check_base_model(base_model: nn.Module) -> TaskType:
    """Return PEFT's task type of a base model that can read a prefix.

    Raises:
        UnsupportedModelError: It is no transformers model, reads in both directions, has a head that this version does
            not know, or its forward pass takes no embeddings or no cache.
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
    if any(getattr(module, "is_causal", None) is False for module in base_model.get_decoder().modules()):
        raise UnsupportedModelError(
            f"Expected a decoder-only base model, got {type(base_model).__name__}, which reads in both "
            "directions: what stands in front of a query would change with it, and nothing of it could be kept. Use "
            "a causal model, with or without a head: AutoModelForCausalLM, AutoModelForSequenceClassification."
        )
    missing = [name for name in ("inputs_embeds", "past_key_values", "position_ids") if not accepts(base_model, name)]
    if missing:
        raise UnsupportedModelError(
            f"Expected a base model whose forward pass takes inputs_embeds, past_key_values and position_ids; "
            f"{type(base_model).__name__} lacks {', '.join(missing)}. Use an attention model with explicit positions."
        )
    if base_model.can_generate():
        return "CAUSAL_LM"
    for head, task_type in _TASK_OF_HEAD.items():
        if type(base_model).__name__.endswith(head):
            return task_type
    if get_backbone(base_model) is base_model:
        return "FEATURE_EXTRACTION"
    raise UnsupportedModelError(
        f"Expected a backbone, or a head for language modelling, sequence or token classification or question "
        f"answering, got {type(base_model).__name__}. Load it through AutoModelForCausalLM."
    )


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


def check_generates(model: PreTrainedModel) -> None:
    """Refuse to write with a model that has no language-model head.

    Raises:
        UnsupportedModelError: It has a classification head or none.
    """
    if not model.can_generate():
        raise UnsupportedModelError(
            f"Expected a base model with a language-model head to write with, got {type(model).__name__}: "
            "call the model for its logits or hidden states, or load the base model through AutoModelForCausalLM."
        )


def check_pooling(model: PreTrainedModel, input_ids: Tensor | None, attention_mask: Tensor) -> None:
    """Refuse a query that a sequence classifier of transformers would classify by another token than its last one.

    Such a head takes the last id that is not `config.pad_token_id`; of embeddings, or without such an id, simply the
    last position.

    Args:
        model: With a head for sequence classification.
        input_ids (B, T): The queries' tokens; None: embeddings are given.
        attention_mask (B, T): Of the queries.

    Raises:
        ShapeError: A row's last token that counts is not the one that the head takes.
    """
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (places * attention_mask.bool()).argmax(1)  # [B]
    pad_token_id = model.config.get_text_config().pad_token_id
    if input_ids is None or pad_token_id is None:
        taken, remedy = torch.full_like(last, attention_mask.shape[1] - 1), "pad on the left"
    else:
        taken = (places * (input_ids != pad_token_id)).argmax(1)
        remedy = f"fill padding with the base model's pad_token_id {pad_token_id}, which no query may end in"
    wrong = (taken != last).nonzero().flatten().tolist()
    if wrong:
        raise ShapeError(
            f"Expected {type(model).__name__} to classify every query by its last token, got position "
            f"{int(taken[wrong[0]])} in place of {int(last[wrong[0]])} in row {wrong[0]}: {remedy}."
        )


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
