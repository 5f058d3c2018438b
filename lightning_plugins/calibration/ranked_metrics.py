"""Metrics that keep confidence and correctness of every sample, in float32: 8 bytes, whatever the number of classes.

Inside a ``MetricCollection`` they share that state. torchmetrics keeps as much for its calibration error and has none
of these measures.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from lightning_plugins.calibration.predictions import Predictions, ScoreMetric, check_num_bins, top_label
from lightning_plugins.calibration.ranked import (
    Ranked,
    aurc_value,
    debiased_value,
    equal_mass_value,
    ks_value,
    rank,
    sweep_value,
)
from lightning_plugins.calibration.smooth import kde_value, smooth_value
from lightning_plugins.checks import check_types

__all__ = [
    "AURC",
    "DebiasedCalibrationError",
    "EqualMassCalibrationError",
    "KDECalibrationError",
    "KSError",
    "RankedMetric",
    "SmoothCalibrationError",
    "SweepCalibrationError",
]


class RankedMetric(ScoreMetric):
    """Base of the metrics that keep confidence and correctness of every sample, 8 bytes each.

    Args:
        input: what ``update`` gets: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Shape:
        - ``update(probs, labels)``: scores ``(N, C)``; true classes ``(N,)`` integer in ``[0, C)``.

    Raises:
        TypeError: if scores are not floating-point or labels not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.
    """

    confidence: list[Tensor] | Tensor
    correct: list[Tensor] | Tensor

    def __init__(self, *, input: Predictions = "probs") -> None:
        super().__init__(input=input)
        for name in ("confidence", "correct"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @check_types
    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        confidence, correct, problems = top_label(probs, labels, self.input)
        self._note(problems)
        # One type for both: torchmetrics lets a process without samples take part with an empty tensor of it.
        for state, values in ((self.confidence, confidence), (self.correct, correct)):
            state.append(values.to(self.dtype))  # type: ignore[union-attr]

    def compute(self) -> Tensor:
        """Return the value for all batches, of all processes; NaN without samples."""
        self._raise_for_problems()
        if isinstance(self.confidence, list) and not self.confidence:
            return torch.tensor(torch.nan, device=self.device)
        return self._value(rank(dim_zero_cat(self.confidence), dim_zero_cat(self.correct))).float()

    @abstractmethod
    def _value(self, ranked: Ranked) -> Tensor:
        """Compute the value of ranked predictions."""


class EqualMassCalibrationError(RankedMetric):
    """Calibration error in bins of equally many samples; see :func:`equal_mass_ece` and :class:`RankedMetric`.

    Args:
        num_bins: at least 1.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``.

    Example:
        >>> metric = EqualMassCalibrationError(num_bins=1)
        >>> metric(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        tensor(0.3000)
    """

    @check_types
    def __init__(self, num_bins: int = 15, *, input: Predictions = "probs") -> None:
        super().__init__(input=input)
        check_num_bins(num_bins)
        self.num_bins = num_bins

    def _value(self, ranked: Ranked) -> Tensor:
        return equal_mass_value(ranked, self.num_bins)


class DebiasedCalibrationError(EqualMassCalibrationError):
    """Equal-mass calibration error less its sampling bias; see :func:`debiased_ece` and :class:`RankedMetric`.

    Args:
        num_bins: at least 1.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``.

    Example:
        >>> DebiasedCalibrationError()(torch.eye(2), torch.tensor([0, 1]))
        tensor(0.)
    """

    def _value(self, ranked: Ranked) -> Tensor:
        return debiased_value(ranked, self.num_bins)


class SweepCalibrationError(RankedMetric):
    """Equal-mass calibration error with as many bins as keep accuracies in order; see :func:`sweep_ece`.

    Args:
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``.

    Example:
        >>> SweepCalibrationError()(torch.eye(2), torch.tensor([0, 1]))
        tensor(0.)
    """

    def _value(self, ranked: Ranked) -> Tensor:
        return sweep_value(ranked)


class KSError(RankedMetric):
    """Largest gap between cumulative confidence and accuracy; see :func:`ks_error` and :class:`RankedMetric`.

    Args:
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``.

    Example:
        >>> KSError()(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        tensor(0.3500)
    """

    def _value(self, ranked: Ranked) -> Tensor:
        return ks_value(ranked)


class AURC(RankedMetric):
    """Area under the risk-coverage curve; see :func:`aurc`, :func:`eaurc` and :class:`RankedMetric`.

    Args:
        excess: subtract the area of the ideal order.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``.

    Example:
        >>> AURC()(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        tensor(0.2500)
    """

    @check_types
    def __init__(self, excess: bool = False, *, input: Predictions = "probs") -> None:
        super().__init__(input=input)
        self.excess = excess

    def _value(self, ranked: Ranked) -> Tensor:
        return aurc_value(ranked, self.excess)


class SmoothCalibrationError(RankedMetric):
    """Calibration error with a Gaussian kernel instead of bins; see ``smooth_ece`` and :class:`RankedMetric`.

    Args:
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``.

    Example:
        >>> SmoothCalibrationError()(torch.eye(2), torch.tensor([0, 1]))
        tensor(0.)
    """

    def _value(self, ranked: Ranked) -> Tensor:
        return smooth_value(ranked)


class KDECalibrationError(RankedMetric):
    """Calibration error from kernel density estimates; see ``kde_ece`` and :class:`RankedMetric`.

    Args:
        power: power of the gaps that are averaged, above 0.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``.

    Example:
        >>> KDECalibrationError()(torch.tensor([[0.9, 0.1]]).repeat(10, 1), torch.tensor([0] * 6 + [1] * 4))
        tensor(0.3000)
    """

    @check_types
    def __init__(self, power: float = 1.0, *, input: Predictions = "probs") -> None:
        super().__init__(input=input)
        if not power > 0:
            raise ValueError(f"power must be above 0, got {power!r}; 1 is customary")
        self.power = power

    def _value(self, ranked: Ranked) -> Tensor:
        return kde_value(ranked, self.power)
