"""CIFAR-10 and CIFAR-100 through torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchvision import datasets

from lightning_plugins.data.base import ImageDataModule, crop_and_flip

__all__ = ["CIFAR10DataModule", "CIFAR100DataModule"]

_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""  # in the order of the labels, as in the file `meta`


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images, 32x32 colour pixels, 10 classes.

    ``prepare_data`` downloads through torchvision what is not in ``root`` already. ``augmentation=True`` is a random
    crop after 4 pixels of padding and a horizontal flip. Arguments and attributes: :class:`ImageDataModule`.

    Example:
        >>> data = CIFAR10DataModule(root="data")
        >>> data.num_classes, data.image_size, data.class_names[:2]
        (10, 32, ('airplane', 'automobile'))

    Reference:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    num_classes = 10
    in_channels = 3
    native_size = 32
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    class_names: tuple[str, ...] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    dataset_class: ClassVar[Any] = datasets.CIFAR10

    def prepare_data(self) -> None:
        """Download and unpack the archive if its files are not in ``root``.

        Raises:
            FileNotFoundError: if the download fails; the message names the files and where to put them.
        """
        try:
            self.dataset_class(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{self._missing()}; the download failed: {error}") from error

    def load(self, split: Literal["train", "val", "test"]) -> tuple[Tensor, Tensor] | None:
        """Return the images ``(N, 3, 32, 32)`` uint8 and the labels of the official training or test split."""
        if split == "val":
            return None
        try:
            data = self.dataset_class(self.root, train=split == "train")
        except RuntimeError as error:  # a file is missing, or its checksum differs
            raise FileNotFoundError(f"{self._missing()}, or call prepare_data() to download it") from error
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)

    def default_augmentation(self) -> Callable[[Tensor], Tensor]:
        """Return a random crop with 4 pixels of padding and a horizontal flip."""
        return crop_and_flip(self.native_size)

    def _missing(self) -> str:
        source = self.dataset_class
        names = [name for name, _ in source.train_list + source.test_list] + [source.meta["filename"]]
        return (
            f"{source.__name__} is not in {self.root}, or a file is damaged; put {source.filename} there, or its "
            f"files {', '.join(names)} into {self.root}/{source.base_folder}"
        )


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 training and 10,000 test images, 32x32 colour pixels, 100 (fine) classes.

    Everything else as in :class:`CIFAR10DataModule`.

    Example:
        >>> data = CIFAR100DataModule(root="data")
        >>> data.num_classes, data.class_names[0]
        (100, 'apple')
    """

    num_classes = 100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    class_names = tuple(_CIFAR100_CLASSES.split())
    dataset_class = datasets.CIFAR100
