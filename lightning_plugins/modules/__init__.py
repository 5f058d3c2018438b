"""LightningModules that the recipes train."""

from lightning_plugins.modules.image_classifier import ImageClassifier

__all__ = ["ImageClassifier"]
