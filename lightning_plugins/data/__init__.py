"""Data modules that deliver images in [0, 1], and label transforms for any of them.

The embedded default is :class:`DigitsDataModule`, which needs neither files nor a network.
"""

from lightning_plugins.data.base import ImageDataModule
from lightning_plugins.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from lightning_plugins.data.digits import DigitsDataModule
from lightning_plugins.data.distilled import DistilledDataModule, DistilledDataset
from lightning_plugins.data.fashion_mnist import FashionMNISTDataModule
from lightning_plugins.data.image_folder import ImageFolderDataModule
from lightning_plugins.data.loading import ImageDataset, ResumableLoader, SeededSampler, without_augmentation
from lightning_plugins.data.logits import LogitsDataModule, read_logits
from lightning_plugins.data.shapes import ShapesDataModule, draw_shapes
from lightning_plugins.data.transforms import (
    ClassOverlap,
    Imbalance,
    LabelNoise,
    TargetTransform,
    class_overlap,
    make_imbalanced,
    stratified_split,
    symmetric_label_noise,
)

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "ClassOverlap",
    "DigitsDataModule",
    "DistilledDataModule",
    "DistilledDataset",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolderDataModule",
    "Imbalance",
    "LabelNoise",
    "LogitsDataModule",
    "ResumableLoader",
    "SeededSampler",
    "ShapesDataModule",
    "TargetTransform",
    "class_overlap",
    "draw_shapes",
    "make_imbalanced",
    "read_logits",
    "stratified_split",
    "symmetric_label_noise",
    "without_augmentation",
]
