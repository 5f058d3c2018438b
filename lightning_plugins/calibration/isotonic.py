"""Isotonic calibration: the monotone map of the scores that fits best."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_plugins.calibration._scores import (
    check_num_classes,
    like,
    log_denominators,
    log_normalized,
    log_scores,
)
from lightning_plugins.calibration.calibrator import Calibrator, row_tiles
from lightning_plugins.checks import check_types

__all__ = ["IsotonicCalibration", "IsotonicMode"]

IsotonicMode = Literal["one_vs_rest", "multiclass"]
"""A map for each class, or one for all of them."""


class IsotonicCalibration(Calibrator):
    """Map the scores by the monotone function with the least squared error, found by pooling neighbours (PAVA).

    ``"one_vs_rest"``: a function for every class, so that the predicted class can change. ``"multiclass"`` (IRM): one
    function for the scores of all classes together, which takes far fewer samples and, made strictly increasing by
    1e-9 of its argument, keeps the order of the classes; :attr:`preserves_ranking` is then true. Between held-out
    scores the functions are interpolated, outside they are constant. Rows are normalised to sum 1, a row of zeros keeps
    its probabilities, and single zeros become 1e-38.

    Args:
        mode: ``"one_vs_rest"`` or ``"multiclass"``.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for an unknown mode, or logits of another number of classes than the fit's.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 4.0], [4.0, 0.0]])
        >>> calibrator = IsotonicCalibration().fit(logits, torch.tensor([0, 0, 1, 1]))
        >>> calibrator(logits)[0].exp()  # two of the three most confident are right, and the pool takes in the third
        tensor([0.6667, 0.3333])

    Reference:
        B. Zadrozny, C. Elkan, "Transforming classifier scores into accurate multiclass probability estimates", KDD
        2002; ``"multiclass"``: J. Zhang, B. Kailkhura, T. Y.-J. Han, "Mix-n-Match", ICML 2020, section 3.3.
    """

    knots: Tensor  # (C or 1, K), ascending; shorter ones repeat their last
    values: Tensor
    _sized_by_fit = ("knots", "values")

    @check_types
    def __init__(self, mode: IsotonicMode = "one_vs_rest") -> None:
        super().__init__()
        if mode not in get_args(IsotonicMode):
            raise ValueError(f"mode must be one of {', '.join(get_args(IsotonicMode))}, got {mode!r}")
        self.mode: IsotonicMode = mode
        self.preserves_ranking = mode == "multiclass"
        self.register_buffer("knots", torch.zeros((0, 0), dtype=torch.float64))
        self.register_buffer("values", torch.zeros((0, 0), dtype=torch.float64))

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        num_classes = logits.shape[1]
        if self.mode == "multiclass":
            tiles = row_tiles(logits, labels)
            scores = torch.cat([log_scores(rows.double()).exp().flatten() for rows, _ in tiles])
            hits = torch.zeros_like(scores)
            hits[torch.arange(len(labels), device=labels.device) * num_classes + labels] = 1
            maps = [_isotonic(scores, hits)]
        else:
            denominators = log_denominators(logits)
            maps = [
                _isotonic((logits[:, k].double() - denominators).exp(), (labels == k).double())
                for k in range(num_classes)
            ]
        width = max(2, *(len(knots) for knots, _ in maps))
        knots, values = (
            torch.stack([torch.cat([part, part[-1:].expand(width - len(part))]) for part in parts])
            for parts in zip(*maps, strict=True)
        )
        self.knots, self.values = like(knots, self.knots), like(values, self.values)
        return {"converged": True, "knots_max": width}

    def _levels(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the functions give, before the rows are normalised, and log-scores."""
        log_probs = log_scores(logits.to(self.values.dtype))
        if self.mode == "multiclass":
            rows = log_probs.exp().reshape(1, -1)
            levels = _interpolate(self.knots, self.values, rows) + 1e-9 * rows
            return levels.reshape(logits.shape), log_probs
        check_num_classes(logits, self.values.shape[0])
        columns = log_probs.exp().reshape(-1, logits.shape[-1]).mT.contiguous()
        return _interpolate(self.knots, self.values, columns).mT.reshape(logits.shape), log_probs

    def _calibrate(self, logits: Tensor) -> Tensor:
        if self.values.shape[0] == 0:
            return logits.log_softmax(-1)
        levels, log_probs = self._levels(logits)
        found = log_normalized(levels, log_probs).to(logits.dtype)
        if not self.preserves_ranking:
            return found
        # What sets equal levels apart is less than float32 can show; the predicted class must stay the first one.
        top = logits.argmax(-1, keepdim=True)
        highest = found.gather(-1, top)
        below = highest - 4 * torch.finfo(found.dtype).eps * (1 + highest.abs())
        return torch.minimum(found, below).scatter(-1, top, highest)


def _isotonic(scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the knots and values of the monotone function of least squares."""
    from sklearn.isotonic import IsotonicRegression

    found = IsotonicRegression(y_min=0.0, y_max=1.0).fit(scores.cpu().numpy(), hits.cpu().numpy())
    return torch.from_numpy(found.X_thresholds_).double(), torch.from_numpy(found.y_thresholds_).double()


def _interpolate(knots: Tensor, values: Tensor, points: Tensor) -> Tensor:
    """Interpolate ``M`` functions ``(M, K)`` at ``(M, N)`` points, constant outside their knots."""
    points = points.clamp(knots[:, :1], knots[:, -1:])
    right = torch.searchsorted(knots, points).clamp(1, knots.shape[1] - 1)
    x0, x1 = knots.gather(1, right - 1), knots.gather(1, right)
    y0, y1 = values.gather(1, right - 1), values.gather(1, right)
    share = torch.where(x1 > x0, (points - x0) / (x1 - x0), 1.0)
    return torch.lerp(y0, y1, share)
