r"""Losses that keep a net's confidence near its accuracy while it trains.

Two kinds. Variants of cross-entropy that stop pushing confident predictions: :func:`focal_loss`, :func:`flsd53`,
:func:`dual_focal_loss`. And measures of miscalibration on one batch, to be added to a loss: :func:`mmce`,
:func:`weighted_mmce`, :func:`soft_binned_ece`; as modules they come with cross-entropy, ready as a ``criterion``.

All take logits ``(N, C)`` and classes ``(N,)`` and compute in float32 at least, under any autocast. Where labels are
mixed (:class:`.MixedLabels`), the first kind is the weighted sum over the labels; the second asks whether the class
with the largest share was predicted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._mixed_labels import takes_mixed_labels
from lightning_plugins.checks import check_types
from lightning_plugins.losses import (
    FocalLoss,
    Reduction,
    check_at_least_0,
    check_choice,
    checked_logits,
    focal_loss,
    wide,
)

__all__ = [
    "DualFocalLoss",
    "FLSD53Loss",
    "FocalLoss",
    "MMCELoss",
    "SoftBinnedECELoss",
    "dual_focal_loss",
    "flsd53",
    "focal_loss",
    "mmce",
    "soft_binned_ece",
    "weighted_mmce",
]

_TINY = 1e-30  # what float32 can divide by


@check_types
@takes_mixed_labels
def flsd53(logits: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Return the focal loss with a focus that depends on the sample, :math:`-(1 - p_y)^{\gamma(p_y)} \log p_y`.

    :math:`\gamma` is 5 where the probability of the true class is below 0.2, and 3 elsewhere; no gradient flows through
    that choice. The released code sums over the batch, which ties the learning rate to the batch size; this is a mean.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``, or :class:`.MixedLabels`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)``, at least 0.

    Raises:
        ValueError: for wrong shapes or an unknown reduction.

    Example:
        >>> flsd53(torch.zeros(1, 2), torch.tensor([0]))  # log(2) / 8
        tensor(0.0866)

    Reference:
        J. Mukhoti et al., "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020.
    """
    cross_entropy = F.cross_entropy(checked_logits(logits, target), target, reduction="none")
    gamma = torch.where((-cross_entropy.detach()).exp() < 0.2, 5.0, 3.0)
    return _reduced(_power(-torch.expm1(-cross_entropy), gamma) * cross_entropy, reduction)


@check_types
@takes_mixed_labels
def dual_focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0, *, reduction: Reduction = "mean") -> Tensor:
    r"""Return the focal loss that also looks at the strongest rival, :math:`-(1 - p_y + p_j)^\gamma \log p_y`.

    :math:`p_j` is the largest probability below that of the true class, 0 if there is none.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``, or :class:`.MixedLabels`.
        gamma: at least 0; 0 is cross-entropy. The paper tunes it for each net; the default is ours.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)``, at least 0.

    Raises:
        ValueError: for ``gamma`` out of range, wrong shapes or an unknown reduction.

    Example:
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> dual_focal_loss(logits, torch.tensor([0]), gamma=1.0)  # 0.75 log(2)
        tensor(0.5199)

    Reference:
        L. Tao, M. Dong, C. Xu, "Dual Focal Loss for Calibration", ICML 2023.
    """
    check_at_least_0("gamma", gamma)
    log_probs = checked_logits(logits, target).log_softmax(1)
    own = log_probs.gather(1, target[:, None])
    rival = log_probs.exp().masked_fill(log_probs >= own, 0.0).amax(1)
    cross_entropy = -own[:, 0]
    return _reduced(_power(-torch.expm1(-cross_entropy) + rival, gamma) * cross_entropy, reduction)


@check_types
def mmce(logits: Tensor, target: Tensor, *, bandwidth: float = 0.4) -> Tensor:
    r"""Return the maximum mean calibration error of a batch: how far confidence is from accuracy, by a kernel.

    With confidence :math:`c_i`, whether it was right :math:`a_i \in \{0, 1\}` (a constant of the gradient) and
    :math:`r_i = a_i - c_i`:

    .. math:: \sqrt{\frac{1}{N^2} \sum_{ij} r_i r_j\, e^{-|c_i - c_j| / h} + 10^{-10}}

    The small number keeps the slope finite at 0. The unweighted class of the released code returns the square.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``.
        bandwidth: of the kernel, on the scale of confidences, above 0.

    Returns:
        A scalar in [1e-5, 1].

    Raises:
        ValueError: for a wrong bandwidth or wrong shapes.

    Example:
        >>> logits = torch.tensor([[0.75, 0.25]]).log().repeat(4, 1)
        >>> mmce(logits, torch.tensor([0, 0, 1, 1]))  # confidence 0.75, accuracy 0.5
        tensor(0.2500)

    Reference:
        A. Kumar, S. Sarawagi, U. Jain, "Trainable Calibration Measures for Neural Networks from Kernel Mean
        Embeddings", ICML 2018.
    """
    confidence, right = _confidence(logits, target)
    return _kernel_norm((right - confidence) / len(confidence), confidence, bandwidth)


@check_types
def weighted_mmce(logits: Tensor, target: Tensor, *, bandwidth: float = 0.4) -> Tensor:
    r"""Return :func:`mmce` with right and wrong predictions weighing the same, however many there are of each.

    :math:`r_i` is divided by the number of samples that are right, or wrong, as the sample is. A batch with all right,
    or all wrong, has one of the two groups only.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``.
        bandwidth: of the kernel, on the scale of confidences, above 0.

    Returns:
        A scalar, at least 1e-5.

    Raises:
        ValueError: for a wrong bandwidth or wrong shapes.

    Example:
        >>> logits = torch.tensor([[0.75, 0.25]]).log().repeat(4, 1)
        >>> weighted_mmce(logits, torch.tensor([0, 0, 0, 1]))  # 0.25 missing where right, 0.75 too much where wrong
        tensor(0.5000)

    Reference:
        A. Kumar, S. Sarawagi, U. Jain, "Trainable Calibration Measures for Neural Networks from Kernel Mean
        Embeddings", ICML 2018.
    """
    confidence, right = _confidence(logits, target)
    number = torch.where(right > 0, right.sum(), (1 - right).sum())
    return _kernel_norm((right - confidence) / number, confidence, bandwidth)


@check_types
def soft_binned_ece(
    logits: Tensor, target: Tensor, *, num_bins: int = 15, temperature: float = 0.01, p: float = 2.0
) -> Tensor:
    r"""Return the calibration error in bins with soft borders, which gradients pass.

    Sample ``i`` is in the bin with centre :math:`\xi_b` by the share
    :math:`u_{ib} = softmax_b(-(c_i - \xi_b)^2 / \tau)`; with the mean accuracy :math:`\bar a_b`, the mean confidence
    :math:`\bar c_b` and the size :math:`s_b = \sum_i u_{ib}` of a bin:

    .. math:: \Big(\sum_b \frac{s_b}{N} |\bar a_b - \bar c_b|^p\Big)^{1/p}

    It needs batches of some 128 samples; in small ones it is mostly noise.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``.
        num_bins: at least 1.
        temperature: :math:`\tau` of the borders, above 0; towards 0 they become those of :func:`ece`.
        p: of the norm, at least 1; 1 is the soft form of :func:`ece`.

    Returns:
        A scalar in [0, 1], 1e-5 at least where ``p`` is above 1.

    Raises:
        ValueError: for an argument out of range or wrong shapes.

    Example:
        >>> logits = torch.tensor([[0.9, 0.1]]).log().repeat(10, 1)
        >>> soft_binned_ece(logits, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]))
        tensor(0.3000)

    Reference:
        A. Karandikar et al., "Soft Calibration Objectives for Neural Networks", NeurIPS 2021.
    """
    _check_bins(num_bins, temperature, p)
    confidence, right = _confidence(logits, target)
    centres = (torch.arange(num_bins, device=confidence.device, dtype=confidence.dtype) + 0.5) / num_bins
    share = (-(confidence[:, None] - centres).square() / temperature).softmax(1)
    size = share.sum(0)
    gap = (share * (right - confidence)[:, None]).sum(0) / size.clamp_min(torch.finfo(size.dtype).tiny)
    if p == 1:
        return (size * gap.abs()).sum() / len(confidence)
    # The small number keeps the slope of the root finite at 0.
    error: Tensor = ((size * gap.abs().pow(p)).sum() / len(confidence) + 1e-5**p).pow(1 / p)
    return error


class FLSD53Loss(nn.Module):
    """:func:`flsd53` as a module.

    Example:
        >>> FLSD53Loss()(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.0866)
    """

    @check_types
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of logits ``(N, C)`` and classes ``(N,)``."""
        return flsd53(logits, target)


class DualFocalLoss(nn.Module):
    """:func:`dual_focal_loss` as a module.

    Args:
        gamma: at least 0; 0 is cross-entropy.

    Raises:
        ValueError: for ``gamma`` out of range.

    Example:
        >>> DualFocalLoss(gamma=1.0)(torch.zeros(1, 2), torch.tensor([0]))  # log(2) / 2: no class is below the true one
        tensor(0.3466)
    """

    @check_types
    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        check_at_least_0("gamma", gamma)
        self.gamma = gamma

    @check_types
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of logits ``(N, C)`` and classes ``(N,)``."""
        return dual_focal_loss(logits, target, self.gamma)


class MMCELoss(nn.Module):
    """Cross-entropy plus :func:`mmce` or :func:`weighted_mmce`.

    Args:
        strength: factor of the measure, at least 0; the released scripts have 2.
        weighted: let right and wrong predictions weigh the same.
        bandwidth: of the kernel, above 0.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> logits = torch.tensor([[0.75, 0.25]]).log().repeat(4, 1)
        >>> MMCELoss(strength=2.0)(logits, torch.tensor([0, 0, 1, 1]))  # 0.837 + 2 * 0.25
        tensor(1.3370)
    """

    @check_types
    def __init__(self, strength: float = 2.0, *, weighted: bool = False, bandwidth: float = 0.4) -> None:
        super().__init__()
        check_at_least_0("strength", strength)
        _check_above_0("bandwidth", bandwidth)
        self.strength, self.weighted, self.bandwidth = strength, weighted, bandwidth

    @check_types
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits ``(N, C)`` and classes ``(N,)`` or soft labels ``(N, C)``."""
        measure = weighted_mmce if self.weighted else mmce
        penalty = measure(logits, _classes_for(logits, target), bandwidth=self.bandwidth)
        return F.cross_entropy(wide(logits), target) + self.strength * penalty


class SoftBinnedECELoss(nn.Module):
    """Cross-entropy plus :func:`soft_binned_ece`.

    Args:
        strength: factor of the measure, at least 0; the default is ours.
        num_bins: at least 1.
        temperature: of the borders of bins, above 0.
        p: of the norm, at least 1.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> logits = torch.tensor([[0.75, 0.25]]).log().repeat(4, 1)
        >>> SoftBinnedECELoss(strength=1.0)(logits, torch.tensor([0, 0, 1, 1]))  # 0.837 + 0.25
        tensor(1.0870)
    """

    @check_types
    def __init__(self, strength: float = 1.0, *, num_bins: int = 15, temperature: float = 0.01, p: float = 2.0) -> None:
        super().__init__()
        check_at_least_0("strength", strength)
        _check_bins(num_bins, temperature, p)
        self.strength, self.num_bins, self.temperature, self.p = strength, num_bins, temperature, p

    @check_types
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits ``(N, C)`` and classes ``(N,)`` or soft labels ``(N, C)``."""
        classes = _classes_for(logits, target)
        penalty = soft_binned_ece(logits, classes, num_bins=self.num_bins, temperature=self.temperature, p=self.p)
        return F.cross_entropy(wide(logits), target) + self.strength * penalty


def _confidence(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of the predicted class, and whether it was right as 0 or 1."""
    confidence, predicted = checked_logits(logits, target).softmax(1).max(1)
    return confidence, (predicted == target).to(confidence.dtype)


def _kernel_norm(residuals: Tensor, confidence: Tensor, bandwidth: float) -> Tensor:
    _check_above_0("bandwidth", bandwidth)
    kernel = (-(confidence[:, None] - confidence[None]).abs() / bandwidth).exp()
    # The kernel is positive definite, and only rounding can make the square negative.
    return ((residuals @ kernel @ residuals).clamp_min(0.0) + 1e-10).sqrt()


def _power(base: Tensor, exponent: Tensor | float) -> Tensor:
    # Kept off 0, where a power below 1 has an infinite slope.
    return base.clamp_min(torch.finfo(base.dtype).tiny).pow(exponent)


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    check_choice("reduction", reduction, Reduction)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _classes(target: Tensor) -> Tensor:
    return target.argmax(1) if target.ndim == 2 else target


def _classes_for(logits: Tensor, target: Tensor) -> Tensor:
    if target.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(
            "target must be classes (N,) or soft labels (N, C) for logits (N, C), got "
            f"{tuple(target.shape)} for {tuple(logits.shape)}"
        )
    return _classes(target)


def _check_above_0(name: str, value: float) -> None:
    if not _TINY < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {value!r}")


def _check_bins(num_bins: int, temperature: float, p: float) -> None:
    if not (isinstance(num_bins, int) and num_bins >= 1):
        raise ValueError(f"num_bins must be an integer of at least 1, got {num_bins!r}")
    _check_above_0("temperature", temperature)
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be at least 1 and finite, got {p!r}")
