"""The distilled images: what is learned, decoded, stored and handed over."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_plugins._sealed_files import checksum, read_sealed
from lightning_plugins.checks import check_types
from lightning_plugins.distillation.decode import DecodeVariant, decode, decode_index, encode
from lightning_plugins.distillation.generators import PrivateGenerator
from lightning_plugins.distillation.pool import ClassPool
from lightning_plugins.files import write_atomically

__all__ = ["Initialisation", "Space", "SyntheticSet"]

FORMAT = "lightning_plugins.distillation.synthetic_set"
VERSION = 1

Space = Literal["pixel", "normalised"]
Initialisation = Literal["noise", "real", "mix"]


class SyntheticSet(nn.Module):
    """A learned training set with the same number of images for every class.

    Args:
        images: first values of the images; copied to float32.
        space: ``"pixel"`` for images in [0, 1], which :meth:`clamp_` keeps there; ``"normalised"`` for images that have
            been normalised with ``mean`` and ``std`` and may take any value.
        mean: per channel, [0, 1] scale; None for 0.
        std: likewise; None for 1.
        rho: tiles per side that each image is cut into, see :func:`.decode`.
        variant: of the decoding.
        bound: of the decoding.
        class_names: C names, or None.
        soft_logits: logits that train beside or in place of the labels, one row for each stored or each decoded image;
            None for none.

    Attributes:
        images: parameter ``(C, n, channels, H, W)`` float32.
        labels: buffer ``(C, n)`` int64, the class of each stored image.
        soft_logits: buffer ``(C, n or m, K)`` or None.
        mean: buffer ``(channels,)``.
        std: buffer ``(channels,)``.
        about: further facts from the file that the set was loaded from.

    Shape:
        - images: ``(C, n, channels, H, W)``, n images per class
        - :meth:`decode`: ``(C, m, channels, H, W)``, m images per class to train on

    Raises:
        ValueError: if shapes do not fit each other, or an argument is out of range.

    Example:
        >>> distilled = SyntheticSet(torch.rand(10, 2, 1, 28, 28), rho=2)
        >>> distilled.decode().shape, distilled.decoded_labels()[3, :3]
        (torch.Size([10, 8, 1, 28, 28]), tensor([3, 3, 3]))
    """

    labels: Tensor
    mean: Tensor
    std: Tensor
    soft_logits: Tensor | None

    @check_types
    def __init__(
        self,
        images: Tensor,
        *,
        space: Space = "pixel",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        rho: int = 1,
        variant: DecodeVariant = "single",
        bound: int = 128,
        class_names: Sequence[str] | None = None,
        soft_logits: Tensor | None = None,
    ) -> None:
        super().__init__()
        if images.ndim != 5 or 0 in images.shape or not images.is_floating_point():
            raise ValueError(
                f"images must be floating, of shape (C, n, channels, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        if space not in ("pixel", "normalised"):
            raise ValueError(f"space must be 'pixel' or 'normalised', got {space!r}")
        classes, count, channels, height, width = images.shape
        if not 1 <= rho <= min(height, width):
            raise ValueError(f"rho must be at least 1 and not exceed the sides {(height, width)}, got {rho!r}")
        mean = (0.0,) * channels if mean is None else tuple(float(value) for value in mean)
        std = (1.0,) * channels if std is None else tuple(float(value) for value in std)
        if not len(mean) == len(std) == channels or not min(std) > 0:
            raise ValueError(f"mean and std must have {channels} values, std above 0, got {mean} and {std}")
        if class_names is not None and len(class_names) != classes:
            raise ValueError(f"class_names must have {classes} names, got {len(class_names)}")
        self.about: dict[str, Any] = {}
        self.space: Space = space
        self.rho = rho
        self.variant: DecodeVariant = variant
        self.bound = bound
        self.class_names = None if class_names is None else tuple(str(name) for name in class_names)
        decoded = len(self._index(count))
        if soft_logits is not None and (
            soft_logits.ndim != 3 or soft_logits.shape[0] != classes or soft_logits.shape[1] not in (count, decoded)
        ):
            raise ValueError(
                f"soft_logits must have shape ({classes}, {count} or {decoded}, K), got {tuple(soft_logits.shape)}"
            )
        self.images = nn.Parameter(images.detach().to(torch.float32, copy=True).contiguous())
        self.register_buffer("labels", torch.arange(classes)[:, None].repeat(1, count))
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.register_buffer("soft_logits", None if soft_logits is None else soft_logits.detach().float().clone())

    @classmethod
    def initialised(
        cls,
        initialisation: Initialisation,
        pool: ClassPool,
        images_per_class: int,
        *,
        space: Space = "pixel",
        rho: int = 1,
        variant: DecodeVariant = "single",
        bound: int = 128,
        seed: int = 0,
    ) -> SyntheticSet:
        """Start from noise or from real images.

        Args:
            initialisation: ``"noise"`` (standard normal; in pixel space divided by 4, around 0.5, clamped), ``"real"``
                (random images of the class) or ``"mix"`` (every image a mosaic of ``rho^2`` shrunken real images).
            pool: the real images, which also give ``mean``, ``std`` and the class names.
            images_per_class: n, at least 1.
            space: see the class.
            rho: see the class.
            variant: see the class.
            bound: see the class.
            seed: of the draws.

        Raises:
            ValueError: if an argument is out of range.

        Example:
            >>> pool = ClassPool(torch.rand(20, 1, 8, 8), torch.arange(2).repeat(10))
            >>> SyntheticSet.initialised("mix", pool, 1, rho=2).images.shape
            torch.Size([2, 1, 1, 8, 8])
        """
        if images_per_class < 1:
            raise ValueError(f"images_per_class must be at least 1, got {images_per_class!r}")
        generator = PrivateGenerator(seed, "first images").on("cpu")
        if initialisation == "noise":
            images = torch.randn(pool.num_classes, images_per_class, *pool.image_shape, generator=generator)
            if space == "pixel":
                images = (images / 4 + 0.5).clamp_(0, 1)
        elif initialisation in ("real", "mix"):
            tiles = rho**2 if initialisation == "mix" else 1
            images = pool.sample(tiles * images_per_class, generator).float()
            if initialisation == "mix":
                images = encode(images, rho)
            if space == "normalised":
                images = (images - images.new_tensor(pool.mean).view(-1, 1, 1)) / images.new_tensor(pool.std).view(
                    -1, 1, 1
                )
        else:
            raise ValueError(f"initialisation must be 'noise', 'real' or 'mix', got {initialisation!r}")
        return cls(
            images,
            space=space,
            mean=pool.mean,
            std=pool.std,
            rho=rho,
            variant=variant,
            bound=bound,
            class_names=pool.class_names,
        ).to(pool.device)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.images.shape[0]

    @property
    def images_per_class(self) -> int:
        """n, the number of stored images per class."""
        return self.images.shape[1]

    @property
    def decoded_per_class(self) -> int:
        """m, the number of images per class that :meth:`decode` makes."""
        return len(self._index(self.images_per_class))

    @property
    def num_values(self) -> int:
        """Stored numbers: what the memory of a set is counted in."""
        return self.images.numel() + (0 if self.soft_logits is None else self.soft_logits.numel())

    def extra_repr(self) -> str:
        """Show the shape and how it is decoded."""
        return f"{tuple(self.images.shape)}, space={self.space!r}, rho={self.rho}, variant={self.variant!r}"

    def decode(self) -> Tensor:
        """Return the images to train on in the set's own space, as part of the graph, ``(C, m, channels, H, W)``."""
        return decode(self.images, self.rho, self.variant, bound=self.bound)

    def decoded_labels(self) -> Tensor:
        """Return the class of each decoded image, ``(C, m)`` int64."""
        return self.labels[:, self._index(self.images_per_class).to(self.labels.device)]

    def decoded_logits(self) -> Tensor | None:
        """Return the soft logits of each decoded image, ``(C, m, K)``, or None without any."""
        if self.soft_logits is None or self.soft_logits.shape[1] == self.decoded_per_class:
            return self.soft_logits
        return self.soft_logits[:, self._index(self.images_per_class).to(self.soft_logits.device)]

    def normalise(self, images: Tensor) -> Tensor:
        """Bring images of the set's space ``(..., channels, H, W)`` to what networks see."""
        if self.space == "normalised":
            return images
        return (images - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def pixels(self, images: Tensor) -> Tensor:
        """Bring images of the set's space ``(..., channels, H, W)`` to the [0, 1] scale, without a clamp."""
        return images if self.space == "pixel" else images * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)

    @torch.no_grad()
    def clamp_(self) -> SyntheticSet:
        """Clamp the images to [0, 1] in place; in normalised space do nothing. Return the set."""
        if self.space == "pixel":
            self.images.clamp_(0, 1)
        return self

    def as_dataset(self, *, normalise: bool = True) -> TensorDataset:
        """Return a copy of the decoded images and their labels, and the soft logits if there are any, for a loader.

        Args:
            normalise: True for what networks see; False for the [0, 1] scale.

        Shape:
            - items: image ``(channels, H, W)``, class ``()`` int64, and soft logits ``(K,)``
        """
        with torch.no_grad():
            images = self.decode()
            images = self.normalise(images) if normalise else self.pixels(images)
            tensors = [images.flatten(0, 1).clone(), self.decoded_labels().flatten()]
            logits = self.decoded_logits()
            if logits is not None:
                tensors.append(logits.flatten(0, 1).clone())
        return TensorDataset(*tensors)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        about: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write ``set.safetensors`` and, for people, ``meta.json``; what stood there stays whole if it fails.

        ``set.safetensors`` holds everything that :meth:`load` reads.

        Args:
            folder: made if it is not there.
            about: further facts for the metadata that JSON can hold: data set, objective, seeds, evaluation results.
            dtype: of the stored images: float32 or float16.

        Returns:
            The folder.

        Raises:
            TypeError: if JSON cannot hold ``about``.
            ValueError: for another dtype, or images that are not finite (in ``dtype``).
            OSError: if the files cannot be written.
        """
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
        tensors = {"images": self.images.detach().to("cpu", dtype).contiguous(), "labels": self.labels.cpu()}
        if self.soft_logits is not None:
            tensors["soft_logits"] = self.soft_logits.detach().cpu().contiguous()
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} cannot be saved: some values are not finite; has training diverged?")
        meta = {
            "num_classes": self.num_classes,
            "images_per_class": self.images_per_class,
            "decoded_per_class": self.decoded_per_class,
            "space": self.space,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "rho": self.rho,
            "variant": self.variant,
            "bound": self.bound,
            "class_names": None if self.class_names is None else list(self.class_names),
            "about": dict(about or {}),
        }
        try:
            text = json.dumps(meta, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"about must hold finite numbers, strings, lists and dictionaries only: {error}") from error
        # As read back: JSON makes lists of tuples, and the checksum must not see a difference.
        meta = json.loads(text)
        header = json.dumps({"version": VERSION, "meta": meta, "checksum": checksum(tensors, meta)})
        content = safetensors.torch.save(tensors, {FORMAT: header})
        folder = Path(folder)
        _write_both(folder, content, (text + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SyntheticSet:
        """Read what :meth:`save` wrote, on the CPU; its ``about`` is the attribute of that name.

        Args:
            folder: with ``set.safetensors``. It is data, nothing in it is run.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, or of a newer version.
        """
        path = Path(folder, "set.safetensors")
        tensors, meta = _read(path.read_bytes(), str(path))
        try:
            loaded = cls(
                tensors["images"].float(),
                **{key: meta[key] for key in ("space", "mean", "std", "rho", "variant", "bound", "class_names")},
                soft_logits=tensors.get("soft_logits"),
            )
            about = meta["about"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} does not describe a synthetic set ({error}); copy it again") from error
        loaded.about = about
        return loaded

    def save_png(self, folder: str | os.PathLike[str], *, rescale: bool = False, decoded: bool = False) -> Path:
        """Write one 8-bit PNG per image, ``folder/class/index.png``: all of them or none.

        The folders begin with the class index, so that their alphabetical order is that of the labels.

        Args:
            folder: new or empty.
            rescale: True maps the lowest to the highest value of the whole set linearly to 0 .. 255.
            decoded: True writes the decoded images in place of the stored ones.

        Returns:
            The folder.

        Raises:
            ValueError: if images leave [0, 1] on the pixel scale and ``rescale`` is False, if they have neither one nor
                three channels, or if ``folder`` is not empty.
            OSError: if the files cannot be written.
        """
        from PIL import Image

        with torch.no_grad():
            values = _bytes(self.pixels(self.decode() if decoded else self.images), rescale=rescale).cpu()
        if values.shape[2] not in (1, 3):
            raise ValueError(f"a picture has one or three channels, these images have {values.shape[2]}")
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{str(folder)!r} is not empty; name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, as only a rename within one file system happens at once.
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            draft.chmod(0o755)
            for label, rows in enumerate(values):
                target = draft / self._class_folder(label)
                target.mkdir()
                for index, image in enumerate(rows):
                    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy()
                    Image.fromarray(array).save(target / f"{index:0{len(str(values.shape[1] - 1))}d}.png")
            os.replace(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder

    def quantised(self, *, rescale: bool = False) -> SyntheticSet:
        """Return the set that somebody has who only has the pictures of :meth:`save_png`: in pixel space, of 8 bits.

        Args:
            rescale: as in :meth:`save_png`. A set in pixel space is clamped first.

        Raises:
            ValueError: if normalised images leave [0, 1] on the pixel scale and ``rescale`` is False.

        Example:
            >>> found = SyntheticSet(torch.rand(2, 1, 1, 4, 4)).quantised().images * 255
            >>> torch.equal(found.round(), found)
            True
        """
        with torch.no_grad():
            images = self.images.clamp(0, 1) if self.space == "pixel" else self.pixels(self.images)
            images = _bytes(images, rescale=rescale).float() / 255
        return SyntheticSet(
            images,
            mean=self.mean.tolist(),
            std=self.std.tolist(),
            rho=self.rho,
            variant=self.variant,
            bound=self.bound,
            class_names=self.class_names,
            soft_logits=self.soft_logits,
        ).to(self.images.device)

    def _class_folder(self, label: int) -> str:
        index = f"{label:0{len(str(self.num_classes - 1))}d}"
        if self.class_names is None:
            return index
        name = re.sub(r"[^\w.-]+", "_", self.class_names[label])
        return index if name == index else f"{index}_{name[:64]}"

    def _index(self, count: int) -> Tensor:
        return decode_index(count, self.rho, self.variant, bound=self.bound)


def _bytes(images: Tensor, *, rescale: bool) -> Tensor:
    """Round images on the pixel scale to 8 bits."""
    images = images.detach().float()
    low, high = (float(value) for value in images.aminmax())
    if not (low > -float("inf") and high < float("inf")):
        raise ValueError("images are not finite and make no picture; has training diverged?")
    if rescale:
        images = (images - low) / max(high - low, 1e-12)
    elif low < -1e-6 or high > 1 + 1e-6:
        raise ValueError(
            f"a picture needs pixels in [0, 1], these go from {low:.4g} to {high:.4g}; clamp them, or pass "
            "rescale=True, which changes the contrast of all alike"
        )
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def _write_both(folder: Path, content: bytes, text: bytes) -> None:
    meta = folder / "meta.json"
    before = meta.read_bytes() if meta.exists() else None
    write_atomically(meta, text)
    try:
        write_atomically(folder / "set.safetensors", content)
    except BaseException:
        # The small file is the one that can be put back; there was room for it before.
        if before is None:
            meta.unlink()
        else:
            write_atomically(meta, before)
        raise


def _read(content: bytes, path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about, tensors = read_sealed(
        content,
        path,
        form=FORMAT,
        version=VERSION,
        writer="SyntheticSet.save",
        described=lambda about: about["meta"],
    )
    return tensors, about["meta"]
