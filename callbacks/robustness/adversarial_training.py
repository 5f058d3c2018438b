"""Adversarial training of any module in any Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import MeanMetric

from lightning_plugins.batches import BatchFn, LogitsFn
from lightning_plugins.callbacks._borrow import unobserved
from lightning_plugins.callbacks._classes import class_counts, epochs_done, training_progress
from lightning_plugins.callbacks.robustness._attacking import PixelScale, generator_for
from lightning_plugins.callbacks.training_step import Step, TrainingStepCallback
from lightning_plugins.checks import check_types
from lightning_plugins.mixing import MixedLabels
from lightning_plugins.robustness.attack import AttackResult
from lightning_plugins.robustness.attacks import Attack, PGDAttack
from lightning_plugins.robustness.budgets import class_budgets
from lightning_plugins.robustness.objectives import Objective
from lightning_plugins.robustness.pgd import pgd

__all__ = ["AdversarialTraining"]

AttackMode = Literal["eval", "train_frozen_stats", "train"]


class AdversarialTraining(TrainingStepCallback):
    """Train on attacked inputs, with the module's own loss or one of the literature.

    Each batch is attacked inside the training step, under the Trainer's precision; gradients flow to the inputs alone,
    so ``.grad``, accumulation and processes do not notice. Without an ``objective`` the module's step gets the attacked
    batch, and its own loss is minimised: plain adversarial training. With one, the module's step runs on the first
    batch that the objective asks for (clean inputs for TRADES, attacked ones for most), so that what the module logs
    goes on; its loss is replaced by the objective's.

    Inputs must lie in [0, 1]: normalise inside the module. For data that are normalised outside of it, pass ``mean``
    and ``std``; ``eps`` stays on the pixel scale.

    Logged once an epoch: ``robustness/train_robust_acc`` (on the attacked training batches),
    ``robustness/zero_gradient_share`` (images that the attack could not see, per step of the attack),
    ``robustness/eps`` (the radius in use).

    Args:
        attack: the inner attack; default :class:`.PGDAttack` with 10 steps of 2/255 in a radius of 8/255. A
            :class:`.PGDAttack` takes loss and start from the objective where that has its own.
        objective: what to minimise, such as :class:`.TRADES`; default the module's own loss on attacked inputs.
        attack_mode: ``"eval"`` attacks the net in evaluation mode; ``"train_frozen_stats"`` in its modes of training,
            without changing the statistics of batch normalisations; ``"train"`` lets every step of the attack change
            them.
        warmup_epochs: epochs over which the radius grows linearly from 0; fractions are allowed.
        class_budget_alpha: give rarer classes a larger radius, see :func:`.class_budgets`; 0 for the same for all.
        counts: training samples of each class, for objectives and budgets that need them; default the data module's
            ``class_counts``, or those of the training set's ``targets``.
        mean: of each channel, if the inputs are normalised.
        std: likewise.
        seed: of the attack's randomness.
        batch_fn: takes the batch, returns its inputs and targets; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; default ``pl_module(inputs)``.

    Raises:
        ValueError: for an argument out of range.
        MisconfigurationException: if class counts are needed and cannot be found, or inputs lie outside of [0, 1].

    Example:
        >>> from lightning_plugins.callbacks import AdversarialTraining
        >>> from lightning_plugins.robustness import TRADES, PGDAttack
        >>> callback = AdversarialTraining(PGDAttack(eps=0.1, num_steps=7), TRADES(beta=6.0))

    Reference:
        Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, 2018.
    """

    attacks_batch = True
    changes_batch = True

    @check_types
    def __init__(
        self,
        attack: Attack | None = None,
        objective: Objective | None = None,
        *,
        attack_mode: AttackMode = "eval",
        warmup_epochs: float = 0.0,
        class_budget_alpha: float = 0.0,
        counts: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        super().__init__(batch_fn=batch_fn, logits_fn=logits_fn)
        self.attack = PGDAttack(step_size=2 / 255) if attack is None else attack
        if not isinstance(self.attack, Attack):
            raise TypeError(f"attack must be an Attack such as PGDAttack(eps=8/255), got {attack!r}")
        if objective is not None and not isinstance(objective, Objective):
            raise TypeError(f"objective must be an Objective such as TRADES(), got {objective!r}")
        if attack_mode not in ("eval", "train_frozen_stats", "train"):
            raise ValueError(f"attack_mode must be 'eval', 'train_frozen_stats' or 'train', got {attack_mode!r}")
        if not 0 <= warmup_epochs < float("inf"):
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs!r}")
        if not 0 <= class_budget_alpha <= 1:
            raise ValueError(f"class_budget_alpha must lie in [0, 1], got {class_budget_alpha!r}")
        if class_budget_alpha and not isinstance(self.attack, PGDAttack):
            raise ValueError("class_budget_alpha needs a PGDAttack, whose radius can differ between images")
        self.objective, self.attack_mode, self.warmup_epochs = objective, attack_mode, warmup_epochs
        self.class_budget_alpha, self.counts, self.seed = class_budget_alpha, counts, seed
        self.mean, self.std = mean, std
        self._scale = PixelScale(mean, std)
        self._budgets: Tensor | None = None
        self._calls = 0  # attacks so far in this batch
        self._kept: tuple[Tensor, Tensor] | None = None
        self._keeps = False
        self._robust = MeanMetric(nan_strategy="disable")
        self._zeros = MeanMetric(nan_strategy="disable")
        self._eps = 0.0

    @property
    def replaces_loss(self) -> bool:  # type: ignore[override]
        """Whether an objective takes the place of the module's own loss."""
        return self.objective is not None

    # Preparation

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for metric in (self._robust, self._zeros):
            metric.to(pl_module.device).reset()
        if self.objective is not None:
            self.objective.to(pl_module.device)
        needed = self.class_budget_alpha > 0 or (
            self.objective is not None and self.objective.needs_counts and self.objective.counts is None
        )
        if not needed:
            return
        counts = class_counts(trainer) if self.counts is None else torch.as_tensor(self.counts)
        if counts is None:
            who = type(self.objective).__name__ if self.objective is not None else "class_budget_alpha"
            raise MisconfigurationException(
                f"AdversarialTraining: {who} needs the number of training samples of each class, and neither the data "
                "module has class_counts nor the training set targets; pass counts=[...]"
            )
        if self.objective is not None and self.objective.needs_counts and self.objective.counts is None:
            self.objective.set_class_counts(counts)
            self.objective.to(pl_module.device)
        if self.class_budget_alpha:
            self._budgets = class_budgets(counts, alpha=self.class_budget_alpha).to(pl_module.device)

    # Training

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        self._calls = 0
        self._kept = None

    def around_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> STEP_OUTPUT:
        """Attack the inputs and run the step on them, or let the objective run it."""
        inputs, targets = self.batch_fn(batch)
        if self.objective is not None:
            self.objective.set_progress(training_progress(trainer, batch_idx))
        adversarial = self._attacked(trainer, pl_module, inputs, targets, batch_idx)
        if self.objective is None:
            return step(self.replace(batch, inputs, adversarial), batch_idx)
        outputs: list[STEP_OUTPUT] = []

        def first(asked: Tensor) -> Tensor:
            logits, output = self.step_with_logits(pl_module, step, self.replace(batch, inputs, asked), batch_idx)
            outputs.append(output)
            return logits

        model = _StepModel(pl_module, first, self.logits_fn)
        loss = self.objective(model, inputs, adversarial, targets)
        output = outputs[0] if outputs else None
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    @contextmanager
    def keeping_examples(self) -> Iterator[None]:
        """Let repeated steps on one batch, here and in the same precision, reuse the attacked inputs of the first."""
        self._keeps, self._kept = True, None
        try:
            yield
        finally:
            self._keeps, self._kept = False, None

    def _attacked(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, inputs: Tensor, targets: Tensor, batch_idx: int
    ) -> Tensor:
        if self._keeps and self._kept is not None and self._kept[0] is inputs:
            return self._kept[1]
        warm = 1.0
        if self.warmup_epochs:
            warm = min(epochs_done(trainer, batch_idx + 1) / self.warmup_epochs, 1.0)
        self._eps = warm * self.attack.eps
        number = 8 * trainer.global_step + self._calls
        generator = generator_for(inputs, seed=self.seed, number=number, rank=trainer.global_rank)
        self._calls += 1
        with _modes(pl_module, self.attack_mode), unobserved():
            result = self._run_attack(pl_module, inputs, targets, generator)
        self._robust.update((~result.success).float())
        if result.num_gradients:
            share = result.num_zero_gradients / (result.num_gradients * max(len(inputs), 1))
            self._zeros.update(torch.tensor(share, device=inputs.device))
        adversarial = self._scale.inputs(result.adversarial.detach(), inputs.dtype)
        self._kept = (inputs, adversarial) if self._keeps else None
        return adversarial

    def _run_attack(
        self, pl_module: pl.LightningModule, inputs: Tensor, targets: Tensor, generator: torch.Generator
    ) -> AttackResult:
        images = self._scale.images(inputs)

        def logits_fn(asked: Tensor) -> Tensor:
            logits = self.logits_fn(pl_module, self._scale.inputs(asked, inputs.dtype))
            return logits if self.objective is None else self.objective.attack_logits(logits.float())

        attack = self.attack
        if targets.ndim == 2:  # soft labels of a mixing callback
            targets = targets.argmax(1)
        if isinstance(targets, MixedLabels):  # that the attack reads the shares does not say that the loss does
            targets = MixedLabels(targets.components, targets.shares)
        try:
            if not isinstance(attack, PGDAttack):
                return attack.with_eps(self._eps)(logits_fn, images, targets, generator=generator)
            eps: float | Tensor = self._eps
            if self._budgets is not None:
                eps = eps * self._budgets[targets].reshape(-1, *[1] * (images.ndim - 1))
            own = self.objective
            return pgd(
                logits_fn,
                images,
                targets,
                eps=eps,
                step_size=eps * attack.relative_step,
                num_steps=attack.num_steps,
                norm=attack.norm,
                loss=attack.loss if own is None or own.attack_loss == "ce" else own.attack_loss,
                start="uniform" if own is None else own.attack_start,
                random_start=attack.random_start or (own is not None and own.attack_loss == "kl"),
                num_restarts=attack.num_restarts,
                generator=generator,
            )
        except ValueError as error:
            raise MisconfigurationException(f"AdversarialTraining could not attack the batch: {error}") from error

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {
            "robustness/train_robust_acc": self._robust.compute(),
            "robustness/zero_gradient_share": self._zeros.compute(),
            "robustness/eps": torch.tensor(self._eps),
        }
        pl_module.log_dict(metrics, sync_dist=True)
        self._robust.reset()
        self._zeros.reset()


class _StepModel(nn.Module):
    """Stands in for the net in an objective: its first call runs the module's own training step."""

    def __init__(self, pl_module: pl.LightningModule, first: Callable[[Tensor], Tensor], logits_fn: LogitsFn) -> None:
        super().__init__()
        self.pl_module = pl_module  # as a submodule, so that objectives find its layers
        self._first: Callable[[Tensor], Tensor] | None = first
        self._logits_fn = logits_fn

    def forward(self, inputs: Tensor) -> Tensor:
        if self._first is not None:
            first, self._first = self._first, None
            return first(inputs)
        return self._logits_fn(self.pl_module, inputs)


@contextmanager
def _modes(module: nn.Module, mode: AttackMode) -> Iterator[None]:
    """Let the module be in the modes in which it is attacked, and give it back as it was."""
    if mode == "train":
        yield
        return
    training = {m: m.training for m in module.modules()}
    buffers: dict[Tensor, Tensor] = {}
    if mode == "eval":
        for m in training:
            m.training = False
    else:
        norms = (m for m in training if isinstance(m, _NormBase))
        buffers = {buffer: buffer.clone() for m in norms for buffer in m.buffers(recurse=False)}
    try:
        yield
    finally:
        for m, was in training.items():
            m.training = was
        for buffer, value in buffers.items():
            buffer.copy_(value)
