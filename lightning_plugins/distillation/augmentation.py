"""Differentiable augmentation, with one draw for a real and a synthetic batch, or one for every image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.generators import PrivateGenerator

__all__ = ["AugmentationDraw", "AugmentationVariant", "Operation", "SiameseAugmentation", "augment", "augment_together"]

AugmentationVariant = Literal["vico", "idc"]
Operation = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]

_OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
_NUMBERS = {
    "flip": ("flip",),
    "color": ("brightness", "saturation", "contrast"),
    "crop": ("crop_x", "crop_y"),
    "cutout": ("cutout_x", "cutout_y"),
    "scale": ("scale_x", "scale_y"),
    "rotate": ("rotate",),
}
_SCALE, _DEGREES, _SHIFT, _BOX = 1.2, 15.0, 0.125, 0.5


@check_types
@dataclass(frozen=True)
class AugmentationDraw:
    """What was drawn for one batch; it does not depend on the size or the number of the images.

    Attributes:
        operations: in the order in which they are applied.
        numbers: uniform on [0, 1), by name: floats for all images alike, or tensors ``(N,)`` with one for each.

    Raises:
        ValueError: for an unknown operation, or one without its numbers.
    """

    operations: tuple[str, ...]
    numbers: dict[str, float] | dict[str, Tensor]

    def __post_init__(self) -> None:
        unknown = [name for name in self.operations if name not in _OPERATIONS]
        if unknown:
            raise ValueError(f"operations must be some of {', '.join(_OPERATIONS)}, got {self.operations!r}")
        missing = [name for operation in self.operations for name in _NUMBERS[operation] if name not in self.numbers]
        if missing:
            raise ValueError(f"numbers must hold {', '.join(missing)} too; SiameseAugmentation draws them")


class SiameseAugmentation:
    """Draw augmentations that the real and the synthetic images of a step share.

    The operations act on normalised images: mirroring (probability 0.5), scaling (each axis by a factor in
    [1/1.2, 1.2]), rotation by up to 15 degrees, a shift by up to 12.5 % with zeros at the border, a box of half the
    sides that is set to zero, and ``color``: brightness ``x + u - 0.5``, then saturation and contrast, which scale the
    distance from the mean over the channels by ``2 u`` and from the mean of the image by ``u + 0.5``, with u uniform on
    [0, 1).

    Args:
        operations: which are in use.
        variant: ``"vico"``: flip first, then one of the others, chosen at random; ``"idc"``: flip, color and cutout
            each time, then one of crop, scale and rotate.
        scope: what shares a draw in matching: ``"batch"`` all classes, ``"class"`` the images of one class.
        seed: of the draws.

    Raises:
        ValueError: if an operation is unknown or named twice, or an argument is out of range.

    Example:
        >>> augmentation = SiameseAugmentation(("color", "crop", "cutout"))
        >>> draws = augmentation.draw(10)
        >>> augmentation.apply(torch.rand(10, 4, 1, 28, 28), draws).shape
        torch.Size([10, 4, 1, 28, 28])

    Reference:
        B. Zhao, H. Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021, section 3.
    """

    @check_types
    def __init__(
        self,
        operations: Sequence[Operation] = ("color", "crop", "cutout"),
        *,
        variant: AugmentationVariant = "idc",
        scope: Literal["batch", "class"] = "batch",
        seed: int = 0,
    ) -> None:
        if isinstance(operations, str):
            raise ValueError(f"operations must be a sequence such as ('color', 'crop'), got the string {operations!r}")
        unknown = [name for name in operations if name not in _OPERATIONS]
        if unknown or len(set(operations)) != len(operations):
            raise ValueError(f"operations must be different ones of {', '.join(_OPERATIONS)}, got {tuple(operations)}")
        if variant not in ("vico", "idc"):
            raise ValueError(f"variant must be 'vico' or 'idc', got {variant!r}")
        if scope not in ("batch", "class"):
            raise ValueError(f"scope must be 'batch' or 'class', got {scope!r}")
        self.operations: tuple[Operation, ...] = tuple(operations)
        self.variant = variant
        self.scope = scope
        always = ("flip",) if variant == "vico" else ("flip", "color", "cutout")
        self._always = tuple(name for name in always if name in self.operations)
        self._choices = tuple(name for name in self.operations if name not in always)
        self._generator = PrivateGenerator(seed, "augmentation")

    @check_types
    def draw(self, num_classes: int) -> tuple[AugmentationDraw, ...]:
        """Draw for one step: one draw, or one for each class."""
        return tuple(self._draw(None) for _ in range(num_classes if self.scope == "class" else 1))

    @check_types
    def apply(self, images: Tensor, draws: Sequence[AugmentationDraw], *, classes: range | None = None) -> Tensor:
        """Augment the images of some classes.

        Args:
            images: normalised.
            draws: of this step.
            classes: of the images; None for ``0 .. c - 1``.

        Shape:
            - images, output: ``(c, m, channels, H, W)``

        Raises:
            ValueError: for other images, or another number of draws than classes.
        """
        if images.ndim != 5:
            raise ValueError(f"images must be (c, m, channels, H, W), got {tuple(images.shape)}")
        if len(draws) == 1:
            return augment(images.flatten(0, 1), draws[0]).reshape(images.shape)
        classes = range(len(images)) if classes is None else classes
        if len(classes) != len(images) or not len(images) or max(classes) >= len(draws):
            raise ValueError(
                f"one draw for each of {len(images)} classes was expected, got {len(draws)} and classes {classes}"
            )
        return torch.stack([augment(rows, draws[label]) for rows, label in zip(images, classes, strict=True)])

    @check_types
    def __call__(self, images: Tensor) -> Tensor:
        """Augment each of the images ``(N, channels, H, W)`` with numbers of its own, as evaluation does."""
        draw = self._draw(len(images))
        return augment(images, draw)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the draws."""
        return {"generator": self._generator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the draws where ``state`` was taken."""
        self._generator.load_state_dict(state["generator"])

    def _draw(self, count: int | None) -> AugmentationDraw:
        generator = self._generator.on("cpu")
        operations = self._always
        if self._choices:
            operations += (self._choices[int(torch.randint(len(self._choices), (), generator=generator))],)
        names = [name for operation in operations for name in _NUMBERS[operation]]
        if count is None:
            return AugmentationDraw(
                operations, dict(zip(names, torch.rand(len(names), generator=generator).tolist(), strict=True))
            )
        rows = torch.rand(len(names), count, generator=generator)
        return AugmentationDraw(operations, dict(zip(names, rows, strict=True)))


@check_types
def augment(images: Tensor, draw: AugmentationDraw) -> Tensor:
    """Apply a draw to images; differentiable in the images.

    Shape:
        - images, output: ``(N, channels, H, W)``, floating-point

    Raises:
        ValueError: for other images.

    Example:
        >>> draw = AugmentationDraw(("flip",), {"flip": 0.2})
        >>> augment(torch.tensor([[[[1.0, 2.0]]]]), draw)
        tensor([[[[2., 1.]]]])
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating-point (N, channels, H, W), got {tuple(images.shape)} of {images.dtype}"
        )
    numbers = {
        name: value.to(images.device, images.dtype) if isinstance(value, Tensor) else value
        for name, value in draw.numbers.items()
    }
    for operation in draw.operations:
        images = _FUNCTIONS[operation](images, *(numbers[name] for name in _NUMBERS[operation]))
    return images


def augment_together(images: Tensor, augmentations: Sequence[SiameseAugmentation]) -> Tensor:
    """Augment several batches, each as its own augmentation would, with one call of an operation for all that chose it.

    Shape:
        - images, output: ``(J, N, channels, H, W)``, for J augmentations of the same variant and operations

    Example:
        >>> images = torch.rand(2, 3, 1, 8, 8)
        >>> together = augment_together(images, [SiameseAugmentation(seed=seed) for seed in (1, 2)])
        >>> torch.equal(together[1], SiameseAugmentation(seed=2)(images[1]))
        True
    """
    draws = [augmentation._draw(images.shape[1]) for augmentation in augmentations]
    for operations in zip(*(draw.operations for draw in draws), strict=True):
        for name in dict.fromkeys(operations):
            rows = [row for row, operation in enumerate(operations) if operation == name]
            numbers = {key: torch.cat([draws[row].numbers[key] for row in rows]) for key in _NUMBERS[name]}  # type: ignore[misc]
            all_rows = len(rows) == len(images)
            chosen = images if all_rows else images[rows]
            chosen = augment(chosen.flatten(0, 1), AugmentationDraw((name,), numbers)).view_as(chosen)
            images = chosen if all_rows else images.index_copy(0, torch.tensor(rows, device=images.device), chosen)
    return images


def _flip(images: Tensor, u: Any) -> Tensor:
    if isinstance(u, Tensor):
        return torch.where(_column(u) < 0.5, images.flip(-1), images)
    return images.flip(-1) if u < 0.5 else images


def _color(images: Tensor, u_brightness: Any, u_saturation: Any, u_contrast: Any) -> Tensor:
    b, s, c = _column(u_brightness) - 0.5, 2 * _column(u_saturation), _column(u_contrast) + 0.5
    if images.shape[1] == 1:  # saturation is the identity, as a channel is its own mean
        centre = images.mean((1, 2, 3), keepdim=True)
        rest, factor = centre * (1 - c) + b, c
    else:
        # Saturation leaves the mean over the channels alone, hence also the mean of the image, and brightness commutes
        # with both. So the three steps are one weighted sum.
        grey = images.mean(1, keepdim=True)
        centre = grey.mean((2, 3), keepdim=True)
        rest, factor = grey * (c * (1 - s)) + (centre * (1 - c) + b), c * s
    if isinstance(factor, Tensor):
        return torch.addcmul(rest, images, factor)
    return torch.add(rest, images, alpha=factor)


def _crop(images: Tensor, u_x: Any, u_y: Any) -> Tensor:
    height, width = images.shape[-2:]
    dx, dy = _integer_shift(u_x, width), _integer_shift(u_y, height)
    if not isinstance(dx, Tensor):
        return F.pad(images, (-dx, dx, -dy, dy))  # a negative pad cuts off
    rows = torch.arange(height, device=images.device) + dy[:, None]
    columns = torch.arange(width, device=images.device) + dx[:, None]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    taken = images.gather(2, rows[:, None, :, None].expand_as(images))
    shifted: Tensor = taken.gather(3, columns[:, None, None, :].expand_as(images)) * inside
    return shifted


def _integer_shift(u: Any, side: int) -> Any:
    most = int(side * _SHIFT + 0.5)
    return _floor(u * (2 * most + 1)) - most


def _cutout(images: Tensor, u_x: Any, u_y: Any) -> Tensor:
    kept_rows = _outside(images, u_y, images.shape[-2])
    kept_columns = _outside(images, u_x, images.shape[-1])
    cut: Tensor = images * (kept_rows[..., :, None] | kept_columns[..., None, :])
    return cut


def _outside(images: Tensor, u: Any, side: int) -> Tensor:
    """Which positions lie outside of the box: ``(side,)``, or ``(N, 1, side)`` for numbers per image."""
    size = int(side * _BOX + 0.5)
    start = _floor(u * (side + 1 - size % 2)) - size // 2
    positions = torch.arange(side, device=images.device)
    if isinstance(start, Tensor):
        start = start[:, None, None]
    outside: Tensor = (positions < start) | (positions >= start + size)
    return outside


def _scale(images: Tensor, u_x: Any, u_y: Any) -> Tensor:
    low, high = 1 / _SCALE, _SCALE
    x, y = low + (high - low) * _tensor(u_x, images), low + (high - low) * _tensor(u_y, images)
    zero = torch.zeros_like(x)
    return _transform(images, torch.stack([x, zero, zero, zero, y, zero], -1))


def _rotate(images: Tensor, u: Any) -> Tensor:
    angle = (2 * _tensor(u, images) - 1) * math.radians(_DEGREES)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _transform(images, torch.stack([cos, -sin, zero, sin, cos, zero], -1))


def _transform(images: Tensor, theta: Tensor) -> Tensor:
    theta = theta.view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(theta), *images.shape[1:]], align_corners=False)
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)


def _column(u: Any) -> Any:
    return u.view(-1, 1, 1, 1) if isinstance(u, Tensor) else u


def _floor(value: Any) -> Any:
    return value.floor().long() if isinstance(value, Tensor) else math.floor(value)


def _tensor(u: Any, images: Tensor) -> Tensor:
    return u if isinstance(u, Tensor) else torch.full((1,), u, dtype=images.dtype, device=images.device)


_FUNCTIONS: dict[str, Any] = {
    "flip": _flip,
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "scale": _scale,
    "rotate": _rotate,
}
