"""Changes of a training set that act on its labels alone: imbalance, label noise, class overlap, and the fair split.

The functions are pure; the frozen dataclasses carry their arguments into a data module, also from the command line.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_plugins.checks import check_types

__all__ = [
    "ClassOverlap",
    "Imbalance",
    "LabelNoise",
    "TargetTransform",
    "class_overlap",
    "make_imbalanced",
    "stratified_split",
    "symmetric_label_noise",
]


@check_types
def make_imbalanced(
    targets: Tensor,
    kind: Literal["exp", "step"],
    ratio: float,
    *,
    max_per_class: int | None = None,
    class_order: Sequence[int] | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Choose the samples of an imbalanced subset.

    With classes ranked :math:`r = 0, \dots, C - 1` from frequent to rare and :math:`\rho` the ratio, class :math:`r`
    keeps :math:`\lfloor n_{max}\, \rho^{-r / (C - 1)} \rfloor` samples (``"exp"``), or :math:`n_{max}` in the first
    :math:`\lfloor C / 2 \rfloor` ranks and :math:`\lfloor n_{max} / \rho \rfloor` in the others (``"step"``). Each
    class is shuffled once and its first samples are kept, so that with one seed a stronger imbalance picks a subset of
    a weaker one of the same ``max_per_class`` and ``class_order``.

    Args:
        targets: labels in ``0 .. C - 1``.
        kind: ``"exp"`` falls from class to class, ``"step"`` has a frequent and a rare half.
        ratio: size of the largest class over that of the smallest, finite, at least 1.
        max_per_class: samples :math:`n_{max}` of the most frequent class; None takes as many as every class can serve.
        class_order: all classes from most to least frequent; None is ``0, 1, ..., C - 1``. Results depend on it:
            classes differ in difficulty.
        seed: of the choice within each class, at least 0.

    Shape:
        - targets: ``(N,)``, any integer type
        - output: ``(M,)`` int64 with M at most N, ascending

    Raises:
        ValueError: for another kind, a ratio below 1, an order that is no permutation of the classes, a class that
            would end up empty, or more samples asked of a class than it has.

    Example:
        >>> targets = torch.arange(3).repeat(100)
        >>> torch.bincount(targets[make_imbalanced(targets, "exp", 100)])
        tensor([100,  10,   1])

    Reference:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", 2019, section 4.2; Buda
        et al., "A systematic study of the class imbalance problem in convolutional neural networks", 2018 (step). With
        an odd number of classes the released code of the former drops the last class; here it is one of the rare.
    """
    _check_imbalance(kind, ratio, max_per_class, class_order)
    num_classes = _check_targets(targets) if class_order is None else len(class_order)
    _check_targets(targets, num_classes)
    order = list(range(num_classes)) if class_order is None else list(class_order)
    if kind == "exp":
        divisors = [ratio ** (rank / max(num_classes - 1, 1)) for rank in range(num_classes)]
    else:
        divisors = [1.0 if rank < num_classes // 2 else float(ratio) for rank in range(num_classes)]

    available = torch.bincount(targets, minlength=num_classes).tolist()
    largest = max_per_class
    if largest is None:
        largest = min(int(available[label] * divisor) for label, divisor in zip(order, divisors, strict=True))
    generator = _generator(seed, "imbalance")
    kept = []
    wanted = {label: int(largest / divisor) for label, divisor in zip(order, divisors, strict=True)}
    for label in range(num_classes):
        if wanted[label] < 1:
            raise ValueError(
                f"ratio {ratio} leaves class {label} without samples when the largest class has {largest}; "
                "use a smaller ratio or more samples"
            )
        if wanted[label] > available[label]:
            raise ValueError(
                f"max_per_class {largest} asks for {wanted[label]} samples of class {label}, which has "
                f"{available[label]}; use a smaller max_per_class, or None for as many as possible"
            )
        members = torch.nonzero(targets == label).flatten().cpu()
        kept.append(members[torch.randperm(len(members), generator=generator)[: wanted[label]]])
    return torch.cat(kept).sort().values


@check_types
def symmetric_label_noise(targets: Tensor, rate: float, *, num_classes: int, seed: int = 0) -> Tensor:
    """Replace each label, with probability ``rate``, by a uniformly drawn *other* class.

    Two conventions are in use. Here a flipped label never stays what it was, so that ``rate`` is the expected share of
    wrong labels and ``(C - 1) / C`` is the rate at which labels say nothing. Where a paper draws the new label from
    all C classes, the true one included, its rate r is our ``r * (C - 1) / C``.

    Args:
        targets: labels in ``0 .. C - 1``.
        rate: probability of a flip in [0, 1].
        num_classes: C, at least 2.
        seed: at least 0. With one seed, a higher rate flips the same samples to the same classes, and further ones.

    Shape:
        - targets, output: ``(N,)``; the type is kept

    Raises:
        ValueError: if ``rate`` is out of range, ``num_classes`` is below 2 or a label is not below it.

    Example:
        >>> targets = torch.zeros(10_000, dtype=torch.int64)
        >>> noisy = symmetric_label_noise(targets, 0.2, num_classes=5)
        >>> round((noisy != targets).float().mean().item(), 1)
        0.2

    Reference:
        Patrini et al., "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach", 2017.
    """
    _check_probability("rate", rate)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2 for a label to change, got {num_classes!r}")
    _check_targets(targets, num_classes)
    generator = _generator(seed, "noise")
    flipped = torch.rand(len(targets), generator=generator, dtype=torch.float64) < rate
    shift = torch.randint(1, num_classes, (len(targets),), generator=generator) * flipped
    return ((targets.long() + shift.to(targets.device)) % num_classes).to(targets.dtype)


@check_types
def class_overlap(
    targets: Tensor, pairs: Sequence[tuple[int, int]], *, probability: float = 0.5, seed: int = 0
) -> Tensor:
    """Let the classes of each pair swap labels with a given probability: overlap in some classes only.

    With probability 1/2 the true posterior of every sample in a pair is 1/2 for both classes, which no model may
    beat with confidence; classes outside the pairs keep their labels.

    Args:
        targets: labels, at least 0.
        pairs: two different classes each; a class is in one pair at most.
        probability: of a swap, in [0, 1].
        seed: at least 0.

    Shape:
        - targets, output: ``(N,)``; the type is kept

    Raises:
        ValueError: if the pairs are not disjoint pairs of different classes, or ``probability`` is out of range.

    Example:
        >>> class_overlap(torch.tensor([0, 1, 2, 3]), [(1, 3)], probability=1.0)
        tensor([0, 3, 2, 1])
    """
    _check_probability("probability", probability)
    _check_pairs(pairs)
    highest = _check_targets(targets) - 1
    partner = torch.arange(max([highest, *(label for pair in pairs for label in pair)]) + 1)
    for first, second in pairs:
        partner[first], partner[second] = second, first
    swapped = torch.rand(len(targets), generator=_generator(seed, "overlap"), dtype=torch.float64) < probability
    exchanged = partner.to(targets.device)[targets.long()].to(targets.dtype)
    return torch.where(swapped.to(targets.device), exchanged, targets)


@check_types
def stratified_split(targets: Tensor, fraction: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split positions into the rest and a part that holds the same ``fraction`` of every class, rounded per class.

    Args:
        targets: labels, at least 0.
        fraction: of each class that goes to the part, in (0, 1).
        seed: at least 0.

    Shape:
        - targets: ``(N,)``
        - output: ``(N - M,)`` and ``(M,)`` int64, both ascending

    Raises:
        ValueError: if ``fraction`` is out of range, or a class is too small to have a sample on both sides.

    Example:
        >>> rest, part = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.25)
        >>> len(rest), len(part)
        (6, 2)
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction!r}")
    _check_targets(targets)
    generator = _generator(seed, "split")
    rest, part = [], []
    for label, count in enumerate(torch.bincount(targets).tolist()):
        taken = math.floor(fraction * count + 0.5)
        if count and not 0 < taken < count:
            raise ValueError(
                f"a fraction of {fraction} puts {taken} of the {count} samples of class {label} in one part and "
                f"{count - taken} in the other, and each needs one; choose a fraction nearer to 0.5 or give the class "
                "more samples"
            )
        members = torch.nonzero(targets == label).flatten().cpu()
        members = members[torch.randperm(count, generator=generator)]
        part.append(members[:taken])
        rest.append(members[taken:])
    return torch.cat(rest).sort().values, torch.cat(part).sort().values


class TargetTransform(ABC):
    """A change of the training images' labels, or a choice among them, that an ``ImageDataModule`` applies."""

    @abstractmethod
    @check_types
    def apply(self, targets: Tensor, *, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the positions to keep and their new labels.

        Args:
            targets: labels in ``0 .. num_classes - 1``.
            num_classes: of the data set.
            seed: used where the transform has none of its own.

        Shape:
            - targets: ``(N,)`` int64
            - output: ``(M,)`` positions and ``(M,)`` labels, both int64
        """


@check_types
@dataclass(frozen=True)
class Imbalance(TargetTransform):
    """Keep an imbalanced subset, see :func:`make_imbalanced`.

    Args:
        kind: ``"exp"`` or ``"step"``.
        ratio: size of the largest class over that of the smallest, at least 1.
        max_per_class: samples of the most frequent class; None for as many as possible.
        class_order: all classes from most to least frequent; None is their own order.
        seed: at least 0; None derives it from the data module's.

    Raises:
        ValueError: for an argument that is wrong on its own.

    Example:
        >>> keep, targets = Imbalance("step", 10).apply(torch.arange(2).repeat(50), num_classes=2, seed=0)
        >>> torch.bincount(targets)
        tensor([50,  5])
    """

    kind: Literal["exp", "step"]
    ratio: float
    max_per_class: int | None = None
    class_order: tuple[int, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.class_order is not None:
            object.__setattr__(self, "class_order", tuple(self.class_order))  # the command line hands over a list
        _check_imbalance(self.kind, self.ratio, self.max_per_class, self.class_order)
        _check_seed(self.seed)

    @check_types
    def apply(self, targets: Tensor, *, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the positions of the subset and its unchanged labels."""
        order = range(num_classes) if self.class_order is None else self.class_order
        if len(order) != num_classes:
            raise ValueError(f"class_order must name all {num_classes} classes of the data set once, got {list(order)}")
        kept = make_imbalanced(
            targets,
            self.kind,
            self.ratio,
            max_per_class=self.max_per_class,
            class_order=order,
            seed=seed if self.seed is None else self.seed,
        )
        return kept, targets[kept]


@check_types
@dataclass(frozen=True)
class LabelNoise(TargetTransform):
    """Flip labels to other classes, see :func:`symmetric_label_noise`.

    Args:
        rate: expected share of wrong labels, in [0, 1].
        seed: at least 0; None derives it from the data module's.

    Raises:
        ValueError: if ``rate`` is out of range.

    Example:
        >>> LabelNoise(1.0).apply(torch.tensor([0, 1]), num_classes=2, seed=0)
        (tensor([0, 1]), tensor([1, 0]))
    """

    rate: float
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_probability("rate", self.rate)
        _check_seed(self.seed)

    @check_types
    def apply(self, targets: Tensor, *, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return all positions and the noisy labels."""
        seed = seed if self.seed is None else self.seed
        return torch.arange(len(targets)), symmetric_label_noise(targets, self.rate, num_classes=num_classes, seed=seed)


@check_types
@dataclass(frozen=True)
class ClassOverlap(TargetTransform):
    """Let pairs of classes swap labels, see :func:`class_overlap`.

    Args:
        pairs: two different classes each; a class is in one pair at most.
        probability: of a swap, in [0, 1].
        seed: at least 0; None derives it from the data module's.

    Raises:
        ValueError: if ``pairs`` or ``probability`` is wrong on its own, or names a class that the data set lacks.

    Example:
        >>> ClassOverlap([(0, 1)], probability=1.0).apply(torch.tensor([0, 1, 2]), num_classes=3, seed=0)
        (tensor([0, 1, 2]), tensor([1, 0, 2]))
    """

    pairs: tuple[tuple[int, int], ...]
    probability: float = 0.5
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_pairs(self.pairs)
        object.__setattr__(self, "pairs", tuple((first, second) for first, second in self.pairs))
        _check_probability("probability", self.probability)
        _check_seed(self.seed)

    @check_types
    def apply(self, targets: Tensor, *, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return all positions and the exchanged labels."""
        highest = max(label for pair in self.pairs for label in pair)
        if highest >= num_classes:
            raise ValueError(f"pairs name class {highest}, and the data set has {num_classes}; name classes below that")
        seed = seed if self.seed is None else self.seed
        return torch.arange(len(targets)), class_overlap(targets, self.pairs, probability=self.probability, seed=seed)


def _generator(seed: int, purpose: Literal["imbalance", "noise", "overlap", "split"]) -> torch.Generator:
    # The purpose enters the seed: the same uniforms under noise and overlap would make the two pick the same samples.
    # SeedSequence, because a torch generator uses 32 bits of its seed and neighbouring seeds are to be unrelated.
    _check_seed(seed)
    words = [seed, *purpose.encode()]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


def _check_seed(seed: int | None) -> None:
    if seed is not None and not (isinstance(seed, int) and seed >= 0):
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def _check_targets(targets: Tensor, num_classes: int | None = None) -> int:
    """Return the highest label plus one."""
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool or not len(targets):
        raise ValueError(
            f"targets must be a non-empty vector of integer labels, got shape {tuple(targets.shape)} and type "
            f"{targets.dtype}; pass class indices, not one-hot rows or probabilities"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        allowed = "at least 0" if num_classes is None else f"in 0 .. {num_classes - 1}"
        raise ValueError(f"labels must be {allowed}, found labels from {low} to {high}; check the label files")
    return high + 1


def _check_imbalance(kind: str, ratio: float, max_per_class: int | None, class_order: Sequence[int] | None) -> None:
    if kind not in ("exp", "step"):
        raise ValueError(f"kind must be 'exp' or 'step', got {kind!r}")
    if not 1 <= ratio < math.inf:
        raise ValueError(f"ratio, largest class over smallest, must be finite and at least 1, got {ratio!r}")
    if max_per_class is not None and max_per_class < 1:
        raise ValueError(f"max_per_class must be at least 1, or None for as many as possible, got {max_per_class!r}")
    if class_order is not None and sorted(class_order) != list(range(len(class_order))):
        raise ValueError(f"class_order must name each class 0, 1, ... once, got {list(class_order)}")


def _check_pairs(pairs: Sequence[tuple[int, int]]) -> None:
    if not len(pairs) or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"pairs must hold at least one pair of classes such as (1, 3), got {pairs!r}")
    labels = [label for pair in pairs for label in pair]
    if min(labels) < 0 or len(set(labels)) != len(labels):
        raise ValueError(f"pairs must name classes of at least 0, each of them once in all, got {pairs!r}")
