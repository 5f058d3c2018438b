"""The three-stage residual networks for small images."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_plugins.checks import check_types

__all__ = ["CifarResNet", "resnet20"]


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu2(out + self.shortcut(x))
        return result


class CifarResNet(nn.Module):
    """Residual network of depth ``6 n + 2`` for images of about 32 pixels, with 1x1 projections where shapes change.

    Shape:
        - input ``(N, in_channels, H, W)``, any size from 4 pixels
        - output ``(N, num_classes)`` logits

    Args:
        blocks_per_stage: ``n``, at least 1.
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage; the next two have twice and four times as many.

    Raises:
        ValueError: if a size is below 1.

    Reference:
        He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, 2016, section 4.2. The paper's nets have
        parameter-free shortcuts (its option A); projections (option B) are what the quantization papers train.
    """

    @check_types
    def __init__(self, blocks_per_stage: int, *, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        sizes = {
            "blocks_per_stage": blocks_per_stage,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "width": width,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size!r}")
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        channels = width
        stages = []
        for stage in range(3):
            out_channels = width * 2**stage
            blocks = []
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_BasicBlock(channels, out_channels, stride))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for images ``(N, in_channels, H, W)``."""
        features = self.pool(self.stages(self.stem(x))).flatten(1)
        logits: Tensor = self.fc(features)
        return logits


@check_types
def resnet20(*, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Build ResNet-20 for small images: 272,186 parameters at width 16 with one input channel.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage.

    Example:
        >>> sum(p.numel() for p in resnet20(in_channels=1).parameters())
        272186
    """
    return CifarResNet(3, num_classes=num_classes, in_channels=in_channels, width=width)
