"""Passes over the training data outside of training: its samples once, without augmentation, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_plugins._progress import progress_bar
from lightning_plugins.batches import LogitsFn
from lightning_plugins.data.loading import without_augmentation
from lightning_plugins.features import PenultimateFeatures, classifier_layer
from lightning_plugins.modes import evaluation_mode


def find_head(pl_module: pl.LightningModule, name: str | None) -> nn.Linear:
    """Return the linear classifier of a module: the named one, or the last one registered.

    Raises:
        MisconfigurationException: if there is none.
    """
    try:
        head = classifier_layer(pl_module) if name is None else pl_module.get_submodule(name)
    except (ValueError, AttributeError) as error:
        raise MisconfigurationException(f"{error}; pass head= the name of the linear classifier") from error
    if not isinstance(head, nn.Linear):
        raise MisconfigurationException(
            f"head={name!r} must be an nn.Linear, found {type(head).__name__}; pass the name of the linear classifier"
        )
    return head


@contextmanager
def evaluating(pl_module: pl.LightningModule, seed: int) -> Iterator[None]:
    """Put the module into eval mode, seed the global generator, and put both back as they were."""
    # What loads the data may draw from the global generators; a resumed run must see the same draws.
    with evaluation_mode(pl_module), isolate_rng(), torch.no_grad():
        torch.manual_seed(seed)
        yield


def head_inputs_and_outputs(
    trainer: pl.Trainer, pl_module: pl.LightningModule, head: nn.Linear, logits_fn: LogitsFn, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return features ``(N, D)`` and logits ``(N, C)`` of a forward pass, float32 or float64.

    Raises:
        MisconfigurationException: if the head is not what gives the logits.
    """
    with PenultimateFeatures(head) as seen, trainer.precision_plugin.forward_context():
        logits = logits_fn(pl_module, inputs)
    features = seen.last
    if features.ndim != 2 or logits.ndim != 2 or logits.shape[1] != head.out_features:
        raise MisconfigurationException(
            f"a linear head from features (N, D) to the {head.out_features} logits was expected, found features "
            f"{tuple(features.shape)} and logits {tuple(logits.shape)}; pass head= the name of the linear classifier"
        )
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.to(wide), logits.to(wide)


def classes_of(targets: Tensor) -> Tensor:
    """Return classes ``(N,)`` for classes or soft targets ``(N, C)``."""
    return targets.argmax(1) if targets.ndim == 2 else targets


def training_batches(
    trainer: pl.Trainer, choose: Callable[[int], Sequence[int]] | None = None, *, share: bool = True
) -> Iterator[Any]:
    """Yield this process's batches of the training data, each sample once, on its device, as the module gets them.

    The data set is read by a loader of its own, since the Trainer's may be in the middle of an epoch that a checkpoint
    remembers, may repeat or drop samples, or draw some classes more often. Our own data sets give their images without
    augmentation. As many samples are read as an epoch has. Data that cannot be indexed come from the Trainer's loader.

    Args:
        trainer: inside ``fit``.
        choose: takes the number of samples and returns the indices of those to read; default the first ones.
        share: each process reads its share; otherwise all of them read everything.
    """
    loader = next(iter(CombinedLoader(trainer.train_dataloader).flattened), None)
    title = "training data once more"
    if loader is None:
        return
    batches = trainer.num_training_batches
    dataset = getattr(loader, "dataset", None)
    indexable = (
        isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")
    )
    if not indexable:
        for number, batch in enumerate(progress_bar(loader, title=title)):
            if number >= batches:
                break
            yield _on_device(trainer, batch)
        return
    batch_size = loader.batch_size or 64
    size = len(dataset)  # type: ignore[arg-type]
    if choose is not None:
        indices = choose(size)
    else:
        limited = batches < len(loader)
        indices = range(min(size, int(batches) * batch_size * trainer.world_size) if limited else size)
    if share:
        indices = indices[trainer.global_rank :: trainer.world_size]
    part: Dataset[Any] = Subset(without_augmentation(dataset), indices)
    own = DataLoader(
        part,
        batch_size=batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        generator=torch.Generator(),
    )
    for batch in progress_bar(own, title=title):
        yield _on_device(trainer, batch)


def _on_device(trainer: pl.Trainer, batch: Any) -> Any:
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
