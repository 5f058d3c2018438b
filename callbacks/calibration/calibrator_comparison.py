"""Every calibrator on one trained network, in one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_plugins.batches import BatchFn, LogitsFn, forward_logits, inputs_and_targets
from lightning_plugins.calibration import Calibrator
from lightning_plugins.calibration._comparison import (
    REPORTED,
    Contestant,
    comparison_figure,
    evaluate,
    fit_all,
    named,
    ranked,
    table_of,
)
from lightning_plugins.callbacks._borrow import borrow_attribute
from lightning_plugins.callbacks._composition import check_composition
from lightning_plugins.callbacks._distributed import gather_rows, num_repeated
from lightning_plugins.callbacks.calibration._logits import check_logits, visit_batches
from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically
from lightning_plugins.logging import log_callback_hyperparameters, log_figure, log_table

__all__ = ["CalibratorComparison"]

_METRICS = (*REPORTED, "equal_mass_ece", "debiased_ece")


class CalibratorComparison(pl.Callback):
    """Fit every calibrator on the validation data, measure all of them on the test data, and change nothing.

    The fits are made at the end of ``fit`` and whenever ``trainer.validate`` runs; in a bare ``trainer.test`` they are
    made on the validation loader of the data module, or of the module. Then ``test`` measures: the table
    ``test/calibrators`` and a figure of the same name, with 95 % bootstrap intervals, ``test/<metric>/<calibrator>``
    for NLL and ECE, and all numbers in ``calibrators.json`` (:meth:`export`). ``uncalibrated`` are the logits as they
    are. A calibrator that cannot be fitted to the data stays in the table, with the reason.

    Intervals that overlap do not tell two calibrators apart; and the best of many on the test data is better there than
    elsewhere. To choose one, use :class:`.CalibratorSelection`, which sees the validation data alone.

    The logits are those of the module without other callbacks: :class:`PostHocCalibration` beside this one does not
    show in them. Data, weights and random state stay as they are, and the fits are no part of a checkpoint.

    Args:
        calibrators: a dictionary by name, or a list; default all of them, with their defaults. Some take a minute for
            10,000 samples of 100 classes.
        metrics: names of what :func:`.calibration_report` returns, the first one decides on which diagrams to draw;
            default NLL, Brier score, accuracy, ECE, class-wise ECE, KS error and smooth ECE.
        num_bins: equal-width bins, at least 1.
        num_bootstrap: resamples of an interval, at least 2, or 0 for none; default 200 below 20,000 test samples.
        dataloader_idx: which of several validation and test loaders.
        seed: of the resamples.
        batch_fn: takes the batch, returns ``(inputs, targets)``; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; default the module's ``forward``.

    Raises:
        TypeError: if one of ``calibrators`` is none.
        ValueError: for a wrong argument, and when the logits or labels are unfit for calibration.
        MisconfigurationException: if the module does not return logits.

    Warns:
        UserWarning: in ``test``, if there is no validation data, so that nothing can be compared.

    Example:
        >>> from lightning_plugins.callbacks import CalibratorComparison
        >>> trainer = pl.Trainer(callbacks=[CalibratorComparison()], logger=False, enable_checkpointing=False)
    """

    reads_final_weights = True

    @check_types
    def __init__(
        self,
        calibrators: dict[str, Calibrator] | list[Calibrator] | None = None,
        *,
        metrics: Sequence[str] | None = None,
        num_bins: int = 15,
        num_bootstrap: int | None = None,
        dataloader_idx: int = 0,
        seed: int = 0,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        self._by_name = named(calibrators)
        self.calibrators = tuple(self._by_name)
        self.metrics = REPORTED if metrics is None else tuple(metrics)
        if isinstance(metrics, str) or not self.metrics or not set(self.metrics) <= set(_METRICS):
            raise ValueError(f"metrics must be names of {', '.join(_METRICS)}, got {metrics!r}")
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins!r}")
        if num_bootstrap is not None and (num_bootstrap < 0 or num_bootstrap == 1):
            raise ValueError(f"num_bootstrap must be at least 2, or 0 for no intervals, got {num_bootstrap!r}")
        if dataloader_idx < 0:
            raise ValueError(f"dataloader_idx must be at least 0, got {dataloader_idx!r}")
        self.num_bins = num_bins
        self.num_bootstrap = num_bootstrap
        self.dataloader_idx = dataloader_idx
        self.seed = seed
        self.batch_fn: BatchFn = batch_fn or inputs_and_targets
        self.logits_fn = logits_fn
        self.results: dict[str, dict[str, Any]] = {}
        self._contestants: list[Contestant] = []
        self._num_fitted_on = 0
        self._forward: Any = None
        self._num_tested = 0
        self._rows: list[tuple[Tensor, Tensor]] = []

    def export(self, directory: Path) -> list[Path]:
        """Write ``calibrators.json``: what was measured on the test data, and how the fits went."""
        if not self.results:
            return []
        report = {
            "calibration_samples": self._num_fitted_on,
            "test_samples": self._num_tested,
            "num_bins": self.num_bins,
            "level": 0.95,
            "best": {metric: best[0].name for metric in self.metrics if (best := ranked(self._contestants, metric))},
            "calibrators": self.results,
        }
        return [write_atomically(directory / "calibrators.json", json.dumps(report, indent=2).encode())]

    # Fitting

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # What a callback puts in place of forward, when a stage starts, must not be calibrated again.
        self._forward = pl_module.forward
        if stage == "fit":
            check_composition(trainer)
            self._contestants = []  # of other weights
            log_callback_hyperparameters(trainer, self)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit_on_validation_loader(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._fit_on_validation_loader(trainer, pl_module)

    # Measuring

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rows = []
        if not self._contestants:
            self._fit_on_the_datas_own_loader(trainer, pl_module)
        if not self._contestants:
            rank_zero_warn(
                "CalibratorComparison has no validation data to fit calibrators on, so it compares nothing; run "
                "trainer.fit or trainer.validate before, or give the data module a val_dataloader."
            )

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._contestants and dataloader_idx == self.dataloader_idx:
            self._rows.append(self._logits_and_labels(trainer, pl_module, batch))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._rows:
            return
        loader = CombinedLoader(trainer.test_dataloaders).flattened[self.dataloader_idx]
        logits, labels = self._gathered(trainer, self._rows, loader)
        self._rows, self._num_tested = [], len(labels)
        evaluate(
            self._contestants,
            logits,
            labels,
            self.metrics,
            num_bins=self.num_bins,
            num_bootstrap=self.num_bootstrap,
            seed=self.seed,
        )
        self.results = {contestant.name: contestant.plain() for contestant in self._contestants}
        pl_module.log_dict(
            {
                f"test/{metric}/{contestant.name}": contestant.estimates[metric].value
                for contestant in self._contestants
                for metric in ("nll", "ece")
                if metric in contestant.estimates
            },
            sync_dist=True,
        )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.results and trainer.loggers and trainer.is_global_zero:
            log_table(trainer, "test/calibrators", *table_of(self._contestants, self.metrics))
            log_figure(trainer, "test/calibrators", comparison_figure(self._contestants, self.metrics))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._forward = None
        self._rows = []

    # Mechanism

    def _fit_on_validation_loader(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        limits = trainer.num_val_batches
        if trainer.val_dataloaders is None or self.dataloader_idx >= len(limits) or not limits[self.dataloader_idx]:
            return
        loader = CombinedLoader(trainer.val_dataloaders).flattened[self.dataloader_idx]
        rows = self._pass_over(trainer, pl_module, loader, limits[self.dataloader_idx])
        self._fit(trainer, *self._gathered(trainer, rows, loader))

    def _fit_on_the_datas_own_loader(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit in a bare test, for which Lightning makes no validation loader."""
        data: Any = getattr(trainer, "datamodule", None)
        if data is not None and is_overridden("val_dataloader", data):
            data.setup("validate")
        elif is_overridden("val_dataloader", pl_module):
            data = pl_module
        else:
            return
        loaders = CombinedLoader(data.val_dataloader()).flattened
        if self.dataloader_idx >= len(loaders):
            return
        loader, share = loaders[self.dataloader_idx], trainer.limit_val_batches
        limit = share if isinstance(share, int) else int(share * len(loader)) if share < 1 else float("inf")
        # No sampler splits this loader: each process sees all of it.
        if rows := self._pass_over(trainer, pl_module, loader, limit):
            self._fit(trainer, *(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def _pass_over(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any, limit: float
    ) -> list[tuple[Tensor, Tensor]]:
        rows: list[tuple[Tensor, Tensor]] = []

        def visit(batch: Any) -> None:
            rows.append(self._logits_and_labels(trainer, pl_module, batch))

        visit_batches(trainer, pl_module, loader, limit, visit, dataloader_idx=self.dataloader_idx)
        return rows

    def _logits_and_labels(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any
    ) -> tuple[Tensor, Tensor]:
        inputs, labels = self.batch_fn(batch)
        restore = borrow_attribute(pl_module, "forward", self._forward)
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                logits = (self.logits_fn or forward_logits)(pl_module, inputs)
        finally:
            restore()
        check_logits(self, logits)
        return logits.cpu(), labels.cpu()

    def _gathered(self, trainer: pl.Trainer, rows: list[tuple[Tensor, Tensor]], loader: Any) -> tuple[Tensor, Tensor]:
        logits, labels = (gather_rows(trainer, torch.cat(parts)) for parts in zip(*rows, strict=True))
        total = len(labels) - num_repeated(trainer, loader, len(labels))
        return logits[:total], labels[:total]

    def _fit(self, trainer: pl.Trainer, logits: Tensor, labels: Tensor) -> None:
        # Every process fits on the same rows; the state of the first one counts, since sums may differ in the last bit
        # between machines.
        self._contestants = fit_all(self._by_name, logits, labels)
        self._num_fitted_on = len(labels)
        if trainer.world_size > 1:
            for contestant in self._contestants:
                if contestant.calibrator is not None:
                    state = trainer.strategy.broadcast(contestant.calibrator.state_dict())
                    contestant.calibrator.load_state_dict(state)
        for contestant in self._contestants:
            if contestant.failure is not None:
                rank_zero_warn(f"CalibratorComparison goes on without {contestant.name}: {contestant.failure}")
