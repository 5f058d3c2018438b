"""How far a network's confidence in a class extends: inputs that look like another class and are still taken for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins.checks import check_types
from lightning_plugins.gradients import ordinary
from lightning_plugins.robustness.attack import (
    LogitsFn,
    Network,
    attacking,
    check_classes,
    check_targets,
    per_row,
    private_generator,
)

__all__ = ["LevelSetPath", "TriangleConfidences", "level_set_traversal", "triangle_confidences"]


@dataclass(frozen=True)
class LevelSetPath:
    """Where a walk along a level set ended.

    Attributes:
        images: the last points, in shape and type of the source.
        classes: whose confidence was kept, ``(N,)``.
        confidences: in those classes, of the source and after each step, ``(num_steps + 1, N)``, in [0, 1].
        num_accepted: steps that were taken, of ``num_steps``, ``(N,)``.
        l2: Euclidean distances to the target, ``(N,)``.
        linf: largest differences from the target, ``(N,)``.
    """

    images: Tensor
    classes: Tensor
    confidences: Tensor
    num_accepted: Tensor
    l2: Tensor
    linf: Tensor


@check_types
def level_set_traversal(
    logits_fn: LogitsFn,
    source: Tensor,
    target: Tensor,
    *,
    classes: Tensor | None = None,
    num_steps: int = 100,
    step_size: float = 0.05,
    threshold: float = 0.05,
    counter_step: float = 1 / 255,
    jitter: float = 2 / 255,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> LevelSetPath:
    r"""Walk from source toward target at right angles to the gradient, so that the network's confidence stays.

    .. math:: x_{k+1} = x_k + \eta \, (v - \langle u, v \rangle u) - a, \quad v = x_t - x_k

    with u the direction of the gradient of the cross-entropy J, and a small perturbation a against curvature, which
    adds up J and is cut to ``counter_step``. A step that would lose ``threshold`` of the confidence of the source or
    more is not taken. One pass forward and backward per step, and two more.

    The network is under-sensitive where the walk ends near the target. A module is asked in evaluation mode and given
    back as it was. Works inside ``no_grad`` and ``inference_mode``.

    Args:
        logits_fn: from images to logits ``(N, C)``: a module, or a function that leaves normalisation to itself.
        source: images ``(N, ...)``, floating-point, inside ``bounds``.
        target: images to move toward, of the same shape, or 1 in place of N.
        classes: whose confidence to keep ``(N,)``, int64. Default: those predicted for the source. The paper leaves out
            sources that are misclassified.
        num_steps: at least 1.
        step_size: share of the way to go at each step, in (0, 1].
        threshold: confidence that may be lost, above 0.
        counter_step: largest change by a, in the unit of the images; 0 for none.
        jitter: half the width of the uniform noise to start with, in the unit of the images; 0 for none.
        bounds: lowest and highest valid value; None for none.
        generator: of the noise, on the CPU. Default: one seeded with 0.

    Returns:
        The last points, and the confidence along the way.

    Raises:
        ValueError: for wrong arguments or shapes, or logits that do not depend on the inputs through autograd.

    Example:
        >>> logits_fn = lambda x: torch.stack([x[:, 0], 0 * x[:, 0]], 1)  # looks at the first coordinate only
        >>> path = level_set_traversal(
        ...     logits_fn, torch.tensor([[0.9, 0.0]]), torch.tensor([[0.1, 1.0]]), counter_step=0.0, jitter=0.0
        ... )
        >>> path.images.round(decimals=1)
        tensor([[0.9000, 1.0000]])

    Reference:
        S. Balasubramanian, G. Sriramanan, V. S. Sadasivan, S. Feizi, "Exploring Geometry of Blind Spots in Vision
        Models", NeurIPS 2023. There the gradient of a saturated softmax vanishes; here its direction is that of the
        log-odds, which is the same where it does not.
    """
    _check_images("source", source)
    _check_images("target", target)
    if target.shape[1:] != source.shape[1:] or len(target) not in (1, len(source)):
        raise ValueError(f"target must be {tuple(source.shape)} as the source, got {tuple(target.shape)}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps!r}")
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size must lie in (0, 1], got {step_size!r}")
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold!r}")
    if not (counter_step >= 0 and jitter >= 0):
        raise ValueError(f"counter_step and jitter must be at least 0, got {counter_step!r} and {jitter!r}")
    lower, upper = (-math.inf, math.inf) if bounds is None else bounds
    if not lower < upper:
        raise ValueError(f"bounds must be (lower, upper) with lower < upper, got {bounds!r}")

    with _asking(logits_fn, source, classes) as (network, kept):
        dtype = torch.promote_types(source.dtype, torch.float32)
        now, goal = ordinary(source).to(dtype), ordinary(target).to(dtype)
        odds, slope = _log_odds(network, now, kept, source.dtype)
        start = odds.sigmoid()
        if jitter:
            noise = torch.rand(now.shape, generator=private_generator(generator), dtype=dtype).to(now.device)
            moved = (now + jitter * (2 * noise - 1)).clamp(lower, upper).to(source.dtype).to(dtype)
            new_odds, new_slope = _log_odds(network, moved, kept, source.dtype)
            taken = start - new_odds.sigmoid() < threshold
            now, slope = (torch.where(per_row(taken, now), *pair) for pair in ((moved, now), (new_slope, slope)))
            odds = torch.where(taken, new_odds, odds)
        counter, confidences = torch.zeros_like(now), [start]
        num_accepted = torch.zeros_like(kept)
        for step in range(num_steps):
            toward = goal - now
            unit = _direction(slope)
            along = (unit * toward).flatten(1).sum(1)
            if counter_step:
                # J, the gradient of the cross-entropy, is minus the probability of the others times that of the odds.
                loss_gradient = -per_row((-odds).sigmoid(), slope) * slope
                counter = (counter + counter_step / 2 * loss_gradient).clamp(-counter_step, counter_step)
            moved = now + step_size * (toward - per_row(along, unit) * unit) - counter
            moved = moved.clamp(lower, upper).to(source.dtype).to(dtype)
            if step + 1 < num_steps:
                new_odds, new_slope = _log_odds(network, moved, kept, source.dtype)
            else:
                new_odds, new_slope = _odds(network.logits(moved.to(source.dtype)), kept), slope
            taken = start - new_odds.sigmoid() < threshold
            now, slope = (torch.where(per_row(taken, now), *pair) for pair in ((moved, now), (new_slope, slope)))
            odds = torch.where(taken, new_odds, odds)
            num_accepted = num_accepted + taken
            confidences.append(odds.sigmoid())
        rest = (now - goal).flatten(1)
        linf = rest.abs().amax(1) if rest.numel() else rest.new_zeros(len(rest))
        l2 = torch.linalg.vector_norm(rest, dim=1)
        return LevelSetPath(now.to(source.dtype), kept, torch.stack(confidences), num_accepted, l2, linf)


@dataclass(frozen=True)
class TriangleConfidences:
    """Confidence on the triangle that three images span.

    Attributes:
        weights: of source, first and second image at each of the P points, ``(P, 3)``; rows add up to 1.
        confidences: ``(N, P)``, in [0, 1].
        edges: those on the ways from source to first, source to second, and first to second: ``(N, 3, num_points)``.
    """

    weights: Tensor
    confidences: Tensor
    edges: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean confidence over the triangle, ``(N,)``."""
        return self.confidences.mean(1)

    def share_within(self, loss: float) -> Tensor:
        """Return the share of the points that lose at most ``loss`` of the confidence of the source, ``(N,)``."""
        return (self.confidences >= self.edges[:, 0, :1] - loss).float().mean(1)


@check_types
def triangle_confidences(
    logits_fn: LogitsFn,
    source: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    classes: Tensor | None = None,
    num_points: int = 11,
) -> TriangleConfidences:
    """Return the confidence in the source's class between a source and the ends of two walks from it.

    One forward pass for each of the ``num_points * (num_points + 1) / 2`` points. A module is asked in evaluation mode
    and given back as it was.

    Args:
        logits_fn: from images to logits ``(N, C)``.
        source: images ``(N, ...)``, floating-point.
        first: where :func:`level_set_traversal` from the source ended, of the same shape.
        second: where another one ended, of the same shape.
        classes: whose confidence to measure ``(N,)``, int64. Default: those predicted for the source.
        num_points: on each edge, at least 2.

    Returns:
        Confidences on a triangular grid.

    Raises:
        ValueError: for wrong arguments or shapes.

    Example:
        >>> logits_fn = lambda x: torch.stack([x[:, 0], -x[:, 0]], 1)
        >>> source, first = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> triangle = triangle_confidences(logits_fn, source, first, torch.tensor([[-1.0, 0.0]]), num_points=3)
        >>> triangle.edges
        tensor([[[0.8808, 0.8808, 0.8808],
                 [0.8808, 0.5000, 0.1192],
                 [0.8808, 0.5000, 0.1192]]])
        >>> triangle.share_within(0.4)
        tensor([0.8333])

    Reference:
        S. Balasubramanian, G. Sriramanan, V. S. Sadasivan, S. Feizi, "Exploring Geometry of Blind Spots in Vision
        Models", NeurIPS 2023.
    """
    for name, images in (("source", source), ("first", first), ("second", second)):
        _check_images(name, images)
        if images.shape != source.shape:
            raise ValueError(f"{name} must be {tuple(source.shape)} as the source, got {tuple(images.shape)}")
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, got {num_points!r}")
    last = num_points - 1
    # By the share of the source, falling; within it by that of the first.
    grid = [(i, j, last - i - j) for i in range(last, -1, -1) for j in range(last - i, -1, -1)]
    place = {point: k for k, point in enumerate(grid)}
    steps = range(num_points)
    edges = [
        [place[last - t, t, 0] for t in steps],
        [place[last - t, 0, t] for t in steps],
        [place[0, last - t, t] for t in steps],
    ]
    with _asking(logits_fn, source, classes) as (network, kept):
        dtype = torch.promote_types(source.dtype, torch.float32)
        corners = [ordinary(images).to(dtype) for images in (source, first, second)]
        values = []
        for point in grid:
            mixed = sum(
                (w / last * corner for w, corner in zip(point, corners, strict=True)), torch.zeros_like(corners[0])
            )
            values.append(_odds(network.logits(mixed.to(source.dtype)), kept).sigmoid())
        confidences = torch.stack(values, 1)
        weights = torch.tensor(grid, dtype=dtype, device=source.device) / last
        return TriangleConfidences(weights, confidences, confidences[:, torch.tensor(edges, device=source.device)])


def _check_images(name: str, images: Tensor) -> None:
    if images.ndim < 2 or not images.is_floating_point():
        raise ValueError(f"{name} must be floating-point (N, ...), got {images.dtype} {tuple(images.shape)}")


@contextmanager
def _asking(logits_fn: LogitsFn, source: Tensor, classes: Tensor | None) -> Iterator[tuple[Network, Tensor]]:
    with attacking(logits_fn, source, full_precision=True) as network:
        if classes is None:
            kept = network.logits(ordinary(source)).argmax(1)
        else:
            kept = check_targets("classes", classes, source)
        yield network, kept


def _odds(logits: Tensor, classes: Tensor) -> Tensor:
    """Return log p - log(1 - p) of the classes, exact where the softmax is saturated."""
    if logits.shape[1] < 2:
        raise ValueError("logits must be (N, C) with at least 2 classes; for one logit o, pass a function of (o, 0)")
    check_classes("classes", classes, logits)
    own = classes[:, None]
    return logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -math.inf).logsumexp(1)


def _log_odds(network: Network, images: Tensor, classes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the log-odds of the classes and their gradient with respect to the images."""
    leaf = images.to(dtype).detach().requires_grad_()
    odds = _odds(network.forward(leaf), classes)
    if not odds.requires_grad:
        raise ValueError(
            "the logits do not depend on the inputs through autograd; remove detach() or no_grad() from the network"
        )
    (slope,) = torch.autograd.grad(odds.sum(), [leaf])
    return odds.detach(), slope.to(images.dtype)


def _direction(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, or 0 where there is none; a tiny one must not vanish when it is squared."""
    largest = vectors.abs().flatten(1).amax(1) if vectors.numel() else vectors.new_zeros(len(vectors))
    scaled = vectors / per_row(torch.where(largest > 0, largest, 1), vectors)
    length = torch.linalg.vector_norm(scaled.flatten(1), dim=1)
    return scaled / per_row(length.clamp_min(1), vectors)  # a scaled one is at least 1 long
