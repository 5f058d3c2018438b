from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import levy_stable, norm

from lightning_plugins.robustness.disparity import (
    accuracy_disparity,
    gap_of_disparity,
    gap_of_standard_accuracy,
    gaussian_class_errors,
    robust_optimal_classifier,
    stable_class_errors,
)

SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_problem(d: int = 5, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean and a full covariance."""
    g = generator(seed)
    root = torch.randn(d, d, generator=g, dtype=torch.float64)
    return 2 * torch.randn(d, generator=g, dtype=torch.float64), root @ root.T / d + 0.2 * torch.eye(d).double()


def measured_errors(weight, bias, mean, noise, eps, p):
    """Attack every sample of both classes as well as a linear classifier can be attacked."""
    unit = weight.sign() if p == math.inf else weight / weight.norm()
    inputs = SIGNS[:, None, None] * mean + noise
    attacked = inputs - SIGNS[:, None, None] * eps * unit
    return (SIGNS[:, None] * (attacked @ weight + bias) < 0).double().mean(1)


def assert_within_4_sd(measured, errors, n):
    assert ((measured - errors).abs() <= 4 * (errors * (1 - errors) / n).sqrt() + 1e-12).all(), (measured, errors)


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("form", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_gaussian_errors_against_samples(p, form, eps):
    mean, covariance = a_problem()
    covariance, matrix = {
        "isotropic": (1.3, 1.3 * torch.eye(5).double()),
        "diagonal": (covariance.diagonal(), covariance.diagonal().diag()),
        "full": (covariance, covariance),
    }[form]
    g, n = generator(1), 50_000
    weight, bias = torch.randn(5, generator=g, dtype=torch.float64) + mean, 0.4
    noise = torch.randn(2, n, 5, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(matrix).T
    errors = gaussian_class_errors(weight, bias, mean, covariance, eps=eps, p=p)
    assert_within_4_sd(measured_errors(weight, bias, mean, noise, eps, p), errors, n)


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_stable_errors_against_samples(alpha, p):
    n, d, scale, eps = 20_000, 3, 0.7, 0.3
    # alpha-stable numbers by the method of Chambers, Mallows and Stuck
    g = generator(2)
    angle = math.pi * (torch.rand(2, n, d, generator=g, dtype=torch.float64) - 0.5)
    wait = torch.empty(2, n, d, dtype=torch.float64).exponential_(generator=g)
    noise = (alpha * angle).sin() / angle.cos() ** (1 / alpha)
    noise = scale * noise * (((1 - alpha) * angle).cos() / wait) ** ((1 - alpha) / alpha)
    weight, mean = torch.tensor([1.0, -0.5, 0.2]).double(), torch.tensor([1.5, -0.3, 0.4]).double()
    errors = stable_class_errors(weight, 0.3, mean, alpha, scale=scale, eps=eps, p=p)
    assert_within_4_sd(measured_errors(weight, 0.3, mean, noise, eps, p), errors, n)


def test_stable_errors_at_their_closed_ends():
    weight, mean = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    gaussian = gaussian_class_errors(weight, 0.2, mean, 2 * 0.8**2, eps=0.1)
    torch.testing.assert_close(stable_class_errors(weight, 0.2, mean, 2.0, scale=0.8, eps=0.1), gaussian)
    reach = (weight * mean).sum() - 0.1 * 3
    by_scipy = [levy_stable.cdf(-float(reach + s * 0.2) / (0.8 * 3), 1.0, 0.0) for s in (1, -1)]
    cauchy = stable_class_errors(weight, 0.2, mean, 1.0, scale=0.8, eps=0.1)
    assert cauchy.tolist() == pytest.approx(by_scipy, abs=1e-8)
    far = stable_class_errors(torch.tensor([1.0]), 0.0, torch.tensor([1e12], dtype=torch.float64), 1.0)
    assert far[0].item() == pytest.approx(1e-12 / math.pi, rel=1e-9)  # 1 / 2 - atan would give 0
    batch = stable_class_errors(weight.expand(3, 2), torch.tensor([0.0, 0.1, 0.2]), mean, 1.5, scale=0.8, eps=0.1)
    assert batch.shape == (3, 2)
    assert batch.dtype == torch.float64


def test_the_example_of_two_isotropic_classes():
    # |mean| and sd that give the natural errors at eps=0 and the robust ones at eps=0.2
    mean, sd, expected = torch.tensor([1.81, 0.0]), 1.1, {0.0: (0.172, 0.172, 0.0095), 0.2: (0.195, 0.249, 0.0122)}
    expected[0.4] = (0.228, 0.351, 0.0146)
    for eps, (natural_minority, robust_minority, robust_majority) in expected.items():
        net = robust_optimal_classifier(mean, sd**2, eps=eps, ratio=10.0, p=2)
        assert net.natural_errors[1].item() == pytest.approx(natural_minority, abs=1e-3)
        assert net.robust_errors[1].item() == pytest.approx(robust_minority, abs=1e-3)
        assert net.robust_errors[0].item() == pytest.approx(robust_majority, abs=1e-4)
        # natural error = Phi(-(|mu| / sd + s sd l / (2 (|mu| - eps)))), the pure effect of imbalance
        log_odds = math.log(10)
        for index, sign in enumerate((1, -1)):
            closed = norm.cdf(-(1.81 / sd + sign * sd * log_odds / (2 * (1.81 - eps))))
            assert net.natural_errors[index].item() == pytest.approx(closed, abs=1e-6)
    equal = robust_optimal_classifier(mean, sd**2, eps=0.4, p=2)
    assert accuracy_disparity(1 - equal.natural_errors) == accuracy_disparity(1 - equal.robust_errors) == 0


PATHS = [(p, form) for p in (2, math.inf) for form in ("isotropic", "diagonal", "full")]


def on_path(p, form, *, seed=0):
    mean, covariance = a_problem(4, seed=seed)
    covariance = {"isotropic": torch.tensor(1.3), "diagonal": covariance.diagonal(), "full": covariance}[form]
    return mean, covariance, 0.4 * torch.linalg.vector_norm(mean, p).item()


@pytest.mark.parametrize(("p", "form"), PATHS)
def test_the_closed_errors_are_those_of_the_classifier(p, form):
    mean, covariance, eps = on_path(p, form)
    net = robust_optimal_classifier(mean, covariance, eps=eps, ratio=5.0, p=p)
    again = gaussian_class_errors(net.weight, net.bias, mean, covariance, eps=eps, p=p)
    torch.testing.assert_close(net.robust_errors, again, rtol=1e-9, atol=1e-12)
    assert torch.linalg.vector_norm(net.shift, p) <= eps * (1 + 1e-9)
    # natural errors in closed form: Phi(-(margin^2 + eps |w|_q + s l / 2) / margin)
    dual = 1 if p == math.inf else 2
    reach = net.margin**2 + eps * torch.linalg.vector_norm(net.weight, dual)
    closed = torch.special.ndtr(-(reach + SIGNS * math.log(5) / 2) / net.margin)
    torch.testing.assert_close(net.natural_errors, closed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("p", "form"), PATHS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_linear_classifier_has_less_robust_error(p, form, seed):
    mean, covariance, eps = on_path(p, form, seed=seed)
    net = robust_optimal_classifier(mean, covariance, eps=eps, ratio=5.0, p=p)
    priors = torch.tensor([5 / 6, 1 / 6], dtype=torch.float64)

    def robust_error(parameters):
        weight, bias = torch.from_numpy(parameters[:-1]), float(parameters[-1])
        return float(gaussian_class_errors(weight, bias, mean, covariance, eps=eps, p=p) @ priors)

    optimum = np.append(net.weight.numpy(), net.bias.item())
    best = robust_error(optimum)
    for start in (optimum * 1.2 + 0.05, optimum + np.random.default_rng(0).normal(size=5)):
        found = minimize(robust_error, start, method="Nelder-Mead", options={"maxiter": 300, "fatol": 1e-12}).fun
        assert found >= best - 1e-9
    assert found <= best + 0.03


@pytest.mark.parametrize("p", [2, math.inf])
def test_the_solvers_give_the_closed_forms(p):
    mean, variances = a_problem(6)[0], torch.rand(6, generator=generator(3), dtype=torch.float64) + 0.5
    isotropic = p == 2
    simple = torch.tensor(0.7) if isotropic else variances
    matrix = 0.7 * torch.eye(6).double() if isotropic else variances.diag()
    for eps in (0.0, 0.1, 0.9):
        closed = robust_optimal_classifier(mean, simple, eps=eps, ratio=3.0, p=p)
        solved = robust_optimal_classifier(mean, matrix, eps=eps, ratio=3.0, p=p)
        for name in ("weight", "shift", "margin", "natural_errors", "robust_errors"):
            torch.testing.assert_close(getattr(solved, name), getattr(closed, name), rtol=1e-6, atol=1e-7)


def test_at_budget_0_it_is_the_discriminant_of_fisher():
    mean, covariance = a_problem()
    for p in (2, math.inf):
        net = robust_optimal_classifier(mean, covariance, ratio=4.0, p=p)
        torch.testing.assert_close(net.weight, torch.linalg.solve(covariance, mean))
        torch.testing.assert_close(net.natural_errors, net.robust_errors)


def test_more_budget_never_helps_the_minority_nor_narrows_the_gap():
    g = generator(4)
    mean = torch.randn(2000, 1, 8, generator=g, dtype=torch.float64)
    variances = torch.rand(2000, 1, 8, generator=g, dtype=torch.float64) * 1.9 + 0.1
    eps = torch.linspace(0, 0.4, 9).double()
    # The supremum norm of a mean may be too small for the budget: those that are, are shifted onto each other.
    possible = mean.abs().amax(-1) > 0.45
    mean, variances = mean[possible[:, 0]], variances[possible[:, 0]]
    assert len(mean) > 1900
    net = robust_optimal_classifier(mean, variances, eps=eps, ratio=10.0)
    assert net.natural_errors.shape == (len(mean), 9, 2)
    minority, disparity = net.natural_errors[..., 1], accuracy_disparity(1 - net.natural_errors)
    counts = (net.margin >= 0.2)[:, 1:]
    assert counts.sum() > 10_000
    assert (minority.diff(dim=1)[counts] >= -1e-9).all()
    assert (disparity.diff(dim=1)[counts] >= -1e-9).all()


def test_many_problems_are_those_one_by_one():
    mean, covariance = a_problem()
    eps = torch.tensor([0.0, 0.2, 0.5])
    for p, value in ((2, covariance), (math.inf, covariance), (2, covariance.diagonal()), (math.inf, 0.5)):
        many = robust_optimal_classifier(mean, value, eps=eps, ratio=2.0, p=p)
        for index, one in enumerate(eps.tolist()):
            single = robust_optimal_classifier(mean, value, eps=one, ratio=2.0, p=p)
            torch.testing.assert_close(many.weight[index], single.weight)
            torch.testing.assert_close(many.robust_errors[index], single.robust_errors)
    stacked = robust_optimal_classifier(mean.float().expand(2, 5), covariance.expand(2, 5, 5), eps=0.2)
    assert stacked.weight.shape == (2, 5)
    assert stacked.weight.dtype == torch.float64


def test_disparities():
    adversarial, standard = torch.tensor([0.8, 0.5]), torch.tensor([0.9, 0.8])
    assert accuracy_disparity(adversarial).item() == pytest.approx(0.3)
    assert gap_of_disparity(adversarial, standard).item() == pytest.approx(0.2)
    assert gap_of_standard_accuracy(adversarial, standard).item() == pytest.approx(0.2)
    assert gap_of_standard_accuracy(adversarial, standard, ratio=10.0).item() == pytest.approx(1.3 / 11)


MEAN = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robust_optimal_classifier(MEAN, eps=1.0), "eps must be below the norm of the mean, got 1 .* is 1:"),
        (lambda: robust_optimal_classifier(MEAN, eps=1.5, p=2), "could be moved onto each other"),
        (lambda: robust_optimal_classifier(MEAN, p=1), "p must be 2 or infinite, got 1"),
        (lambda: robust_optimal_classifier(MEAN, ratio=0.0), "ratio must be above 0"),
        (lambda: robust_optimal_classifier(MEAN, eps=-0.1), "eps must be at least 0"),
        (lambda: robust_optimal_classifier(MEAN, 0.0), "positive definite; add a small multiple"),
        (lambda: robust_optimal_classifier(MEAN, torch.ones(2, 2)), "positive definite"),
        (lambda: robust_optimal_classifier(MEAN, torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: robust_optimal_classifier(MEAN, torch.ones(3)), "covariance must be one variance, 2 variances"),
        (lambda: robust_optimal_classifier(torch.tensor([1, 2])), "floating-point"),
        (lambda: gaussian_class_errors(torch.zeros(2), 0.0, MEAN), "weight must not be 0"),
        (lambda: gaussian_class_errors(MEAN, 0.0, MEAN, p=0.5), "p must be at least 1"),
        (lambda: gaussian_class_errors(MEAN, 0.0, MEAN, eps=math.nan), "eps .*must be .*a number, got"),
        (lambda: stable_class_errors(MEAN, 0.0, MEAN, 2.5), r"alpha must lie in \(0, 2\]"),
        (lambda: stable_class_errors(MEAN, 0.0, MEAN, 1.0, scale=0.0), "scale must be above 0"),
        (lambda: accuracy_disparity(torch.ones(3)), "use AccuracyDisparity"),
        (lambda: gap_of_standard_accuracy(MEAN, MEAN, ratio=-1.0), "ratio must be above 0"),
        (lambda: gap_of_standard_accuracy(MEAN, torch.ones(3)), "use AccuracyDisparity"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
