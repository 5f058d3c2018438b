r"""Mixed samples with mixed labels: mixup, also of several points, CutMix, FMix, and foregrounds on new backgrounds.

The functions take inputs ``(N, ...)`` and labels, and return mixed inputs and soft labels ``(N, C)``; without
``num_classes`` they return :class:`MixedLabels`, which losses and metrics for integer labels take. The modules do the
same inside a data loader's ``collate_fn``. Randomness comes from a ``torch.Generator``: on a CPU generator the draws
are the same whatever device the inputs are on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._mixed_labels import MixedLabels, mixed_accuracy, soft_labels, takes_mixed_labels
from lightning_plugins.checks import check_generator, check_types

__all__ = [
    "BatchMixing",
    "CutMix",
    "FMix",
    "ForegroundRecombine",
    "LabelLambda",
    "MixedLabels",
    "Mixup",
    "cutmix",
    "fmix",
    "fmix_mask",
    "mixed_accuracy",
    "mixup",
    "takes_mixed_labels",
]

LabelLambda = Literal["same", "independent"] | float
"""Shares of the labels: those of the inputs, a draw of their own, or a fixed share for the dominant input."""


@check_types
def mixup(
    inputs: Tensor,
    targets: Tensor,
    *,
    num_classes: int | None = None,
    alpha: float = 1.0,
    label_lambda: LabelLambda = "same",
    same_side: bool = True,
    per_sample: bool = False,
    num_points: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Replace each sample by a weighted mean of itself and others of the batch.

    :math:`\tilde x = \lambda_1 x + \sum_{k=2}^K \lambda_k x_{\pi_k}` with
    :math:`\lambda \sim Dirichlet(\alpha, \dots, \alpha)` and random permutations :math:`\pi_k`; the labels are mixed
    alike. ``num_points=2`` is mixup, whose :math:`\lambda_1` is :math:`Beta(\alpha, \alpha)`; more are d-mixup, which
    tends to leave image classifiers less sure than they should be.

    Args:
        inputs: floating-point ``(N, ...)``.
        targets: integer classes ``(N,)``, or soft labels ``(N, C)``.
        num_classes: C; None returns :class:`MixedLabels` in place of soft labels.
        alpha: of the Beta or Dirichlet distribution, above 0: 1 is usual for calibration, 0.2 for accuracy on ImageNet.
        label_lambda: ``"same"`` shares as the inputs; ``"independent"``, a draw of their own (decoupled mixup); or a
            number in [0, 1], the label share of the dominant input, for two points.
        same_side: give a label the larger share where its input has it; with False the dominant input may carry the
            minor label.
        per_sample: draw shares for each sample, not for the batch.
        num_points: K, at least 2.
        generator: of the draws; None is torch's global one.

    Shape:
        - output: inputs like ``inputs``, and soft labels ``(N, C)`` float32, or :class:`MixedLabels` ``(N,)``

    Raises:
        TypeError: if inputs are not floating-point.
        ValueError: for an argument out of range, wrong shapes, or a label outside of ``[0, C)``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> inputs, targets = mixup(torch.eye(3), torch.arange(3), num_classes=3, generator=generator)
        >>> torch.equal(inputs, targets)  # one-hot inputs are mixed as their labels are
        True

    Reference:
        H. Zhang, M. Cisse, Y. Dauphin, D. Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018. For K > 2:
        M. Chidambaram, R. Ge, "On the Limitations of Temperature Scaling for Distributions with Overlaps", ICLR 2024.
        For independent shares: D. Zou, Y. Cao, Y. Li, Q. Gu, "The Benefits of Mixup for Feature Learning", ICML 2023;
        the draws of that paper were not at hand, ``same_side`` is ours.
    """
    _check_mixup(alpha, label_lambda, num_points)
    _check_batch(inputs, targets)
    size = (len(inputs),) if per_sample else ()
    shares = _dirichlet(alpha, num_points, size, inputs, generator)
    orders = _orders(len(inputs), num_points, inputs.device, generator)
    mixed = sum(_spread(share, inputs) * inputs[order] for share, order in zip(shares, orders, strict=True))
    label_shares = _label_shares(shares, label_lambda, same_side, alpha, generator)
    return mixed.to(inputs.dtype), _labels(targets, orders, label_shares, num_classes)  # type: ignore[union-attr]


@check_types
def cutmix(
    inputs: Tensor,
    targets: Tensor,
    *,
    num_classes: int | None = None,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Replace a box of each sample by that of another sample of the batch.

    The box has share :math:`1 - \lambda` of the volume, :math:`\lambda \sim Beta(\alpha, \alpha)`, and lies around a
    uniform centre, cut off at the border; labels are mixed by what of the box is left.

    Args:
        inputs: floating-point ``(N, channels, ...)`` with one to three spatial dimensions.
        targets: integer classes ``(N,)``, or soft labels ``(N, C)``.
        num_classes: C; None returns :class:`MixedLabels` in place of soft labels.
        alpha: of the Beta distribution, above 0.
        generator: of the draws; None is torch's global one.

    Shape:
        - output: as of :func:`mixup`

    Raises:
        TypeError: if inputs are not floating-point.
        ValueError: for an argument out of range, wrong shapes, or a label outside of ``[0, C)``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images, labels = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8), torch.arange(2)
        >>> mixed, soft = cutmix(images, labels, num_classes=2, generator=generator)
        >>> torch.allclose(mixed.mean((1, 2, 3)), soft[:, 1])
        True

    Reference:
        S. Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV
        2019.
    """
    _check_above_0("alpha", alpha)
    _check_batch(inputs, targets, spatial=True)
    size = inputs.shape[2:]
    cut = 1 - float(_dirichlet(alpha, 2, (), inputs, generator)[0])
    side = cut ** (1 / len(size))
    mask = torch.ones(size, dtype=torch.float32, device=inputs.device)
    box = []
    for length, centre in zip(size, _rng(generator).random(len(size)), strict=True):
        middle, half = int(centre * length), int(length * side) / 2
        box.append(slice(max(math.ceil(middle - half), 0), min(math.ceil(middle + half), length)))
    mask[tuple(box)] = 0
    return _masked(inputs, targets, mask[None], mask.mean()[None], num_classes, generator)


@check_types
def fmix(
    inputs: Tensor,
    targets: Tensor,
    *,
    num_classes: int | None = None,
    alpha: float = 1.0,
    decay: float = 3.0,
    max_soft: float = 0.0,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Replace a region of each sample, of a shape drawn from low-frequency noise, by that of another of the batch.

    :math:`\tilde x = m x + (1 - m) x_\pi` with a mask of :func:`fmix_mask` and :math:`\lambda \sim Beta(\alpha,
    \alpha)`; channels share the mask. Labels take :math:`\lambda`, or the mean of a mask with soft edges.

    Args:
        inputs: floating-point ``(N, channels, ...)`` with one to three spatial dimensions.
        targets: integer classes ``(N,)``, or soft labels ``(N, C)``.
        num_classes: C; None returns :class:`MixedLabels` in place of soft labels.
        alpha: of the Beta distribution, above 0.
        decay: power by which frequencies are damped, at least 0; higher is smoother.
        max_soft: share of the mask that may be a soft edge on either side, in [0, 0.5].
        per_sample: draw a share and a mask for each sample, not for the batch.
        generator: of the draws; None is torch's global one.

    Shape:
        - output: as of :func:`mixup`

    Raises:
        TypeError: if inputs are not floating-point.
        ValueError: for an argument out of range, wrong shapes, or a label outside of ``[0, C)``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images, labels = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8), torch.arange(2)
        >>> mixed, soft = fmix(images, labels, num_classes=2, generator=generator)
        >>> mixed.unique()
        tensor([0., 1.])

    Reference:
        E. Harris et al., "FMix: Enhancing Mixed Sample Data Augmentation", 2020.
    """
    _check_above_0("alpha", alpha)
    _check_batch(inputs, targets, spatial=True)
    size = inputs.shape[2:]
    count = len(inputs) if per_sample else 1
    lam = _dirichlet(alpha, 2, (count,), inputs, generator)[0]
    masks = torch.stack(
        [fmix_mask(size, value, decay=decay, max_soft=max_soft, generator=generator) for value in lam.tolist()]
    ).to(inputs.device)
    share = masks.flatten(1).mean(1) if max_soft else lam
    return _masked(inputs, targets, masks, share, num_classes, generator)


@check_types
def fmix_mask(
    size: int | Sequence[int],
    lam: float,
    *,
    decay: float = 3.0,
    max_soft: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return a mask with share ``lam`` of ones, a level set of Gaussian noise with damped high frequencies.

    White complex noise is scaled by :math:`\max(|f|, 1 / \max(size))^{-\delta}` and transformed back; the ``n`` highest
    places become 1, ``n`` being :math:`\lambda |size|` rounded up or down with equal chance.

    The released code reads the real and imaginary part of its noise from two frequency columns; this is the formula as
    the paper has it. It also takes one frequency column too many for an odd last size.

    Args:
        size: lengths of one to three dimensions, each at least 1.
        lam: share of ones, in [0, 1].
        decay: power :math:`\delta` by which frequencies are damped, at least 0.
        max_soft: share of the places, on either side of the edge, over which 1 falls to 0; in [0, 0.5].
        generator: of the draws; the mask is on its device. None is torch's global one, on the CPU.

    Returns:
        float32 of shape ``size``, with values in [0, 1]; 0 and 1 alone if ``max_soft`` is 0.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> fmix_mask((4, 6), 0.25, generator=torch.Generator().manual_seed(0)).sum()
        tensor(6.)

    Reference:
        E. Harris et al., "FMix: Enhancing Mixed Sample Data Augmentation", 2020.
    """
    size = (size,) if isinstance(size, int) else tuple(size)
    if not (1 <= len(size) <= 3 and all(length >= 1 for length in size)):
        raise ValueError(f"size must be one to three lengths of at least 1, got {size}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam!r}")
    _check_fmix(decay, max_soft)
    check_generator(generator)
    device = torch.device("cpu") if generator is None else generator.device
    exact: dict[str, Any] = {"dtype": torch.float32, "device": device}
    axes = [torch.fft.fftfreq(length, **exact) for length in size[:-1]] + [torch.fft.rfftfreq(size[-1], **exact)]
    grid = torch.meshgrid(*axes, indexing="ij")
    frequency = torch.stack([axis.square() for axis in grid]).sum(0).sqrt()
    scale = frequency.clamp_min(1 / max(size)) ** -decay
    noise = torch.randn(frequency.shape, dtype=torch.complex64, device=device, generator=generator)
    ranks = torch.fft.irfftn(scale * noise, s=size).flatten().argsort(descending=True)
    places = len(ranks)
    # Rounded first: 0.3 * 10 is a little above 3, which is no reason for a fourth place.
    exact_count = round(lam * places, 6)
    up = bool(torch.rand((), device=device, generator=generator) < 0.5)
    count = math.ceil(exact_count) if up else math.floor(exact_count)
    values = (torch.arange(places, device=device) < count).float()
    edge = int(places * min(max_soft, lam, 1 - lam))
    if edge:
        first, last = max(count - edge, 0), min(count + edge, places)
        values[first:last] = torch.linspace(1, 0, last - first, **exact)
    return torch.empty(places, **exact).scatter_(0, ranks, values).reshape(size)


class BatchMixing(nn.Module, ABC):
    """Base of the modules that mix a batch: call one on ``(images, labels)`` behind ``default_collate``.

    Args:
        num_classes: C of the soft labels; may be None for a callback, which keeps labels that pass for integers.
        generator: of the draws; None is torch's global one, which a data loader seeds for each worker.

    Raises:
        ValueError: when called without ``num_classes``.
    """

    def __init__(self, num_classes: int | None = None, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}")
        check_generator(generator)
        self.num_classes, self.generator = num_classes, generator

    @abstractmethod
    def mix(
        self, inputs: Tensor, targets: Tensor, *, num_classes: int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return mixed inputs and labels; without ``num_classes`` labels that pass for integers."""

    @check_types
    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed inputs and soft labels ``(N, C)``."""
        if self.num_classes is None:
            raise ValueError(f"{type(self).__name__} needs num_classes to make soft labels; pass num_classes=C")
        return self.mix(inputs, targets, num_classes=self.num_classes, generator=self.generator)


class Mixup(BatchMixing):
    """:func:`mixup` as a module, for a ``collate_fn``.

    Args:
        num_classes: C of the soft labels.
        alpha: of the Beta or Dirichlet distribution, above 0.
        label_lambda: ``"same"``, ``"independent"`` or the label share of the dominant input.
        same_side: give a label the larger share where its input has it.
        per_sample: draw shares for each sample.
        num_points: samples in a mixture, at least 2.
        generator: of the draws; None is torch's global one.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> from torch.utils.data import DataLoader, default_collate
        >>> data = [(torch.zeros(1, 4, 4), 0), (torch.ones(1, 4, 4), 1)]
        >>> mixing = Mixup(num_classes=2, generator=torch.Generator().manual_seed(0))
        >>> loader = DataLoader(data, batch_size=2, collate_fn=lambda samples: mixing(*default_collate(samples)))
        >>> images, labels = next(iter(loader))
        >>> images.shape, labels.shape
        (torch.Size([2, 1, 4, 4]), torch.Size([2, 2]))
    """

    @check_types
    def __init__(
        self,
        num_classes: int | None = None,
        *,
        alpha: float = 1.0,
        label_lambda: LabelLambda = "same",
        same_side: bool = True,
        per_sample: bool = False,
        num_points: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, generator=generator)
        _check_mixup(alpha, label_lambda, num_points)
        self.alpha, self.label_lambda, self.same_side = alpha, label_lambda, same_side
        self.per_sample, self.num_points = per_sample, num_points

    def mix(
        self, inputs: Tensor, targets: Tensor, *, num_classes: int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`mixup`."""
        return mixup(
            inputs,
            targets,
            num_classes=num_classes,
            alpha=self.alpha,
            label_lambda=self.label_lambda,
            same_side=self.same_side,
            per_sample=self.per_sample,
            num_points=self.num_points,
            generator=generator,
        )


class CutMix(BatchMixing):
    """:func:`cutmix` as a module, for a ``collate_fn``.

    Args:
        num_classes: C of the soft labels.
        alpha: of the Beta distribution, above 0.
        generator: of the draws; None is torch's global one.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> images, labels = CutMix(num_classes=3)(torch.rand(3, 1, 8, 8), torch.arange(3))
        >>> labels.shape
        torch.Size([3, 3])
    """

    @check_types
    def __init__(
        self, num_classes: int | None = None, *, alpha: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(num_classes, generator=generator)
        _check_above_0("alpha", alpha)
        self.alpha = alpha

    def mix(
        self, inputs: Tensor, targets: Tensor, *, num_classes: int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`cutmix`."""
        return cutmix(inputs, targets, num_classes=num_classes, alpha=self.alpha, generator=generator)


class FMix(BatchMixing):
    """:func:`fmix` as a module, for a ``collate_fn``.

    Args:
        num_classes: C of the soft labels.
        alpha: of the Beta distribution, above 0.
        decay: power by which frequencies are damped, at least 0.
        max_soft: share of the mask that may be a soft edge on either side, in [0, 0.5].
        per_sample: draw a share and a mask for each sample.
        generator: of the draws; None is torch's global one.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> images, labels = FMix(num_classes=3)(torch.rand(3, 1, 8, 8), torch.arange(3))
        >>> labels.shape
        torch.Size([3, 3])
    """

    @check_types
    def __init__(
        self,
        num_classes: int | None = None,
        *,
        alpha: float = 1.0,
        decay: float = 3.0,
        max_soft: float = 0.0,
        per_sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, generator=generator)
        _check_above_0("alpha", alpha)
        _check_fmix(decay, max_soft)
        self.alpha, self.decay, self.max_soft, self.per_sample = alpha, decay, max_soft, per_sample

    def mix(
        self, inputs: Tensor, targets: Tensor, *, num_classes: int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`fmix`."""
        return fmix(
            inputs,
            targets,
            num_classes=num_classes,
            alpha=self.alpha,
            decay=self.decay,
            max_soft=self.max_soft,
            per_sample=self.per_sample,
            generator=generator,
        )


class ForegroundRecombine(BatchMixing):
    r"""Put the foreground of an image onto the background of one of another class; the foreground's label stays.

    :math:`\tilde x = T(m x) + (1 - T(m))\, b_j` with a foreground mask :math:`m` and a small random rotation, scaling
    and shift :math:`T`. The background :math:`b_j` is an image of another class whose own foreground is painted over
    with the mean of the rest. What the net may then use is the foreground: backgrounds say nothing about the class.

    Inspired by De-DA, which separates and repaints the parts of an image with foundation models; this is not De-DA.

    Args:
        mask_fn: from images ``(N, C, H, W)`` to masks ``(N, 1, H, W)`` in [0, 1], 1 on the foreground.
        p: chance of an image to get a new background, in [0, 1].
        degrees: largest rotation, at least 0.
        scale: largest relative change of size, in [0, 1).
        translate: largest shift as a share of the image, in [0, 1].
        num_classes: C of the labels when called in a ``collate_fn``; None keeps integer labels there too.
        generator: of the draws; None is torch's global one.

    Shape:
        - inputs: ``(N, channels, H, W)`` floating-point; targets: ``(N,)`` integer
        - output: the same, or one-hot labels ``(N, C)`` with ``num_classes``

    Raises:
        ValueError: for an argument out of range, or a mask of the wrong shape.

    Example:
        >>> recombine = ForegroundRecombine(lambda x: (x > 0.5).float(), p=1.0, degrees=0, scale=0, translate=0)
        >>> images = torch.tensor([[0.9, 0.1], [0.3, 0.8]]).view(2, 1, 1, 2)  # a bright pixel on another ground each
        >>> mixed, labels = recombine(images, torch.tensor([0, 1]))
        >>> mixed.flatten(1), labels
        (tensor([[0.9000, 0.3000],
                [0.1000, 0.8000]]), tensor([0, 1]))

    Reference:
        The idea of recombining class-dependent and class-independent parts: "Decoupled Data Augmentation for Improving
        Image Classification" (De-DA), 2024.
    """

    @check_types
    def __init__(
        self,
        mask_fn: Callable[[Tensor], Tensor],
        p: float = 0.5,
        *,
        degrees: float = 10.0,
        scale: float = 0.1,
        translate: float = 0.1,
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, generator=generator)
        if not callable(mask_fn):
            raise TypeError(f"mask_fn must be a function from images to masks (N, 1, H, W), got {mask_fn!r}")
        for name, value in {"p": p, "translate": translate}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
        if not (0 <= degrees < math.inf and 0 <= scale < 1):
            raise ValueError(f"degrees must be at least 0 and scale in [0, 1), got {degrees!r} and {scale!r}")
        self.mask_fn, self.p = mask_fn, p
        self.degrees, self.scale, self.translate = degrees, scale, translate

    @check_types
    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return recombined images and their labels."""
        return self.mix(inputs, targets, num_classes=self.num_classes, generator=self.generator)

    def mix(
        self, inputs: Tensor, targets: Tensor, *, num_classes: int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return recombined images and their labels, one-hot with ``num_classes``."""
        _check_batch(inputs, targets)
        if inputs.ndim != 4 or targets.ndim != 1 or isinstance(targets, MixedLabels):
            raise ValueError(
                "ForegroundRecombine takes images (N, channels, H, W) and integer labels (N,), got "
                f"{tuple(inputs.shape)} and {type(targets).__name__} {tuple(targets.shape)}"
            )
        if targets.dtype in (torch.bool, torch.uint8) or targets.is_complex():
            raise ValueError(f"targets must be integer classes, got {targets.dtype}; use targets.long()")
        masks = self.mask_fn(inputs).float()
        if masks.shape != (len(inputs), 1, *inputs.shape[2:]):
            raise ValueError(
                f"mask_fn must return masks {(len(inputs), 1, *inputs.shape[2:])}, one for each image, got "
                f"{tuple(masks.shape)}"
            )
        rng = _rng(generator)
        # A background from another class, by random ranks; who finds none keeps its own.
        rank = torch.as_tensor(rng.random((len(inputs), len(inputs))), device=inputs.device)
        rank = rank.masked_fill(targets[:, None] == targets[None], -1.0)
        best, background = rank.max(1)
        chosen = torch.as_tensor(rng.random(len(inputs)), device=inputs.device) < self.p
        chosen = (chosen & (best >= 0)).view(-1, 1, 1, 1)
        moved = self._moved(torch.cat([inputs.float() * masks, masks], 1), rng)
        ground = (1 - masks) * inputs.float()
        mean = ground.sum((2, 3), keepdim=True) / (1 - masks).sum((2, 3), keepdim=True).clamp_min(1.0)
        mixed = moved[:, :-1] + (1 - moved[:, -1:]) * (ground + masks * mean)[background]
        whole = torch.ones(1, device=targets.device)
        labels = targets if num_classes is None else soft_labels(targets[None], whole, num_classes)
        return torch.where(chosen, mixed.to(inputs.dtype), inputs), labels

    def _moved(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        if not (self.degrees or self.scale or self.translate):
            return images
        n = len(images)
        angle = np.deg2rad(rng.uniform(-self.degrees, self.degrees, n))
        size = rng.uniform(1 - self.scale, 1 + self.scale, n)
        shift = rng.uniform(-self.translate, self.translate, (n, 2)) * 2  # the grid runs from -1 to 1
        cos, sin = np.cos(angle) / size, np.sin(angle) / size
        height, width = images.shape[2:]
        rows = [[cos, -sin * height / width, shift[:, 0]], [sin * width / height, cos, shift[:, 1]]]
        matrix = torch.as_tensor(np.stack([np.stack(row, 1) for row in rows], 1), dtype=images.dtype)
        grid = F.affine_grid(matrix.to(images.device), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


def _labels(targets: Tensor, orders: Tensor, shares: Tensor, num_classes: int | None) -> Tensor:
    if targets.ndim == 2:
        spread = shares.reshape(*shares.shape, *[1] * (3 - shares.ndim))
        return (spread * targets[orders].float()).sum(0)
    if num_classes is None:
        return MixedLabels(targets[orders], shares)
    return soft_labels(targets[orders], shares, num_classes)


def _masked(
    inputs: Tensor,
    targets: Tensor,
    masks: Tensor,
    share: Tensor,
    num_classes: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Mix by masks ``(1 or N, ...)`` with label shares ``(1 or N,)`` for what the ones show."""
    orders = _orders(len(inputs), 2, inputs.device, generator)
    masks = masks[:, None]
    mixed = masks * inputs + (1 - masks) * inputs[orders[1]]
    shares = torch.stack([share, 1 - share])
    shares = shares[:, 0] if len(share) == 1 else shares
    return mixed.to(inputs.dtype), _labels(targets, orders, shares, num_classes)


def _rng(generator: torch.Generator | None) -> np.random.Generator:
    """Return a numpy generator seeded by torch's; torch draws no Beta or Dirichlet values from a generator."""
    check_generator(generator)
    device = "cpu" if generator is None else generator.device
    words = torch.randint(2**31, (4,), generator=generator, device=device)
    return np.random.default_rng(words.tolist())


def _dirichlet(
    alpha: float, points: int, size: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Return shares ``(points, *size)`` that sum to 1, float32."""
    drawn = _rng(generator).dirichlet([alpha] * points, size or None)
    return torch.as_tensor(np.moveaxis(drawn, -1, 0).copy(), dtype=torch.float32, device=like.device)


def _orders(n: int, points: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Return the order itself and ``points - 1`` permutations of it, ``(points, n)``."""
    source = torch.device("cpu") if generator is None else generator.device
    permutations = [torch.randperm(n, generator=generator, device=source) for _ in range(points - 1)]
    return torch.stack([torch.arange(n, device=source), *permutations]).to(device)


def _label_shares(
    shares: Tensor, label_lambda: LabelLambda, same_side: bool, alpha: float, generator: torch.Generator | None
) -> Tensor:
    if label_lambda == "same":
        return shares
    if isinstance(label_lambda, str):
        own = _dirichlet(alpha, len(shares), tuple(shares.shape[1:]), shares, generator)
    else:
        own = torch.stack([torch.full_like(shares[0], label_lambda), torch.full_like(shares[0], 1 - label_lambda)])
    if not same_side:
        return own
    # The k-th largest share of the labels goes where the k-th largest of the inputs is.
    ranks = shares.argsort(0, descending=True).argsort(0)
    return own.sort(0, descending=True).values.gather(0, ranks)


def _spread(share: Tensor, inputs: Tensor) -> Tensor:
    """Return a share ``()`` or ``(N,)`` such that it multiplies inputs ``(N, ...)``."""
    return share.reshape(-1, *[1] * (inputs.ndim - 1))


def _check_batch(inputs: Tensor, targets: Tensor, *, spatial: bool = False) -> None:
    if not inputs.is_floating_point():
        raise TypeError(f"inputs must be floating-point to be mixed, got {inputs.dtype}; convert them, images / 255")
    if spatial and not 3 <= inputs.ndim <= 5:
        raise ValueError(
            "inputs must be (N, channels, ...) with one to three spatial dimensions, got "
            f"{tuple(inputs.shape)}; mixup mixes inputs of any shape"
        )
    if isinstance(targets, MixedLabels):
        raise ValueError("the labels are mixed already; mix a batch once")
    if targets.shape[:1] != inputs.shape[:1] or targets.ndim != (2 if targets.is_floating_point() else 1):
        raise ValueError(
            f"targets must be integer classes (N,) or soft labels (N, C) for {len(inputs)} inputs, got "
            f"{tuple(targets.shape)} {targets.dtype}"
        )


def _check_mixup(alpha: float, label_lambda: LabelLambda, num_points: int) -> None:
    _check_above_0("alpha", alpha)
    if not (isinstance(num_points, int) and num_points >= 2):
        raise ValueError(f"num_points must be an integer of at least 2, got {num_points!r}")
    if isinstance(label_lambda, str):
        if label_lambda not in ("same", "independent"):
            raise ValueError(f"label_lambda must be 'same', 'independent' or a number, got {label_lambda!r}")
    elif not 0 <= label_lambda <= 1:
        raise ValueError(f"label_lambda must lie in [0, 1], got {label_lambda!r}")
    elif num_points != 2:
        raise ValueError(f"a number as label_lambda needs num_points=2, got {num_points}; take 'independent'")


def _check_fmix(decay: float, max_soft: float) -> None:
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be at least 0 and finite, got {decay!r}")
    if not 0 <= max_soft <= 0.5:
        raise ValueError(f"max_soft must lie in [0, 0.5], got {max_soft!r}")


def _check_above_0(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {value!r}")
