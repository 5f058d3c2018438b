"""Calibration error inside groups of samples: a global one hides groups that err in opposite directions.

torchmetrics has no calibration error by group.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_plugins.calibration.metrics import bin_index
from lightning_plugins.calibration.predictions import (
    Predictions,
    ScoreMetric,
    accumulator,
    check_input,
    check_num_bins,
    raise_for,
    top_label,
)
from lightning_plugins.checks import check_types

__all__ = ["GroupCalibrationError", "group_ece"]

Reduction = Literal["max", "mean", "none"]


@check_types
def group_ece(
    probs: Tensor,
    labels: Tensor,
    groups: Tensor,
    *,
    reduction: Reduction = "max",
    num_groups: int | None = None,
    num_bins: int = 15,
    input: Predictions = "probs",
) -> Tensor:
    """Return the expected calibration error inside given groups: true classes, predicted classes, or any slices.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        groups: ``(N,)``, integers in ``[0, num_groups)``.
        reduction: ``"max"`` or ``"mean"`` over the groups that have samples, or ``"none"``.
        num_groups: at least 1; by default the largest group plus 1.
        num_bins: equal-width bins in each group, at least 1.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1], NaN without samples; for ``"none"`` ``(num_groups,)``, NaN for empty groups.

    Raises:
        TypeError: if ``probs`` are not floating-point, or ``labels`` or ``groups`` not integers.
        ValueError: for a wrong argument or shape, a label or group out of range, rows that are no probabilities, or
            NaN.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25]]).repeat(4, 1)
        >>> labels, groups = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
        >>> group_ece(probs, labels, groups, reduction="none")  # all four together are calibrated
        tensor([0.2500, 0.2500])
    """
    _check_options(reduction, num_groups, num_bins, input)
    confidence, correct, problems = top_label(probs, labels, input)
    raise_for(problems, input)
    first, last = _check_groups(groups, labels, num_groups)
    num_groups = num_groups or last + 1
    sums = torch.zeros(2, num_groups * num_bins, dtype=accumulator(probs.device), device=probs.device)
    return _reduce(_add(sums, confidence, correct, groups, num_bins), num_groups, reduction)


class GroupCalibrationError(ScoreMetric):
    """Expected calibration error inside groups of samples, from running sums; :func:`group_ece` says what it is.

    Args:
        num_groups: at least 1.
        reduction: ``"max"`` or ``"mean"`` over the groups that have samples, or ``"none"``.
        num_bins: equal-width bins in each group, at least 1.
        input: what ``update`` gets: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Shape:
        - ``update(probs, labels, groups)``: scores ``(N, C)``; classes ``(N,)``; groups ``(N,)``.

    Raises:
        TypeError: as :func:`group_ece`.
        ValueError: as :func:`group_ece`.

    Example:
        >>> metric = GroupCalibrationError(2)
        >>> metric(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]), torch.tensor([0, 1]))
        tensor(0.7500)
    """

    plot_upper_bound = 1.0
    sums: Tensor

    @check_types
    def __init__(
        self, num_groups: int, *, reduction: Reduction = "max", num_bins: int = 15, input: Predictions = "probs"
    ) -> None:
        super().__init__(input=input)
        _check_options(reduction, num_groups, num_bins, input)
        self.num_groups, self.reduction, self.num_bins = num_groups, reduction, num_bins
        self.add_state("sums", torch.zeros(2, num_groups * num_bins, dtype=torch.float64), dist_reduce_fx="sum")

    @check_types
    def update(self, probs: Tensor, labels: Tensor, groups: Tensor) -> None:
        """Add a batch."""
        confidence, correct, problems = top_label(probs, labels, self.input)
        _check_groups(groups, labels, self.num_groups)
        self._note(problems)
        self.sums = _add(self.sums, confidence, correct, groups, self.num_bins)

    def compute(self) -> Tensor:
        """Return the error of all batches, of all processes."""
        self._raise_for_problems()
        return _reduce(self.sums, self.num_groups, self.reduction)


def _check_options(reduction: Reduction, num_groups: int | None, num_bins: int, input: Predictions) -> None:
    check_input(input)
    check_num_bins(num_bins)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups!r}")


def _check_groups(groups: Tensor, labels: Tensor, num_groups: int | None) -> tuple[int, int]:
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"groups must be integers, got {groups.dtype}; use groups.long()")
    if groups.shape != labels.shape:
        raise ValueError(f"groups must have shape {tuple(labels.shape)}, one for each row, got {tuple(groups.shape)}")
    if len(groups) == 0:
        return 0, 0
    first, last = (int(bound) for bound in groups.aminmax())
    if first < 0 or (num_groups is not None and last >= num_groups):
        raise ValueError(f"groups must lie in [0, num_groups), found {first} to {last}; num_groups is {num_groups}")
    return first, last


def _add(sums: Tensor, confidence: Tensor, correct: Tensor, groups: Tensor, num_bins: int) -> Tensor:
    index = groups.long() * num_bins + bin_index(confidence, num_bins)
    gap = confidence.to(sums.dtype) - correct.to(sums.dtype)
    return sums.index_add(1, index, torch.stack([torch.ones_like(gap), gap]))


def _reduce(sums: Tensor, num_groups: int, reduction: Reduction) -> Tensor:
    count, gap = sums.view(2, num_groups, -1)
    errors: Tensor = (gap.abs().sum(1) / count.sum(1)).float()
    if reduction == "none":
        return errors
    errors = errors[count.sum(1) > 0]
    if len(errors) == 0:
        return errors.sum() / 0
    return errors.amax() if reduction == "max" else errors.mean()
