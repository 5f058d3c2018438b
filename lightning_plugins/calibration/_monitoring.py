"""Running sums for several calibration measures at once, group by group, and bands for a reliability diagram."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_plugins.calibration.metrics import ReliabilityBins

__all__ = ["CalibrationSums", "accuracy_bands"]


class CalibrationSums:
    """All sums over samples from which NLL, Brier score, binned and class-wise errors, of groups too, are computed.

    Args:
        num_bins: equal-width bins ``(lo, hi]``, at least 1.

    Example:
        >>> sums = CalibrationSums(num_bins=4)
        >>> log_probs = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()
        >>> sums.update(log_probs, torch.tensor([0, 0]), torch.tensor([0, 1]))
        >>> {name: round(value, 4) for name, value in sums.metrics().items()}["ece"]
        0.25
        >>> [round(value, 4) for value in sums.group_errors().tolist()]
        [0.25, 0.75]
    """

    def __init__(self, num_bins: int = 15) -> None:
        self.num_bins = num_bins
        self.totals = torch.zeros(3, dtype=torch.float64)  # samples, NLL, Brier score
        self.bins = torch.zeros(0, 3, num_bins, dtype=torch.float64)  # of groups: count, confidence, right ones
        self.classes = torch.zeros(0, num_bins, dtype=torch.float64)  # of classes: sum of p - y

    def update(self, log_probs: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        """Add samples.

        Args:
            log_probs: ``(n, C)`` on any device.
            labels: true classes ``(n,)``.
            groups: ``(n,)`` integers from 0; default all in group 0.
        """
        num_samples, num_classes = log_probs.shape
        if num_samples == 0:
            return
        groups = torch.zeros_like(labels) if groups is None else groups
        index, probs = labels[:, None], log_probs.exp()
        top, predicted = probs.max(1)
        nll = -log_probs.gather(1, index).sum(dtype=torch.float64)
        brier = (probs**2).sum(dtype=torch.float64) + num_samples - 2 * probs.gather(1, index).sum(dtype=torch.float64)
        self.totals += torch.stack([torch.full_like(nll, num_samples), nll, brier]).cpu()

        self.bins = _grown(self.bins, int(groups.max()) + 1)
        cells = groups * self.num_bins + self._bin(top)
        right = (predicted == labels).double()
        size = len(self.bins) * self.num_bins
        sums = [torch.bincount(cells, weight, size) for weight in (torch.ones_like(right), top.double(), right)]
        self.bins += torch.stack(sums).view(3, -1, self.num_bins).transpose(0, 1).cpu()

        self.classes = _grown(self.classes, num_classes)
        cells = self._bin(probs) + self.num_bins * torch.arange(num_classes, device=probs.device)
        residuals = probs.double().scatter_add(1, index, torch.full_like(index, -1, dtype=torch.float64))
        self.classes += (
            torch.bincount(cells.flatten(), residuals.flatten(), num_classes * self.num_bins)
            .view(num_classes, -1)
            .cpu()
        )

    def grow(self, num_groups: int, num_classes: int) -> None:
        """Make room for groups and classes that other processes have seen."""
        self.bins, self.classes = _grown(self.bins, num_groups), _grown(self.classes, num_classes)

    def metrics(self) -> dict[str, float]:
        """Return ``nll``, ``brier``, ``ece``, ``mce``, ``classwise_ece``; NaN without samples."""
        count, nll, brier = self.totals.tolist()
        if not count:
            return dict.fromkeys(("nll", "brier", "ece", "mce", "classwise_ece"), float("nan"))
        bins = self.reliability_bins()
        return {
            "nll": nll / count,
            "brier": brier / count,
            "ece": bins.error("l1"),
            "mce": bins.error("max"),
            "classwise_ece": self.classes.abs().sum().item() / (count * len(self.classes)),
        }

    def group_errors(self) -> Tensor:
        """Return the ECE within each group, ``(G,)``; NaN for one without samples."""
        count, confidence, right = self.bins.unbind(1)
        return (confidence - right).abs().sum(1) / count.sum(1)

    def reliability_bins(self) -> ReliabilityBins:
        """Return the bins of all samples together."""
        count, confidence, right = self.bins.sum(0)
        edges = torch.arange(self.num_bins + 1, dtype=torch.float64) / self.num_bins
        return ReliabilityBins(edges=edges, count=count, confidence=confidence / count, accuracy=right / count)

    def _bin(self, probs: Tensor) -> Tensor:
        edges = (torch.arange(1, self.num_bins, dtype=torch.float64) / self.num_bins).to(probs)
        return torch.bucketize(probs, edges)


def _grown(sums: Tensor, length: int) -> Tensor:
    missing = length - len(sums)
    return sums if missing <= 0 else torch.cat([sums, sums.new_zeros(missing, *sums.shape[1:])])


def accuracy_bands(
    bins: ReliabilityBins,
    method: Literal["binomial", "bootstrap"] = "binomial",
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return bounds between which the accuracy of each bin may lie, ``(B,)`` each; NaN for empty bins.

    Args:
        bins: of a reliability diagram.
        method: ``"binomial"`` (Wilson's score interval) or ``"bootstrap"`` (quantiles over resampled data sets).
        level: coverage in (0, 1).
        num_resamples: of the bootstrap.
        seed: of the bootstrap's private generator.

    Example:
        >>> half = torch.tensor([0.5])
        >>> low, high = accuracy_bands(ReliabilityBins(torch.tensor([0.0, 1.0]), torch.tensor([100.0]), half, half))
        >>> round(low.item(), 3), round(high.item(), 3)
        (0.404, 0.596)

    Reference:
        E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927.
    """
    count, accuracy = bins.count.double(), bins.accuracy.double()
    if method == "binomial":
        z = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))
        middle = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
        half = z / (1 + z**2 / count) * (accuracy * (1 - accuracy) / count + z**2 / (4 * count**2)).sqrt()
        empty = count == 0
        return (middle - half).masked_fill(empty, torch.nan), (middle + half).masked_fill(empty, torch.nan)
    right = (accuracy * count).nan_to_num().round()
    cells = torch.cat([right, count - right]).clamp_min(0).numpy()
    total = int(cells.sum())
    if total == 0:
        return torch.full_like(count, torch.nan), torch.full_like(count, torch.nan)
    # Drawing samples with replacement is drawing how many fall into each bin, right and wrong.
    drawn = np.random.default_rng(seed).multinomial(total, cells / cells.sum(), size=num_resamples)
    rights, wrongs = torch.from_numpy(drawn).double().chunk(2, dim=1)
    shares = rights / (rights + wrongs)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = shares.nanquantile(tails, dim=0)
    return low, high
