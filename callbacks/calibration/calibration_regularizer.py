"""A term for calibration in the loss of any module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_plugins.batches import BatchFn, LogitsFn
from lightning_plugins.calibration.h_calibration import h_calibration_loss
from lightning_plugins.calibration.kernel_density import ece_kde
from lightning_plugins.calibration.losses import mmce, soft_binned_ece, weighted_mmce
from lightning_plugins.callbacks.training_step import Step, TrainingStepCallback
from lightning_plugins.checks import check_types
from lightning_plugins.mixing import MixedLabels

__all__ = ["CalibrationRegularizer"]

Term = Literal["mmce", "weighted_mmce", "soft_ece", "ece_kde", "h_loss"]


def _h_loss(logits: Tensor, target: Tensor) -> Tensor:
    # A batch has N C events, and the running mean must have enough to run over.
    window = min(200, logits.numel() // 8 * 2)
    return h_calibration_loss(logits.softmax(1), target, window=window)


def _ece_kde(logits: Tensor, target: Tensor) -> Tensor:
    # The likelihood of a bandwidth is not differentiable in it, and a batch is too small to choose one.
    return ece_kde(logits, target, bandwidth=0.1, input="logits")


_TERMS: dict[str, Callable[..., Tensor]] = {
    "mmce": mmce,
    "weighted_mmce": weighted_mmce,
    "soft_ece": soft_binned_ece,
    "ece_kde": _ece_kde,
    "h_loss": _h_loss,
}


def _hard(targets: Tensor) -> Tensor:
    if isinstance(targets, MixedLabels):
        return targets.dominant
    return targets.argmax(1) if targets.ndim == 2 else targets


class CalibrationRegularizer(TrainingStepCallback):
    """Add a measure of miscalibration on each batch to the loss of the module's own training step.

    ``loss + strength * term(logits, targets)``, with the logits that ``forward`` returned in the step. Where targets
    are soft or mixed, the term takes the class with the largest share.

    Logged once an epoch: ``calibration/train_<term>``, the mean of the term over batches.

    It must stand behind :class:`MixedSampleAugmentation`, and before what replaces the loss.

    Args:
        term: ``"mmce"``, ``"weighted_mmce"``, ``"soft_ece"`` (see :func:`.soft_binned_ece`, for batches of some 128
            samples), ``"ece_kde"`` (see :func:`.ece_kde`, with bandwidth 0.1), or ``"h_loss"`` (see
            :func:`.h_calibration_loss`; experimental, not from its paper).
        strength: factor of the term, at least 0; None is 2 for the two forms of MMCE, as in their code, and 1 for the
            others.
        batch_fn: takes the batch, returns its inputs and targets; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; used where the step does without ``forward``.

    Raises:
        ValueError: for an unknown term or a strength out of range.
        MisconfigurationException: in ``setup``, behind a callback that replaces the loss.

    Example:
        >>> from lightning_plugins.callbacks import CalibrationRegularizer
        >>> callback = CalibrationRegularizer("mmce", strength=2.0)
    """

    adds_to_loss = True

    @check_types
    def __init__(
        self,
        term: Term = "mmce",
        *,
        strength: float | None = None,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        super().__init__(batch_fn=batch_fn, logits_fn=logits_fn)
        if term not in _TERMS:
            raise ValueError(f"term must be one of {', '.join(map(repr, _TERMS))}, got {term!r}")
        if strength is not None and not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be at least 0 and finite, got {strength!r}")
        self.term = term
        self.strength = (2.0 if "mmce" in term else 1.0) if strength is None else strength
        self._mean = MeanMetric(nan_strategy="disable")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mean.to(pl_module.device).reset()

    def around_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> STEP_OUTPUT:
        """Run the step and add the term to its loss."""
        logits, output = self.step_with_logits(pl_module, step, batch, batch_idx)
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            return output
        term = _TERMS[self.term](logits.float(), _hard(self.batch_fn(batch)[1]))
        self._mean.update(term.detach())
        loss = loss + self.strength * term
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._mean.update_called:
            pl_module.log(f"calibration/train_{self.term}", self._mean.compute(), sync_dist=True)
            self._mean.reset()
