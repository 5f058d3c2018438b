"""The residual network of binary nets: a shortcut around each convolution, and no ReLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.checks import check_types

__all__ = ["BinaryResNet", "binary_resnet20"]


class _Unit(nn.Module):
    """A convolution with its normalisation, a shortcut around both, and a hardtanh."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.Hardtanh()
        self.stride = stride
        added = channels - in_channels
        self.padding = (0, 0, 0, 0, added // 2, added - added // 2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride != 1:
            shortcut = F.avg_pool2d(shortcut, self.stride, ceil_mode=True)
        if any(self.padding):
            shortcut = F.pad(shortcut, self.padding)
        result: Tensor = self.act(self.norm(self.conv(x)) + shortcut)
        return result


class BinaryResNet(nn.Module):
    """Residual network of depth ``3 n + 2`` whose inner convolutions are made to be binary.

    Until :func:`.convert_binary_` makes them so, it is a network in fp32 like any other. What a binary network needs is
    in its structure: real values flow past each convolution in a shortcut without parameters (average pooling and zeros
    for the channels that are new), and a hardtanh, which has both signs, takes the place of ReLU. The pooled features
    are normalised before the classifier.

    Shape:
        - input ``(N, in_channels, H, W)``, any size from 4 pixels; in training N is at least 2
        - output ``(N, num_classes)`` logits

    Args:
        convolutions_per_stage: ``n``, at least 1.
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage; the next two have twice and four times as many.

    Raises:
        ValueError: if a size is below 1.

    Reference:
        Liu et al., *Bi-Real Net*, 2018, for shortcuts around each convolution; Vargas et al., *BiPer*, 2024, whose
        released ResNet-20 this follows.
    """

    @check_types
    def __init__(
        self, convolutions_per_stage: int, *, num_classes: int = 10, in_channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        sizes = {
            "convolutions_per_stage": convolutions_per_stage,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "width": width,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size!r}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.Hardtanh()
        )
        channels = width
        stages = []
        for stage in range(3):
            out_channels = width * 2**stage
            units = []
            for position in range(convolutions_per_stage):
                stride = 2 if stage > 0 and position == 0 else 1
                units.append(_Unit(channels, out_channels, stride))
                channels = out_channels
            stages.append(nn.Sequential(*units))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.norm = nn.BatchNorm1d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for images ``(N, in_channels, H, W)``."""
        features = self.pool(self.stages(self.stem(x))).flatten(1)
        logits: Tensor = self.fc(self.norm(features))
        return logits


@check_types
def binary_resnet20(*, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> BinaryResNet:
    """Build the ResNet-20 of binary networks, in fp32; :func:`.convert_binary_` makes its 18 inner layers binary.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage.

    Example:
        >>> from lightning_plugins.quantization import binary_layers, convert_binary_
        >>> len(binary_layers(convert_binary_(binary_resnet20(in_channels=1, width=4))))
        18
    """
    return BinaryResNet(6, num_classes=num_classes, in_channels=in_channels, width=width)
