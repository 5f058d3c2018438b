"""Generated images of small shapes, every class mirrored as often as not: no files, drawn in a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.data.base import ImageDataModule, crop_and_flip
from lightning_plugins.data.transforms import TargetTransform

__all__ = ["ShapesDataModule", "draw_shapes"]

Polygon = tuple[tuple[float, float], ...]

# Corners (x, y) in [-1, 1], y downwards. The last two are their own mirror images, the others are not, and none is
# another's mirror image.
SHAPES: dict[str, Polygon] = {
    "arrow": ((-1, -0.25), (0.1, -0.25), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.25), (-1, 0.25)),
    "boot": ((-0.6, -1), (0.1, -1), (0.1, 0.3), (0.9, 0.4), (0.9, 1), (-0.6, 1)),
    "bracket": ((-0.7, -0.9), (0.7, -0.9), (0.7, -0.5), (-0.3, -0.5), (-0.3, 0.5), (0.7, 0.5), (0.7, 0.9), (-0.7, 0.9)),
    "fish": ((-0.9, 0), (-0.1, -0.6), (0.5, -0.1), (1, -0.6), (1, 0.6), (0.5, 0.1), (-0.1, 0.6)),
    "flag": ((-0.7, -1), (-0.4, -1), (0.9, -0.45), (-0.4, 0.1), (-0.4, 1), (-0.7, 1)),
    "seven": ((-0.8, -1), (0.8, -1), (0.8, -0.65), (-0.1, 1), (-0.5, 1), (0.3, -0.6), (-0.8, -0.6)),
    "stairs": ((-1, 1), (-1, 0.4), (-0.35, 0.4), (-0.35, -0.2), (0.3, -0.2), (0.3, -0.8), (1, -0.8), (1, 1)),
    "wedge": ((-0.9, 0.9), (0.9, 0.9), (0.9, -0.9)),
    "cross": (
        *((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)),
        *((0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
    ),
    "diamond": ((0, -1), (0.8, 0), (0, 1), (-0.8, 0)),
}
SIDE = 16
_FINER = 3  # points per side and pixel, whose mean is the pixel


class ShapesDataModule(ImageDataModule):
    """Ten grey shapes of 16x16 pixels at random places, sizes, angles and contrasts, under noise.

    Eight of the shapes (arrow, boot, bracket, fish, flag, seven, stairs, wedge) differ from their mirror images, two
    (cross, diamond) do not. Exactly half of the training and of the test images of each class are mirrored, and what
    else is drawn does not depend on it, so that an image and its mirror image are equally likely: what the flip union
    of dataset distillation takes for granted, see :class:`.FlipUnion`. With ``mirrored=0`` every class faces one way.
    Splitting off validation images keeps this law, while the numbers may differ by a few.

    The 1,000 test images are the same for every seed, so that test figures compare. ``augmentation=True`` is a random
    crop with 4 pixels of padding and a horizontal flip.

    Args:
        train_per_class: training images of each class, at least 1; validation images are taken from them.
        mirrored: share of the images of each class that is mirrored, in [0, 1].
        batch_size: see :class:`ImageDataModule`, as for all further arguments; ``root`` is not needed.
        num_workers: loading processes.
        val_fraction: share of the training images held out for validation.
        image_size: side in pixels; None for 16.
        augmentation: a callable on one image, or a bool.
        transforms: changes of the training labels.
        transform_validation: whether they act on the validation split too.
        with_index: whether training batches hold the samples' indices as a third element.
        seed: of the training images, split, transforms, order and augmentation.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> data = ShapesDataModule(train_per_class=50)
        >>> data.setup()
        >>> len(data.train_set), len(data.val_set), len(data.test_set), data.train_set[0][0].shape
        (450, 50, 1000, torch.Size([1, 16, 16]))
    """

    num_classes = 10
    in_channels = 1
    native_size = SIDE
    mean = (0.2322,)
    std = (0.2245,)
    class_names = tuple(SHAPES)

    @check_types
    def __init__(
        self,
        *,
        train_per_class: int = 200,
        mirrored: float = 0.5,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        image_size: int | None = None,
        augmentation: bool | nn.Module | Callable[[Tensor], Tensor] = True,
        transforms: Sequence[TargetTransform] = (),
        transform_validation: bool = True,
        with_index: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            val_fraction=val_fraction,
            image_size=image_size,
            augmentation=augmentation,
            transforms=transforms,
            transform_validation=transform_validation,
            with_index=with_index,
            seed=seed,
        )
        _check(train_per_class, mirrored, "train_per_class")
        self.train_per_class = train_per_class
        self.mirrored = mirrored

    def load(self, split: Literal["train", "val", "test"]) -> tuple[Tensor, Tensor] | None:
        """Draw the images ``(N, 1, 16, 16)`` uint8 and the labels of the training or test part."""
        if split == "val":
            return None
        if split == "train":
            return draw_shapes(self.train_per_class, mirrored=self.mirrored, seed=self.seed)
        return draw_shapes(100, mirrored=self.mirrored, seed=0, purpose="test")

    def default_augmentation(self) -> Callable[[Tensor], Tensor]:
        """Return a random crop with 4 pixels of padding and a horizontal flip."""
        return crop_and_flip(self.native_size)


@check_types
@check_types
def draw_shapes(
    per_class: int, *, mirrored: float = 0.5, seed: int = 0, purpose: str = "train"
) -> tuple[Tensor, Tensor]:
    """Draw images of every shape, of which a share is mirrored.

    Args:
        per_class: n, at least 1.
        mirrored: share in [0, 1] of the images of each class, rounded to a whole number of them.
        seed: of everything that is drawn, at least 0.
        purpose: images for another purpose are others.

    Shape:
        - images: ``(10 n, 1, 16, 16)`` uint8
        - labels: ``(10 n,)`` int64, ``0 .. 9`` in turn

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> images, labels = draw_shapes(2)
        >>> images.shape, labels.bincount().tolist()
        (torch.Size([20, 1, 16, 16]), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    _check(per_class, mirrored, "per_class")
    generator = torch.Generator()
    generator.manual_seed(int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)[0]))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    axis = (torch.arange(_FINER * SIDE, dtype=torch.float64) + 0.5) / (_FINER * SIDE) * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    drawn = []
    for polygon in SHAPES.values():
        half_width = uniform(0.55, 0.8, per_class, 1, 1)
        angle = uniform(-0.25, 0.25, per_class, 1, 1)
        left, top = uniform(-0.15, 0.15, per_class, 1, 1), uniform(-0.15, 0.15, per_class, 1, 1)
        u, v = (x - left) / half_width, (y - top) / half_width
        inside = _inside(polygon, angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u)
        cover = inside.double().view(per_class, SIDE, _FINER, SIDE, _FINER).mean((2, 4))
        ground, ink = uniform(0.0, 0.25, per_class, 1, 1), uniform(0.3, 0.75, per_class, 1, 1)
        noise = 0.1 * torch.randn(cover.shape, generator=generator, dtype=torch.float64)
        images = ((ground + ink * cover + noise) * 255).round().clamp(0, 255).to(torch.uint8)
        chosen = torch.randperm(per_class, generator=generator)[: round(mirrored * per_class)]
        images[chosen] = images[chosen].flip(-1)
        drawn.append(images)
    images = torch.stack(drawn, 1).flatten(0, 1)[:, None]
    return images, torch.arange(len(SHAPES)).repeat(per_class)


def _inside(polygon: Polygon, x: Tensor, y: Tensor) -> Tensor:
    """Whether points are inside, by the number of sides that a ray to the right crosses."""
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (x1, y1), (x2, y2) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
        if y1 != y2:
            inside ^= ((y < y1) != (y < y2)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside


def _check(per_class: int, mirrored: float, name: str) -> None:
    if not (isinstance(per_class, int) and per_class >= 1):
        raise ValueError(f"{name} must be an integer of at least 1, got {per_class!r}")
    if not 0 <= mirrored <= 1:
        raise ValueError(f"mirrored must lie in [0, 1], the share of mirrored images, got {mirrored!r}")
