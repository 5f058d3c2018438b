"""Fashion-MNIST from files that are there already, or by download."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision import datasets

from lightning_plugins.data.base import ImageDataModule, crop_and_flip

__all__ = ["FashionMNISTDataModule", "read_idx"]

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class FashionMNISTDataModule(ImageDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothing, 28x28 grey pixels, 10 classes.

    The four idx files, gzipped or not, are looked for in ``root``, in ``root/FashionMNIST/raw`` (torchvision's place)
    and in ``/usr/share/datasets/fashion-mnist`` (Debian's package ``dataset-fashion-mnist``). Only if no folder has
    all four are they downloaded, to the second. ``augmentation=True`` is a random crop after 4 pixels of padding and a
    horizontal flip. Arguments and attributes: :class:`ImageDataModule`.

    Example:
        >>> data = FashionMNISTDataModule(root="data", batch_size=256)
        >>> data.num_classes, data.class_names[8], data.mean
        (10, 'Bag', (0.286,))

    Reference:
        Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
    """

    num_classes = 10
    in_channels = 1
    native_size = 28
    mean = (0.2860,)
    std = (0.3530,)
    class_names = tuple(datasets.FashionMNIST.classes)

    def prepare_data(self) -> None:
        """Download the files if no folder has them.

        Raises:
            FileNotFoundError: if the download fails; the message names the four files and where to put them.
        """
        if self._find() is None:
            try:
                datasets.FashionMNIST(self.root, download=True)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(f"{self._missing()}; the download failed: {error}") from error

    def load(self, split: Literal["train", "val", "test"]) -> tuple[Tensor, Tensor] | None:
        """Return the images ``(N, 1, 28, 28)`` uint8 and the labels of the official training or test split."""
        if split == "val":
            return None
        folder = self._find()
        if folder is None:
            raise FileNotFoundError(f"{self._missing()}, or call prepare_data() to download them")
        images, targets = (read_idx(_present(folder / name)) for name in _FILES[split])
        if images.shape[1:] != (28, 28) or targets.ndim != 1:
            raise ValueError(
                f"the {split} files in {folder} hold arrays {tuple(images.shape)} and {tuple(targets.shape)}, not "
                "(N, 28, 28) and (N,); replace them by Fashion-MNIST's"
            )
        return images.unsqueeze(1), targets.to(torch.int64)

    def default_augmentation(self) -> Callable[[Tensor], Tensor]:
        """Return a random crop with 4 pixels of padding and a horizontal flip."""
        return crop_and_flip(self.native_size)

    def _folders(self) -> tuple[Path, ...]:
        return Path(self.root), Path(self.root, "FashionMNIST", "raw"), DEBIAN_FOLDER

    def _find(self) -> Path | None:
        for folder in self._folders():
            if all(_present(folder / name).is_file() for names in _FILES.values() for name in names):
                return folder
        return None

    def _missing(self) -> str:
        names = [f"{name}.gz" for names in _FILES.values() for name in names]
        places = ", ".join(str(folder) for folder in self._folders())
        return (
            f"Fashion-MNIST is in none of {places}; put {', '.join(names)} (or the same unpacked) into {self.root}, "
            "or install Debian's package dataset-fashion-mnist"
        )


def read_idx(path: Path) -> Tensor:
    """Read an idx file of bytes, the format of the MNIST family, gzipped (``.gz``) or plain.

    torchvision's reader takes plain files only and does not notice every truncation.

    Shape:
        - output: as the file says, uint8

    Raises:
        ValueError: if the file is damaged, truncated or of another type; the message names it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "labels")
        >>> path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        11
        >>> read_idx(path)
        tensor([7, 8, 9], dtype=torch.uint8)
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and get it again") from error
    # Header: two zero bytes, the type (8: unsigned byte), the number of axes, then each length as a big-endian int32.
    start = 4 + 4 * content[3] if len(content) >= 4 else 0
    lengths = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if not lengths or content[:3] != b"\0\0\x08" or len(content) != start + math.prod(lengths):
        raise ValueError(
            f"{path} is damaged or not an idx file of bytes: its {len(content)} bytes do not match its header; "
            "delete it and get it again"
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(lengths)


def _present(path: Path) -> Path:
    """Return the gzipped file beside ``path`` unless the plain one is there."""
    return path if path.is_file() else path.with_name(f"{path.name}.gz")
