"""Where a distillation takes its real images from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset

from lightning_plugins.data.distilled import DATA_ARGUMENTS
from lightning_plugins.distillation.pool import ClassPool

__all__ = ["read_pool", "take_over_training_loader"]


def read_pool(trainer: pl.Trainer, dataset: Dataset[Any] | None, *, seed: int) -> tuple[ClassPool, dict[str, Any]]:
    """Read the real training images onto the Trainer's device, without augmentation.

    Args:
        trainer: with a data module, unless ``dataset`` is given.
        dataset: images in [0, 1] with their class, in place of the data module's.
        seed: of the pool's draws.

    Returns:
        The pool, and what the exported set is to say about the data.

    Raises:
        MisconfigurationException: if there are no real images.
    """
    data: Any = getattr(trainer, "datamodule", None)
    source: Any = dataset
    facts: dict[str, Any] = {}
    about: dict[str, Any] = {}
    if source is None and data is not None:
        if getattr(data, "train_set", None) is None and hasattr(data, "train_set"):
            data.setup("fit")
        source = getattr(data, "train_set", None)
        if source is None:
            source = getattr(data.train_dataloader(), "dataset", None)
        facts = {name: getattr(data, name, None) for name in ("num_classes", "mean", "std", "class_names")}
        about = {"name": type(data).__name__}
        for name in DATA_ARGUMENTS:
            if isinstance(getattr(data, name, None), (int, float)):
                about[name] = getattr(data, name)
    if source is None:
        raise MisconfigurationException(
            "DatasetDistillation needs real images and found none; pass a data module with a train_set to fit, or "
            "dataset=... to the module"
        )
    if getattr(source, "augment", None) is not None:
        source = copy.copy(source)
        source.augment = None  # the images themselves, not one augmented view of each
    return ClassPool.from_dataset(source, device=trainer.strategy.root_device, seed=seed, **facts), about


def take_over_training_loader(module: pl.LightningModule) -> Callable[[], None] | None:
    """Let an epoch be a number of iterations, where the data module would deliver batches that nobody needs.

    Returns:
        What gives the data module its own loader back; None without a data module.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    if data is None:
        return None
    original, before = data.train_dataloader, vars(data).get("train_dataloader")

    def train_dataloader() -> Any:
        # After a run that ended in an exception nothing has given the loader back; other modules get theirs.
        mine = data.trainer is not None and data.trainer.lightning_module is module
        return module.train_dataloader() if mine else original()

    def give_back() -> None:
        if before is None:
            vars(data).pop("train_dataloader", None)
        else:
            data.train_dataloader = before

    data.train_dataloader = train_dataloader
    return give_back
