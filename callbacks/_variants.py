"""The states in which one module can be evaluated: the precisions of one net, a plain net beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import lightning.pytorch as pl


class HasVariants(ABC):
    """Marks a callback by which a module can be evaluated in several states, each under a name.

    Attributes:
        active_variant: the state that the module is in, inside of :meth:`variant`; None outside, where it is at rest.
        another_net: whether the states are those of another net than the Trainer's.
    """

    active_variant: str | None = None
    another_net = False

    @abstractmethod
    def variant_names(self) -> tuple[str, ...]:
        """Return the names of the states, such as ``"4bit"``; they end the names of what is measured there."""

    @abstractmethod
    def variant(self, pl_module: pl.LightningModule, name: str) -> AbstractContextManager[pl.LightningModule]:
        """Give the module to evaluate in a state, for as long as the context lasts: the same one, or another."""

    @abstractmethod
    def variant_bytes(self, pl_module: pl.LightningModule, name: str) -> int | None:
        """Return the size of a file with the state alone; None if nobody knows."""


def variants(trainer: pl.Trainer) -> dict[str, HasVariants]:
    """Return the states in which the module of a Trainer can be evaluated, each with the callback that switches to it.

    Args:
        trainer: the Trainer whose callbacks are asked.
    """
    return {name: owner for owner in _owners(trainer) for name in owner.variant_names()}


def active_variant(trainer: pl.Trainer) -> str | None:
    """Return the state that the module is in just now; None where it is at rest."""
    return next((owner.active_variant for owner in _owners(trainer) if owner.active_variant is not None), None)


def variant_ending(name: str) -> str:
    """Return what ends the names of what is measured in a state; nothing for the one at rest, whose name is empty."""
    return f"_{name}" if name else ""


def _owners(trainer: pl.Trainer) -> list[HasVariants]:
    return [callback for callback in getattr(trainer, "callbacks", []) if isinstance(callback, HasVariants)]
