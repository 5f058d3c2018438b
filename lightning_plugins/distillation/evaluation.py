"""How well networks classify real images after training on a synthetic set alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.augmentation import AugmentationVariant, SiameseAugmentation, augment_together
from lightning_plugins.distillation.extractors import NetFactory, untrained_net
from lightning_plugins.distillation.generators import PrivateGenerator
from lightning_plugins.distillation.pool import ClassPool
from lightning_plugins.distillation.synthetic_set import SyntheticSet
from lightning_plugins.gradients import grad_context
from lightning_plugins.losses import check_range
from lightning_plugins.mixing import cutmix

__all__ = [
    "PROTOCOLS",
    "NetAccuracies",
    "Protocol",
    "ProtocolName",
    "SetEvaluation",
    "TrainedNets",
    "augmentation_robust_score",
    "evaluate_set",
    "hard_label_recovery",
    "improvement_over_random",
    "label_robust_score",
    "protocol_named",
    "train_nets",
]

ProtocolName = Literal["house", "vico", "idc", "ncfm"]


@check_types
@dataclass(frozen=True)
class Protocol:
    """How networks are trained on a set; accuracy is always that of the last epoch.

    Attributes:
        name: shown beside results.
        epochs: passes over the decoded set; None where ``steps`` counts.
        steps: optimizer steps; None where ``epochs`` counts.
        batch_size: decoded images in a step.
        optimizer: ``"sgd"`` or ``"adamw"``.
        learning_rate: at the start.
        momentum: of SGD.
        weight_decay: of the optimizer.
        schedule: ``"cosine"`` down to 0, or ``"milestones"``.
        milestones: shares of the run at which the learning rate falls.
        factor: by which it falls.
        new_optimizer: whether the momentum starts anew at a milestone.
        operations: of :class:`.SiameseAugmentation`, drawn for each image; empty for none.
        variant: of the augmentation.
        cutmix: probability that a batch is mixed; cutout is left out of the operations then.
        same_compute: divide the epochs by the number of images that a stored one decodes to (rho squared), so that sets
            of the same memory are trained on for the same number of steps; IDC's option of that name.
    """

    name: str = "own"
    epochs: int | None = None
    steps: int | None = 4000
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "milestones"] = "cosine"
    milestones: tuple[float, ...] = ()
    factor: float = 1.0
    new_optimizer: bool = False
    operations: tuple[str, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")
    variant: AugmentationVariant = "idc"
    cutmix: float = 0.0
    same_compute: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give either epochs or steps, got epochs={self.epochs!r}, steps={self.steps!r}")
        length = self.epochs if self.steps is None else self.steps
        if length is None or length < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"epochs or steps and batch_size must be at least 1 and learning_rate above 0, got {length!r}, "
                f"{self.batch_size!r} and {self.learning_rate!r}"
            )
        if not 0 <= self.cutmix <= 1:
            raise ValueError(f"cutmix must lie in [0, 1], got {self.cutmix!r}")
        if self.same_compute and self.epochs is None:
            raise ValueError(
                "same_compute divides epochs, and this protocol counts steps; give epochs, or leave it out"
            )

    def num_steps(self, num_images: int) -> int:
        """Return the optimizer steps for a set that decodes to ``num_images``."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 0) * math.ceil(num_images / self.batch_size)

    def resized(self, *, epochs: int | None = None, steps: int | None = None) -> Protocol:
        """Return the protocol with another length; its own where both are None."""
        if epochs is None and steps is None:
            return self
        return replace(self, epochs=epochs, steps=steps, same_compute=self.same_compute and steps is None)

    def for_set(self, synthetic: SyntheticSet) -> Protocol:
        """Return the protocol with the epochs that ``same_compute`` leaves for a set.

        Example:
            >>> protocol = Protocol(epochs=1000, steps=None, same_compute=True)
            >>> protocol.for_set(SyntheticSet(torch.rand(2, 3, 1, 8, 8), rho=2)).epochs
            250
        """
        if not self.same_compute or self.epochs is None:
            return self
        epochs = self.epochs * synthetic.images_per_class / synthetic.decoded_per_class
        return replace(self, epochs=max(1, round(epochs)), same_compute=False)


PROTOCOLS: dict[str, Protocol] = {
    "house": Protocol("house"),
    # E + 1 epochs are run, and the optimizer is made anew at epoch E // 2 + 1.
    "vico": Protocol(
        "vico",
        epochs=1001,
        steps=None,
        batch_size=256,
        schedule="milestones",
        milestones=(501 / 1001,),
        factor=0.1,
        new_optimizer=True,
        variant="vico",
    ),
    "idc": Protocol(
        "idc",
        epochs=1000,
        steps=None,
        batch_size=64,
        schedule="milestones",
        milestones=(2 / 3, 5 / 6),
        factor=0.2,
        cutmix=0.5,
    ),
    "ncfm": Protocol(
        "ncfm",
        epochs=2000,
        steps=None,
        optimizer="adamw",
        learning_rate=1e-3,
        momentum=0.0,
        weight_decay=0.01,
        schedule="milestones",
        milestones=(0.2, 0.4, 0.6, 0.8),
        factor=0.5,
        cutmix=0.5,
    ),
}
"""By name. ``vico`` is that of DC, DSA and DM with augmentation; ``ncfm`` and ``idc`` without their choice of the best
epoch by test accuracy."""


def protocol_named(protocol: Protocol | str) -> Protocol:
    """Return a protocol by its name, or the given one.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> protocol_named("ncfm").optimizer
        'adamw'
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, or a Protocol, got {protocol!r}")
    return PROTOCOLS[protocol]


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


@dataclass(frozen=True)
class NetAccuracies:
    """Accuracies in [0, 1] of networks that differ in their seed alone.

    Attributes:
        accuracies: of each network.
        per_class: of each class, mean over the networks; NaN for a class without test images.
    """

    accuracies: tuple[float, ...]
    per_class: tuple[float, ...]

    @classmethod
    def of(cls, counts: Tensor) -> NetAccuracies:
        """Summarise what :meth:`TrainedNets.counts` returned, summed over all images, ``(J + 1, C)``."""
        counts = counts.double().cpu()
        right, there = counts[:-1], counts[-1]
        return cls(tuple((right.sum(1) / there.sum()).tolist()), tuple((right.mean(0) / there).tolist()))

    @property
    def mean(self) -> float:
        """Mean over the networks."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def std(self) -> float:
        """Standard deviation over the networks, with J - 1 in the denominator; 0 for one network."""
        if len(self.accuracies) < 2:
            return 0.0
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.accuracies) / (len(self.accuracies) - 1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None for a class without images."""
        per_class = [None if math.isnan(value) else value for value in self.per_class]
        return {"mean": self.mean, "std": self.std, "accuracies": list(self.accuracies), "per_class": per_class}


@dataclass(frozen=True)
class SetEvaluation:
    """What a set is worth, with what one must know to compare the figure.

    Attributes:
        protocol: how the networks were trained.
        distilled: of the set.
        baselines: of real images at the same budget: ``"random"`` stored ones, ``"mix"`` mosaics where rho > 1.
        architectures: of other networks on the set, by name.
        png: of the set as its pictures hold it, in 8 bits; None if that was not asked for.
        facts: rho, images stored and trained on per class, stored numbers, soft or hard labels.
    """

    protocol: Protocol
    distilled: NetAccuracies
    baselines: dict[str, NetAccuracies] = field(default_factory=dict)
    architectures: dict[str, NetAccuracies] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    png: NetAccuracies | None = None

    @property
    def png_drop(self) -> float | None:
        """What 8 bits cost: the mean accuracy of the set minus that of its pictures, by the same networks."""
        return None if self.png is None else self.distilled.mean - self.png.mean

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        protocol = asdict(self.protocol)
        protocol |= {name: list(protocol[name]) for name in ("milestones", "operations")}
        return {
            "protocol": protocol,
            "distilled": self.distilled.to_dict(),
            "baselines": {name: found.to_dict() for name, found in self.baselines.items()},
            "architectures": {name: found.to_dict() for name, found in self.architectures.items()},
            "facts": dict(self.facts),
        } | ({} if self.png is None else {"png": self.png.to_dict() | {"drop": self.png_drop}})


def set_facts(synthetic: SyntheticSet, *, soft: bool = False) -> dict[str, Any]:
    """Return what belongs beside each accuracy of a set."""
    return {
        "rho": synthetic.rho,
        "images_per_class": synthetic.images_per_class,
        "decoded_per_class": synthetic.decoded_per_class,
        "stored_numbers": synthetic.num_values,
        "labels": "soft" if soft else "hard",
        "selection": "last epoch",
    }


def training_tensors(synthetic: SyntheticSet, *, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Return the normalised decoded images ``(N, channels, H, W)`` and their classes or probabilities."""
    tensors = synthetic.as_dataset().tensors
    if not soft:
        return tensors[0], tensors[1]
    if len(tensors) < 3:
        raise ValueError("the set has no soft labels; use labels='hard'")
    return tensors[0], tensors[2].softmax(1)


def picture_set(synthetic: SyntheticSet) -> SyntheticSet:
    """Return the set as its exported pictures hold it; one that leaves [0, 1] is scaled, as the export does."""
    low, high = (float(value) for value in synthetic.pixels(synthetic.images.detach()).aminmax())
    return synthetic.quantised(rescale=synthetic.space == "normalised" and (low < 0 or high > 1))


def baseline_sets(synthetic: SyntheticSet, pool: ClassPool, *, seed: int = 0) -> dict[str, SyntheticSet]:
    """Return sets of random real images that take the memory of a synthetic one: ``random`` and, for rho > 1, ``mix``.

    Example:
        >>> pool = ClassPool(torch.rand(20, 1, 8, 8), torch.arange(2).repeat(10))
        >>> synthetic = SyntheticSet.initialised("mix", pool, 1, rho=2)
        >>> {name: found.decoded_per_class for name, found in baseline_sets(synthetic, pool).items()}
        {'random': 1, 'mix': 4}
    """
    count = synthetic.images_per_class
    found = {"random": SyntheticSet.initialised("real", pool, count, seed=seed)}
    if synthetic.rho > 1:
        found["mix"] = SyntheticSet.initialised(
            "mix", pool, count, rho=synthetic.rho, variant=synthetic.variant, bound=synthetic.bound, seed=seed
        )
    return found


@check_types
def evaluate_set(
    synthetic: SyntheticSet,
    test: ClassPool,
    factory: NetFactory,
    *,
    protocol: Protocol | str = "house",
    num_nets: int = 5,
    train: ClassPool | None = None,
    architectures: Mapping[str, NetFactory] | None = None,
    labels: Literal["hard", "soft"] = "hard",
    png: bool = False,
    seed: int = 0,
    joint: bool | None = None,
) -> SetEvaluation:
    """Train fresh networks on a set and count what they get right; nothing is chosen by what the count says.

    Args:
        synthetic: the set, on the device to train on.
        test: real images, on the same device.
        factory: makes a network.
        protocol: or its name.
        num_nets: networks, at least 1.
        train: real training images; given, random ones at the same budget are evaluated beside the set.
        architectures: further networks to train on the set, by name, one after the other.
        labels: ``"soft"`` trains on the set's soft logits; real baselines have hard labels in any case.
        png: whether the set is evaluated as its pictures hold it too, by the same networks: what 8 bits cost.
        seed: of networks, orders, augmentation and random images.
        joint: see :func:`train_nets`.

    Raises:
        ValueError: for wrong arguments.

    Example:
        >>> pool = ClassPool(torch.rand(20, 1, 4, 4), torch.arange(2).repeat(10))
        >>> synthetic = SyntheticSet.initialised("real", pool, 2)
        >>> factory = lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> found = evaluate_set(synthetic, pool, factory, protocol=Protocol(steps=5), num_nets=2, train=pool)
        >>> len(found.distilled.accuracies), list(found.baselines)
        (2, ['random'])
    """
    if num_nets < 1:
        raise ValueError(f"num_nets must be at least 1, got {num_nets!r}")
    protocol = protocol_named(protocol)
    seeds = [seed + 7919 * number for number in range(num_nets)]

    def accuracies(source: SyntheticSet, make: NetFactory, *, soft: bool, alone: bool) -> NetAccuracies:
        images, targets = training_tensors(source, soft=soft)
        nets = train_nets(
            make,
            images,
            targets,
            num_classes=source.num_classes,
            protocol=protocol.for_set(source),
            seeds=seeds,
            joint=False if alone else joint,
        )
        counts = torch.zeros(num_nets + 1, source.num_classes, dtype=torch.int64, device=test.device)
        for rows in torch.split(torch.arange(len(test), device=test.device), 512):
            pixels = test.images[rows]
            pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels
            normal = (pixels - source.mean.view(-1, 1, 1)) / source.std.view(-1, 1, 1)
            counts += nets.counts(normal, test.labels[rows], source.num_classes)
        return NetAccuracies.of(counts)

    soft = labels == "soft"
    baselines = {} if train is None else baseline_sets(synthetic, train, seed=seed)
    return SetEvaluation(
        protocol,
        accuracies(synthetic, factory, soft=soft, alone=False),
        {name: accuracies(real, factory, soft=False, alone=False) for name, real in baselines.items()},
        {name: accuracies(synthetic, make, soft=soft, alone=True) for name, make in (architectures or {}).items()},
        set_facts(synthetic, soft=soft),
        accuracies(picture_set(synthetic), factory, soft=soft, alone=False) if png else None,
    )


# The scores of DD-Ranking, on fractions


@check_types
def hard_label_recovery(accuracy_full: float, accuracy_hard: float) -> float:
    """HLR: what training on the set with hard labels loses against the full data, both in [0, 1]; lower is better.

    Reference:
        Z. Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", 2025.
    """
    return _fraction(accuracy_full) - _fraction(accuracy_hard)


@check_types
def improvement_over_random(accuracy: float, accuracy_random: float) -> float:
    """IOR: what the set gains over random real images trained by the same recipe, both in [0, 1]; higher is better."""
    return _fraction(accuracy) - _fraction(accuracy_random)


@check_types
def label_robust_score(ior: float, hlr: float, *, weight: float = 0.5) -> float:
    """LRS: both in one figure in [0, 1], ``(e^a - e^-1) / (e - e^-1)`` with ``a = weight ior - (1 - weight) hlr``.

    Raises:
        ValueError: for a gain outside of [-1, 1] or a weight outside of [0, 1].

    Example:
        >>> label_robust_score(1.0, -1.0), label_robust_score(-1.0, 1.0)
        (1.0, 0.0)
    """
    _check_gains(weight, ior=ior, hlr=hlr)
    return _scaled(weight * ior - (1 - weight) * hlr)


def _check_gains(weight: float, **gains: float) -> None:
    for name, gain in gains.items():
        if not -1 <= gain <= 1:
            raise ValueError(f"{name} must lie in [-1, 1], got {gain!r}; give shares, not percent")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight!r}")


@check_types
def augmentation_robust_score(gain_augmented: float, gain_plain: float, *, weight: float = 0.5) -> float:
    """ARS: as LRS, of ``weight gain_augmented + (1 - weight) gain_plain``, gains over random images in [-1, 1].

    Raises:
        ValueError: for a gain outside of [-1, 1] or a weight outside of [0, 1].
    """
    _check_gains(weight, gain_augmented=gain_augmented, gain_plain=gain_plain)
    return _scaled(weight * gain_augmented + (1 - weight) * gain_plain)


def _scaled(value: float) -> float:
    low = math.exp(-1)
    return (math.exp(value) - low) / (math.e - low)


def _fraction(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"accuracies must be fractions in [0, 1], got {value!r}; divide percent by 100")
    return value
