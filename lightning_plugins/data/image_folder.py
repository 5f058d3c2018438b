"""The user's own images, one folder per class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from lightning_plugins.checks import check_types
from lightning_plugins.data.base import ImageDataModule
from lightning_plugins.data.transforms import TargetTransform

__all__ = ["ImageFolderDataModule"]


class ImageFolderDataModule(ImageDataModule):
    """Colour images read from ``root/train/<class>/...`` and ``root/test/<class>/...``, on demand.

    With ``root/val/<class>/...`` that is the validation split, and ``val_fraction`` is without effect. The classes are
    the sorted folder names of ``train``, and the other splits must have the same. ``augmentation=True`` is a random
    resized crop and a horizontal flip; without it, and in evaluation, images are resized by their shorter side and
    cropped centrally. An image that is ``image_size`` square already is delivered as it is.

    Args:
        root: folder with ``train``, ``test`` and perhaps ``val``.
        batch_size: see :class:`ImageDataModule`, as for all further arguments.
        num_workers: loading processes; decoding takes time, so more than 0 pays.
        val_fraction: share of the training images held out, unless there is a ``val`` folder.
        image_size: side in pixels of the images delivered.
        augmentation: a callable on one image of the size on disk, or a bool.
        transforms: changes of the training labels.
        transform_validation: whether they act on a validation split cut from the training images too.
        with_index: whether training batches hold the samples' indices as a third element.
        seed: of split, transforms, order and augmentation.
        mean: per colour channel on the [0, 1] scale; ImageNet's unless given.
        std: likewise.

    Raises:
        FileNotFoundError: if ``root`` lacks a folder, or a class folder has no images.
        ValueError: if the splits have different classes; on reading, if an image is damaged.

    Example:
        >>> import tempfile
        >>> for split in ("train", "test"):
        ...     for name in ("cat", "dog"):
        ...         Path(tempfile.gettempdir(), "pets", split, name).mkdir(parents=True, exist_ok=True)
        >>> data = ImageFolderDataModule(root=f"{tempfile.gettempdir()}/pets", image_size=64)
        >>> data.num_classes, data.class_names
        (2, ('cat', 'dog'))
    """

    in_channels = 3
    native_size = 224

    @check_types
    def __init__(
        self,
        *,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        image_size: int = 224,
        augmentation: bool | nn.Module | Callable[[Tensor], Tensor] = True,
        transforms: Sequence[TargetTransform] = (),
        transform_validation: bool = True,
        with_index: bool = False,
        seed: int = 0,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__(
            root=root,
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
        if (
            len(mean) != 3
            or len(std) != 3
            or not all(
                -math.inf < center < math.inf and 0 < spread < math.inf
                for center, spread in zip(mean, std, strict=True)
            )
        ):
            raise ValueError(f"mean and std need 3 finite numbers each, std positive, got {mean}, {std}")
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.class_names = self._classes("train")
        self.num_classes = len(self.class_names)
        for split in ("val", "test"):
            # torchvision numbers the classes of each folder by itself: one class less would shift all that follow.
            if (split == "test" or Path(root, split).is_dir()) and self._classes(split) != self.class_names:
                differing = sorted(set(self._classes(split)) ^ set(self.class_names))
                raise ValueError(
                    f"{Path(root, split)} and {Path(root, 'train')} must have the same class folders; {differing} "
                    "are in one of them only"
                )

    def load(self, split: Literal["train", "val", "test"]) -> tuple[Sequence[Tensor], Tensor] | None:
        """Return the images of a folder, read on demand as ``(3, H, W)`` uint8, and their labels."""
        folder = Path(self.root, split)
        if split == "val" and not folder.is_dir():
            return None
        try:
            samples = datasets.ImageFolder(str(folder)).samples
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"a class folder in {folder} has no images; add some or remove it: {error}"
            ) from error
        return _ImageFiles([path for path, _ in samples]), torch.tensor([target for _, target in samples])

    def default_augmentation(self) -> Callable[[Tensor], Tensor]:
        """Return a random resized crop and a horizontal flip."""
        augment: Callable[[Tensor], Tensor] = v2.Compose(
            [v2.RandomResizedCrop(self.image_size, antialias=True), v2.RandomHorizontalFlip()]
        )
        return augment

    def _classes(self, split: str) -> tuple[str, ...]:
        folder = Path(self.root, split)
        names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()
        if not names:
            raise FileNotFoundError(
                f"{folder} with one folder of images per class was not found; arrange the images as "
                f"{folder}/<class>/<image>, or set root"
            )
        return names


class _ImageFiles(Sequence[Tensor]):
    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        path = self.paths[index]
        try:
            image: Tensor = functional.pil_to_tensor(datasets.folder.default_loader(path))
        except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
            raise ValueError(f"the image {path} cannot be read ({error}); replace or remove it") from error
        return image
