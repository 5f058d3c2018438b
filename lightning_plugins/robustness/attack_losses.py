"""What attacks maximise: losses of each row of logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.checks import check_types
from lightning_plugins.losses import checked_logits

__all__ = ["RowLoss", "dlr_loss", "kl_loss", "margin_loss", "targeted_dlr_loss"]

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""From logits ``(N, C)`` and targets ``(N,)`` to losses ``(N,)``, larger for better adversarial examples."""

_SMALL = 1e-12  # of the published losses; keeps 0 / 0 from logits that are all equal


def cross_entropy_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each row."""
    return F.cross_entropy(logits, targets, reduction="none")


@check_types
def margin_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how far the best wrong logit is above the true one, ``max_{k != y} o_k - o_y``; positive if misclassified.

    Args:
        logits: ``(N, C)``, C at least 2.
        targets: true classes ``(N,)``.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: for wrong shapes, labels that are no int64 or no classes, or fewer than two classes.

    Example:
        >>> margin_loss(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-1.])

    Reference:
        N. Carlini, D. Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017, objective f6 without
        its confidence.
    """
    logits = _checked(logits, targets, 2, "the margin loss")
    others = logits.masked_fill(F.one_hot(targets, logits.shape[1]).bool(), -torch.inf)
    return others.amax(1) - _pick(logits, targets)


def difference_loss(logits: Tensor, targets: Tensor, target_classes: Tensor) -> Tensor:
    """Return ``o_t - o_y``, the margin toward one class."""
    return _pick(logits, target_classes) - _pick(logits, targets)


@check_types
def dlr_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return the difference-of-logits ratio of each row, which shifting and scaling the logits leaves as it is.

    .. math:: -\frac{o_y - \max_{k \ne y} o_k}{o_{(1)} - o_{(3)} + 10^{-12}},

    where ``o_(j)`` is the j-th largest logit.

    Args:
        logits: ``(N, C)``, C at least 3.
        targets: true classes ``(N,)``.

    Returns:
        ``(N,)``, negative where the prediction is right.

    Raises:
        ValueError: for wrong shapes, labels that are no int64 or no classes, or fewer than three classes.

    Example:
        >>> dlr_loss(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-0.5000])

    Reference:
        F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", ICML 2020, eq. 6.
    """
    logits = _checked(logits, targets, 3, 'the DLR loss (use loss="ce" or "cw")')
    top = logits.topk(3, dim=1).values
    return margin_loss(logits, targets) / (top[:, 0] - top[:, 2] + _SMALL)


@check_types
def targeted_dlr_loss(logits: Tensor, targets: Tensor, target_classes: Tensor) -> Tensor:
    r"""Return the difference-of-logits ratio of each row toward one wrong class ``t``.

    .. math:: -\frac{o_y - o_t}{o_{(1)} - (o_{(3)} + o_{(4)}) / 2 + 10^{-12}}

    Args:
        logits: ``(N, C)``, C at least 4.
        targets: true classes ``(N,)``.
        target_classes: classes to reach ``(N,)``.

    Returns:
        ``(N,)``, positive where the target class is above the true one.

    Raises:
        ValueError: for wrong shapes, labels that are no int64 or no classes, or fewer than four classes.

    Example:
        >>> targeted_dlr_loss(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([0]), torch.tensor([2]))
        tensor([-0.4000])

    Reference:
        F. Croce, M. Hein, "Reliable evaluation of adversarial robustness ...", ICML 2020, eq. 7.
    """
    needed = 'the targeted DLR loss (use loss="cw")'
    logits = _checked(_checked(logits, targets, 4, needed), target_classes, 4, needed)
    top = logits.topk(4, dim=1).values
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _SMALL
    return difference_loss(logits, targets, target_classes) / scale


@check_types
def kl_loss(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Return the divergence ``KL(p || q)`` of each row: ``p`` from the reference, ``q`` from the logits.

    Its gradient with respect to the logits is exactly zero where both are equal: an attack must start elsewhere.

    Args:
        logits: ``(N, C)``.
        reference_logits: ``(N, C)``, those of the clean inputs.

    Returns:
        ``(N,)``, at least 0.

    Raises:
        ValueError: for logits that are not ``(N, C)``, or of another shape than the reference.

    Example:
        >>> kl_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.])

    Reference:
        H. Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, eq. 5.
    """
    if logits.ndim != 2 or logits.shape != reference_logits.shape:
        raise ValueError(
            f"logits and reference_logits must be (N, C) of one shape, got {tuple(logits.shape)} and "
            f"{tuple(reference_logits.shape)}"
        )
    log_q, log_p = logits.log_softmax(1), reference_logits.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes.unsqueeze(1)).squeeze(1)


def _checked(logits: Tensor, targets: Tensor, number: int, loss: str) -> Tensor:
    """Return logits in float32 at least; refuse what is no batch of that many classes and its labels."""
    if logits.ndim == 2 and logits.shape[1] < number:
        raise ValueError(f"{loss} needs at least {number} classes, found logits of shape {tuple(logits.shape)}")
    return checked_logits(logits, targets)
