"""Real images, sorted by class and kept on the device of the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.generators import PrivateGenerator

__all__ = ["ClassPool", "RealBatch"]


@check_types
@dataclass(frozen=True)
class RealBatch:
    """The same number of real images of some classes, which are fetched and normalised when they are asked for.

    Attributes:
        source: uint8 or floating images that the indices point into.
        indices: positions in ``source``.
        classes: the classes of the rows of ``indices``, a contiguous range.
        scale: factor per channel that normalises a stored value.
        shift: what is added after it.

    Shape:
        - source: ``(N, C, H, W)``
        - indices: ``(c, B)`` int64
        - scale, shift: ``(C, 1, 1)``
    """

    source: Tensor
    indices: Tensor
    classes: range
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, images: Tensor, *, first_class: int = 0) -> RealBatch:
        """Wrap normalised images ``(c, B, C, H, W)`` of the classes from ``first_class`` on.

        Example:
            >>> RealBatch.of(torch.rand(3, 5, 1, 4, 4)).images().shape
            torch.Size([3, 5, 1, 4, 4])
        """
        if images.ndim != 5:
            raise ValueError(f"images must have shape (classes, B, C, H, W), got {tuple(images.shape)}")
        indices = torch.arange(images.shape[0] * images.shape[1], device=images.device).view(images.shape[:2])
        shape = images.shape[2], 1, 1
        return cls(
            images.flatten(0, 1),
            indices,
            range(first_class, first_class + len(images)),
            images.new_ones(shape),
            images.new_zeros(shape),
        )

    @property
    def per_class(self) -> int:
        """B, the number of images of each class."""
        return self.indices.shape[1]

    def select(self, start: int, stop: int) -> RealBatch:
        """Return the part of the rows ``start .. stop - 1``."""
        return replace(self, indices=self.indices[start:stop], classes=self.classes[start:stop])

    def images(self) -> Tensor:
        """Return all images at once, normalised, ``(c, B, C, H, W)``."""
        return self._fetch(self.indices)

    def tiles(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Go through the images in pieces that fit the memory.

        Args:
            size: most images in a piece, at least 1.

        Yields:
            The rows of a piece, and its normalised images ``(rows, b, C, H, W)``: some whole classes, or a part of one.
        """
        count = self.per_class
        if size >= count:
            step = size // count
            for start in range(0, len(self.indices), step):
                rows = slice(start, min(start + step, len(self.indices)))
                yield rows, self._fetch(self.indices[rows])
            return
        for row in range(len(self.indices)):
            for part in self.indices[row].chunk(-(-count // size)):
                yield slice(row, row + 1), self._fetch(part[None])

    def _fetch(self, indices: Tensor) -> Tensor:
        images = self.source.index_select(0, indices.flatten())
        if not images.is_floating_point():
            images = images.to(self.scale.dtype)
        images = images.mul_(self.scale).add_(self.shift)  # index_select made a copy
        return images.view(*indices.shape, *images.shape[1:])


class ClassPool:
    """All real images on one device, from which batches with as many images of each class are drawn by index.

    Args:
        images: uint8 in 0 .. 255, or floating in [0, 1].
        labels: class of each image.
        num_classes: C; None for the highest label plus one.
        mean: per channel, [0, 1] scale; None measures it.
        std: likewise.
        class_names: C names, or None.
        device: where the images stay.
        seed: of the draws.

    Attributes:
        images: sorted by class, ``(N, channels, H, W)``.
        labels: ``(N,)`` int64, ascending.
        counts: images per class, a tuple.
        mean: per channel, a tuple.
        std: per channel, a tuple.

    Shape:
        - images: ``(N, channels, H, W)``
        - labels: ``(N,)``

    Raises:
        TypeError: if the types are others.
        ValueError: if shapes do not fit, a class has no image, or floating images leave [0, 1].

    Example:
        >>> pool = ClassPool(torch.rand(20, 1, 8, 8), torch.arange(2).repeat(10))
        >>> pool.draw(4).images().shape
        torch.Size([2, 4, 1, 8, 8])
    """

    @check_types
    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8 or floating, got {images.dtype}")
        if labels.is_floating_point():
            raise TypeError(f"labels must be class indices, got {labels.dtype}")
        if images.ndim != 4 or labels.shape != images.shape[:1] or not images.numel():
            raise ValueError(
                f"images (N, C, H, W) with one label each were expected, got {tuple(images.shape)} and "
                f"{tuple(labels.shape)}"
            )
        if images.is_floating_point():
            low, high = (float(value) for value in images.aminmax())
            if not (low >= -1e-4 and high <= 1 + 1e-4):
                raise ValueError(
                    f"floating images must lie in [0, 1], got values from {low:.4g} to {high:.4g}; undo the "
                    "normalisation, the pool normalises with mean and std"
                )
        num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
        if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise ValueError(
                f"labels must lie in 0 .. {num_classes - 1}, got {int(labels.min())} .. {int(labels.max())}"
            )
        counts = torch.bincount(labels.cpu().long(), minlength=num_classes)
        if not bool(counts.all()):
            empty = int((counts == 0).nonzero()[0])
            raise ValueError(f"class {empty} has no image; leave it out and number the classes without it")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names must have {num_classes} names, got {len(class_names)}")

        order = labels.argsort(stable=True)
        self.images = images.detach()[order.to(images.device)].to(device)
        self.labels = labels.detach()[order].long().to(device)
        self.counts = tuple(int(count) for count in counts)
        self.class_names = None if class_names is None else tuple(class_names)
        measured_mean, measured_std = _statistics(self.images) if mean is None or std is None else ((), ())
        self.mean = measured_mean if mean is None else tuple(float(value) for value in mean)
        self.std = measured_std if std is None else tuple(float(value) for value in std)
        if not len(self.mean) == len(self.std) == images.shape[1] or min(self.std) <= 0:
            raise ValueError(
                f"mean and std must have a value for each of the {images.shape[1]} channels, std above 0, got "
                f"{self.mean} and {self.std}"
            )
        dtype = images.dtype if images.is_floating_point() else torch.float32
        std_column = torch.tensor(self.std, dtype=dtype, device=device).view(-1, 1, 1)
        mean_column = torch.tensor(self.mean, dtype=dtype, device=device).view(-1, 1, 1)
        self._scale = 1 / (std_column if images.is_floating_point() else 255 * std_column)
        self._shift = -mean_column / std_column
        self._counts = counts
        self._offsets = counts.cumsum(0) - counts
        self._missing = torch.arange(max(self.counts)) >= counts[:, None]
        self._generator = PrivateGenerator(seed, "real images")

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset[Any],
        *,
        num_classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> ClassPool:
        """Read a data set whose items begin with an image in [0, 1] and its class; switch its augmentation off first.

        Images that are 255ths, as those of the usual files are, are kept in a byte per value.

        Raises:
            TypeError: if the items have another form.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> data = TensorDataset(torch.randint(256, (8, 3, 4, 4)) / 255, torch.arange(2).repeat(4))
            >>> ClassPool.from_dataset(data).images.dtype
            torch.uint8
        """
        images, labels = [], []
        # With a generator the loader leaves the global one alone.
        for batch in DataLoader(dataset, batch_size=256, generator=torch.Generator()):
            if not (isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[0], Tensor)):
                raise TypeError(
                    f"items (image, label, ...) of tensors were expected, found a batch of type "
                    f"{type(batch).__name__}; wrap the data set so that its items have this form"
                )
            images.append(_as_bytes(batch[0]))
            labels.append(torch.as_tensor(batch[1]))
        if not images:
            raise ValueError("the data set has no items; a pool needs one or more of each class")
        if len({part.dtype for part in images}) > 1:
            images = [part / 255 if part.dtype == torch.uint8 else part for part in images]
        return cls(
            torch.cat(images),
            torch.cat(labels),
            num_classes=num_classes,
            mean=mean,
            std=std,
            class_names=class_names,
            device=device,
            seed=seed,
        )

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.counts)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def __len__(self) -> int:
        return len(self.images)

    def class_images(self, label: int) -> Tensor:
        """Return the stored images of a class, not normalised, ``(N_c, channels, H, W)``."""
        start = int(self._offsets[label])
        return self.images[start : start + self.counts[label]]

    @check_types
    def draw(self, batch_size: int, *, first: bool = False) -> RealBatch:
        """Draw images of every class, without repeats as long as a class has enough.

        A class with fewer images repeats them as evenly as possible; nothing is drawn beyond the largest class.

        Args:
            batch_size: B, images per class, at least 1.
            first: take the first of each class instead, as the released code of NCFM does.

        Raises:
            ValueError: if ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        count = min(batch_size, max(self.counts))
        positions = torch.arange(count) % self._counts[:, None]
        if not first:
            keys = torch.rand(self._missing.shape, generator=self._generator.on("cpu"))
            order = keys.masked_fill_(self._missing, 2.0).topk(count, largest=False).indices
            positions = order.gather(1, positions)
        return self._batch(positions + self._offsets[:, None])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised images ``(N, channels, H, W)`` and labels ``(N,)`` at positions ``(N,)``."""
        indices = indices.to(self.device)
        fetched = RealBatch(self.images, indices[None], range(1), self._scale, self._shift)
        return fetched.images()[0], self.labels[indices]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` images of every class on the [0, 1] scale, ``(C, count, channels, H, W)``, with a generator.

        A class with fewer images repeats them as evenly as possible.
        """
        rows = []
        for label, available in enumerate(self.counts):
            order = torch.randperm(available, generator=generator)
            rows.append(order[torch.arange(count) % available] + self._offsets[label])
        images = self.images[torch.stack(rows).to(self.device)]
        return images / 255 if images.dtype == torch.uint8 else images

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the draws."""
        return {"generator": self._generator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the draws where ``state`` was taken."""
        self._generator.load_state_dict(state["generator"])

    def _batch(self, indices: Tensor) -> RealBatch:
        indices = indices.to(self.device, non_blocking=True)
        return RealBatch(self.images, indices, range(self.num_classes), self._scale, self._shift)


def _as_bytes(images: Tensor) -> Tensor:
    if not images.is_floating_point():
        return images
    scaled = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return scaled if torch.equal(scaled.to(images.dtype) / 255, images) else images


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for start in range(0, len(images), 4096):
        values = images[start : start + 4096].double() / unit
        total += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))]).cpu()
    mean, square = total / (images.numel() / images.shape[1])
    # A channel that never changes would otherwise be divided by zero.
    std = (square - mean.square()).clamp_min(1e-8).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
