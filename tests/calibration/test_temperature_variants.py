"""The Brier loss, the smoothing and the weights of temperature scaling, and the grid that others use."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from lightning_plugins.calibration import TemperatureScaling, ece, fit_temperature
from lightning_plugins.calibration.temperature import fit_temperature_by_ece, solve_temperature


def sample(n: int, num_classes: int, *, temperature: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return temperature * logits, labels


def brier(log_probs: Tensor, labels: Tensor) -> float:
    return (log_probs.exp() - F.one_hot(labels, log_probs.shape[1])).square().sum(1).mean().item()


@pytest.mark.parametrize(("n", "num_classes", "temperature"), [(300, 2, 0.3), (3000, 10, 2.5), (500, 100, 8.0)])
def test_brier_equals_a_slow_minimiser(n, num_classes, temperature):
    logits, labels = sample(n, num_classes, temperature=temperature)

    def loss(log_temperature: float) -> float:
        return brier((logits / math.exp(log_temperature)).log_softmax(1), labels)

    around = math.log(temperature)
    found = minimize_scalar(loss, bounds=(around - 1, around + 1), method="bounded", options={"xatol": 1e-9})
    fitted = fit_temperature(logits, labels, loss="brier")
    assert fitted == pytest.approx(math.exp(found.x), rel=1e-5)
    assert fitted != pytest.approx(fit_temperature(logits, labels), rel=1e-4)


def test_brier_has_a_closed_form_and_the_equivariance():
    logits = torch.tensor([[3.0, 0.0]]).repeat(10, 1)
    labels = torch.tensor([0] * 8 + [1] * 2)
    assert fit_temperature(logits, labels, loss="brier") == pytest.approx(3 / math.log(4), rel=1e-8)
    logits, labels = sample(2000, 5)
    assert fit_temperature(3.3 * logits, labels, loss="brier") == pytest.approx(
        3.3 * fit_temperature(logits, labels, loss="brier"), rel=1e-6
    )


def test_brier_recovers_and_a_second_fit_gives_one():
    logits, labels = sample(20_000, 10, temperature=2.5)
    calibrator = TemperatureScaling(loss="brier").fit(logits.bfloat16(), labels)
    assert calibrator.temperature == pytest.approx(2.5, rel=0.02)
    assert calibrator.fit_info["converged"] is True
    assert calibrator.fit_info["gradient"] < 1e-10
    calibrator.fit(logits, labels)
    assert fit_temperature(calibrator(logits), labels, loss="brier") == pytest.approx(1, rel=1e-7)


def test_brier_at_its_bounds():
    with pytest.warns(UserWarning, match="bound 0.001, because the Brier score.*more held-out data"):
        assert fit_temperature(20 * torch.eye(3) - 5, torch.arange(3), loss="brier") == pytest.approx(1e-3)
    with pytest.warns(UserWarning, match="bound 1000.*all but uniform"):
        assert fit_temperature(torch.tensor([[2.0, -1.0]]), torch.tensor([1]), loss="brier") == pytest.approx(1e3)
    assert fit_temperature(torch.full((4, 2), -3.0), torch.tensor([0, 1, 1, 0]), loss="brier") == 1


def test_smoothing_mixes_in_one_uniform_sample():
    logits, labels = sample(99, 4, temperature=2.0)
    plain, smooth = TemperatureScaling().fit(logits, labels), TemperatureScaling(smooth=True)
    assert torch.allclose(smooth(logits), logits.log_softmax(1))
    smooth.fit(logits, labels)
    assert torch.allclose(smooth(logits).exp(), 0.99 * plain(logits).exp() + 0.01 / 4)
    loaded = TemperatureScaling(smooth=True)
    loaded.load_state_dict(smooth.state_dict())
    assert torch.equal(loaded(logits), smooth(logits))


@pytest.mark.filterwarnings("ignore:.*raised the negative log-likelihood")
def test_smoothing_bounds_the_loss_of_a_separable_fit():
    calibrator = TemperatureScaling(smooth=True)
    with pytest.warns(UserWarning, match="bound 0.001"):
        calibrator.fit(20 * torch.eye(3) - 5, torch.arange(3))
    wrong = -calibrator(torch.tensor([[9.0, 0.0, 0.0]]))[0, 1]
    assert wrong.item() == pytest.approx(math.log(3 * 4), rel=1e-6)


@pytest.mark.parametrize("n", [200, 9000])
def test_weights_count_like_repeated_samples(n):
    logits, labels = sample(n, 40, temperature=2.0)
    counts = torch.randint(1, 4, (n,), generator=torch.Generator().manual_seed(1))
    repeated = fit_temperature(logits.repeat_interleave(counts, 0), labels.repeat_interleave(counts))
    assert solve_temperature(logits, labels, weights=counts.double()).temperature == pytest.approx(repeated, rel=1e-7)


def test_the_grid_gives_the_least_error_on_its_own_data():
    logits, labels = sample(2000, 5, temperature=2.0)
    grid = [0.5, 1.0, 1.9, 2.0, 2.1, 4.0]
    errors = [ece((logits / t).softmax(1), labels).item() for t in grid]
    assert fit_temperature_by_ece(logits, labels, temperatures=grid) == grid[errors.index(min(errors))]
    assert 1.5 < fit_temperature_by_ece(logits, labels) < 2.7


def test_wrong_arguments_are_refused():
    for use in (lambda: TemperatureScaling(loss="ece"), lambda: fit_temperature(*sample(5, 2), loss="ece")):
        with pytest.raises(ValueError, match="one of nll, brier, got 'ece'"):
            use()
    for grid in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="at least one, positive and finite"):
            fit_temperature_by_ece(*sample(5, 2), temperatures=grid)
