"""The three-block convolutional network of dataset distillation."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_plugins.checks import check_types

__all__ = ["ConvNet3", "convnet3"]


class ConvNet3(nn.Module):
    """Three blocks of convolution, instance normalisation, ReLU and average pooling, then one linear layer.

    Instance normalisation is a GroupNorm with one group per channel and learned scale and shift, as the published
    distillation code has it. One-channel images are padded by two more pixels on each side (28 becomes 32), so that the
    feature size is the same for Fashion-MNIST and CIFAR.

    Shape:
        - input ``(N, in_channels, image_size, image_size)``
        - output ``(N, num_classes)`` logits

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; None means 28 for one channel and 32 otherwise.
        width: channels of each block.

    Raises:
        ValueError: if the images are too small for three poolings, or a size is below 1.

    Reference:
        Gidaris, Komodakis, *Dynamic Few-Shot Visual Learning without Forgetting*, 2018, for the network; Zhao, Mopuri,
        Bilen, *Dataset Condensation with Gradient Matching*, 2021, for its use in distillation.
    """

    @check_types
    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 3, image_size: int | None = None, width: int = 128
    ) -> None:
        super().__init__()
        for name, size in {"num_classes": num_classes, "in_channels": in_channels, "width": width}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size!r}")
        grey = in_channels == 1
        if image_size is None:
            image_size = 28 if grey else 32
        side = (image_size + 4 if grey else image_size) // 8
        if side < 1:
            raise ValueError(f"image_size must be at least {4 if grey else 8} for three poolings, got {image_size!r}")
        blocks: list[nn.Module] = []
        channels = in_channels
        for block in range(3):
            padding = 3 if grey and block == 0 else 1
            blocks += [
                nn.Conv2d(channels, width, 3, padding=padding),
                nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
            channels = width
        self.features = nn.Sequential(*blocks, nn.Flatten(1))
        self.fc = nn.Linear(width * side * side, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for images ``(N, in_channels, H, W)``."""
        logits: Tensor = self.fc(self.features(x))
        return logits


@check_types
def convnet3(
    *, num_classes: int = 10, in_channels: int = 3, image_size: int | None = None, width: int = 128
) -> ConvNet3:
    """Build :class:`ConvNet3`: 320,010 parameters for CIFAR-10, 317,706 for Fashion-MNIST.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; None means 28 for one channel and 32 otherwise.
        width: channels of each block.

    Example:
        >>> sum(p.numel() for p in convnet3().parameters())
        320010
    """
    return ConvNet3(num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)
