"""What decides between fitted calibrators: a few measures of log-probabilities and labels, lower is better."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_plugins.calibration.binned import classwise_ece, mce
from lightning_plugins.calibration.metrics import ece
from lightning_plugins.calibration.ranked import debiased_ece, equal_mass_ece, ks_error
from lightning_plugins.calibration.scoring import brier, nll
from lightning_plugins.calibration.smooth import smooth_ece

__all__ = ["CRITERIA", "criterion_of"]

CRITERIA: dict[str, Callable[..., Tensor]] = {
    "nll": nll,
    "brier": brier,
    "ece": ece,
    "mce": mce,
    "equal_mass_ece": equal_mass_ece,
    "debiased_ece": debiased_ece,
    "classwise_ece": classwise_ece,
    "ks": ks_error,
    "smooth_ece": smooth_ece,
}


def criterion_of(log_probs: Tensor, labels: Tensor, name: str) -> float:
    """Return one of the criteria.

    Args:
        log_probs: ``(N, C)``.
        labels: true classes ``(N,)``.
        name: a key of ``CRITERIA``.

    Example:
        >>> round(criterion_of(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]), "brier"), 4)
        0.08
    """
    with torch.no_grad():
        return float(CRITERIA[name](log_probs, labels, input="log_probs"))
