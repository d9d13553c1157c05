"""The training losses: tensors in, scalar out.

Shapes: B rows, T positions, N positions that count, W vocabulary, K likeliest tokens, R hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
# Float32 numbers that a pass over the vocabulary holds at once, 16 MB: large tensors cost more to fetch than to fill.
_CHUNK_SIZE = 2**22

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


@dataclass(frozen=True)
class TopTokens:
    """A distribution over the vocabulary by its K likeliest tokens, and all others as one.

    Attributes:
        log_probs (B, T, K + 1): Of the K tokens, and last the logarithm of what is left for all others together.
        token_ids (B, T, K): The K tokens.
    """

    log_probs: Tensor
    token_ids: Tensor


def top_tokens(logits: Tensor, top_k: int, *, kd_temperature: float = 1.0) -> TopTokens:
    """Return the K likeliest tokens of a softened distribution.

    Args:
        logits (B, T, W): Of a teacher.
        top_k: K, below W.
        kd_temperature: Of the divergence that they are for.
    """
    token_ids = logits.topk(top_k, dim=-1).indices  # [B, T, K]
    rows = zip(logits, token_ids, strict=True)  # one by one, to hold one row's numbers in float32 at once
    log_probs = torch.stack([_keep_top(row.float() / kd_temperature, ids) for row, ids in rows])
    return TopTokens(log_probs, token_ids)


def kd_loss(
    student_logits: Tensor,
    teacher: Tensor | TopTokens,
    mask: Tensor,
    *,
    kd_divergence: Divergence = "forward_kl",
    kd_temperature: float = 1.0,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Return the mean over masked positions of the divergence of the student from the teacher, in nats a token.

    As in Hinton et al. (2015), both distributions are softened by `kd_temperature` and the result is multiplied by its
    square, so that gradients keep their size. It is worked out for a few positions at a time: besides the logits, only
    their gradient is ever held for all of them.

    Args:
        student_logits (B, T, W): Logits that should move.
        teacher: Logits (B, T, W) to move to, or their `top_tokens` at the same temperature. No gradient flows into
            them. From top tokens the divergence is over K + 1 classes, and never above that over all tokens.
        mask (B, T): True where a position counts.
        kd_divergence: KL(teacher || student), which spreads the student over all that the teacher finds likely;
            KL(student || teacher), which keeps it away from all that the teacher finds unlikely; or the mean of both
            to the halfway distribution (Jensen-Shannon, at most log 2).
        kd_temperature: Softening of both distributions; 1 is the plain divergence.
        num_items: What the sum is divided by; None: the number of masked positions. Gradient accumulation divides by
            the number of positions of all its batches.

    Returns:
        Scalar, in float32 at least.
    """
    measure = _DIVERGENCES[kd_divergence]

    def divergence(logits: Tensor, places: Tensor) -> Tensor:
        logits = logits / kd_temperature
        if isinstance(teacher, TopTokens):
            student = _keep_top(logits, teacher.token_ids.flatten(0, -2)[places])
            return measure(student, teacher.log_probs.flatten(0, -2)[places])
        softened = teacher.detach().flatten(0, -2)[places].to(logits.dtype) / kd_temperature
        return measure(logits.log_softmax(-1), softened.log_softmax(-1))

    total = _sum_over(divergence, student_logits, mask) * kd_temperature**2
    return total / _count(mask, num_items)


def nll_loss(logits: Tensor, labels: Tensor, *, num_items: Tensor | int | None = None) -> Tensor:
    """Return the mean negative log-likelihood of the labels, in nats a token.

    Args:
        logits (B, T, W): `logits[:, t]` predicts `labels[:, t]`: the caller has shifted them already.
        labels (B, T): Token ids; -100 where a position does not count.
        num_items: What the sum is divided by; None: the number of labels that count.

    Returns:
        Scalar, in float32 at least; 0 where no label counts.
    """
    mask = labels != IGNORE_INDEX

    def likelihood(part: Tensor, places: Tensor) -> Tensor:
        return F.cross_entropy(part, labels.flatten()[places], reduction="sum")

    return _sum_over(likelihood, logits, mask) / _count(mask, num_items)


def option_loss(
    logits: Tensor,
    labels: Tensor,
    query_rows: Tensor,
    *,
    task_rows: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Return the mean cross-entropy of choosing the target among each query's options, in nats a query.

    An option's score is its mean log-likelihood a token, as it is in evaluation (`scoring.score_options`), and the
    options' probabilities are the softmax of their scores. The NLL of a target says nothing of how likely the other
    options are, nor that a long one is given its later tokens for nothing; this loss lowers what decides the answer.

    Args:
        logits (B, T, W): `logits[:, t]` predicts `labels[:, t]`; one row an option.
        labels (B, T): Token ids of the options, all ending (or all starting) in the same column; -100 elsewhere.
        query_rows (B,): The query that an option belongs to, from 0. A query's first option is its target.
        task_rows (B,): The demonstrations that an option is read behind. If given, scores are calibrated before they
            are compared, as `scoring.option_priors` does it: an option loses the log of its mean likelihood over all
            queries of the same demonstrations that have it. A query of which an option is no other's keeps its scores.
        num_items: What the sum is divided by; None: the number of queries with two options at least.

    Returns:
        Scalar, in float32 at least; 0 where no query has two options.
    """
    counts = labels != IGNORE_INDEX
    precision = torch.promote_types(logits.dtype, torch.float32)
    nll = F.cross_entropy(logits[counts].to(precision), labels[counts], reduction="none")  # [N]
    rows = counts.nonzero()[:, 0]
    sums = nll.new_zeros(len(labels)).index_add(0, rows, nll)
    scores = -sums / counts.sum(1).clamp(min=1)  # [B]
    num_queries = int(query_rows.max()) + 1
    is_own = query_rows == torch.arange(num_queries, device=query_rows.device)[:, None]  # [queries, B]
    if task_rows is not None:
        scores = scores - _batch_priors(scores, labels, task_rows, is_own)
    among = scores.masked_fill(~is_own, -torch.inf).logsumexp(1)
    of_target = scores[is_own.long().argmax(1)]
    is_choice = is_own.sum(1) > 1
    return (among - of_target)[is_choice].sum() / _count(is_choice, num_items)


def _batch_priors(scores: Tensor, labels: Tensor, task_rows: Tensor, is_own: Tensor) -> Tensor:
    """Return what every option (B,) gets whatever is asked; 0 for those of queries that do not share all of them."""
    texts, option_ids = torch.cat([task_rows[:, None], labels], dim=1).unique(dim=0, return_inverse=True)
    is_same = option_ids == torch.arange(len(texts), device=labels.device)[:, None]  # [different options, B]
    num_queries = is_same.sum(1)
    log_means = scores.masked_fill(~is_same, -torch.inf).logsumexp(1) - num_queries.log()
    has_shared = ~(is_own & (num_queries < 2)[option_ids]).any(1)  # [queries]
    return log_means[option_ids] * (is_own & has_shared[:, None]).any(0)


def hidden_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    mask: Tensor,
    *,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Return how far the student's hidden states are from the teacher's, as a share of the teacher's size.

    The mean over layers and masked positions of ||student - teacher||^2 / ||teacher||^2: 0 where they are equal, 1
    where the student's are zero. Layers of any scale weigh the same.

    Args:
        student_states: States (B, T, R) of the chosen layers.
        teacher_states: The same layers'; no gradient flows into them.
        mask (B, T): True where a position counts.
        num_items: What the sum over positions is divided by; None: the number of masked positions.

    Returns:
        Scalar float32.
    """
    total = torch.zeros((), device=mask.device)
    for student, teacher in zip(student_states, teacher_states, strict=True):
        target = teacher[mask].detach().float()  # [N, R]
        distance = (student[mask].float() - target).square().sum(-1)
        total = total + (distance / target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).sum()
    return total / (len(student_states) * _count(mask, num_items))


def _forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(teacher, student, reduction="sum", log_target=True)


def _jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return (_forward_kl(middle, teacher) + _forward_kl(middle, student)) / 2


_DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
}


def _keep_top(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probabilities (N, K + 1) of K tokens, and of all others of the vocabulary together."""
    log_probs = logits.log_softmax(-1)
    others = log_probs.scatter(-1, token_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, token_ids), others], dim=-1)


def _sum_over(measure: Callable[[Tensor, Tensor], Tensor], logits: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of `measure(logits (N, W), places (N,))` over the masked positions, a few of them at a time."""
    return _SumOverPlaces.apply(logits, mask.flatten().nonzero().flatten(), measure)


class _SumOverPlaces(torch.autograd.Function):
    """Works out value and gradient of every part at once, so that nothing of it is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Add the parts up."""
        flat = logits.detach().flatten(0, -2)
        gradient = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        precision = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=precision, device=logits.device)
        for part in places.split(max(_CHUNK_SIZE // logits.shape[-1], 1)):
            chunk = flat[part].to(precision).requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                value = measure(chunk, part)
            if gradient is not None:
                gradient[part] = torch.autograd.grad(value, chunk)[0].to(gradient.dtype)
            total += value.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(logits))
        return total

    @staticmethod
    def backward(ctx: Any, gradient_of_sum: Tensor) -> Any:
        """Scale the gradient that is there already."""
        [gradient] = ctx.saved_tensors
        return gradient * gradient_of_sum, None, None


def _count(mask: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    if num_items is None:
        return mask.sum().clamp(min=1)
    return num_items.clamp(min=1) if isinstance(num_items, torch.Tensor) else max(num_items, 1)
