"""Fresh networks, trained by a protocol on a few images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.augmentation import SiameseAugmentation, augment_together
from lightning_plugins.distillation.extractors import NetFactory, untrained_net
from lightning_plugins.distillation.generators import PrivateGenerator
from lightning_plugins.distillation.protocol import Protocol, protocol_named
from lightning_plugins.gradients import grad_context
from lightning_plugins.losses import check_range
from lightning_plugins.mixing import cutmix

__all__ = ["TrainedNets", "train_nets"]


@dataclass(frozen=True)
class TrainedNets:
    """Networks of one architecture, with their weights side by side.

    Attributes:
        net: the architecture, in evaluation mode; its own weights mean nothing.
        state: parameters and buffers by name, with one row for each network.
    """

    net: nn.Module
    state: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.state.values())))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits ``(J, N, C)`` of all networks for normalised images ``(N, channels, H, W)``."""
        rows = [{name: value[index] for name, value in self.state.items()} for index in range(len(self))]
        return torch.stack([functional_call(self.net, row, (images,)).float() for row in rows])

    def counts(self, images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Return how many images of each class each network gets right, and how many there are, ``(J + 1, C)``."""
        right = (self.logits(images).argmax(-1) == labels).long()
        rows = torch.cat([right, torch.ones_like(right[:1])])
        found = torch.zeros(len(rows), num_classes, dtype=torch.int64, device=labels.device)
        return found.index_add_(1, labels, rows)


@check_types
def train_nets(
    factory: NetFactory,
    images: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    protocol: Protocol | str = "house",
    seeds: Sequence[int] = (0, 1, 2),
    joint: bool | None = None,
) -> TrainedNets:
    """Train fresh networks on a few images; what one becomes depends on its seed, not on the others.

    Args:
        factory: makes a network.
        images: normalised, decoded.
        targets: classes, or probabilities.
        num_classes: C.
        protocol: or its name.
        seeds: one for each network.
        joint: True trains all at once by ``vmap``, which saves launches on an accelerator; False one after the other,
            which is faster on a CPU; the results agree up to rounding. None chooses, and never trains networks with
            buffers (batch normalisation) jointly.

    Shape:
        - images: ``(N, channels, H, W)``
        - targets: ``(N,)`` int64 or ``(N, C)``

    Raises:
        ValueError: for wrong arguments, or ``joint=True`` with a network that has buffers.
        RuntimeError: if training diverged.

    Example:
        >>> factory = lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> images, labels = torch.rand(8, 1, 4, 4), torch.arange(2).repeat(4)
        >>> protocol = Protocol(steps=5, operations=())
        >>> nets = train_nets(factory, images, labels, num_classes=2, protocol=protocol, seeds=(0, 1))
        >>> nets.logits(images).shape
        torch.Size([2, 8, 2])
    """
    protocol = protocol_named(protocol)
    if not seeds or len(images) != len(targets) or not len(images):
        raise ValueError(
            f"one seed or more and as many targets as images were expected, got {len(seeds)} seeds, {len(images)} "
            f"images and {len(targets)} targets"
        )
    if targets.is_floating_point() and targets.ndim == 2:
        if targets.shape[1] != num_classes:
            raise ValueError(f"soft targets must be (N, {num_classes}), got {tuple(targets.shape)}")
    elif targets.ndim != 1 or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 classes (N,) or probabilities (N, C), got {tuple(targets.shape)} of {targets.dtype}"
        )
    else:
        check_range(targets, num_classes)
    device = images.device
    probe = untrained_net(factory, seed=seeds[0], device=device)
    buffered = any(True for _ in probe.buffers())
    if joint and buffered:
        raise ValueError(f"{type(probe).__name__} has buffers, which joint training would mix up; set joint=False")
    joint = (device.type != "cpu" and not buffered) if joint is None else joint
    groups = [list(seeds)] if joint else [[seed] for seed in seeds]
    with grad_context():
        images, targets = images.detach().clone(), targets.detach().clone()
        parts = [_train_group(factory, images, targets, num_classes, protocol, group) for group in groups]
    state = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise RuntimeError("a network diverged while it was trained on the set; lower the protocol's learning_rate")
    return TrainedNets(probe.eval().requires_grad_(False), state)


def net_seeds(seed: int, numbers: Iterable[int]) -> list[int]:
    """Return the seeds of the networks with these numbers, so far apart that evaluations with near seeds share none."""
    return [seed + 7919 * number for number in numbers]


def _train_group(
    factory: NetFactory, images: Tensor, targets: Tensor, num_classes: int, protocol: Protocol, seeds: list[int]
) -> dict[str, Tensor]:
    nets = [untrained_net(factory, seed=seed, device=images.device).train() for seed in seeds]
    batches = [_Batches(len(images), protocol, seed) for seed in seeds]
    operations: Any = tuple(name for name in protocol.operations if not (protocol.cutmix and name == "cutout"))
    augmentations = [SiameseAugmentation(operations, variant=protocol.variant, seed=seed) for seed in seeds]
    augmentations = augmentations if operations else []
    step_of: Callable[[Tensor, Tensor], None]
    if len(nets) == 1:
        net = nets[0]
        parameters = list(net.parameters())

        def one(x: Tensor, y: Tensor) -> None:
            loss = F.cross_entropy(net(x[0]), y[0])
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient

        step_of = one
    else:
        net = nets[0]
        stacked, _ = stack_module_state(nets)
        stacked = {name: value.detach().requires_grad_() for name, value in stacked.items()}
        parameters = list(stacked.values())

        def loss_of(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(net, weights, (x,)), y)

        def all_at_once(x: Tensor, y: Tensor) -> None:
            with torch.no_grad():
                gradients = vmap(grad(loss_of))(dict(stacked), x, y)
            for name, value in stacked.items():
                value.grad = gradients[name].detach()

        step_of = all_at_once

    total = protocol.num_steps(len(images))
    falls = [math.ceil(share * total) for share in protocol.milestones]
    optimizer = _optimizer(parameters, protocol)
    rate = protocol.learning_rate
    for step in range(total):
        if protocol.schedule == "cosine":
            rate = protocol.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
        elif step in falls:
            rate *= protocol.factor ** falls.count(step)
            if protocol.new_optimizer:
                optimizer = _optimizer(parameters, protocol)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.stack([batch.next() for batch in batches]).to(images.device)
        x, y = images[rows], targets[rows]
        if augmentations:
            x = augment_together(x, augmentations)
        if protocol.cutmix:
            parts = zip(batches, x, y, strict=True)
            mixed = [batch.mixed(own, targets_of, num_classes) for batch, own, targets_of in parts]
            x, y = (torch.stack(column) for column in zip(*mixed, strict=True))
        step_of(x, y)
        optimizer.step()
    if len(nets) > 1:
        return {name: value.detach() for name, value in stacked.items()}
    return {name: value.detach()[None].clone() for name, value in net.state_dict().items()}


class _Batches:
    """The batches of one network, whose order and mixing depend on its seed alone; a small set is one batch."""

    def __init__(self, count: int, protocol: Protocol, seed: int) -> None:
        self.count, self.size, self.share = count, protocol.batch_size, protocol.cutmix
        self.order = PrivateGenerator(seed, "order").on("cpu")
        self.mixing = PrivateGenerator(seed, "mixing").on("cpu")
        self.rest: list[Tensor] = []

    def next(self) -> Tensor:
        """Return the rows of the next batch of a shuffled epoch."""
        if not self.rest:
            self.rest = list(torch.split(torch.randperm(self.count, generator=self.order), self.size))[::-1]
        return self.rest.pop()

    def mixed(self, images: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Return images and probabilities, mixed in a share of the batches."""
        if float(torch.rand((), generator=self.mixing)) < self.share:
            return cutmix(images, targets, num_classes=num_classes, generator=self.mixing)
        soft = targets if targets.is_floating_point() else F.one_hot(targets, num_classes).to(images.dtype)
        return images, soft


def _optimizer(parameters: list[Any], protocol: Protocol) -> torch.optim.Optimizer:
    if protocol.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=protocol.learning_rate, weight_decay=protocol.weight_decay)
    return torch.optim.SGD(
        parameters, lr=protocol.learning_rate, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
