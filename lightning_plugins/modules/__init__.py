"""LightningModules that the recipes train."""

from lightning_plugins.modules.image_classifier import ImageClassifier
from lightning_plugins.modules.objective_comparison import ObjectiveComparison

__all__ = ["ImageClassifier", "ObjectiveComparison"]
