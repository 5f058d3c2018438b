"""Handwritten digits from scikit-learn: no download, trains in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.data.base import ImageDataModule
from lightning_plugins.data.transforms import TargetTransform, stratified_split

__all__ = ["DigitsDataModule"]


class DigitsDataModule(ImageDataModule):
    """The 1,797 digits of 8x8 pixels that scikit-learn ships: the embedded default, without files or a network.

    The data set has no official test split. A quarter of every class (451 images) is the test set here, the same for
    every seed, so that test figures compare. Pixel values 0 .. 16 are divided by 16, exactly.
    ``augmentation=True`` does nothing: a flip would change the digits, and a pixel is an eighth of the image.

    Args:
        batch_size: see :class:`ImageDataModule`, as for all arguments; ``root`` is not needed.
        num_workers: loading processes.
        val_fraction: share of the 1,346 training images held out for validation.
        image_size: side in pixels; None for 8.
        augmentation: a callable on one image, or a bool.
        transforms: changes of the training labels.
        transform_validation: whether they act on the validation split too.
        with_index: whether training batches hold the samples' indices as a third element.
        seed: of split, transforms, order and augmentation.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.setup()
        >>> len(data.train_set), len(data.val_set), len(data.test_set)
        (1210, 136, 451)
    """

    num_classes = 10
    in_channels = 1
    native_size = 8
    mean = (0.3055,)
    std = (0.3760,)
    class_names = tuple("0123456789")

    @check_types
    def __init__(
        self,
        *,
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

    def load(self, split: Literal["train", "val", "test"]) -> tuple[Tensor, Tensor] | None:
        """Return the images ``(N, 1, 8, 8)`` float32 in [0, 1] and the labels of the fixed training or test part."""
        if split == "val":
            return None
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.float32).unsqueeze(1) / 16
        targets = torch.from_numpy(digits.target).to(torch.int64)
        train, test = stratified_split(targets, 0.25, seed=0)
        chosen = train if split == "train" else test
        return images[chosen], targets[chosen]
