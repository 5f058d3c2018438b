"""Multi-formation: one stored image holds several training images of lower resolution."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.checks import check_types

__all__ = ["DecodeVariant", "decode", "decode_index", "encode"]

DecodeVariant = Literal["single", "multi", "bound"]


@check_types
def decode(images: Tensor, rho: int, variant: DecodeVariant = "single", *, bound: int = 128) -> Tensor:
    """Cut every image into ``rho x rho`` tiles and enlarge each tile to the size of the image.

    A tile has sides ``ceil(H / rho)`` and ``ceil(W / rho)``; an image that does not divide is padded with 0.5 at the
    right and the bottom. Tiles are enlarged bilinearly. The order is tile-major: first the upper left tile of every
    image, then the tile to its right, row by row. :func:`decode_index` says which image each result came from.

    Args:
        images: stored images; all dimensions before the last four are left alone.
        rho: tiles per side, at least 1; 1 returns the images as they are.
        variant: ``"single"`` cuts all images by ``rho``; ``"multi"`` joins the results for 1, 2, ..., ``rho``;
            ``"bound"`` cuts the first images by ``rho``, further ones by less, so that there are no more than
            ``bound`` results.
        bound: largest number m of results per group for ``"bound"``, at least n.

    Shape:
        - images: ``(..., n, C, H, W)``
        - output: ``(..., m, C, H, W)``, with m = rho^2 n for ``"single"``

    Raises:
        ValueError: if ``rho`` is below 1 or above a side of the images, ``bound`` is below n, or the variant is
            unknown.

    Example:
        >>> images = torch.arange(4.0).view(1, 1, 2, 2)
        >>> decode(images, 2)[:, 0, 0, 0]
        tensor([0., 1., 2., 3.])

    Reference:
        J.-H. Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022, section 4.
    """
    if images.ndim < 4 or not images.numel():
        raise ValueError(f"images must have shape (..., n, C, H, W) and be some, got {tuple(images.shape)}")
    if rho > min(images.shape[-2:]):
        raise ValueError(f"rho must not exceed the sides {tuple(images.shape[-2:])} of the images, got {rho!r}")
    plan = _plan(images.shape[-4], rho, variant, bound)
    if len(plan) == 1:
        return _decode_by(images, plan[0][2])
    return torch.cat([_decode_by(images[..., start:stop, :, :, :], factor) for start, stop, factor in plan], -4)


@check_types
def decode_index(num_images: int, rho: int, variant: DecodeVariant = "single", *, bound: int = 128) -> Tensor:
    """Return for each result of :func:`decode` the stored image that it is a part of.

    Args:
        num_images: n, at least 1.
        rho: see :func:`decode`.
        variant: see :func:`decode`.
        bound: see :func:`decode`.

    Shape:
        - output: ``(m,)`` int64 in ``0 .. n - 1``

    Raises:
        ValueError: as :func:`decode`.

    Example:
        >>> decode_index(2, 2)
        tensor([0, 1, 0, 1, 0, 1, 0, 1])
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images!r}")
    plan = _plan(num_images, rho, variant, bound)
    return torch.cat([torch.arange(start, stop).repeat(factor**2) for start, stop, factor in plan])


@check_types
def encode(images: Tensor, rho: int) -> Tensor:
    """Shrink images to tiles and join ``rho x rho`` of them to each stored image: the order that :func:`decode` undoes.

    Args:
        images: ``rho^2 n`` images, tile-major.
        rho: tiles per side, at least 1.

    Shape:
        - images: ``(..., rho^2 n, C, H, W)``
        - output: ``(..., n, C, H, W)``

    Raises:
        ValueError: if the number of images is not a multiple of ``rho^2``, or ``rho`` is out of range.

    Example:
        >>> encode(torch.rand(3, 8, 1, 6, 6), 2).shape
        torch.Size([3, 2, 1, 6, 6])
    """
    *groups, count, channels, height, width = images.shape
    if not 1 <= rho <= min(height, width):
        raise ValueError(f"rho must be at least 1 and not exceed the sides {(height, width)}, got {rho!r}")
    if count % rho**2:
        raise ValueError(f"{count} images cannot fill mosaics of {rho} x {rho} tiles; give a multiple of {rho**2}")
    if rho == 1:
        return images
    sides = math.ceil(height / rho), math.ceil(width / rho)
    flat = images.reshape(-1, channels, height, width)
    tiles = F.interpolate(flat, size=sides, mode="bilinear", align_corners=False, antialias=True)
    tiles = tiles.view(-1, rho, rho, count // rho**2, channels, *sides).permute(0, 3, 4, 1, 5, 2, 6)
    mosaics = tiles.reshape(*groups, count // rho**2, channels, rho * sides[0], rho * sides[1])
    return mosaics[..., :height, :width]


def _decode_by(images: Tensor, rho: int) -> Tensor:
    if rho == 1:
        return images
    *groups, count, channels, height, width = images.shape
    tile_h, tile_w = math.ceil(height / rho), math.ceil(width / rho)
    if (tile_h * rho, tile_w * rho) != (height, width):
        images = F.pad(images, (0, tile_w * rho - width, 0, tile_h * rho - height), value=0.5)
    tiles = images.reshape(-1, count, channels, rho, tile_h, rho, tile_w).permute(0, 3, 5, 1, 2, 4, 6)
    tiles = tiles.reshape(-1, channels, tile_h, tile_w)
    large = F.interpolate(tiles, size=(height, width), mode="bilinear", align_corners=False)
    return large.view(*groups, rho**2 * count, channels, height, width)


def _plan(count: int, rho: int, variant: str, bound: int) -> list[tuple[int, int, int]]:
    """Return pieces (first image, end, factor) whose results are joined in order."""
    if rho < 1:
        raise ValueError(f"rho must be at least 1, got {rho!r}")
    if variant == "single":
        return [(0, count, rho)]
    if variant == "multi":
        return [(0, count, factor) for factor in range(1, rho + 1)]
    if variant != "bound":
        raise ValueError(f"variant must be 'single', 'multi' or 'bound', got {variant!r}")
    if bound < count:
        raise ValueError(f"bound must be at least the {count} stored images, got {bound!r}")
    pieces, start, spare = [], 0, bound - count
    for factor in range(rho, 0, -1):
        # Every image counts once in any case; cutting it adds factor^2 - 1.
        taken = count - start if factor == 1 else min(spare // (factor**2 - 1), count - start)
        if taken:
            pieces.append((start, start + taken, factor))
            start, spare = start + taken, spare - taken * (factor**2 - 1)
    return pieces
