"""Square: a random search that changes one square of pixels at a time and asks for no gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_plugins.checks import check_types
from lightning_plugins.robustness.apgd import Search
from lightning_plugins.robustness.attack import (
    AttackResult,
    LogitsFn,
    attacking,
    check_targets,
    make_space,
    per_row,
    private_generator,
    wrong,
)
from lightning_plugins.robustness.attack_losses import margin_loss
from lightning_plugins.robustness.perturbation import Bounds, Norm, PerturbationSet, norm_of

__all__ = ["square", "square_side"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_DROP_EVERY = 10
_TILES = 5


@check_types
def square(
    logits_fn: LogitsFn,
    inputs: Tensor,
    targets: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    num_queries: int = 5000,
    initial_share: float = 0.8,
    shared_windows: bool = True,
    bounds: Bounds = (0.0, 1.0),
    luminance_only: bool = False,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Try random square changes and keep those that bring an image nearer to a wrong prediction.

    It sees only logits, hence is not misled by gradients that a defence hides: where it breaks what gradient attacks do
    not, the network masks its gradients. In ``linf`` an image starts with vertical stripes of ``+-eps`` and a try moves
    one square to a side of the ball; in ``l2`` a try moves length from one window into another. The squares shrink on
    the schedule of :func:`square_side`.

    A module is attacked in evaluation mode and left as it was; the caller's autocast is switched off.

    Args:
        logits_fn: from images to logits ``(N, C)``; no gradients are taken.
        inputs: images ``(N, C, H, W)`` inside ``bounds``, floating-point.
        targets: true classes ``(N,)``, int64.
        eps: radius in the units of the inputs; shapes as in `pgd`.
        norm: ``"linf"`` or ``"l2"`` (sides of at least 5 pixels).
        num_queries: tries for each image after the first point, at least 1.
        initial_share: part of the image that the first squares cover, in (0, 1].
        shared_windows: one window for all images of the batch at a time, as published, or (``linf`` only) one for
            each image.
        bounds: lowest and highest valid value; None for none.
        luminance_only: change only the luminance of RGB images; see `PerturbationSet`.
        generator: of the tries. Default: one seeded with 0.

    Returns:
        The attack's result; ``adversarial`` is the input where ``success`` is False.

    Raises:
        ValueError: for an argument out of range, or inputs that are not images inside ``bounds``.

    Example:
        >>> logits_fn = lambda x: torch.stack([x.mean((1, 2, 3)), 0.45 + 0 * x.mean((1, 2, 3))], dim=1)
        >>> result = square(logits_fn, torch.full((1, 1, 4, 4), 0.5), torch.tensor([0]), eps=0.1, num_queries=50)
        >>> result.success, result.num_gradients
        (tensor([True]), 0)

    Reference:
        M. Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search",
        ECCV 2020, algorithms 1 to 3, with AutoAttack's schedule that is not rescaled to ``num_queries``.
    """
    if num_queries < 1:
        raise ValueError(f"num_queries must be at least 1, got {num_queries!r}")
    if not 0 < initial_share <= 1:
        raise ValueError(f"initial_share must lie in (0, 1], got {initial_share!r}")
    if norm == "l2" and not shared_windows:
        raise ValueError('windows of their own for each image exist for norm="linf"; use shared_windows=True')
    with attacking(logits_fn, inputs, full_precision=True) as network:
        space = make_space(inputs, eps, norm, bounds, luminance_only)
        targets = check_targets("targets", targets, space.inputs)
        check_images(space)
        search = Search(network, space, targets)
        run_square(search, private_generator(generator), num_queries, initial_share, shared_windows=shared_windows)
        return search.result()


def square_side(query: int, height: int, width: int, *, initial_share: float = 0.8) -> int:
    """Return the side of the square at a query: its share of the image halves after 10, 50, 200, 500, ... queries.

    Args:
        query: number of the query, from 0.
        height: of the image in pixels.
        width: of the image in pixels.
        initial_share: part of the image that the first squares cover, in (0, 1].

    Example:
        >>> [square_side(query, 32, 32) for query in (0, 10, 11, 51, 201, 4001)]
        [29, 29, 20, 14, 10, 3]
    """
    share = initial_share / 2 ** sum(query > bound for bound in _HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def check_images(space: PerturbationSet) -> None:
    """Check that there are squares in the inputs.

    Raises:
        ValueError: for vectors, or images too small for the ``l2`` version.
    """
    shape = tuple(space.inputs.shape)
    if len(shape) != 4:
        raise ValueError(f"Square needs images (N, C, H, W), found shape {shape}; use fab() or apgd()")
    if space.norm == "l2" and min(shape[2:]) < _TILES:
        raise ValueError(f'Square with norm="l2" needs sides of at least {_TILES} pixels, found {shape}')


def run_square(
    search: Search,
    generator: torch.Generator,
    num_queries: int,
    initial_share: float = 0.8,
    *,
    shared_windows: bool = True,
) -> None:
    """Attack what is robust."""
    rows = search.rows()
    if not len(rows):
        return
    space = search.space.rows(rows)
    height, width = space.inputs.shape[2:]
    targets = search.targets[rows]
    best = _stripes(space, generator) if space.norm == "linf" else _tiles(space, generator)
    logits = search.network.logits(space.image(best))
    margin = margin_loss(logits, targets)
    for query in range(num_queries):
        if query % _DROP_EVERY == 0:
            broken = wrong(logits, targets)
            if bool(broken.any()):
                search.found(rows[broken], best[broken], logits[broken])
                keep = ~broken
                if not bool(keep.any()):
                    return
                rows, space, targets = rows[keep], space.rows(keep), targets[keep]
                best, logits, margin = best[keep], logits[keep], margin[keep]
        side = square_side(query, height, width, initial_share=initial_share)
        if space.norm == "linf":
            candidate = _change_square(space, best, side, generator, shared_windows)
        else:
            candidate = _move_length(space, best, side, generator)
        tried = search.network.logits(space.image(candidate))
        found = margin_loss(tried, targets)
        better = (found > margin) | (found >= 0)
        best = torch.where(per_row(better, best), candidate, best)
        logits = torch.where(better.unsqueeze(1), tried, logits)
        margin = torch.where(better, found, margin)
    broken = wrong(logits, targets)
    search.found(rows[broken], best[broken], logits[broken])


def _uniform(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.where(_uniform(shape, generator, like) < 0.5, -1.0, 1.0).to(like.dtype)


def _corner(free: int, generator: torch.Generator) -> int:
    """Draw a corner that leaves ``free`` pixels in all; the last place is left out, as published."""
    return int(torch.randint(max(free, 1), (), generator=generator, device=generator.device))


def _stripes(space: PerturbationSet, generator: torch.Generator) -> Tensor:
    number, channels, _, width = space.origin.shape
    return space.project(space.origin + space.radius * _signs((number, channels, 1, width), generator, space.origin))


def _change_square(space: PerturbationSet, best: Tensor, side: int, generator: torch.Generator, shared: bool) -> Tensor:
    number, channels, height, width = best.shape
    if shared:
        window = torch.zeros((1, 1, height, width), dtype=torch.bool, device=best.device)
        top, left = _corner(height - side, generator), _corner(width - side, generator)
        window[..., top : top + side, left : left + side] = True
        signs = _signs((1, channels, 1, 1), generator, best)
    else:
        corners = _uniform((2, number, 1), generator, best)
        insides = []
        for places, size in zip(corners, (height, width), strict=True):
            first = (places * max(size - side, 1)).floor()
            pixels = torch.arange(size, device=best.device)
            insides.append((pixels >= first) & (pixels < first + side))
        window = (insides[0].unsqueeze(2) & insides[1].unsqueeze(1)).unsqueeze(1)
        signs = _signs((number, channels, 1, 1), generator, best)
    return space.project(torch.where(window, best + 2.0 * space.radius * signs, best))


def _bump(side: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Return a window of length 1 whose two halves peak with opposite signs, across or along at random."""
    halves = []
    for rows in (side // 2, side - side // 2):
        # Squares around the middle, each a pixel larger on every side than the one before, with weights 1, 1/4, 1/9.
        down = (torch.arange(rows, device=like.device) - rows // 2).abs()
        across = (torch.arange(side, device=like.device) - side // 2).abs()
        ring = torch.maximum(down.unsqueeze(1), across.unsqueeze(0))
        size = max(rows // 2, side // 2) + 1
        weights = torch.arange(1, size + 1, device=like.device, dtype=like.dtype).pow(-2)
        heights = weights.flip(0).cumsum(0).flip(0)[ring]
        halves.append(heights / heights.norm())
    bump = torch.cat([halves[0], -halves[1]])
    bump /= bump.norm()
    return bump.T if float(torch.rand((), generator=generator, device=generator.device)) < 0.5 else bump


def _tiles(space: PerturbationSet, generator: torch.Generator) -> Tensor:
    change = torch.zeros_like(space.origin)
    number, channels, height, width = change.shape
    side = min(height, width) // _TILES
    if side == 1:
        signs = _signs((number, channels, height, width), generator, change)
        return space.boundary(signs)
    for top in range((height % side) // 2, height - side + 1, side):
        for left in range((width % side) // 2, width - side + 1, side):
            signs = _signs((number, channels, 1, 1), generator, change)
            change[:, :, top : top + side, left : left + side] = _bump(side, generator, change) * signs
    return space.boundary(change)


def _move_length(space: PerturbationSet, best: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Empty one window, and fill another with its length, what the ball leaves free, and a new bump."""
    number, channels, height, width = best.shape
    side = max(side, 3)
    side = min(side + (side % 2 == 0), height, width)
    change = best - space.origin
    windows = []
    for _ in range(2):
        top, left = _corner(height - side, generator), _corner(width - side, generator)
        windows.append((..., slice(top, top + side), slice(left, left + side)))
    filled, emptied = windows
    touched = torch.zeros((height, width), dtype=torch.bool, device=best.device)
    touched[filled] = touched[emptied] = True
    inside = norm_of(change * touched, "l2")
    free = (torch.as_tensor(space.radius) ** 2 - norm_of(change, "l2") ** 2).clamp_min(0.0)
    old = change[filled]
    shape = _bump(side, generator, best) * _signs((number, channels, 1, 1), generator, best)
    shape = shape + old / torch.linalg.vector_norm(old, dim=(2, 3), keepdim=True).clamp_min(1e-12)
    length = (free / channels + inside**2).sqrt()
    change[emptied] = 0.0
    change[filled] = length * shape / torch.linalg.vector_norm(shape, dim=(2, 3), keepdim=True).clamp_min(1e-12)
    return space.boundary(change)
