"""Isotonic calibration, one against the rest and all classes together."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from lightning_plugins.calibration.isotonic import IsotonicCalibration, _interpolate, _isotonic

pytestmark = pytest.mark.filterwarnings("ignore:.*raised the negative log-likelihood")


def sample(n: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return 2.5 * logits, labels


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_quadratic_programme(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(8, generator=generator).double()
    hits = torch.randint(2, (8,), generator=generator).double()
    order = scores.argsort()
    found = minimize(
        lambda values: ((values - hits[order].numpy()) ** 2).sum(),
        [0.5] * 8,
        constraints={"type": "ineq", "fun": lambda values: values[1:] - values[:-1]},
        options={"ftol": 1e-14},
    )
    knots, values = _isotonic(scores, hits)
    fitted = _interpolate(knots[None], values[None], scores[None]) if len(knots) > 1 else values[:1].expand(1, 8)
    assert fitted[0, order].tolist() == pytest.approx(found.x.tolist(), abs=1e-5)
    again = _isotonic(scores, fitted[0])
    assert torch.allclose(again[1][[0, -1]], values[[0, -1]])


def test_on_its_own_data_every_class_is_as_frequent_as_it_says():
    logits, labels = sample(500, 4)
    calibrator = IsotonicCalibration().fit(logits, labels)
    levels, _ = calibrator._levels(logits)
    assert levels.mean(0).tolist() == pytest.approx((labels.bincount() / 500).tolist())
    for k in range(4):
        for level in levels[:, k].unique():
            inside = (levels[:, k] - level).abs() < 1e-9
            assert (labels[inside] == k).double().mean().item() == pytest.approx(level.item(), abs=1e-9)
    assert torch.allclose(calibrator(logits).exp(), levels / levels.sum(1, keepdim=True), atol=1e-12)
    assert not calibrator.preserves_ranking


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_together_the_classes_keep_their_order(dtype):
    logits, labels = sample(300, 6)
    calibrator = IsotonicCalibration("multiclass").fit(logits, labels)
    assert calibrator.preserves_ranking
    assert calibrator.knots.shape[0] == 1
    fresh = (3 * torch.randn(5000, 6, generator=torch.Generator().manual_seed(1))).to(dtype)
    found = calibrator(fresh)
    assert torch.equal(found.argmax(1), fresh.argmax(1))
    assert (found.gather(1, fresh.argsort(1)).diff(dim=1) >= -1e-5).all()
    assert found.exp().sum(1).tolist() == pytest.approx([1] * 5000, abs=1e-5)


def test_together_it_is_one_regression_over_all_pairs():
    logits, labels = sample(40, 3)
    calibrator = IsotonicCalibration("multiclass").fit(logits, labels)
    levels, _ = calibrator._levels(logits)
    knots, values = _isotonic(logits.softmax(1).flatten(), torch.nn.functional.one_hot(labels, 3).double().flatten())
    expected = _interpolate(knots[None], values[None], logits.softmax(1).reshape(1, -1))
    assert torch.allclose(levels.flatten(), expected.flatten(), atol=1e-8)
    assert levels.sum().item() == pytest.approx(40, rel=1e-6)


def test_interpolation_between_and_outside_the_knots():
    knots, values = torch.tensor([[0.2, 0.6, 0.6]]).double(), torch.tensor([[0.0, 1.0, 1.0]]).double()
    points = torch.tensor([[0.0, 0.2, 0.3, 0.6, 1.0]]).double()
    assert _interpolate(knots, values, points)[0].tolist() == pytest.approx([0, 0, 0.25, 1, 1])


def test_a_class_without_samples_gets_the_smallest_probability():
    logits, labels = sample(50, 3)
    log_probs = IsotonicCalibration().fit(logits, labels.clamp_max(1))(logits)
    assert log_probs.isfinite().all()
    assert (log_probs[:, 2] < -80).all()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="one of one_vs_rest, multiclass, got 'ovr'"):
        IsotonicCalibration("ovr")
    with pytest.raises(ValueError, match="fitted on 3 classes, got logits of 4"):
        IsotonicCalibration().fit(*sample(40, 3))(torch.zeros(2, 4))
