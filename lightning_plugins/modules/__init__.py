"""LightningModules that the recipes train."""

from lightning_plugins.modules.dataset_distillation import DatasetDistillation
from lightning_plugins.modules.image_classifier import ImageClassifier
from lightning_plugins.modules.logits_module import LogitsModule
from lightning_plugins.modules.objective_comparison import ObjectiveComparison

__all__ = ["DatasetDistillation", "ImageClassifier", "LogitsModule", "ObjectiveComparison"]
