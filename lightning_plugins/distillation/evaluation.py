"""How well networks classify real images after training on a synthetic set alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.extractors import NetFactory
from lightning_plugins.distillation.fresh_nets import net_seeds, train_nets
from lightning_plugins.distillation.pool import ClassPool
from lightning_plugins.distillation.protocol import Protocol, protocol_named
from lightning_plugins.distillation.synthetic_set import SyntheticSet

__all__ = ["NetAccuracies", "SetEvaluation", "evaluate_set"]


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
        >>> from torch import nn
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
    seeds = net_seeds(seed, range(num_nets))

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
