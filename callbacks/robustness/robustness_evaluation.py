"""Measuring robustness while a module is validated and tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_plugins._progress import progress_bar
from lightning_plugins.batches import BatchFn, LogitsFn, forward_logits, inputs_and_targets
from lightning_plugins.callbacks._borrow import unobserved
from lightning_plugins.callbacks._classes import class_counts
from lightning_plugins.callbacks._variants import variant_ending, variants
from lightning_plugins.callbacks.robustness._attacking import PixelScale, generator_for
from lightning_plugins.checks import check_types
from lightning_plugins.gradients import grad_context, ordinary
from lightning_plugins.logging import log_callback_hyperparameters, log_figure, log_table
from lightning_plugins.robustness.attack import AttackResult
from lightning_plugins.robustness.attacks import APGDAttack, Attack, PGDAttack
from lightning_plugins.robustness.figures import (
    accuracy_over_eps_figure,
    attacked_images_figure,
    class_accuracy_figure,
)
from lightning_plugins.robustness.metrics import Average, RobustAccuracy, halves_by_count

__all__ = ["RobustnessEvaluation"]

_NUM_PICTURES = 8

_Metrics = dict[str, tuple[RobustAccuracy, RobustAccuracy]]  # by attack: over all samples, and of each class


class RobustnessEvaluation(pl.Callback):
    """Attack a module while it is validated and tested, and report how much of its accuracy is left.

    In validation a cheap attack runs on the same first samples with the same seed every time, so that curves can be
    compared and checkpoints chosen by ``val/robust_acc``. In ``test`` all attacks run on all samples; a sample counts
    as robust only if it is classified correctly and survives every one of them. Works inside ``fit``, ``validate`` and
    ``test`` with the Trainer's defaults; attacks run in float32 where the Trainer uses mixed precision.

    A net that can be evaluated in several states, such as the precisions of :class:`MultiPrecisionQAT`, is tested in
    each of them with ``per_variant=True``, by attacks on that state: a quantizer passes gradients straight through.

    Logged, with ``val/`` or ``test/`` before: ``clean_acc``, ``robust_acc``, ``robust_acc_balanced`` (mean over
    classes), ``robust_acc_worst`` (of the worst class), ``robust_acc_tail`` (mean over the rarer half of the classes,
    where their counts are known), and in test ``robust_acc_<attack>`` for each attack. What is measured in a further
    state ends with its name: ``test/robust_acc_balanced_4bit``. Further the pictures ``class_accuracy``,
    ``attacked_images`` and ``accuracy_over_eps``, and the table ``classes``.

    Args:
        val_attack: default :class:`.PGDAttack` with 10 steps in a radius of 8/255; its radius is what the other
            defaults take. False for no attack in validation.
        test_attacks: by name; default ``{"pgd20": PGDAttack(num_steps=20), "apgd_t": APGDAttack()}``. Empty for none.
        num_val_samples: samples attacked in validation, by each process; None for all.
        every_n_epochs: attack in the first and every n-th epoch of a fit; in between, the last values are logged again.
        eps_grid: radii at which accuracy is measured in test, on the first ``num_val_samples`` and by PGD of 20 steps;
            default six from 0 to twice the attack's. Empty for none.
        per_variant: test each state of a net that has several too; it takes as long for each.
        tail: classes that count as tail; default the rarer half of a training set whose largest class is at least twice
            the smallest.
        counts: training samples of each class; default as the data module or training set tells.
        mean: of each channel, if the inputs are normalised outside of the module.
        std: likewise.
        seed: of the attacks.
        batch_fn: takes the batch, returns its inputs and targets; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; default ``pl_module(inputs)``.

    Raises:
        ValueError: for an argument out of range.
        MisconfigurationException: for inputs that cannot be attacked, such as those outside of [0, 1].

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning_plugins.callbacks import RobustnessEvaluation
        >>> from lightning_plugins.robustness import PGDAttack
        >>> callbacks = [
        ...     RobustnessEvaluation(PGDAttack(eps=0.1, num_steps=10)),
        ...     ModelCheckpoint(monitor="val/robust_acc", mode="max"),
        ... ]
    """

    batch_fn: BatchFn = staticmethod(inputs_and_targets)
    logits_fn: LogitsFn = staticmethod(forward_logits)

    @check_types
    def __init__(
        self,
        val_attack: Attack | bool | None = None,
        test_attacks: Mapping[str, Attack] | None = None,
        *,
        num_val_samples: int | None = 1000,
        every_n_epochs: int = 1,
        eps_grid: Sequence[float] | None = None,
        per_variant: bool = False,
        tail: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        if val_attack is None or val_attack is True:
            val_attack = PGDAttack(step_size=2 / 255)
        if val_attack is not False and not isinstance(val_attack, Attack):
            raise TypeError(f"val_attack must be an Attack such as PGDAttack(eps=8/255) or False, got {val_attack!r}")
        if num_val_samples is not None and num_val_samples < 1:
            raise ValueError(f"num_val_samples must be at least 1, or None for all, got {num_val_samples!r}")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs!r}")
        self._scale = PixelScale(mean, std)
        reference = val_attack if isinstance(val_attack, Attack) else PGDAttack()
        eps, norm = reference.eps, reference.norm
        if test_attacks is None:
            test_attacks = {"pgd20": PGDAttack(eps, norm, num_steps=20), "apgd_t": APGDAttack(eps, norm)}
        for name, attack in test_attacks.items():
            if not isinstance(attack, Attack):
                raise TypeError(f"test_attacks[{name!r}] must be an Attack such as PGDAttack(), got {attack!r}")
        if eps_grid is None:
            eps_grid = [eps * share for share in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)] if test_attacks else []
        if any(not 0 <= radius < float("inf") for radius in eps_grid):
            raise ValueError(f"eps_grid must hold radii of at least 0, got {list(eps_grid)}")
        self.val_attack, self.test_attacks = val_attack, dict(test_attacks)
        self.num_val_samples, self.every_n_epochs, self.eps_grid = num_val_samples, every_n_epochs, tuple(eps_grid)
        self.tail, self.counts, self.mean, self.std, self.seed = tail, counts, mean, std, seed
        self.per_variant = per_variant
        self._norm = norm
        if batch_fn is not None:
            self.batch_fn = batch_fn
        if logits_fn is not None:
            self.logits_fn = logits_fn
        self._stage = "val"
        self._attacks: dict[str, Attack] = {}
        self._metrics: dict[str, _Metrics] = {}  # by state, that at rest under ""
        self._radii: tuple[float, ...] = ()
        self._grid: dict[float, RobustAccuracy] = {}
        self._seen = 0
        self._pictures: tuple[Tensor, Tensor, list[str]] | None = None
        self._last: dict[str, Tensor] = {}
        self._figures: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        log_callback_hyperparameters(trainer, self)

    # Validation and test take the same way.

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        skip = trainer.sanity_checking or (
            trainer.state.fn == "fit" and trainer.current_epoch % self.every_n_epochs != 0
        )
        attacks = {"": self.val_attack} if isinstance(self.val_attack, Attack) and not skip else {}
        self._start("val", attacks, ())

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start("test", self.test_attacks, self.eps_grid)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == 0:
            self._attack(trainer, pl_module, batch, batch_idx, self.num_val_samples)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == 0:
            self._attack(trainer, pl_module, batch, batch_idx, None)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not isinstance(self.val_attack, Attack):
            return
        if self._attacks:
            self._last = self._results(trainer)
        if self._last:
            pl_module.log_dict(self._last, sync_dist=True)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._attacks:
            pl_module.log_dict(self._results(trainer), sync_dist=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)} if self._last else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = dict(state_dict.get("last", {}))

    # Attacks

    def _start(self, stage: str, attacks: dict[str, Attack], grid: Sequence[float]) -> None:
        self._stage, self._attacks = stage, attacks
        self._metrics, self._seen, self._pictures = {}, 0, None
        self._radii, self._grid = tuple(grid), {}

    def _attack(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, limit: int | None
    ) -> None:
        if not self._attacks or (limit is not None and self._seen >= limit):
            return
        inputs, targets = self.batch_fn(batch)
        if limit is not None:
            inputs, targets = inputs[: limit - self._seen], targets[: limit - self._seen]
        first = not self._metrics
        radii = self._radii if self._seen < (self.num_val_samples or float("inf")) else ()
        states = variants(trainer) if self._stage == "test" and self.per_variant else {}
        total = len(self._attacks) * (1 + len(states)) + len(radii)
        # A calibrator over forward may have no gradient, as bins have none, and would hide the module from the attack.
        bar = progress_bar(title="attacks on a batch", total=total, delay=0 if self._stage == "test" else 3)
        with grad_context(), unobserved(), bar:
            inputs, targets = ordinary(inputs), ordinary(targets)
            clean, pictured = self._measure(trainer, pl_module, "", inputs, targets, batch_idx, bar)
            if first and pictured is not None:
                self._keep_pictures(inputs, pictured, targets)
            for number, eps in enumerate(radii):
                attack = PGDAttack(eps, self._norm, num_steps=20)
                result = self._run(trainer, pl_module, attack, inputs, targets, batch_idx, 100 + number, bar)
                if eps not in self._grid:
                    self._grid[eps] = _metric(result.logits, "micro")
                self._grid[eps].update(clean, result.logits.argmax(1), targets)
            for state, owner in states.items():
                with owner.variant(pl_module, state) as module:
                    self._measure(trainer, module, state, inputs, targets, batch_idx, bar)
        self._seen += len(inputs)

    def _measure(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        state: str,
        inputs: Tensor,
        targets: Tensor,
        batch_idx: int,
        bar: Any,
    ) -> tuple[Tensor, AttackResult | None]:
        """Count what is right before and after the attacks; return the first predictions, and the first attack."""
        logits = self.logits_fn(module, inputs)
        if state not in self._metrics:
            names = ("clean", "all", *self._attacks)
            self._metrics[state] = {name: (_metric(logits, "micro"), _metric(logits, "none")) for name in names}

        def update(name: str, attacked: Tensor) -> None:
            for metric in self._metrics[state][name]:
                metric.update(clean, attacked, targets)

        clean = worst = logits.argmax(1)
        survived = clean == targets
        update("clean", clean)
        pictured = None
        for number, (name, attack) in enumerate(self._attacks.items()):
            result = self._run(trainer, module, attack, inputs, targets, batch_idx, number, bar)
            pictured = pictured or result
            attacked = result.logits.argmax(1)
            update(name, attacked)
            worst = torch.where(survived & (attacked != targets), attacked, worst)
            survived &= attacked == targets
        update("all", worst)
        return clean, pictured

    def _run(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        attack: Attack,
        inputs: Tensor,
        targets: Tensor,
        batch_idx: int,
        number: int,
        bar: Any,
    ) -> AttackResult:
        place = 128 * batch_idx + number
        generator = generator_for(inputs, seed=self.seed, number=place, rank=trainer.global_rank)
        images = self._scale.images(inputs)
        passes = 0

        def logits_fn(asked: Tensor) -> Tensor:
            nonlocal passes
            passes += 1  # a single attack may take minutes
            bar.set_postfix_str(f"{passes:,} passes", refresh=False)
            bar.update(0)
            return self.logits_fn(module, self._scale.inputs(asked, inputs.dtype))

        try:
            result = attack(logits_fn, images, targets, generator=generator)
        except ValueError as error:
            raise MisconfigurationException(f"RobustnessEvaluation could not attack the batch: {error}") from error
        bar.update()
        return result

    # Results

    def _results(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        everything: dict[str, Tensor] = {}
        for state, metrics in self._metrics.items():
            results = self._results_of(trainer, metrics)
            everything |= {f"{self._stage}/{name}{variant_ending(state)}": value for name, value in results.items()}
        clean, robust = (self._metrics[""][name][1].compute().cpu() for name in ("clean", "all"))
        self._figures = {"classes": (clean, robust), "stage": self._stage}
        if self._grid:
            self._figures["eps"] = {eps: float(metric.compute()) for eps, metric in self._grid.items()}
        return everything

    def _results_of(self, trainer: pl.Trainer, metrics: _Metrics) -> dict[str, Tensor]:
        overall = {name: micro.compute() for name, (micro, _) in metrics.items()}
        clean, robust = metrics["clean"][1].compute(), metrics["all"][1].compute()
        present = ~robust.isnan()
        results = {
            "clean_acc": overall["clean"],
            "robust_acc": overall["all"],
            "robust_acc_balanced": robust[present].mean(),
            "robust_acc_worst": robust[present].min(),
        }
        tail = self._tail_classes(trainer, len(robust))
        if tail:
            results["robust_acc_tail"] = robust[tail].nanmean()
            results["clean_acc_tail"] = clean[tail].nanmean()
        return results | {f"robust_acc_{name}": overall[name] for name in self._attacks if name}

    def _tail_classes(self, trainer: pl.Trainer, num_classes: int) -> list[int]:
        if self.tail is not None:
            return list(self.tail)
        counts = class_counts(trainer) if self.counts is None else self.counts
        if counts is None or len(counts) != num_classes:
            return []
        if max(counts) < 2 * min(counts):  # the rarer half of a balanced set is nothing but chance
            return []
        return list(halves_by_count(counts)["tail"])

    def _keep_pictures(self, inputs: Tensor, result: AttackResult, targets: Tensor) -> None:
        if inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
            return
        count = min(_NUM_PICTURES, len(inputs))
        images = self._scale.images(inputs)
        titles = [
            f"{true} → {guess}"
            for true, guess in zip(targets[:count].tolist(), result.logits.argmax(1)[:count].tolist(), strict=True)
        ]
        self._pictures = (images[:count].cpu(), result.adversarial[:count].cpu(), titles)

    def _show(self, trainer: pl.Trainer) -> None:
        if not trainer.loggers or not self._figures:
            return
        stage = self._figures["stage"]
        clean, robust = self._figures["classes"]
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        names = names if names is not None and len(names) == len(clean) else None
        log_figure(trainer, f"{stage}/class_accuracy", class_accuracy_figure(clean, robust, names))
        labels = range(len(clean)) if names is None else names
        rows = [[str(label), float(c), float(r)] for label, c, r in zip(labels, clean, robust, strict=True)]
        log_table(trainer, f"{stage}/classes", ["class", "clean_acc", "robust_acc"], rows)
        if self._pictures is not None:
            log_figure(trainer, f"{stage}/attacked_images", attacked_images_figure(*self._pictures))
        if "eps" in self._figures:
            log_figure(trainer, f"{stage}/accuracy_over_eps", accuracy_over_eps_figure(self._figures["eps"]))
        self._figures = {}


def _metric(logits: Tensor, average: Average) -> RobustAccuracy:
    return RobustAccuracy(logits.shape[1], average=average).to(logits.device)
