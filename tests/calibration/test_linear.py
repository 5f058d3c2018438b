"""Vector, matrix and Dirichlet scaling."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.calibration import fit_temperature
from lightning_plugins.calibration.linear import DirichletCalibration, MatrixScaling, VectorScaling, _fit_matrix


def sample(n: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels drawn from a map of them that is neither diagonal nor free of a bias."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    truth = 0.5 * logits + 0.3 * logits.roll(1, 1) + torch.linspace(-1, 1, num_classes, dtype=torch.float64)
    return logits, torch.multinomial(truth.softmax(1), 1, generator=generator).squeeze(1)


def test_vector_scaling_has_no_slope_and_recovers_its_parameters():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(60_000, 4, generator=generator, dtype=torch.float64)
    scale, shift = torch.tensor([0.5, 1.0, 1.5, 0.8]).double(), torch.tensor([1.0, -1.0, 0.5, -0.5]).double()
    labels = torch.multinomial((scale * logits + shift).softmax(1), 1, generator=generator).squeeze(1)
    calibrator = VectorScaling().fit(logits, labels)
    assert calibrator.scale.tolist() == pytest.approx(scale.tolist(), abs=0.03)
    assert (calibrator.shift - calibrator.shift.mean()).tolist() == pytest.approx(shift.tolist(), abs=0.05)
    parameters = torch.stack([calibrator.scale, calibrator.shift]).requires_grad_()
    loss = F.cross_entropy(parameters[0] * logits + parameters[1], labels)
    assert torch.autograd.grad(loss, parameters)[0].abs().max() < 1e-5
    assert calibrator.fit_info["converged"] is True
    assert calibrator.fit_info["nll_after"] == pytest.approx(loss.item(), rel=1e-9)


def test_vector_scaling_without_bias_is_at_least_as_good_as_a_temperature():
    logits, labels = sample(2000, 5)
    calibrator = VectorScaling(bias=False).fit(logits, labels)
    assert calibrator.shift.abs().max() == 0
    assert calibrator.fit_info["nll_after"] <= F.cross_entropy(logits / fit_temperature(logits, labels), labels)
    assert VectorScaling().fit(logits, labels).fit_info["nll_after"] < calibrator.fit_info["nll_after"]
    assert set(calibrator.quantities()) == {"scale_min", "scale_mean", "scale_max"}


@pytest.mark.parametrize("kind", [MatrixScaling, DirichletCalibration])
def test_the_penalised_loss_has_no_slope(kind):
    logits, labels = sample(1500, 5)
    features = logits.log_softmax(1) if kind is DirichletCalibration else logits
    parameters, _, converged = _fit_matrix(features, labels, 0.7, 0.2, 500, tolerance=1e-7)
    assert converged
    parameters = parameters.requires_grad_()
    weight, shift = parameters[:-1], parameters[-1]
    penalty = 0.7 / 20 * (weight.square().sum() - weight.diagonal().square().sum()) + 0.2 / 5 * shift.square().sum()
    loss = F.cross_entropy(features @ weight + shift, labels) + penalty
    assert torch.autograd.grad(loss, parameters)[0].abs().max() < 1e-6
    fitted = kind(cross_validate=False, off_diagonal_penalty=0.7, bias_penalty=0.2).fit(logits, labels)
    assert fitted.weight.shape == (1, 5, 5)
    expected = (features @ weight + shift).log_softmax(1)
    assert torch.allclose(fitted(logits), expected, atol=0.02)


def test_heavy_penalties_leave_a_diagonal():
    logits, labels = sample(1500, 5)
    calibrator = MatrixScaling(off_diagonal_penalty=1e8, bias_penalty=1e8).fit(logits, labels)
    diagonal = VectorScaling(bias=False).fit(logits, labels)
    assert calibrator.fit_info["converged"] is True
    off = calibrator.weight[0] - calibrator.weight[0].diagonal().diag()
    assert off.abs().max() < 1e-6
    assert calibrator.shift.abs().max() < 1e-6
    assert calibrator.weight[0].diagonal().tolist() == pytest.approx(diagonal.scale.tolist(), abs=2e-3)


def test_dirichlet_recovers_the_map_up_to_what_a_softmax_ignores():
    generator = torch.Generator().manual_seed(0)
    log_probs = (2 * torch.randn(80_000, 3, generator=generator, dtype=torch.float64)).log_softmax(1)
    weight = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.5, -0.2], [0.3, 0.0, 1.0]]).double()
    shift = torch.tensor([0.5, -0.5, 0.0]).double()
    labels = torch.multinomial((log_probs @ weight.T + shift).softmax(1), 1, generator=generator).squeeze(1)
    calibrator = DirichletCalibration(cross_validate=False, off_diagonal_penalty=0, bias_penalty=0)
    calibrator.fit(log_probs + 3, labels)  # it takes logits of any offset
    assert torch.allclose(calibrator.weight[0] - calibrator.weight[0].mean(0), weight - weight.mean(0), atol=0.04)
    assert torch.allclose(calibrator.shift[0] - calibrator.shift[0].mean(), shift - shift.mean(), atol=0.06)


@pytest.mark.parametrize(
    "calibrator",
    [
        VectorScaling(max_iterations=0),
        MatrixScaling(max_iterations=0),
        DirichletCalibration(max_iterations=0),
        VectorScaling(),
        DirichletCalibration(),
    ],
)
def test_the_start_is_the_identity(calibrator):
    logits, labels = sample(50, 4)
    if calibrator.max_iterations == 0:
        calibrator.fit(logits, labels)
    assert torch.allclose(calibrator(logits), logits.log_softmax(1), atol=1e-12)


def test_cross_validation_takes_the_least_held_out_loss_and_averages_the_folds():
    logits, labels = sample(120, 6)
    calibrator = DirichletCalibration(off_diagonal_grid=[1e-3, 1, 1e3], bias_grid=[1e-3, 1]).fit(logits, labels)
    info = calibrator.fit_info
    assert calibrator.weight.shape == (5, 6, 6)
    single = [
        DirichletCalibration(off_diagonal_grid=[off], bias_grid=[bias]).fit(logits, labels).fit_info
        for off in (1e-3, 1, 1e3)
        for bias in (1e-3, 1)
    ]
    least = min(single, key=lambda other: other["nll_cross_validated"])
    assert info["nll_cross_validated"] == pytest.approx(least["nll_cross_validated"], rel=1e-3)
    assert (info["off_diagonal_penalty"], info["bias_penalty"]) == (
        least["off_diagonal_penalty"],
        least["bias_penalty"],
    )
    log_probs = logits.log_softmax(1)
    maps = [(log_probs @ w.T + b).softmax(1) for w, b in zip(calibrator.weight, calibrator.shift, strict=True)]
    assert torch.allclose(calibrator(logits).exp(), torch.stack(maps).mean(0), atol=1e-12)
    assert set(calibrator.quantities()) == {"diagonal_mean", "off_diagonal_rms"}


def test_cross_validation_is_deterministic_and_leaves_the_global_generator():
    logits, labels = sample(60, 3)
    state = torch.get_rng_state()
    arguments = {"off_diagonal_grid": (1.0,), "bias_grid": (1.0,)}
    first, second = (DirichletCalibration(**arguments).fit(logits, labels) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.weight, DirichletCalibration(seed=1, **arguments).fit(logits, labels).weight)


def test_separable_data_are_reported():
    logits, labels = sample(30, 10)
    with pytest.warns(UserWarning, match="stopped before it converged, after"):
        MatrixScaling(off_diagonal_penalty=0, bias_penalty=0, max_iterations=10).fit(logits, labels)


@pytest.mark.parametrize(
    ("build", "remedy"),
    [
        (lambda: VectorScaling(max_iterations=-1), "max_iterations must be at least 0, got -1"),
        (lambda: MatrixScaling(off_diagonal_penalty=-1.0), "off_diagonal_penalty must be finite and at least 0"),
        (lambda: MatrixScaling(bias_penalty=math.nan), "bias_penalty must be finite and at least 0"),
        (lambda: DirichletCalibration(off_diagonal_grid=()), r"off_diagonal_grid must be finite.*got \[\]"),
        (lambda: DirichletCalibration(bias_grid=[1.0, math.inf]), "bias_grid must be finite"),
        (lambda: DirichletCalibration(num_folds=1), "num_folds must be at least 2"),
        (lambda: DirichletCalibration().fit(*sample(4, 3)), "at least as many samples, got 4.*cross_validate=False"),
        (lambda: VectorScaling().fit(*sample(40, 3))(torch.zeros(2, 4)), "fitted on 3 classes, got logits of 4"),
        (lambda: MatrixScaling().fit(*sample(40, 3))(torch.zeros(2, 4)), "fitted on 3 classes, got logits of 4"),
    ],
)
def test_wrong_arguments_are_refused(build, remedy):
    with pytest.raises(ValueError, match=remedy):
        build()
