"""One-step and iterated gradient attacks with fixed step size: FGSM, FGSM-RS, PGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.checks import check_types
from lightning_plugins.robustness.attack import (
    AttackResult,
    LogitsFn,
    Network,
    attacking,
    check_classes,
    check_targets,
    make_space,
    per_row,
    private_generator,
    wrong,
)
from lightning_plugins.robustness.attack_losses import (
    RowLoss,
    cross_entropy_loss,
    difference_loss,
    dlr_loss,
    kl_loss,
    margin_loss,
    targeted_dlr_loss,
)
from lightning_plugins.robustness.perturbation import Bounds, Norm, PerturbationSet, check_length

__all__ = ["fgsm", "fgsm_rs", "pgd"]

LossName = Literal["ce", "cw", "dlr", "kl"]
_UNTARGETED: dict[str, RowLoss] = {"ce": cross_entropy_loss, "cw": margin_loss, "dlr": dlr_loss}
_GAUSSIAN_START = 1e-3


@check_types
def fgsm(
    logits_fn: LogitsFn,
    inputs: Tensor,
    targets: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    loss: LossName | RowLoss = "ce",
    target_classes: Tensor | None = None,
    bounds: Bounds = (0.0, 1.0),
    luminance_only: bool = False,
) -> AttackResult:
    """Move each input once by ``eps`` in the direction that raises the loss fastest.

    The arguments are those of :func:`pgd`.

    Returns:
        The attack's result.

    Raises:
        ValueError: as :func:`pgd`.

    Example:
        >>> logits_fn = lambda x: torch.stack([x[:, 0], x[:, 1]], dim=1)
        >>> fgsm(logits_fn, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), eps=0.1).adversarial
        tensor([[0.5000, 0.6000]])

    Reference:
        I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
    """
    return pgd(
        logits_fn,
        inputs,
        targets,
        eps=eps,
        step_size=eps,
        num_steps=1,
        norm=norm,
        loss=loss,
        target_classes=target_classes,
        random_start=False,
        bounds=bounds,
        luminance_only=luminance_only,
    )


@check_types
def fgsm_rs(
    logits_fn: LogitsFn,
    inputs: Tensor,
    targets: Tensor,
    *,
    eps: float | Tensor,
    step_size: float | Tensor | None = None,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    luminance_only: bool = False,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Take one step from a random point of the ball: the attack of fast adversarial training.

    The arguments are those of :func:`pgd`.

    Args:
        logits_fn: the network.
        inputs: images.
        targets: true classes.
        eps: radius.
        step_size: default ``1.25 * eps``, the paper's 10/255 for 8/255.
        norm: of the radius.
        bounds: of valid values.
        luminance_only: change Y alone.
        generator: of the start.

    Raises:
        ValueError: as :func:`pgd`.

    Example:
        >>> logits_fn = lambda x: torch.stack([x[:, 0], x[:, 1]], dim=1)
        >>> fgsm_rs(logits_fn, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), eps=0.1).success
        tensor([True])

    Reference:
        E. Wong, L. Rice, J. Z. Kolter, "Fast is better than free", ICLR 2020, algorithm 3.
    """
    return pgd(
        logits_fn,
        inputs,
        targets,
        eps=eps,
        step_size=1.25 * eps if step_size is None else step_size,
        num_steps=1,
        norm=norm,
        bounds=bounds,
        luminance_only=luminance_only,
        generator=generator,
    )


@check_types
def pgd(
    logits_fn: LogitsFn,
    inputs: Tensor,
    targets: Tensor,
    *,
    eps: float | Tensor,
    step_size: float | Tensor,
    num_steps: int,
    norm: Norm = "linf",
    loss: LossName | RowLoss = "ce",
    target_classes: Tensor | None = None,
    reference_logits: Tensor | None = None,
    random_start: bool = True,
    start: Literal["uniform", "gaussian"] = "uniform",
    num_restarts: int = 1,
    batched_restarts: bool = False,
    bounds: Bounds = (0.0, 1.0),
    luminance_only: bool = False,
    generator: torch.Generator | None = None,
) -> AttackResult:
    r"""Climb the loss by projected steps of fixed length inside the ball around each input.

    .. math:: x_{k+1} = P\left(x_k + \alpha \, \mathrm{sign} \nabla_x L(f(x_k), y)\right)

    with the gradient's direction of length 1 in place of its sign in ``l2``. It costs ``num_steps`` input gradients and
    one forward pass for the final logits per restart. It runs under the caller's autocast; images and steps stay in
    float32, and in float16 the loss is multiplied by 2**14, without which most gradients of a confident network vanish.

    A module is attacked in evaluation mode and given back as it was: modes, ``requires_grad``, ``.grad`` and buffers.
    To attack in another mode, pass a function that calls the module. Gradients work inside ``no_grad`` and
    ``inference_mode``.

    Args:
        logits_fn: from images to logits ``(N, C)``: a module, or a function that leaves normalisation to itself.
        inputs: images ``(N, ...)`` inside ``bounds``, floating-point.
        targets: true classes ``(N,)``, int64.
        eps: radius in the units of the inputs, at least 0: a number, ``(N, 1, 1, 1)``, or in ``linf`` also
            ``(1, C, 1, 1)``.
        step_size: length of a step, same units and shapes.
        num_steps: at least 1.
        norm: ``"linf"`` or ``"l2"``.
        loss: ``"ce"`` (cross-entropy), ``"cw"`` (margin between the best wrong and the true logit), ``"dlr"`` (that
            margin relative to the spread of the logits), ``"kl"`` (divergence from the clean prediction, as TRADES
            trains with), or a function of logits and targets that returns a loss for each row.
        target_classes: classes to move toward ``(N,)``, int64; ``"cw"`` then is ``o_t - o_y``. ``success`` still means
            that the prediction is wrong.
        reference_logits: clean logits ``(N, C)`` for ``"kl"``. Default: one forward pass computes them.
        random_start: begin at a random point, else at the inputs.
        start: ``"uniform"`` over the ball (``linf``: over the cube; ``l2``: over the volume), or ``"gaussian"``: 1e-3
            times normal noise, TRADES' start.
        num_restarts: attacks from different starts; each image keeps an example that is misclassified, and among
            those the one of highest loss.
        batched_restarts: run all restarts in one batch: faster for small images on a GPU, and equal up to rounding.
        bounds: lowest and highest valid value, numbers or ``(1, C, 1, 1)``; None for none.
        luminance_only: change only the luminance Y of RGB images; see `PerturbationSet`.
        generator: of the starts. Default: one seeded with 0, so that equal calls give equal results; pass your own in
            training. The global generator is never used.

    Returns:
        The last iterates, or the best of the restarts.

    Raises:
        ValueError: for an argument out of range, images outside of ``bounds``, integer or non-finite images, labels
            outside ``[0, C)``, ``"kl"`` without a random start (its gradient there is exactly zero), or more than one
            restart without one.

    Warns:
        UserWarning: if more than 1 % of the gradients were exactly zero.

    Example:
        >>> logits_fn = lambda x: torch.stack([x[:, 0], x[:, 1]], dim=1)
        >>> result = pgd(logits_fn, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), eps=0.1, step_size=0.04, num_steps=5)
        >>> result.adversarial, result.success, result.num_gradients, result.num_forwards
        (tensor([[0.5000, 0.6000]]), tensor([True]), 5, 6)

    Reference:
        A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, section 2.1.
    """
    _check_arguments(num_steps, loss, target_classes, random_start, start, num_restarts)
    with attacking(logits_fn, inputs) as network:
        space = make_space(inputs, eps, norm, bounds, luminance_only)
        check_length("step_size", step_size, space.inputs)
        targets = check_targets("targets", targets, space.inputs)
        if target_classes is not None:
            target_classes = check_targets("target_classes", target_classes, space.inputs)
        if not len(space):
            images = space.image(space.origin).clone()
            return network.result(images, network.logits(images), targets)
        if loss == "kl" and reference_logits is None:
            reference_logits = network.logits(space.image(space.origin))
        row_loss = _make_loss(loss, targets, target_classes, reference_logits)
        noise = private_generator(generator)
        starts = [_start(space, random_start, start, noise) for _ in range(num_restarts)]
        if not batched_restarts:
            candidates = [_climb(network, space, first, step_size, num_steps, row_loss, targets) for first in starts]
        else:
            candidates = _climb_together(
                network, space, starts, step_size, num_steps, loss, targets, target_classes, reference_logits
            )
        best, logits = candidates[0]
        for coordinates, found in candidates[1:]:
            broken, was_broken = wrong(found, targets), wrong(logits, targets)
            better = torch.where(broken == was_broken, row_loss(found) >= row_loss(logits), broken)
            best = torch.where(per_row(better, best), coordinates, best)
            logits = torch.where(better.unsqueeze(1), found, logits)
        return network.result(space.image(best), logits, targets)


def _check_arguments(
    num_steps: int,
    loss: LossName | RowLoss,
    target_classes: Tensor | None,
    random_start: bool,
    start: str,
    num_restarts: int,
) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps!r}")
    if num_restarts < 1:
        raise ValueError(f"num_restarts must be at least 1, got {num_restarts!r}")
    if num_restarts > 1 and not random_start:
        raise ValueError(f"{num_restarts} restarts from the same point are one; use random_start=True")
    if start not in ("uniform", "gaussian"):
        raise ValueError(f'start must be "uniform" or "gaussian", got {start!r}')
    if not callable(loss) and loss not in (*_UNTARGETED, "kl"):
        raise ValueError(f'loss must be "ce", "cw", "dlr", "kl" or a function, got {loss!r}')
    if loss == "kl" and not random_start:
        raise ValueError('loss="kl" has a gradient of exactly zero at the inputs; use random_start=True')
    if target_classes is not None and (callable(loss) or loss == "kl"):
        raise ValueError('target_classes work with loss="ce", "cw" and "dlr"; a function can hold its own')


def _make_loss(
    loss: LossName | RowLoss, targets: Tensor, target_classes: Tensor | None, reference_logits: Tensor | None
) -> Callable[[Tensor], Tensor]:
    checked = False

    def of_logits(logits: Tensor) -> Tensor:
        nonlocal checked
        if not checked:  # before an index out of range stops a GPU
            check_classes("targets", targets, logits)
            if target_classes is not None:
                check_classes("target_classes", target_classes, logits)
            checked = True
        if callable(loss):
            return loss(logits, targets)
        if loss == "kl":
            assert reference_logits is not None
            return kl_loss(logits, reference_logits)
        if target_classes is None:
            return _UNTARGETED[loss](logits, targets)
        if loss == "ce":
            return -cross_entropy_loss(logits, target_classes)
        return (difference_loss if loss == "cw" else targeted_dlr_loss)(logits, targets, target_classes)

    return of_logits


def _start(space: PerturbationSet, random_start: bool, start: str, generator: torch.Generator) -> Tensor:
    if not random_start:
        return space.project(space.origin)
    if start == "gaussian":
        return space.project(space.origin + _GAUSSIAN_START * space.draw(generator, normal=True))
    if space.norm == "linf":
        return space.project(space.origin + space.radius * (2.0 * space.draw(generator) - 1.0))
    normal = space.draw(generator, normal=True)
    uniform = torch.rand(len(space), generator=generator, device=generator.device, dtype=normal.dtype).to(normal.device)
    return space.boundary(normal, per_row(uniform ** (1.0 / normal[0].numel()), normal))


def _climb(
    network: Network,
    space: PerturbationSet,
    coordinates: Tensor,
    step_size: float | Tensor,
    num_steps: int,
    loss: Callable[[Tensor], Tensor],
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the last iterates and their logits."""
    if isinstance(step_size, Tensor):
        step_size = step_size.to(space.inputs)
    for _ in range(num_steps):
        gradient, _, _ = network.gradient(space, coordinates, loss, targets)
        coordinates = space.project(space.ascend(coordinates, gradient, step_size))
    return coordinates, network.logits(space.image(coordinates))


def _climb_together(
    network: Network,
    space: PerturbationSet,
    starts: list[Tensor],
    step_size: float | Tensor,
    num_steps: int,
    loss: LossName | RowLoss,
    targets: Tensor,
    target_classes: Tensor | None,
    reference_logits: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Run all starts as one batch."""
    times, size = len(starts), len(space)

    def copies(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat(times, *[1] * (tensor.ndim - 1))

    if isinstance(step_size, Tensor) and step_size.ndim and len(step_size) == size:
        step_size = step_size.repeat(times, *[1] * (step_size.ndim - 1))
    many = targets.repeat(times)
    row_loss = _make_loss(loss, many, copies(target_classes), copies(reference_logits))
    last, logits = _climb(network, space.repeat(times), torch.cat(starts), step_size, num_steps, row_loss, many)
    return list(zip(torch.split(last, size), torch.split(logits, size), strict=True))
