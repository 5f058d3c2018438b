"""What the callbacks that convert a module's layers share."""

from __future__ import annotations


class ConvertsLayers:
    """Marks a callback that converts layers of the module; a Trainer takes one of them."""

    converts_layers = True
    needs_whole_weights = True
