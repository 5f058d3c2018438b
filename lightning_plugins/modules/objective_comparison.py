"""Several objectives of adversarial training beside each other, in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.gradients import grad_context, ordinary
from lightning_plugins.logging import log_figure, log_table
from lightning_plugins.models import build_model
from lightning_plugins.robustness.attacks import Attack, PGDAttack
from lightning_plugins.robustness.figures import comparison_figure
from lightning_plugins.robustness.metrics import Average, RobustAccuracy, halves_by_count
from lightning_plugins.robustness.objectives import Objective
from lightning_plugins.robustness.pgd import pgd

__all__ = ["ObjectiveComparison"]


class ObjectiveComparison(pl.LightningModule):
    """Train one copy of a network for each objective, on the same batches from the same start, and attack all of them.

    The copies share nothing but the data, so each is what a run of its own would give, and differences between them are
    differences between the objectives. The optimizer must treat each parameter by itself, as SGD and Adam do, and
    gradients must not be clipped by their common norm.

    Logged with ``val/<name>/`` and ``test/<name>/`` before: ``clean_acc``, ``clean_acc_tail``; in test also
    ``robust_acc``, ``robust_acc_balanced``, ``robust_acc_tail`` and ``robust_acc_worst``, where a sample counts if it
    is classified correctly and survives every attack, and the table and picture ``test/comparison``. The tail is the
    rarer half of the classes.

    Args:
        model: a network by name, or any module from images to logits with a linear last layer.
        objectives: by name; those that need class counts take them from the data module.
        attack: of the training; default :class:`.PGDAttack` of 7 steps in a radius of 0.1.
        test_attacks: by name; default PGD with 20 steps in the radius of the training.
        num_classes: number of logits; a recipe takes it, and the next two, ``mean`` and ``std`` from its data.
        in_channels: of the images, where ``model`` is a name.
        image_size: in pixels, for named networks that ask for it.
        model_args: further arguments of a named network.
        mean: per channel, on the [0, 1] scale.
        std: likewise.
        optimizer: callable from parameters to an optimizer; default SGD with learning rate 0.05 and momentum 0.9.
        lr_scheduler: callable from the optimizer to a scheduler, which steps once an epoch.
        seed: of the attacks; all copies get the same starts.

    Shape:
        - batches ``(images (N, in_channels, H, W) in [0, 1], targets (N,))``
        - ``forward(images)``: logits ``(M, N, C)`` of the M copies

    Raises:
        ValueError: for wrong arguments.
        MisconfigurationException: if an objective needs class counts and the data module has none.

    Example:
        >>> from lightning_plugins.robustness import PGDAT, BalancedSoftmax
        >>> module = ObjectiveComparison("convnet3", {"plain": PGDAT(), "at_bsl": BalancedSoftmax()}, num_classes=10)
        >>> module(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 2, 10])
    """

    mean: Tensor
    std: Tensor

    @check_types
    def __init__(
        self,
        model: nn.Module | str,
        objectives: dict[str, Objective],
        *,
        attack: PGDAttack | None = None,
        test_attacks: dict[str, Attack] | None = None,
        num_classes: int | None = None,
        in_channels: int | None = None,
        image_size: int | None = None,
        model_args: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_classes is None or num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}; it is the data's number of classes")
        if not objectives:
            raise ValueError("objectives must name at least one objective, such as {'plain': PGDAT()}")
        if any("." in name or "/" in name or not name for name in objectives):
            raise ValueError(f"names of objectives must have no dot and no slash, got {list(objectives)}")
        if not all(value > 0 for value in std or ()):
            raise ValueError(f"std must be above 0, got {std!r}")
        self.attack = PGDAttack(eps=0.1, step_size=0.025, num_steps=7) if attack is None else attack
        self.test_attacks = (
            {"pgd20": PGDAttack(self.attack.eps, self.attack.norm, num_steps=20)}
            if test_attacks is None
            else dict(test_attacks)
        )
        if isinstance(model, str):
            channels = 3 if in_channels is None else in_channels
            model = build_model(
                model, num_classes=num_classes, in_channels=channels, image_size=image_size, **(model_args or {})
            )
        elif model_args:
            raise ValueError(f"model_args={model_args!r} needs a model name; {type(model).__name__} is built already")
        self.networks = nn.ModuleDict({name: deepcopy(model) for name in objectives})
        self.objectives = nn.ModuleDict(objectives)
        self.num_classes, self.seed = num_classes, seed
        self.register_buffer("mean", torch.tensor(mean if mean is not None else 0.0).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std if std is not None else 1.0).view(-1, 1, 1))
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        averages: dict[str, Average] = {"clean": "none", "robust": "none", "overall": "micro"}
        self.metrics = nn.ModuleDict(
            {
                kind: nn.ModuleDict({name: RobustAccuracy(num_classes, average=average) for name in objectives})
                for kind, average in averages.items()
            }
        )
        self._rows: list[list[Any]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(M, N, C)`` of all copies."""
        return torch.stack([self._net(name)(images) for name in self.networks])

    def configure_optimizers(self) -> Any:
        """Return the optimizer of all copies and its scheduler."""
        make = self.optimizer
        parameters = self.networks.parameters()
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9) if make is None else make(parameters)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def on_train_start(self) -> None:
        """Tell the objectives the class counts."""
        counts = self._counts()
        for name, objective in self._objectives():
            if objective.needs_counts and objective.counts is None:
                if counts is None:
                    raise MisconfigurationException(
                        f"ObjectiveComparison: {name} needs the number of training samples of each class, and the data "
                        "module has no class_counts; pass counts=[...] to the objective"
                    )
                objective.set_class_counts(counts)
        self.objectives.to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Attack each copy and return the sum of their objectives."""
        images, targets = batch[:2]
        batches = max(self.trainer.num_training_batches, 1)
        epochs = max(self.trainer.max_epochs or 1, 1)
        progress = min((self.trainer.current_epoch + batch_idx / batches) / epochs, 1.0)
        losses = []
        for name, objective in self._objectives():
            objective.set_progress(progress)
            net = self._net(name)
            number = 1_000_003 * self.trainer.global_step + 7_368_787 * self.trainer.global_rank
            generator = torch.Generator(images.device).manual_seed(self.seed + number)
            self.networks[name].eval()

            def logits_fn(asked: Tensor, net: nn.Module = net, objective: Objective = objective) -> Tensor:
                return objective.attack_logits(net(asked).float())

            attacked = pgd(
                logits_fn,
                images,
                targets,
                eps=self.attack.eps,
                step_size=self.attack.eps * self.attack.relative_step,
                num_steps=self.attack.num_steps,
                norm=self.attack.norm,
                loss=self.attack.loss if objective.attack_loss == "ce" else objective.attack_loss,
                start=objective.attack_start,
                random_start=self.attack.random_start or objective.attack_loss == "kl",
                generator=generator,
            ).adversarial
            self.networks[name].train()
            losses.append(objective(net, images, attacked.detach(), targets))
        return torch.stack(losses).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count what each copy gets right."""
        images, targets = batch[:2]
        for name in self.networks:
            predicted = self._logits(name, images).argmax(1)
            self._metric("clean", name).update(predicted, predicted, targets)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies."""
        for name in self.networks:
            self._log("val", name, {"clean_acc": self._metric("clean", name).compute()})
            self._metric("clean", name).reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Attack each copy with every test attack."""
        images, targets = batch[:2]
        for name in self.networks:
            with grad_context():
                inputs, labels = ordinary(images), ordinary(targets)

                def logits_fn(asked: Tensor, name: str = name) -> Tensor:
                    return self._logits(name, asked)

                clean = logits_fn(inputs).argmax(1)
                worst, survived = clean.clone(), clean == labels
                for number, attack in enumerate(self.test_attacks.values()):
                    generator = torch.Generator(images.device).manual_seed(self.seed + 1009 * batch_idx + number)
                    attacked = attack(logits_fn, inputs, labels, generator=generator).logits.argmax(1)
                    worst = torch.where(survived & (attacked != labels), attacked, worst)
                    survived &= attacked == labels
            self._metric("clean", name).update(clean, clean, labels)
            self._metric("robust", name).update(clean, worst, labels)
            self._metric("overall", name).update(clean, worst, labels)

    def on_test_epoch_end(self) -> None:
        """Log what is left of the accuracies."""
        self._rows = []
        for name in self.networks:
            robust = self._metric("robust", name).compute()
            self._log("test", name, {"clean_acc": self._metric("clean", name).compute(), "robust_acc_balanced": robust})
            results = {
                "robust_acc": self._metric("overall", name).compute(),
                "robust_acc_worst": robust[~robust.isnan()].min(),
            }
            self.log_dict({f"test/{name}/{key}": value for key, value in results.items()})
            self._rows.append(
                [name, *(float(value) for value in self._summary(self._metric("clean", name).compute(), robust))]
            )
            for kind in self.metrics:
                self._metric(kind, name).reset()

    def on_test_end(self) -> None:
        """Show the table and the picture."""
        if self._rows and self.trainer.loggers:
            columns = ["objective", "clean_acc", "clean_acc_tail", "robust_acc", "robust_acc_tail"]
            log_table(self.trainer, "test/comparison", columns, self._rows)
            values = {str(row[0]): (float(row[3]), float(row[4])) for row in self._rows}
            log_figure(self.trainer, "test/comparison", comparison_figure(values, ("all classes", "rarer half")))

    def _summary(self, clean: Tensor, robust: Tensor) -> list[Tensor]:
        tail = self._tail()
        return [clean.nanmean(), clean[tail].nanmean(), robust.nanmean(), robust[tail].nanmean()]

    def _log(self, stage: str, name: str, per_class: Mapping[str, Tensor]) -> None:
        tail = self._tail()
        for key, values in per_class.items():
            self.log(f"{stage}/{name}/{key}", values.nanmean())
            self.log(f"{stage}/{name}/{key.removesuffix('_balanced')}_tail", values[tail].nanmean())

    def _tail(self) -> list[int]:
        counts = self._counts()
        return list(range(self.num_classes)) if counts is None else list(halves_by_count(counts)["tail"])

    def _counts(self) -> Tensor | None:
        try:
            counts = getattr(getattr(self.trainer, "datamodule", None), "class_counts", None)
        except RuntimeError:  # a bare test, whose data module knows no training set
            return None
        return None if counts is None else torch.as_tensor(counts)

    def _metric(self, kind: str, name: str) -> RobustAccuracy:
        metric: RobustAccuracy = self.metrics[kind][name]  # type: ignore[index]
        return metric

    def _objectives(self) -> list[tuple[str, Objective]]:
        return [(name, part) for name, part in self.objectives.items() if isinstance(part, Objective)]

    def _net(self, name: str) -> nn.Module:
        return _Normalized(self.networks[name], self.mean, self.std)

    def _logits(self, name: str, images: Tensor) -> Tensor:
        logits: Tensor = self._net(name)(images)
        objective = self.objectives[name]
        return objective.attack_logits(logits) if isinstance(objective, Objective) else logits


class _Normalized(nn.Module):
    """A network that takes images in [0, 1]; a module, so that objectives find its layers."""

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, mean, std
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits
