"""The classifier that the recipes train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_plugins.checks import check_types
from lightning_plugins.grouped import ClassAccuracy
from lightning_plugins.models import build_model

__all__ = ["ImageClassifier"]


class ImageClassifier(pl.LightningModule):
    """Train and evaluate any image classifier.

    ``forward`` takes images in [0, 1], normalises them inside, and returns logits: what attacks, calibrators and
    exports need. Logged once an epoch: ``train/loss_epoch``, ``train/acc``; for ``val`` and ``test``: ``acc``,
    ``balanced_acc`` (mean over classes), ``worst_acc`` (least of the classes), ``nll`` (nats). ``train/loss`` is logged
    every ``log_every_n_steps`` steps, as this process's mean since the last time.

    Args:
        model: a network from :mod:`lightning_plugins.models` or torchvision by name, or any module from images to
            logits.
        num_classes: number of logits ``C``. A recipe that leaves it out takes it from its data module, and so the next
            two, ``mean`` and ``std``.
        in_channels: channels of the images, where ``model`` is a name; None means 3.
        image_size: height and width in pixels, for named networks that ask for it.
        model_args: further arguments of a named network, such as ``{"width": 8}``.
        mean: per channel, on the [0, 1] scale; None together with ``std`` means no normalisation.
        std: per channel, same unit.
        criterion: loss from logits and targets; default cross-entropy. Soft targets ``(N, C)`` reach it unchanged.
        optimizer: callable from parameters to an optimizer; default AdamW.
        lr_scheduler: callable from the optimizer to a learning-rate scheduler, or None.
        lr_scheduler_interval: whether the scheduler counts epochs or optimizer steps.

    Shape:
        - batches ``(images (N, in_channels, H, W) float in [0, 1], targets (N,) integer)``
        - ``forward(images)``: logits ``(N, C)``

    Raises:
        ValueError: for wrong arguments; during a run for labels outside [0, C) or images that are not finite (checked
            while the batch is on the CPU, before any weight changes), and when the training loss is not finite.

    Example:
        >>> module = ImageClassifier("resnet20", num_classes=10, in_channels=1, model_args={"width": 4})
        >>> module(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    mean: Tensor
    std: Tensor

    @check_types
    def __init__(
        self,
        model: nn.Module | str,
        *,
        num_classes: int | None = None,
        in_channels: int | None = None,
        image_size: int | None = None,
        model_args: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        criterion: nn.Module | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        if num_classes is None or num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}; it is the data's number of classes")
        if (mean is None) != (std is None):
            raise ValueError(f"give both mean and std or neither, got mean={mean!r}, std={std!r}")
        if std is not None and not all(value > 0 for value in std):
            raise ValueError(f"std must be positive in each channel, got {std!r}")
        if lr_scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"lr_scheduler_interval must be 'epoch' or 'step', got {lr_scheduler_interval!r}")
        # A checkpoint must load with weights_only, so it keeps the plain arguments and no object.
        objects = ["criterion", "optimizer", "lr_scheduler"]
        self.save_hyperparameters(ignore=objects if isinstance(model, str) else [*objects, "model"])
        if isinstance(model, str):
            model = build_model(
                model,
                num_classes=num_classes,
                in_channels=3 if in_channels is None else in_channels,
                image_size=image_size,
                **(model_args or {}),
            )
        elif model_args:
            raise ValueError(f"model_args={model_args!r} needs a model name; {type(model).__name__} is built already")
        self.model = model
        self.num_classes = num_classes
        self.register_buffer("mean", torch.tensor(mean if mean is not None else 0.0).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std if std is not None else 1.0).view(-1, 1, 1))
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        # Not the default of the argument: in a recipe, AdamW's weight decay would stay when SGD takes its place.
        self.optimizer: OptimizerCallable = optimizer if optimizer is not None else torch.optim.AdamW
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.train_accuracy = ClassAccuracy(num_classes)
        # Without a NaN strategy a MeanMetric never makes an accelerator wait, but it ignores weights too; so it is
        # given one value for each sample.
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.recent_loss = MeanMetric(nan_strategy="disable", sync_on_compute=False)
        self.accuracy = ClassAccuracy(num_classes)
        self.nll = MeanMetric(nan_strategy="disable")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, C)`` for images ``(N, in_channels, H, W)`` in [0, 1]."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse wrong labels and non-finite images while the batch is on the CPU, where looking is cheap."""
        if isinstance(batch, (tuple, list)) and len(batch) >= 2:
            images, targets = batch[:2]
            if images.device.type == "cpu" and not images.isfinite().all():
                first = (~images.isfinite()).flatten(1).any(1).nonzero()[0].item()
                raise ValueError(
                    f"a batch has images that are not finite (at index {first}, maybe others); clean the data set"
                )
            if targets.device.type == "cpu" and targets.ndim == 1 and len(targets):
                low, high = targets.min().item(), targets.max().item()
                if low < 0 or high >= self.num_classes:
                    raise ValueError(
                        f"labels must lie in [0, {self.num_classes}), got {low if low < 0 else high}; correct the data "
                        "set or num_classes"
                    )
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the criterion on one batch."""
        images, targets = batch[:2]
        logits = self(images)
        loss: Tensor = self.criterion(logits, targets)
        hard = targets.argmax(1) if targets.ndim == 2 else targets
        self.train_accuracy.update(logits.detach(), hard)
        for metric in (self.train_loss, self.recent_loss):
            metric.update(loss.detach().expand(len(images)))
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._refuse_non_finite_loss()
            self.log("train/loss", self.recent_loss.compute())
            self.recent_loss.reset()
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training loss and accuracy."""
        self._refuse_non_finite_loss()
        self.log("train/loss_epoch", self.train_loss.compute(), prog_bar=True, sync_dist=True)
        self.log("train/acc", self.train_accuracy.compute()["acc"], sync_dist=True)
        self.train_loss.reset()
        self.train_accuracy.reset()

    def _evaluation_step(self, batch: Any) -> None:
        images, targets = batch[:2]
        logits = self(images)
        self.accuracy.update(logits, targets)
        self.nll.update(F.cross_entropy(logits.float(), targets, reduction="none"))

    def _log_evaluation(self, stage: str) -> None:
        metrics = {**self.accuracy.compute(), "nll": self.nll.compute()}
        values = {f"{stage}/{name}": value for name, value in metrics.items()}
        # torchmetrics has reduced the values over processes already; sync_dist only tells Lightning so.
        self.log_dict(values, prog_bar=stage == "val", sync_dist=True)
        self.accuracy.reset()
        self.nll.reset()

    def on_validation_start(self) -> None:
        """Stop before a checkpoint of a diverged model can replace a good one."""
        if not self.trainer.sanity_checking:
            self._refuse_non_finite_loss()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count one batch."""
        self._evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_evaluation("val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count one batch."""
        self._evaluation_step(batch)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return logits for a batch of images, with or without targets."""
        logits: Tensor = self(batch[0] if isinstance(batch, (tuple, list)) else batch)
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and the scheduler."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_scheduler_interval}
        if hasattr(scheduler, "monitor"):  # Lightning's ReduceLROnPlateau carries it
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    def _refuse_non_finite_loss(self) -> None:
        if not self.train_loss.mean_value.isfinite():
            raise ValueError(
                f"the training loss is not finite any more (step {self.global_step}, epoch {self.current_epoch}); "
                "lower the learning rate, clip gradients, or look for faulty images; the last checkpoint is from before"
            )
