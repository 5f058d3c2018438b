"""How far confidence is from accuracy: binned calibration error, as a function, a metric, and the bins themselves."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

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

__all__ = ["CalibrationError", "Norm", "Predictions", "ReliabilityBins", "ece", "reliability_bins"]

Norm = Literal["l1", "l2", "max"]
"""How gaps of bins become one number: weighted mean (ECE), root of the weighted mean square, largest (MCE)."""

Sums = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Predictions grouped by the confidence in the predicted class: what a reliability diagram shows.

    Bin ``b`` of ``B`` holds confidences in ``(b / B, (b + 1) / B]``; confidence 0 is in the first. The means of an
    empty bin are NaN. All tensors are float64 on the CPU.

    Args:
        edges: ``(B + 1,)`` from 0 to 1.
        count: ``(B,)`` number of samples.
        confidence: ``(B,)`` mean confidence in [0, 1].
        accuracy: ``(B,)`` share of right predictions in [0, 1].

    Example:
        >>> bins = reliability_bins(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0]), num_bins=4)
        >>> bins.count.tolist(), bins.confidence[2].item(), bins.accuracy[2].item(), bins.ece
        ([0.0, 0.0, 2.0, 0.0], 0.75, 0.5, 0.25)
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]; NaN without samples."""
        return self.error("l1")

    def error(self, norm: Norm = "l1") -> float:
        """Return the calibration error in [0, 1] under a norm; NaN without samples."""
        filled = self.count > 0
        sums = (self.confidence * self.count).where(filled, 0.0), (self.accuracy * self.count).where(filled, 0.0)
        return error_of_bins(self.count, *sums, norm).item()


@check_types
def ece(
    probs: Tensor, labels: Tensor, *, num_bins: int = 15, norm: Norm = "l1", input: Predictions = "probs"
) -> Tensor:
    r"""Return the calibration error of the predicted classes, in equal-width bins of their confidence.

    With ``n_b`` of ``N`` samples in bin ``b``, mean confidence ``c_b`` and accuracy ``a_b``, the default is
    :math:`\sum_b \frac{n_b}{N} |a_b - c_b|`. Bins are ``(lo, hi]`` as in the paper, so confidence 1 is in the last one
    (torchmetrics uses ``[lo, hi)`` and puts it into a bin of its own). Of equal scores the first class is predicted.

    Even a perfectly calibrated classifier gets about 0.04 / 0.014 / 0.004 at 1,000 / 10,000 / 100,000 samples
    (10 classes, 15 bins): smaller differences are noise.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        num_bins: at least 1.
        norm: ``"l1"`` (ECE), ``"l2"`` (root mean square) or ``"max"`` (MCE, over non-empty bins).
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1]; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
        >>> ece(probs, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]))
        tensor(0.3000)

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, eqs. 2-5.
    """
    _check_options(num_bins, norm, input)
    return error_of_bins(*bin_sums(probs, labels, num_bins, input), norm).float()


@check_types
def reliability_bins(
    probs: Tensor, labels: Tensor, *, num_bins: int = 15, input: Predictions = "probs"
) -> ReliabilityBins:
    """Group predictions into equal-width bins of their confidence; :func:`ece` says how.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        num_bins: at least 1.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> reliability_bins(torch.eye(3), torch.tensor([0, 1, 1]), num_bins=2).count
        tensor([0., 3.], dtype=torch.float64)
    """
    _check_options(num_bins, "l1", input)
    return _bins_from_sums(*bin_sums(probs, labels, num_bins, input))


class _BinSum:
    """A sum for each bin whose reading and writing come after the samples that wait to be added."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.key = f"_{name}"

    def __get__(self, metric: CalibrationError, owner: type | None = None) -> Tensor:
        metric._add_waiting()
        total: Tensor = metric.__dict__[self.key]
        return total

    def __set__(self, metric: CalibrationError, value: Tensor) -> None:
        metric._add_waiting()
        metric.__dict__[self.key] = value


class CalibrationError(ScoreMetric):
    """Calibration error of the predicted classes, from three running sums for each bin; :func:`ece` says what it is.

    Memory does not grow with the data: up to 16 batches of up to 512 samples wait to be added together. On a
    CPU, wrong input is refused by ``update``; on other devices, where looking would make the device wait, by
    ``compute``.

    Args:
        num_bins: at least 1.
        norm: ``"l1"`` (ECE), ``"l2"`` (root mean square) or ``"max"`` (MCE, over non-empty bins).
        input: what ``update`` gets: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Shape:
        - ``update(probs, labels)``: scores ``(N, C)``; true classes ``(N,)`` integer in ``[0, C)``.

    Returns:
        ``compute()``: a float32 scalar in [0, 1]; NaN, with torchmetrics' warning, before the first update.

    Raises:
        TypeError: if scores are not floating-point or labels not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> metric = CalibrationError(input="logits")
        >>> metric.update(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([1, 1]))
        >>> metric.update(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([1, 0]))
        >>> metric.compute()  # three of four right at confidence 1 / (1 + exp(-2))
        tensor(0.1308)
        >>> metric.bins().count.sum()
        tensor(4., dtype=torch.float64)
    """

    plot_upper_bound = 1.0

    count = _BinSum()
    confidence = _BinSum()
    correct = _BinSum()

    @check_types
    def __init__(self, num_bins: int = 15, *, norm: Norm = "l1", input: Predictions = "probs") -> None:
        super().__init__(input=input)
        _check_options(num_bins, norm, input)
        self.num_bins, self.norm = num_bins, norm
        self._waiting: list[tuple[Tensor, Tensor]] = []
        for name in ("count", "confidence", "correct"):
            self.add_state(name, torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")

    @check_types
    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        confidence, correct, problems = top_label(probs, labels, self.input)
        self._note(problems)
        waiting = self._waiting
        # A bin's edges depend on the type of the confidences.
        if waiting and (confidence.dtype != waiting[0][0].dtype or confidence.device != waiting[0][0].device):
            self._add_waiting()
        waiting.append((confidence, correct))
        # Binning a small batch costs nearly as much as a large one: many small operations.
        if len(waiting) == 16 or len(confidence) > 512:
            self._add_waiting()

    def compute(self) -> Tensor:
        """Return the calibration error of all batches, of all processes."""
        self._raise_for_problems()
        return error_of_bins(self.count, self.confidence, self.correct, self.norm).float()

    def bins(self) -> ReliabilityBins:
        """Return the bins for a diagram, of all processes; with several processes, all of them must call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=not self._is_synced):
            self._raise_for_problems()
            return _bins_from_sums(self.count, self.confidence, self.correct)

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        confidence, correct = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        state = self.__dict__  # an attribute of a module is set fifty times as slowly
        sums = (state["_count"], state["_confidence"], state["_correct"])
        state["_count"], state["_confidence"], state["_correct"] = add_to_bins(sums, confidence, correct)


def _check_options(num_bins: int, norm: Norm, input: Predictions) -> None:
    check_num_bins(num_bins)
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
    check_input(input)


def add_to_bins(sums: Sums, confidence: Tensor, correct: Tensor) -> Sums:
    """Add samples to each bin's number of samples, sum of confidences, and number of right predictions.

    Example:
        >>> zeros = torch.zeros(2)
        >>> add_to_bins((zeros, zeros, zeros), torch.tensor([0.75, 1.0]), torch.tensor([True, False]))
        (tensor([0., 2.]), tensor([0.0000, 1.7500]), tensor([0., 1.]))
    """
    count, confidences, rights = sums
    index = bin_index(confidence, len(count))
    confidence = confidence.to(count.dtype)
    # Not in place: a state that was reset under inference mode could not be written outside of it.
    return (
        count.index_add(0, index, torch.ones_like(confidence)),
        confidences.index_add(0, index, confidence),
        rights.index_add(0, index, correct.to(count.dtype)),
    )


def bin_index(probs: Tensor, num_bins: int) -> Tensor:
    """Return the number of the equal-width bin ``(lo, hi]`` of each probability; 0 is in the first.

    Example:
        >>> bin_index(torch.tensor([0.0, 0.25, 0.26, 1.0]), 4)
        tensor([0, 0, 1, 3])
    """
    edges = _edges(num_bins, probs.dtype, probs.device)
    if probs.device.type != "cpu":
        return torch.bucketize(probs, edges[1:-1])
    # A search mispredicts half of its branches. Rounding puts a product beside its bin at most, next to an edge.
    # In numpy these small operations cost half of what they do in torch.
    values, ends = probs.detach().numpy(), edges.numpy()
    index = np.ceil(values * num_bins).astype(np.int64) - 1
    np.clip(index, 0, num_bins - 1, out=index)
    index += values > ends[1:].take(index)
    index -= values <= ends.take(index)
    return torch.from_numpy(index)


@functools.lru_cache(maxsize=32)
def _edges(num_bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # In the type of the confidences: 0.2 in float32 lies above 0.2 in float64, and belongs to the bin below it.
    edges = (torch.arange(num_bins + 1, dtype=torch.float64) / num_bins).to(device=device, dtype=dtype)
    edges[0], edges[-1] = -torch.inf, torch.inf  # rounding takes a probability out of [0, 1]
    return edges


def bin_sums(probs: Tensor, labels: Tensor, num_bins: int, input: Predictions) -> Sums:
    """Return each bin's number of samples, sum of confidences, and number of right predictions.

    Example:
        >>> bin_sums(torch.eye(2), torch.tensor([0, 0]), 1, "probs")[2]
        tensor([1.], dtype=torch.float64)
    """
    confidence, correct, problems = top_label(probs, labels, input)
    raise_for(problems, input)
    zeros = torch.zeros(num_bins, dtype=accumulator(probs.device), device=probs.device)
    return add_to_bins((zeros, zeros, zeros), confidence, correct)


def error_of_bins(count: Tensor, confidence: Tensor, correct: Tensor, norm: Norm) -> Tensor:
    """Return the calibration error from the sums of the bins; NaN without samples.

    Example:
        >>> error_of_bins(torch.tensor([0, 10.0]), torch.tensor([0, 9.0]), torch.tensor([0, 6.0]), "l1")
        tensor(0.3000)
    """
    total = count.sum()
    gap = (confidence - correct).abs()
    if norm == "l1":
        return gap.sum() / total
    mean_gap = gap / count.clamp_min(1)
    if norm == "l2":
        return (mean_gap * gap / total).sum().sqrt()
    return mean_gap.max() + 0 / total  # NaN without samples


def _bins_from_sums(count: Tensor, confidence: Tensor, correct: Tensor) -> ReliabilityBins:
    count, confidence, correct = (part.cpu().double() for part in (count, confidence, correct))
    edges = torch.arange(len(count) + 1, dtype=torch.float64) / len(count)
    return ReliabilityBins(edges=edges, count=count, confidence=confidence / count, accuracy=correct / count)
