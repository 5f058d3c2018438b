"""Data in which a simple and a complex feature both give the class away, and which of the two a network uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_plugins.checks import check_types
from lightning_plugins.gradients import ordinary
from lightning_plugins.robustness.attack import LogitsFn, attacking, check_classes, check_targets, private_generator

__all__ = [
    "ConcatPair",
    "FeatureScores",
    "FeatureUse",
    "SlabData",
    "concat_pair",
    "extreme_simplicity",
    "group_classes",
    "lms_dataset",
    "slab_dataset",
]

# For each number of slabs, the probability of a sample to lie in slab 0 (the centre), 1 (either side), 2 and 3, given
# its class: even slabs are of class 0, odd ones of class 1.
_SLABS = {3: (1.0, 1.0), 5: (3 / 4, 1.0, 1 / 4), 7: (1 / 2, 7 / 8, 1 / 2, 1 / 8)}


@dataclass(frozen=True)
class SlabData:
    """Two classes that every coordinate tells apart, some by one threshold, some by several.

    Attributes:
        inputs: ``(N, dim)``, float32.
        targets: 0 or 1, ``(N,)``, int64.
        rotation: orthogonal ``(dim, dim)``, float32: ``inputs @ rotation`` are the coordinates before the rotation;
            the identity without one.
    """

    inputs: Tensor
    targets: Tensor
    rotation: Tensor


@check_types
def slab_dataset(
    num_slabs: Sequence[int],
    num_samples: int = 100_000,
    *,
    width: float = 1.0,
    margin: float = 0.1,
    noise: float | Sequence[float] = 0.0,
    rotate: bool = False,
    generator: torch.Generator | None = None,
) -> SlabData:
    r"""Draw two classes, equally frequent, whose coordinates are independent given the class.

    In a coordinate of 1 slab the class is the sign: values have magnitudes in [``margin``, ``width``]. In one of k
    slabs the classes take turns along [-``width``, ``width``], class 0 in the centre: k intervals with gaps of
    ``2 * margin`` between them, which takes k - 1 thresholds to tell apart. With 5 slabs class 0 is in the centre with
    probability 3/4; with 7, class 0 in the centre with 1/2, and class 1 in the inner slabs with 7/8.

    Args:
        num_slabs: of each coordinate: 1, 3, 5 or 7.
        num_samples: N.
        width: largest magnitude, above 0.
        margin: half of the gap between classes, at least 0, and so small that intervals are left.
        noise: share of the samples for which a coordinate is drawn as for the other class, in [0, 1]; a number, or one
            for each coordinate.
        rotate: apply a random rotation or reflection, uniform over all of them; another one at each call, so split
            training from test data afterwards.
        generator: on the CPU. Default: one seeded with 0: give test data another one.

    Returns:
        Inputs, classes and the rotation.

    Raises:
        ValueError: for wrong arguments.

    Example:
        >>> data = slab_dataset((1, 3), 1000)
        >>> bool(((data.inputs[:, 0] > 0) == (data.targets == 1)).all())
        True
        >>> bool(((data.inputs[:, 1].abs() > 0.3) == (data.targets == 1)).all())
        True

    Reference:
        H. Shah, K. Tamuly, A. Raghunathan, P. Jain, P. Netrapalli, "The Pitfalls of Simplicity Bias in Neural
        Networks", NeurIPS 2020.
    """
    num_slabs = tuple(num_slabs)
    if not num_slabs or not set(num_slabs) <= {1, *_SLABS}:
        raise ValueError(f"num_slabs must hold 1, 3, 5 or 7 for each coordinate, got {num_slabs}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples!r}")
    if not 0 < width < math.inf:
        raise ValueError(f"width must be above 0 and finite, got {width!r}")
    gaps = max(num_slabs) - 1 or 1
    if not 0 <= margin * gaps < width:
        raise ValueError(
            f"margin must be at least 0 and below {width / gaps:.4g}, where {max(num_slabs)} slabs have no width left; "
            f"got {margin!r}"
        )
    shares = torch.as_tensor(noise, dtype=torch.float64).tolist()
    flips = tuple(shares) if isinstance(shares, list) else (shares,) * len(num_slabs)
    if len(flips) != len(num_slabs) or not all(0 <= flip <= 1 for flip in flips):
        raise ValueError(f"noise must lie in [0, 1], one number or {len(num_slabs)}, got {noise!r}")
    generator = private_generator(generator)

    def uniform() -> Tensor:
        return torch.rand(num_samples, generator=generator, dtype=torch.float64)

    targets = torch.randint(2, (num_samples,), generator=generator)
    columns = []
    for slabs, flip in zip(num_slabs, flips, strict=True):
        shown = torch.where(uniform() < flip, 1 - targets, targets)
        side = torch.where(uniform() < 0.5, -1.0, 1.0)
        if slabs == 1:
            columns.append((2 * shown - 1) * (margin + (width - margin) * uniform()))
            continue
        probabilities = _SLABS[slabs]
        inner = torch.tensor(probabilities, dtype=torch.float64)[shown]
        slab = shown + 2 * (uniform() >= inner)
        slab_width = (2 * width - 2 * (slabs - 1) * margin) / slabs
        # The centre's halves begin at 0, and the slabs beyond after half a slab, whole slabs, and the gaps.
        begin = torch.where(slab == 0, 0.0, (slab - 0.5) * slab_width + 2 * slab * margin)
        length = torch.where(slab == 0, slab_width / 2, slab_width)
        columns.append(side * (begin + length * uniform()))
    inputs, rotation = torch.stack(columns, 1), torch.eye(len(columns), dtype=torch.float64)
    if rotate:
        gaussian = torch.randn(rotation.shape, generator=generator, dtype=torch.float64)
        basis, upper = torch.linalg.qr(gaussian)
        rotation = basis * upper.diagonal().sign()  # without the signs it would not be uniform
        inputs = inputs @ rotation.T
    return SlabData(inputs.float(), targets, rotation.float())


@check_types
def lms_dataset(
    k: int,
    num_samples: int = 100_000,
    *,
    dim: int = 20,
    width: float = 1.0,
    margin: float = 0.1,
    noise: float | Sequence[float] = 0.0,
    rotate: bool = False,
    generator: torch.Generator | None = None,
) -> SlabData:
    """Draw LMS-k: coordinate 0 is linear, each of the others has k slabs and would do as well on its own.

    Args:
        k: slabs of the other coordinates: 3, 5 or 7.
        num_samples: N.
        dim: coordinates, at least 2.
        width: as in :func:`slab_dataset`.
        margin: as there.
        noise: as there.
        rotate: as there.
        generator: as there.

    Returns:
        Inputs, classes and the rotation.

    Raises:
        ValueError: for wrong arguments.

    Example:
        >>> lms_dataset(5, 1000).inputs.shape
        torch.Size([1000, 20])

    Reference:
        H. Shah, K. Tamuly, A. Raghunathan, P. Jain, P. Netrapalli, "The Pitfalls of Simplicity Bias in Neural
        Networks", NeurIPS 2020.
    """
    if k not in _SLABS:
        raise ValueError(f"k must be 3, 5 or 7, got {k!r}")
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim!r}")
    slabs = (1,) + (k,) * (dim - 1)
    return slab_dataset(slabs, num_samples, width=width, margin=margin, noise=noise, rotate=rotate, generator=generator)


@dataclass(frozen=True)
class ConcatPair:
    """Images of two data sets, of the same class, one above the other.

    Attributes:
        images: ``(N, C, H, W)``.
        targets: ``(N,)``, int64.
        simple: booleans ``(C, H, W)``: which values come from the simple data set.
    """

    images: Tensor
    targets: Tensor
    simple: Tensor


def group_classes(images: Tensor, targets: Tensor, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the images of some classes, renamed or joined.

    Args:
        images: ``(N, ...)``.
        targets: ``(N,)``, integers.
        groups: classes that become class 0, those that become 1, and so on; the others are left out.

    Returns:
        Images and their new classes, int64, in the old order.

    Raises:
        ValueError: for wrong shapes, or a class in two groups.

    Example:
        >>> group_classes(torch.arange(5.0), torch.tensor([0, 1, 2, 9, 2]), groups=((1,), (2, 9)))
        (tensor([1., 2., 3., 4.]), tensor([0, 1, 1, 1]))
    """
    if targets.ndim != 1 or targets.is_floating_point() or len(targets) != len(images):
        raise ValueError(f"targets must be integers ({len(images)},), got {targets.dtype} {tuple(targets.shape)}")
    flat = [old for group in groups for old in group]
    if len(set(flat)) != len(flat):
        raise ValueError(f"each class can be in one group only, got {groups!r}")
    renamed = torch.full_like(targets, -1, dtype=torch.long)
    for new, group in enumerate(groups):
        renamed[torch.isin(targets, torch.tensor(tuple(group), device=targets.device))] = new
    chosen = renamed >= 0
    return images[chosen], renamed[chosen]


@check_types
def concat_pair(
    base_simple: tuple[Tensor, Tensor],
    base_complex: tuple[Tensor, Tensor],
    *,
    generator: torch.Generator | None = None,
) -> ConcatPair:
    """Put an image of a simple data set above one of a complex data set, both of the same class.

    Each image is used at most once, and each class as often as the data set with fewer of it allows. The narrower
    images are padded with 0 on both sides to the width of the wider ones (and above and below by as much), and grey
    ones are repeated for the colours of the others.

    Args:
        base_simple: images ``(N, C, H, W)``, such as digits, and their classes ``(N,)``, int64. :func:`group_classes`
            reduces ten classes to two.
        base_complex: likewise, of the same classes.
        generator: of the pairs and their order, on the CPU. Default: one seeded with 0.

    Returns:
        Pairs, their classes, and where the simple images are.

    Raises:
        ValueError: for wrong shapes, classes that one data set lacks, or colours that do not match.

    Example:
        >>> digits = torch.rand(4, 1, 28, 28), torch.tensor([0, 0, 1, 1])
        >>> pictures = torch.rand(3, 3, 32, 32), torch.tensor([1, 1, 0])
        >>> pair = concat_pair(digits, pictures)
        >>> pair.images.shape, pair.targets.sort().values
        (torch.Size([3, 3, 64, 32]), tensor([0, 1, 1]))

    Reference:
        H. Shah, K. Tamuly, A. Raghunathan, P. Jain, P. Netrapalli, "The Pitfalls of Simplicity Bias in Neural
        Networks", NeurIPS 2020: MNIST-CIFAR.
    """
    for name, (images, targets) in (("base_simple", base_simple), ("base_complex", base_complex)):
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"{name} images must be floating-point (N, C, H, W), got {images.dtype} {images.shape}")
        check_targets(f"{name} classes", targets, images)
    simple, other = base_simple[0], base_complex[0]
    classes, others = (sorted(set(targets.tolist())) for _, targets in (base_simple, base_complex))
    if classes != others:
        raise ValueError(
            f"both data sets must have the same classes, got {classes} and {others}; choose them by group_classes"
        )
    if simple.shape[1] != other.shape[1] and 1 not in (simple.shape[1], other.shape[1]):
        raise ValueError(f"images must have as many channels, or one: got {simple.shape[1]} and {other.shape[1]}")
    width, channels = max(simple.shape[3], other.shape[3]), max(simple.shape[1], other.shape[1])
    generator = private_generator(generator)
    pairs: list[tuple[Tensor, Tensor]] = []
    for k in classes:
        rows = [(targets == k).nonzero().flatten() for _, targets in (base_simple, base_complex)]
        count = min(map(len, rows))
        first, second = (part[torch.randperm(len(part), generator=generator)[:count].to(part.device)] for part in rows)
        pairs.append((first, second))
    upper, lower = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    shuffle = torch.randperm(len(upper), generator=generator).to(upper.device)
    upper, lower = upper[shuffle], lower[shuffle]
    blocks = [_fit(part, channels, width) for part in (simple[upper], other[lower])]
    images = torch.cat(blocks, 2)
    where = torch.zeros(images.shape[1:], dtype=torch.bool, device=images.device)
    where[:, : blocks[0].shape[2]] = True
    return ConcatPair(images, base_simple[1][upper], where)


@dataclass(frozen=True)
class FeatureScores:
    """How well a network does.

    Attributes:
        accuracy: in [0, 1].
        auc: mean over classes of the area under the ROC curve of that class against the others, in [0, 1]; NaN if only
            one class is present.
        logit_change: mean Euclidean distance of the logits from those of the intact inputs, at least 0.
    """

    accuracy: float
    auc: float
    logit_change: float


@dataclass(frozen=True)
class FeatureUse:
    """What a network makes of a set of coordinates.

    Attributes:
        intact: on the inputs as they are.
        randomized: with the coordinates of the set taken from other samples.
        complement: with all other coordinates taken from other samples.
    """

    intact: FeatureScores
    randomized: FeatureScores
    complement: FeatureScores


@check_types
def extreme_simplicity(
    logits_fn: LogitsFn,
    inputs: Tensor,
    targets: Tensor,
    coordinates: Tensor | Sequence[int],
    *,
    rotation: Tensor | None = None,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> FeatureUse:
    """Shuffle some coordinates among the samples, then all others, and see what is left of the accuracy.

    One permutation of the samples is common to all shuffled coordinates, so that only their relation to the class and
    to the other coordinates is lost. Extreme simplicity bias: without the simple coordinates the network guesses, and
    without all others it is as good as before.

    Three forward passes over the inputs. A module is asked in evaluation mode and given back as it was.

    Args:
        logits_fn: from inputs to logits ``(N, C)``.
        inputs: ``(N, ...)``, floating-point, at least 2.
        targets: classes ``(N,)``, int64.
        coordinates: booleans of the shape of one input, true for the set; or places in a flattened input.
        rotation: orthogonal ``(dim, dim)`` of a :class:`SlabData`, taken back before the shuffle and applied again
            after it. Default: none.
        batch_size: of a forward pass.
        generator: of the permutation, on the CPU. Default: one seeded with 0.

    Returns:
        Scores on intact inputs, without the set, and without the others.

    Raises:
        ValueError: for wrong arguments or shapes.

    Example:
        >>> data = lms_dataset(3, 2000, dim=4)
        >>> logits_fn = lambda x: torch.stack([-x[:, 0], x[:, 0]], 1)  # knows the linear coordinate only
        >>> use = extreme_simplicity(logits_fn, data.inputs, data.targets, coordinates=[0])
        >>> use.intact.accuracy, round(use.randomized.accuracy, 1), use.complement.accuracy
        (1.0, 0.5, 1.0)

    Reference:
        H. Shah, K. Tamuly, A. Raghunathan, P. Jain, P. Netrapalli, "The Pitfalls of Simplicity Bias in Neural
        Networks", NeurIPS 2020.
    """
    if inputs.ndim < 2 or len(inputs) < 2 or not inputs.is_floating_point():
        raise ValueError(
            f"inputs must be at least 2, floating-point (N, ...), got {inputs.dtype} {tuple(inputs.shape)}"
        )
    targets = check_targets("targets", targets, inputs)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    flat = ordinary(inputs).flatten(1)
    chosen = _chosen(coordinates, inputs)
    if rotation is not None:
        if rotation.shape != (flat.shape[1],) * 2:
            raise ValueError(f"rotation must be ({flat.shape[1]}, {flat.shape[1]}), got {tuple(rotation.shape)}")
        turn = rotation.to(flat)
        flat = flat @ turn
    # randperm reads the bits of a generator as randint does: with the seed that drew the classes it follows them.
    keys = torch.rand(len(inputs), generator=private_generator(generator), dtype=torch.float64)
    permutation = keys.argsort().to(inputs.device)
    shuffled = flat[permutation]
    variants = [inputs]
    for mixed in (torch.where(chosen, shuffled, flat), torch.where(chosen, flat, shuffled)):
        variants.append((mixed if rotation is None else mixed @ turn.T).view_as(inputs))
    scores = []
    with attacking(logits_fn, inputs) as network:
        reference = None
        for variant in variants:
            parts = [network.logits(ordinary(part)) for part in torch.split(variant, batch_size)]
            logits = torch.cat(parts)
            check_classes("targets", targets, logits)
            reference = logits if reference is None else reference
            scores.append(
                FeatureScores(
                    (logits.argmax(1) == targets).float().mean().item(),
                    _auc(logits, targets),
                    torch.linalg.vector_norm(logits - reference, dim=1).mean().item(),
                )
            )
    return FeatureUse(*scores)


def _fit(images: Tensor, channels: int, width: int) -> Tensor:
    images = images.expand(-1, channels, -1, -1)
    missing = width - images.shape[3]
    before, after = missing // 2, missing - missing // 2
    return torch.nn.functional.pad(images, (before, after, before, after))


def _chosen(coordinates: Tensor | Sequence[int], inputs: Tensor) -> Tensor:
    count = inputs[0].numel()
    places = torch.as_tensor(coordinates, device=inputs.device)
    if places.dtype == torch.bool:
        if places.shape != inputs.shape[1:]:
            raise ValueError(
                f"coordinates must be booleans {tuple(inputs.shape[1:])} or places in a flattened input, got booleans "
                f"{tuple(places.shape)}"
            )
        return places.flatten()
    if places.is_floating_point() or places.ndim != 1 or not bool(((places >= 0) & (places < count)).all()):
        raise ValueError(
            f"coordinates must be booleans of an input's shape, or places in [0, {count}), got {coordinates!r}"
        )
    return torch.zeros(count, dtype=torch.bool, device=inputs.device).index_fill(0, places.long(), True)


def _auc(logits: Tensor, targets: Tensor) -> float:
    present = sorted(set(targets.tolist()))
    if len(present) < 2:
        return math.nan
    areas = []
    for k in present:
        rest = torch.cat([logits[:, :k], logits[:, k + 1 :]], 1).logsumexp(1)
        # Ranks in [0, 1): torchmetrics would squash logits by a sigmoid, where large ones tie.
        values, ranks = torch.unique(logits[:, k] - rest, return_inverse=True)
        areas.append(binary_auroc(ranks.float() / len(values), (targets == k).long()))
    return torch.stack(areas).mean().item()
