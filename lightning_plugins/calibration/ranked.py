"""Measures that need the predictions in order of their confidence, all from one sort.

torchmetrics has none of these. Samples of equal confidence share their mean correctness, which makes every value
independent of the order of the samples: a cumulative sum is then linear inside such a group, so that its extreme is at
the group's end, and a risk is the mean over all orders of the group. The metrics are in ``ranked_metrics``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.calibration.predictions import Predictions, check_input, check_num_bins, raise_for, top_label
from lightning_plugins.checks import check_types

__all__ = [
    "Ranked",
    "aurc",
    "debiased_ece",
    "eaurc",
    "equal_mass_ece",
    "ks_error",
    "rank",
    "ranked_predictions",
    "share_ties",
    "sweep_ece",
]


class Ranked(NamedTuple):
    """Predictions in ascending order of confidence, float64.

    Args:
        confidence: ``(N,)`` in [0, 1].
        correct: ``(N,)``, 1 for right and 0 for wrong, or the mean of those over samples of equal confidence.

    Example:
        >>> Ranked(torch.tensor([0.5, 0.9]), torch.tensor([0.0, 1.0])).correct
        tensor([0., 1.])
    """

    confidence: Tensor
    correct: Tensor


def rank(confidence: Tensor, correct: Tensor) -> Ranked:
    """Sort by confidence and let samples of equal confidence share their mean correctness.

    Args:
        confidence: ``(N,)``, any floating type.
        correct: ``(N,)``, bool or number.

    Example:
        >>> rank(torch.tensor([0.9, 0.6, 0.9]), torch.tensor([True, True, False])).correct
        tensor([1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    if confidence.device.type == "mps":  # has no float64
        confidence, correct = confidence.cpu(), correct.cpu()
    confidence, order = confidence.sort()
    return share_ties(confidence.double(), correct[order].double())


def share_ties(confidence: Tensor, correct: Tensor) -> Ranked:
    """Let neighbours of equal confidence share their mean correctness.

    Example:
        >>> share_ties(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])).correct
        tensor([0.5000, 0.5000])
    """
    _, group, count = torch.unique_consecutive(confidence, return_inverse=True, return_counts=True)
    if len(count) < len(confidence):
        correct = (correct.new_zeros(len(count)).index_add_(0, group, correct) / count)[group]
    return Ranked(confidence, correct)


def ranked_predictions(probs: Tensor, labels: Tensor, *, input: Predictions = "probs") -> Ranked:
    """Return the predictions in order of confidence, for several measures from one sort.

    Arguments and errors are those of :func:`ks_error`.

    Example:
        >>> ranked_predictions(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0])).correct
        tensor([0., 1.], dtype=torch.float64)
    """
    check_input(input)
    confidence, correct, problems = top_label(probs, labels, input)
    raise_for(problems, input)
    return rank(confidence, correct)


@check_types
def equal_mass_ece(probs: Tensor, labels: Tensor, *, num_bins: int = 15, input: Predictions = "probs") -> Tensor:
    """Return the calibration error in bins that hold equally many samples ("adaptive" ECE).

    The sorted samples are cut by position as ``torch.tensor_split`` does.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        num_bins: at least 1; with fewer samples, bins stay empty.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1]; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
        >>> equal_mass_ece(probs, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]))
        tensor(0.3000)

    Reference:
        K. Nguyen, B. O'Connor, "Posterior calibration and exploratory analysis for natural language processing models",
        EMNLP 2015.
    """
    check_num_bins(num_bins)
    return equal_mass_value(ranked_predictions(probs, labels, input=input), num_bins).float()


@check_types
def debiased_ece(probs: Tensor, labels: Tensor, *, num_bins: int = 15, input: Predictions = "probs") -> Tensor:
    r"""Return the equal-mass calibration error less an estimate of what sampling adds to it.

    With gap :math:`\mu_b` and standard error :math:`s_b` of the accuracy in a bin, labels drawn anew would give on
    average the mean of a folded normal distribution, :math:`R_b = E|N(\mu_b, s_b^2)|`; the result is
    :math:`\sum_b \frac{n_b}{N} (2 |\mu_b| - R_b)`. It removes a part of the bias only, and may be a little below 0.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        num_bins: at least 1; fewer are used if they would hold less than two samples each.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar, at most 1; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
        >>> debiased_ece(probs, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]), num_bins=1)
        tensor(0.2969)

    Reference:
        A. Kumar, P. Liang, T. Ma, "Verified Uncertainty Calibration", NeurIPS 2019, for the idea.
    """
    check_num_bins(num_bins)
    return debiased_value(ranked_predictions(probs, labels, input=input), num_bins).float()


@check_types
def sweep_ece(probs: Tensor, labels: Tensor, *, input: Predictions = "probs") -> Tensor:
    """Return the equal-mass calibration error with as many bins as keep the accuracies in order.

    The number of bins grows from 1 until the accuracy of some bin is below that of the bin before.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1]; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]])
        >>> sweep_ece(probs, torch.tensor([1, 0, 0]))  # accuracies 0, 1, 1 of three bins
        tensor(0.3667)

    Reference:
        R. Roelofs, N. Cain, J. Shlens, M. Mozer, "Mitigating Bias in Calibration Error Estimation", AISTATS 2022.
    """
    return sweep_value(ranked_predictions(probs, labels, input=input)).float()


@check_types
def ks_error(probs: Tensor, labels: Tensor, *, input: Predictions = "probs") -> Tensor:
    r"""Return the largest gap between the cumulative confidence and the cumulative accuracy: no bins, nothing to tune.

    :math:`\max_t \frac{1}{N} |\sum_{i: c_i \le t} (c_i - a_i)|`. The sum is read at the ends of groups of equal
    confidence; the authors' code reads it at every sample, so that its result depends on their order.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1]; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
        >>> ks_error(probs, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]))
        tensor(0.3000)

    Reference:
        K. Gupta, A. Rahimi, T. Ajanthan, T. Mensink, C. Sminchisescu, R. Hartley, "Calibration of Neural Networks using
        Splines", ICLR 2021, section 3.
    """
    return ks_value(ranked_predictions(probs, labels, input=input)).float()


@check_types
def aurc(probs: Tensor, labels: Tensor, *, input: Predictions = "probs") -> Tensor:
    """Return the area under the risk-coverage curve: the mean error rate of the k most confident samples, over all k.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 1]; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> aurc(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))  # error rates 0 and 1 / 2
        tensor(0.2500)

    Reference:
        Y. Geifman, G. Uziel, R. El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019.
    """
    return aurc_value(ranked_predictions(probs, labels, input=input)).float()


@check_types
def eaurc(probs: Tensor, labels: Tensor, *, input: Predictions = "probs") -> Tensor:
    """Return :func:`aurc` less its value if all right predictions were more confident than all wrong ones.

    Arguments, result, errors and reference are those of :func:`aurc`.

    Example:
        >>> eaurc(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([1, 0]))  # 1 and 1 / 2 against 0 and 1 / 2
        tensor(0.5000)
    """
    return aurc_value(ranked_predictions(probs, labels, input=input), excess=True).float()


def equal_mass_value(ranked: Ranked, num_bins: int) -> Tensor:
    """Compute :func:`equal_mass_ece` of ranked predictions."""
    gaps = _bin_sums(ranked.confidence - ranked.correct, num_bins)[0]
    return gaps.abs().sum() / len(ranked.correct)


def debiased_value(ranked: Ranked, num_bins: int) -> Tensor:
    """Compute :func:`debiased_ece` of ranked predictions."""
    num_bins = min(num_bins, max(1, len(ranked.correct) // 2))
    gaps, size = _bin_sums(ranked.correct - ranked.confidence, num_bins)
    accuracy = _bin_sums(ranked.correct, num_bins)[0] / size
    mean = gaps / size
    deviation = (accuracy * (1 - accuracy)).clamp_min(0).div(size).sqrt()
    ratio = mean / deviation.clamp_min(1e-150)
    folded = deviation * math.sqrt(2 / math.pi) * (-ratio.square() / 2).exp() + mean * torch.erf(ratio / math.sqrt(2))
    return ((2 * mean.abs() - folded) * size).sum() / len(ranked.correct)


def sweep_value(ranked: Ranked) -> Tensor:
    """Compute :func:`sweep_ece` of ranked predictions."""
    num_samples = len(ranked.correct)
    if bool((ranked.correct.diff() >= 0).all()):  # in order with any number of bins
        return equal_mass_value(ranked, max(1, num_samples))
    num_bins = 1
    while num_bins < num_samples:
        rights, size = _bin_sums(ranked.correct, num_bins + 1)
        # Means that are equal may differ by the rounding of the sums.
        if bool(((rights / size).diff() < -1e-9).any()):
            break
        num_bins += 1
    return equal_mass_value(ranked, num_bins)


def ks_value(ranked: Ranked) -> Tensor:
    """Compute :func:`ks_error` of ranked predictions."""
    gaps = (ranked.confidence - ranked.correct).cumsum(0).abs() / len(ranked.correct)
    return gaps.amax() if len(gaps) else gaps.sum() / 0


def aurc_value(ranked: Ranked, excess: bool = False) -> Tensor:
    """Compute :func:`aurc` or :func:`eaurc` of ranked predictions."""
    errors = 1 - ranked.correct.flip(0)
    covered = torch.arange(1, len(errors) + 1, dtype=errors.dtype, device=errors.device)
    risk = (errors.cumsum(0) / covered).mean()
    if not excess:
        return risk
    num_right = len(errors) - errors.sum().round()
    return risk - ((covered - num_right).clamp_min(0) / covered).mean()


def _bin_sums(values: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Return sum and number of the values in each of the parts that ``tensor_split`` makes."""
    each, more = divmod(len(values), num_bins)
    size = torch.full((num_bins,), each, dtype=torch.long, device=values.device)
    size[:more] += 1
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return total[torch.cat([size.new_zeros(1), size.cumsum(0)])].diff(), size
