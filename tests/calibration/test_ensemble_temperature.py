"""Ensemble temperature scaling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.calibration import TemperatureScaling
from lightning_plugins.calibration.ensemble_temperature import (
    EnsembleTemperatureScaling,
    _likelihood_weights,
    _simplex_minimum,
)


def sample(n: int, num_classes: int, seed: int = 0, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    probs = (1 - noise) * (logits / 2).softmax(1) + noise / num_classes
    return logits, torch.multinomial(probs, 1, generator=generator).squeeze(1)


def em(probs: Tensor, steps: int) -> Tensor:
    weights = torch.tensor([0.98, 0.01, 0.01], dtype=torch.float64)
    for _ in range(steps):
        weights = weights * (probs / (probs @ weights)[:, None]).mean(0)
    return weights


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_those_of_a_long_em_iteration(seed):
    probs = torch.rand(300, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** (1 + seed)
    weights, steps, gap = _likelihood_weights(probs)
    expected = em(probs, 20_000)
    assert (probs @ weights).log().mean() >= (probs @ expected).log().mean() - 1e-9
    assert weights.tolist() == pytest.approx(expected.tolist(), abs=2e-3)
    assert gap <= 1e-9
    assert steps < 50
    assert (weights >= 0).all()


@pytest.mark.parametrize("vertex", range(3))
def test_weights_at_a_vertex_and_of_equal_parts(vertex):
    probs = torch.full((20, 3), 0.3, dtype=torch.float64)
    probs[:, vertex] = 0.6
    weights, _, _ = _likelihood_weights(probs)
    assert weights[vertex] == pytest.approx(1, abs=1e-7)
    assert _likelihood_weights(torch.full((20, 3), 0.3, dtype=torch.float64))[2] == 0


@pytest.mark.parametrize("seed", range(5))
def test_brier_weights_are_the_least_on_a_grid(seed):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    products, hits = parts.T @ parts, torch.randn(3, generator=generator, dtype=torch.float64)

    def value(weights: Tensor) -> Tensor:
        return ((weights @ products) * weights).sum(-1) - 2 * weights @ hits

    steps = torch.arange(0, 101, dtype=torch.float64) / 100
    grid = torch.cartesian_prod(steps, steps)
    grid = grid[grid.sum(1) <= 1]
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    found = _simplex_minimum(products, hits)
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1)
    assert value(found) <= value(grid).min() + 1e-12
    assert (found - grid[value(grid).argmin()]).abs().max() < 0.05


@pytest.mark.parametrize("loss", ["nll", "brier"])
def test_finds_the_noise_and_beats_the_temperature(loss):
    logits, labels = sample(20_000, 8)
    ensemble = EnsembleTemperatureScaling(loss=loss).fit(logits, labels)
    plain = TemperatureScaling(loss=loss).fit(logits, labels)
    assert ensemble.temperature == plain.temperature
    quantities = ensemble.quantities()
    assert list(quantities) == ["temperature", "weight_tempered", "weight_plain", "weight_uniform"]
    assert sum(list(quantities.values())[1:]) == pytest.approx(1, abs=1e-12)
    assert ensemble.fit_info["converged"] is True
    onehot = F.one_hot(labels, 8)
    scores = {
        "nll": lambda p: F.nll_loss(p.log(), labels),
        "brier": lambda p: (p - onehot).square().sum(1).mean(),
    }
    assert scores[loss](ensemble(logits).exp()) < scores[loss](plain(logits).exp()) - 1e-5


def test_is_the_mixture_it_says_and_reduces_to_the_temperature():
    logits, labels = sample(500, 5)
    calibrator = EnsembleTemperatureScaling().fit(logits, labels)
    w = calibrator.weights
    expected = w[0] * (logits / calibrator.temperature).softmax(1) + w[1] * logits.softmax(1) + w[2] / 5
    assert torch.allclose(calibrator(logits).exp(), expected, atol=1e-12)
    calibrator.weights = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(calibrator(logits), TemperatureScaling().fit(logits, labels)(logits))
    assert torch.allclose(EnsembleTemperatureScaling()(logits), logits.log_softmax(1))


@pytest.mark.filterwarnings("ignore:.*temperature stopped at its bound")
def test_large_logits_do_not_overflow():
    logits, labels = sample(500, 5)
    log_probs = EnsembleTemperatureScaling().fit((1e3 * logits).float(), labels)((1e3 * logits).float())
    assert log_probs.isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_classes_is_kept_for_any_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    calibrator = EnsembleTemperatureScaling()
    calibrator.weights = torch.rand(3, generator=generator, dtype=torch.float64).softmax(0)
    calibrator.scaling.log_temperature = torch.randn((), generator=generator, dtype=torch.float64)
    logits = torch.randn(1000, 7, generator=generator, dtype=torch.float64)
    assert calibrator.preserves_ranking
    assert torch.equal(calibrator(logits).argsort(1), logits.argsort(1))


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="one of nll, brier, got 'ece'"):
        EnsembleTemperatureScaling(loss="ece")
