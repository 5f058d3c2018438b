"""Which callbacks go together in one Trainer, and in which order: all rules in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

Trait = Callable[[pl.Callback], bool]

_SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def _has(*names: str) -> Trait:
    return lambda callback: any(getattr(callback, name, False) for name in names)


def _both(one: Trait, other: Trait) -> Trait:
    return lambda callback: one(callback) and other(callback)


def _lacks(trait: Trait) -> Trait:
    return lambda callback: not trait(callback)


def _averages(callback: pl.Callback) -> bool:
    return isinstance(callback, (WeightAveraging, StochasticWeightAveraging))


_owns_loss = _has("replaces_loss", "adds_to_loss")


@dataclass(frozen=True)
class _Rule:
    """What is refused: a callback of the first kind before one of the second in the list, and why.

    Attributes:
        sentence: names them as ``{first}`` and ``{second}``.
        swap: the other order works; otherwise it is refused too.
    """

    first: Trait
    second: Trait
    sentence: str
    swap: bool = True


# The first rule that a pair breaks is the one it reads about. In a training step the first of two callbacks is around
# the second.
_RULES = (
    _Rule(
        _has("around_training_step"),
        _has("copies_module"),
        "{second} copies the module as it is without other callbacks and must stand before {first}",
    ),
    _Rule(
        _has("converts_layers"),
        _has("converts_layers"),
        "{first} and {second} both convert the layers of the module; leave one of them out",
        swap=False,
    ),
    _Rule(
        _has("makes_layers_binary"),
        _has("quantizes_afterwards"),
        "{second} finds no layers to quantize in a net that {first} makes binary; leave one of them out",
        swap=False,
    ),
    _Rule(
        _has("attacks_batch"),
        _has("attacks_batch"),
        "{first} and {second} both attack the batch; leave one of them out",
        swap=False,
    ),
    _Rule(
        _has("replaces_loss"),
        _has("replaces_loss"),
        "{first} replaces the loss and would ignore that of {second}; leave one of them out",
        swap=False,
    ),
    _Rule(
        _has("remembers_predictions"),
        _has("mixes_samples"),
        "{first} softens the targets of a sample by what it predicted for that sample before, and {second} leaves no "
        "sample as it is; leave one of them out",
        swap=False,
    ),
    _Rule(
        _both(_has("attacks_batch"), _lacks(_has("replays_batch"))),
        _has("repeats_step"),
        "{second} perturbs the weights for the whole loss of {first} and must stand before it",
    ),
    _Rule(
        _owns_loss,
        _has("repeats_step"),
        "{second} would perturb the weights for the loss as it was before {first} changes it, and must stand before it",
    ),
    _Rule(
        _has("replaces_loss"),
        _has("adds_to_loss"),
        "{first} replaces the loss and would ignore what {second} adds to it, which must stand before it",
    ),
    _Rule(
        _both(_owns_loss, _lacks(_has("ignores_targets"))),
        _has("changes_targets"),
        "{first} would compute its loss from the targets that {second} has yet to change; it must stand behind "
        "{second}",
    ),
    _Rule(
        _has("changes_batch", "changes_targets"),
        _has("replays_batch"),
        "{second} replays the Trainer's batch and would drop what {first} makes of it; it must stand before {first}",
    ),
    _Rule(
        _owns_loss,
        _has("backpropagates"),
        "{second} backpropagates a loss at every precision and hands on the last one, so {first} would change that "
        "one alone; {second} must stand before it",
    ),
    _Rule(
        _has("repeats_step"),
        _has("backpropagates"),
        "{first} runs the step twice for one gradient, and {second} takes gradients inside of it; {second} must stand "
        "before it",
    ),
    _Rule(
        lambda callback: _averages(callback) or isinstance(callback, ModelPruning),
        _has("converts_layers"),
        "{first} looks at the module's layers when fit starts, before {second} converts them; {second} must stand "
        "before it",
    ),
    _Rule(
        _has("reads_final_weights"),
        _averages,
        "{second} changes the weights at the end of training, after {first} has used them; put {first} behind it",
    ),
    _Rule(
        _both(_has("reads_final_weights"), _lacks(_has("weights_replaced"))),
        _has("changes_final_weights"),
        "{second} may change the weights at the end of training, after {first} has used them; put {first} behind it",
    ),
    _Rule(
        _has("changes_final_weights"),
        _has("rolls_back"),
        "{second} may put the weights of an epoch back that {first} has not seen; put {first} behind it",
    ),
    _Rule(
        _averages,
        _has("rolls_back"),
        "{second} puts the weights of an epoch back, and {first} would write its average over them; leave one of them "
        "out, or use action='warn'",
        swap=False,
    ),
)


def refusal(first: pl.Callback, second: pl.Callback) -> str | None:
    """Return why a Trainer refuses these two in this order, and what to do; None if they go together."""
    for rule in _RULES:
        one, two = first, second
        if not rule.swap and not (rule.first(one) and rule.second(two)):
            one, two = second, first
        if rule.first(one) and rule.second(two):
            names = {"first": type(one).__name__, "second": type(two).__name__}
            order = ": callbacks=[{second}(...), {first}(...)]" if rule.swap else ""
            return (rule.sentence + order).format(**names)
    return None


def check_composition(trainer: pl.Trainer) -> None:
    """Refuse callbacks that would undo each other, or that the strategy leaves without what they need.

    Called in ``setup``, before any of them has touched the module.

    Raises:
        MisconfigurationException: for the first such pair or callback, with the reason and the remedy.
    """
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    if isinstance(trainer.strategy, _SHARDING):
        for callback in filter(_has("needs_whole_weights"), callbacks):
            raise MisconfigurationException(
                f"{type(callback).__name__} needs each layer's weights in one piece, which "
                f"{type(trainer.strategy).__name__} shards; use strategy='ddp'"
            )
    for first, second in combinations(callbacks, 2):
        if message := refusal(first, second):
            raise MisconfigurationException(message)
    for first, second, third in combinations(callbacks, 3):
        if _has("replays_batch")(first) and _has("changes_batch")(second) and _has("backpropagates")(third):
            names = [type(callback).__name__ for callback in (first, second, third)]
            raise MisconfigurationException(
                f"{names[2]} would backpropagate several times through what {names[1]} makes of the inputs of "
                f"{names[0]}; it must stand before them: callbacks=[{names[2]}(...), {names[0]}(...), {names[1]}(...)]"
            )


def tell_weights_were_replaced(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
    """Let the callbacks that have fitted something to the module's weights do so again.

    They are those with a method ``weights_replaced(trainer, pl_module)``, which returns what there is to log.
    """
    metrics: dict[str, float] = {}
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if hasattr(callback, "weights_replaced"):
            metrics |= callback.weights_replaced(trainer, pl_module)
    return metrics
