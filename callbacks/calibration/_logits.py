"""What the calibration callbacks share: a pass over a loader outside of Lightning's own, and a look at the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_plugins._progress import progress_bar
from lightning_plugins.modes import evaluation_mode


def visit_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loader: Any,
    limit: float,
    visit: Callable[[Any], None],
    *,
    dataloader_idx: int,
) -> None:
    """Visit at most ``limit`` batches on the device, the module in evaluation mode, the global generator untouched."""
    with evaluation_mode(pl_module), isolate_rng():  # a data loader draws each time it starts
        total = min(limit, math.inf if (length := sized_len(loader)) is None else length)
        bar = progress_bar(loader, title="logits", total=int(total) if total < math.inf else None)
        for batch_idx, batch in enumerate(bar):
            if batch_idx >= limit:
                break
            batch = trainer.precision_plugin.convert_input(batch)
            visit(trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx))


def check_logits(callback: pl.Callback, logits: Any) -> None:
    """Raise unless these are logits ``(N, C)``."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        found = type(logits).__name__ + (f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "")
        raise MisconfigurationException(
            f"{type(callback).__name__} expected forward to return logits (N, C), found {found}; "
            "pass logits_fn=lambda module, inputs: ... that returns them."
        )
