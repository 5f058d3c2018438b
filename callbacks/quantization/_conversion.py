"""What the callbacks that convert a module's layers share."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_plugins.callbacks._composition import check_composition


class ConvertsLayers:
    """Marks a callback that converts layers of the module; a Trainer takes one of them."""

    converts_layers = True

    def refuse_others(self, trainer: pl.Trainer) -> None:
        """Refuse a Trainer whose callbacks do not go together, or that shards parameters, before layers are converted.

        Raises:
            MisconfigurationException: for the first pair that does not, or for a sharded strategy.
        """
        check_composition(trainer)
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"{type(self).__name__} replaces layers and needs whole weights to quantize, which "
                f"{type(trainer.strategy).__name__} shards; use strategy='ddp'"
            )
