"""Spline calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from lightning_plugins.calibration import ece
from lightning_plugins.calibration.spline import SplineCalibration, _corrections

pytestmark = pytest.mark.filterwarnings("ignore:.*raised the negative log-likelihood")


def sample(n: int, num_classes: int, seed: int = 0, factor: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return factor * logits, labels


def test_a_spline_in_its_own_space_is_removed_exactly():
    n = 400
    spline = CubicSpline(np.linspace(0, 1, 6), [0, 0.02, -0.01, 0.03, 0.01, -0.02], bc_type="natural")
    rise = torch.from_numpy(n * np.diff(spline(np.linspace(0, 1, n + 1))))
    assert torch.allclose(_corrections(rise, 6), rise, atol=1e-10)
    middle = torch.from_numpy(spline(np.linspace(0, 1, n + 1)[:-1] + 0.5 / n, 1))
    assert torch.allclose(_corrections(rise, 6), middle, atol=1e-4)  # it is the derivative
    assert _corrections(torch.zeros(n, dtype=torch.float64), 6).abs().max() == 0


def test_the_largest_drift_is_that_of_the_spline_s_residual():
    logits, labels = sample(3000, 4)
    calibrator = SplineCalibration().fit(logits, labels)
    confidence, predicted = logits.softmax(1).max(1)
    confidence, order = confidence.sort()
    right = (predicted == labels).double()[order]
    inside = (calibrator.corrected > 0) & (calibrator.corrected < 1)
    assert inside.all()
    before = (right - confidence).cumsum(0) / 3000
    after = (right - calibrator.corrected).cumsum(0) / 3000
    residual = before - _corrections(right - confidence, 6).cumsum(0) / 3000
    assert torch.allclose(after, residual, atol=1e-12)
    assert after.abs().max() < 0.2 * before.abs().max()


def test_calibrates_the_confidence_and_keeps_the_predictions():
    logits, labels = sample(20_000, 5)
    calibrator = SplineCalibration().fit(logits[:10_000], labels[:10_000])
    rest, rest_labels = logits[10_000:], labels[10_000:]
    found = calibrator(rest)
    assert ece(found.exp(), rest_labels) < 0.25 * ece(rest.softmax(1), rest_labels)
    assert torch.equal(found.argmax(1), rest.argmax(1))
    assert (found.gather(1, rest.argsort(1)).diff(dim=1) >= -1e-9).all()
    assert found.exp().sum(1).tolist() == pytest.approx([1] * 10_000, abs=1e-9)
    assert 0 <= calibrator.fit_info["guarded"] < 0.5


def test_equal_confidences_share_their_correction():
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(10, 1)
    calibrator = SplineCalibration().fit(logits, torch.tensor([0] * 6 + [1] * 4))
    assert len(calibrator.corrected) == 1
    assert calibrator(logits)[:, 0].exp().tolist() == pytest.approx([0.6] * 10, abs=1e-6)


def test_outside_the_held_out_range_the_map_is_constant():
    logits, labels = sample(500, 3)
    calibrator = SplineCalibration().fit(logits.clamp(-2, 2), labels)
    far = calibrator(torch.tensor([[50.0, 0.0, 0.0]], dtype=torch.float64))
    assert far[0, 0].exp().item() == pytest.approx(calibrator.corrected[-1].item(), abs=1e-9)


def test_too_few_knots_are_refused():
    with pytest.raises(ValueError, match="num_knots must be at least 3, got 2"):
        SplineCalibration(2)
