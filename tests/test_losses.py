from __future__ import annotations

import math

import pytest
import torch

from mend_hf.losses import kd_loss, nll_loss

ALL = torch.ones(1, 1, dtype=torch.bool)


def logits_of(*probabilities):
    return torch.tensor([[list(probabilities)]]).log()


def test_kd_loss_of_equal_logits_is_zero():
    logits = torch.randn(2, 3, 5)
    assert kd_loss(logits, logits, torch.ones(2, 3, dtype=torch.bool)).item() == 0.0


def test_kd_loss_is_the_divergence_worked_out_by_hand():
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kd_loss(logits_of(0.25, 0.75), logits_of(0.5, 0.5), ALL).item() == pytest.approx(expected)


def test_kd_temperature_softens_both_and_scales_by_its_square():
    # at temperature 2 the odds 9:1 become 3:1
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    got = kd_loss(logits_of(0.5, 0.5), logits_of(0.9, 0.1), ALL, kd_temperature=2.0)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_kd_loss_counts_masked_positions_only():
    student, teacher = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    first = kd_loss(student[:, :1], teacher[:, :1], ALL)
    torch.testing.assert_close(kd_loss(student, teacher, torch.tensor([[True, False]])), first)
    torch.testing.assert_close(kd_loss(student, teacher, torch.tensor([[True, False]]), num_items=4), first / 4)


def test_no_gradient_flows_into_the_teacher():
    student, teacher = torch.randn(1, 1, 4, requires_grad=True), torch.randn(1, 1, 4, requires_grad=True)
    kd_loss(student, teacher, ALL).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_nll_loss_is_the_mean_worked_out_by_hand():
    logits = torch.cat([logits_of(0.5, 0.5), logits_of(0.1, 0.9), logits_of(0.3, 0.7)], dim=1)
    labels = torch.tensor([[0, 1, -100]])
    assert nll_loss(logits, labels).item() == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 2)
    assert nll_loss(logits, labels, num_items=10).item() == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 10)


def test_nll_loss_without_labels_is_zero():
    assert nll_loss(torch.randn(1, 2, 3), torch.full((1, 2), -100)).item() == 0.0
