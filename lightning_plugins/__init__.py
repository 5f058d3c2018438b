"""Training methods from the literature as parts that snap onto a PyTorch Lightning Trainer.

Nothing is imported here on purpose: ``import lightning_plugins`` and ``lightning-plugins --help`` stay quick. Import
the parts from ``lightning_plugins.callbacks``, ``.calibration``, ``.data``, ``.models``, ``.modules`` and ``.recipes``.
"""

__version__ = "0.1.0"
