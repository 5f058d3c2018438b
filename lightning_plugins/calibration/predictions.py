"""What all calibration measures share: checked scores, the confidence in the predicted class, the metrics' base."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = [
    "Predictions",
    "ScoreMetric",
    "accumulator",
    "check_input",
    "check_num_bins",
    "class_probs",
    "label_log_probs",
    "raise_for",
    "top_label",
]

Predictions = Literal["probs", "logits", "log_probs"]
"""What the rows of scores are."""


class ScoreMetric(Metric):
    """Base of the metrics that take scores ``(N, C)`` and true classes ``(N,)``.

    On a CPU, wrong input is refused by ``update``; on other devices, where looking would make the device wait, by
    ``compute``. torchmetrics guesses, batch by batch, whether it got logits; here ``input`` says so.

    Args:
        input: what ``update`` gets: ``"probs"``, ``"logits"`` or ``"log_probs"``.

    Raises:
        ValueError: for another ``input``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    plot_lower_bound = 0.0

    problems: Tensor

    def __init__(self, *, input: Predictions = "probs") -> None:
        super().__init__()
        check_input(input)
        self.input = input
        self.add_state("problems", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def _note(self, problems: Tensor) -> None:
        if problems.device.type != "cpu":  # on a CPU they have been raised
            self.problems = self.problems + problems

    def _raise_for_problems(self) -> None:
        raise_for(self.problems, self.input)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def with_fallback(tensor: Tensor) -> Tensor:
            try:
                return fn(tensor)
            except TypeError:  # a device without float64, such as mps
                return fn(tensor.float())

        return super()._apply(with_fallback, exclude_state)


def accumulator(device: torch.device) -> torch.dtype:
    """Return the widest floating type of a device.

    Example:
        >>> accumulator(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def check_input(input: Predictions) -> None:
    """Refuse an unknown kind of scores.

    Raises:
        ValueError: if ``input`` is none of ``"probs"``, ``"logits"``, ``"log_probs"``.

    Example:
        >>> check_input("logits")
    """
    if input not in get_args(Predictions):
        raise ValueError(f"input must be one of {', '.join(get_args(Predictions))}, got {input!r}")


def check_num_bins(num_bins: int) -> None:
    """Refuse a number of bins below 1.

    Raises:
        ValueError: if ``num_bins`` is below 1.

    Example:
        >>> check_num_bins(15)
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins!r}; 15 is customary")


def top_label(scores: Tensor, labels: Tensor, input: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Return the confidence in each row's first class of largest score, and whether that class is the true one.

    Args:
        scores: ``(N, C)``, of the kind that ``input`` says.
        labels: true classes ``(N,)``.
        input: kind of the scores.

    Returns:
        Confidence ``(N,)``, float32 or float64; correctness ``(N,)``, bool; and int64 ``(2,)``, on devices other than
        a CPU: whether scores and labels are wrong, for :func:`raise_for`.

    Raises:
        TypeError: if ``scores`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong shape; on a CPU also for wrong values.

    Example:
        >>> top_label(torch.tensor([[0.25, 0.75]]), torch.tensor([1]), "probs")
        (tensor([0.7500]), tensor([True]), tensor([0, 0]))
    """
    scores, labels, tolerance = _prepare(scores, labels, input)
    if len(scores) == 0:
        return scores.new_zeros(0), labels.bool(), labels.new_zeros(2)
    if scores.device.type != "cpu":
        predicted = scores.argmax(1)
    elif input == "probs":
        return _top_probability(scores, labels, tolerance)
    else:  # at the size of a batch, numpy finds the first largest score several times as fast
        predicted = torch.from_numpy(scores.numpy().argmax(1))
    top = _of_class(scores, predicted)
    if input == "logits":
        confidence = evidence = (scores - top.unsqueeze(1)).exp_().sum(1).reciprocal_()
    elif input == "probs":
        confidence, evidence = top, scores.sum(1)
    else:
        confidence, evidence = top.exp(), scores.exp().sum(1)
    problems = _check_values(scores, evidence, labels, tolerance, input)
    return confidence, predicted == labels, problems


def _top_probability(probs: Tensor, labels: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Do what :func:`top_label` does, for probabilities on a CPU.

    A search for the place of the largest value mispredicts its branches and costs more than all else; the value alone
    says whether the true class has it. Numpy halves the cost of operations on one number for each row.
    """
    sums, top = probs.sum(1), probs.amax(1)
    rows, classes, total, confidence = probs.numpy(), labels.numpy(), sums.numpy(), top.numpy()
    if not (
        probs.amin().item() >= 0
        and np.minimum.reduce(total) >= 1 - tolerance
        and np.maximum.reduce(total) <= 1 + tolerance
        and np.maximum.reduce(classes.view(np.uint64)) < rows.shape[1]
    ):
        _check_values(probs, sums, labels, tolerance, "probs")  # returns if rounding left numbers just below zero
        return top, torch.from_numpy(rows.argmax(1) == classes), _NO_PROBLEMS
    right = rows[_places(len(rows)), classes] == confidence
    # Another class can have the same probability, and come first, only up to a half.
    unsure = np.flatnonzero(right & (confidence <= 0.5 * (1 + tolerance)))
    if len(unsure):
        right[unsure] = rows[unsure].argmax(1) == classes[unsure]
    return top, torch.from_numpy(right), _NO_PROBLEMS


@functools.lru_cache(maxsize=8)
def _places(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(count)


def class_probs(scores: Tensor, labels: Tensor, input: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities ``(N, C)`` in float32 or float64, int64 labels ``(N,)`` in range, and the problems ``(2,)``.

    Arguments, third result and errors are those of :func:`top_label`.

    Example:
        >>> class_probs(torch.zeros(1, 2), torch.tensor([1]), "logits")
        (tensor([[0.5000, 0.5000]]), tensor([1]), tensor([0, 0]))
    """
    scores, labels, tolerance = _prepare(scores, labels, input)
    probs = scores if input == "probs" else scores.softmax(1) if input == "logits" else scores.exp()
    if len(scores) == 0:
        return probs, labels, labels.new_zeros(2)
    evidence = probs.amax(1) if input == "logits" else probs.sum(1)
    problems = _check_values(scores, evidence, labels, tolerance, input)
    return probs, _in_range(labels, scores.shape[1]), problems


def label_log_probs(scores: Tensor, labels: Tensor, input: Predictions) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each row's label ``(N,)``, and the problems ``(2,)``.

    A probability of zero counts as the smallest normal number of its type, such as 1e-38. Arguments, second result and
    errors are those of :func:`top_label`.

    Example:
        >>> label_log_probs(torch.zeros(1, 2), torch.tensor([1]), "logits")[0]
        tensor([-0.6931])
    """
    scores, labels, tolerance = _prepare(scores, labels, input)
    if len(scores) == 0:
        return scores.new_zeros(0), labels.new_zeros(2)
    if input == "logits":
        log_probs = scores.log_softmax(1)
        evidence = log_probs.amax(1).exp()
    else:
        log_probs = scores
        evidence = (scores if input == "probs" else scores.exp()).sum(1)
    problems = _check_values(scores, evidence, labels, tolerance, input)
    chosen = _of_class(log_probs, _in_range(labels, scores.shape[1]))
    return chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log() if input == "probs" else chosen, problems


def raise_for(problems: Tensor, input: Predictions) -> None:
    """Raise if scores ``problems[0]`` or labels ``problems[1]`` were found wrong in any update.

    Raises:
        ValueError: if so.

    Example:
        >>> raise_for(torch.tensor([0, 0]), "probs")
    """
    wrong_scores, wrong_labels = problems.tolist()
    if wrong_scores:
        raise ValueError(f"{_WRONG_SCORES[input]}; found in {wrong_scores} of the updates")
    if wrong_labels:
        raise ValueError(f"{_WRONG_LABELS}; found others in {wrong_labels} of the updates")


def _prepare(scores: Tensor, labels: Tensor, input: Predictions) -> tuple[Tensor, Tensor, float]:
    """Check types and shapes; return float32 or float64 scores, int64 labels, and how far a row's sum may be from 1."""
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
    if scores.dtype in (torch.float32, torch.float64):
        return scores.detach(), labels.long(), 1e-3
    return scores.detach().float(), labels.long(), max(1e-3, 2 * torch.finfo(scores.dtype).eps)


def _check_values(scores: Tensor, evidence: Tensor, labels: Tensor, tolerance: float, input: Predictions) -> Tensor:
    """Return whether scores and labels are wrong ``(2,)``; on a CPU raise instead.

    ``evidence`` holds a number for each row: of logits the confidence, which is at least 1 / C unless the row holds
    NaN or +infinity; otherwise the sum of the probabilities. NaN fails every comparison.
    """
    num_classes = scores.shape[1]
    least, most = (0.5 / num_classes, 2.0) if input == "logits" else (1 - tolerance, 1 + tolerance)
    low, high = evidence.aminmax()
    first, last = labels.aminmax()
    if scores.device.type != "cpu":
        good_scores = (low >= least) & (high <= most)
        if input == "probs":
            good_scores &= scores.amin() >= -tolerance
        good_labels = (first >= 0) & (last < num_classes)
        return torch.stack([~good_scores, ~good_labels]).long()
    good = low.item() >= least and high.item() <= most and (input != "probs" or scores.amin().item() >= -tolerance)
    if not good:
        low, high = scores.aminmax()
        raise ValueError(f"{_WRONG_SCORES[input]}; found values from {low.item():g} to {high.item():g}")
    if not (first.item() >= 0 and last.item() < num_classes):
        raise ValueError(f"{_WRONG_LABELS}; found {first.item()} to {last.item()} for {num_classes} classes")
    return _NO_PROBLEMS


def _of_class(scores: Tensor, classes: Tensor) -> Tensor:
    return scores.gather(1, classes.unsqueeze(1)).squeeze(1)


def _in_range(labels: Tensor, num_classes: int) -> Tensor:
    # Wrong labels are reported later on a device, where one would end the process if it were used as an index.
    return labels if labels.device.type == "cpu" else labels.clamp(0, num_classes - 1)


_NO_PROBLEMS = torch.zeros(2, dtype=torch.long)
_WRONG_SCORES = {
    "probs": 'probs must be finite, in [0, 1] and sum to 1 in every row; for raw network outputs pass input="logits"',
    "logits": "logits must not hold NaN or +infinity; drop those rows",
    "log_probs": "log_probs must not hold NaN, and their exponentials must sum to 1 in every row; for raw network "
    'outputs pass input="logits"',
}
_WRONG_LABELS = "labels must lie in [0, C); drop the rows of ignored labels"
