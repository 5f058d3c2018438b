"""Noticing that one-step adversarial training has been fooled, before it is too late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plugins.batches import BatchFn, LogitsFn, forward_logits, inputs_and_targets
from lightning_plugins.callbacks._composition import check_composition, tell_weights_were_replaced
from lightning_plugins.callbacks.robustness._attacking import PixelScale, generator_for
from lightning_plugins.checks import check_types
from lightning_plugins.gradients import grad_context, ordinary
from lightning_plugins.logging import log_callback_hyperparameters
from lightning_plugins.modes import evaluation_mode
from lightning_plugins.robustness.attacks import PGDAttack

__all__ = ["CatastrophicOverfittingGuard"]


class CatastrophicOverfittingGuard(pl.Callback):
    """Stop and go back an epoch when robust accuracy collapses, as it does in training by one step of attack.

    A net trained against one large step can learn, within an epoch, to be right under that step and wrong under any
    other. So at the end of each epoch an attack of several steps runs on the epoch's first training batch, in
    evaluation mode. If the share that survives falls by more than ``drop`` below the epoch before, the weights of that
    epoch are put back and training ends.

    Logged once an epoch: ``robustness/guard_acc``, the share of the batch that survives, the mean over processes. Keeps
    a copy of the weights on the CPU.

    Args:
        attack: default :class:`.PGDAttack` with 5 steps in a radius of 8/255; use the radius of the training.
        drop: fall of the robust accuracy, in (0, 1], that counts as collapse.
        action: ``"stop"`` puts the weights back and ends the training, ``"warn"`` only says so.
        mean: of each channel, if the inputs are normalised outside of the module.
        std: likewise.
        seed: of the attack.
        batch_fn: takes the batch, returns its inputs and targets; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; default ``pl_module(inputs)``.

    Raises:
        ValueError: for an argument out of range.
        MisconfigurationException: for inputs that cannot be attacked, and with ``"stop"`` for a strategy that shards
            weights.

    Example:
        >>> from lightning_plugins.callbacks import AdversarialTraining, CatastrophicOverfittingGuard
        >>> from lightning_plugins.robustness import PGDAttack
        >>> fast = PGDAttack(eps=8 / 255, step_size=10 / 255, num_steps=1)
        >>> callbacks = [AdversarialTraining(fast), CatastrophicOverfittingGuard(PGDAttack(eps=8 / 255, num_steps=5))]

    Reference:
        Wong, Rice, Kolter, *Fast is better than free: Revisiting adversarial training*, 2020, section 5.
    """

    batch_fn: BatchFn = staticmethod(inputs_and_targets)
    logits_fn: LogitsFn = staticmethod(forward_logits)

    @check_types
    def __init__(
        self,
        attack: PGDAttack | None = None,
        *,
        drop: float = 0.2,
        action: Literal["stop", "warn"] = "stop",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        if not 0 < drop <= 1:
            raise ValueError(f"drop must lie in (0, 1], got {drop!r}")
        if action not in ("stop", "warn"):
            raise ValueError(f"action must be 'stop' or 'warn', got {action!r}")
        self.attack = PGDAttack(num_steps=5) if attack is None else attack
        self.drop, self.action, self.mean, self.std, self.seed = drop, action, mean, std, seed
        self._scale = PixelScale(mean, std)
        if batch_fn is not None:
            self.batch_fn = batch_fn
        if logits_fn is not None:
            self.logits_fn = logits_fn
        self._batch: tuple[Tensor, Tensor] | None = None
        self._before: float | None = None
        self._weights: dict[str, Tensor] = {}

    @property
    def rolls_back(self) -> bool:
        """Whether it may put back the weights of the epoch before."""
        return self.action == "stop"

    @property
    def needs_whole_weights(self) -> bool:
        """Whether it keeps a copy of the weights."""
        return self.action == "stop"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_composition(trainer)
            log_callback_hyperparameters(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._before is not None:  # resumed: what was restored are the weights to go back to
            self._keep(pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        if idx == 0:
            inputs, targets = self.batch_fn(batch)
            self._batch = inputs.detach(), targets.detach()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._batch is None:  # resumed after the first batch of this epoch
            return
        share = trainer.strategy.reduce(self._robust_share(trainer, pl_module), reduce_op="mean")
        accuracy = float(share)
        pl_module.log("robustness/guard_acc", accuracy)
        before, self._batch = self._before, None
        if before is not None and accuracy < before - self.drop:
            rank_zero_warn(
                f"catastrophic overfitting: robust accuracy under {self.attack.num_steps} steps fell from "
                f"{before:.1%} to {accuracy:.1%} within epoch {trainer.current_epoch}"
                + (
                    "; the weights of the epoch before are back and training ends. Use a smaller step_size, or an "
                    "attack of several steps"
                    if self.action == "stop"
                    else ""
                )
            )
            if self.action == "stop":
                pl_module.load_state_dict(self._weights)
                pl_module.log_dict(tell_weights_were_replaced(trainer, pl_module), sync_dist=True)
                trainer.should_stop = True
                return
        self._before = accuracy
        self._keep(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._before is None else {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict.get("before")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._weights, self._batch = {}, None

    def _keep(self, pl_module: pl.LightningModule) -> None:
        if self.action == "stop":
            self._weights = {name: value.to("cpu", copy=True) for name, value in pl_module.state_dict().items()}

    def _robust_share(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        assert self._batch is not None
        inputs, targets = (ordinary(part) for part in self._batch)
        if targets.ndim == 2:  # soft labels
            targets = targets.argmax(1)
        generator = generator_for(inputs, seed=self.seed, number=trainer.global_step, rank=trainer.global_rank)
        try:
            with evaluation_mode(pl_module), grad_context():
                result = self.attack(
                    lambda images: self.logits_fn(pl_module, self._scale.inputs(images, inputs.dtype)),
                    self._scale.images(inputs),
                    targets,
                    generator=generator,
                )
        except ValueError as error:
            raise MisconfigurationException(
                f"CatastrophicOverfittingGuard could not attack the batch: {error}"
            ) from error
        return (~result.success).float().mean()
