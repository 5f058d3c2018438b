"""How sure a calibration measure is: bootstrap intervals for any of them, and a report of the most used ones.

torchmetrics' ``BootStrapper`` keeps a copy of a metric for each resample; here one pass over the scores serves all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.calibration.metrics import add_to_bins, bin_index, error_of_bins
from lightning_plugins.calibration.predictions import Predictions, check_num_bins, class_probs, raise_for, top_label
from lightning_plugins.calibration.ranked import debiased_value, equal_mass_value, ks_value, share_ties
from lightning_plugins.calibration.scoring import brier_of_rows, nll_of_rows
from lightning_plugins.calibration.smooth import smooth_value
from lightning_plugins.checks import check_types

__all__ = ["Estimate", "bootstrap_interval", "calibration_report"]

_FEW_SAMPLES = 20_000


class Estimate(NamedTuple):
    """A measured value with an interval.

    Args:
        value: of all samples.
        low: lower end; None without interval.
        high: upper end; None without interval.

    Example:
        >>> Estimate(0.25).low is None
        True
    """

    value: float
    low: float | None = None
    high: float | None = None


@check_types
def bootstrap_interval(
    metric_fn: Callable[[Tensor, Tensor], Tensor],
    probs: Tensor,
    labels: Tensor,
    *,
    num_samples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return a measure and its interval over resamples of the rows.

    The interval holds the percentiles of the resamples, shifted so that their mean is the measure: a calibration error
    grows with the noise of a resample, and that is no reason why the measure itself should lie outside. It is the
    interval of the measure as it is defined, floor by sampling noise included; the error of infinitely many samples
    may be smaller.

    Args:
        metric_fn: takes scores and labels, returns a scalar.
        probs: ``(N, C)``, whatever ``metric_fn`` takes; at least 1 row.
        labels: ``(N,)``.
        num_samples: resamples, at least 2.
        level: share of the resamples inside the interval, in (0, 1).
        seed: of the resamples; the global generator is left alone.

    Raises:
        ValueError: for a wrong argument, another number of labels than rows, or none.

    Example:
        >>> from lightning_plugins.calibration import ece
        >>> probs, labels = torch.tensor([[0.9, 0.1]]).repeat(10, 1), torch.tensor([0] * 6 + [1] * 4)
        >>> estimate = bootstrap_interval(ece, probs, labels)
        >>> round(estimate.value, 4), estimate.low < estimate.value < estimate.high
        (0.3, True)
    """
    if not (probs.ndim and labels.ndim and len(probs) == len(labels)):
        raise ValueError(
            f"probs and labels must have one row for each sample, got {tuple(probs.shape)} and {tuple(labels.shape)}"
        )
    _check_options(num_samples, level, len(labels))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_samples):
        rows = torch.randint(len(labels), (len(labels),), generator=generator).to(probs.device)
        values.append(float(metric_fn(probs[rows], labels[rows])))
    value = float(metric_fn(probs, labels))
    return Estimate(value, *_ends(value, values, level))


@check_types
def calibration_report(
    probs: Tensor,
    labels: Tensor,
    *,
    num_bins: int = 15,
    num_bootstrap: int | None = None,
    level: float = 0.95,
    seed: int = 0,
    input: Predictions = "probs",
) -> dict[str, Estimate]:
    """Return the most used measures of a classifier's probabilities, with bootstrap intervals.

    Args:
        probs: ``(N, C)`` probabilities, or what ``input`` says; at least 1 row.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        num_bins: of the binned errors, at least 1.
        num_bootstrap: resamples, at least 2, or 0 for no intervals. By default 200 below 20,000 rows, where sampling
            noise is as large as what calibration changes, otherwise 0.
        level: share of the resamples inside an interval, in (0, 1).
        seed: of the resamples; the global generator is left alone.
        input: ``"probs"``, ``"logits"`` or ``"log_probs"``; never guessed.

    Returns:
        Estimates under ``nll``, ``brier``, ``accuracy``, ``ece``, ``equal_mass_ece``, ``classwise_ece`` (mean),
        ``ks_error``, ``smooth_ece`` and ``debiased_ece``; see the functions of these names.

    Raises:
        TypeError: if ``probs`` are not floating-point or ``labels`` not integers.
        ValueError: for a wrong argument or shape, no rows, a label outside ``[0, C)``, rows that are no
            probabilities, or NaN.

    Example:
        >>> report = calibration_report(torch.tensor([[0.9, 0.1]]).repeat(10, 1), torch.tensor([0] * 6 + [1] * 4))
        >>> {name: round(report[name].value, 2) for name in ("accuracy", "ece", "ks_error", "brier")}
        {'accuracy': 0.6, 'ece': 0.3, 'ks_error': 0.3, 'brier': 0.66}
    """
    check_num_bins(num_bins)
    if num_bootstrap is None:
        num_bootstrap = 200 if len(labels) < _FEW_SAMPLES else 0
    _check_options(num_bootstrap or 2, level, len(labels))
    rows = _Rows(probs, labels, num_bins, input)
    values = rows.measure(None)
    if num_bootstrap == 0:
        return {name: Estimate(value) for name, value in values.items()}
    generator = torch.Generator().manual_seed(seed)
    resampled: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(num_bootstrap):
        drawn = torch.randint(rows.num_rows, (rows.num_rows,), generator=generator)
        for name, value in rows.measure(drawn.bincount(minlength=rows.num_rows)).items():
            resampled[name].append(value)
    return {name: Estimate(value, *_ends(value, resampled[name], level)) for name, value in values.items()}


class _Rows:
    """What the measures need of each row, in order of confidence, so that a resample needs no sort."""

    def __init__(self, probs: Tensor, labels: Tensor, num_bins: int, input: Predictions) -> None:
        nll, brier = nll_of_rows(probs, labels, input), brier_of_rows(probs, labels, input)
        confidence, correct, problems = top_label(probs, labels, input)
        raise_for(problems, input)
        checked, labels, _ = class_probs(probs, labels, input)
        self.num_rows, self.num_classes = checked.shape
        self.num_bins = num_bins
        order = confidence.cpu().sort()[1]
        # Scalar work: a device would spend its time on starting it.
        nll, brier, confidence, correct, checked, labels = (
            part.cpu()[order] for part in (nll, brier, confidence, correct, checked, labels)
        )
        self.confidence = confidence
        self.columns = torch.stack([nll.double(), brier.double(), correct.double()])
        self.bins = (bin_index(checked, num_bins) + torch.arange(self.num_classes) * num_bins).int()
        self.gaps = checked.double()
        self.gaps[torch.arange(self.num_rows), labels] -= 1

    def measure(self, counts: Tensor | None) -> dict[str, float]:
        """Return all measures; ``counts`` ``(N,)`` says how often a row was drawn."""
        confidence, columns, gaps = self.confidence, self.columns, self.gaps
        if counts is not None:
            confidence, columns = confidence.repeat_interleave(counts), columns.repeat_interleave(counts, 1)
            gaps = gaps * counts.unsqueeze(1)
        nll, brier, accuracy = columns.mean(1).tolist()
        correct = columns[2]
        zeros = torch.zeros(self.num_bins, dtype=torch.float64)
        ranked = share_ties(confidence.double(), correct)
        classwise = torch.bincount(self.bins.flatten(), gaps.flatten(), self.num_classes * self.num_bins)
        return {
            "nll": nll,
            "brier": brier,
            "accuracy": accuracy,
            "ece": error_of_bins(*add_to_bins((zeros, zeros, zeros), confidence, correct), "l1").item(),
            "equal_mass_ece": equal_mass_value(ranked, self.num_bins).item(),
            "classwise_ece": classwise.abs().sum().item() / self.num_rows / self.num_classes,
            "ks_error": ks_value(ranked).item(),
            "smooth_ece": smooth_value(ranked).item(),
            "debiased_ece": debiased_value(ranked, self.num_bins).item(),
        }


def _check_options(num_samples: int, level: float, num_rows: int) -> None:
    if num_samples < 2:
        raise ValueError(f"an interval needs at least 2 resamples, got {num_samples!r}; 200 is customary")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level!r}; 0.95 is customary")
    if num_rows < 1:
        raise ValueError("there are no rows to resample; pass at least one sample")


def _ends(value: float, resampled: list[float], level: float) -> tuple[float, float]:
    """Return the ends of the interval: percentiles of the resamples, shifted so that their mean is the value."""
    values = torch.tensor(resampled, dtype=torch.float64)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (values.quantile(tails) - values.mean() + value).tolist()
    # What is never negative keeps to that.
    return (max(low, 0.0) if bool((values >= 0).all()) else low), high
