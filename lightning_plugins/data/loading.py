"""Delivering images so that an epoch depends on the seed and its number alone.

Not on the global random state, the number of workers, or whether the run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.transforms.v2 import functional

from lightning_plugins.checks import check_types

__all__ = ["ImageDataset", "ResumableLoader", "SeededSampler", "without_augmentation"]


class ImageDataset(Dataset[tuple[Any, ...]]):
    """Images in [0, 1] of one square size, with their class.

    Indexed by ``(index, seed)``, as :class:`SeededSampler` does, the augmentation draws from torch's CPU generator
    seeded with ``seed``, and leaves that generator as it was. Indexed by a plain ``index``, the seed is the index.

    Args:
        images: uint8 in 0 .. 255 or float32 in [0, 1]; a tensor, or any sequence that reads them on demand.
        targets: class of each item.
        indices: the image of each item; None for all images in their order.
        image_size: side in pixels; an image of another shape is resized by its shorter side, then cropped centrally.
        augment: acts on one float image in [0, 1] before that resizing; None for none.
        with_index: whether an item ends with its index here.

    Shape:
        - images: ``(N, C, H, W)``, or N tensors ``(C, H, W)``
        - targets, indices: ``(M,)``
        - items: image ``(C, S, S)`` float32 and class ``int`` (and index ``int``), with S the ``image_size``

    Raises:
        ValueError: for targets or indices that do not fit each other or the images; on reading an item, if ``augment``
            returned something else than a float image in [0, 1].

    Example:
        >>> data = ImageDataset(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), torch.tensor([0, 1]), image_size=2)
        >>> data[1]
        (tensor([[[1., 1.], [1., 1.]]]), 1)
    """

    @check_types
    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        indices: Tensor | None = None,
        image_size: int,
        augment: Callable[[Tensor], Tensor] | None = None,
        with_index: bool = False,
    ) -> None:
        if not image_size >= 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size!r}")
        indices = torch.arange(len(images)) if indices is None else indices
        if targets.ndim != 1 or indices.shape != targets.shape:
            raise ValueError(
                f"targets and indices (by default all {len(images)} images) must be (M,), got {tuple(targets.shape)} "
                f"and {tuple(indices.shape)}"
            )
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(images):
            raise ValueError(
                f"indices must lie in [0, {len(images)}), found {int(indices.min())} to {int(indices.max())}"
            )
        self.images = images
        self.targets = targets
        self.indices = indices
        self.image_size = image_size
        self.augment = augment
        self.with_index = with_index

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, ...]:
        index, seed = key if isinstance(key, tuple) else (key, key)
        image = self.images[int(self.indices[index])]
        if not isinstance(image, Tensor) or image.ndim != 3 or not image.numel():
            found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"images must be tensors (C, H, W), got {found}; use torch.as_tensor")
        # A copy in any case, so that an augmentation in place does not reach the stored image.
        image = image.to(torch.float32).div_(255) if image.dtype == torch.uint8 else image.clone()
        if self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
                image = self.augment(image)
            self._check_augmented(image)
        if image.shape[-2:] != (self.image_size, self.image_size):
            image = functional.resize(image, [self.image_size], antialias=True)
            image = functional.center_crop(image, [self.image_size])
        item = image.clamp(0, 1), int(self.targets[index])
        return (*item, index) if self.with_index else item

    @staticmethod
    def _check_augmented(image: object) -> None:
        found = f"a {type(image).__name__}"
        if isinstance(image, Tensor):
            found = f"shape {tuple(image.shape)} and type {image.dtype}"
            if image.ndim == 3 and image.dtype == torch.float32:
                low, high = (float(bound) for bound in image.aminmax())
                if low >= -1e-5 and high <= 1 + 1e-5:  # room for the rounding of interpolation; not so for NaN
                    return
                found = f"values from {low:.4g} to {high:.4g}"
        raise ValueError(
            f"augmentation must return a float32 image (C, H, W) in [0, 1], got {found}; leave normalisation to the "
            "model, and clamp what adds noise"
        )


class SeededSampler(DistributedSampler[Any]):
    """A ``DistributedSampler`` that hands every sample its own seed: it yields pairs ``(index, seed)``.

    The seed of a sample depends on the run's seed, the epoch and the sample's index, not on the process or worker that
    loads it. It travels with the index, because workers hold copies of the data set that no ``set_epoch`` reaches.
    Lightning calls :meth:`set_epoch` and leaves a ``DistributedSampler`` in place; in a loop of your own, call it.

    ``start`` is the number of samples that the next epoch leaves out, for a run resumed within an epoch.

    Example:
        >>> sampler = SeededSampler(range(3), num_replicas=1, rank=0, shuffle=False)
        >>> [index for index, seed in sampler]
        [0, 1, 2]
    """

    start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        seeds = np.random.SeedSequence([self.seed, self.epoch]).generate_state(len(self.dataset))  # type: ignore[arg-type]
        keys = [(index, int(seeds[index])) for index in super().__iter__()][self.start :]
        self.start = 0
        return iter(keys)


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` over a :class:`SeededSampler` that continues where a checkpoint was written.

    Two gaps are closed. Lightning asks for the iterator before it tells the sampler the epoch, and after a resume keeps
    that iterator; with workers the first resumed epoch would repeat the order of epoch 0. And a run resumed within an
    epoch would see the epoch's first batches again: Lightning stores what ``state_dict`` returns, and this loader skips
    the batches that were already delivered, without loading them.

    Example:
        >>> data = ImageDataset(torch.rand(4, 1, 2, 2), torch.arange(4), image_size=2)
        >>> sampler = SeededSampler(data, num_replicas=1, rank=0)
        >>> len(list(ResumableLoader(data, batch_size=2, sampler=sampler)))
        2
    """

    _position = (0, 0)  # epoch, batches delivered in it
    _resume_at = (-1, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing below runs before the first batch is asked for, when the sampler knows its epoch.
        epoch, delivered = getattr(self.sampler, "epoch", 0), 0
        if isinstance(self.sampler, SeededSampler):  # Trainer(overfit_batches=...) puts a sequential one in its place
            if self._resume_at[0] == epoch:
                delivered = self._resume_at[1]
            self.sampler.start = delivered * (self.batch_size or 1)
        self._resume_at = (-1, 0)
        self._position = (epoch, delivered)
        for batch in super().__iter__():
            delivered += 1
            self._position = (epoch, delivered)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of batches delivered in it."""
        epoch, delivered = self._position
        return {"epoch": epoch, "batches": delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the delivered batches when that epoch is run next; any other epoch starts at its first batch."""
        self._resume_at = (int(state["epoch"]), int(state["batches"]))


@check_types
def without_augmentation(dataset: Any) -> Any:
    """Return one of our own data sets, or a subset of it, without its augmentation; any other as it is.

    Example:
        >>> images, labels = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
        >>> data = ImageDataset(images, labels, image_size=4, augment=torch.nn.Identity())
        >>> without_augmentation(Subset(data, [1])).dataset.augment is None, data.augment is None
        (True, False)
    """
    if isinstance(dataset, Subset):
        return Subset(without_augmentation(dataset.dataset), dataset.indices)
    if isinstance(dataset, ImageDataset) and dataset.augment is not None:
        dataset = copy(dataset)
        dataset.augment = None
    return dataset
