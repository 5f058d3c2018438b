"""How fresh networks are trained on a synthetic set, so that its accuracy can be compared: the named protocols."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.augmentation import AugmentationVariant
from lightning_plugins.distillation.synthetic_set import SyntheticSet

__all__ = ["PROTOCOLS", "Protocol", "protocol_named"]


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
            >>> import torch
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
