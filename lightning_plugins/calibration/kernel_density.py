"""Calibration error with Dirichlet kernels: of whole probability vectors, and differentiable, so that it may be a loss.

torchmetrics measures only the predicted class, in bins.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.calibration.predictions import Predictions, check_input, class_probs, raise_for
from lightning_plugins.checks import check_types

__all__ = ["ece_kde"]

_WIDTHS = (*(10 ** (-5 + 4 * i / 14) for i in range(15)), 0.2, 0.4, 0.6, 0.8, 1.0)
_ROWS_FOR_WIDTH = 1024


@check_types
def ece_kde(
    probs: Tensor,
    labels: Tensor,
    *,
    kind: Literal["canonical", "top_label"] = "canonical",
    bandwidth: float | None = None,
    power: float = 1.0,
    max_samples: int = 4096,
    seed: int = 0,
    input: Predictions = "probs",
) -> Tensor:
    r"""Return a consistent, differentiable estimate of the calibration error of whole probability vectors.

    :math:`\frac{1}{N} \sum_j \sum_c |q_{jc} - p_{jc}|^p` with the leave-one-out kernel regression
    :math:`q_j = \sum_{i \ne j} w_{ij} y_i`, where :math:`w_{ij}` is proportional to the density at :math:`p_j` of the
    Dirichlet distribution with parameters :math:`p_i / h + 1`. No root is taken. ``"top_label"`` does the same for
    the confidence in the predicted class, with Beta kernels. Gradients flow through kernels and probabilities alike.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says; at least 2 rows.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        kind: ``"canonical"`` (all classes) or ``"top_label"``.
        bandwidth: :math:`h`, above 0. By default the one in 1e-5 to 1 of the largest leave-one-out likelihood on at
            most 1024 rows; a loss should fix it.
        power: :math:`p`, above 0.
        max_samples: time and memory grow with the square of the rows; beyond this many, a sample of them is taken.
        seed: of that sample.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A scalar in [0, 2] for power 1, float32 or, for float64 scores, float64.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]]).repeat(8, 1).requires_grad_()
        >>> error = ece_kde(logits, torch.tensor([0] * 4 + [1] * 4), bandwidth=0.1, input="logits")
        >>> error.backward()
        >>> error.detach(), bool(logits.grad[:, 0].sum() > 0)  # half of them right at 0.88: less confidence is better
        (tensor(0.7616), True)

    Reference:
        T. Popordanoska, R. Sayer, M. Blaschko, "A Consistent and Differentiable Lp Canonical Calibration Error
        Estimator", NeurIPS 2022, equations 7-9.
    """
    check_input(input)
    if kind not in ("canonical", "top_label"):
        raise ValueError(f'kind must be "canonical" or "top_label", got {kind!r}')
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be above 0 and finite, got {bandwidth!r}; try 0.02, or None")
    if not power > 0:
        raise ValueError(f"power must be above 0, got {power!r}; 1 is customary")
    if max_samples < 2:
        raise ValueError(f"max_samples must be at least 2, got {max_samples!r}; the default is 4096")
    _, classes, problems = class_probs(probs, labels, input)
    raise_for(problems, input)
    if len(classes) < 2:
        raise ValueError(f"a kernel estimate needs at least 2 rows, got {len(classes)}; use larger batches")
    result_dtype = probs.dtype if probs.dtype == torch.float64 else torch.float32
    scores = probs if probs.device.type == "mps" else probs.double()
    if len(scores) > max_samples:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(scores), generator=generator)[:max_samples].to(scores.device)
        scores, classes = scores[chosen], classes[chosen]
    points = scores if input == "probs" else scores.softmax(1) if input == "logits" else scores.exp()
    if kind == "top_label":
        confidence, predicted = points.max(1)
        points = torch.stack([confidence, 1 - confidence], 1)
        targets = (predicted == classes).to(points.dtype).unsqueeze(1)
    else:
        targets = torch.nn.functional.one_hot(classes, points.shape[1]).to(points.dtype)
    points = points.clamp(1e-6, 1 - 1e-6)
    if bandwidth is None:
        bandwidth = _likeliest(points.detach()[:_ROWS_FOR_WIDTH])
    weights = _log_kernel(points, bandwidth).softmax(0)
    gaps = weights.T @ targets - points[:, : targets.shape[1]]
    return gaps.abs().pow(power).sum(1).mean().to(result_dtype)


def _likeliest(points: Tensor) -> float:
    """Return the bandwidth under which each point is likeliest given the others."""
    likelihood = torch.stack([_log_kernel(points, width).logsumexp(0).sum() for width in _WIDTHS])
    return _WIDTHS[int(likelihood.nan_to_num(-math.inf).argmax())]


def _log_kernel(points: Tensor, bandwidth: float) -> Tensor:
    """Return the log-density of the kernel of row i at row j, ``(N, N)``, -infinity on the diagonal."""
    alpha = points / bandwidth  # less 1
    log_norm = torch.lgamma(alpha + 1).sum(1) - torch.lgamma(alpha.sum(1) + points.shape[1])
    log_density = alpha @ points.log().T - log_norm.unsqueeze(1)
    return log_density.masked_fill(torch.eye(len(points), dtype=torch.bool, device=points.device), -math.inf)
