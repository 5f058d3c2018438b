r"""What robustness costs each of two classes, in closed form: a linear classifier of two Gaussian or stable clouds.

The model: a class :math:`s = \pm 1`, the positive one ``ratio`` times as frequent, and inputs :math:`x = s\mu + n` with
noise n symmetric about 0. A classifier answers :math:`\mathrm{sign}(w \cdot x + b)`. Wherever errors or accuracies of
classes are an axis of length 2, the positive class (the majority, for ``ratio`` above 1) comes first. Everything is
computed in float64 on the device of the mean, and over leading dimensions at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins.checks import check_types

__all__ = [
    "RobustClassifier",
    "accuracy_disparity",
    "gap_of_disparity",
    "gap_of_standard_accuracy",
    "gaussian_class_errors",
    "robust_optimal_classifier",
    "stable_class_errors",
]


@check_types
def gaussian_class_errors(
    weight: Tensor,
    bias: Tensor | float,
    mean: Tensor,
    covariance: Tensor | float = 1.0,
    *,
    eps: Tensor | float = 0.0,
    p: float = math.inf,
) -> Tensor:
    r"""Return the error of each class under the worst perturbation, for Gaussian noise and a given linear classifier.

    :math:`\Phi(-(w \cdot \mu + s b - \epsilon \|w\|_q) / \sqrt{w^\top \Sigma w})`, q dual to p. At ``eps=0`` it is the
    natural error.

    Args:
        weight: w ``(..., d)``, not 0.
        bias: b, a number or ``(...)``.
        mean: of the positive class, ``(..., d)``.
        covariance: of the noise: a variance (a number or a tensor without dimensions), variances of the coordinates
            ``(..., d)`` with as many dimensions as ``mean``, or matrices ``(..., d, d)``.
        eps: budget of the perturbation, at least 0, a number or ``(...)``.
        p: norm of the budget, at least 1; ``math.inf`` for the largest coordinate.

    Returns:
        Errors of the positive and the negative class ``(..., 2)``, float64, in [0, 1].

    Raises:
        ValueError: for arguments out of range, or a covariance of another shape.

    Example:
        >>> errors = gaussian_class_errors(torch.tensor([1.0, 0.0]), 0.5, torch.tensor([1.0, 0.0]), eps=0.5)
        >>> [round(error, 4) for error in errors.tolist()]  # Phi(-1), Phi(0)
        [0.1587, 0.5]
    """
    weight, mean = _double(weight), _double(mean)
    reach = _reach(weight, bias, mean, eps, p)
    form, value = _covariance(covariance, mean)
    if form == "full":
        variance = torch.einsum("...i,...ij,...j->...", weight, value, weight)
    else:
        variance = (weight.square() * value).sum(-1)
    if not (variance >= 0).all():
        raise ValueError("covariance must give no variance below 0; make it symmetric and positive definite")
    return _normal_cdf(-reach / variance.sqrt()[..., None])


@check_types
def stable_class_errors(
    weight: Tensor,
    bias: Tensor | float,
    mean: Tensor,
    alpha: float,
    *,
    scale: float = 1.0,
    eps: Tensor | float = 0.0,
    p: float = math.inf,
) -> Tensor:
    r"""Return the error of each class under the worst perturbation, for independent symmetric alpha-stable noise.

    :math:`F_\alpha(-(w \cdot \mu + s b - \epsilon \|w\|_q) / (\gamma \|w\|_\alpha))` with the distribution function
    :math:`F_\alpha` of scale 1. Closed for Cauchy noise (``alpha=1``) and Gaussian noise (``alpha=2``, of variance
    ``2 * scale**2``); other values of ``alpha`` are integrated numerically by scipy, on the CPU.

    Args:
        weight: w ``(..., d)``, not 0.
        bias: b, a number or ``(...)``.
        mean: of the positive class, ``(..., d)``.
        alpha: index of stability in (0, 2]; the smaller, the heavier the tails.
        scale: gamma, above 0.
        eps: budget of the perturbation, at least 0, a number or ``(...)``.
        p: norm of the budget, at least 1; ``math.inf`` for the largest coordinate.

    Returns:
        Errors of the positive and the negative class ``(..., 2)``, float64, in [0, 1].

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> weight = torch.tensor([1.0, 0.0])
        >>> stable_class_errors(weight, 0.0, weight, alpha=1.0)  # 1 / 2 - atan(1) / pi
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    if not 0 < alpha <= 2:
        raise ValueError(f"alpha must lie in (0, 2], got {alpha!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale!r}")
    weight, mean = _double(weight), _double(mean)
    reach = _reach(weight, bias, mean, eps, p)
    spread = scale * weight.abs().pow(alpha).sum(-1).pow(1 / alpha)
    margin = reach / spread[..., None]
    if alpha == 2:
        return _normal_cdf(-margin / math.sqrt(2))
    if alpha == 1:
        return torch.atan2(torch.ones_like(margin), margin) / math.pi  # 1 / 2 - atan(margin) / pi would cancel
    from scipy.stats import levy_stable

    errors = levy_stable.cdf(-margin.detach().cpu().numpy(), alpha, 0.0)
    return torch.as_tensor(errors, dtype=torch.float64, device=margin.device).reshape(margin.shape)


@dataclass(frozen=True, eq=False)
class RobustClassifier:
    r"""The linear classifier of least robust error on the Gaussian model, and its errors.

    Args:
        weight: w ``(..., d)``.
        bias: b ``(...)``.
        shift: the perturbation z ``(..., d)`` that w is optimal against: the means move to :math:`\pm (\mu - z)`.
        margin: :math:`\Delta` ``(...)``, half the Mahalanobis distance of the moved means.
        natural_errors: of the positive and the negative class without perturbation ``(..., 2)``.
        robust_errors: the same under the worst perturbation ``(..., 2)``.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    margin: Tensor
    natural_errors: Tensor
    robust_errors: Tensor


@check_types
def robust_optimal_classifier(
    mean: Tensor,
    covariance: Tensor | float = 1.0,
    *,
    eps: Tensor | float = 0.0,
    ratio: float = 1.0,
    p: float = math.inf,
) -> RobustClassifier:
    r"""Return the linear classifier that minimises robust error on the Gaussian model.

    With :math:`z = \arg\min_{\|z\|_p \le \epsilon} (\mu - z)^\top \Sigma^{-1} (\mu - z)` it is
    :math:`w = \Sigma^{-1}(\mu - z)`, :math:`b = \frac12 \log \mathrm{ratio}`. z is closed for an isotropic covariance
    (p = 2 or infinite) and a diagonal one (p infinite). Otherwise it is exact up to rounding: for p = 2 by the root of
    one monotone equation in the eigenbasis of the covariance (scipy's ``brentq``), for p infinite by an active-set
    method for least squares within bounds (scipy's ``lsq_linear`` with ``"bvls"``); these two solve one problem after
    the other, on the CPU.

    Args:
        mean: of the positive class, ``(..., d)``.
        covariance: of the noise, positive definite: a variance (a number or a tensor without dimensions), variances of
            the coordinates ``(..., d)`` with as many dimensions as ``mean``, or matrices ``(..., d, d)``.
        eps: budget that the classifier is meant for, at least 0 and below the p-norm of ``mean``, a number or
            ``(...)``.
        ratio: frequency of the positive class over that of the negative one, above 0.
        p: norm of the budget, 2 or ``math.inf``.

    Raises:
        ValueError: for arguments out of range, a covariance of another shape or not positive definite, or a budget
            that can move the means onto each other, where no classifier beats a constant one.

    Example:
        >>> net = robust_optimal_classifier(torch.tensor([1.5, 1.0]), eps=0.5, ratio=1.0)
        >>> net.weight
        tensor([1.0000, 0.5000], dtype=torch.float64)
        >>> [round(error, 4) for error in net.robust_errors.tolist()]  # Phi(-sqrt(1.25))
        [0.1318, 0.1318]

    Reference:
        Y. Hu, F. Wu, H. Zhang, H. Zhao, "Understanding the Impact of Adversarial Robustness on Accuracy Disparity",
        ICML 2023; the closed forms are derived here.
    """
    if p not in (2, math.inf):
        raise ValueError(f"p must be 2 or infinite, got {p!r}")
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio must be above 0 and finite, got {ratio!r}")
    mean = _double(mean)
    budget = _budget(eps, mean)
    form, value = _covariance(covariance, mean)
    _check_positive(form, value)
    batch = _common_shape(mean.shape[:-1], budget.shape, value.shape[: -1 if form != "full" else -2])
    mean, budget = mean.expand(*batch, mean.shape[-1]), budget.expand(batch)
    value = value.expand(*batch, *value.shape[-1 if form != "full" else -2 :])
    norm = torch.linalg.vector_norm(mean, p, dim=-1)
    if not (budget < norm).all():
        raise ValueError(
            f"eps must be below the norm of the mean, got {budget.max().item():g} where the least norm is "
            f"{norm.min().item():g}: both classes could be moved onto each other"
        )

    if p == math.inf and form != "full":
        shift = mean.sign() * torch.minimum(mean.abs(), budget[..., None])
    elif form == "isotropic":
        shift = mean * (budget / norm)[..., None]
    else:
        shift = _nearest_shift(mean, value if form == "full" else torch.diag_embed(value), budget, p)
    moved = mean - shift
    weight = torch.linalg.solve(value, moved) if form == "full" else moved / value
    margin = (moved * weight).sum(-1).sqrt()
    bias = torch.full_like(margin, math.log(ratio) / 2)
    signs = margin.new_tensor([1.0, -1.0])
    robust = _normal_cdf(-(margin[..., None] + signs * (bias / margin)[..., None]))
    return RobustClassifier(weight, bias, shift, margin, gaussian_class_errors(weight, bias, mean, value), robust)


@check_types
def accuracy_disparity(class_accuracies: Tensor) -> Tensor:
    """Return the accuracy of the majority minus that of the minority.

    Args:
        class_accuracies: of the majority and the minority, ``(..., 2)``, in [0, 1]; one minus the errors above.

    Returns:
        ``(...)``, in [-1, 1].

    Raises:
        ValueError: if the last axis is not of length 2.

    Example:
        >>> accuracy_disparity(torch.tensor([0.75, 0.5]))
        tensor(0.2500)
    """
    if class_accuracies.ndim < 1 or class_accuracies.shape[-1] != 2:
        raise ValueError(
            f"class_accuracies must be (..., 2), majority and minority, got {tuple(class_accuracies.shape)}; for more "
            "classes use AccuracyDisparity"
        )
    return class_accuracies[..., 0] - class_accuracies[..., 1]


@check_types
def gap_of_disparity(adversarial: Tensor, standard: Tensor) -> Tensor:
    """Return by how much adversarial training widens the disparity of accuracy.

    Args:
        adversarial: accuracies of majority and minority of the adversarially trained model, ``(..., 2)``.
        standard: the same of the standardly trained one.

    Returns:
        ``(...)``, in [-2, 2].

    Raises:
        ValueError: if a last axis is not of length 2.

    Example:
        >>> gap_of_disparity(torch.tensor([0.75, 0.25]), torch.tensor([0.75, 0.5]))
        tensor(0.2500)
    """
    return accuracy_disparity(adversarial) - accuracy_disparity(standard)


@check_types
def gap_of_standard_accuracy(adversarial: Tensor, standard: Tensor, *, ratio: float = 1.0) -> Tensor:
    """Return how much accuracy adversarial training costs, on data as imbalanced as for training.

    Args:
        adversarial: clean accuracies of majority and minority of the adversarially trained model, ``(..., 2)``.
        standard: the same of the standardly trained one.
        ratio: frequency of the majority over that of the minority, above 0.

    Returns:
        ``(...)``, in [-1, 1].

    Raises:
        ValueError: if a last axis is not of length 2, or ``ratio`` is out of range.

    Example:
        >>> gap_of_standard_accuracy(torch.tensor([0.75, 0.25]), torch.tensor([0.75, 0.5]), ratio=3.0)
        tensor(0.0625)
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio must be above 0 and finite, got {ratio!r}")
    accuracy_disparity(adversarial), accuracy_disparity(standard)  # refuse other shapes
    cost = standard - adversarial
    return (ratio * cost[..., 0] + cost[..., 1]) / (ratio + 1)


def _normal_cdf(values: Tensor) -> Tensor:
    result: Tensor = torch.special.ndtr(values)
    return result


def _double(values: Tensor) -> Tensor:
    if values.ndim < 1 or not values.is_floating_point():
        raise ValueError(
            f"weight and mean must be floating-point (..., d), got {tuple(values.shape)} of {values.dtype}"
        )
    return values.double()


def _common_shape(*shapes: torch.Size) -> torch.Size:
    result: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return result


def _budget(eps: Tensor | float, like: Tensor) -> Tensor:
    budget = torch.as_tensor(eps, dtype=torch.float64, device=like.device)
    if not ((budget >= 0) & budget.isfinite()).all():
        raise ValueError(f"eps must be at least 0 and finite, got {eps!r}")
    return budget


def _reach(weight: Tensor, bias: Tensor | float, mean: Tensor, eps: Tensor | float, p: float) -> Tensor:
    """Return what the classifier answers at each class's centre, as seen by that class, at worst ``(..., 2)``."""
    if not p >= 1:
        raise ValueError(f"p must be at least 1 or infinite, got {p!r}")
    if weight.shape[-1] != mean.shape[-1]:
        raise ValueError(f"weight and mean must have one width d, got {tuple(weight.shape)} and {tuple(mean.shape)}")
    if not weight.any(-1).all():
        raise ValueError("weight must not be 0: such a classifier does not look at its input")
    dual = 1.0 if p == math.inf else math.inf if p == 1 else p / (p - 1)
    centre = (weight * mean).sum(-1) - _budget(eps, mean) * torch.linalg.vector_norm(weight, dual, dim=-1)
    offset = torch.as_tensor(bias, dtype=torch.float64, device=mean.device)
    return torch.stack([centre + offset, centre - offset], -1)


def _covariance(covariance: Tensor | float, mean: Tensor) -> tuple[str, Tensor]:
    """Return its form, and variances ``(..., 1)`` or ``(..., d)``, or matrices ``(..., d, d)``."""
    value = torch.as_tensor(covariance, dtype=torch.float64, device=mean.device)
    d = mean.shape[-1]
    if value.ndim == 0:
        return "isotropic", value[None]
    if value.ndim == mean.ndim and value.shape[-1] in (1, d):
        return ("isotropic" if value.shape[-1] == 1 else "diagonal"), value
    if value.ndim == mean.ndim + 1 and value.shape[-2:] == (d, d):
        return "full", value
    raise ValueError(
        f"covariance must be one variance, {d} variances in {mean.ndim} dimension(s) as the mean has, or ({d}, {d}) "
        f"matrices with one dimension more, got {tuple(value.shape)}"
    )


def _check_positive(form: str, value: Tensor) -> None:
    if form == "full":
        good = bool((torch.linalg.cholesky_ex(value).info == 0).all()) and torch.allclose(value, value.mT)
    else:
        good = bool(((value > 0) & value.isfinite()).all())
    if not good:
        raise ValueError("covariance must be symmetric and positive definite; add a small multiple of the identity")


def _nearest_shift(mean: Tensor, covariance: Tensor, budget: Tensor, p: float) -> Tensor:
    if mean.requires_grad or covariance.requires_grad:
        raise ValueError("the shift for this covariance has no gradient; detach mean and covariance")
    solve = _nearest_in_ball if p == 2 else _nearest_in_box
    d = mean.shape[-1]
    problems = zip(
        mean.reshape(-1, d).cpu(), covariance.reshape(-1, d, d).cpu(), budget.flatten().tolist(), strict=True
    )
    shifts = [solve(centre, matrix, radius) for centre, matrix, radius in problems]
    return (torch.stack(shifts) if shifts else mean.new_empty(0, d)).reshape(mean.shape).to(mean.device)


def _nearest_in_ball(mean: Tensor, covariance: Tensor, radius: float) -> Tensor:
    # The optimum is z = (I + m * Sigma)^-1 mu with the multiplier m >= 0 for which |z| is the radius.
    from scipy.optimize import brentq

    if radius == 0:
        return torch.zeros_like(mean)
    variances, basis = torch.linalg.eigh(covariance)
    rotated = torch.mv(basis.T, mean)

    def length(multiplier: float) -> float:
        return float((rotated / (1 + multiplier * variances)).norm()) - radius

    most = (float(mean.norm()) / radius - 1) / float(variances.min())
    # With equal variances rounding decides the sign at the end of the bracket.
    multiplier = most if length(most) >= 0 else brentq(length, 0.0, most, xtol=1e-14 * most, rtol=1e-14)
    return torch.mv(basis, rotated / (1 + multiplier * variances))


def _nearest_in_box(mean: Tensor, covariance: Tensor, radius: float) -> Tensor:
    from scipy.optimize import lsq_linear

    if radius == 0:
        return torch.zeros_like(mean)
    lower = torch.linalg.cholesky(covariance)
    whiten = torch.linalg.solve_triangular(lower, torch.eye(len(mean), dtype=torch.float64), upper=False)
    result = lsq_linear(whiten.numpy(), (whiten @ mean).numpy(), bounds=(-radius, radius), method="bvls", tol=1e-14)
    return torch.from_numpy(result.x)
