"""Temperature scaling under a change of class proportions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.calibration import TemperatureScaling, fit_temperature
from lightning_plugins.calibration.label_shift import PriorCorrectedTemperature


def sample(n: int, prior: list[float], factor: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian classes whose exact log-posteriors under a long-tailed prior are the logits."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(prior), n, replacement=True, generator=generator)
    inputs = F.one_hot(labels, 3) * 1.5 + torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return factor * (1.5 * inputs + torch.tensor([0.7, 0.2, 0.1]).double().log()), labels


def test_recovers_the_balanced_posterior():
    logits, labels = sample(30_000, [0.7, 0.2, 0.1])
    calibrator = PriorCorrectedTemperature().fit(logits, labels)
    assert calibrator.temperature == pytest.approx(1, abs=0.03)
    balanced, balanced_labels = sample(30_000, [1.0, 1.0, 1.0], seed=1)
    corrected = F.nll_loss(calibrator(balanced), balanced_labels)
    plain = F.nll_loss(TemperatureScaling().fit(logits, labels)(balanced), balanced_labels)
    best = F.cross_entropy(balanced - torch.tensor([0.7, 0.2, 0.1]).double().log(), balanced_labels)
    assert corrected < plain - 0.05
    assert corrected == pytest.approx(best.item(), abs=2e-3)
    # Weighted held-out loss is an estimate of the loss to come.
    assert calibrator.fit_info["nll_after"] == pytest.approx(corrected.item(), abs=0.02)
    assert calibrator.fit_info["nll_after"] < calibrator.fit_info["nll_before"]


def test_the_temperature_has_no_slope_in_the_weighted_loss():
    logits, labels = sample(800, [0.7, 0.2, 0.1], factor=3.0)
    calibrator = PriorCorrectedTemperature([0.2, 0.3, 0.5]).fit(logits, labels)
    beta = torch.tensor(1 / calibrator.temperature, dtype=torch.float64, requires_grad=True)
    ratio = calibrator.log_ratio.exp()
    counts = labels.bincount().double() + 1
    assert torch.allclose(ratio, torch.tensor([0.2, 0.3, 0.5]).double() / (counts / counts.sum()))
    loss = F.cross_entropy((logits + ratio.log()) * beta, labels, weight=ratio)
    assert abs(torch.autograd.grad(loss, beta)[0].item()) < 1e-7
    assert calibrator.fit_info["nll_after"] == pytest.approx(loss.item(), rel=1e-9)
    before = F.cross_entropy(logits, labels, weight=ratio).item()
    assert calibrator.fit_info["nll_before"] == pytest.approx(before, rel=1e-9)
    assert set(calibrator.quantities()) == {"temperature", "prior_ratio_max"}


def test_without_a_shift_it_is_a_temperature():
    logits, labels = sample(90, [1.0, 1.0, 1.0], factor=2.0)
    counts = (labels.bincount() + 1).tolist()
    calibrator = PriorCorrectedTemperature(counts).fit(logits, labels)
    assert calibrator.log_ratio.abs().max() < 1e-12
    assert calibrator.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*raised the negative log-likelihood")
def test_a_class_without_samples_stays_finite():
    logits, labels = sample(200, [0.7, 0.2, 0.1])
    assert PriorCorrectedTemperature().fit(logits, labels.clamp_max(1))(logits).isfinite().all()


def test_wrong_arguments_are_refused():
    for prior in ([0.5, 0.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="target_prior must be positive and finite"):
            PriorCorrectedTemperature(prior)
    with pytest.raises(ValueError, match="target_prior has 2 classes, the logits have 3"):
        PriorCorrectedTemperature([0.5, 0.5]).fit(*sample(20, [1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="fitted on 3 classes, got logits of 4"):
        PriorCorrectedTemperature().fit(*sample(40, [1.0, 1.0, 1.0]))(torch.zeros(2, 4))
