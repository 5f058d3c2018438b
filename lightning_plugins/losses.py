"""Losses that several families use, and what losses of logits and class labels share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_plugins._mixed_labels import takes_mixed_labels
from lightning_plugins.checks import check_types

__all__ = ["FocalLoss", "Normalise", "Reduction", "focal_loss"]

Normalise = Literal["batch_size", "batch_weight"]
"""What a weighted mean divides by: the number of samples, or the sum of their weights."""

Reduction = Literal["mean", "sum", "none"]
"""One mean over the batch, one sum, or one value per sample."""


@check_types
@takes_mixed_labels
def focal_loss(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    *,
    normalise: Normalise = "batch_size",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return cross-entropy that turns away from what is right already, :math:`-w_y (1 - p_y)^\gamma \log p_y`.

    :math:`p_y` is the probability of the true class; the weight multiplies outside. (The code released with LDAM takes
    it from the weighted loss, which is no probability any more.)

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``, or :class:`.MixedLabels`.
        gamma: at least 0; 0 is cross-entropy. The paper takes 2, LDAM's comparison 1; for calibration 3 is usual.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: ``"batch_size"`` or ``"batch_weight"``, what ``reduction="mean"`` divides by.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)``, at least 0.

    Raises:
        ValueError: for ``gamma`` out of range, wrong shapes or an unknown choice.

    Example:
        >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=1.0)  # log(2) / 2
        tensor(0.3466)

    Reference:
        T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal Loss for Dense Object Detection", ICCV 2017, eq. 4.
    """
    check_at_least_0("gamma", gamma)
    cross_entropy = F.cross_entropy(checked_logits(logits, target), target, reduction="none")
    # Kept off 0, where a power below 1 has an infinite slope; the loss is 0 there all the same.
    wrong = -torch.expm1(-cross_entropy)
    losses = wrong.clamp_min(torch.finfo(wrong.dtype).tiny).pow(gamma) * cross_entropy
    return reduced(losses, target, weight, logits, normalise, reduction)


class ClassLoss(nn.Module):
    """What the modules share: per-class tensors that move with the module and follow from its arguments."""

    weight: Tensor | None

    def __init__(self, weight: Sequence[float] | Tensor | None, normalise: Normalise) -> None:
        super().__init__()
        check_choice("normalise", normalise, Normalise)
        self.normalise: Normalise = normalise
        # Not in the state_dict: they follow from the arguments, and a schedule may change the weight between epochs.
        values = None if weight is None else torch.as_tensor(weight, dtype=torch.float32).clone()
        self.register_buffer("weight", values, persistent=False)


class FocalLoss(ClassLoss):
    """:func:`focal_loss` as a module; assign its ``weight`` to change it between epochs.

    Args:
        gamma: at least 0; 0 is cross-entropy.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: ``"batch_size"`` or ``"batch_weight"``.

    Raises:
        ValueError: for ``gamma`` out of range.

    Example:
        >>> FocalLoss(gamma=1.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.3466)
    """

    @check_types
    def __init__(
        self,
        gamma: float = 2.0,
        weight: Sequence[float] | Tensor | None = None,
        *,
        normalise: Normalise = "batch_size",
    ) -> None:
        super().__init__(weight, normalise)
        check_at_least_0("gamma", gamma)
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of logits ``(N, C)`` and classes ``(N,)``."""
        return focal_loss(logits, target, self.gamma, self.weight, normalise=self.normalise)


def checked_logits(logits: Tensor, target: Tensor) -> Tensor:
    """Return logits in float32 at least; refuse wrong shapes and labels that are no int64 or, on a CPU, no classes."""
    # Labels of eight bits would be taken for a mask where they index, and be a class elsewhere.
    if logits.ndim != 2 or target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"logits must be (N, C) and target integer classes (N,), int64, got {tuple(logits.shape)} and "
            f"{tuple(target.shape)} of {target.dtype}; use target.long()"
        )
    check_range(target, logits.shape[1])
    return wide(logits)


def check_range(target: Tensor, num_classes: int) -> None:
    """Refuse labels on a CPU outside ``[0, num_classes)``; elsewhere looking would make the device wait."""
    if target.device.type != "cpu" or not target.numel() or torch.compiler.is_compiling():
        return
    if isinstance(target, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(target):
        return
    lowest, highest = (int(bound) for bound in target.aminmax())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"target must be classes in [0, {num_classes}), found {lowest} to {highest}; drop rows of ignored labels"
        )


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def per_class(name: str, values: Tensor, logits: Tensor) -> Tensor:
    """Return one number for each class ``(C,)``, where the logits are, in float32 at least."""
    if values.shape != logits.shape[1:]:
        raise ValueError(
            f"{name} must hold one number for each of {logits.shape[1]} classes, got {tuple(values.shape)}"
        )
    return values.to(logits.device, torch.float64 if logits.dtype == torch.float64 else torch.float32)


def reduced(
    losses: Tensor, target: Tensor, weight: Tensor | None, logits: Tensor, normalise: Normalise, reduction: Reduction
) -> Tensor:
    """Return losses ``(N,)`` weighted by class and brought to one number, as ``reduction`` says."""
    check_choice("normalise", normalise, Normalise)
    check_choice("reduction", reduction, Reduction)
    total: Tensor | int = len(losses)
    if weight is not None:
        share = per_class("weight", weight, logits)[target]
        losses = share * losses
        if normalise == "batch_weight":
            total = share.sum()
    if reduction == "none":
        return losses
    return losses.sum() / total if reduction == "mean" else losses.sum()


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuse a value that is not among those of a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def check_at_least_0(name: str, value: float) -> None:
    """Refuse a value below 0 or not finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")
