"""What a base model would answer wrongly, refused before it does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mend_hf.architectures import get_max_positions, get_sliding_window, reads_padding
from mend_hf.errors import ConfigError, ShapeError, UnsupportedModelError

INSTALLED = Version(transformers.__version__)
# Ways to generate that read the wrong tokens behind a filled cache in transformers before these releases.
_RIGHT_SINCE = {"assistant_model": "5.20", "prompt_lookup_num_tokens": "5.20", "prefill_chunk_size": "5.21"}


def check_release(generation: Mapping[str, Any]) -> None:
    """Refuse ways to generate that the installed transformers gets wrong behind a filled cache.

    Args:
        generation: Settings of `generate`.

    Raises:
        ConfigError: There are such settings.
    """
    for name, since in _RIGHT_SINCE.items():
        if generation.get(name) is not None and Version(since) > INSTALLED:
            raise ConfigError(
                f"Expected transformers {since} or newer for {name} behind a prefix, got {INSTALLED}, "
                "which then reads the wrong tokens: upgrade it, or leave the setting out."
            )


def check_gradients(base_model: PreTrainedModel) -> None:
    """Refuse to train through layers that lose gradients.

    On a CPU, bitsandbytes lays 4-bit weights out anew at the first pass in evaluation mode; passes through them have
    no gradients from then on.

    Raises:
        UnsupportedModelError: The base model has such layers.
    """
    if getattr(base_model, "is_loaded_in_4bit", False) and base_model.device.type == "cpu":
        raise UnsupportedModelError(
            "Expected a base model with gradients to train a distiller through, got 4-bit weights on a CPU, where "
            "bitsandbytes computes none: load it in 8 bits or with torchao, or train on a GPU."
        )


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


def check_padding(model: PreTrainedModel, mask: Tensor) -> None:
    """Refuse a padded batch (B, N) where the model would read the padding.

    Raises:
        ShapeError: Rows are of different lengths.
    """
    if reads_padding(model) and not mask.all():
        raise ShapeError(
            f"Expected rows of one length, because padding leaks into the states of {type(model).__name__}, got "
            f"{sorted(set(mask.sum(1).tolist()))} tokens in a batch of {mask.shape[1]}: ask rows one by one."
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


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a tokenizer that knows more tokens than the model has embeddings for.

    Raises:
        ConfigError: It belongs to another model, or tokens were added to it alone.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > num_rows:
        raise ConfigError(
            f"Expected a tokenizer of at most {num_rows} tokens, for which {type(model).__name__} has embeddings, got "
            f"one of {len(tokenizer)}: give the model's own, or call resize_token_embeddings after adding tokens."
        )
