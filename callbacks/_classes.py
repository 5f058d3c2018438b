"""What a callback asks a Trainer: class counts of the training set, and how far the training is."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor


def epochs_done(trainer: pl.Trainer, batches: int) -> float:
    """Return the epochs that lie behind after this many batches of the current one."""
    per_epoch = trainer.num_training_batches
    return trainer.current_epoch + (min(batches / per_epoch, 1.0) if 0 < per_epoch < float("inf") else 0.0)


def training_progress(trainer: pl.Trainer, batch_idx: int) -> float:
    """Return the share of the training that lies behind, in [0, 1]; 0 where nobody knows how long it will be."""
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        return min(epochs_done(trainer, batch_idx) / trainer.max_epochs, 1.0)
    return min(trainer.global_step / trainer.max_steps, 1.0) if trainer.max_steps > 0 else 0.0


def class_counts(trainer: pl.Trainer) -> Tensor | None:
    """Return how many training samples each class has, ``(C,)``; None if nobody tells."""
    try:
        counts = getattr(getattr(trainer, "datamodule", None), "class_counts", None)
    except RuntimeError:  # ours know their training set only after setup("fit"), which a bare test does without
        counts = None
    if counts is not None:
        return torch.as_tensor(counts)
    targets = getattr(getattr(trainer.train_dataloader, "dataset", None), "targets", None)
    return None if targets is None else torch.bincount(torch.as_tensor(targets).flatten())
