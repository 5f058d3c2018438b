"""Retraining the classifier head on virtual features once training is over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_plugins.batches import BatchFn, LogitsFn, forward_logits, inputs_and_targets
from lightning_plugins.calibration.metrics import ece
from lightning_plugins.calibration.scoring import nll
from lightning_plugins.calibration.virtual_representations import FeatureStatistics, HeadCalibration, calibrate_head_
from lightning_plugins.callbacks._composition import check_composition, tell_weights_were_replaced
from lightning_plugins.callbacks._distributed import gather_rows
from lightning_plugins.callbacks.calibration._features import (
    classes_of,
    evaluating,
    find_head,
    head_inputs_and_outputs,
    training_batches,
)
from lightning_plugins.checks import check_types
from lightning_plugins.grouped import ClassAccuracy
from lightning_plugins.logging import log_callback_hyperparameters, log_metrics

__all__ = ["ClassifierHeadCalibration"]


class ClassifierHeadCalibration(pl.Callback):
    """Retrain the last layer at the end of ``fit``, on virtual features with the means and covariances of the classes.

    The sums that make them, :class:`.FeatureStatistics`, are collected in one pass over the training data, in eval mode
    and without augmentation where the data are ours, added up over processes, and merged with the ``statistics`` of
    clients; then :func:`.calibrate_head_` retrains ``weight`` and ``bias`` of the head and nothing else. With the same
    number of virtual features of each class this is a remedy for imbalanced data as well.

    It acts at the end of the last epoch, before checkpoints of that epoch are written, so that they hold the new head;
    where the end comes as a surprise (an early stop that is decided later, checkpoints written at a validation), after
    training: ``trainer.save_checkpoint`` then stores it. A run that is resumed goes on from the head as it was trained,
    which is part of this callback's state. A :class:`PostHocCalibration` is fitted again to the new head.

    Logged where there is validation data: ``calibration/head_acc_before`` and ``_after``, ``head_balanced_acc_``,
    ``head_ece_`` (fractions) and ``head_nll_`` (nats), and always ``calibration/head_loss_before`` and ``_after``, the
    cross-entropy on the virtual features.

    Args:
        samples_per_class: virtual features of each class, at least 1.
        balance: as many of each class; otherwise in proportion to the classes.
        learning_rate: of SGD, above 0.
        num_epochs: passes over the virtual features, at least 1.
        batch_size: at least 1.
        shrinkage: towards a sphere where a class has fewer samples than features, in [0, 1].
        power: of the features before the Gaussian is fitted, in (0, 1]; see :class:`.FeatureStatistics`.
        non_negative: clamp virtual features at 0, as a ReLU does.
        statistics: of clients: files that :meth:`.FeatureStatistics.save` wrote, or the objects.
        use_training_data: collect from this run's training data; None does so just where no ``statistics`` are given.
        head: name of the linear classifier in the module; None for the last linear layer.
        num_bins: of the ECE, at least 1.
        dataloader_idx: which of several validation loaders to measure on.
        seed: of the virtual features and of the order, at least 0.
        batch_fn: takes the batch, returns ``(inputs, targets)``; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; default ``pl_module(inputs)``.

    Raises:
        ValueError: for a wrong argument.
        FileNotFoundError: in ``setup``, if there is no file of statistics.
        MisconfigurationException: in ``setup`` for a module without a linear head, statistics of another network, a
            place before weight averaging, or a strategy that shards weights.

    Example:
        >>> from lightning_plugins.callbacks import ClassifierHeadCalibration
        >>> trainer = pl.Trainer(callbacks=[ClassifierHeadCalibration()], logger=False, enable_checkpointing=False)

    Reference:
        M. Luo et al., "No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data",
        NeurIPS 2021.
    """

    reads_final_weights = True
    changes_final_weights = True
    needs_whole_weights = True

    @check_types
    def __init__(
        self,
        samples_per_class: int = 200,
        *,
        balance: bool = True,
        learning_rate: float = 0.01,
        num_epochs: int = 10,
        batch_size: int = 64,
        shrinkage: float = 0.1,
        power: float = 1.0,
        non_negative: bool = False,
        statistics: Sequence[str | FeatureStatistics] | None = None,
        use_training_data: bool | None = None,
        head: str | None = None,
        num_bins: int = 15,
        dataloader_idx: int = 0,
        seed: int = 0,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        for name, value, least in (
            ("samples_per_class", samples_per_class, 1),
            ("num_epochs", num_epochs, 1),
            ("batch_size", batch_size, 1),
            ("num_bins", num_bins, 1),
            ("dataloader_idx", dataloader_idx, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0 and finite, got {learning_rate!r}")
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage!r}")
        if not 0 < power <= 1:
            raise ValueError(f"power must lie in (0, 1], 1 for the features as they are, got {power!r}")
        if isinstance(statistics, (str, os.PathLike, FeatureStatistics)):
            raise ValueError(f"statistics must be a list of files or objects, got {statistics!r}; write [statistics]")
        if use_training_data is False and not statistics:
            raise ValueError("use_training_data=False needs the statistics of clients; pass statistics=[...]")
        self.samples_per_class, self.balance = samples_per_class, balance
        self.learning_rate, self.num_epochs, self.batch_size = learning_rate, num_epochs, batch_size
        self.shrinkage, self.power, self.non_negative = shrinkage, power, non_negative
        self.statistics = tuple(statistics or ())
        self.use_training_data = not self.statistics if use_training_data is None else use_training_data
        self.head, self.num_bins, self.dataloader_idx, self.seed = head, num_bins, dataloader_idx, seed
        self.batch_fn: BatchFn = batch_fn or inputs_and_targets
        self.logits_fn: LogitsFn = logits_fn or forward_logits
        self.calibrated_at_step: int | None = None
        self.report: HeadCalibration | None = None
        self._collected: FeatureStatistics | None = None
        self._trained: dict[str, Tensor] = {}

    @property
    def collected(self) -> FeatureStatistics:
        """Of this run's training data, all processes together, without those of clients.

        Raises:
            RuntimeError: before the end of ``fit``, or if none were collected.
        """
        if self._collected is None:
            raise RuntimeError("no statistics were collected; run trainer.fit with use_training_data=True first")
        return self._collected

    def save_statistics(self, path: str | os.PathLike[str]) -> Path:
        """Write :attr:`collected` for whoever merges the statistics of all clients; they tell about the samples."""
        return self.collected.save(path)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_composition(trainer)
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # the head may come from there, and Lightning calls it only later
        self._refuse_converted(find_head(pl_module, self.head))
        self._of_clients()
        log_callback_hyperparameters(trainer, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        head = find_head(pl_module, self.head)  # layers have their final form now
        self._refuse_converted(head)
        if clients := self._of_clients():
            self._check_fits(clients[0], head)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Training goes on, in a resumed run for instance: from the head as it was trained.
        if self._trained and self.calibrated_at_step == trainer.global_step:
            head = find_head(pl_module, self.head)
            with torch.no_grad():
                for name, value in self._trained.items():
                    getattr(head, name).copy_(value)
        self.calibrated_at_step, self._trained = None, {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # Averaged weights take the place of the trained ones only after the last epoch.
        if _is_last_epoch(trainer) and not any(isinstance(callback, WeightAveraging) for callback in callbacks):
            metrics = self._calibrate(trainer, pl_module)
            pl_module.log_dict(metrics, sync_dist=True)  # the same in all processes; sync_dist tells Lightning so

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.calibrated_at_step != trainer.global_step:
            log_metrics(trainer, self._calibrate(trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        if self.calibrated_at_step is None:
            return {}
        return {"calibrated_at_step": self.calibrated_at_step, "trained_head": self._trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calibrated_at_step = state_dict["calibrated_at_step"]
        self._trained = dict(state_dict["trained_head"])

    # Mechanism

    def _refuse_converted(self, head: nn.Linear) -> None:
        if type(head).forward is not nn.Linear.forward:
            raise MisconfigurationException(
                f"ClassifierHeadCalibration retrains a head that computes with its weights as they are, found a "
                f"{type(head).__name__}; leave the last layer in full precision (first_last_bits=32, or "
                "keep_real=('last',) for BinaryQAT)"
            )

    def _of_clients(self) -> list[FeatureStatistics]:
        return [FeatureStatistics.load(item) if isinstance(item, str) else item for item in self.statistics]

    def _check_fits(self, statistics: FeatureStatistics, head: nn.Linear) -> None:
        if (statistics.num_classes, statistics.num_features) != (head.out_features, head.in_features):
            raise MisconfigurationException(
                f"the head has {head.out_features} classes and {head.in_features} features, the clients' statistics "
                f"{statistics.num_classes} and {statistics.num_features}; collect them with the same network"
            )

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Retrain the head and return what there is to log."""
        head = find_head(pl_module, self.head)
        device = pl_module.device if pl_module.device.type != "mps" else torch.device("cpu")
        power = self.power
        clients = self._of_clients()
        if clients and not self.use_training_data:
            power = clients[0].power
        statistics = FeatureStatistics(head.out_features, head.in_features, power=power, device=device)
        if self.use_training_data:
            self._collect(trainer, pl_module, head, statistics)
            self._collected = FeatureStatistics.from_state_dict(
                {name: value.cpu() for name, value in statistics.state_dict().items()}
            )
        statistics.merge(*clients)
        if not statistics.counts.all() or statistics.counts.max() < 2:
            rank_zero_warn(
                "ClassifierHeadCalibration left the head as it was: some classes have no samples (counts "
                f"{statistics.counts.tolist()}); give it data, or statistics of clients, in which every class occurs"
            )
            self.calibrated_at_step = trainer.global_step
            return {}
        metrics = self._measure(trainer, pl_module, head, "before")
        self._trained = {name: value.detach().cpu().clone() for name, value in head.named_parameters(recurse=False)}
        self.report = calibrate_head_(
            head,
            statistics,
            samples_per_class=self.samples_per_class,
            balance=self.balance,
            learning_rate=self.learning_rate,
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            shrinkage=self.shrinkage,
            non_negative=self.non_negative,
            seed=self.seed,
        )
        # Sums may differ in the last bit between machines.
        new = trainer.strategy.broadcast({name: value.detach() for name, value in head.named_parameters(recurse=False)})
        with torch.no_grad():
            for name, value in new.items():
                getattr(head, name).copy_(value)
        self.calibrated_at_step = trainer.global_step
        metrics |= self._measure(trainer, pl_module, head, "after")
        metrics["calibration/head_loss_before"] = self.report.loss_before
        metrics["calibration/head_loss_after"] = self.report.loss_after
        return metrics | tell_weights_were_replaced(trainer, pl_module)

    def _collect(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, head: nn.Linear, statistics: FeatureStatistics
    ) -> None:
        with evaluating(pl_module, self.seed):
            for batch in training_batches(trainer):
                inputs, targets = self.batch_fn(batch)
                features, _ = head_inputs_and_outputs(trainer, pl_module, head, self.logits_fn, inputs)
                statistics.update(features, classes_of(targets))
        for name in ("counts", "sums", "products"):
            total = trainer.strategy.reduce(getattr(statistics, name), reduce_op="sum")
            setattr(statistics, name, total)

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, head: nn.Linear, when: str
    ) -> dict[str, float]:
        """Return accuracies, ECE and NLL on the validation data, nothing where there is none."""
        loaders = [] if trainer.val_dataloaders is None else CombinedLoader(trainer.val_dataloaders).flattened
        if self.dataloader_idx >= len(loaders) or not trainer.num_val_batches[self.dataloader_idx]:
            return {}
        loader, limit = loaders[self.dataloader_idx], trainer.num_val_batches[self.dataloader_idx]
        rows: list[tuple[Tensor, Tensor]] = []
        with evaluating(pl_module, self.seed):
            for number, batch in enumerate(loader):
                if number >= limit:
                    break
                batch = trainer.precision_plugin.convert_input(batch)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=self.dataloader_idx)
                inputs, targets = self.batch_fn(batch)
                _, logits = head_inputs_and_outputs(trainer, pl_module, head, self.logits_fn, inputs)
                rows.append((logits, classes_of(targets)))
        logits, labels = (gather_rows(trainer, torch.cat(parts)) for parts in zip(*rows, strict=True))
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):  # the last rows may repeat the first ones
            size = len(sampler.dataset)  # type: ignore[arg-type]
            logits, labels = logits[:size], labels[:size]
        accuracy = ClassAccuracy(logits.shape[1])
        accuracy.update(logits, labels)
        counts = accuracy.correct.sum() / accuracy.total.sum(), accuracy.per_class().nanmean()
        values = {"acc": counts[0], "balanced_acc": counts[1]}
        values |= {"ece": ece(logits, labels, num_bins=self.num_bins, input="logits")}
        values |= {"nll": nll(logits, labels, input="logits")}
        return {f"calibration/head_{name}_{when}": value.item() for name, value in values.items()}


def _is_last_epoch(trainer: pl.Trainer) -> bool:
    """Whether training ends with the epoch that is ending, as far as one can know by now."""
    done, steps = trainer.current_epoch + 1, trainer.global_step
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= done or 0 <= trainer.max_steps <= steps:
        return True
    return trainer.should_stop and done >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
