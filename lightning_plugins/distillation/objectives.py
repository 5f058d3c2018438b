"""What the synthetic images are to have in common with the real ones: all classes in one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.augmentation import AugmentationDraw, SiameseAugmentation
from lightning_plugins.distillation.characteristic_function import (
    FrequencySampler,
    characteristic_sums,
    discrepancy_per_class,
    unit_rows,
)
from lightning_plugins.distillation.flip import FlipUnion
from lightning_plugins.distillation.memory import images_per_tile, tile_bytes
from lightning_plugins.distillation.pool import ClassPool, RealBatch
from lightning_plugins.features import PenultimateFeatures, classifier_layer

__all__ = [
    "CalibrationTerm",
    "CharacteristicFunction",
    "DistributionMatching",
    "GradientMatching",
    "Objective",
    "ObjectiveDraw",
    "ObjectiveLoss",
]


@dataclass(frozen=True)
class ObjectiveDraw:
    """What is random in one step, so that the classes may be handled in several calls.

    Attributes:
        augmentation: draws of the augmentation; empty without one.
        frequencies: ``(K, D)``, for the objective that has them.
    """

    augmentation: tuple[AugmentationDraw, ...] = ()
    frequencies: Tensor | None = None


@dataclass(frozen=True)
class ObjectiveLoss:
    """The loss of some classes.

    Attributes:
        per_class: ``(c,)``, with gradient to the synthetic images of each class.
        quantities: for the log, without gradient, scalar; empty unless asked for.
    """

    per_class: Tensor
    quantities: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The sum over the classes, which is to be minimised."""
        return self.per_class.sum()


class Objective(ABC):
    """A loss between real and synthetic images, seen through a network.

    Synthetic images come decoded and normalised. They pass through the flip union, then, with the draw that the real
    ones get, through the augmentation, then through the network. Gradients go to the synthetic images alone, whether
    the network is frozen or not. A call may have any contiguous range of classes: to keep memory low, call once per
    group of classes with the same :meth:`draw`, and backward in between.

    Args:
        augmentation: shared by real and synthetic images; None for none.
        flip: None for none.
        tile_size: most real images in the network at once; None asks :func:`images_per_tile`.

    Attributes:
        needs_all_classes: whether a call must have all classes of the set; False unless a subclass says otherwise.

    Raises:
        ValueError: if ``tile_size`` is below 1.
    """

    needs_all_classes = False

    @check_types
    def __init__(
        self,
        *,
        augmentation: SiameseAugmentation | None = None,
        flip: FlipUnion | None = None,
        tile_size: int | None = None,
    ) -> None:
        if tile_size is not None and tile_size < 1:
            raise ValueError(f"tile_size must be at least 1, or None to choose, got {tile_size!r}")
        self.augmentation = augmentation
        self.flip = flip
        self.tile_size = tile_size
        self._measured: dict[tuple[Any, ...], int] = {}

    def prepare(self, factory: Callable[[], nn.Module], pool: ClassPool) -> None:  # noqa: B027
        """Make what needs the real images, before the first step; nothing, unless a subclass does.

        Args:
            factory: makes a fresh network.
            pool: the real images.
        """

    def draw(self, net: nn.Module, num_classes: int) -> ObjectiveDraw:
        """Draw what is random in one step.

        Args:
            net: the network of the step.
            num_classes: of the whole set.
        """
        return ObjectiveDraw(() if self.augmentation is None else self.augmentation.draw(num_classes))

    @abstractmethod
    def loss(
        self,
        net: nn.Module,
        real: RealBatch,
        synthetic: Tensor,
        *,
        draw: ObjectiveDraw | None = None,
        details: bool = False,
    ) -> ObjectiveLoss:
        """Compare synthetic with real images of the same classes.

        Args:
            net: from images ``(N, channels, H, W)`` to logits, on the images' device.
            real: images of some classes.
            synthetic: images of the same classes.
            draw: of this step; None draws.
            details: whether to compute quantities for the log.

        Shape:
            - synthetic: ``(c, m, channels, H, W)``

        Raises:
            ValueError: if there are not as many synthetic as real classes.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of everything that draws, and what the flip union found."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"augmentation": self.augmentation, "flip": self.flip}
        return {name: part for name, part in parts.items() if part is not None}

    def _prepared(self, synthetic: Tensor, classes: range, draw: ObjectiveDraw) -> Tensor:
        if self.flip is not None:
            synthetic = self.flip.per_class(synthetic, classes=classes)
        return self._augmented(synthetic, classes, draw)

    def _augmented(self, images: Tensor, classes: range, draw: ObjectiveDraw) -> Tensor:
        if self.augmentation is None:
            return images
        return self.augmentation.apply(images, draw.augmentation, classes=classes)

    def _real_tiles(self, real: RealBatch, draw: ObjectiveDraw, size: int) -> Iterator[tuple[slice, Tensor]]:
        for rows, images in real.tiles(size):
            classes = real.classes[rows]
            if self.flip is not None:
                images = self.flip.per_class(images, classes=classes, side="real")
            yield rows, self._augmented(images, classes, draw)

    def _tile(self, net: nn.Module, real: RealBatch) -> int:
        if self.tile_size is not None:
            return self.tile_size
        key = (id(net), *real.source.shape[1:], real.source.device.type)
        if key not in self._measured:
            self._measured = {key: images_per_tile(net, tuple(real.source.shape[1:]), real.source.device)}
        return self._measured[key]

    @staticmethod
    def _check(real: RealBatch, synthetic: Tensor) -> None:
        if synthetic.ndim != 5 or len(synthetic) != len(real.indices) or not synthetic.numel():
            raise ValueError(
                f"synthetic images ({len(real.indices)}, m, channels, H, W) were expected, one row for each class of "
                f"the real batch, got {tuple(synthetic.shape)}"
            )


class CharacteristicFunction(Objective):
    """Match the characteristic functions of features: neural characteristic function matching (NCFM).

    All classes of a step share the frequencies; the law of each class's gradient is that of own frequencies.

    Args:
        frequencies: where to compare; None for ``FrequencySampler()``.
        alpha: weight of the amplitudes, at least 0.
        beta: weight of the phases, at least 0.
        factor: of the loss.
        augmentation: see :class:`Objective`.
        flip: see :class:`Objective`.
        tile_size: see :class:`Objective`.

    Example:
        >>> from lightning_plugins.models import convnet3
        >>> objective = CharacteristicFunction(FrequencySampler(64))
        >>> synthetic = torch.rand(2, 3, 1, 8, 8, requires_grad=True)
        >>> real = RealBatch.of(torch.rand(2, 5, 1, 8, 8))
        >>> net = convnet3(num_classes=2, in_channels=1, image_size=8, width=4)
        >>> objective.loss(net, real, synthetic).total.backward()
        >>> synthetic.grad.shape
        torch.Size([2, 3, 1, 8, 8])

    Reference:
        S. Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective", CVPR 2025.
    """

    @check_types
    def __init__(
        self,
        frequencies: FrequencySampler | None = None,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        factor: float = 300.0,
        augmentation: SiameseAugmentation | None = None,
        flip: FlipUnion | None = None,
        tile_size: int | None = None,
    ) -> None:
        super().__init__(augmentation=augmentation, flip=flip, tile_size=tile_size)
        if not (alpha >= 0 and beta >= 0 and factor > 0):
            raise ValueError(
                f"alpha and beta must be at least 0 and factor above 0, got {alpha!r}, {beta!r} and {factor!r}"
            )
        self.frequencies = FrequencySampler() if frequencies is None else frequencies
        self.alpha, self.beta, self.factor = alpha, beta, factor

    def draw(self, net: nn.Module, num_classes: int) -> ObjectiveDraw:
        """Draw the augmentation and the frequencies."""
        layer = classifier_layer(net)
        frequencies = self.frequencies.draw(layer.in_features, layer.weight.device)
        return ObjectiveDraw(super().draw(net, num_classes).augmentation, frequencies)

    @check_types
    def loss(
        self,
        net: nn.Module,
        real: RealBatch,
        synthetic: Tensor,
        *,
        draw: ObjectiveDraw | None = None,
        details: bool = False,
    ) -> ObjectiveLoss:
        """Return ``factor`` times the discrepancy of each class; with a sampling network, differentiable in it too."""
        self._check(real, synthetic)
        draw = self.draw(net, max(real.classes) + 1) if draw is None else draw
        if draw.frequencies is None:
            raise ValueError("the draw has no frequencies; take it from this objective's draw()")
        phi_real = self._real(net, real, draw, draw.frequencies)
        features = unit_rows(_features(net, self._prepared(synthetic, real.classes, draw)))
        phi = characteristic_sums(features, draw.frequencies) / features.shape[1]
        per_class = self.factor * discrepancy_per_class(phi_real, phi, alpha=self.alpha, beta=self.beta)
        if not details:
            return ObjectiveLoss(per_class)
        with torch.no_grad():
            moduli = [part.detach().square().sum(0).sqrt() for part in (phi_real, phi)]
            squared = (phi_real - phi).square().sum(0).mean()
            quantities = {
                "squared_difference": squared,
                "amplitude_share": (moduli[0] - moduli[1]).square().mean() / squared.clamp_min(1e-12),
                "modulus_real": moduli[0].mean(),
                "modulus_synthetic": moduli[1].mean(),
            }
        return ObjectiveLoss(per_class, quantities)

    def _real(self, net: nn.Module, real: RealBatch, draw: ObjectiveDraw, frequencies: Tensor) -> Tensor:
        collect = frequencies.requires_grad  # the sampling network needs the features of all real images again
        kept: list[Tensor] = []
        sums = frequencies.new_zeros(2, len(real.indices), len(frequencies))
        count = 0
        # Several tiles share a matrix product: one of few rows takes longer to read the frequencies than to multiply.
        most = tile_bytes(frequencies.device) // (4 * max(frequencies.shape))
        waiting: list[Tensor] = []
        classes: list[int] = []

        def project() -> None:
            if waiting:
                index = torch.tensor(classes, device=sums.device)
                sums.index_add_(1, index, characteristic_sums(torch.cat(waiting), frequencies).to(sums.dtype))
                waiting.clear()
                classes.clear()

        with torch.no_grad():
            for rows, images in self._real_tiles(real, draw, self._tile(net, real)):
                features = unit_rows(_features(net, images))
                if collect:
                    kept.append(features.flatten(0, 1))
                else:
                    size = features.shape[1]
                    if waiting and (waiting[0].shape[1] != size or (len(classes) + len(features)) * size > most):
                        project()
                    waiting.append(features)
                    classes.extend(range(*rows.indices(len(real.indices))))
                if rows.start == 0:
                    count += features.shape[1]
            project()
        if collect:
            sums = characteristic_sums(torch.cat(kept).view(len(real.indices), count, -1), frequencies)
        return sums / count

    def _parts(self) -> dict[str, Any]:
        return super()._parts() | {"frequencies": self.frequencies}


class DistributionMatching(Objective):
    """Match the mean features of every class: the squared distance of the means.

    Args:
        augmentation: see :class:`Objective`.
        flip: see :class:`Objective`.
        tile_size: see :class:`Objective`.

    Reference:
        B. Zhao, H. Bilen, "Dataset Condensation with Distribution Matching", WACV 2023, equation 4.
    """

    @check_types
    def loss(
        self,
        net: nn.Module,
        real: RealBatch,
        synthetic: Tensor,
        *,
        draw: ObjectiveDraw | None = None,
        details: bool = False,
    ) -> ObjectiveLoss:
        """Return the squared distance of the mean features of each class."""
        self._check(real, synthetic)
        draw = self.draw(net, max(real.classes) + 1) if draw is None else draw
        size = classifier_layer(net).in_features
        sums = torch.zeros(len(real.indices), size, device=synthetic.device, dtype=_wide(synthetic.dtype))
        count = 0
        with torch.no_grad():
            for rows, images in self._real_tiles(real, draw, self._tile(net, real)):
                sums[rows] += _features(net, images).to(sums.dtype).sum(1)
                count += images.shape[1] if rows.start == 0 else 0
        mean = _features(net, self._prepared(synthetic, real.classes, draw)).to(sums.dtype).mean(1)
        per_class = (mean - sums / count).square().sum(1)
        quantities = {"mean_norm": (sums / count).norm(dim=1).mean()} if details else {}
        return ObjectiveLoss(per_class, quantities)


class GradientMatching(Objective):
    """Match the gradients of the classification loss with respect to the network's weights.

    Args:
        distance: ``"cosine"``: 1 minus the cosine of each output channel's gradient, summed over channels and layers;
            biases and normalisation do not count (DC, DSA). ``"l1"`` and ``"mse"``: sums of absolute and of squared
            differences over the weights of the convolutions (IDC).
        vectorised: True takes the gradients of all classes in one call of ``vmap``, False one class after the other;
            None chooses True on accelerators.
        augmentation: see :class:`Objective`.
        flip: see :class:`Objective`.
        tile_size: see :class:`Objective`.

    Raises:
        ValueError: if an argument is out of range; in :meth:`loss`, if the network has no weights that match.

    Reference:
        B. Zhao, K. R. Mopuri, H. Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021, equation 9;
        J.-H. Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022.
    """

    @check_types
    def __init__(
        self,
        distance: Literal["cosine", "l1", "mse"] = "cosine",
        *,
        vectorised: bool | None = None,
        augmentation: SiameseAugmentation | None = None,
        flip: FlipUnion | None = None,
        tile_size: int | None = None,
    ) -> None:
        super().__init__(augmentation=augmentation, flip=flip, tile_size=tile_size)
        if distance not in ("cosine", "l1", "mse"):
            raise ValueError(f"distance must be 'cosine', 'l1' or 'mse', got {distance!r}")
        self.distance = distance
        self.vectorised = vectorised

    @check_types
    def loss(
        self,
        net: nn.Module,
        real: RealBatch,
        synthetic: Tensor,
        *,
        draw: ObjectiveDraw | None = None,
        details: bool = False,
    ) -> ObjectiveLoss:
        """Return the distance of the gradients of each class."""
        self._check(real, synthetic)
        draw = self.draw(net, max(real.classes) + 1) if draw is None else draw
        weights = {
            name: value.detach().requires_grad_()
            for name, value in net.named_parameters()
            if (value.ndim > 1 if self.distance == "cosine" else value.ndim == 4)
        }
        if not weights:
            raise ValueError(f"{type(net).__name__} has no weights for the distance {self.distance!r}; try 'cosine'")
        gradients = self._per_class if self._all_at_once(synthetic) else self._one_by_one
        labels = torch.tensor(list(real.classes), device=synthetic.device)
        targets = {name: torch.zeros(len(labels), *value.shape, device=value.device) for name, value in weights.items()}
        tile = self._tile(net, real)
        count = 0
        for rows, images in self._real_tiles(real, draw, tile):
            parts = gradients(net, weights, images, labels[rows], False)
            for name, part in parts.items():
                targets[name][rows] += part.detach() * images.shape[1]
            count += images.shape[1] if rows.start == 0 else 0
        found = gradients(net, weights, self._prepared(synthetic, real.classes, draw), labels, True)
        per_class = torch.stack([self._distance(found[name], targets[name] / count) for name in weights]).sum(0)
        if not details:
            return ObjectiveLoss(per_class)
        norms = {"gradient_norm": _norm(targets) / count, "gradient_norm_synthetic": _norm(found)}
        return ObjectiveLoss(per_class, norms)

    def _distance(self, found: Tensor, target: Tensor) -> Tensor:
        # (classes, outputs, rest)
        found, target = found.flatten(2), target.flatten(2)
        if self.distance == "l1":
            return (found - target).abs().sum((1, 2))
        if self.distance == "mse":
            return (found - target).square().sum((1, 2))
        # The roots would have infinite slope at a filter without gradient.
        norms = [(rows.square().sum(2) + 1e-20).sqrt() for rows in (found, target)]
        return (1 - (found * target).sum(2) / (norms[0] * norms[1] + 1e-6)).sum(1)

    def _all_at_once(self, images: Tensor) -> bool:
        return images.device.type != "cpu" if self.vectorised is None else self.vectorised

    @staticmethod
    def _one_by_one(
        net: nn.Module, weights: dict[str, Tensor], images: Tensor, labels: Tensor, create_graph: bool
    ) -> dict[str, Tensor]:
        rows = []
        with torch.enable_grad():
            for part, label in zip(images, labels, strict=True):
                value = _class_loss(net)(weights, part, label)
                rows.append(torch.autograd.grad(value, list(weights.values()), create_graph=create_graph))
        return {name: torch.stack(parts) for name, parts in zip(weights, zip(*rows, strict=True), strict=True)}

    @staticmethod
    def _per_class(
        net: nn.Module, weights: dict[str, Tensor], images: Tensor, labels: Tensor, create_graph: bool
    ) -> dict[str, Tensor]:
        weights = {name: value.detach() for name, value in weights.items()}
        with torch.set_grad_enabled(create_graph):
            gradients: dict[str, Tensor] = vmap(grad(_class_loss(net)), in_dims=(None, 0, 0))(weights, images, labels)
        return gradients


class CalibrationTerm:
    """The classification loss of trained networks on the synthetic images, a second pass of NCFM.

    Args:
        weight: of the term, at least 0.
        augmentation: None for none.
        flip: None for none.

    Raises:
        ValueError: if ``weight`` is negative.

    Example:
        >>> from lightning_plugins.models import convnet3
        >>> net = convnet3(num_classes=2, in_channels=1, image_size=8, width=4)
        >>> CalibrationTerm().loss(net, torch.rand(2, 3, 1, 8, 8)).per_class.shape
        torch.Size([2])
    """

    @check_types
    def __init__(
        self, weight: float = 1.0, *, augmentation: SiameseAugmentation | None = None, flip: FlipUnion | None = None
    ) -> None:
        if not weight >= 0:
            raise ValueError(f"weight must be at least 0, got {weight!r}")
        self.weight = weight
        self.augmentation = augmentation
        self.flip = flip

    @check_types
    def loss(
        self,
        net: nn.Module,
        synthetic: Tensor,
        *,
        classes: range | None = None,
        draws: tuple[AugmentationDraw, ...] | None = None,
    ) -> ObjectiveLoss:
        """Return ``weight`` times the mean cross-entropy of each class.

        Args:
            net: trained.
            synthetic: decoded and normalised images.
            classes: of the images; None for ``0 .. c - 1``.
            draws: of the augmentation; None draws.

        Shape:
            - synthetic: ``(c, m, channels, H, W)``

        Raises:
            ValueError: for another shape, or as many classes as there are not.
        """
        if synthetic.ndim != 5 or not synthetic.numel() or (classes is not None and len(classes) != len(synthetic)):
            raise ValueError(
                f"synthetic images (c, m, channels, H, W), c classes, were expected, got {tuple(synthetic.shape)}"
            )
        classes = range(len(synthetic)) if classes is None else classes
        if self.flip is not None:
            synthetic = self.flip.per_class(synthetic, classes=classes)
        if self.augmentation is not None:
            draws = self.augmentation.draw(max(classes) + 1) if draws is None else draws
            synthetic = self.augmentation.apply(synthetic, draws, classes=classes)
        logits = _logits(net, synthetic.flatten(0, 1))
        labels = torch.arange(classes.start, classes.stop, device=logits.device).repeat_interleave(synthetic.shape[1])
        losses = F.cross_entropy(logits.to(_wide(logits.dtype)), labels, reduction="none")
        return ObjectiveLoss(self.weight * losses.view(len(classes), -1).mean(1))


def _features(net: nn.Module, images: Tensor) -> Tensor:
    """Penultimate features ``(c, m, D)`` of images ``(c, m, channels, H, W)``."""
    with PenultimateFeatures(net) as features:
        _logits(net, images.flatten(0, 1))
    return features.last.flatten(1).view(*images.shape[:2], -1)


def _logits(net: nn.Module, images: Tensor) -> Tensor:
    weights: dict[str, Tensor] = dict(net.named_parameters())
    if any(value.requires_grad for value in weights.values()):
        # Gradients of the weights would be computed in vain, and added to those of whoever trains the network.
        weights = {name: value.detach() for name, value in weights.items()}
        logits: Tensor = functional_call(net, weights, (images,))
    else:
        logits = net(images)
    return logits


def _class_loss(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    others = {name: value.detach() for name, value in net.named_parameters()}

    def loss(weights: dict[str, Tensor], images: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(net, others | weights, (images,))
        return F.cross_entropy(logits, label.expand(len(images)))

    return loss


def _norm(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([part.detach().square().sum() for part in parts.values()]).sum().sqrt()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
