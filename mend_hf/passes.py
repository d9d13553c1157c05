"""A batch cut into forward passes of few tokens: rows of like length together, and no padding that none of them needs.

Losses are sums over tokens, divided by the count of a whole step, so the passes' gradients add up to the batch's own.

Shapes: R tasks, N chunks, D demonstration tokens, B queries, O their wrong options, T query tokens, A target tokens of
an encoder-decoder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mend_hf.losses import IGNORE_INDEX

Batch = dict[str, Tensor]


def split_batch(batch: Mapping[str, Tensor], max_tokens: int, *, labels_apart: bool) -> list[Batch]:
    """Return a batch as parts of at most `max_tokens` tokens each, longest rows first.

    The queries that share demonstrations stay together, so a part with one task may be longer.

    Args:
        batch: Columns of `MendCollator`, with or without the teacher's.
        max_tokens: Demonstration and query tokens of a part, padding included.
        labels_apart: The labels are an encoder-decoder's (B, A), and do not stand at the query's tokens (B, T).
    """
    chunk_lengths, query_lengths = batch["demo_attention_mask"].sum(1), batch["attention_mask"].sum(1)
    chunk_rows, query_rows = batch["demo_task_rows"], batch["query_task_rows"]
    num_tasks = int(chunk_rows.max()) + 1
    if "option_input_ids" in batch:  # read in one pass with the queries
        query_lengths = torch.cat([query_lengths, batch["option_attention_mask"].sum(1)])
        query_rows = torch.cat([query_rows, query_rows[batch["option_query_rows"]]])
    # For every task: chunks, the longest one's tokens, queries, the longest one's tokens.
    shapes = torch.stack(
        [
            chunk_rows.bincount(minlength=num_tasks),
            chunk_lengths.new_zeros(num_tasks).scatter_reduce(0, chunk_rows, chunk_lengths, "amax"),
            query_rows.bincount(minlength=num_tasks),
            query_lengths.new_zeros(num_tasks).scatter_reduce(0, query_rows, query_lengths, "amax"),
        ],
        dim=1,
    ).tolist()
    order = sorted(range(num_tasks), key=lambda task: (-shapes[task][1], -shapes[task][3], task))
    groups: list[list[int]] = []
    for task in order:
        if groups and _count_tokens([shapes[member] for member in [*groups[-1], task]]) <= max_tokens:
            groups[-1].append(task)
        else:
            groups.append([task])
    return [_select_tasks(batch, sorted(group), labels_apart) for group in groups]


def _count_tokens(shapes: list[list[int]]) -> int:
    chunks, chunk_lengths, queries, query_lengths = zip(*shapes, strict=True)
    return sum(chunks) * max(chunk_lengths) + sum(queries) * max(query_lengths)


def _select_tasks(batch: Mapping[str, Tensor], tasks: list[int], labels_apart: bool) -> Batch:
    """Return the rows of some tasks, numbered anew, without columns in which none of them has a token."""
    wanted = torch.tensor(tasks, device=batch["query_task_rows"].device)
    chunks, queries = (torch.isin(batch[name], wanted) for name in ("demo_task_rows", "query_task_rows"))
    part: Batch = {}
    sides = [("demo_", chunks), ("teacher_", wanted), ("", queries)]
    if "option_query_rows" in batch:
        options = queries[batch["option_query_rows"]]
        sides.append(("option_", options))
        numbers = queries.cumsum(0) - 1  # of the queries that are left
        part["option_query_rows"] = numbers[batch["option_query_rows"][options]]
    for prefix, rows in sides:
        if f"{prefix}attention_mask" not in batch:
            continue
        mask = batch[f"{prefix}attention_mask"][rows]
        columns = mask.any(0)
        for name in ("input_ids", "attention_mask", "anchor_mask"):
            if f"{prefix}{name}" in batch:
                part[f"{prefix}{name}"] = batch[f"{prefix}{name}"][rows][:, columns]
        if f"{prefix}labels" in batch:
            labels = batch[f"{prefix}labels"][rows]
            part[f"{prefix}labels"] = labels[:, (labels != IGNORE_INDEX).any(0) if labels_apart else columns]
    part["demo_task_rows"] = torch.searchsorted(wanted, batch["demo_task_rows"][chunks])
    part["query_task_rows"] = torch.searchsorted(wanted, batch["query_task_rows"][queries])
    return part
