r"""Losses for classes of unequal size: weights, margins and shifted logits, all from the counts of the training set.

Per-class counts are :math:`n_c`, priors :math:`\pi_c = n_c / \sum_k n_k`. Functions take logits ``(N, C)`` and classes
``(N,)``, and compute in float32 at least, under any autocast. The modules hold the counts and weights for a plain loop.

Weights scale what a sample contributes to the outer loss. In the attack they would do nothing: a positive factor
changes neither the sign nor the direction of one sample's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins._mixed_labels import takes_mixed_labels
from lightning_plugins.checks import check_types
from lightning_plugins.losses import ClassLoss as _ClassLoss
from lightning_plugins.losses import FocalLoss, Normalise, Reduction, focal_loss
from lightning_plugins.losses import check_at_least_0 as _check_at_least_0
from lightning_plugins.losses import check_choice as _check_choice
from lightning_plugins.losses import checked_logits as _logits
from lightning_plugins.losses import per_class as _per_class
from lightning_plugins.losses import reduced as _reduced

__all__ = [
    "BalancedSoftmaxLoss",
    "CDTLoss",
    "DeferredSchedule",
    "FocalLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "Normalise",
    "Reduction",
    "Rescale",
    "WeightedCrossEntropy",
    "adjust_logits",
    "balanced_softmax_loss",
    "cdt_loss",
    "effective_number_weights",
    "focal_loss",
    "inverse_frequency_weights",
    "ldam_loss",
    "ldam_margins",
    "logit_adjusted_loss",
    "weighted_cross_entropy",
]

Rescale = Literal["mean", "prior", "none"]
"""Weights with mean 1 over classes, with mean 1 over training samples, or as the formula gives them."""

Counts = Sequence[int] | Tensor


@check_types
def effective_number_weights(counts: Counts, beta: float = 0.9999, *, rescale: Rescale = "mean") -> Tensor:
    r"""Return class weights that fall with the effective number of samples.

    :math:`w_c \propto (1-\beta)/(1-\beta^{n_c})`: ``beta=0`` gives equal weights, ``beta=1``, by its limit, the
    inverse of the counts.

    Args:
        counts: training samples of each class ``(C,)``, at least 1.
        beta: in [0, 1].
        rescale: ``"mean"``: the weights have mean 1, as in the paper; ``"prior"``: their mean over the training samples
            is 1, so that the size of the loss does not change; ``"none"``: neither.

    Returns:
        ``(C,)`` float32, on the device of ``counts``.

    Raises:
        ValueError: for ``beta`` out of range, a class without samples, or an unknown ``rescale``.

    Example:
        >>> effective_number_weights([5000, 500, 50])
        tensor([0.0341, 0.2752, 2.6907])

    Reference:
        Y. Cui, M. Jia, T.-Y. Lin, Y. Song, S. Belongie, "Class-Balanced Loss Based on Effective Number of Samples",
        CVPR 2019.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta!r}")
    numbers = _counts(counts)
    if beta == 1:
        weights = numbers.reciprocal()
    elif beta == 0:
        weights = torch.ones_like(numbers)
    else:
        weights = (beta - 1) / torch.expm1(numbers * math.log1p(beta - 1))  # 1 - beta**n would cancel
    return _rescaled(weights, numbers, rescale)


@check_types
def inverse_frequency_weights(counts: Counts, power: float = 1.0, *, rescale: Rescale = "mean") -> Tensor:
    r"""Return class weights :math:`w_c \propto n_c^{-\mathrm{power}}`.

    Args:
        counts: training samples of each class ``(C,)``, at least 1.
        power: at least 0: 0 gives equal weights, 0.5 the square root, 1 as much weight to each class in total.
        rescale: as in :func:`effective_number_weights`.

    Returns:
        ``(C,)`` float32, on the device of ``counts``.

    Raises:
        ValueError: for ``power`` out of range, a class without samples, or an unknown ``rescale``.

    Example:
        >>> inverse_frequency_weights([30, 10])
        tensor([0.5000, 1.5000])
        >>> inverse_frequency_weights([30, 10], rescale="prior")
        tensor([0.6667, 2.0000])
    """
    if not 0 <= power < math.inf:
        raise ValueError(f"power must be at least 0 and finite, got {power!r}")
    numbers = _counts(counts)
    return _rescaled(numbers.pow(-power), numbers, rescale)


@check_types
def ldam_margins(counts: Counts, max_margin: float = 0.5) -> Tensor:
    r"""Return a margin for each class, :math:`m_c \propto n_c^{-1/4}`, the rarest one's being ``max_margin``.

    Args:
        counts: training samples of each class ``(C,)``, at least 1.
        max_margin: in units of logits before scaling, at least 0.

    Returns:
        ``(C,)`` float32, on the device of ``counts``.

    Raises:
        ValueError: for ``max_margin`` out of range or a class without samples.

    Example:
        >>> ldam_margins([160, 10])
        tensor([0.2500, 0.5000])

    Reference:
        K. Cao, C. Wei, A. Gaidon, N. Arechiga, T. Ma, "Learning Imbalanced Datasets with Label-Distribution-Aware
        Margin Loss", NeurIPS 2019, eq. 13.
    """
    if not 0 <= max_margin < math.inf:
        raise ValueError(f"max_margin must be at least 0 and finite, got {max_margin!r}")
    margins = _counts(counts).pow(-0.25)
    return (max_margin * margins / margins.max()).float()


@check_types
@takes_mixed_labels
def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    normalise: Normalise = "batch_size",
    reduction: Reduction = "mean",
) -> Tensor:
    """Return cross-entropy with a weight for each class.

    ``"batch_weight"`` is what torch does: it divides by the sum of the weights in this batch. Parts of a batch, as in
    gradient accumulation or on several devices, then have divisors of their own, and their mean is not that of the
    whole. ``"batch_size"`` has no such fault, and needs weights of a sensible size: :func:`effective_number_weights`
    says how to scale them.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: ``"batch_size"`` or ``"batch_weight"``, what ``reduction="mean"`` divides by.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)``, at least 0.

    Raises:
        ValueError: for wrong shapes or an unknown choice.

    Example:
        >>> logits, target, weight = torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([1.0, 3.0])
        >>> weighted_cross_entropy(logits, target, weight)  # 2 log 2
        tensor(1.3863)
        >>> weighted_cross_entropy(logits, target, weight, normalise="batch_weight")
        tensor(0.6931)
    """
    losses = F.cross_entropy(_logits(logits, target), target, reduction="none")
    return _reduced(losses, target, weight, logits, normalise, reduction)


@check_types
@takes_mixed_labels
def ldam_loss(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    scale: float = 30.0,
    weight: Tensor | None = None,
    *,
    normalise: Normalise = "batch_size",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return cross-entropy that asks for a larger margin on rare classes, at logits :math:`s (o - m_y e_y)`.

    The scale belongs to logits that are cosines (a normalised classifier without bias); with an ordinary linear layer
    take 1. Attack the logits that the model is evaluated with: another scale of the loss changes what a
    cross-entropy-based attack can see, and can look like robustness.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``.
        margins: of each class ``(C,)``, from :func:`ldam_margins`; all 0 is cross-entropy of scaled logits.
        scale: s, above 0.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: as in :func:`weighted_cross_entropy`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)``, at least 0.

    Raises:
        ValueError: for ``scale`` out of range, wrong shapes or an unknown choice.

    Example:
        >>> ldam_loss(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0.25, 0.5]), scale=2.0)  # log(1 + e)
        tensor(1.3133)

    Reference:
        K. Cao, C. Wei, A. Gaidon, N. Arechiga, T. Ma, "Learning Imbalanced Datasets with Label-Distribution-Aware
        Margin Loss", NeurIPS 2019, eq. 13.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale!r}")
    scores = _logits(logits, target)
    margins = _per_class("margins", margins, scores)
    index = target[:, None]
    losses = F.cross_entropy(scale * scores.scatter_add(1, index, -margins[index]), target, reduction="none")
    return _reduced(losses, target, weight, logits, normalise, reduction)


@check_types
@takes_mixed_labels
def logit_adjusted_loss(
    logits: Tensor,
    target: Tensor,
    counts: Counts,
    tau: float = 1.0,
    weight: Tensor | None = None,
    *,
    normalise: Normalise = "batch_size",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return cross-entropy at logits :math:`o_c + \tau \log \pi_c`.

    What is trained is o, which then predicts as if all classes were equally frequent.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``.
        counts: training samples of each class ``(C,)``, at least 1.
        tau: finite, usually 1; 0 is cross-entropy.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: as in :func:`weighted_cross_entropy`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)``, at least 0.

    Raises:
        ValueError: for ``tau`` not finite, a class without samples, wrong shapes or an unknown choice.

    Example:
        >>> logit_adjusted_loss(torch.zeros(1, 2), torch.tensor([1]), [3, 1])  # log 4
        tensor(1.3863)

    Reference:
        A. K. Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10.
    """
    losses = F.cross_entropy(_logits(logits, target) + _offsets(counts, tau, logits), target, reduction="none")
    return _reduced(losses, target, weight, logits, normalise, reduction)


@check_types
@takes_mixed_labels
def balanced_softmax_loss(
    logits: Tensor,
    target: Tensor,
    counts: Counts,
    weight: Tensor | None = None,
    *,
    normalise: Normalise = "batch_size",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return cross-entropy at logits :math:`o_c + \log n_c`: :func:`logit_adjusted_loss` with ``tau=1``.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``.
        counts: training samples of each class ``(C,)``, at least 1.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: as in :func:`weighted_cross_entropy`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)``, at least 0.

    Raises:
        ValueError: for a class without samples, wrong shapes or an unknown choice.

    Example:
        >>> balanced_softmax_loss(torch.zeros(1, 2), torch.tensor([0]), [3, 1])  # log(4 / 3)
        tensor(0.2877)

    Reference:
        J. Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, eq. 4; for adversarial
        training X. Yue, N. Mou, Q. Wang, L. Zhao, "Revisiting Adversarial Training under Long-Tailed Distributions",
        CVPR 2024.
    """
    return logit_adjusted_loss(logits, target, counts, 1.0, weight, normalise=normalise, reduction=reduction)


@check_types
@takes_mixed_labels
def cdt_loss(
    logits: Tensor,
    target: Tensor,
    counts: Counts,
    gamma: float,
    weight: Tensor | None = None,
    *,
    normalise: Normalise = "batch_size",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Return cross-entropy at logits divided by a temperature of their class, :math:`a_c = (n_{max}/n_c)^\gamma`.

    Args:
        logits: ``(N, C)``.
        target: true classes ``(N,)``, integers in ``[0, C)``.
        counts: training samples of each class ``(C,)``, at least 1.
        gamma: at least 0; 0 is cross-entropy. Tuned per data set in the paper.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: as in :func:`weighted_cross_entropy`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(N,)``, at least 0.

    Raises:
        ValueError: for ``gamma`` out of range, a class without samples, wrong shapes or an unknown choice.

    Example:
        >>> cdt_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), [4, 1], gamma=0.5)  # log(1 + exp(-1))
        tensor(0.3133)

    Reference:
        H.-J. Ye, H.-Y. Chen, D.-C. Zhan, W.-L. Chao, "Identifying and Compensating for Feature Deviation in Imbalanced
        Deep Learning", 2020.
    """
    losses = F.cross_entropy(_logits(logits, target) / _temperatures(counts, gamma, logits), target, reduction="none")
    return _reduced(losses, target, weight, logits, normalise, reduction)


@check_types
def adjust_logits(logits: Tensor, counts: Counts, tau: float = 1.0) -> Tensor:
    r"""Return :math:`o_c - \tau \log \pi_c`: post-hoc correction of a model that was trained without one.

    A model evaluated on adjusted logits must be attacked on them too.

    Args:
        logits: ``(N, C)``.
        counts: training samples of each class ``(C,)``, at least 1.
        tau: finite; 0 changes nothing.

    Returns:
        ``(N, C)``.

    Raises:
        ValueError: for ``tau`` not finite, a class without samples, or wrong shapes.

    Example:
        >>> adjust_logits(torch.zeros(1, 2), [3, 1]).softmax(1)
        tensor([[0.2500, 0.7500]])

    Reference:
        A. K. Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 9.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (N, C), got {tuple(logits.shape)}")
    return logits - _offsets(counts, tau, logits).to(logits.dtype)


class WeightedCrossEntropy(_ClassLoss):
    """:func:`weighted_cross_entropy` as a module; assign its ``weight`` to change it between epochs.

    Args:
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: ``"batch_size"`` or ``"batch_weight"``.

    Example:
        >>> criterion = WeightedCrossEntropy([1.0, 3.0])
        >>> criterion(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor(1.3863)
    """

    @check_types
    def __init__(self, weight: Sequence[float] | Tensor | None = None, *, normalise: Normalise = "batch_size") -> None:
        super().__init__(weight, normalise)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of logits ``(N, C)`` and classes ``(N,)``."""
        return weighted_cross_entropy(logits, target, self.weight, normalise=self.normalise)


class LDAMLoss(_ClassLoss):
    """:func:`ldam_loss` as a module; assign its ``weight`` to change it between epochs.

    Args:
        counts: training samples of each class ``(C,)``, at least 1.
        max_margin: margin of the rarest class, at least 0.
        scale: of the logits, above 0: 30 for cosines, 1 for an ordinary linear layer.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: ``"batch_size"`` or ``"batch_weight"``.

    Raises:
        ValueError: for arguments out of range or a class without samples.

    Example:
        >>> LDAMLoss([160, 10], scale=2.0)(torch.zeros(1, 2), torch.tensor([1]))
        tensor(1.3133)
    """

    margins: Tensor

    @check_types
    def __init__(
        self,
        counts: Sequence[int] | Tensor,
        max_margin: float = 0.5,
        scale: float = 30.0,
        weight: Sequence[float] | Tensor | None = None,
        *,
        normalise: Normalise = "batch_size",
    ) -> None:
        super().__init__(weight, normalise)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be above 0 and finite, got {scale!r}")
        self.scale = scale
        self.register_buffer("margins", ldam_margins(counts, max_margin), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of logits ``(N, C)`` and classes ``(N,)``."""
        return ldam_loss(logits, target, self.margins, self.scale, self.weight, normalise=self.normalise)


class LogitAdjustedLoss(_ClassLoss):
    """:func:`logit_adjusted_loss` as a module; assign its ``weight`` to change it between epochs.

    Args:
        counts: training samples of each class ``(C,)``, at least 1.
        tau: finite, usually 1; 0 is cross-entropy.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: ``"batch_size"`` or ``"batch_weight"``.

    Raises:
        ValueError: for ``tau`` not finite or a class without samples.

    Example:
        >>> LogitAdjustedLoss([3, 1])(torch.zeros(1, 2), torch.tensor([1]))
        tensor(1.3863)
    """

    counts: Tensor

    @check_types
    def __init__(
        self,
        counts: Sequence[int] | Tensor,
        tau: float = 1.0,
        weight: Sequence[float] | Tensor | None = None,
        *,
        normalise: Normalise = "batch_size",
    ) -> None:
        super().__init__(weight, normalise)
        _check_finite("tau", tau)
        self.tau = tau
        self.register_buffer("counts", _counts(counts), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of logits ``(N, C)`` and classes ``(N,)``."""
        return logit_adjusted_loss(logits, target, self.counts, self.tau, self.weight, normalise=self.normalise)


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    """:func:`balanced_softmax_loss` as a module; assign its ``weight`` to change it between epochs.

    Args:
        counts: training samples of each class ``(C,)``, at least 1.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: ``"batch_size"`` or ``"batch_weight"``.

    Raises:
        ValueError: for a class without samples.

    Example:
        >>> BalancedSoftmaxLoss([3, 1])(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.2877)
    """

    @check_types
    def __init__(
        self,
        counts: Sequence[int] | Tensor,
        weight: Sequence[float] | Tensor | None = None,
        *,
        normalise: Normalise = "batch_size",
    ) -> None:
        super().__init__(counts, 1.0, weight, normalise=normalise)


class CDTLoss(_ClassLoss):
    """:func:`cdt_loss` as a module; assign its ``weight`` to change it between epochs.

    Args:
        counts: training samples of each class ``(C,)``, at least 1.
        gamma: at least 0; 0 is cross-entropy.
        weight: of each class ``(C,)``, at least 0; None for ones.
        normalise: ``"batch_size"`` or ``"batch_weight"``.

    Raises:
        ValueError: for ``gamma`` out of range or a class without samples.

    Example:
        >>> CDTLoss([4, 1], gamma=0.5)(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        tensor(0.3133)
    """

    counts: Tensor

    @check_types
    def __init__(
        self,
        counts: Sequence[int] | Tensor,
        gamma: float,
        weight: Sequence[float] | Tensor | None = None,
        *,
        normalise: Normalise = "batch_size",
    ) -> None:
        super().__init__(weight, normalise)
        _check_at_least_0("gamma", gamma)
        self.gamma = gamma
        self.register_buffer("counts", _counts(counts), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of logits ``(N, C)`` and classes ``(N,)``."""
        return cdt_loss(logits, target, self.counts, self.gamma, self.weight, normalise=self.normalise)


class DeferredSchedule:
    """Class weights that come into force at some epoch; before, every class weighs 1.

    Args:
        weights: of each class ``(C,)``, at least 0, from the epoch ``start`` on.
        start: first epoch with weights, counted from 0; 0 has them always. :meth:`at` makes it a share of the training.

    Raises:
        ValueError: for weights that are negative or not finite, or a negative ``start``.

    Example:
        >>> schedule = DeferredSchedule.at(0.8, num_epochs=200, weights=effective_number_weights([30, 10], beta=1.0))
        >>> schedule.start, schedule(159), schedule(160)
        (160, tensor([1., 1.]), tensor([0.5000, 1.5000]))
        >>> criterion = WeightedCrossEntropy()
        >>> criterion.weight = schedule(160)  # at the start of an epoch

    Reference:
        K. Cao, C. Wei, A. Gaidon, N. Arechiga, T. Ma, "Learning Imbalanced Datasets with Label-Distribution-Aware
        Margin Loss", NeurIPS 2019, algorithm 1: 160 of 200 epochs, the first drop of the learning rate.
    """

    @check_types
    def __init__(self, weights: Sequence[float] | Tensor, start: int) -> None:
        values = torch.as_tensor(weights, dtype=torch.float32).clone()
        if values.ndim != 1 or not ((values >= 0) & values.isfinite()).all():
            raise ValueError(f"weights must be (C,), at least 0 and finite, got {weights!r}")
        if not start >= 0:
            raise ValueError(f"start must be an epoch, at least 0, got {start!r}")
        self.weights, self.start = values, start

    @classmethod
    def at(cls, share: float, *, num_epochs: int, weights: Sequence[float] | Tensor) -> DeferredSchedule:
        """Return a schedule that starts after a share of the epochs, rounded.

        Args:
            share: in [0, 1], usually 0.8.
            num_epochs: of the whole training, at least 1.
            weights: of each class ``(C,)``, at least 0.

        Raises:
            ValueError: for arguments out of range.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share!r}")
        if not num_epochs >= 1:
            raise ValueError(f"num_epochs must be at least 1, got {num_epochs!r}")
        return cls(weights, round(share * num_epochs))

    @check_types
    def __call__(self, epoch: int) -> Tensor:
        """Return the weights ``(C,)`` of an epoch, counted from 0."""
        return self.weights.clone() if epoch >= self.start else torch.ones_like(self.weights)


def _counts(counts: Counts) -> Tensor:
    numbers = torch.as_tensor(counts)
    # mps has no float64. On a device other than the CPU a look at the values would make it wait, in every step.
    numbers = numbers.to(torch.float32 if numbers.device.type == "mps" else torch.float64)
    if numbers.ndim != 1 or len(numbers) < 2:
        raise ValueError(f"counts must hold one number for each class (C,), at least 2, got {tuple(numbers.shape)}")
    if numbers.device.type == "cpu" and not ((numbers >= 1) & numbers.isfinite()).all():
        raise ValueError(f"counts must be at least 1, got {numbers.tolist()}; leave out classes without samples")
    return numbers


def _rescaled(weights: Tensor, numbers: Tensor, rescale: Rescale) -> Tensor:
    _check_choice("rescale", rescale, Rescale)
    if rescale == "mean":
        weights = weights / weights.mean()
    elif rescale == "prior":
        weights = weights / (weights * numbers / numbers.sum()).sum()
    return weights.float()


def _offsets(counts: Counts, tau: float, logits: Tensor) -> Tensor:
    _check_finite("tau", tau)
    numbers = _counts(counts)
    return _per_class("counts", tau * (numbers.log() - numbers.sum().log()), logits)


def _temperatures(counts: Counts, gamma: float, logits: Tensor) -> Tensor:
    _check_at_least_0("gamma", gamma)
    numbers = _counts(counts)
    return _per_class("counts", (numbers.max() / numbers).pow(gamma), logits)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
