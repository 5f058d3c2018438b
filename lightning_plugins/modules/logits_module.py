"""A module for data that a network has already seen."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.checks import check_types

__all__ = ["LogitsModule"]


class LogitsModule(pl.LightningModule):
    """Return the logits that come in: a network without parameters, so that callbacks can work on saved outputs.

    There is nothing to train: ``fit`` changes nothing, and a recipe does it for no epoch. Logged: ``val/nll``,
    ``val/acc``, ``test/nll`` and ``test/acc``, in nats and as a share.

    Shape:
        - batches: logits ``(N, C)``, labels ``(N,)``
        - ``forward(logits)``: the logits

    Example:
        >>> LogitsModule()(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # the automatic one asks for an optimizer

    @check_types
    def forward(self, logits: Tensor) -> Tensor:
        """Return the logits."""
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Do nothing."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log NLL and accuracy."""
        self._log("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log NLL and accuracy."""
        self._log("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return no optimizer."""
        return []

    def _log(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        logits, labels = self(batch[0]), batch[1]
        values = {"nll": F.cross_entropy(logits, labels), "acc": (logits.argmax(1) == labels).float().mean()}
        self.log_dict(
            {f"{stage}/{name}": value for name, value in values.items()},
            on_epoch=True,
            sync_dist=True,
            batch_size=len(labels),
        )
