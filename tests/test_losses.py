from __future__ import annotations

import math

import pytest
import torch

from mend_hf import losses
from mend_hf.losses import hidden_loss, kd_loss, nll_loss, top_tokens

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


def test_reverse_kl_is_the_divergence_worked_out_by_hand():
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    got = kd_loss(logits_of(0.25, 0.75), logits_of(0.5, 0.5), ALL, kd_divergence="reverse_kl")
    assert got.item() == pytest.approx(expected)


def test_jensen_shannon_is_worked_out_by_hand_symmetric_and_at_most_log_2():
    student, teacher = logits_of(0.2, 0.8), logits_of(0.6, 0.4)
    first = 0.6 * math.log(0.6 / 0.4) + 0.4 * math.log(0.4 / 0.6)
    second = 0.2 * math.log(0.2 / 0.4) + 0.8 * math.log(0.8 / 0.6)
    got = kd_loss(student, teacher, ALL, kd_divergence="jensen_shannon").item()
    assert got == pytest.approx((first + second) / 2)
    assert kd_loss(teacher, student, ALL, kd_divergence="jensen_shannon").item() == pytest.approx(got)
    apart = kd_loss(100 * torch.eye(2)[:1, None], 100 * torch.eye(2)[1:, None], ALL, kd_divergence="jensen_shannon")
    assert apart.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("top_k", [0, 3])
def test_parts_give_the_value_and_gradient_of_the_formula_written_out(monkeypatch, divergence, top_k):
    monkeypatch.setattr(losses, "_CHUNK_SIZE", 2 * 7)  # two positions at a time
    student = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 7)
    mask = torch.rand(2, 5) < 0.7
    given = top_tokens(teacher, top_k, kd_temperature=2.0) if top_k else teacher
    loss = 3 * kd_loss(student, given, mask, kd_divergence=divergence, kd_temperature=2.0)
    [gradient] = torch.autograd.grad(loss, student)
    q, p = ((logits[mask] / 2).softmax(-1) for logits in (student, teacher))
    if top_k:
        ids = p.topk(top_k).indices
        q, p = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], 1) for x in (q, p))
    m = (p + q) / 2
    terms = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jensen_shannon": (p * (p / m).log() + q * (q / m).log()) / 2,
    }
    expected = 3 * 4 * terms[divergence].sum() / mask.sum()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], atol=1e-6, rtol=1e-4)


def test_top_tokens_give_a_divergence_below_that_of_all_and_zero_where_it_is_zero():
    student, teacher, mask = torch.randn(1, 4, 9), torch.randn(1, 4, 9), torch.ones(1, 4, dtype=torch.bool)
    values = [kd_loss(student, top_tokens(teacher, k), mask).item() for k in (1, 4, 8)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(kd_loss(student, teacher, mask).item(), rel=1e-4)
    assert kd_loss(teacher, top_tokens(teacher, 2), mask).item() == pytest.approx(0, abs=1e-6)


def test_hidden_loss_is_worked_out_by_hand_and_the_same_at_any_scale():
    teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    student = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert hidden_loss([student], [teacher], mask).item() == pytest.approx((1 + 4) / 2)
    assert hidden_loss([student, teacher], [teacher, teacher], mask).item() == pytest.approx((1 + 4) / 4)
    assert hidden_loss([100 * student], [100 * teacher], mask).item() == pytest.approx((1 + 4) / 2)
    assert hidden_loss([student], [teacher], torch.tensor([[True, False]]), num_items=5).item() == pytest.approx(1 / 5)
