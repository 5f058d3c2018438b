"""The scores of DD-Ranking: what a distilled set is worth beside the full data and beside random images."""

from __future__ import annotations

import math

from lightning_plugins.checks import check_types

__all__ = [
    "augmentation_robust_score",
    "hard_label_recovery",
    "improvement_over_random",
    "label_robust_score",
]


@check_types
def hard_label_recovery(accuracy_full: float, accuracy_hard: float) -> float:
    """HLR: what training on the set with hard labels loses against the full data, both in [0, 1]; lower is better.

    Reference:
        Z. Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", 2025.
    """
    return _fraction(accuracy_full) - _fraction(accuracy_hard)


@check_types
def improvement_over_random(accuracy: float, accuracy_random: float) -> float:
    """IOR: what the set gains over random real images trained by the same recipe, both in [0, 1]; higher is better."""
    return _fraction(accuracy) - _fraction(accuracy_random)


@check_types
def label_robust_score(ior: float, hlr: float, *, weight: float = 0.5) -> float:
    """LRS: both in one figure in [0, 1], ``(e^a - e^-1) / (e - e^-1)`` with ``a = weight ior - (1 - weight) hlr``.

    Raises:
        ValueError: for a gain outside of [-1, 1] or a weight outside of [0, 1].

    Example:
        >>> label_robust_score(1.0, -1.0), label_robust_score(-1.0, 1.0)
        (1.0, 0.0)
    """
    _check_gains(weight, ior=ior, hlr=hlr)
    return _scaled(weight * ior - (1 - weight) * hlr)


def _check_gains(weight: float, **gains: float) -> None:
    for name, gain in gains.items():
        if not -1 <= gain <= 1:
            raise ValueError(f"{name} must lie in [-1, 1], got {gain!r}; give shares, not percent")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight!r}")


@check_types
def augmentation_robust_score(gain_augmented: float, gain_plain: float, *, weight: float = 0.5) -> float:
    """ARS: as LRS, of ``weight gain_augmented + (1 - weight) gain_plain``, gains over random images in [-1, 1].

    Raises:
        ValueError: for a gain outside of [-1, 1] or a weight outside of [0, 1].
    """
    _check_gains(weight, gain_augmented=gain_augmented, gain_plain=gain_plain)
    return _scaled(weight * gain_augmented + (1 - weight) * gain_plain)


def _scaled(value: float) -> float:
    low = math.exp(-1)
    return (math.exp(value) - low) / (math.e - low)


def _fraction(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"accuracies must be fractions in [0, 1], got {value!r}; divide percent by 100")
    return value
