"""Progressive self-distillation: last epoch's predictions soften this epoch's labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_plugins.checks import check_types
from lightning_plugins.losses import check_range

__all__ = ["ProgressiveSelfDistillation"]


class ProgressiveSelfDistillation:
    """Remember each sample's softmax of one epoch and mix it into its label in the next one.

    In epoch t of E the target is ``(1 - a_t) * onehot + a_t * p_{t-1}(x)`` with ``a_t = alpha * (t + 1) / E``; in the
    first epoch, and for a sample not seen in the last one, it is the label. Under random augmentation ``p_{t-1}`` was
    computed on another view of the image; the method means it so.

    Args:
        num_samples: size N of the training set; samples are told apart by their index in it.
        num_classes: C.
        num_epochs: E.
        alpha: share of the prediction in the last epoch, in [0, 1].

    Raises:
        ValueError: for arguments out of range, and for ids, labels or logits of wrong shapes or out of range.

    Example:
        >>> memory = ProgressiveSelfDistillation(4, num_classes=2, num_epochs=2, alpha=0.5)
        >>> ids, labels = torch.tensor([2]), torch.tensor([1])
        >>> memory.remember(ids, logits=torch.tensor([[0.0, 0.0]]))
        >>> memory.next_epoch()
        >>> memory.soft_targets(ids, labels, epoch=1)
        tensor([[0.2500, 0.7500]])

    Reference:
        Kim et al., *Self-Knowledge Distillation with Progressive Refinement of Targets*, 2021; used with the highest
        precision as the teacher by Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025.
    """

    @check_types
    def __init__(self, num_samples: int, *, num_classes: int, num_epochs: int, alpha: float = 0.7) -> None:
        for name, value in {"num_samples": num_samples, "num_classes": num_classes, "num_epochs": num_epochs}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha!r}")
        self.num_epochs, self.alpha = num_epochs, alpha
        # A row that sums to 0 was not seen.
        self.previous = torch.zeros(num_samples, num_classes)
        self.current = torch.zeros(num_samples, num_classes)

    @check_types
    def soft_targets(self, ids: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        """Return targets ``(N, C)`` for samples ``ids (N,)`` with labels ``(N,)`` in epoch ``epoch`` (from 0)."""
        self._check_ids(ids)
        if labels.shape != ids.shape or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 classes, one for each of {len(ids)} ids, got {tuple(labels.shape)} of "
                f"{labels.dtype}; use labels.long()"
            )
        check_range(labels, self.previous.shape[1])
        previous = self.previous[ids.long().to(self.previous.device)].to(labels.device)
        onehot = torch.nn.functional.one_hot(labels, previous.shape[1]).to(previous.dtype)
        seen = previous.sum(1, keepdim=True) > 0
        share = self.alpha * min((epoch + 1) / self.num_epochs, 1.0)
        return torch.where(seen, (1 - share) * onehot + share * previous, onehot)

    @check_types
    def remember(self, ids: Tensor, logits: Tensor) -> None:
        """Keep the softmax of logits ``(N, C)`` for samples ``ids (N,)``; one of NaN counts as not seen."""
        self._check_ids(ids)
        if logits.shape != (len(ids), self.current.shape[1]):
            raise ValueError(
                f"logits must be {(len(ids), self.current.shape[1])} for these ids, got {tuple(logits.shape)}"
            )
        self.current[ids.long().to(self.current.device)] = logits.detach().float().softmax(1).to(self.current.device)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype in (torch.bool, torch.uint8):
            raise ValueError(f"ids must be integers (N,), got {tuple(ids.shape)} of {ids.dtype}; use ids.long()")
        if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.previous):
            raise ValueError(
                f"ids must lie in [0, {len(self.previous)}), found {int(ids.min())} to {int(ids.max())}; give the size "
                "of the training set as num_samples"
            )

    def next_epoch(self) -> None:
        """Let the predictions of this epoch be those of the previous one."""
        self.previous, self.current = self.current, torch.zeros_like(self.current)
