"""Calibrate a classifier on its validation data, inside the Trainer."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from torchmetrics import MeanMetric

from lightning_plugins.batches import BatchFn, LogitsFn, forward_logits, inputs_and_targets
from lightning_plugins.calibration import (
    CalibratedModule,
    CalibrationError,
    Calibrator,
    CalibratorSelection,
    ReliabilityBins,
    TemperatureScaling,
    reliability_bins,
    reliability_diagram,
)
from lightning_plugins.callbacks._borrow import tap_forward
from lightning_plugins.callbacks._distributed import gather_rows
from lightning_plugins.callbacks.calibration._logits import visit_batches
from lightning_plugins.files import write_atomically
from lightning_plugins.logging import log_callback_hyperparameters, log_figure, log_metrics, log_table

__all__ = ["PostHocCalibration"]


class _ForwardTap:
    """Stands in for a module's ``forward``: remembers the logits it returned, and calibrates them on request."""

    def __init__(self, pl_module: pl.LightningModule, calibrator: Calibrator | None) -> None:
        self.logits: list[Tensor] = []
        self.calibrator = calibrator
        self.restore = tap_forward(pl_module, self.see)

    def see(self, output: Any) -> Any:
        if isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point():
            self.logits.append(output.detach())
            return output if self.calibrator is None else self.calibrator(output)
        if self.calibrator is not None:
            shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
            raise MisconfigurationException(
                "PostHocCalibration expected forward to return logits (N, C), found "
                f"{type(output).__name__}{shape}; set calibrate_outputs=False and use calibrated_module() or the "
                "calibrator itself."
            )
        return output


class PostHocCalibration(pl.Callback):
    """Fit a calibrator on the validation logits whenever validation runs, and calibrate ``test`` and ``predict``.

    During ``fit`` every validation fits anew, so each checkpoint holds the calibrator of its own weights; if the last
    weights were not validated, they are after training. A slow calibrator is fitted once, after training, with
    ``when="fit_end"``; checkpoints written before then hold none. ``trainer.validate`` fits on demand either way, on
    any loader given to it.
    Logits come for free from the ``forward`` call inside ``validation_step``; where there is no such single call, one
    more forward pass is made. In ``test`` and ``predict``, ``forward`` returns calibrated log-probabilities, which are
    logits too: a cross-entropy, softmax or argmax in the module's step needs no change.

    Logged (nats, and fractions in [0, 1]): ``calibration/nll_before``, ``nll_after``, ``ece_before``, ``ece_after`` on
    the data of the fit, with the calibrator's own quantities such as ``calibration/temperature``; the same four under
    ``test/``; reliability diagrams ``calibration/reliability`` and ``test/reliability``; where there was a choice, the
    table ``calibration/selection`` and ``calibration/chosen``, the position of the winner. ECE after the fit, on the
    data of the fit, flatters; the figures to quote are those of the test set.

    Data, weights and random state stay as they are, and the validation data must not be part of the training data.

    Args:
        calibrator: any :class:`.Calibrator`; default temperature scaling. A list is a :class:`.CalibratorSelection`
            with its defaults: the one with the best cross-validated NLL on the validation data.
        when: ``"validation"`` fits at every validation, ``"fit_end"`` once after training.
        num_bins: equal-width bins of ECE and of the diagrams, at least 1.
        dataloader_idx: which of several validation loaders to fit on.
        calibrate_outputs: whether ``forward`` is calibrated during ``test`` and ``predict``.
        batch_fn: takes the batch, returns ``(inputs, targets)``; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; given, it is always used for the fit.

    Raises:
        ValueError: for a wrong argument, and when the validation logits or labels are unfit for calibration.
        MisconfigurationException: if there is no validation data, or nothing was fitted before ``test`` or ``predict``.

    Example:
        >>> from lightning_plugins.callbacks import PostHocCalibration
        >>> trainer = pl.Trainer(callbacks=[PostHocCalibration()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        calibrator: Calibrator | list[Calibrator] | None = None,
        *,
        when: Literal["validation", "fit_end"] = "validation",
        num_bins: int = 15,
        dataloader_idx: int = 0,
        calibrate_outputs: bool = True,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        if isinstance(calibrator, (list, tuple)):
            calibrator = calibrator[0] if len(calibrator) == 1 else CalibratorSelection(calibrator)
        if calibrator is not None and not isinstance(calibrator, Calibrator):
            raise TypeError(
                f"calibrator must be a Calibrator such as TemperatureScaling(), got {type(calibrator).__name__}"
            )
        if when not in ("validation", "fit_end"):
            raise ValueError(f"when must be 'validation' or 'fit_end', got {when!r}")
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins!r}")
        if dataloader_idx < 0:
            raise ValueError(f"dataloader_idx must be at least 0, got {dataloader_idx!r}")
        self.calibrator = calibrator if calibrator is not None else TemperatureScaling()
        self.when = when
        self.num_bins = num_bins
        self.dataloader_idx = dataloader_idx
        self.calibrate_outputs = calibrate_outputs
        self.batch_fn: BatchFn = batch_fn or inputs_and_targets
        self.logits_fn = logits_fn
        self.fitted_at_step: int | None = None
        self._pl_module: pl.LightningModule | None = None
        self._tap: _ForwardTap | None = None
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._bins: dict[str, ReliabilityBins] = {}

    @property
    def is_fitted(self) -> bool:
        """Whether a calibrator for some weights is there, fitted or loaded from a checkpoint."""
        return self.fitted_at_step is not None

    def calibrated_module(self) -> CalibratedModule:
        """Return a copy of the trained module with its calibrator behind it, in eval mode, for deployment.

        The copy shares nothing with the Trainer's module. It goes through ``torch.export`` and ONNX like any module.

        Raises:
            RuntimeError: before the first ``fit``, ``validate`` or ``test``.
        """
        if self._pl_module is None or not self.is_fitted:
            raise RuntimeError("there is no calibrated module yet; run trainer.fit or trainer.validate first")
        module = CalibratedModule(deepcopy(self._pl_module), deepcopy(self.calibrator))
        return module.to(self._pl_module.device).eval()

    def export(self, directory: Path) -> list[Path]:
        """Write the fitted calibrator: ``calibrator.safetensors`` (its state) and ``calibration.json`` (what it is)."""
        from safetensors.torch import save

        if not self.is_fitted:
            return []
        info = {
            "calibrator": type(self.calibrator).__name__,
            "fitted_at_step": self.fitted_at_step,
            "quantities": self.calibrator.quantities(),
            "fit_info": self.calibrator.fit_info,
        }
        if isinstance(self.calibrator, CalibratorSelection):
            info["chosen"] = self.calibrator.chosen
        state = {name: value.detach().cpu().contiguous() for name, value in self.calibrator.state_dict().items()}
        return [
            write_atomically(directory / "calibrator.safetensors", save(state)),
            write_atomically(directory / "calibration.json", json.dumps(info, indent=2).encode()),
        ]

    # Collecting, during any validation

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._pl_module = pl_module
        if stage != "fit":
            return
        if not trainer.enable_validation:
            self._refuse_no_data("this run has no validation")
        log_callback_hyperparameters(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = trainer.num_val_batches
        loaded = trainer.val_dataloaders is not None
        if loaded and (self.dataloader_idx >= len(batches) or batches[self.dataloader_idx] == 0):
            self._refuse_no_data(f"validation loader {self.dataloader_idx} is empty or absent")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.when == "fit_end":
            self.fitted_at_step = None  # a calibrator of earlier weights must not enter the next checkpoints

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._logits, self._labels = [], []
        if self._fits_here(trainer):
            self._tap = _ForwardTap(pl_module, None)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._forget_batch()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == self.dataloader_idx and self._fits_here(trainer):
            self._keep(*self._logits_and_labels(trainer, pl_module, batch))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_tap()
        if self._fits_here(trainer):
            pl_module.log_dict(self._fit(trainer, pl_module), sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer, "calibration/reliability")
            self._draw_selection(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Checkpoint callbacks come last, so what they save at the end of training holds this fit.
        if self.fitted_at_step != trainer.global_step or not self._bins:
            log_metrics(trainer, self.refit(trainer, pl_module))
        self._draw(trainer, "calibration/reliability")
        self._draw_selection(trainer)

    # Calibrated outputs, and what calibration gave on the test set

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calibrate_forward(pl_module, "test")
        device = pl_module.device
        self._test_ece = {
            "before": CalibrationError(self.num_bins, input="logits").to(device),
            "after": CalibrationError(self.num_bins, input="log_probs").to(device),
        }
        self._test_nll = {when: MeanMetric(nan_strategy="disable").to(device) for when in ("before", "after")}

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._forget_batch()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx != self.dataloader_idx:
            return
        logits, labels = self._logits_and_labels(trainer, pl_module, batch)
        for when, log_probs in {"before": logits.float().log_softmax(1), "after": self.calibrator(logits)}.items():
            self._test_ece[when].update(log_probs, labels)
            self._test_nll[when].update(nn.functional.nll_loss(log_probs, labels, reduction="none"))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_tap()
        metrics = {f"test/ece_{when}": metric.compute() for when, metric in self._test_ece.items()}
        metrics |= {f"test/nll_{when}": metric.compute() for when, metric in self._test_nll.items()}
        self._bins = {when: metric.bins() for when, metric in self._test_ece.items()}
        pl_module.log_dict(metrics, sync_dist=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, "test/reliability")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calibrate_forward(pl_module, "predict")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_tap()

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._forget_batch()  # predictions need no labels, and nothing reads their logits

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove_tap()

    # State

    def state_dict(self) -> dict[str, Any]:
        if not self.is_fitted:
            return {}
        return {
            "calibrator": {name: value.cpu() for name, value in self.calibrator.state_dict().items()},
            "fit_info": self.calibrator.fit_info,
            "fitted_at_step": self.fitted_at_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calibrator.load_state_dict(state_dict["calibrator"])
        self.calibrator.fit_info = state_dict["fit_info"]
        self.fitted_at_step = state_dict["fitted_at_step"]

    # Mechanism

    def _fits_here(self, trainer: pl.Trainer) -> bool:
        """Whether the validation that is running ends in a fit."""
        return not trainer.sanity_checking and (self.when == "validation" or trainer.state.fn == TrainerFn.VALIDATING)

    def _refuse_no_data(self, finding: str) -> None:
        raise MisconfigurationException(
            f"PostHocCalibration fits on validation data, but {finding}; give the module a validation_step and a "
            "non-empty val_dataloader, leave limit_val_batches above 0, or calibrate later with trainer.validate(...)."
        )

    def _calibrate_forward(self, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.is_fitted:
            raise MisconfigurationException(
                f"PostHocCalibration has no fitted calibrator for {stage}; run trainer.fit or trainer.validate before, "
                "or pass ckpt_path= of a checkpoint that was saved with this callback."
            )
        self.calibrator.to(pl_module.device)
        self._tap = _ForwardTap(pl_module, self.calibrator if self.calibrate_outputs else None)

    def _forget_batch(self) -> None:
        if self._tap is not None:
            self._tap.logits.clear()

    def _remove_tap(self) -> None:
        if self._tap is not None:
            self._tap.restore()
            self._tap = None

    def _logits_and_labels(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the uncalibrated logits of a batch that the module has just evaluated, and its labels."""
        inputs, labels = self.batch_fn(batch)
        seen = self._tap.logits if self._tap is not None else []
        if self.logits_fn is None and len(seen) == 1 and len(seen[0]) == len(labels):
            return seen[0], labels
        seen.clear()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            logits = (self.logits_fn or forward_logits)(pl_module, inputs)
        # Under a tap, forward has returned calibrated values; the raw ones are what the tap saw.
        return (seen[-1] if seen else logits), labels

    def _keep(self, logits: Tensor, labels: Tensor) -> None:
        self._logits.append(logits.cpu())
        self._labels.append(labels.cpu())

    def refit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Fit on the validation data outside of a validation run, and return what there is to log."""
        loader = CombinedLoader(trainer.val_dataloaders).flattened[self.dataloader_idx]
        limit = trainer.num_val_batches[self.dataloader_idx]
        self._logits, self._labels = [], []

        def visit(batch: Any) -> None:
            self._keep(*self._logits_and_labels(trainer, pl_module, batch))

        visit_batches(trainer, pl_module, loader, limit, visit, dataloader_idx=self.dataloader_idx)
        return self._fit(trainer, pl_module)

    def _fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Fit on what all processes have collected and return what there is to log."""
        if not self._logits:
            self._refuse_no_data(f"validation loader {self.dataloader_idx} gave no batch")
        logits = gather_rows(trainer, torch.cat(self._logits))
        labels = gather_rows(trainer, torch.cat(self._labels))
        self._logits, self._labels = [], []
        total = len(labels) - self._num_repeated(trainer, len(labels))
        logits, labels = logits[:total], labels[:total]
        # Every process fits on the same rows, so that all of them see the same error if there is one; the state of the
        # first one counts, since sums may differ in the last bit between machines.
        self.calibrator.cpu().fit(logits, labels)
        state = trainer.strategy.broadcast(self.calibrator.state_dict())
        self.calibrator.load_state_dict(state)
        self.fitted_at_step = trainer.global_step
        self._bins = {
            "before": reliability_bins(logits, labels, num_bins=self.num_bins, input="logits"),
            "after": reliability_bins(self.calibrator(logits), labels, num_bins=self.num_bins, input="log_probs"),
        }
        info = self.calibrator.fit_info
        metrics = {f"calibration/nll_{when}": float(info[f"nll_{when}"]) for when in ("before", "after")}
        metrics |= {f"calibration/ece_{when}": bins.ece for when, bins in self._bins.items()}
        return metrics | {f"calibration/{name}": value for name, value in self.calibrator.quantities().items()}

    def _num_repeated(self, trainer: pl.Trainer, gathered: int) -> int:
        """How many of the gathered rows, the last ones, repeat the first ones to make the processes' shares equal."""
        loader = CombinedLoader(trainer.val_dataloaders).flattened[self.dataloader_idx]
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return 0
        repeated = gathered - len(sampler.dataset)  # type: ignore[arg-type]
        return repeated if 0 < repeated < trainer.world_size else 0

    def _draw(self, trainer: pl.Trainer, key: str) -> None:
        if self._bins and trainer.loggers:
            log_figure(trainer, key, reliability_diagram(self._bins["before"], self._bins["after"]))

    def _draw_selection(self, trainer: pl.Trainer) -> None:
        if isinstance(self.calibrator, CalibratorSelection) and self.calibrator.fit_info and trainer.loggers:
            columns = ["calibrator", f"cross-validated {self.calibrator.criterion}", "chosen"]
            scores = self.calibrator.scores()
            rows = [[name, value, "yes" if name == self.calibrator.chosen else ""] for name, value in scores.items()]
            log_table(trainer, "calibration/selection", columns, rows)
