"""Spline calibration: the confidence that removes the drift between confidence and accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_plugins.calibration._scores import like, log_scores, replace_confidence
from lightning_plugins.calibration.calibrator import Calibrator, row_tiles
from lightning_plugins.checks import check_types

__all__ = ["SplineCalibration"]


class SplineCalibration(Calibrator):
    r"""Correct the confidence in the predicted class by the slope of a spline through the Kolmogorov-Smirnov curve.

    With held-out samples sorted by confidence ``c``, and ``a`` 1 for right predictions and 0 for wrong ones, the curve
    is :math:`F(u)=\frac1N\sum_{i\le uN}(a_i-c_i)`; for a calibrated classifier it stays near zero. A natural cubic
    spline ``S`` with ``S(0) = 0`` is fitted to it by least squares, and the confidence at percentile ``u`` becomes
    ``c + S'(u)``, within [0, 1]. ``S'`` is taken as the rise of ``S`` over a sample's own ``1 / N``, so that the curve
    of the corrected samples is exactly ``F - S`` wherever neither 0 nor 1 cuts off. Samples of equal confidence share
    the mean of their corrections; between held-out confidences the map is interpolated.

    The other classes share what is left in the proportions they had, and the classes of a sample keep their order:
    where one would overtake, the shares of the others are evened out, and no confidence falls below ``1 / C``.
    ``fit_info["guarded"]`` is the share of held-out samples where that was needed.

    Args:
        num_knots: equally spaced knots of the spline, at least 3.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for a wrong argument.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = torch.randn(5000, 3, generator=generator)
        >>> labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        >>> calibrator = SplineCalibration().fit(3 * logits, labels)
        >>> bool((calibrator(3 * logits).exp().amax(1) - logits.softmax(1).amax(1)).abs().mean() < 0.03)
        True

    Reference:
        K. Gupta, A. Rahimi, T. Ajanthan, T. Mensink, C. Sminchisescu, R. Hartley, "Calibration of Neural Networks using
        Splines", ICLR 2021.
    """

    _looks_up = True
    preserves_ranking = True
    confidences: Tensor  # (K,) of the held-out samples, ascending
    corrected: Tensor  # (K,)
    _sized_by_fit = ("confidences", "corrected")

    @check_types
    def __init__(self, num_knots: int = 6) -> None:
        super().__init__()
        if num_knots < 3:
            raise ValueError(f"num_knots must be at least 3, got {num_knots!r}")
        self.num_knots = num_knots
        self.register_buffer("confidences", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("corrected", torch.zeros(0, dtype=torch.float64))

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        with torch.no_grad():
            tops = [log_scores(rows.double()).max(1) for rows, _ in row_tiles(logits, labels)]
            confidence, order = torch.cat([top.values for top in tops]).exp().cpu().sort()
            right = (torch.cat([top.indices for top in tops]) == labels).double().cpu()[order]
            # Equal confidences have no order, so every one of them counts as the mean of its group.
            confidences, group = torch.unique_consecutive(confidence, return_inverse=True)
            right = (group.bincount(right) / group.bincount())[group]
            corrected = confidence + _corrections(right - confidence, self.num_knots)
            corrected = (group.bincount(corrected) / group.bincount()).clamp(0, 1)
            self.confidences = like(confidences, self.confidences)
            self.corrected = like(corrected, self.corrected)
            guarded = 0
            for rows, _ in row_tiles(logits, labels):
                guarded += int(self._replaced(rows.double().to(self.corrected.device))[1].sum())
        return {"converged": True, "guarded": guarded / len(labels)}

    def _replaced(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = log_scores(logits.to(self.corrected.dtype))
        points = log_probs.amax(1).exp().clamp(self.confidences[0], self.confidences[-1])
        right = torch.searchsorted(self.confidences, points)
        left = (right - 1).clamp_min(0)
        x0, x1 = self.confidences[left], self.confidences[right]
        share = torch.where(x1 > x0, (points - x0) / (x1 - x0), 1.0)
        return replace_confidence(log_probs, torch.lerp(self.corrected[left], self.corrected[right], share))

    def _calibrate(self, logits: Tensor) -> Tensor:
        if self.corrected.shape[0] == 0:
            return logits.log_softmax(-1)
        return self._replaced(logits.reshape(-1, logits.shape[-1]))[0].reshape(logits.shape).to(logits.dtype)


def _corrections(residuals: Tensor, num_knots: int) -> Tensor:
    """Return what to add to each confidence, from accuracy less confidence in ascending order of confidence."""
    import numpy as np
    from scipy.interpolate import CubicSpline

    n = len(residuals)
    curve = np.concatenate([[0.0], residuals.numpy().cumsum() / n])
    # All natural splines with these knots that start at 0.
    basis = CubicSpline(np.linspace(0, 1, num_knots), np.eye(num_knots)[:, 1:], bc_type="natural")(
        np.linspace(0, 1, n + 1)
    )
    weights = np.linalg.lstsq(basis, curve, rcond=None)[0]
    return torch.from_numpy(n * np.diff(basis @ weights))
