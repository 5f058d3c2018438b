"""Proper scores and their parts: negative log-likelihood, Brier score, and the distance to known posteriors.

torchmetrics has neither a Brier score nor a log-likelihood of classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.calibration.metrics import bin_index
from lightning_plugins.calibration.predictions import (
    Predictions,
    ScoreMetric,
    accumulator,
    check_input,
    check_num_bins,
    class_probs,
    label_log_probs,
    raise_for,
)
from lightning_plugins.calibration.temperature import fit_temperature
from lightning_plugins.checks import check_types

__all__ = [
    "BrierDecomposition",
    "BrierScore",
    "NegativeLogLikelihood",
    "NllDecomposition",
    "brier",
    "brier_decomposition",
    "calibration_refinement_nll",
    "l1_to_posterior",
    "nll",
]


class BrierDecomposition(NamedTuple):
    """The five terms of the Brier score, float64 scalars; see :func:`brier_decomposition`.

    Args:
        reliability: squared gaps between mean probability and frequency of the bins; 0 if calibrated.
        resolution: how far the bins' frequencies are from the base rates; higher is better.
        uncertainty: variance of the labels.
        within_bin_variance: of the probabilities.
        within_bin_covariance: of probabilities and labels.

    Example:
        >>> one, zero = torch.ones(()), torch.zeros(())
        >>> BrierDecomposition(zero, zero, one, zero, zero).brier
        tensor(1.)
    """

    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within_bin_variance: Tensor
    within_bin_covariance: Tensor

    @property
    def brier(self) -> Tensor:
        """The Brier score that the terms add up to."""
        within = self.within_bin_variance - 2 * self.within_bin_covariance
        return self.reliability - self.resolution + self.uncertainty + within


class NllDecomposition(NamedTuple):
    """The two parts of the negative log-likelihood, float32 scalars in nats; see :func:`calibration_refinement_nll`.

    Args:
        calibration: the part that temperature scaling removes.
        refinement: the rest.

    Example:
        >>> NllDecomposition(torch.tensor(0.25), torch.tensor(0.5)).refinement
        tensor(0.5000)
    """

    calibration: Tensor
    refinement: Tensor


@check_types
def nll(probs: Tensor, labels: Tensor, *, input: Predictions = "probs") -> Tensor:
    """Return the mean negative log-likelihood of the true classes, in nats.

    From logits it is exact however confident they are. A probability of 0 counts as the smallest normal number of its
    type: 87 nats in float32.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar, at least 0; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> nll(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor(0.6931)
    """
    return nll_of_rows(probs, labels, input).mean().float()


@check_types
def brier(probs: Tensor, labels: Tensor, *, input: Predictions = "probs") -> Tensor:
    r"""Return the Brier score :math:`\frac{1}{N} \sum_i \sum_c (p_{ic} - 1[y_i = c])^2`, summed over all classes.

    Arguments and errors are those of :func:`nll`. Two classes give twice scikit-learn's ``brier_score_loss``.

    Returns:
        A float32 scalar in [0, 2]; NaN without samples.

    Example:
        >>> brier(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        tensor(0.1250)

    Reference:
        G. W. Brier, "Verification of forecasts expressed in terms of probability", 1950.
    """
    return brier_of_rows(probs, labels, input).mean().float()


@check_types
def brier_decomposition(
    probs: Tensor, labels: Tensor, *, num_bins: int = 15, input: Predictions = "probs"
) -> BrierDecomposition:
    """Split the Brier score into five terms, each class against the rest in equal-width bins, summed over the classes.

    The familiar three terms add up to the score only if all probabilities of a bin are equal; with the two terms
    within the bins the identity is exact.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says; at least 1 row.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        num_bins: at least 1.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        Five float64 scalars; NaN without samples.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, or NaN.

    Example:
        >>> parts = brier_decomposition(torch.tensor([[0.75, 0.25]]).repeat(4, 1), torch.tensor([0, 0, 1, 1]))
        >>> parts.reliability.item(), parts.resolution.item(), parts.uncertainty.item(), parts.brier.item()
        (0.125, 0.0, 0.5, 0.625)

    Reference:
        D. B. Stephenson, C. A. S. Coelho, I. T. Jolliffe, "Two Extra Components in the Brier Score Decomposition",
        2008.
    """
    check_num_bins(num_bins)
    checked, labels = _checked(probs, labels, input)
    num_samples, num_classes = checked.shape
    wide = accumulator(checked.device)
    offset = torch.arange(num_classes, device=labels.device) * num_bins
    index = (bin_index(checked, num_bins) + offset).flatten()
    p = checked.to(wide)
    y = torch.nn.functional.one_hot(labels, num_classes).to(wide)
    zeros = torch.zeros(num_classes * num_bins, dtype=wide, device=p.device)
    count, mean_p, mean_y = (zeros.index_add(0, index, v.flatten()) for v in (torch.ones_like(p), p, y))
    mean_p, mean_y = mean_p / count.clamp_min(1), mean_y / count.clamp_min(1)
    rate = y.mean(0)
    off_p, off_y = p - mean_p[index].view_as(p), y - mean_y[index].view_as(y)
    return BrierDecomposition(
        reliability=(count * (mean_p - mean_y).square()).sum() / num_samples,
        resolution=(count * (mean_y - rate.repeat_interleave(num_bins)).square()).sum() / num_samples,
        uncertainty=(rate * (1 - rate)).sum(),
        within_bin_variance=off_p.square().sum() / num_samples,
        within_bin_covariance=(off_p * off_y).sum() / num_samples,
    )


@check_types
def calibration_refinement_nll(
    probs: Tensor, labels: Tensor, *, num_folds: int | None = None, input: Predictions = "probs"
) -> NllDecomposition:
    """Split the negative log-likelihood into what temperature scaling removes and the rest.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says; at least 1 row.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        num_folds: at least 2: each of that many parts (every ``num_folds``-th row) gets the temperature of the others,
            and ``calibration`` may be a little below 0. By default one temperature is fitted to all rows.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, a label outside ``[0, C)``, rows that are no probabilities, infinite
            logits, or NaN.

    Warns:
        UserWarning: if the best temperature is at a bound of :func:`fit_temperature`.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])
        >>> calibration_refinement_nll(logits, torch.tensor([0, 0, 1, 1]), input="logits").refinement  # 3 of 4 right
        tensor(0.5623)
    """
    before = nll(probs, labels, input=input)
    if num_folds is not None and not 2 <= num_folds <= len(labels):
        raise ValueError(f"num_folds must lie in [2, {len(labels)}], the number of rows, got {num_folds!r}")
    logits = probs.detach()
    if input == "probs":
        logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
    logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if num_folds is None:
        after = nll(logits / fit_temperature(logits, labels), labels, input="logits")
    else:
        fold = torch.arange(len(labels), device=labels.device) % num_folds
        total = logits.new_zeros(())
        for k in range(num_folds):
            inside, outside = fold == k, fold != k
            temperature = fit_temperature(logits[outside], labels[outside])
            total = total + nll(logits[inside] / temperature, labels[inside], input="logits") * inside.sum()
        after = (total / len(labels)).float()
    return NllDecomposition(calibration=before - after, refinement=after)


@check_types
def l1_to_posterior(probs: Tensor, posterior: Tensor, *, input: Predictions = "probs") -> Tensor:
    """Return the mean L1 distance between predicted and true class probabilities, where those are known.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says.
        posterior: true probabilities ``(N, C)``, such as shares of human votes.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        A float32 scalar in [0, 2]; NaN without samples.

    Raises:
        TypeError: if ``probs`` or ``posterior`` are not floating-point.
        ValueError: for a wrong argument or shape, rows that are no probabilities, or NaN.

    Example:
        >>> l1_to_posterior(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.6, 0.4]]))
        tensor(0.6000)
    """
    if posterior.shape != probs.shape:
        raise ValueError(f"posterior must have the shape of probs, {tuple(probs.shape)}, got {tuple(posterior.shape)}")
    unused = torch.zeros(probs.shape[:1], dtype=torch.long, device=probs.device)
    first, second = _checked(probs, unused, input)[0], _checked(posterior, unused, "probs")[0]
    return (first - second).abs().sum(1, dtype=accumulator(probs.device)).mean().float()


def nll_of_rows(probs: Tensor, labels: Tensor, input: Predictions) -> Tensor:
    """Return the negative log-likelihood of each row ``(N,)``, float64."""
    check_input(input)
    log_probs, problems = label_log_probs(probs, labels, input)
    raise_for(problems, input)
    return -log_probs.to(accumulator(probs.device))


def brier_of_rows(probs: Tensor, labels: Tensor, input: Predictions) -> Tensor:
    """Return the Brier score of each row ``(N,)``, float64."""
    return _squared_distance(*_checked(probs, labels, input))


def _checked(probs: Tensor, labels: Tensor, input: Predictions) -> tuple[Tensor, Tensor]:
    check_input(input)
    checked, labels, problems = class_probs(probs, labels, input)
    raise_for(problems, input)
    return checked, labels


def _squared_distance(probs: Tensor, labels: Tensor) -> Tensor:
    wide = probs.to(accumulator(probs.device))
    own = wide.gather(1, labels.unsqueeze(1)).squeeze(1)
    return wide.square().sum(1) - 2 * own + 1


class _MeanOfRows(ScoreMetric):
    total: Tensor
    count: Tensor

    @check_types
    def __init__(self, *, input: Predictions = "probs") -> None:
        super().__init__(input=input)
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, problems: Tensor) -> None:
        self._note(problems)
        self.total = self.total + values.sum(dtype=self.total.dtype)
        self.count = self.count + len(values)

    def compute(self) -> Tensor:
        """Return the mean over all batches, of all processes; NaN without samples."""
        self._raise_for_problems()
        return (self.total / self.count).float()


class NegativeLogLikelihood(_MeanOfRows):
    """Mean negative log-likelihood of the true classes, in nats; see :func:`nll`. Two numbers of state.

    Args:
        input: what ``update`` gets: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Example:
        >>> NegativeLogLikelihood(input="logits")(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        tensor(1.3863)
    """

    @check_types
    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        log_probs, problems = label_log_probs(probs, labels, self.input)
        self._add(-log_probs, problems)


class BrierScore(_MeanOfRows):
    """Brier score summed over the classes, in [0, 2]; see :func:`brier`. Two numbers of state.

    Args:
        input: what ``update`` gets: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Example:
        >>> BrierScore()(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        tensor(0.1250)
    """

    plot_upper_bound = 2.0

    @check_types
    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        checked, labels, problems = class_probs(probs, labels, self.input)
        self._add(_squared_distance(checked, labels), problems)
