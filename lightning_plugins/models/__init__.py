"""Small reference networks that torchvision lacks, and one way to build any network by name."""

from lightning_plugins.models.binary_resnet import BinaryResNet, binary_resnet20
from lightning_plugins.models.convnet import ConvNet3, convnet3
from lightning_plugins.models.factory import build_model
from lightning_plugins.models.resnet import CifarResNet, resnet20

__all__ = [
    "BinaryResNet",
    "CifarResNet",
    "ConvNet3",
    "binary_resnet20",
    "build_model",
    "convnet3",
    "resnet20",
]
