"""Attacks with their numbers: what a callback or a recipe names, and calls with a network and a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_plugins.checks import check_types
from lightning_plugins.robustness.apgd import ApgdLoss, apgd
from lightning_plugins.robustness.attack import AttackResult, LogitsFn
from lightning_plugins.robustness.auto_attack import Version, auto_attack
from lightning_plugins.robustness.fab import fab
from lightning_plugins.robustness.perturbation import Bounds, Norm
from lightning_plugins.robustness.pgd import fgsm, pgd
from lightning_plugins.robustness.square import square

__all__ = ["APGDAttack", "Attack", "AutoAttack", "FABAttack", "FGSMAttack", "PGDAttack", "SquareAttack"]


class Attack(ABC):
    """Base of the attacks: frozen dataclasses with a radius and a norm.

    Attributes:
        eps: radius on the [0, 1] pixel scale, at least 0.
        norm: ``"linf"`` or ``"l2"``.

    Raises:
        ValueError: for a negative radius or another norm.
    """

    eps: float
    norm: Norm

    def __post_init__(self) -> None:
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps must be at least 0, got {self.eps!r}")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")

    def with_eps(self, eps: float) -> Attack:
        """Return the same attack with another radius."""
        return replace(self, eps=eps)  # type: ignore[type-var]

    @check_types
    def __call__(
        self,
        logits_fn: LogitsFn,
        inputs: Tensor,
        targets: Tensor,
        *,
        generator: torch.Generator | None = None,
        bounds: Bounds = (0.0, 1.0),
    ) -> AttackResult:
        """Attack a batch.

        Args:
            logits_fn: from images ``(N, ...)`` to logits ``(N, C)``.
            inputs: images inside ``bounds``.
            targets: true classes ``(N,)``.
            generator: of all randomness; default one seeded with 0.
            bounds: lowest and highest valid value.
        """
        return self._attack()(logits_fn, inputs, targets, bounds=bounds, generator=generator, **self._arguments())

    @abstractmethod
    def _attack(self) -> Callable[..., AttackResult]:
        """Return the function that attacks."""

    def _arguments(self) -> dict[str, Any]:
        """Return what the function takes beside the batch: the fields, which have its names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@check_types
@dataclass(frozen=True)
class PGDAttack(Attack):
    """Projected gradient descent; see :func:`.pgd`.

    Args:
        eps: radius on the [0, 1] pixel scale.
        norm: ``"linf"`` or ``"l2"``.
        step_size: length of a step; default a quarter of the radius.
        num_steps: at least 1.
        num_restarts: from different points; the strongest result counts.
        random_start: start inside the ball instead of at the input.
        loss: ``"ce"``, ``"cw"`` or ``"dlr"``; training objectives may need another one.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> attack = PGDAttack(eps=0.1, num_steps=3)
        >>> model = torch.nn.Linear(4, 2)
        >>> attack(model, torch.full((5, 4), 0.5), torch.zeros(5, dtype=torch.long)).adversarial.shape
        torch.Size([5, 4])
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    step_size: float | None = None
    num_steps: int = 10
    num_restarts: int = 1
    random_start: bool = True
    loss: Literal["ce", "cw", "dlr"] = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 1 or self.num_restarts < 1:
            raise ValueError(
                f"num_steps and num_restarts must be at least 1, got {self.num_steps!r} and {self.num_restarts!r}"
            )
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size must be above 0, got {self.step_size!r}")
        if self.loss not in ("ce", "cw", "dlr"):
            raise ValueError(f"loss must be 'ce', 'cw' or 'dlr', got {self.loss!r}")

    @property
    def relative_step(self) -> float:
        """The length of a step as a share of the radius."""
        return 0.25 if self.step_size is None or self.eps == 0 else self.step_size / self.eps

    def _attack(self) -> Callable[..., AttackResult]:
        return pgd

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | {"step_size": self.relative_step * self.eps}


@check_types
@dataclass(frozen=True)
class FGSMAttack(Attack):
    """One step of the whole radius; see :func:`.fgsm`. Too weak to measure robustness by.

    Args:
        eps: radius on the [0, 1] pixel scale.
        norm: ``"linf"`` or ``"l2"``.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"

    def _attack(self) -> Callable[..., AttackResult]:
        def without_generator(*args: Any, generator: torch.Generator | None, **arguments: Any) -> AttackResult:
            return fgsm(*args, **arguments)

        return without_generator


@check_types
@dataclass(frozen=True)
class APGDAttack(Attack):
    """PGD with automatic step size; see :func:`.apgd`. ``loss="dlr_targeted"`` alone nearly equals AutoAttack.

    Args:
        eps: radius on the [0, 1] pixel scale.
        norm: ``"linf"`` or ``"l2"``.
        loss: ``"ce"``, ``"dlr"`` or ``"dlr_targeted"``.
        num_steps: at least 1.
        num_restarts: from different points.
        num_targets: wrong classes to aim at, for the targeted loss.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    loss: ApgdLoss = "dlr_targeted"
    num_steps: int = 100
    num_restarts: int = 1
    num_targets: int = 9

    def _attack(self) -> Callable[..., AttackResult]:
        return apgd


@check_types
@dataclass(frozen=True)
class FABAttack(Attack):
    """The nearest decision boundary, counted where it lies within ``eps``; see :func:`.fab`.

    Args:
        eps: radius on the [0, 1] pixel scale.
        norm: ``"linf"`` or ``"l2"``.
        num_steps: at least 1.
        num_targets: wrong classes to aim at.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    num_steps: int = 100
    num_targets: int = 9

    def _attack(self) -> Callable[..., AttackResult]:
        return fab


@check_types
@dataclass(frozen=True)
class SquareAttack(Attack):
    """Random search without gradients; see :func:`.square`.

    Args:
        eps: radius on the [0, 1] pixel scale.
        norm: ``"linf"`` or ``"l2"``.
        num_queries: forward passes.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    num_queries: int = 5000

    def _attack(self) -> Callable[..., AttackResult]:
        return square


@check_types
@dataclass(frozen=True)
class AutoAttack(Attack):
    """The cascade that published robust accuracies are measured by; see :func:`.auto_attack`.

    Args:
        eps: radius on the [0, 1] pixel scale.
        norm: ``"linf"`` or ``"l2"``.
        version: ``"standard"``, ``"plus"`` or ``"rand"`` (for randomised defences).
        num_steps: of the gradient attacks.
        num_queries: of the random search.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    version: Version = "standard"
    num_steps: int = 100
    num_queries: int = 5000

    def _attack(self) -> Callable[..., AttackResult]:
        return auto_attack
