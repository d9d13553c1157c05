"""How likely each answer option is: the query is read once, its options share what was read.

Shapes: B queries, T query tokens, O options of all queries, A option tokens, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from mend_hf.errors import DataError
from mend_hf.losses import IGNORE_INDEX
from mend_hf.model import MendModel
from mend_hf.prefix import KeyValuePrefix, continue_inputs


@torch.no_grad()
def score_options(
    model: MendModel,
    queries: Sequence[str],
    options: Sequence[Sequence[str]],
    prefix: KeyValuePrefix | None = None,
    *,
    batch_size: int = 8,
) -> list[list[float]]:
    """Return, for every query, the mean log-likelihood a token of each of its options, in nats.

    Args:
        model: Its base model reads, in its prompt format.
        queries: B texts.
        options: The answers to choose from, at least two different ones a query.
        prefix: What stands in front of every query (one row), or of each (B rows); None: zero-shot.
        batch_size: Queries read at once.

    Raises:
        DataError: A query has fewer than two options, or the same twice.
    """
    _check_options(queries, options)
    lengths = [len(model.prompt.encode_query(query)) for query in queries]
    order = sorted(range(len(queries)), key=lengths.__getitem__)
    scores: list[list[float]] = [[] for _ in queries]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        part = prefix.select(rows) if prefix is not None and len(prefix) == len(queries) > 1 else prefix
        batch = _score_batch(model, [queries[row] for row in rows], [options[row] for row in rows], part)
        for row, values in zip(rows, batch, strict=True):
            scores[row] = values
    return scores


def _check_options(queries: Sequence[str], options: Sequence[Sequence[str]]) -> None:
    if len(queries) != len(options):
        raise DataError(f"Expected options for each of {len(queries)} queries, got {len(options)} lists of options.")
    for query, choices in zip(queries, options, strict=True):
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise DataError(
                f"Expected two or more different options to choose from, got {list(choices)!r} for {query!r}: "
                "correct the task's options."
            )


def _score_batch(
    model: MendModel, queries: list[str], options: list[Sequence[str]], prefix: KeyValuePrefix | None
) -> list[list[float]]:
    base_model = model.base_model
    encoding = model.tokenize(queries)
    mask = encoding["attention_mask"]
    if prefix is None:
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": True}
    else:
        prefix = prefix if len(prefix) == len(queries) else prefix.expand(len(queries))
        inputs = continue_inputs(prefix, mask, base_model)
    read = base_model(input_ids=encoding["input_ids"], logits_to_keep=1, **inputs)
    rows = torch.tensor([row for row, choices in enumerate(options) for _ in choices], device=mask.device)  # [O]
    ids = [model.prompt.encode_answer(choice) for choices in options for choice in choices]
    labels = _pad_right(ids, IGNORE_INDEX).to(mask.device)  # [O, A]
    logits = read.logits[rows]  # [O, 1, W]
    if labels.shape[1] > 1:
        logits = torch.cat([logits, _read_options(model, read.past_key_values, inputs, rows, labels)], dim=1)
    counted = labels != IGNORE_INDEX
    chosen = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)  # [O, A]
    means = ((chosen * counted).sum(1) / counted.sum(1)).tolist()
    return [[means.pop(0) for _ in choices] for choices in options]


def _read_options(
    model: MendModel, cache: DynamicCache, inputs: dict[str, Tensor], rows: Tensor, labels: Tensor
) -> Tensor:
    """Return the logits (O, A - 1, W) behind all but the last token of every option, which go on from their query."""
    ids = labels[:, :-1]
    option_mask = (ids != IGNORE_INDEX).long()
    cache.batch_select_indices(rows)
    positions = inputs["position_ids"][rows, -1:] + 1 + torch.arange(ids.shape[1], device=ids.device)
    return model.base_model(
        input_ids=ids.clamp(min=0),
        attention_mask=torch.cat([inputs["attention_mask"][rows], option_mask], dim=1),
        position_ids=positions,
        past_key_values=cache,
    ).logits


def _pad_right(rows: list[list[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
