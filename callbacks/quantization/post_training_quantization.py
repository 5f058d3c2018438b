"""Quantizing what a Trainer has trained, with a part of its training data and no further training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchmetrics import MeanMetric

from lightning_plugins.batches import BatchFn, LogitsFn, forward_logits, inputs_and_targets
from lightning_plugins.callbacks._composition import check_composition
from lightning_plugins.checks import check_types
from lightning_plugins.data.loading import without_augmentation
from lightning_plugins.files import write_atomically
from lightning_plugins.logging import log_callback_hyperparameters, log_figure, log_metrics, log_table
from lightning_plugins.quantization.accounting import cost
from lightning_plugins.quantization.accuracy_budget import plan_within_accuracy
from lightning_plugins.quantization.adaquant import MEMORY_LIMIT, LearningRates, Mode
from lightning_plugins.quantization.convert import (
    BatchNorms,
    check_precisions,
    convert_,
    load_converted,
    quantized_layers,
    restore_,
    switch_,
)
from lightning_plugins.quantization.copying import copy_network
from lightning_plugins.quantization.layers import FULL_PRECISION
from lightning_plugins.quantization.packed import _make_plain, save_packed
from lightning_plugins.quantization.plan import BitPlan
from lightning_plugins.quantization.post_training import (
    Pipeline,
    PostTrainingReport,
    StageResult,
    post_training_quantize,
)
from lightning_plugins.quantization.scale_calibration import Bits
from lightning_plugins.quantization.scores import Method as Score
from lightning_plugins.quantization.scores import score_layers

__all__ = ["PostTrainingQuantization"]

_ROWS = 64  # of a batch of calibration data


class PostTrainingQuantization(pl.Callback):
    """Quantize the trained network after ``fit``: CalibTIP, on a part of the training data, without training.

    The module itself is left as it is, in full precision: its training, its checkpoints and its own metrics are those
    of a run without this callback. The quantized network is a copy that this callback holds, saves in its own state,
    evaluates beside the module, exports, and hands out by :meth:`quantized_module`. ``trainer.save_checkpoint`` after
    ``fit`` stores both; checkpoints that were written during training hold the module alone.

    It is made at the end of ``fit``, and before ``validate`` and ``test`` where the module's weights are others than
    those it was made from, such as those of ``ckpt_path="best"``. What it is made from are ``num_samples`` samples of
    the training data (drawn by ``seed``; the data modules of this package give them without augmentation, data of
    others come as the training set gives them). For a module that another callback has converted it is its fp32 weights
    that are quantized.

    Logged: ``test/acc_quantized`` and ``test/acc_fp32`` (fractions in [0, 1], also under ``val/`` in
    ``trainer.validate``); after quantization ``quantization/avg_bits`` (bits per quantized weight) and for each stage
    such as ``naive``, ``adaquant``, ``biases`` its ``quantization/acc_<stage>`` and ``quantization/loss_<stage>``, on
    up to ``num_samples`` samples of the validation data where there are any, else on the calibration data; the figures
    ``quantization/stages`` and ``quantization/plan`` and the table ``quantization/layers``.

    Args:
        plan: bits of each layer, or the path of a :class:`.BitPlan`; its names are those in the LightningModule.
            Default: the lowest of ``bits`` for all, or what ``budget`` allows.
        bits: the precisions, 2 to 8.
        budget: choose a plan of ``bits`` that costs at most this, in ``unit``; see :func:`.allocate_bits`.
        unit: of the budget.
        accuracy_ratio: lower as many layers of ``bits`` as leave this share of the full-precision accuracy on the
            validation data, in (0, 1], such as 0.99; see :func:`.plan_within_accuracy`. In place of plan and budget.
        accuracy_confidence: in [0.5, 1), such as 0.95: how sure the plan must be to leave that share on other data too.
            None takes the accuracy as measured, which other data miss about every second time.
        score: orders the layers for ``accuracy_ratio``; see :func:`.score_layers`.
        pipeline: ``"full"``, or ``"light"`` without AdaQuant and the tuning of biases.
        mode: of AdaQuant, ``"sequential"`` or ``"parallel"``; see :func:`.adaquant_`.
        num_samples: of the calibration data, at least 2; about one to a class at 1000 classes in the paper.
        num_steps: of AdaQuant, for each layer.
        batch_size: of AdaQuant's random minibatches.
        learning_rates: of AdaQuant.
        seed: of the choice of samples and of minibatches.
        memory_limit: bytes for one layer's inputs and outputs in AdaQuant.
        include: quantize only layers whose names match one of these patterns.
        exclude: nor those whose names match one of these.
        first_last_bits: least bits of the first and the last layer; 32 leaves them as they are.
        depthwise_bits: least bits of depthwise convolutions.
        per_channel: one weight scale for each output channel; otherwise one for each layer.
        quantize_inputs: quantize what goes into the layers too.
        batch_norm: of the copy: one for each precision, or ``"shared"``.
        quantize_residual: also quantize what enters residual sums to 8 bits, which integer runtimes need to be fast.
        batch_fn: takes the batch, returns ``(inputs, targets)``; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; default ``pl_module(inputs)``.

    Raises:
        ValueError: for a wrong argument.
        FileNotFoundError: if there is no plan at the path.
        MisconfigurationException: in ``setup`` for a module in which there is nothing to quantize or that the plan does
            not fit; later for data that are no classification, or without training data in ``validate`` and ``test``.

    Example:
        >>> from lightning_plugins.callbacks import PostTrainingQuantization
        >>> quantize = PostTrainingQuantization(bits=(8, 4))
        >>> trainer = pl.Trainer(callbacks=[quantize], logger=False, enable_checkpointing=False)

    Reference:
        Hubara et al., *Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming*,
        2020.
    """

    quantizes_afterwards = True
    reads_final_weights = True
    needs_whole_weights = True

    @check_types
    def __init__(
        self,
        plan: str | Mapping[str, int] | None = None,
        *,
        bits: Sequence[int] = (8, 4),
        budget: float | None = None,
        unit: Literal["average_bits", "average_bits_per_layer", "bytes", "bops"] = "average_bits",
        accuracy_ratio: float | None = None,
        accuracy_confidence: float | None = None,
        score: Score = "pairwise",
        pipeline: Pipeline = "full",
        mode: Mode = "sequential",
        num_samples: int = 1024,
        num_steps: int = 1000,
        batch_size: int = 50,
        learning_rates: LearningRates | None = None,
        seed: int = 0,
        memory_limit: int = MEMORY_LIMIT,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        first_last_bits: int = 8,
        depthwise_bits: int = 8,
        per_channel: bool = True,
        quantize_inputs: bool = True,
        batch_norm: BatchNorms = "shared",
        quantize_residual: bool = False,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        self.plan = plan
        loaded = BitPlan.load(plan) if isinstance(plan, str | os.PathLike) else plan
        self._plan = None if loaded is None else BitPlan(loaded)
        self.bits = check_precisions(bits)
        if FULL_PRECISION in self.bits:
            raise ValueError(f"bits must be 2 to 8; full precision is always there to compare with, got {tuple(bits)}")
        given = {"plan": plan, "budget": budget, "accuracy_ratio": accuracy_ratio}
        if len(chosen := [f"{name}={value!r}" for name, value in given.items() if value is not None]) > 1:
            raise ValueError(f"give plan, budget or accuracy_ratio, one of them, got {' and '.join(chosen)}")
        if accuracy_ratio is not None and not (0 < accuracy_ratio <= 1 and len(self.bits) > 1):
            raise ValueError(
                f"accuracy_ratio must lie in (0, 1] with at least two bits to choose among, got {accuracy_ratio!r} "
                f"and bits={tuple(bits)}"
            )
        if accuracy_confidence is not None and not (0.5 <= accuracy_confidence < 1 and accuracy_ratio is not None):
            raise ValueError(
                f"accuracy_confidence must lie in [0.5, 1) and needs accuracy_ratio, got {accuracy_confidence!r} and "
                f"accuracy_ratio={accuracy_ratio!r}"
            )
        if budget is not None and not budget > 0:
            raise ValueError(f"budget must be positive, got {budget!r}")
        choices: dict[str, tuple[object, tuple[str, ...]]] = {
            "score": (score, get_args(Score)),
            "unit": (unit, ("average_bits", "average_bits_per_layer", "bytes", "bops")),
            "pipeline": (pipeline, ("full", "light")),
            "mode": (mode, ("parallel", "sequential")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        limits = {"num_samples": (num_samples, 2), "num_steps": (num_steps, 0), "batch_size": (batch_size, 1)}
        for name, (number, least) in limits.items():
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number!r}")
        self.accuracy_ratio, self.accuracy_confidence, self.score = accuracy_ratio, accuracy_confidence, score
        self.budget, self.unit, self.pipeline, self.mode = budget, unit, pipeline, mode
        self.num_samples, self.num_steps, self.batch_size = num_samples, num_steps, batch_size
        self.learning_rates, self.seed, self.memory_limit = learning_rates, seed, memory_limit
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.first_last_bits, self.depthwise_bits = first_last_bits, depthwise_bits
        self.per_channel, self.quantize_inputs = per_channel, quantize_inputs
        self.batch_norm, self.quantize_residual = batch_norm, quantize_residual
        self.batch_fn: BatchFn = batch_fn or inputs_and_targets
        self.logits_fn: LogitsFn = logits_fn or forward_logits
        self.report: PostTrainingReport | None = None
        self._quantized: pl.LightningModule | None = None
        self._made_from: int | None = None
        self._saved: dict[str, Any] = {}
        self._correct: dict[str, MeanMetric] = {}

    def quantized_module(self) -> pl.LightningModule:
        """Return a copy of the quantized module, in evaluation mode, at its plan.

        Raises:
            RuntimeError: before the first ``fit``, ``validate`` or ``test``.
        """
        if self._quantized is None:
            raise RuntimeError("there is no quantized module yet; run trainer.fit, trainer.validate or trainer.test")
        return copy_network(self._quantized)

    def export(self, directory: Path) -> list[Path]:
        """Write ``packed.safetensors`` for :func:`.load_packed`, ``plan.json``, ``cost.txt`` and ``stages.txt``.

        A plan with layers at 32 bits has no packed file.
        """
        if self._quantized is None or self.report is None:
            return []
        plan = self.report.plan
        written = [
            plan.save(directory / "plan.json"),
            write_atomically(directory / "cost.txt", f"{cost(self._quantized, plan)}\n".encode()),
            write_atomically(directory / "stages.txt", f"{self.report}\n".encode()),
        ]
        if FULL_PRECISION not in plan.values():
            written.insert(0, save_packed(self._quantized, directory / "packed.safetensors", plan=plan))
        return written

    # When

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_composition(trainer)
        if stage != "fit":
            return
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # the layers may come from there, and Lightning calls it only later
        self._converted_copy(pl_module)  # what cannot be quantized is refused now and not after training
        log_callback_hyperparameters(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget()  # checkpoints on the way shall not hold the net of an earlier run

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        validation = trainer.val_dataloaders if trainer.enable_validation else None
        self._quantize(trainer, pl_module, trainer.train_dataloader, validation)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._start_evaluation(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING and dataloader_idx == 0:
            self._evaluate(trainer, pl_module, batch)

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
            self._evaluate(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._log_accuracies(pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_accuracies(pl_module, "test")

    # State

    def state_dict(self) -> dict[str, Any]:
        if self._quantized is None or self.report is None:
            return self._saved
        return {
            "module": {name: value.cpu() for name, value in self._quantized.state_dict().items()},
            "made_from": self._made_from,
            "plan": dict(self.report.plan),
            "average_bits": self.report.average_bits,
            "stages": {name: [stage.loss, stage.accuracy] for name, stage in self.report.stages.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._forget()
        self._saved = dict(state_dict)

    # Mechanism

    def _forget(self) -> None:
        self._quantized, self._made_from, self.report, self._saved = None, None, None, {}

    def _plain_copy(self, pl_module: pl.LightningModule) -> pl.LightningModule:
        """Copy a module as the fp32 net that it is, without what other callbacks have put on it."""
        module = copy_network(pl_module)
        plain = vars(nn.Module())
        for name, value in list(vars(module).items()):
            if callable(value) and name not in plain and hasattr(type(module), name):
                delattr(module, name)  # in the place of a method, bound to the original: a tap, a step of a callback
        if quantized_layers(module):
            restore_(module)
        _make_plain(module)  # pruned and parametrized weights as they are now
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()):
            module.float()
        return module.eval()

    def _converted_copy(self, pl_module: pl.LightningModule) -> pl.LightningModule:
        module = self._plain_copy(pl_module)
        planned = () if self._plan is None else self._plan.values()
        try:
            convert_(
                module,
                sorted({*self.bits, *planned, FULL_PRECISION}),
                include=self.include,
                exclude=self.exclude,
                first_last_bits=self.first_last_bits,
                depthwise_bits=self.depthwise_bits,
                per_channel=self.per_channel,
                quantize_inputs=self.quantize_inputs,
                batch_norm=self.batch_norm,
                quantize_residual=self.quantize_residual,
            )
            if self._plan is not None:
                switch_(module, self._plan)
        except ValueError as error:
            raise MisconfigurationException(f"PostTrainingQuantization: {error}") from error
        return module

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule, training: Any, validation: Any) -> None:
        quick = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        count = min(self.num_samples, _ROWS) if quick else self.num_samples
        plan: Bits | None = self._plan
        if plan is None and self.budget is None:
            plan = min(self.bits)
        # Tensors made under the inference mode of an evaluation cannot take part in a fit.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(pl_module.device.type, enabled=False):
            module = self._converted_copy(pl_module)
            batches = self._batches(trainer, module, CombinedLoader(training).flattened[0], count)
            held_out = None
            if validation is not None and validation != []:  # our data modules return [] without a split
                held_out = self._batches(trainer, module, CombinedLoader(validation).flattened[0], count)
            try:
                if self.accuracy_ratio is not None:
                    plan = self._within_accuracy(trainer, module, batches, held_out)
                report = post_training_quantize(
                    module,
                    batches,
                    plan,
                    budget=self.budget,
                    unit=self.unit,
                    pipeline=self.pipeline,
                    mode=self.mode,
                    num_steps=min(self.num_steps, 2) if quick else self.num_steps,
                    batch_size=self.batch_size,
                    learning_rates=self.learning_rates,
                    seed=self.seed,
                    memory_limit=self.memory_limit,
                    evaluation=held_out,
                    forward=self.logits_fn,  # type: ignore[arg-type]
                    progress=trainer.progress_bar_callback is not None and trainer.is_global_zero,
                )
            except ValueError as error:
                raise MisconfigurationException(f"PostTrainingQuantization: {error}") from error
            if trainer.world_size > 1:
                # Every process has computed the same from the same samples, up to the last bit of its machine's sums.
                report, state = trainer.strategy.broadcast((report, module.state_dict()))
                module.load_state_dict(state)
                switch_(module, report.plan)
        self._quantized, self._made_from, self.report = module, _fingerprint(pl_module), report
        self._saved = {}
        self._log_report(trainer)

    def _within_accuracy(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batches: list[tuple[Tensor, Tensor]],
        held_out: list[tuple[Tensor, Tensor]] | None,
    ) -> BitPlan:
        """Return the plan with as few bits as the accuracy allows, and show how it was found."""
        assert self.accuracy_ratio is not None
        table = score_layers(module, self.score, batches, seed=self.seed)
        result = plan_within_accuracy(
            module,
            table,
            batches,
            ratio=self.accuracy_ratio,
            evaluation=held_out,
            forward=self.logits_fn,  # type: ignore[arg-type]
            confidence=self.accuracy_confidence,
        )
        if trainer.loggers:
            log_figure(trainer, "quantization/sensitivity", table.figure())
            columns = ["evaluation", "bits", "layers_lowered", "accuracy", "feasible"]
            rows = [[k, e.bits, e.num_lowered, e.metric, e.feasible] for k, e in enumerate(result.history)]
            log_table(trainer, "quantization/bisection", columns, rows)
        plan: BitPlan = trainer.strategy.broadcast(result.plan)
        return plan

    def _batches(
        self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return samples of a loader's data, on the CPU, in batches of nearly the same size."""
        dtype = next(module.parameters()).dtype
        inputs, targets, rows = [], [], 0
        with isolate_rng():  # what loads the data may draw from the global generators
            for batch in _samples(loader, count, seed=self.seed):
                x, y = self.batch_fn(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
                inputs.append(x.to("cpu", dtype) if x.is_floating_point() else x.cpu())
                targets.append(y.cpu())
                rows += len(x)
                if rows >= count:
                    break
        if rows < 2:
            raise MisconfigurationException(
                f"PostTrainingQuantization needs at least 2 samples to calibrate with, and found {rows}"
            )
        parts = -(-min(rows, count) // _ROWS)
        x, y = torch.cat(inputs)[:count], torch.cat(targets)[:count]
        return list(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True))

    def _start_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        current = _fingerprint(pl_module)
        if self._quantized is None and self._saved.get("made_from") == current:
            self._rebuild(pl_module)
        if self._quantized is None or self._made_from != current:
            self._quantize_outside_of_fit(trainer, pl_module)
        assert self._quantized is not None
        self._quantized.to(pl_module.device)
        names = ("quantized", "fp32")
        self._correct = {name: MeanMetric(nan_strategy="disable").to(pl_module.device) for name in names}

    def _rebuild(self, pl_module: pl.LightningModule) -> None:
        saved = self._saved
        with torch.inference_mode(False):
            module = load_converted(self._plain_copy(pl_module), saved["module"])
        plan = BitPlan(saved["plan"])
        stages = {name: StageResult(*values) for name, values in saved["stages"].items()}
        self._quantized, self._made_from = switch_(module, plan), saved["made_from"]
        self.report, self._saved = PostTrainingReport(plan, saved["average_bits"], stages), {}

    def _quantize_outside_of_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        source = pl_module if datamodule is None else datamodule
        if not is_overridden("train_dataloader", source):
            raise MisconfigurationException(
                "PostTrainingQuantization has no quantized net of these weights and no training data to make one; give "
                f"the {'module' if datamodule is None else 'data module'} a train_dataloader, run fit with this "
                "callback, or test with the Trainer that did"
            )
        with isolate_rng():
            if datamodule is not None:
                datamodule.setup("fit")
            validated = trainer.limit_val_batches and is_overridden("val_dataloader", source)
            validation = source.val_dataloader() if validated else None
            self._quantize(trainer, pl_module, source.train_dataloader(), validation)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        assert self._quantized is not None
        inputs, targets = self.batch_fn(batch)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            logits = {"fp32": self.logits_fn(pl_module, inputs)}
        own = inputs.to(next(self._quantized.parameters()).dtype) if inputs.is_floating_point() else inputs
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            logits["quantized"] = self.logits_fn(self._quantized, own)
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        for name, values in logits.items():
            self._correct[name].update((values.argmax(1) == labels).float())

    def _log_accuracies(self, pl_module: pl.LightningModule, stage: str) -> None:
        values = {f"{stage}/acc_{name}": metric.compute() for name, metric in self._correct.items()}
        pl_module.log_dict(values, sync_dist=True)  # reduced already; sync_dist only tells Lightning so

    def _log_report(self, trainer: pl.Trainer) -> None:
        report, module = self.report, self._quantized
        assert report is not None
        assert module is not None
        rank_zero_info(f"post-training quantization\n{report}")
        metrics = {"quantization/avg_bits": report.average_bits}
        for name, stage in report.stages.items():
            key = name.replace(" ", "_")
            metrics |= {f"quantization/acc_{key}": stage.accuracy, f"quantization/loss_{key}": stage.loss}
        log_metrics(trainer, metrics)
        if not trainer.loggers:
            return
        log_figure(trainer, "quantization/stages", report.figure())
        log_figure(trainer, "quantization/plan", report.plan.figure())
        rows = []
        for name, layer in quantized_layers(module).items():
            before, after = report.errors.get(name, (None, None))
            rows.append([name, report.plan[name], layer.weight.numel(), before, after])
        log_table(trainer, "quantization/layers", ["layer", "bits", "weights", "error_before", "error_after"], rows)


def _samples(loader: Any, count: int, *, seed: int) -> Any:
    """Return batches of a random part of a loader's data set; of a stream, its own batches."""
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return loader
    # A loader of our own: the original may be in the middle of an epoch that a checkpoint remembers.
    chosen = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed))[:count]  # type: ignore[arg-type]
    part: Dataset[Any] = Subset(without_augmentation(loader.dataset), chosen.tolist())
    return DataLoader(part, batch_size=_ROWS, collate_fn=loader.collate_fn, generator=torch.Generator())


def _fingerprint(module: nn.Module) -> int:
    """A number that differs for other weights."""
    digest = hashlib.blake2b(digest_size=7)  # fits into 63 bits, which a checkpoint keeps as a plain number
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "big")
