"""Calibrate a classifier on its validation data, inside the Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
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
from lightning_plugins.callbacks._composition import check_composition
from lightning_plugins.callbacks._distributed import gather_rows, num_repeated
from lightning_plugins.callbacks._variants import active_variant, variant_ending, variants
from lightning_plugins.callbacks.calibration._logits import visit_batches
from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically
from lightning_plugins.logging import log_callback_hyperparameters, log_figure, log_metrics, log_table

__all__ = ["PostHocCalibration"]


class _ForwardTap:
    """Stands in for a module's ``forward``: remembers the logits it returned, and calibrates them on request."""

    def __init__(self, pl_module: pl.LightningModule, choose: Callable[[], Calibrator] | None) -> None:
        self.logits: list[Tensor] = []
        self.choose = choose
        self.restore = tap_forward(pl_module, self.see)

    def see(self, output: Any) -> Any:
        if isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point():
            self.logits.append(output.detach())
            return output if self.choose is None else self.choose()(output)
        if self.choose is not None:
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

    A net that can be evaluated in several states, such as the precisions of :class:`MultiPrecisionQAT`, gets one
    calibrator for each beside the one for how it rests (``calibrators``, by name): fitted on the logits of that state,
    in force while another callback has the net there. What is logged of them ends with the name of the state:
    ``test/ece_after_4bit``.

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
        per_variant: one more calibrator for each state of a net that has several.
        batch_fn: takes the batch, returns ``(inputs, targets)``; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; given, it is always used for the fit.

    Raises:
        ValueError: for a wrong argument, and when the validation logits or labels are unfit for calibration.
        MisconfigurationException: if there is no validation data, or nothing was fitted before ``test`` or ``predict``.

    Example:
        >>> from lightning_plugins.callbacks import PostHocCalibration
        >>> trainer = pl.Trainer(callbacks=[PostHocCalibration()], logger=False, enable_checkpointing=False)
    """

    reads_final_weights = True

    @check_types
    def __init__(
        self,
        calibrator: Calibrator | list[Calibrator] | None = None,
        *,
        when: Literal["validation", "fit_end"] = "validation",
        num_bins: int = 15,
        dataloader_idx: int = 0,
        calibrate_outputs: bool = True,
        per_variant: bool = True,
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
        self.per_variant = per_variant
        self.calibrators: dict[str, Calibrator] = {}
        self.batch_fn: BatchFn = batch_fn or inputs_and_targets
        self.logits_fn = logits_fn
        self.fitted_at_step: int | None = None
        self._pl_module: pl.LightningModule | None = None
        self._tap: _ForwardTap | None = None
        self._logits: dict[str, list[Tensor]] = {}  # by state, that at rest under ""
        self._labels: list[Tensor] = []
        self._bins: dict[str, ReliabilityBins] = {}

    @property
    def is_fitted(self) -> bool:
        """Whether a calibrator for some weights is there, fitted or loaded from a checkpoint."""
        return self.fitted_at_step is not None

    def calibrated_module(self, variant: str | None = None) -> CalibratedModule:
        """Return a copy of the trained module with its calibrator behind it, in eval mode, for deployment.

        The copy shares nothing with the Trainer's module. It goes through ``torch.export`` and ONNX like any module.

        Args:
            variant: the state that the copy is in, such as ``"4bit"``; default the one at rest.

        Raises:
            RuntimeError: before the first ``fit``, ``validate`` or ``test``.
            ValueError: for a state without a calibrator.
        """
        if self._pl_module is None or not self.is_fitted:
            raise RuntimeError("there is no calibrated module yet; run trainer.fit or trainer.validate first")
        if variant is None:
            module = CalibratedModule(deepcopy(self._pl_module), deepcopy(self.calibrator))
        else:
            owners = variants(self._pl_module.trainer)
            if variant not in self.calibrators or variant not in owners:
                raise ValueError(
                    f"variant must be one of the calibrated states {sorted(self.calibrators)}, got {variant!r}"
                )
            with owners[variant].variant(self._pl_module, variant) as net:
                module = CalibratedModule(deepcopy(net), deepcopy(self.calibrators[variant]))
        return module.to(self._pl_module.device).eval()

    def export(self, directory: Path) -> list[Path]:
        """Write the fitted calibrator: ``calibrator.safetensors`` (its state) and ``calibration.json`` (what it is).

        Those of further states are beside it, as ``calibrator_4bit.safetensors`` and so on.
        """
        from safetensors.torch import save

        if not self.is_fitted:
            return []
        info: dict[str, Any] = {
            "calibrator": type(self.calibrator).__name__,
            "fitted_at_step": self.fitted_at_step,
        }
        info |= _described(self.calibrator)
        if self.calibrators:
            info["variants"] = {name: _described(calibrator) for name, calibrator in self.calibrators.items()}
        paths = []
        for name, calibrator in self._by_state().items():
            state = {key: value.detach().cpu().contiguous() for key, value in calibrator.state_dict().items()}
            paths.append(write_atomically(directory / f"calibrator{variant_ending(name)}.safetensors", save(state)))
        return [*paths, write_atomically(directory / "calibration.json", json.dumps(info, indent=2).encode())]

    # Collecting, during any validation

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._pl_module = pl_module
        if stage != "fit":
            return
        check_composition(trainer)
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
        self._logits, self._labels = {}, []
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
            self._keep(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_tap()
        if self._fits_here(trainer):
            pl_module.log_dict(self._fit(trainer, pl_module), sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer, "calibration/reliability")
            self._draw_selection(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.val_dataloaders is None:  # nothing was validated, and the training is not to be lost for that
            rank_zero_warn(
                "PostHocCalibration fitted nothing, because no validation ran; lower check_val_every_n_epoch, or call "
                "trainer.validate before test and predict."
            )
            return
        # Checkpoint callbacks come last, so what they save at the end of training holds this fit.
        if self.fitted_at_step != trainer.global_step or not self._bins:
            log_metrics(trainer, self.refit(trainer, pl_module))
        self._draw(trainer, "calibration/reliability")
        self._draw_selection(trainer)

    # Calibrated outputs, and what calibration gave on the test set

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calibrate_forward(trainer, pl_module, "test")
        device = pl_module.device
        self._test_ece, self._test_nll = {}, {}
        for ending in map(variant_ending, self._by_state()):
            self._test_ece[f"before{ending}"] = CalibrationError(self.num_bins, input="logits").to(device)
            self._test_ece[f"after{ending}"] = CalibrationError(self.num_bins, input="log_probs").to(device)
            for when in ("before", "after"):
                self._test_nll[f"{when}{ending}"] = MeanMetric(nan_strategy="disable").to(device)

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
        by_state, labels = self._logits_and_labels(trainer, pl_module, batch)
        for name, calibrator in self._by_state().items():
            if name not in by_state:  # a state of the checkpoint's run that this one does not have
                continue
            logits = by_state[name]
            for when, log_probs in (("before", logits.float().log_softmax(1)), ("after", calibrator(logits))):
                key = f"{when}{variant_ending(name)}"
                self._test_ece[key].update(log_probs, labels)
                self._test_nll[key].update(nn.functional.nll_loss(log_probs, labels, reduction="none"))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_tap()
        metrics = {}
        for key in self._test_ece:
            if self._test_nll[key].update_called:
                metrics[f"test/ece_{key}"] = self._test_ece[key].compute()
                metrics[f"test/nll_{key}"] = self._test_nll[key].compute()
        self._bins = {when: self._test_ece[when].bins() for when in ("before", "after")}
        pl_module.log_dict(metrics, sync_dist=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, "test/reliability")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._calibrate_forward(trainer, pl_module, "predict")

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
        state = {**_state_of(self.calibrator), "fitted_at_step": self.fitted_at_step}
        if self.calibrators:
            state["variants"] = {name: _state_of(calibrator) for name, calibrator in self.calibrators.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("variants", {}) if self.per_variant else {}
        self.calibrators = {name: deepcopy(self.calibrator) for name in saved}
        for name, calibrator in self._by_state().items():
            state = saved[name] if name else state_dict
            calibrator.load_state_dict(state["calibrator"])
            calibrator.fit_info = state["fit_info"]
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

    def _by_state(self) -> dict[str, Calibrator]:
        return {"": self.calibrator, **self.calibrators}

    def _calibrate_forward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.is_fitted:
            raise MisconfigurationException(
                f"PostHocCalibration has no fitted calibrator for {stage}; run trainer.fit or trainer.validate before, "
                "or pass ckpt_path= of a checkpoint that was saved with this callback."
            )
        for calibrator in self._by_state().values():
            calibrator.to(pl_module.device)

        def choose() -> Calibrator:
            return self.calibrators.get(active_variant(trainer) or "", self.calibrator)

        self._tap = _ForwardTap(pl_module, choose if self.calibrate_outputs else None)

    def _forget_batch(self) -> None:
        if self._tap is not None:
            self._tap.logits.clear()

    def _remove_tap(self) -> None:
        if self._tap is not None:
            self._tap.restore()
            self._tap = None

    def _logits_and_labels(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the uncalibrated logits of a batch that the module has just evaluated, by state, and its labels."""
        inputs, labels = self.batch_fn(batch)
        seen = self._tap.logits if self._tap is not None else []
        if self.logits_fn is None and len(seen) == 1 and len(seen[0]) == len(labels):
            logits = {"": seen[0]}
        else:
            logits = {"": self._raw_logits(trainer, pl_module, inputs)}
        if self.per_variant:
            for name, owner in variants(trainer).items():
                with owner.variant(pl_module, name) as module:
                    logits[name] = self._raw_logits(trainer, module, inputs)
        return logits, labels

    def _raw_logits(self, trainer: pl.Trainer, module: pl.LightningModule, inputs: Tensor) -> Tensor:
        self._forget_batch()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            logits = (self.logits_fn or forward_logits)(module, inputs)
        # Under a tap, forward has returned calibrated values; the raw ones are what the tap saw.
        seen = self._tap.logits if self._tap is not None else []
        return seen[-1] if seen else logits

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        by_state, labels = self._logits_and_labels(trainer, pl_module, batch)
        for name, logits in by_state.items():
            self._logits.setdefault(name, []).append(logits.cpu())
        self._labels.append(labels.cpu())

    def weights_replaced(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Fit again if the weights that the calibrator was fitted to are no longer there; return what there is to log.

        One that has not been fitted to the weights of this step will see the new ones by itself.
        """
        return self.refit(trainer, pl_module) if self.fitted_at_step == trainer.global_step else {}

    def refit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Fit on the validation data outside of a validation run, and return what there is to log."""
        loader = CombinedLoader(trainer.val_dataloaders).flattened[self.dataloader_idx]
        limit = trainer.num_val_batches[self.dataloader_idx]
        self._logits, self._labels = {}, []

        def visit(batch: Any) -> None:
            self._keep(trainer, pl_module, batch)

        visit_batches(trainer, pl_module, loader, limit, visit, dataloader_idx=self.dataloader_idx)
        return self._fit(trainer, pl_module)

    def _fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Fit on what all processes have collected and return what there is to log."""
        if not self._logits:
            self._refuse_no_data(f"validation loader {self.dataloader_idx} gave no batch")
        labels = gather_rows(trainer, torch.cat(self._labels))
        loader = CombinedLoader(trainer.val_dataloaders).flattened[self.dataloader_idx]
        total = len(labels) - num_repeated(trainer, loader, len(labels))
        labels = labels[:total]
        rows = {name: gather_rows(trainer, torch.cat(batches))[:total] for name, batches in self._logits.items()}
        self._logits, self._labels = {}, []
        self.calibrators = {name: deepcopy(self.calibrator) for name in rows if name}
        metrics: dict[str, float] = {}
        for name, calibrator in self._by_state().items():
            # Every process fits on the same rows, so that all of them see the same error if there is one; the state of
            # the first one counts, since sums may differ in the last bit between machines.
            calibrator.cpu().fit(rows[name], labels)
            calibrator.load_state_dict(trainer.strategy.broadcast(calibrator.state_dict()))
            bins = {
                "before": reliability_bins(rows[name], labels, num_bins=self.num_bins, input="logits"),
                "after": reliability_bins(calibrator(rows[name]), labels, num_bins=self.num_bins, input="log_probs"),
            }
            if not name:
                self._bins = bins
            values = {f"nll_{when}": float(calibrator.fit_info[f"nll_{when}"]) for when in bins}
            values |= {f"ece_{when}": each.ece for when, each in bins.items()} | calibrator.quantities()
            metrics |= {f"calibration/{quantity}{variant_ending(name)}": value for quantity, value in values.items()}
        self.fitted_at_step = trainer.global_step
        return metrics

    def _draw(self, trainer: pl.Trainer, key: str) -> None:
        if self._bins and trainer.loggers:
            log_figure(trainer, key, reliability_diagram(self._bins["before"], self._bins["after"]))

    def _draw_selection(self, trainer: pl.Trainer) -> None:
        if isinstance(self.calibrator, CalibratorSelection) and self.calibrator.fit_info and trainer.loggers:
            columns = ["calibrator", f"cross-validated {self.calibrator.criterion}", "chosen"]
            scores = self.calibrator.scores()
            rows = [[name, value, "yes" if name == self.calibrator.chosen else ""] for name, value in scores.items()]
            log_table(trainer, "calibration/selection", columns, rows)


def _described(calibrator: Calibrator) -> dict[str, Any]:
    info: dict[str, Any] = {"quantities": calibrator.quantities(), "fit_info": calibrator.fit_info}
    return info | ({"chosen": calibrator.chosen} if isinstance(calibrator, CalibratorSelection) else {})


def _state_of(calibrator: Calibrator) -> dict[str, Any]:
    state = {name: value.cpu() for name, value in calibrator.state_dict().items()}
    return {"calibrator": state, "fit_info": calibrator.fit_info}
