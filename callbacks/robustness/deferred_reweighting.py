"""Reweighting the classes of an imbalanced training set, from a given point of the training on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lightning_plugins.batches import BatchFn, LogitsFn
from lightning_plugins.callbacks._classes import class_counts, training_progress
from lightning_plugins.callbacks.training_step import Step, TrainingStepCallback
from lightning_plugins.checks import check_types
from lightning_plugins.robustness.reweighting import (
    effective_number_weights,
    focal_loss,
    inverse_frequency_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    weighted_cross_entropy,
)

__all__ = ["DeferredReweighting"]

Loss = Literal["ce", "focal", "ldam", "balanced_softmax"]


class DeferredReweighting(TrainingStepCallback):
    """Replace the module's loss by one for imbalanced classes; class weights set in late.

    Works in plain training and inside of :class:`AdversarialTraining` without an objective (whose objectives reweight
    by themselves). The module's step runs as it is, so what it logs goes on; its loss is replaced by one of the logits
    that its ``forward`` returned.

    Args:
        loss: ``"ce"`` weighted cross-entropy; ``"focal"``; ``"ldam"`` margins that grow with rarity; or
            ``"balanced_softmax"``.
        weights: ``"effective_number"`` of samples, ``"inverse"`` frequency, or None for none.
        start: share of the training, in [0, 1], after which the weights set in; 0 weighs from the beginning.
        beta: of the effective number, in [0, 1).
        gamma: focusing of the focal loss.
        max_margin: of the rarest class, for ``"ldam"``.
        scale: of the logits, for ``"ldam"``: 30 for a cosine classifier, 1 for a linear layer.
        counts: training samples of each class; default the data module's ``class_counts``, or those of the training
            set's ``targets``.
        batch_fn: takes the batch, returns its inputs and targets; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; used where the step does without ``forward``.

    Raises:
        ValueError: for an argument out of range.
        MisconfigurationException: if the class counts cannot be found, or an objective of AdversarialTraining would
            ignore this callback.

    Example:
        >>> from lightning_plugins.callbacks import DeferredReweighting
        >>> callback = DeferredReweighting("ldam", start=0.8)

    Reference:
        Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, 2019.
    """

    replaces_loss = True

    @check_types
    def __init__(
        self,
        loss: Loss = "ce",
        *,
        weights: Literal["effective_number", "inverse"] | None = "effective_number",
        start: float = 0.8,
        beta: float = 0.9999,
        gamma: float = 1.0,
        max_margin: float = 0.5,
        scale: float = 1.0,
        counts: Sequence[int] | None = None,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        super().__init__(batch_fn=batch_fn, logits_fn=logits_fn)
        if loss not in ("ce", "focal", "ldam", "balanced_softmax"):
            raise ValueError(f"loss must be 'ce', 'focal', 'ldam' or 'balanced_softmax', got {loss!r}")
        if weights not in ("effective_number", "inverse", None):
            raise ValueError(f"weights must be 'effective_number', 'inverse' or None, got {weights!r}")
        if not 0 <= start <= 1:
            raise ValueError(f"start must lie in [0, 1], got {start!r}")
        if not (gamma >= 0 and scale > 0):
            raise ValueError(f"gamma must be at least 0 and scale above 0, got {gamma!r} and {scale!r}")
        effective_number_weights([1, 2], beta)  # refuses a wrong beta now
        ldam_margins([1, 2], max_margin)
        self.loss, self.weights, self.start, self.beta = loss, weights, start, beta
        self.gamma, self.max_margin, self.scale, self.counts = gamma, max_margin, scale, counts
        self._counts: Tensor | None = None
        self._weights: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counts = class_counts(trainer) if self.counts is None else torch.as_tensor(self.counts)
        if counts is None:
            raise MisconfigurationException(
                "DeferredReweighting needs the number of training samples of each class, and neither the data module "
                "has class_counts nor the training set targets; pass counts=[...]"
            )
        self._counts = counts.to(pl_module.device)
        if self.weights is None:
            self._weights = None
        elif self.weights == "effective_number":
            self._weights = effective_number_weights(self._counts, self.beta)
        else:
            self._weights = inverse_frequency_weights(self._counts)

    def around_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> STEP_OUTPUT:
        """Run the step and replace its loss."""
        logits, output = self.step_with_logits(pl_module, step, batch, batch_idx)
        _, targets = self.batch_fn(batch)
        weights = self._weights if training_progress(trainer, batch_idx) >= self.start else None
        loss = self._loss(logits, targets, weights)
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        assert self._counts is not None
        if self.loss == "focal":
            return focal_loss(logits, targets, self.gamma, weights)
        if self.loss == "ldam":
            return ldam_loss(logits, targets, ldam_margins(self._counts, self.max_margin), self.scale, weights)
        if self.loss == "balanced_softmax":
            return logit_adjusted_loss(logits, targets, self._counts, 1.0, weights)
        return weighted_cross_entropy(logits, targets, weights)
