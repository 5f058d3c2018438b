"""Saved synthetic sets as training data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_plugins.checks import check_types
from lightning_plugins.data.base import ImageDataModule
from lightning_plugins.data.loading import ImageDataset
from lightning_plugins.distillation.synthetic_set import SyntheticSet

__all__ = ["DistilledDataModule", "DistilledDataset"]

DATA_ARGUMENTS = ("image_size", "val_fraction", "seed", "train_per_class", "mirrored")
"""What a distilled set's metadata keep of the real data, so that they can be had again."""


class DistilledDataset(Dataset[tuple[Tensor, ...]]):
    """The decoded images of a saved synthetic set.

    Args:
        path: folder that :meth:`.SyntheticSet.save` wrote, such as ``exports`` of a run.
        normalise: True for images as the set's own networks saw them; False for the [0, 1] scale, where values of a set
            in normalised space are cut off.

    Attributes:
        synthetic: the set.

    Shape:
        - items: image ``(channels, H, W)``, class ``()`` int64, and soft logits ``(K,)`` if the set has them

    Raises:
        FileNotFoundError: if there is no set at ``path``.
        ValueError: if it is damaged.

    Example:
        >>> import tempfile, torch
        >>> folder = SyntheticSet(torch.rand(2, 1, 1, 8, 8), rho=2).save(tempfile.mkdtemp())
        >>> data = DistilledDataset(folder)
        >>> len(data), data[7][1]
        (8, tensor(1))
    """

    @check_types
    def __init__(self, path: str | Path, *, normalise: bool = False) -> None:
        self.synthetic = _load(path)
        dataset = self.synthetic.as_dataset(normalise=normalise)
        if not normalise:
            dataset = TensorDataset(dataset.tensors[0].clamp(0, 1), *dataset.tensors[1:])
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        item: tuple[Tensor, ...] = self._dataset[index]
        return item


class DistilledDataModule(ImageDataModule):
    """Trains on a saved synthetic set, validates and tests on the real images that it stands for.

    The set's metadata name the real data: one of the data modules of this package, with the image size, validation
    share and seed of the distillation, so that validation images are those that it did not see. Training images are
    decoded and in [0, 1]; classes are hard labels. The validation and test images are never trained on.

    Args:
        path: folder that a distillation exported.
        real: the real data; None for what the metadata name.
        repeats: how often an epoch goes through the set, at least 1: a set of few images makes short epochs.
        root: folder of the real data, where the metadata name them.
        batch_size: see :class:`ImageDataModule`, as for all further arguments.
        num_workers: loading processes.
        augmentation: of the synthetic images: a callable on one image, or a bool; True for what the real data use.
        with_index: whether training batches hold the samples' indices as a third element.
        seed: of order and augmentation.

    Raises:
        ValueError: if the metadata name no data of this package and ``real`` is None, or the two do not fit.

    Example:
        >>> import tempfile
        >>> from lightning_plugins.data import DigitsDataModule
        >>> from lightning_plugins.distillation import ClassPool
        >>> digits = DigitsDataModule()
        >>> digits.setup()
        >>> distilled = SyntheticSet.initialised("real", ClassPool.from_dataset(digits.train_set), 1)
        >>> data = DistilledDataModule(distilled.save(tempfile.mkdtemp()), real=digits)
        >>> data.setup()
        >>> len(data.train_set), len(data.test_set)
        (10, 451)
    """

    @check_types
    def __init__(
        self,
        path: str | Path,
        *,
        real: ImageDataModule | None = None,
        repeats: int = 1,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        augmentation: bool | nn.Module | Callable[[Tensor], Tensor] = True,
        with_index: bool = False,
        seed: int = 0,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats!r}")
        self.path = str(path)
        self.repeats = repeats
        self.distilled = DistilledDataset(path)
        synthetic = self.distilled.synthetic
        self.real = real if real is not None else _named_data(synthetic, self.path, root)
        channels, height, width = synthetic.images.shape[2:]
        expected = (self.real.num_classes, self.real.in_channels, self.real.image_size, self.real.image_size)
        if (synthetic.num_classes, channels, height, width) != expected:
            raise ValueError(
                f"the set in {self.path!r} has (classes, channels, height, width) = "
                f"{(synthetic.num_classes, channels, height, width)}, {type(self.real).__name__} has {expected}; pass "
                "the data that it was distilled from as real"
            )
        self.num_classes, self.in_channels, self.native_size = synthetic.num_classes, channels, height
        self.mean, self.std = tuple(synthetic.mean.tolist()), tuple(synthetic.std.tolist())
        self.class_names = self.real.class_names
        super().__init__(
            root=root,
            batch_size=batch_size,
            num_workers=num_workers,
            augmentation=augmentation,
            with_index=with_index,
            seed=seed,
        )

    def prepare_data(self) -> None:
        """Get the real data."""
        self.real.prepare_data()

    def load(self, split: Literal["train", "val", "test"]) -> tuple[Tensor | Sequence[Tensor], Tensor] | None:
        """Return the decoded images for training, and the real ones otherwise."""
        if split == "train":
            images, labels = cast(Any, self.distilled)._dataset.tensors[:2]
            return images.repeat(self.repeats, 1, 1, 1), labels.repeat(self.repeats)
        self.real.setup("test" if split == "test" else "fit")
        found = self.real.test_set if split == "test" else self.real.val_set
        if found is None:
            self.val_fraction = 0  # none of the few synthetic images is to be held out in place of real ones
            return None
        return _Images(found), found.targets

    def default_augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """Return what the real data use."""
        return self.real.default_augmentation()


class _Images(Sequence[Tensor]):
    """The images of a data set without their classes."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        image: Tensor = self.dataset[index][0]
        return image


def _load(path: str | Path) -> SyntheticSet:
    try:
        return SyntheticSet.load(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no distilled set (set.safetensors) in {str(path)!r}; name the folder exports of a distillation"
        ) from error


def _named_data(synthetic: SyntheticSet, path: str, root: str) -> ImageDataModule:
    from lightning_plugins import data

    about = synthetic.about.get("data") or {}
    name = about.get("name")
    # Only names of this package: a file from elsewhere must not choose what is imported.
    cls = getattr(data, name, None) if isinstance(name, str) and name in data.__all__ else None
    if not (isinstance(cls, type) and issubclass(cls, ImageDataModule)) or cls in (
        ImageDataModule,
        DistilledDataModule,
    ):
        raise ValueError(
            f"the set in {path!r} names {name!r} as its data, which is no data module of lightning_plugins.data; pass "
            "the real data as real"
        )
    known = inspect.signature(cls).parameters
    arguments = {key: about[key] for key in DATA_ARGUMENTS if key in about and key in known}
    if "root" in known:
        arguments["root"] = root
    return cls(**arguments)
