"""How likely each answer option is: the query is read once, its options share what was read.

Shapes: B queries, T query tokens, O options of all queries, A option tokens, W vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mend_hf.architectures import CACHE_NAME, get_sliding_window, holds_prefix_in_cache, reads_padding
from mend_hf.caches import continue_inputs
from mend_hf.errors import DataError, ShapeError
from mend_hf.guards import check_positions
from mend_hf.losses import IGNORE_INDEX
from mend_hf.prefix import KeyValuePrefix, Prefix, position_inputs, positions_of
from mend_hf.prompt_encoder import PromptEncoder
from mend_hf.routes.base import Route
from mend_hf.routes.encoder import EncoderRoute

OPTIONS_PER_QUERY = 4  # Options read at once for every query of a batch; each has a copy of what its query attends to.


class OptionReader(Protocol):
    """What of a `MendModel`, which stands above this module, reads queries and options."""

    @property
    def base_model(self) -> PreTrainedModel:
        """The frozen language model."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def prompt(self) -> PromptEncoder:
        """Its prompt format."""

    @property
    def route(self) -> Route:
        """How a prefix gets into it."""

    def tokenize(self, queries: str | Sequence[str], *, is_alone: bool = False) -> BatchEncoding:
        """Return queries in the prompt format."""


@torch.no_grad()
def score_options(
    model: OptionReader,
    queries: Sequence[str],
    options: Sequence[Sequence[str]],
    prefix: Prefix | None = None,
    *,
    batch_size: int = 8,
) -> list[list[float]]:
    """Return, for every query, the mean log-likelihood a token of each of its options, in nats.

    Args:
        model: Its base model reads, in its prompt format.
        queries: B texts.
        options: What may follow each query. One that is longer than a demonstration may be loses its end.
        prefix: What stands in front of every query (one row), or of each (B rows); None: zero-shot.
        batch_size: Queries read at once, and a few times as many options.

    Raises:
        DataError: There are not as many lists of options as queries, or one is empty.
        ShapeError: The prefix has neither one row nor one a query, or the base model has no positions left.
    """
    _check_options(queries, options)
    key_values = None if prefix is None else model.route.prepare(prefix)
    if key_values is not None and len(key_values) not in (1, len(queries)):
        raise ShapeError(
            f"Expected a prefix of 1 row or of {len(queries)}, one a query, got {len(key_values)} rows: "
            "pick one a query with .select([...])."
        )
    scores: list[list[float]] = [[] for _ in queries]
    for rows in batch_by_length(model, queries, batch_size):
        part = key_values
        if key_values is not None:
            part = key_values.select(rows) if len(key_values) > 1 else key_values.expand(len(rows))
        batch = _score_batch(model, [queries[row] for row in rows], [options[row] for row in rows], part)
        for row, values in zip(rows, batch, strict=True):
            scores[row] = values
    return scores


def option_priors(
    model: OptionReader,
    inputs: Sequence[str],
    options: Sequence[str],
    prefix: Prefix | None = None,
    *,
    batch_size: int = 8,
) -> dict[str, float]:
    """Return what each option gets whatever is asked: the log of its mean likelihood a token behind several inputs.

    Scores less these are calibrated: a preference that the model has for an option is taken off. With inputs of the
    task this is batch calibration (Zhou et al., ICLR 2024, arXiv 2309.17249), with inputs that say nothing contextual
    calibration (Zhao et al., ICML 2021, arXiv 2102.09690).

    Args:
        model: As for `score_options`.
        inputs: Texts such as are asked, without answers.
        options: All that a query may have.
        prefix: One row, or None, as for `score_options`.
        batch_size: Inputs read at once.

    Raises:
        DataError: There are no inputs or no options, or there is one text in place of several.
        ShapeError: The prefix has more rows than one.
    """
    if not inputs or not options or isinstance(inputs, str) or isinstance(options, str):
        raise DataError(
            f"Expected inputs and options as two lists of texts, got {inputs!r} and {options!r}: correct it."
        )
    if prefix is not None and len(prefix) > 1:
        raise ShapeError(
            f"Expected demonstrations of one task, got those of {len(prefix)}: pick one with .select([...])."
        )
    rows = score_options(model, inputs, [options] * len(inputs), prefix, batch_size=batch_size)
    return dict(zip(options, map(_log_of_mean, zip(*rows, strict=True)), strict=True))


def choose_options(
    model: OptionReader,
    queries: Sequence[str],
    options: Sequence[str],
    prefix: Prefix | None = None,
    priors: Mapping[str, float] | None = None,
) -> list[str]:
    """Return, for every query, the option with the highest score, less its prior where there are priors.

    Raises:
        DataError: There are not two or more different options, or one has no prior.
    """
    if isinstance(options, str) or len({*options}) < max(len(options), 2):
        raise DataError(f"Expected options as a list of two or more different texts, got {options!r}: correct it.")
    if priors is not None and (missing := [option for option in options if option not in priors]):
        raise DataError(f"Expected a prior of every option, got none of {missing}: make them of all options.")
    scores = score_options(model, queries, [options] * len(queries), prefix)
    less = [0.0 if priors is None else priors[option] for option in options]
    return [max(zip(options, row, less, strict=True), key=lambda each: each[1] - each[2])[0] for row in scores]


def _log_of_mean(log_values: Sequence[float]) -> float:
    """Return the logarithm of the mean of numbers given as logarithms, none of which can underflow."""
    highest = max(log_values)
    return highest + math.log(sum(math.exp(value - highest) for value in log_values) / len(log_values))


def batch_by_length(model: OptionReader, queries: Sequence[str], batch_size: int) -> list[list[int]]:
    """Return the queries' indices in batches of similar length, the longest first.

    A batch holds one length only where the base model has a sliding window, which padding would use up, or where it
    reads padding.
    """
    prompt = model.prompt
    lengths = [len(prompt.encode_query(query)) for query in queries]
    order = sorted(range(len(queries)), key=lengths.__getitem__, reverse=True)
    by_length = get_sliding_window(model.base_model) is not None or reads_padding(model.base_model)
    groups = [list(rows) for _, rows in groupby(order, key=lengths.__getitem__)] if by_length else [order]
    return [rows[start : start + batch_size] for rows in groups for start in range(0, len(rows), batch_size)]


def _check_options(queries: Sequence[str], options: Sequence[Sequence[str]]) -> None:
    if len(queries) != len(options) or not all(options):
        raise DataError(
            f"Expected options for each of {len(queries)} queries, got {sum(map(bool, options))} lists that hold "
            "some: give every query its own."
        )


def _score_batch(
    model: OptionReader, queries: list[str], options: list[Sequence[str]], prefix: Prefix | None
) -> list[list[float]]:
    encoding = model.tokenize(queries, is_alone=prefix is None)
    mask = encoding["attention_mask"]
    prompt = model.prompt
    limit = prompt.config.max_demonstration_tokens
    ids = [(row, prompt.encode_answer(choice)[:limit]) for row, choices in enumerate(options) for choice in choices]
    num_at_once = OPTIONS_PER_QUERY * len(queries)
    parts = [ids[start : start + num_at_once] for start in range(0, len(ids), num_at_once)]
    if isinstance(model.route, EncoderRoute):
        return _split(_score_by_decoder(model.route, prompt, prefix, encoding, parts), options)
    if not holds_prefix_in_cache(model.base_model):
        means = [mean for part in parts for mean in _score_in_one_piece(model, encoding, part, prefix)]
        return _split(means, options)
    longest = max(len(answer) for _, answer in ids)
    whole = torch.cat([mask, mask.new_ones(len(queries), longest - 1)], dim=1)
    if not isinstance(prefix, KeyValuePrefix):
        check_positions(model.base_model, whole, whole.new_zeros(1))
        inputs = {"attention_mask": mask} | position_inputs(model.base_model, positions_of(mask))
    else:
        check_positions(model.base_model, whole, prefix.next_positions)
        inputs = continue_inputs(prefix, mask, model.base_model)
    # Said outright: `Trainer` switches it off in the config of a model that it has had in hand.
    read = model.base_model(input_ids=encoding["input_ids"], logits_to_keep=1, use_cache=True, **inputs)
    means = []
    for part in parts:
        rows = torch.tensor([row for row, _ in part], device=mask.device)  # [O]
        labels = _pad_right([answer for _, answer in part], IGNORE_INDEX).to(mask.device)  # [O, A]
        logits = read.logits[rows]  # [O, 1, W]
        if labels.shape[1] > 1:
            logits = torch.cat([logits, _read_options(model, read[CACHE_NAME], inputs, rows, labels)], dim=1)
        means += _mean_log_likelihood(logits, labels)
    return _split(means, options)


def _split(means: list[float], options: list[Sequence[str]]) -> list[list[float]]:
    remaining = iter(means)
    return [[next(remaining) for _ in choices] for choices in options]


def _score_by_decoder(
    route: EncoderRoute,
    prompt: PromptEncoder,
    prefix: Prefix | None,
    encoding: BatchEncoding,
    parts: list[list[tuple[int, list[int]]]],
) -> list[float]:
    """Return every option's mean log-likelihood a token; what the encoder read of a query serves all its options.

    The decoder reads what the tokenizer puts before a target; neither that nor the end of the target counts.
    """
    before, behind = prompt.target_frame
    read = route.encode(prefix, encoding["input_ids"], encoding["attention_mask"])
    states, mask = read["encoder_outputs"].last_hidden_state, read["attention_mask"]
    means: list[float] = []
    for part in parts:
        rows = torch.tensor([row for row, _ in part], device=mask.device)  # [O]
        labels = _pad_right([before + answer + behind for _, answer in part], IGNORE_INDEX).to(mask.device)  # [O, A]
        counted = _pad_right([[0] * len(before) + [1] * len(answer) for _, answer in part], 0).to(mask.device)
        logits = route.base_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states[rows]),
            attention_mask=mask[rows],
            **route.target_inputs(labels),
        ).logits[:, : counted.shape[1]]
        means += _mean_log_likelihood(logits, labels[:, : counted.shape[1]].masked_fill(counted == 0, IGNORE_INDEX))
    return means


def _read_options(
    model: OptionReader, cache: DynamicCache, inputs: dict[str, Tensor], rows: Tensor, labels: Tensor
) -> Tensor:
    """Return the logits (O, A - 1, W) behind all but the last token of every option, which go on from their query."""
    ids = labels[:, :-1]
    option_mask = (ids != IGNORE_INDEX).long()
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]  # the tensors are shared: selecting makes new ones
    cache.batch_select_indices(rows)
    positions = {}
    if "position_ids" in inputs:
        steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        positions["position_ids"] = inputs["position_ids"][rows, -1:] + steps
    return model.base_model(
        input_ids=ids.clamp(min=0),
        attention_mask=torch.cat([inputs["attention_mask"][rows], option_mask], dim=1),
        **{CACHE_NAME: cache},
        **positions,
    ).logits


def _score_in_one_piece(
    model: OptionReader, encoding: Mapping[str, Tensor], ids: list[tuple[int, list[int]]], prefix: Prefix | None
) -> list[float]:
    """Read query and option together, for a base model whose cache cannot be handed from one option to the next."""
    rows = torch.tensor([row for row, _ in ids], device=model.device)  # [O]
    labels = _pad_right([answer for _, answer in ids], IGNORE_INDEX).to(model.device)  # [O, A]
    read = labels[:, :-1]
    input_ids = torch.cat([encoding["input_ids"][rows], read.clamp(min=0)], dim=1)
    mask = torch.cat([encoding["attention_mask"][rows], (read != IGNORE_INDEX).long()], dim=1)
    if prefix is None:
        positions = position_inputs(model.base_model, positions_of(mask))
        logits = model.base_model(input_ids=input_ids, attention_mask=mask, **positions).logits
    else:
        logits = model.route.forward(prefix.select(rows), input_ids, mask).logits
    return _mean_log_likelihood(logits[:, -labels.shape[1] :], labels)


def _mean_log_likelihood(logits: Tensor, labels: Tensor) -> list[float]:
    """Return the mean over each option's tokens (O, A), given the logits (O, A, W) in front of them."""
    counted = labels != IGNORE_INDEX
    chosen = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)  # [O, A]
    return ((chosen * counted).sum(1) / counted.sum(1)).tolist()


def _pad_right(rows: list[list[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
