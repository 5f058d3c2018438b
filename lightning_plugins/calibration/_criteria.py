"""What decides between fitted calibrators: a few numbers of log-probabilities and labels, lower is better."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.calibration.metrics import ece

__all__ = ["criterion_of"]


def criterion_of(log_probs: Tensor, labels: Tensor, name: str) -> float:
    """Return one of ``nll``, ``brier``, ``ece``, ``debiased_ece``, ``classwise_ece``, ``equal_mass_ece``, ``ks``.

    Args:
        log_probs: ``(N, C)``.
        labels: true classes ``(N,)``.
        name: which one.

    Example:
        >>> round(criterion_of(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]), "brier"), 4)
        0.08
    """
    with torch.no_grad():
        return _CRITERIA[name](log_probs, labels)


def _nll(log_probs: Tensor, labels: Tensor) -> float:
    return F.nll_loss(log_probs, labels).item()


def _brier(log_probs: Tensor, labels: Tensor) -> float:
    probs = log_probs.exp()
    return (1 + (probs**2).sum(1) - 2 * probs.gather(1, labels[:, None]).squeeze(1)).mean().item()


def _ece(log_probs: Tensor, labels: Tensor) -> float:
    return ece(log_probs, labels, input="log_probs").item()


def _debiased_ece(log_probs: Tensor, labels: Tensor) -> float:
    """Equal-mass ECE less what sampling adds to it, estimated from a normal resample of each bin's accuracy."""
    top, predicted = log_probs.max(1)
    confidence, order = top.double().exp().sort()
    right = (predicted == labels).double()[order]
    num_bins = max(1, min(15, len(labels) // 2))
    sizes, errors, resampled = [], [], []
    for sure, hit in zip(confidence.tensor_split(num_bins), right.tensor_split(num_bins), strict=True):
        accuracy = hit.mean()
        gap = accuracy - sure.mean()
        spread = (accuracy * (1 - accuracy) / len(hit)).sqrt().clamp_min(1e-12)
        ratio = gap / spread
        sizes.append(len(hit))
        errors.append(gap.abs())
        resampled.append(spread * (2 / torch.pi) ** 0.5 * (-(ratio**2) / 2).exp() + gap * torch.erf(ratio / 2**0.5))
    weights = torch.tensor(sizes, dtype=torch.float64, device=top.device) / len(labels)
    return float((2 * torch.stack(errors) - torch.stack(resampled)) @ weights)


def _classwise_ece(log_probs: Tensor, labels: Tensor) -> float:
    """Mean over classes of the one-against-rest ECE in 15 equal-width bins."""
    probs = log_probs.exp()
    num_samples, num_classes = probs.shape
    bins = (probs * 15).ceil().long().sub_(1).clamp_(0, 14)
    bins += 15 * torch.arange(num_classes, device=probs.device)
    residuals = probs.clone()
    residuals[torch.arange(num_samples, device=probs.device), labels] -= 1
    sums = torch.bincount(bins.flatten(), residuals.flatten(), 15 * num_classes)
    return sums.abs().sum().item() / (num_samples * num_classes)


def _equal_mass_ece(log_probs: Tensor, labels: Tensor) -> float:
    top, predicted = log_probs.max(1)
    confidence, order = top.double().exp().sort()
    gaps = confidence - (predicted == labels).double()[order]
    return sum(abs(chunk.sum().item()) for chunk in gaps.tensor_split(15)) / len(labels)


def _ks(log_probs: Tensor, labels: Tensor) -> float:
    """Largest difference of the cumulative confidence and accuracy, read where runs of equal confidences end."""
    top, predicted = log_probs.max(1)
    confidence, order = top.double().exp().sort()
    sums = (confidence - (predicted == labels).double()[order]).cumsum(0)
    ends = torch.cat([confidence[1:] > confidence[:-1], torch.ones(1, dtype=torch.bool, device=top.device)])
    return sums[ends].abs().max().item() / len(labels)


_CRITERIA: dict[str, Callable[[Tensor, Tensor], float]] = {
    "debiased_ece": _debiased_ece,
    "classwise_ece": _classwise_ece,
    "ece": _ece,
    "nll": _nll,
    "brier": _brier,
    "equal_mass_ece": _equal_mass_ece,
    "ks": _ks,
}
