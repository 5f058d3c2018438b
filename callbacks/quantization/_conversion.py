"""What the callbacks that convert a module's layers share."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_plugins.callbacks._composition import check_composition


class ConvertsLayers:
    """Marks a callback that converts layers of the module; a Trainer takes one of them."""

    converts_layers = True

    def refuse_others(self, trainer: pl.Trainer) -> None:
        """Refuse a Trainer whose callbacks do not go together, before the layers are converted.

        Raises:
            MisconfigurationException: for the first pair that does not.
        """
        check_composition(trainer)
