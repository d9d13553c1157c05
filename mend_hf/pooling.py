"""Anchors pooled to a fixed number of slots when demonstrations are many.

Several anchors become one slot with the key of one of them, the *representative*, and the mean of their values. Keys
are never averaged: rotary models turn each by the angle of its own position, so the mean of two equal keys from
different positions is a shorter key that points elsewhere, and un-rotating would need every model's own frequencies. A
representative's key is one the base model has made, at a position it stood at, right for rotary, learned and ALiBi
positions alike. Values carry no rotation, and their mean is what n slots with equal keys pass on together.

What is lost is attention mass: n slots with equal keys draw n times what one draws, and a cache has no place for the
bias log(n) that would make up for it. Against other pooled anchors the loss evens out where answers are about equally
frequent; against sink, placeholders and query, pooled anchors weigh less than the anchors did. Training with pooling
on lets the distiller write larger keys.

Shapes: B tasks, N and D as in the distiller, S slots, M slots after pooling, H key/value heads, K head width.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mend_hf.errors import DataError
from mend_hf.fingerprint import hash_json
from mend_hf.prefix import KeyValuePrefix, gather_slots

Clusters = list[list[int]]


def label_anchors(input_ids: Tensor, anchor_mask: Tensor) -> Tensor:
    """Return a number for every anchor that is equal for the same token of the same answer, and 0 elsewhere.

    Args:
        input_ids (N, D): Token ids of the chunks.
        anchor_mask (N, D): True at anchors; those of one answer stand side by side.

    Returns:
        Labels (N, D), equal in every process.
    """
    labels = torch.zeros(input_ids.shape, dtype=torch.long)
    for row, (ids, is_anchor) in enumerate(zip(input_ids.tolist(), anchor_mask.tolist(), strict=True)):
        start = 0
        for place in range(len(ids) + 1):
            if place < len(ids) and is_anchor[place]:
                continue
            for token in range(start, place):
                labels[row, token] = _label(tuple(ids[start:place]), token - start)
            start = place + 1
    return labels.to(input_ids.device)


@lru_cache(maxsize=4096)  # a task has few answers, and they come again and again
def _label(answer_ids: tuple[int, ...], place: int) -> int:
    return int(hash_json([list(answer_ids), place])[:15], 16) + 1


def pool_anchors(prefix: KeyValuePrefix, max_slots: int, method: Literal["label", "similarity"]) -> KeyValuePrefix:
    """Merge anchors until no task has more slots than the budget; sink and placeholders stay as they are.

    Gradients flow to the keys of representatives and to all values. A task within the budget is not changed.

    Args:
        prefix: B rows with `anchor_labels`.
        max_slots: The budget of a task.
        method: "label" merges anchors with equal labels, so that every answer keeps slots of its own: each label gets
            one, and the rest goes where a slot stands for most anchors; neighbours are merged. "similarity" merges
            the anchors whose values are most alike, by bipartite soft matching (Bolya et al., 2023, "Token Merging",
            arXiv 2210.09461); values and not keys, because keys of equal content at different positions differ.

    Returns:
        A prefix of M slots, at most the budget. A pooled slot stands where its representative stood, the last one
        merged, which has read most demonstrations.

    Raises:
        DataError: Sink, placeholders and, by label, one slot for every label do not fit.
    """
    num_used = prefix.mask.sum(1)
    if int(num_used.max()) <= max_slots:
        return prefix
    rows = []
    for row in range(len(prefix)):
        slots = prefix.mask[row].nonzero().squeeze(1).tolist()
        rows.append([[slot] for slot in slots] if len(slots) <= max_slots else _plan(prefix, row, max_slots, method))
    num_slots = max(len(clusters) for clusters in rows)
    device = prefix.mask.device
    index = torch.zeros(len(prefix), num_slots, dtype=torch.long)
    mask = torch.zeros(len(prefix), num_slots, dtype=torch.bool)
    weights = torch.zeros(len(prefix), num_slots, prefix.num_slots)
    for row, clusters in enumerate(rows):
        start = num_slots - len(clusters)
        mask[row, start:] = True
        for place, cluster in enumerate(clusters, start):
            index[row, place] = cluster[-1]
            weights[row, place, cluster] = 1 / len(cluster)
    index, mask, weights = index.to(device), mask.to(device), weights.to(device)
    return KeyValuePrefix(
        tuple(gather_slots(keys, index) for keys in prefix.keys),
        tuple(torch.einsum("bms,bhsk->bhmk", weights.to(values.dtype), values) for values in prefix.values),
        mask,
        prefix.next_positions,
        prefix.labels.gather(1, index),
    )


def _plan(prefix: KeyValuePrefix, row: int, max_slots: int, method: str) -> Clusters:
    """Return which slots of a task become one, in the order of the last of each."""
    labels = prefix.labels[row].tolist()
    slots = prefix.mask[row].nonzero().squeeze(1).tolist()
    fixed = [[slot] for slot in slots if labels[slot] == 0]
    anchors = [slot for slot in slots if labels[slot] != 0]
    budget = max_slots - len(fixed)
    least = len({labels[slot] for slot in anchors}) if method == "label" else min(len(anchors), 1)
    if budget < least:
        raise DataError(
            f"Expected max_slots of at least {len(fixed) + least}, for {len(fixed)} slots that are never pooled (the "
            f'sink and every chunk\'s placeholders) and {least} with anchor_pooling="{method}", got {max_slots}: '
            "raise it, lower num_virtual_tokens, let a chunk hold more demonstrations"
            + (', or use anchor_pooling="similarity".' if method == "label" else ".")
        )
    if method == "label":
        merged = _merge_by_label(anchors, labels, budget)
    else:
        values = torch.cat([layer[row].detach().float().transpose(0, 1).flatten(1) for layer in prefix.values], dim=1)
        merged = _merge_by_similarity(anchors, values, budget)
    return sorted([*fixed, *merged], key=lambda cluster: cluster[-1])


def _merge_by_label(anchors: list[int], labels: list[int], budget: int) -> Clusters:
    groups: dict[int, list[int]] = {}
    for slot in anchors:
        groups.setdefault(labels[slot], []).append(slot)
    shares = dict.fromkeys(groups, 1)
    for _ in range(budget - len(groups)):
        fullest = max(shares, key=lambda label: len(groups[label]) / shares[label])
        shares[fullest] += 1
    clusters = []
    for label, members in groups.items():
        cuts = [len(members) * part // shares[label] for part in range(shares[label] + 1)]
        clusters += [members[start:end] for start, end in pairwise(cuts)]
    return clusters


def _merge_by_similarity(anchors: list[int], values: Tensor, budget: int) -> Clusters:
    """Merge in rounds; in each, every second cluster may join the most similar of the others.

    Args:
        anchors: Slots to merge.
        values (S, F): Of every slot, all layers and heads in one row.
        budget: How many clusters stay, at least 1.
    """
    clusters = [[slot] for slot in anchors]
    while len(clusters) > budget:
        means = torch.stack([values[cluster].mean(0) for cluster in clusters])
        means = torch.nn.functional.normalize(means, dim=-1)
        best, target = (means[::2] @ means[1::2].T).max(1)
        leaving = torch.argsort(best, descending=True, stable=True)[: len(clusters) - budget].tolist()
        goals = target.tolist()
        others = clusters[1::2]
        for mover in leaving:
            others[goals[mover]] = others[goals[mover]] + clusters[2 * mover]
        staying = [cluster for number, cluster in enumerate(clusters[::2]) if number not in set(leaving)]
        clusters = sorted((sorted(cluster) for cluster in [*staying, *others]), key=lambda cluster: cluster[-1])
    return clusters
