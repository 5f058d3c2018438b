"""Losses for calibration: what they become at special values, and slow references."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import lightning_plugins.robustness as robustness
from lightning_plugins.calibration import (
    DualFocalLoss,
    FLSD53Loss,
    FocalLoss,
    MMCELoss,
    SoftBinnedECELoss,
    dual_focal_loss,
    ece,
    flsd53,
    focal_loss,
    mmce,
    soft_binned_ece,
    weighted_mmce,
)
from lightning_plugins.mixing import MixedLabels


def batch(n: int = 40, c: int = 4, *, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(c, (n,), generator=generator)


def predictions(confidence: list[float], right: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two classes with the given confidences in class 0, and targets that make them right or wrong."""
    c = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([c, 1 - c], 1).log(), 1 - torch.tensor(right)


# --- Variants of cross-entropy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [focal_loss, dual_focal_loss])
def test_gamma_0_is_cross_entropy_in_value_and_gradient(loss):
    logits, target = batch()
    pairs = [loss(logits, target, 0.0), F.cross_entropy(logits, target)]
    torch.testing.assert_close(*pairs)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in pairs))


def test_the_focal_loss_is_one_for_both_families():
    assert robustness.focal_loss is focal_loss
    assert robustness.FocalLoss is FocalLoss


@pytest.mark.parametrize(("p", "gamma"), [(0.15, 5), (0.1999, 5), (0.2001, 3), (0.9, 3)])
def test_flsd53_branches_at_a_fifth(p, gamma):
    logits = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
    expected = -((1 - p) ** gamma) * math.log(p)
    assert flsd53(logits, torch.tensor([0])).item() == pytest.approx(expected)
    assert focal_loss(logits, torch.tensor([0]), gamma).item() == pytest.approx(expected)


def test_dual_focal_against_a_loop():
    logits, target = batch()
    total = 0.0
    for row, label in zip(logits.softmax(1).tolist(), target.tolist(), strict=True):
        own = row[label]
        rival = max((value for value in row if value < own), default=0.0)
        total -= (1 - own + rival) ** 3 * math.log(own)
    assert dual_focal_loss(logits, target, 3.0).item() == pytest.approx(total / len(target))


@pytest.mark.parametrize("loss", [flsd53, lambda o, y, **k: dual_focal_loss(o, y, 2.0, **k)])
def test_gradients_and_reductions(loss):
    logits, target = batch(6)
    assert torch.autograd.gradcheck(lambda o: loss(o, target), logits)
    each = loss(logits, target, reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(loss(logits, target), each.mean())
    torch.testing.assert_close(loss(logits, target, reduction="sum"), each.sum())
    with pytest.raises(ValueError, match="reduction must be one of"):
        loss(logits, target, reduction="other")


@pytest.mark.parametrize("loss", [flsd53, dual_focal_loss, focal_loss, mmce, weighted_mmce, soft_binned_ece])
def test_sure_predictions_have_finite_gradients(loss):
    for target in (torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([0, 1])):
        logits = torch.tensor([[100.0, -100.0], [100.0, -100.0]], requires_grad=True)
        value = loss(logits, target)
        assert value.isfinite()
        assert torch.autograd.grad(value, logits)[0].isfinite().all()


@pytest.mark.parametrize("loss", [flsd53, dual_focal_loss])
def test_mixed_labels_give_the_sum_over_labels(loss):
    logits, target = batch()
    components = torch.stack([target, target.flip(0)])
    labels = MixedLabels(components, torch.tensor([0.3, 0.7]))
    expected = 0.3 * loss(logits, components[0]) + 0.7 * loss(logits, components[1])
    torch.testing.assert_close(loss(logits, labels), expected)


# --- Measures on a batch ------------------------------------------------------------------------------------------


def test_mmce_against_a_loop():
    confidence, right = [0.6, 0.7, 0.9, 0.95, 0.8], [1, 0, 1, 1, 0]
    logits, target = predictions(confidence, right)
    total = weighted = 0.0
    counts = {1: 3, 0: 2}
    for ci, ri in zip(confidence, right, strict=True):
        for cj, rj in zip(confidence, right, strict=True):
            term = (ri - ci) * (rj - cj) * math.exp(-abs(ci - cj) / 0.4)
            total += term / 25
            weighted += term / (counts[ri] * counts[rj])
    assert mmce(logits, target).item() == pytest.approx(math.sqrt(total + 1e-10))
    assert weighted_mmce(logits, target).item() == pytest.approx(math.sqrt(weighted + 1e-10))


def test_mmce_is_0_where_confidence_is_accuracy():
    logits, target = predictions([0.75] * 8, [1, 1, 1, 0] * 2)
    assert mmce(logits, target).item() == pytest.approx(1e-5, rel=1e-3)
    sure = torch.tensor([[50.0, -50.0]]).repeat(4, 1)
    assert mmce(sure, torch.zeros(4).long()).item() == pytest.approx(1e-5, rel=1e-3)


def test_mmce_of_batches_with_one_group():
    logits, target = predictions([0.6, 0.8], [1, 1])
    torch.testing.assert_close(weighted_mmce(logits, target), mmce(logits, target))
    logits, target = predictions([0.6, 0.8], [0, 0])
    torch.testing.assert_close(weighted_mmce(logits, target), mmce(logits, target))


@pytest.mark.parametrize("measure", [mmce, weighted_mmce, soft_binned_ece, lambda o, y: soft_binned_ece(o, y, p=1.0)])
def test_measures_have_the_right_gradient_and_pull_confidence_to_accuracy(measure):
    logits, target = batch(8)
    assert torch.autograd.gradcheck(lambda o: measure(o, target), logits)
    sure, target = predictions([0.95] * 10, [1] * 6 + [0] * 4)
    sure.requires_grad_()
    (gradient,) = torch.autograd.grad(measure(sure, target), sure)
    if measure is not weighted_mmce:
        assert (gradient[:, 0] > 0).all()  # a step down the slope lowers the confidence


@pytest.mark.parametrize("num_bins", [5, 15])
def test_soft_bins_become_hard_ones(num_bins):
    logits, _ = batch(400)
    target = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    expected = ece(logits.detach(), target, num_bins=num_bins, input="logits")
    found = soft_binned_ece(logits, target, num_bins=num_bins, temperature=1e-7, p=1.0)
    torch.testing.assert_close(found.float().detach(), expected, rtol=1e-4, atol=1e-5)
    assert abs(soft_binned_ece(logits, target, num_bins=num_bins, temperature=0.1, p=1.0) - expected) > 1e-3


def test_soft_binned_ece_against_a_loop():
    confidence, right = [0.6, 0.7, 0.9, 0.95, 0.8], [1, 0, 1, 1, 0]
    logits, target = predictions(confidence, right)
    centres = [(b + 0.5) / 3 for b in range(3)]
    shares = []
    for c in confidence:
        row = [math.exp(-((c - centre) ** 2) / 0.05) for centre in centres]
        shares.append([value / sum(row) for value in row])
    total = 0.0
    for b in range(3):
        size = sum(row[b] for row in shares)
        accuracy = sum(row[b] * a for row, a in zip(shares, right, strict=True)) / size
        sure = sum(row[b] * c for row, c in zip(shares, confidence, strict=True)) / size
        total += size / 5 * (accuracy - sure) ** 2
    found = soft_binned_ece(logits, target, num_bins=3, temperature=0.05)
    assert found.item() == pytest.approx(math.sqrt(total), rel=1e-6)


# --- Modules ------------------------------------------------------------------------------------------------------


def test_modules_are_their_functions():
    logits, target = batch()
    cross_entropy = F.cross_entropy(logits, target)
    pairs = [
        (FLSD53Loss(), flsd53(logits, target)),
        (DualFocalLoss(3.0), dual_focal_loss(logits, target, 3.0)),
        (MMCELoss(0.5, bandwidth=0.2), cross_entropy + 0.5 * mmce(logits, target, bandwidth=0.2)),
        (MMCELoss(0.5, weighted=True), cross_entropy + 0.5 * weighted_mmce(logits, target)),
        (SoftBinnedECELoss(0.5, num_bins=9), cross_entropy + 0.5 * soft_binned_ece(logits, target, num_bins=9)),
    ]
    for module, expected in pairs:
        torch.testing.assert_close(module(logits, target), expected)
        assert not module.state_dict()


@pytest.mark.parametrize("module", [MMCELoss(), SoftBinnedECELoss()])
def test_regularized_losses_take_soft_and_mixed_labels(module):
    logits, target = batch()
    labels = MixedLabels(torch.stack([target, target.flip(0)]), torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(module(logits, labels), module(logits, labels.soft(4).double()))


@pytest.mark.parametrize("loss", [flsd53, dual_focal_loss, focal_loss, mmce, weighted_mmce, soft_binned_ece])
def test_half_precision_is_computed_in_float32(loss):
    logits, target = batch()
    half = logits.detach().bfloat16()
    value = loss(half, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half.float(), target))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DualFocalLoss(-1.0), "gamma must be at least 0"),
        (lambda: MMCELoss(-1.0), "strength must be at least 0"),
        (lambda: MMCELoss(bandwidth=0.0), "bandwidth must be above 0"),
        (lambda: SoftBinnedECELoss(num_bins=0), "num_bins must be an integer"),
        (lambda: SoftBinnedECELoss(temperature=0.0), "temperature must be above 0"),
        (lambda: SoftBinnedECELoss(p=0.5), "p must be at least 1"),
        (lambda: mmce(torch.zeros(2, 3), torch.zeros(2)), "target integer classes"),
        (lambda: flsd53(torch.zeros(2, 3), torch.zeros(3).long()), "target integer classes"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
