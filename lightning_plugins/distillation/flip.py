"""Flip union: a part that is drawn once counts on both sides of the image."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_plugins.checks import check_types

__all__ = ["FlipMode", "FlipUnion", "flip_detectability", "flip_union"]

FlipMode = Literal["off", "synthetic", "both", "auto"]


@check_types
def flip_union(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Join images with their mirror images, and the labels with themselves.

    Both halves belong to the graph: the gradients of a pixel and of its mirror add up.

    Shape:
        - images: ``(N, C, H, W)``, mirrored along W
        - labels: ``(N,)`` or ``(N, K)``
        - output: ``(2N, C, H, W)`` and ``(2N,)`` or ``(2N, K)``

    Raises:
        ValueError: if ``images`` do not have four dimensions, or there is not one label for each.

    Example:
        >>> images, labels = flip_union(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([7]))
        >>> images.flatten(), labels
        (tensor([1., 2., 2., 1.]), tensor([7, 7]))

    Reference:
        B. Son et al., "FYI: Flip Your Images for Dataset Distillation", ECCV 2024.
    """
    if images.ndim != 4 or len(images) != len(labels):
        raise ValueError(
            f"images (N, C, H, W) and one label for each were expected, got {tuple(images.shape)} and "
            f"{tuple(labels.shape)}"
        )
    return torch.cat([images, images.flip(-1)]), torch.cat([labels, labels])


@check_types
def flip_detectability(real: Iterable[Tensor], *, seed: int = 0) -> Tensor:
    """Estimate for each class how often a mirror image can be told from an original.

    The mean of one half of the class and its mirror image are the two prototypes; an image of the other half counts as
    told apart if it is nearer to the mean. 0.5 means that the class faces both ways, 1 that it always faces one way.

    Args:
        real: the images of each class in turn, two or more, any numeric type.
        seed: of the division into halves.

    Shape:
        - real: C tensors ``(N_c, channels, H, W)``
        - output: ``(C,)`` float64 in [0, 1]

    Raises:
        TypeError: if the images of a class are no tensor.
        ValueError: if a class has fewer than two images, or there is no class.

    Example:
        >>> one_sided = torch.tensor([1.0, 0.0]).expand(6, 1, 1, 2)
        >>> both = torch.stack([one_sided[0], one_sided[0].flip(-1)]).repeat(100, 1, 1, 1)
        >>> left, mixed = flip_detectability([one_sided, both]).tolist()
        >>> left, 0.3 < mixed < 0.7
        (1.0, True)
    """
    shares = []
    for label, images in enumerate(real):
        if not isinstance(images, Tensor):
            raise TypeError(f"the images of each class must be a tensor, found a {type(images).__name__}")
        count = len(images)
        if count < 2:
            raise ValueError(f"class {label} has {count} images, and two or more are needed to compare them")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(images.device)
        images = images[order].float()
        mean = images[: count // 2].mean(0)
        # |x - flip(mean)|^2 - |x - mean|^2 is twice this product, as both prototypes are equally long.
        nearer = (images[count // 2 :].flatten(1) @ (mean - mean.flip(-1)).flatten()).double()
        shares.append((nearer.sign().mean() / 2 + 0.5).cpu())
    if not shares:
        raise ValueError("the images of one class or more are needed, found none")
    return torch.stack(shares)


class FlipUnion:
    """Unite synthetic images with their mirror images, in the classes where that does no harm.

    Place it after the decoding and before the augmentation. The stored set keeps its size. In a class that always faces
    one way (shoes in Fashion-MNIST) the union would force a symmetric mean that no real batch has; ``"auto"`` finds
    these classes and leaves them out.

    Args:
        mode: ``"off"``; ``"synthetic"`` for all classes of the synthetic side; ``"both"`` for the real side too;
            ``"auto"`` for the synthetic side of the classes whose detectability is below ``threshold``, which needs
            :meth:`fit`.
        threshold: see :func:`flip_detectability`, in (0.5, 1].

    Attributes:
        detectability: ``(C,)`` after :meth:`fit`, else None.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> both_ways, one_way = torch.eye(2).repeat(20, 1), torch.tensor([[1.0, 0.0]]).repeat(20, 1)
        >>> flip = FlipUnion("auto").fit([both_ways.view(40, 1, 1, 2), one_way.view(20, 1, 1, 2)])
        >>> flip.flipped_classes(2)
        (0,)
        >>> flip.per_class(torch.rand(2, 3, 1, 4, 4)).shape
        torch.Size([2, 6, 1, 4, 4])

    Reference:
        B. Son et al., "FYI: Flip Your Images for Dataset Distillation", ECCV 2024. ``"auto"`` and ``"both"`` are ours.
    """

    @check_types
    def __init__(self, mode: FlipMode = "off", *, threshold: float = 0.85) -> None:
        if mode not in ("off", "synthetic", "both", "auto"):
            raise ValueError(f"mode must be 'off', 'synthetic', 'both' or 'auto', got {mode!r}")
        if not 0.5 < threshold <= 1:
            raise ValueError(f"threshold must lie in (0.5, 1], got {threshold!r}")
        self.mode = mode
        self.threshold = threshold
        self.detectability: Tensor | None = None

    @check_types
    def fit(self, real: Iterable[Tensor], *, seed: int = 0) -> FlipUnion:
        """Estimate the detectability of every class, see :func:`flip_detectability`; return the union itself."""
        self.detectability = flip_detectability(real, seed=seed)
        return self

    def flipped_classes(self, num_classes: int) -> tuple[int, ...]:
        """Return the classes whose synthetic images are united with their mirror images.

        Raises:
            RuntimeError: for ``"auto"`` before :meth:`fit`.
            ValueError: if another number of classes was fitted.
        """
        if self.mode == "off":
            return ()
        if self.mode != "auto":
            return tuple(range(num_classes))
        if self.detectability is None:
            raise RuntimeError("FlipUnion('auto') does not know the classes yet; call fit with the real images of each")
        if len(self.detectability) < num_classes:
            raise ValueError(f"{len(self.detectability)} classes were fitted, {num_classes} were asked for")
        return tuple(int(label) for label in (self.detectability[:num_classes] < self.threshold).nonzero())

    @check_types
    def per_class(
        self, images: Tensor, *, classes: range | None = None, side: Literal["synthetic", "real"] = "synthetic"
    ) -> Tensor:
        """Unite the images of each class; a class that is left out has its images twice, which keeps its mean.

        Args:
            images: of some classes.
            classes: which; None for ``0 .. c - 1``.
            side: ``"real"`` is changed by ``"both"`` alone.

        Shape:
            - images: ``(c, m, C, H, W)``
            - output: ``(c, 2m, C, H, W)``, or the input if no class of all is flipped
        """
        classes = range(len(images)) if classes is None else classes
        if self.mode == "off" or (side == "real" and self.mode != "both"):
            return images
        chosen = set(self.flipped_classes(max(classes) + 1))
        here = [label in chosen for label in classes]
        if not any(here):
            return images
        mirrored = images.flip(-1)
        if not all(here):
            mask = torch.tensor(here, device=images.device).view(-1, 1, 1, 1, 1)
            mirrored = torch.where(mask, mirrored, images)
        return torch.cat([images, mirrored], 1)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Unite a mixed synthetic batch: the mirror images of the flipped classes are appended.

        Shape:
            - images: ``(N, C, H, W)``
            - labels: ``(N,)`` int64
            - output: ``(N + M, C, H, W)`` and ``(N + M,)``, with M images of flipped classes
        """
        if self.mode == "off":
            return images, labels
        if self.mode != "auto":
            return flip_union(images, labels)
        if self.detectability is None:
            self.flipped_classes(0)
        assert self.detectability is not None
        chosen = (self.detectability < self.threshold).to(labels.device)[labels]
        return torch.cat([images, images[chosen].flip(-1)]), torch.cat([labels, labels[chosen]])

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`fit` found."""
        return {"detectability": self.detectability}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`fit` found."""
        self.detectability = state["detectability"]
