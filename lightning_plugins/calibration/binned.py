"""More measures in equal-width bins, and the class-wise calibration error as function and metric.

torchmetrics bins the predicted class only: it has no class-wise error, no lower bound on a bin's size for the largest
gap, and no correction for sampling.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_plugins.calibration.calibrator import row_tiles
from lightning_plugins.calibration.metrics import bin_index, bin_sums
from lightning_plugins.calibration.predictions import (
    Predictions,
    ScoreMetric,
    accumulator,
    check_input,
    check_num_bins,
    class_probs,
    raise_for,
)
from lightning_plugins.calibration.ranked import equal_mass_value, rank
from lightning_plugins.checks import check_types

__all__ = [
    "ClasswiseCalibrationError",
    "average_calibration_error",
    "classwise_ece",
    "mce",
    "root_mean_square_calibration_error",
]

Reduction = Literal["mean", "sum"]
Binning = Literal["width", "mass"]


@check_types
def mce(
    probs: Tensor, labels: Tensor, *, num_bins: int = 15, min_count: int = 1, input: Predictions = "probs"
) -> Tensor:
    """Return the largest gap between confidence and accuracy of a bin ("maximum calibration error").

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        num_bins: equal-width bins, at least 1.
        min_count: samples a bin must have to count, at least 1; the gap of a bin of few samples is mostly noise.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1]; NaN if no bin has enough samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
        >>> mce(probs, torch.tensor([0, 1, 1])), mce(probs, torch.tensor([0, 1, 1]), min_count=2)
        (tensor(0.6000), tensor(0.4000))

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, eq. 4.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count!r}; an empty bin has no gap")
    gaps = _gaps(probs, labels, num_bins, min_count, input)
    return gaps.amax().float() if len(gaps) else gaps.sum().float() / 0


@check_types
def average_calibration_error(
    probs: Tensor, labels: Tensor, *, num_bins: int = 15, input: Predictions = "probs"
) -> Tensor:
    """Return the mean gap between confidence and accuracy over the non-empty bins, whatever their sizes.

    Arguments and errors are those of :func:`mce`. "ACE" also names a class-wise error in bins of equal mass, which is
    ``classwise_ece(binning="mass")``.

    Returns:
        A float32 scalar in [0, 1]; NaN without samples.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
        >>> average_calibration_error(probs, torch.tensor([0, 1, 1]))  # gaps of 0.4 and 0.6
        tensor(0.5000)

    Reference:
        L. Neumann, A. Zisserman, A. Vedaldi, "Relaxed Softmax: Efficient Confidence Auto-Calibration for Safe
        Pedestrian Detection", NeurIPS workshop 2018.
    """
    return _gaps(probs, labels, num_bins, 1, input).mean().float()


@check_types
def root_mean_square_calibration_error(
    probs: Tensor, labels: Tensor, *, num_bins: int = 15, debias: bool = False, input: Predictions = "probs"
) -> Tensor:
    r"""Return the root of the mean square gap between confidence and accuracy, :math:`\sqrt{\sum_b n_b d_b^2 / N}`.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        num_bins: equal-width bins, at least 1.
        debias: subtract :math:`a_b (1 - a_b) / (n_b - 1)`, the sampling variance of the accuracy, from each square; a
            negative sum counts as 0.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1]; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs, labels = torch.tensor([[0.9, 0.1]]).repeat(10, 1), torch.tensor([0] * 6 + [1] * 4)
        >>> root_mean_square_calibration_error(probs, labels, debias=True)  # sqrt(0.09 - 0.24 / 9)
        tensor(0.2517)

    Reference:
        A. Kumar, P. Liang, T. Ma, "Verified Uncertainty Calibration", NeurIPS 2019, section 5.
    """
    check_input(input)
    check_num_bins(num_bins)
    count, confidence, correct = bin_sums(probs, labels, num_bins, input)
    size = count.clamp_min(1)
    square = ((confidence - correct) / size).square()
    if debias:
        accuracy = correct / size
        square = square - accuracy * (1 - accuracy) / (size - 1).clamp_min(1)
    return ((count * square).sum() / count.sum()).clamp_min(0).sqrt().float()


@check_types
def classwise_ece(
    probs: Tensor,
    labels: Tensor,
    *,
    reduction: Reduction = "mean",
    binning: Binning = "width",
    threshold: float | None = None,
    num_bins: int = 15,
    input: Predictions = "probs",
) -> Tensor:
    r"""Return the calibration error of all classes, each against the rest.

    For class :math:`j` it is the binned error of the probabilities :math:`p_{ij}` and the events :math:`y_i = j`.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        reduction: ``"mean"`` or ``"sum"`` over the classes; papers that use Dirichlet calibration report the sum.
        binning: bins of equal ``"width"``, or of equal ``"mass"`` (Nixon's adaptive calibration error).
        threshold: leave out the samples whose probability of the class is not above it, for that class; customary is
            ``1 / C``. A class without samples left counts as 0.
        num_bins: at least 1.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar, in [0, 1] for the mean; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs, labels = torch.tensor([[0.9, 0.1]]).repeat(10, 1), torch.tensor([0] * 6 + [1] * 4)
        >>> classwise_ece(probs, labels), classwise_ece(probs, labels, reduction="sum")
        (tensor(0.3000), tensor(0.6000))

    Reference:
        M. Kull et al., "Beyond temperature scaling: Obtaining well-calibrated multiclass probabilities with Dirichlet
        calibration", NeurIPS 2019; J. Nixon et al., "Measuring Calibration in Deep Learning", 2019; K. Patel et al.,
        "Multi-Class Uncertainty Calibration via Mutual Information Maximization-based Binning", ICLR 2021 (threshold).
    """
    _check_classwise(reduction, threshold, num_bins, input)
    if binning not in get_args(Binning):
        raise ValueError(f"binning must be one of {', '.join(get_args(Binning))}, got {binning!r}")
    checked, labels, problems = class_probs(probs, labels, input)
    raise_for(problems, input)
    num_classes = checked.shape[1]
    if binning == "width":
        sums = torch.zeros(num_classes, num_bins + 1, dtype=accumulator(checked.device), device=checked.device)
        return _reduce(_add(sums, checked, labels, threshold), len(labels), reduction)
    errors = []
    for j in range(num_classes):
        p, y = checked[:, j], labels == j
        if threshold is not None:
            p, y = p[p > threshold], y[p > threshold]
        empty = len(p) == 0 and len(labels) > 0
        errors.append(p.new_zeros((), dtype=torch.float64) if empty else equal_mass_value(rank(p, y), num_bins))
    total = torch.stack(errors).sum()
    return (total / num_classes if reduction == "mean" else total).float()


class ClasswiseCalibrationError(ScoreMetric):
    """Class-wise calibration error in equal-width bins, from running sums; :func:`classwise_ece` says what it is.

    Args:
        num_classes: at least 2.
        reduction: ``"mean"`` or ``"sum"`` over the classes.
        threshold: leave out the samples whose probability of the class is not above it.
        num_bins: at least 1.
        input: what ``update`` gets: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Shape:
        - ``update(probs, labels)``: scores ``(N, num_classes)``; true classes ``(N,)``.

    Raises:
        TypeError: if scores are not floating-point or labels not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> metric = ClasswiseCalibrationError(2)
        >>> metric(torch.tensor([[0.9, 0.1]]).repeat(10, 1), torch.tensor([0] * 6 + [1] * 4))
        tensor(0.3000)
    """

    sums: Tensor
    num_samples: Tensor

    @check_types
    def __init__(
        self,
        num_classes: int,
        *,
        reduction: Reduction = "mean",
        threshold: float | None = None,
        num_bins: int = 15,
        input: Predictions = "probs",
    ) -> None:
        super().__init__(input=input)
        _check_classwise(reduction, threshold, num_bins, input)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}")
        self.num_classes, self.reduction, self.threshold = num_classes, reduction, threshold
        self.add_state("sums", torch.zeros(num_classes, num_bins + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @check_types
    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        checked, labels, problems = class_probs(probs, labels, self.input)
        if checked.shape[1] != self.num_classes:
            raise ValueError(f"scores must have num_classes={self.num_classes} columns, got {checked.shape[1]}")
        self._note(problems)
        self.sums = _add(self.sums, checked, labels, self.threshold)
        self.num_samples = self.num_samples + len(labels)

    def compute(self) -> Tensor:
        """Return the error of all batches, of all processes; NaN without samples."""
        self._raise_for_problems()
        return _reduce(self.sums, self.num_samples, self.reduction)


def _check_classwise(reduction: Reduction, threshold: float | None, num_bins: int, input: Predictions) -> None:
    check_input(input)
    check_num_bins(num_bins)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold!r}; 1 / C is customary")


def _gaps(probs: Tensor, labels: Tensor, num_bins: int, min_count: int, input: Predictions) -> Tensor:
    """Return the gap of each bin that has enough samples."""
    check_input(input)
    check_num_bins(num_bins)
    count, confidence, correct = bin_sums(probs, labels, num_bins, input)
    filled = count >= min_count
    return ((confidence - correct).abs() / count)[filled]


def _add(sums: Tensor, probs: Tensor, labels: Tensor, threshold: float | None) -> Tensor:
    """Add samples to sums ``(C, num_bins + 1)`` of probability less event; the last column counts samples."""
    num_classes, num_bins = probs.shape[1], sums.shape[1] - 1
    offset = torch.arange(num_classes, device=probs.device) * (num_bins + 1)
    flat = sums.flatten()
    for p, y in row_tiles(probs, labels):
        index = bin_index(p, num_bins) + offset
        gap = p.to(sums.dtype)
        gap = gap.scatter_add(1, y.unsqueeze(1), gap.new_full((len(y), 1), -1))
        if threshold is None:
            kept = gap.new_full((num_classes,), len(y))
        else:
            above = p > threshold
            gap, kept = gap * above, above.sum(0).to(gap.dtype)
        flat = flat.index_add(0, index.flatten(), gap.flatten())
        flat = flat.index_add(0, offset + num_bins, kept)
    return flat.view_as(sums)


def _reduce(sums: Tensor, num_samples: Tensor | int, reduction: Reduction) -> Tensor:
    errors = sums[:, :-1].abs().sum(1) / sums[:, -1].clamp_min(1)
    total = errors.mean() if reduction == "mean" else errors.sum()
    return (total + 0 * sums[0, 0] / num_samples).float()  # NaN without samples
