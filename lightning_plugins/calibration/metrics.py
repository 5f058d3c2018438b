"""How far confidence is from accuracy: binned calibration error, as a function, a metric, and the bins themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["CalibrationError", "Norm", "Predictions", "ReliabilityBins", "ece", "reliability_bins"]

Norm = Literal["l1", "l2", "max"]
"""How gaps of bins become one number: weighted mean (ECE), root of the weighted mean square, largest (MCE)."""

Predictions = Literal["probs", "logits", "log_probs"]
"""What the rows of scores are."""

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
        return _error(self.count, *sums, norm).item()


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
    return _error(*_sums_of(probs, labels, num_bins, input), norm).float()


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
    return _bins_from_sums(*_sums_of(probs, labels, num_bins, input))


class CalibrationError(Metric):
    """Calibration error of the predicted classes, from three running sums for each bin; :func:`ece` says what it is.

    Memory does not grow with the data. On a CPU, wrong input is refused by ``update``; on other devices, where looking
    would make the device wait, by ``compute``.

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

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    count: Tensor
    confidence: Tensor
    correct: Tensor
    problems: Tensor

    def __init__(self, num_bins: int = 15, *, norm: Norm = "l1", input: Predictions = "probs") -> None:
        super().__init__()
        _check_options(num_bins, norm, input)
        self.num_bins, self.norm, self.input = num_bins, norm, input
        for name in ("count", "confidence", "correct"):
            self.add_state(name, torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        confidence, correct, problems = _top_label(probs, labels, self.input)
        if problems.device.type != "cpu":
            self.problems = self.problems + problems
        sums = (self.count, self.confidence, self.correct)
        self.count, self.confidence, self.correct = _add_to_bins(sums, confidence, correct)

    def compute(self) -> Tensor:
        """Return the calibration error of all batches, of all processes."""
        _raise_for(self.problems, self.input)
        return _error(self.count, self.confidence, self.correct, self.norm).float()

    def bins(self) -> ReliabilityBins:
        """Return the bins for a diagram, of all processes; with several processes, all of them must call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=not self._is_synced):
            _raise_for(self.problems, self.input)
            return _bins_from_sums(self.count, self.confidence, self.correct)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def with_fallback(tensor: Tensor) -> Tensor:
            try:
                return fn(tensor)
            except TypeError:  # a device without float64, such as mps
                return fn(tensor.float())

        return super()._apply(with_fallback, exclude_state)


def _check_options(num_bins: int, norm: Norm, input: Predictions) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins!r}; 15 is customary")
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
    if input not in get_args(Predictions):
        raise ValueError(f"input must be one of {', '.join(get_args(Predictions))}, got {input!r}")


def _check_form(scores: Tensor, labels: Tensor, input: Predictions) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"{input} must be floating-point, got {scores.dtype}; pass scores, not predicted classes")
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"{input} must have shape (N, C) with at least 2 classes, got {tuple(scores.shape)}; for p = P(class 1) "
            "pass torch.stack([1 - p, p], 1), for dense predictions scores.movedim(1, -1).flatten(0, -2)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer classes, got {labels.dtype}; use labels.argmax(1) or labels.long()")
    if labels.shape != scores.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(scores)},), one class for each row, got {tuple(labels.shape)}; pass class "
            "indices, not one-hot rows"
        )


def _top_label(scores: Tensor, labels: Tensor, input: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Return confidence ``(N,)``, correctness ``(N,)``, and whether the scores and the labels are wrong ``(2,)``.

    On a CPU wrong ones raise; elsewhere finding out would make the device wait.
    """
    _check_form(scores, labels, input)
    scores, labels = scores.detach(), labels.long()
    tolerance = max(1e-3, 2 * torch.finfo(scores.dtype).eps)
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    if len(scores) == 0:
        return scores.new_zeros(0), labels.bool(), labels.new_zeros(2)
    num_classes = scores.shape[1]
    top = scores.amax(1)
    if input == "logits":
        confidence = (scores - top[:, None]).exp_().sum(1).reciprocal_()
        # A row's confidence is at least 1 / C, unless it holds NaN or +infinity.
        bounds, least_allowed, most_allowed = confidence.aminmax(), 0.5 / num_classes, 2.0
        smallest = top.new_zeros(())
    else:
        probs = scores if input == "probs" else scores.exp()
        confidence = top if input == "probs" else top.exp()
        bounds, least_allowed, most_allowed = probs.sum(1).aminmax(), 1 - tolerance, 1 + tolerance
        smallest = probs.amin()
    first, last = labels.aminmax()
    if scores.device.type != "cpu":
        # NaN fails every comparison.
        good_scores = (bounds.min >= least_allowed) & (bounds.max <= most_allowed) & (smallest >= -tolerance)
        good_labels = (first >= 0) & (last < num_classes)
        return confidence, scores.argmax(1) == labels, torch.stack([~good_scores, ~good_labels]).long()
    if not (bounds.min.item() >= least_allowed and bounds.max.item() <= most_allowed and smallest.item() >= -tolerance):
        low, high = (float(bound) for bound in scores.aminmax())
        raise ValueError(f"{_WRONG_SCORES[input]}; found values from {low:g} to {high:g}")
    if not (first.item() >= 0 and last.item() < num_classes):
        raise ValueError(f"{_WRONG_LABELS}; found {int(first)} to {int(last)} for {num_classes} classes")
    # An argmax takes five times as long as looking at the label's own score. Only a tie needs one, and no two classes
    # can share more than half of the probability each.
    correct = scores.gather(1, labels[:, None]).squeeze(1) == top
    tied = (correct & (confidence <= 0.5)).nonzero().squeeze(1)
    if len(tied):
        correct[tied] = scores[tied].argmax(1) == labels[tied]
    return confidence, correct, labels.new_zeros(2)


_WRONG_SCORES = {
    "probs": 'probs must be finite, in [0, 1] and sum to 1 in every row; for raw network outputs pass input="logits"',
    "logits": "logits must not hold NaN or +infinity; drop those rows",
    "log_probs": "log_probs must not hold NaN, and their exponentials must sum to 1 in every row; for raw network "
    'outputs pass input="logits"',
}
_WRONG_LABELS = "labels must lie in [0, C); drop the rows of ignored labels"


def _raise_for(problems: Tensor, input: Predictions) -> None:
    wrong_scores, wrong_labels = problems.tolist()
    if wrong_scores:
        raise ValueError(f"{_WRONG_SCORES[input]}; found in {wrong_scores} of the updates")
    if wrong_labels:
        raise ValueError(f"{_WRONG_LABELS}; found others in {wrong_labels} of the updates")


def _add_to_bins(sums: Sums, confidence: Tensor, correct: Tensor) -> Sums:
    """Add samples to each bin's number of samples, sum of confidences, and number of right predictions."""
    count, confidences, rights = sums
    index = torch.bucketize(confidence, _inner_edges(len(count), confidence.dtype, confidence.device))
    confidence = confidence.to(count.dtype)
    # Not in place: a state that was reset under inference mode could not be written outside of it.
    return (
        count.index_add(0, index, torch.ones_like(confidence)),
        confidences.index_add(0, index, confidence),
        rights.index_add(0, index, correct.to(count.dtype)),
    )


@functools.lru_cache(maxsize=32)
def _inner_edges(num_bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # In the type of the confidences: 0.2 in float32 lies above 0.2 in float64, and belongs to the bin below it.
    return (torch.arange(1, num_bins, dtype=torch.float64) / num_bins).to(device=device, dtype=dtype)


def _sums_of(probs: Tensor, labels: Tensor, num_bins: int, input: Predictions) -> Sums:
    confidence, correct, problems = _top_label(probs, labels, input)
    _raise_for(problems, input)
    dtype = torch.float32 if probs.device.type == "mps" else torch.float64
    zeros = torch.zeros(num_bins, dtype=dtype, device=probs.device)
    return _add_to_bins((zeros, zeros, zeros), confidence, correct)


def _error(count: Tensor, confidence: Tensor, correct: Tensor, norm: Norm) -> Tensor:
    """Return the calibration error from the sums of the bins."""
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
