"""The callbacks around another one in a training step, and those inside of it."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_plugins.callbacks.training_step import TrainingStepCallback


def before(trainer: pl.Trainer, callback: pl.Callback) -> list[TrainingStepCallback]:
    """Return the callbacks that stand before this one, which are around it in a training step."""
    callbacks = _all(trainer)
    return _of_the_step(callbacks[: callbacks.index(callback)]) if callback in callbacks else []


def behind(trainer: pl.Trainer, callback: pl.Callback) -> list[TrainingStepCallback]:
    """Return the callbacks that stand behind this one, which are inside of it in a training step."""
    callbacks = _all(trainer)
    return _of_the_step(callbacks[callbacks.index(callback) + 1 :]) if callback in callbacks else []


def _all(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(getattr(trainer, "callbacks", []))


def _of_the_step(callbacks: list[pl.Callback]) -> list[TrainingStepCallback]:
    return [callback for callback in callbacks if isinstance(callback, TrainingStepCallback)]
