"""Top-label calibration error with a kernel instead of bins: smooth ECE and the density estimate of Mix-n-Match.

torchmetrics has neither. Both put the samples on a grid of up to 8193 points and reflect the kernel at 0 and 1, which
is a circular convolution of the mirrored grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_plugins.calibration.predictions import Predictions
from lightning_plugins.calibration.ranked import Ranked, ranked_predictions
from lightning_plugins.checks import check_types

__all__ = ["kde_ece", "smooth_ece"]

_CELLS = 2**13
_MIN_WIDTH = 1e-3


@check_types
def smooth_ece(probs: Tensor, labels: Tensor, *, width: float | None = None, input: Predictions = "probs") -> Tensor:
    r"""Return the smooth calibration error of the predicted classes, with a reflected Gaussian kernel.

    :math:`\int_0^1 |\frac{1}{N} \sum_i (c_i - a_i) K_\sigma(t, c_i)| dt`. By default the width :math:`\sigma` is the
    one at which it equals the error itself, found by ten bisections; nothing is left to tune.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        width: standard deviation of the kernel, at least 0.001; by default found from the data.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1]; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
        >>> smooth_ece(probs, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]))
        tensor(0.3000)

    Reference:
        J. Błasiok, P. Nakkiran, "Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing", ICLR 2024. Their
        code evaluates on coarser grids.
    """
    if width is not None and not _MIN_WIDTH <= width < math.inf:
        raise ValueError(f"width must be at least {_MIN_WIDTH} and finite, got {width!r}; None finds it from the data")
    return smooth_value(ranked_predictions(probs, labels, input=input), width).float()


@check_types
def kde_ece(probs: Tensor, labels: Tensor, *, power: float = 1.0, input: Predictions = "probs") -> Tensor:
    r"""Return the calibration error of the predicted classes from kernel density estimates.

    :math:`\int |x - a(x)|^p f(x) dx` over [0, 1], where :math:`f` is the density of the confidences, :math:`g` that of
    the right predictions, :math:`\pi` the accuracy, and :math:`a = \min(1, \pi g / f)`. The kernel is a triweight, its
    standard deviation that of the right predictions' confidences times :math:`(2 N)^{-1/5}`, at least 0.001. No root
    is taken.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        power: :math:`p`, above 0.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1]; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
        >>> kde_ece(probs, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]))
        tensor(0.3000)

    Reference:
        J. Zhang, B. Kailkhura, T. Han, "Mix-n-Match: Ensemble and Compositional Methods for Uncertainty Calibration in
        Deep Learning", ICML 2020, section 4.
    """
    if not power > 0:
        raise ValueError(f"power must be above 0, got {power!r}; 1 is customary")
    return kde_value(ranked_predictions(probs, labels, input=input), power).float()


def smooth_value(ranked: Ranked, width: float | None = None) -> Tensor:
    """Compute :func:`smooth_ece` of ranked predictions."""
    num_samples = len(ranked.correct)
    if num_samples == 0:
        return ranked.correct.sum() / 0
    residual = (ranked.confidence - ranked.correct) / num_samples
    spectrum = _spectrum(_to_grid(ranked.confidence, residual))
    frequency = torch.arange(_CELLS + 1, dtype=residual.dtype, device=residual.device) * math.pi

    def error(sigma: float) -> Tensor:
        # What a wide kernel leaves has no high frequencies: a coarser grid shows all of it.
        cells = min(_CELLS, 2 ** math.ceil(math.log2(max(32 / sigma, 256))))
        kept = slice(cells + 1)
        transfer = (-0.5 * (sigma * frequency[kept]).square()).exp()
        smoothed = torch.fft.irfft(spectrum[kept] * transfer, n=2 * cells)[: cells + 1] * cells
        return torch.trapezoid(smoothed.abs(), dx=1 / cells)

    if width is not None:
        return error(width)

    def too_narrow(sigma: float) -> bool:
        return sigma < _MIN_WIDTH or sigma < error(sigma).item()

    low, high = 0.0, 1.0
    if not too_narrow(high):
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (middle, high) if too_narrow(middle) else (low, middle)
    return error(high)


def kde_value(ranked: Ranked, power: float = 1.0) -> Tensor:
    """Compute :func:`kde_ece` of ranked predictions."""
    confidence, correct = ranked
    num_samples = len(correct)
    if num_samples == 0:
        return correct.sum() / 0
    num_right = correct.sum().clamp_min(1e-300)
    mean = (confidence * correct).sum() / num_right
    deviation = (((confidence - mean).square() * correct).sum() / num_right).sqrt().item()
    # The kernel reaches three standard deviations; one that is wider than [0, 1] would meet its own reflection.
    reach = 3 * max(deviation * (2 * num_samples) ** -0.2, _MIN_WIDTH)
    distance = torch.arange(2 * _CELLS, dtype=confidence.dtype, device=confidence.device) / _CELLS
    kernel = sum((1 - (part / reach).square()).clamp_min(0) ** 3 for part in (distance, 2 - distance))
    transfer = torch.fft.rfft(kernel / kernel.sum())
    mass = torch.stack([_to_grid(confidence, torch.ones_like(correct)), _to_grid(confidence, correct)])
    everything, right = _from_spectrum(_spectrum(mass) * transfer).clamp_min(0) * (_CELLS / num_samples)
    accuracy = (right / everything.clamp_min(1e-300)).clamp_max(1)
    grid = torch.linspace(0, 1, _CELLS + 1, dtype=confidence.dtype, device=confidence.device)
    # Where there are no samples the quotient means nothing.
    weight = everything.where(everything > 1e-6, 0)
    return torch.trapezoid((grid - accuracy).abs() ** power * weight) / torch.trapezoid(everything)


def _to_grid(position: Tensor, mass: Tensor) -> Tensor:
    """Share each sample's mass between its two neighbours on the grid over [0, 1]."""
    place = position.clamp(0, 1) * _CELLS
    left = place.floor().clamp_max(_CELLS - 1)
    right_part = (place - left) * mass
    index = left.long()
    grid = torch.zeros(_CELLS + 1, dtype=mass.dtype, device=mass.device)
    return grid.index_add(0, index, mass - right_part).index_add(0, index + 1, right_part)


def _spectrum(grid: Tensor) -> Tensor:
    """Return the Fourier transform of a grid that is mirrored at both ends."""
    inner = grid[..., 1:-1]
    ends = 2 * grid[..., :1], 2 * grid[..., -1:]  # mass on a mirror is its own image
    spectrum: Tensor = torch.fft.rfft(torch.cat([ends[0], inner, ends[1], inner.flip(-1)], -1))
    return spectrum


def _from_spectrum(spectrum: Tensor) -> Tensor:
    grid: Tensor = torch.fft.irfft(spectrum, n=2 * _CELLS)[..., : _CELLS + 1]
    return grid
