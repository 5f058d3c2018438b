"""What all image data modules share: splits, label transforms, augmentation and reproducible loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lightning_plugins.data.loading import ImageDataset, ResumableLoader, SeededSampler
from lightning_plugins.data.transforms import TargetTransform, stratified_split

__all__ = ["ImageDataModule", "crop_and_flip"]


class ImageDataModule(pl.LightningDataModule):
    """Image classification data with images in [0, 1]; normalisation belongs into the model.

    Attacks work on the [0, 1] pixel scale, so the images arrive on it and ``mean`` and ``std`` are attributes for the
    model to use. The order and the augmentation of epoch e depend on ``seed`` and e alone: not on the global random
    state (which stays as it was), the number of workers, or a resume. ``transforms`` never touch the test set.

    A subclass sets ``num_classes``, ``in_channels``, ``native_size``, ``mean``, ``std`` and ``class_names``, and
    implements :meth:`load`. Without a Trainer: ``prepare_data()``, ``setup()``, then the loaders, with
    ``loader.sampler.set_epoch(e)`` before each epoch of the training loader.

    Args:
        root: folder of the data.
        batch_size: images per batch and process, at least 1.
        num_workers: loading processes, at least 0.
        val_fraction: share of every class of the training images that is held out for validation, in [0, 1); 0 for
            no validation. Without effect where the data set has a validation split of its own.
        image_size: side in pixels of the images delivered; None for the data set's own. An image of another shape is
            resized by its shorter side and cropped centrally.
        augmentation: of training images: True for what is usual on the data set, False for none, or a callable (a
            torchvision v2 transform, for instance) on one float image ``(C, H, W)`` in [0, 1], before any resizing. It
            should draw from torch's generator, which is seeded for every image.
        transforms: changes of the training labels, in order. A transform without a seed derives one from ``seed`` and
            its position.
        transform_validation: True lets ``transforms`` act before the validation split is cut, so that training and
            validation come from one distribution; False cuts first and leaves validation clean. A validation split of
            the data set's own is always left alone.
        with_index: True adds to each training batch, as its third element, the samples' indices in ``train_set``.
        seed: of split, transforms, order and augmentation, at least 0.

    Attributes:
        num_classes: number of classes C.
        in_channels: channels of an image.
        image_size: side of the images delivered, in pixels.
        mean: per channel over the training images, [0, 1] scale.
        std: likewise.
        class_names: C names.
        train_set: an :class:`ImageDataset` after ``setup("fit")``, with ``targets`` as transformed; None before.
        val_set: likewise; None if there is no validation.
        test_set: likewise, after ``setup("test")``.

    Raises:
        TypeError: if ``augmentation`` or an element of ``transforms`` has the wrong type.
        ValueError: if a number is out of range.

    Example:
        >>> class Noise(ImageDataModule):
        ...     num_classes, in_channels, native_size, class_names = 2, 1, 8, ("a", "b")
        ...     mean, std = (0.5,), (0.29,)
        ...
        ...     def load(self, split):
        ...         images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        ...         return None if split == "val" else (images, torch.arange(2).repeat(20))
        >>> data = Noise(batch_size=6)
        >>> data.setup("fit")
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, targets.dtype, data.class_counts
        (torch.Size([6, 1, 8, 8]), torch.int64, tensor([18, 18]))
    """

    num_classes: int
    in_channels: int
    native_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def __init__(
        self,
        *,
        root: str = "data",
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
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("image_size", image_size, 1),
            ("seed", seed, 0),
        ):
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), 0 for no validation split, got {val_fraction!r}")
        if not (isinstance(augmentation, bool) or callable(augmentation)):
            raise TypeError(f"augmentation must be True, False or a callable on one image, got {augmentation!r}")
        for transform in transforms:
            if not isinstance(transform, TargetTransform):
                raise TypeError(
                    f"transforms takes label transforms such as Imbalance, LabelNoise or ClassOverlap, got "
                    f"{transform!r}; give transforms of images as augmentation"
                )
        self.root = root
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.image_size = self.native_size if image_size is None else image_size
        self.augmentation = augmentation
        self.transforms = tuple(transforms)
        self.transform_validation = transform_validation
        self.with_index = with_index
        self.seed = seed
        self.train_set: ImageDataset | None = None
        self.val_set: ImageDataset | None = None
        self.test_set: ImageDataset | None = None

    def load(self, split: Literal["train", "val", "test"]) -> tuple[Tensor | Sequence[Tensor], Tensor] | None:
        """Return a split's images and labels; for ``"val"`` None where the data set has no such split.

        Shape:
            - images: ``(N, C, H, W)``, uint8 in 0 .. 255 or float32 in [0, 1], or a sequence of N such images
              ``(C, H, W)`` that reads them on demand
            - labels: ``(N,)`` int64 in ``0 .. num_classes - 1``
        """
        raise NotImplementedError(f"{type(self).__name__} must implement load(split)")

    def default_augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """Return what ``augmentation=True`` stands for; None for nothing."""
        return None

    @property
    def class_counts(self) -> Tensor:
        """Training images per class after ``transforms``, ``(C,)`` int64.

        Raises:
            RuntimeError: before ``setup("fit")``.
        """
        return torch.bincount(self._ready(self.train_set, "fit").targets, minlength=self.num_classes)

    def setup(self, stage: str | None = None) -> None:
        """Read what ``stage`` needs (``"fit"``, ``"validate"``, ``"test"``; None for all), once.

        Raises:
            FileNotFoundError: if files are missing; the message names them and their place.
            ValueError: if files are damaged, labels are out of range, transforms do not fit the data, or
                ``val_fraction`` leaves a class without a sample on one side.
        """
        if stage in (None, "fit", "validate") and self.train_set is None:
            images, targets = self._checked("train", self.load("train"))
            kept = torch.arange(len(targets))
            own_val = self.load("val")
            held_out: tuple[Tensor, Tensor] | None = None
            if self.transform_validation:
                kept, targets = self._transform(kept, targets)
            if own_val is None and self.val_fraction:
                rest, part = self._split(targets)
                held_out = kept[part], targets[part]
                kept, targets = kept[rest], targets[rest]
            if not self.transform_validation:
                kept, targets = self._transform(kept, targets)

            augment = self.default_augmentation() if self.augmentation is True else self.augmentation or None
            self.train_set = ImageDataset(
                images,
                targets,
                indices=kept,
                image_size=self.image_size,
                augment=augment,
                with_index=self.with_index,
            )
            if own_val is not None:
                self.val_set = ImageDataset(*self._checked("val", own_val), image_size=self.image_size)
            elif held_out is not None:
                self.val_set = ImageDataset(images, held_out[1], indices=held_out[0], image_size=self.image_size)
        if stage in (None, "test") and self.test_set is None:
            self.test_set = ImageDataset(*self._checked("test", self.load("test")), image_size=self.image_size)

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled, augmented batches ``(N, C, S, S)`` float32 and ``(N,)`` int64."""
        train_set = self._ready(self.train_set, "fit")
        # One sampler for one process and for many: Lightning sets its epoch, and keeps it under DDP.
        sampler = SeededSampler(
            train_set,
            num_replicas=1 if self.trainer is None else self.trainer.world_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            seed=self.seed,
        )
        return ResumableLoader(train_set, sampler=sampler, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return validation batches in fixed order; an empty list if there is no validation split."""
        self._ready(self.train_set, "fit")
        return [] if self.val_set is None else DataLoader(self.val_set, **self._loader_options())

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test batches in fixed order."""
        return DataLoader(self._ready(self.test_set, "test"), **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": on_gpu,
            # Without one of its own, a loader takes the workers' seed from the global generator in every epoch.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _checked(
        self, split: str, loaded: tuple[Tensor | Sequence[Tensor], Tensor] | None
    ) -> tuple[Tensor | Sequence[Tensor], Tensor]:
        if loaded is None:
            raise ValueError(f"{type(self).__name__}.load({split!r}) returned None; only 'val' may be missing")
        images, targets = loaded
        if len(images) != len(targets) or not len(targets):
            raise ValueError(
                f"the {split} split has {len(images)} images and {len(targets)} labels; there must be one label for "
                "each, and at least one; check the files"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"the {split} split has labels from {low} to {high}, and {type(self).__name__} has labels in "
                f"0 .. {self.num_classes - 1}; check the label files"
            )
        return images, targets

    def _transform(self, kept: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        for position, transform in enumerate(self.transforms):
            seed = int(np.random.SeedSequence([self.seed, position]).generate_state(1)[0])
            chosen, targets = transform.apply(targets, num_classes=self.num_classes, seed=seed)
            kept = kept[chosen]
        return kept, targets

    def _split(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return stratified_split(targets, self.val_fraction, seed=self.seed)
        except ValueError as error:
            remedy = " (or set transform_validation=False to split before the transforms)" if self.transforms else ""
            raise ValueError(f"val_fraction={self.val_fraction} does not fit the data{remedy}: {error}") from error

    def _ready(self, dataset: ImageDataset | None, stage: str) -> ImageDataset:
        if dataset is None:
            raise RuntimeError(f"no data loaded yet; call prepare_data() and setup({stage!r}) first")
        return dataset


def crop_and_flip(size: int) -> Callable[[Tensor], Tensor]:
    """Return the usual augmentation of small images: a random crop after 4 pixels of padding, and a horizontal flip.

    Args:
        size: side of the images in pixels.

    Example:
        >>> crop_and_flip(32)(torch.zeros(3, 32, 32)).shape
        torch.Size([3, 32, 32])
    """
    augment: Callable[[Tensor], Tensor] = v2.Compose([v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()])
    return augment
