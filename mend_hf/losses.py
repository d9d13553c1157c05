"""The training losses: tensors in, scalar out.

Shapes: B rows, T positions, W vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    kd_temperature: float = 1.0,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Return the mean over masked positions of KL(teacher || student), in nats a token.

    As in Hinton et al. (2015), both distributions are softened by `kd_temperature` and the result is multiplied by its
    square, so that gradients keep their size.

    Args:
        student_logits (B, T, W): Logits that should move.
        teacher_logits (B, T, W): Logits to move to; no gradient flows into them.
        mask (B, T): True where a position counts.
        kd_temperature: Softening of both distributions; 1 is the plain divergence.
        num_items: What the sum is divided by; None: the number of masked positions. Gradient accumulation divides by
            the number of positions of all its batches.

    Returns:
        Scalar float32.
    """
    student = (student_logits[mask].float() / kd_temperature).log_softmax(-1)  # [N, W]
    teacher = (teacher_logits[mask].detach().float() / kd_temperature).log_softmax(-1)
    total = F.kl_div(student, teacher, reduction="sum", log_target=True) * kd_temperature**2
    return total / _count(mask, num_items)


def nll_loss(logits: Tensor, labels: Tensor, *, num_items: Tensor | int | None = None) -> Tensor:
    """Return the mean negative log-likelihood of the labels, in nats a token.

    Args:
        logits (B, T, W): `logits[:, t]` predicts `labels[:, t]`: the caller has shifted them already.
        labels (B, T): Token ids; -100 where a position does not count.
        num_items: What the sum is divided by; None: the number of labels that count.

    Returns:
        Scalar float32; 0 where no label counts.
    """
    mask = labels != IGNORE_INDEX
    total = F.cross_entropy(logits[mask].float(), labels[mask], reduction="sum")
    return total / _count(mask, num_items)


def _count(mask: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    if num_items is None:
        return mask.sum().clamp(min=1)
    return num_items.clamp(min=1) if isinstance(num_items, torch.Tensor) else max(num_items, 1)
