"""What the callbacks that convert a module's layers share."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException


class ConvertsLayers:
    """Marks a callback that replaces layers of the module; a Trainer takes one of them."""

    def refuse_others(self, trainer: pl.Trainer) -> None:
        """Refuse a Trainer with another callback of this kind.

        Raises:
            MisconfigurationException: if there is one.
        """
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, ConvertsLayers) and other is not self:
                raise MisconfigurationException(
                    f"{type(self).__name__} and {type(other).__name__} both convert the layers of the module; leave "
                    "one of them out"
                )
