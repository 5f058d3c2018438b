"""FAB: the nearest adversarial example, by projections onto linearised decision boundaries."""

from __future__ import annotations

from functools import partial

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
from lightning_plugins.robustness.attack_losses import difference_loss
from lightning_plugins.robustness.perturbation import Bounds, Norm, PerturbationSet, norm_of

__all__ = ["fab", "project_onto_hyperplane"]

_LARGEST_BIAS = 0.1  # weight of the projection of the original input; the paper's alpha_max, eta and beta
_OVERSHOOT = 1.05
_BACKWARD = 0.9
_DROP_EVERY = 10


@check_types
def fab(
    logits_fn: LogitsFn,
    inputs: Tensor,
    targets: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    num_targets: int | None = 9,
    num_steps: int = 100,
    num_restarts: int = 1,
    bounds: Bounds = (0.0, 1.0),
    luminance_only: bool = False,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Find an adversarial example as near as possible; it counts where it lies within ``eps``.

    Each step replaces the network by its linearisation, projects the current point and the input exactly onto the
    boundary between two classes inside the box, goes a little beyond a mixture of both, and back toward the input once
    the prediction is wrong. It needs no step size and does not see the scale of the logits.

    A module is attacked in evaluation mode and left as it was; the caller's autocast is switched off.

    Args:
        logits_fn: from images to logits ``(N, C)``.
        inputs: images ``(N, ...)`` inside ``bounds``, floating-point.
        targets: true classes ``(N,)``, int64.
        eps: radius in the units of the inputs: a number or ``(N, 1, 1, 1)``.
        norm: ``"linf"`` or ``"l2"``.
        num_targets: the most likely wrong classes to try one after the other (FAB-T), at most ``C - 1``; None for the
            nearest of all boundaries at each step, which needs ``C - 1`` gradients.
        num_steps: at least 1, for each target class and restart.
        num_restarts: the first begins at the input, others at random points half as far as the best known example.
        bounds: lowest and highest valid value; None for none.
        luminance_only: change only the luminance of RGB images; see `PerturbationSet`.
        generator: of the random starts. Default: one seeded with 0.

    Returns:
        The attack's result; ``adversarial`` is the nearest example that was found, or the input where none was
        within ``eps``.

    Raises:
        ValueError: for an argument out of range, inputs outside of ``bounds``, or an ``eps`` that differs between
            channels.

    Example:
        >>> logits_fn = lambda x: torch.stack([x[:, 0], x[:, 1]], dim=1)
        >>> result = fab(logits_fn, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), eps=0.2)
        >>> result.adversarial.round(decimals=2)  # the nearest is at 0.05
        tensor([[0.5500, 0.5500]])

    Reference:
        F. Croce, M. Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020,
        algorithm 1, and "Reliable evaluation ...", ICML 2020, for the targeted version.
    """
    for name, value in {"num_steps": num_steps, "num_restarts": num_restarts, "num_targets": num_targets}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    with attacking(logits_fn, inputs, full_precision=True) as network:
        space = make_space(inputs, eps, norm, bounds, luminance_only)
        targets = check_targets("targets", targets, space.inputs)
        search = Search(network, space, targets)
        run_fab(search, private_generator(generator), num_steps, num_restarts, num_targets, stop_within=False)
        return search.result()


def project_onto_hyperplane(
    points: Tensor, normals: Tensor, gaps: Tensor, lower: Tensor, upper: Tensor, norm: Norm
) -> Tensor:
    r"""Return the smallest changes that bring points of a box onto hyperplanes, without leaving the box.

    .. math:: \min_d \lVert d \rVert_p \quad \text{so that} \quad \langle w, d \rangle = g,\ l \le x + d \le u

    An entry moves by ``min(t r, room)`` along its sign, at rate ``r = 1`` (``linf``) or ``|w|`` (``l2``) until it meets
    the box; the gain is piecewise linear in ``t``, so sorting the ``t`` at which entries stop gives the solution. Where
    the plane does not meet the box, the corner that comes nearest to it is returned.

    Args:
        points: ``(N, ...)`` inside the box.
        normals: ``w``, same shape.
        gaps: ``g`` of shape ``(N,)``, of either sign.
        lower: smallest allowed values, same shape.
        upper: largest allowed values, same shape.
        norm: ``"linf"`` or ``"l2"``.

    Returns:
        ``d``, same shape.

    Example:
        >>> zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
        >>> project_onto_hyperplane(torch.tensor([[0.5, 0.9]]), ones, torch.tensor([0.4]), zeros, ones, "linf")
        tensor([[0.3000, 0.1000]])
    """
    shape = points.shape
    w = (normals * per_row(gaps, normals).sign()).flatten(1)
    size, direction = w.abs(), w.sign()
    room = torch.where(w > 0, (upper - points).flatten(1), (points - lower).flatten(1)).clamp_min(0.0)
    room = torch.where(size > 0, room, torch.zeros_like(room))
    rate = torch.ones_like(size) if norm == "linf" else size
    stop = torch.where(size > 0, room / rate, torch.zeros_like(room))
    stop, order = stop.sort(dim=1)
    slope = (size * rate).gather(1, order)
    filled = (size * room).gather(1, order)
    # An unbounded entry never stops; its infinite filling must not enter the sums before it.
    filled = torch.where(filled.isfinite(), filled, torch.zeros_like(filled)).cumsum(1)
    remaining = slope.flip(1).cumsum(1).flip(1)
    before = torch.cat([torch.zeros_like(filled[:, :1]), filled[:, :-1]], dim=1)
    gap = gaps.abs().unsqueeze(1)
    time = (gap - before) / remaining.clamp_min(torch.finfo(slope.dtype).tiny)
    # The first interval whose own solution ends before its entry stops is the right one; none: every entry stops.
    inside = (time <= stop) & (remaining > 0)
    first = inside.int().argmax(dim=1, keepdim=True)
    solved = torch.where(inside.any(1, keepdim=True), time.gather(1, first), stop[:, -1:]).clamp_min(0.0)
    return (direction * torch.minimum(solved * rate, room)).reshape(shape)


def run_fab(
    search: Search,
    generator: torch.Generator,
    num_steps: int,
    num_restarts: int,
    num_targets: int | None,
    *,
    stop_within: bool,
) -> None:
    """Attack what is robust; with ``stop_within``, an image leaves once an example lies within its radius."""
    if search.space.per_channel:
        raise ValueError(
            "FAB needs one eps per image; normalise inside the network instead of scaling eps by channel, or use apgd()"
        )
    rows = search.rows()
    if not len(rows):
        return
    others = search.wrong_classes()
    columns: list[Tensor | None] = [None] if num_targets is None else list(others[:, :num_targets].unbind(1))
    distance = torch.full_like(search.clean_logits[:, 0], torch.inf, dtype=search.space.inputs.dtype)
    nearest, logits = search.coordinates.clone(), search.logits.clone()
    radius = _radius_of_rows(search.space)
    for restart in range(num_restarts):
        for column in columns:
            if stop_within:
                rows = rows[distance[rows] > radius[rows]]
            if not len(rows):
                break
            _run(search, rows, column, others, restart, num_steps, generator, distance, nearest, logits, stop_within)
    within = (distance <= radius).nonzero().flatten()
    search.found(within, nearest[within], logits[within])


def _run(
    search: Search,
    rows: Tensor,
    column: Tensor | None,
    others: Tensor,
    restart: int,
    num_steps: int,
    generator: torch.Generator,
    distance: Tensor,
    nearest: Tensor,
    logits: Tensor,
    stop_within: bool,
) -> None:
    """Attack rows toward one class of each, or the nearest one, and keep what is nearer than before."""
    space = search.space.rows(rows)
    radius = _radius_of_rows(space)
    now = space.origin
    if restart:
        noise = space.draw(generator, normal=space.norm == "l2")
        noise = noise if space.norm == "l2" else 2.0 * noise - 1.0
        length = torch.minimum(distance[rows], radius) / 2.0
        now = _into_box(space, now + per_row(length, now) * noise / norm_of(noise, space.norm).clamp_min(1e-30))
    for i in range(num_steps):
        if column is not None:
            loss = partial(difference_loss, targets=search.targets[rows], target_classes=column[rows])
            normals, ahead, _ = search.network.gradient(space, now, loss)
        else:
            normals, ahead = _nearest_boundary(search, space, now, rows, others[rows])
        ahead, origin = ahead.to(now.dtype), space.origin
        from_here = project_onto_hyperplane(now, normals, -ahead, space.box_lower, space.box_upper, space.norm)
        gap = -ahead - (normals * (origin - now)).flatten(1).sum(1)
        from_origin = project_onto_hyperplane(origin, normals, gap, space.box_lower, space.box_upper, space.norm)
        here, there = norm_of(from_here, space.norm), norm_of(from_origin, space.norm)
        bias = (here / (here + there).clamp_min(1e-30)).clamp(0.0, _LARGEST_BIAS)
        now = (now + _OVERSHOOT * from_here) * (1.0 - bias) + (origin + _OVERSHOOT * from_origin) * bias
        now = _into_box(space, now)
        found = search.network.logits(space.image(now))
        fell = wrong(found, search.targets[rows])
        length = space.distance(now)
        closer = fell & (length < distance[rows])
        distance[rows] = torch.where(closer, length, distance[rows])
        nearest[rows] = torch.where(per_row(closer, now), now, nearest[rows])
        logits[rows] = torch.where(closer.unsqueeze(1), found, logits[rows])
        now = torch.where(per_row(fell, now), origin + _BACKWARD * (now - origin), now)
        if stop_within and i % _DROP_EVERY == 0:
            keep = distance[rows] > radius
            if not bool(keep.any()):
                return
            if not bool(keep.all()):
                rows, space, now, radius = rows[keep], space.rows(keep), now[keep], radius[keep]


def _nearest_boundary(
    search: Search, space: PerturbationSet, now: Tensor, rows: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """Return gradient and value of ``o_k - o_y`` for the class whose linearised boundary is nearest."""
    images = space.image(now).detach().requires_grad_()
    logits = search.network.forward(images)
    best = best_normals = best_ahead = None
    for k, classes in enumerate(others.unbind(1)):
        ahead = difference_loss(logits, search.targets[rows], classes)
        last = k == others.shape[1] - 1
        normals = search.network.input_gradient(space, ahead.sum(), images, keep=not last)
        dims = tuple(range(1, normals.ndim))
        dual = torch.linalg.vector_norm(normals, 1 if space.norm == "linf" else 2, dim=dims)
        away = ahead.detach().abs() / dual.clamp_min(1e-30)
        if best is None or best_normals is None or best_ahead is None:
            best, best_normals, best_ahead = away, normals, ahead.detach()
        else:
            nearer = away < best
            best = torch.where(nearer, away, best)
            best_normals = torch.where(per_row(nearer, normals), normals, best_normals)
            best_ahead = torch.where(nearer, ahead.detach(), best_ahead)
    if best_normals is None or best_ahead is None:
        raise ValueError("FAB needs at least two classes")
    return best_normals, best_ahead


def _into_box(space: PerturbationSet, coordinates: Tensor) -> Tensor:
    return torch.clamp(coordinates, space.box_lower, space.box_upper)


def _radius_of_rows(space: PerturbationSet) -> Tensor:
    """Return the radius of each image ``(N,)`` in coordinates."""
    radius = space.radius
    if isinstance(radius, Tensor):
        return radius.flatten().expand(len(space))
    return torch.full((len(space),), radius, dtype=space.inputs.dtype, device=space.inputs.device)
