"""Auto-PGD: projected gradient ascent with momentum that halves its own steps."""

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
    cross_entropy_loss,
    difference_loss,
    dlr_loss,
    targeted_dlr_loss,
)
from lightning_plugins.robustness.perturbation import Bounds, Norm, PerturbationSet

__all__ = ["apgd", "apgd_checkpoints"]

ApgdLoss = Literal["ce", "dlr", "dlr_targeted", "margin_targeted"]
_TARGETED = {"dlr_targeted": targeted_dlr_loss, "margin_targeted": difference_loss}
NEEDED_CLASSES = {"dlr": 3, "dlr_targeted": 4}
_MOMENTUM = 0.75
_ENOUGH_INCREASES = 0.75

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits and the rows of the batch that they belong to, to losses."""


@check_types
def apgd(
    logits_fn: LogitsFn,
    inputs: Tensor,
    targets: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    loss: ApgdLoss = "ce",
    num_steps: int = 100,
    num_restarts: int = 1,
    num_targets: int = 9,
    num_samples: int = 1,
    bounds: Bounds = (0.0, 1.0),
    luminance_only: bool = False,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Attack without a step size to choose: it starts at ``2 eps`` and is halved where the loss has stopped to rise.

    At the checkpoints of :func:`apgd_checkpoints` an image whose loss rose in at most 75 % of the steps since the last
    one, or that has found no better point since, goes back to its best point with half the step. Only images that are
    still classified correctly are attacked, and those that fall leave the batch at the next checkpoint. An image for
    which nothing was found is returned unchanged.

    A module is attacked in evaluation mode and left as it was. The caller's autocast is switched off: an evaluation
    that loses gradients to rounding overstates robustness. To attack in low precision, enter autocast inside
    ``logits_fn``.

    Args:
        logits_fn: from images to logits ``(N, C)``.
        inputs: images ``(N, ...)`` inside ``bounds``, floating-point.
        targets: true classes ``(N,)``, int64.
        eps: radius in the units of the inputs; shapes as in `pgd`.
        norm: ``"linf"`` or ``"l2"``.
        loss: ``"ce"``, ``"dlr"`` (at least 3 classes), ``"dlr_targeted"`` (at least 4; APGD-T), or
            ``"margin_targeted"`` (``o_t - o_y``; for 2 or 3 classes).
        num_steps: at least 1; a run computes one gradient more.
        num_restarts: runs from different random points, for each target class if there are any.
        num_targets: for a targeted loss: the most likely wrong classes to try, at most ``C - 1``.
        num_samples: passes averaged at each point, for networks that are random themselves (EOT).
        bounds: lowest and highest valid value; None for none.
        luminance_only: change only the luminance of RGB images; see `PerturbationSet`.
        generator: of the random starts. Default: one seeded with 0.

    Returns:
        The attack's result; ``adversarial`` is the input where ``success`` is False.

    Raises:
        ValueError: for an argument out of range, inputs outside of ``bounds``, or too few classes for the loss.

    Example:
        >>> logits_fn = lambda x: torch.stack([x[:, 0], x[:, 1], -x.sum(1)], dim=1)
        >>> apgd(logits_fn, torch.tensor([[0.6, 0.5]]), torch.tensor([0]), eps=0.1, loss="dlr").success
        tensor([True])

    Reference:
        F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", ICML 2020, algorithm 1. The released code compares the first loss of a run with an empty entry of its
        history; here it is compared with the loss at the start.
    """
    for name, value in {
        "num_steps": num_steps,
        "num_restarts": num_restarts,
        "num_targets": num_targets,
        "num_samples": num_samples,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    if loss not in ("ce", "dlr", *_TARGETED):
        raise ValueError(f'loss must be "ce", "dlr", "dlr_targeted" or "margin_targeted", got {loss!r}')
    with attacking(logits_fn, inputs, full_precision=True) as network:
        space = make_space(inputs, eps, norm, bounds, luminance_only)
        targets = check_targets("targets", targets, space.inputs)
        search = Search(network, space, targets, num_samples)
        needed, classes = NEEDED_CLASSES.get(loss, 2), search.clean_logits.shape[1]
        if classes < needed:
            raise ValueError(
                f'loss={loss!r} needs at least {needed} classes, found {classes}; use "ce" or "margin_targeted"'
            )
        run_apgd(search, private_generator(generator), loss, num_steps, num_restarts, num_targets)
        return search.result()


def apgd_checkpoints(num_steps: int) -> tuple[int, ...]:
    """Return the numbers of steps after which step sizes are reviewed: dense toward the end.

    Args:
        num_steps: of the whole run, at least 1.

    Example:
        >>> apgd_checkpoints(100)
        (22, 41, 57, 70, 80, 87, 93, 99)
    """
    length = max(int(0.22 * num_steps), 1)
    shortest, decrement = max(int(0.06 * num_steps), 1), max(int(0.03 * num_steps), 1)
    checkpoints = []
    step = length
    while step <= num_steps:
        checkpoints.append(step)
        length = max(length - decrement, shortest)
        step += length
    return tuple(checkpoints)


class Search:
    """The images of a batch that are still classified correctly, and what was found for the others.

    Attributes:
        network: that is attacked.
        space: of the whole batch.
        targets: true classes of the whole batch.
        clean_logits: of the inputs.
        coordinates: the adversarial ones where found, else the origin.
        logits: at ``coordinates``.
        robust: ``(N,)`` booleans.
    """

    def __init__(
        self,
        network: Network,
        space: PerturbationSet,
        targets: Tensor,
        num_samples: int = 1,
        clean_logits: Tensor | None = None,
    ) -> None:
        self.network, self.space, self.targets, self.num_samples = network, space, targets, num_samples
        images = space.image(space.origin)
        if clean_logits is None:
            clean_logits = network.logits(images)
            for _ in range(num_samples - 1):
                clean_logits = clean_logits + network.logits(images)
            clean_logits = clean_logits / num_samples
        check_classes("targets", targets, clean_logits)
        self.clean_logits = clean_logits
        self.coordinates, self.logits = space.origin.clone(), clean_logits.clone()
        self.robust = ~wrong(clean_logits, targets)

    def rows(self) -> Tensor:
        """Return the numbers of the images that are still robust."""
        return self.robust.nonzero().flatten()

    def found(self, rows: Tensor, coordinates: Tensor, logits: Tensor) -> None:
        """Keep adversarial coordinates of these rows."""
        self.coordinates[rows] = coordinates
        self.logits[rows] = logits
        self.robust[rows] = False

    def wrong_classes(self) -> Tensor:
        """Return the wrong classes of each image ``(N, C - 1)``, the most likely on the clean image first."""
        order = self.clean_logits.argsort(dim=1, descending=True, stable=True)
        return order[order != self.targets.unsqueeze(1)].reshape(len(order), order.shape[1] - 1)

    def gradient(
        self, space: PerturbationSet, coordinates: Tensor, loss: Callable[[Tensor], Tensor], targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients, losses and logits, averaged over the samples of a random network."""
        totals = self.network.gradient(space, coordinates, loss, targets)
        for _ in range(self.num_samples - 1):
            more = self.network.gradient(space, coordinates, loss, targets)
            totals = (totals[0] + more[0], totals[1] + more[1], totals[2] + more[2])
        if self.num_samples > 1:
            totals = (totals[0] / self.num_samples, totals[1] / self.num_samples, totals[2] / self.num_samples)
        return totals

    def result(self) -> AttackResult:
        """Return what was found for the whole batch."""
        return self.network.result(self.space.image(self.coordinates), self.logits, self.targets)


def run_apgd(
    search: Search, generator: torch.Generator, loss: str, num_steps: int, num_restarts: int, num_targets: int
) -> None:
    """Attack what is robust, with each restart and target class in turn."""
    if loss in _TARGETED:
        classes = search.wrong_classes()[:, :num_targets]
        toward = _TARGETED[loss]
        losses: list[Loss] = [
            lambda logits, rows, t=column: toward(logits, search.targets[rows], t[rows])  # type: ignore[misc]
            for column in classes.unbind(1)
        ]
    else:
        plain = cross_entropy_loss if loss == "ce" else dlr_loss
        losses = [lambda logits, rows: plain(logits, search.targets[rows])]
    for row_loss in losses:
        for _ in range(num_restarts):
            if len(rows := search.rows()):
                _run(search, rows, row_loss, num_steps, generator)


def _run(search: Search, rows: Tensor, loss: Loss, num_steps: int, generator: torch.Generator) -> None:
    """Attack some rows from one random start."""
    space, targets = search.space.rows(rows), search.targets[rows]
    if space.norm == "linf":
        now = space.boundary(2.0 * space.draw(generator) - 1.0)
    else:
        now = space.boundary(space.draw(generator, normal=True))
    gradient, value, logits = search.gradient(space, now, lambda o: loss(o, rows), targets)
    broken = wrong(logits, targets)
    hit, hit_logits = now.clone(), logits
    best, best_gradient, best_value = now, gradient, value
    old, previous_value = now, value
    checked_value, reduced = value, torch.ones_like(broken)
    increases = torch.zeros_like(value)
    step = per_row(torch.ones_like(value, dtype=now.dtype), now)  # in units of 2 eps
    checkpoints = apgd_checkpoints(num_steps)
    last_checkpoint = 0
    for i in range(1, num_steps + 1):
        momentum = _MOMENTUM if i > 1 else 1.0
        change, old = now - old, now
        target = space.project(space.ascend(now, gradient, 2.0 * space.radius * space.unit * step))
        now = space.project(now + momentum * (target - now) + (1.0 - momentum) * change)
        gradient, value, logits = search.gradient(space, now, lambda o: loss(o, rows), targets)  # noqa: B023
        fell = wrong(logits, targets)
        hit = torch.where(per_row(fell, now), now, hit)
        hit_logits = torch.where(fell.unsqueeze(1), logits, hit_logits)
        broken = broken | fell
        better = value > best_value
        best = torch.where(per_row(better, now), now, best)
        best_gradient = torch.where(per_row(better, now), gradient, best_gradient)
        best_value = torch.where(better, value, best_value)
        increases += value > previous_value
        previous_value = value
        if i not in checkpoints:
            continue
        stalled = ~reduced & (checked_value >= best_value)
        reduced = (increases <= _ENOUGH_INCREASES * (i - last_checkpoint)) | stalled
        checked_value, last_checkpoint = best_value, i
        increases = torch.zeros_like(increases)
        step = torch.where(per_row(reduced, step), step / 2.0, step)
        now = torch.where(per_row(reduced, now), best, now)
        gradient = torch.where(per_row(reduced, now), best_gradient, gradient)
        if bool(broken.any()):
            search.found(rows[broken], hit[broken], hit_logits[broken])
            keep = ~broken
            if not bool(keep.any()):
                return
            rows, targets, space = rows[keep], targets[keep], space.rows(keep)
            now, old, gradient, best, best_gradient, best_value, previous_value, checked_value = (
                state[keep]
                for state in (now, old, gradient, best, best_gradient, best_value, previous_value, checked_value)
            )
            reduced, increases, step, hit, hit_logits, broken = (
                state[keep] for state in (reduced, increases, step, hit, hit_logits, broken)
            )
    if bool(broken.any()):
        search.found(rows[broken], hit[broken], hit_logits[broken])
