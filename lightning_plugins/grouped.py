"""Metrics per class, and what they say about the worst-served one."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins.checks import check_types
from lightning_plugins.losses import check_range

__all__ = ["ClassAccuracy"]


class ClassAccuracy(Metric):
    """Accuracy over all samples, over classes, and of the worst class, from two counts per class.

    Classes without a sample are left out of the balanced and the worst accuracy. (torchmetrics' macro accuracy counts
    such a class as 0 as soon as one sample is predicted as it.)

    Args:
        num_classes: number of classes, at least 2.

    Shape:
        - ``update(preds, target)``: logits or probabilities ``(N, C)``, or predicted classes ``(N,)``; true classes
          ``(N,)`` integer in ``[0, C)``.

    Returns:
        ``compute()``: a dictionary of scalars in [0, 1]: ``acc``, ``balanced_acc`` (mean over classes), ``worst_acc``
        (least of the classes).

    Raises:
        ValueError: if ``num_classes`` is below 2; in ``update`` for wrong shapes, or labels that are no classes.

    Example:
        >>> metric = ClassAccuracy(num_classes=3)
        >>> metric.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'acc': 0.75, 'balanced_acc': 0.75, 'worst_acc': 0.5}
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    @check_types
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}")
        self.num_classes = num_classes
        self.add_state("correct", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    @check_types
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count one batch; see the class for shapes."""
        if preds.ndim == 2:
            preds = preds.argmax(1)
        if target.ndim != 1 or preds.shape != target.shape or target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(
                "preds must be (N, C) or (N,) and target integer classes (N,), got predictions "
                f"{tuple(preds.shape)} and target {tuple(target.shape)} of {target.dtype}"
            )
        check_range(target, self.num_classes)
        self.total += torch.bincount(target, minlength=self.num_classes)
        self.correct += torch.bincount(target[preds == target], minlength=self.num_classes)

    def per_class(self) -> Tensor:
        """Return the accuracy of each class ``(C,)``, NaN for one without samples, of this process alone."""
        return self.correct / self.total

    def compute(self) -> dict[str, Tensor]:
        """Return the three accuracies."""
        seen = self.per_class()[self.total > 0]
        if seen.numel() == 0:
            seen = torch.full((1,), torch.nan, device=self.total.device)
        return {
            "acc": self.correct.sum() / self.total.sum(),
            "balanced_acc": seen.mean(),
            "worst_acc": seen.min(),
        }
