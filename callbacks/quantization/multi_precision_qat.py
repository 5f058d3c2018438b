"""Training one network at several precisions with any Trainer and module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import MeanMetric

from lightning_plugins.batches import BatchFn, LogitsFn
from lightning_plugins.callbacks._borrow import tap_forward
from lightning_plugins.callbacks._composition import check_composition
from lightning_plugins.callbacks._variants import HasVariants
from lightning_plugins.callbacks.quantization._conversion import ConvertsLayers
from lightning_plugins.callbacks.quantization._scale_groups import give_groups
from lightning_plugins.callbacks.training_step import Step, TrainingStepCallback
from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically
from lightning_plugins.logging import log_figure, log_table
from lightning_plugins.quantization.accounting import cost
from lightning_plugins.quantization.alrs import AdaptiveLearningRateScaling, ScalingRule
from lightning_plugins.quantization.convert import (
    SPEC_KEY,
    BatchNorms,
    batch_norm_and_bias_parameters,
    check_precisions,
    clamp_scales_,
    convert_,
    idle_parameters,
    model_precisions,
    quantized_layers,
    scale_parameters,
    switch_,
)
from lightning_plugins.quantization.figures import accuracy_figure, code_histograms
from lightning_plugins.quantization.layers import FULL_PRECISION, InputInit, ResidualQuantizer
from lightning_plugins.quantization.packed import save_packed
from lightning_plugins.quantization.quantizers import ScaleGrad
from lightning_plugins.quantization.self_distillation import ProgressiveSelfDistillation

__all__ = ["MultiPrecisionQAT"]

SampleIdsFn = Callable[[Any], Tensor]
Bits = int | Mapping[str, int]


class MultiPrecisionQAT(ConvertsLayers, HasVariants, TrainingStepCallback):
    """Train one set of weights to work at several precisions: Double Rounding with adaptive learning-rate scaling.

    In ``setup`` the module's convolutions and linear layers are converted in place (see :func:`.convert_`), before
    optimizers are made and weights restored, so checkpoints load and runs resume. Each training step then runs at
    every precision, the highest first. The scales get parameter groups of their own, named ``"quant_scales"``, without
    weight decay, with a learning rate that follows the first group's. Outside of the training step the module is at its
    highest precision, and it stays converted after the run: :func:`.switch_` chooses a precision, :func:`.restore_`
    takes the conversion back.

    A checkpoint of such a run is one of a converted module. With this callback in the Trainer it loads anywhere;
    without, ``load_from_checkpoint`` and ``test(ckpt_path=...)`` fail and say so, and
    :func:`.load_converted` converts and loads a fresh module.

    Callbacks that evaluate do so at each precision too: :class:`PostHocCalibration`, which fits a calibrator for each,
    and :class:`RobustnessEvaluation` with ``per_variant=True``.

    Logged: ``val/acc_8bit`` and so on and their mean ``val/acc_bits_mean``, the same under ``test/`` (fractions in
    [0, 1], measured by this callback in further forward passes); once an epoch ``quantization/lambda_8bit`` (learning
    rate of the scales), ``quantization/weight_scale``, ``quantization/input_scale_8bit`` (means over layers),
    ``quantization/clipped_weights_8bit``, ``quantization/clipped_inputs_8bit`` (shares, mean over layers, inputs of the
    first validation batch); the figures ``test/accuracy_over_bits`` and ``quantization/codes`` and the table
    ``quantization/layers``.

    Args:
        bits: the precisions, 2 to 8, and 32 for full precision beside them.
        stepping: ``"sequential"`` takes an optimizer step at each precision, as the paper does; ``global_step`` counts
            them as one. It cannot work with ``accumulate_grad_batches`` and float16 with loss scaling.
            ``"accumulate"`` adds the losses of all precisions and steps once; it works with everything. None, the
            default, is sequential where that can work.
        alrs: learning rate of the scales, see :class:`.AdaptiveLearningRateScaling`. With ``"accumulate"`` the
            gradients of the weight scales, which all precisions share, are weighted so instead; ``"paper"`` and
            ``"relative"`` look at one precision's gradients alone and need ``"sequential"``.
        self_distillation: share of the previous epoch's prediction at the highest precision in the last epoch's
            targets, see :class:`.ProgressiveSelfDistillation`; 0 for none, the paper has 0.7. The module's loss must
            take soft targets ``(N, C)`` and its ``training_step`` must call ``forward``.
        sample_ids_fn: takes the batch, returns the samples' indices ``(N,)`` in the training set, for
            ``self_distillation``. Default: the batch's third element, which our data modules give
            (``with_index=True``).
        start_from: a checkpoint whose weights ``fit`` starts from: of the same module in fp32, or converted for the
            same bits. Default: the module's own weights, trained or not.
        evaluate: measure accuracy at every precision in validation and test; needs logits ``(N, C)`` and integer
            labels.
        include: convert only layers whose names match one of these patterns.
        exclude: nor those whose names match one of these.
        first_last_bits: least bits of the first and the last layer; 32 leaves them as they are.
        depthwise_bits: least bits of depthwise convolutions.
        per_channel: one weight scale for each output channel; otherwise one for each layer.
        quantize_inputs: quantize what goes into the layers too.
        input_init: how input scales start, ``"percentile"`` or ``"lsq"``.
        scale_grad: gradient of the weight scales, ``"effective"`` or ``"exact"``.
        batch_norm: one for each precision, ``"transitional"`` or ``"shared"``; see :func:`.convert_`.
        quantize_residual: also quantize what enters residual sums to 8 bits, which integer runtimes need to be fast.
        batch_fn: takes the batch, returns ``(inputs, targets)``; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; default ``pl_module(inputs)``.

    Raises:
        ValueError: for a wrong argument.
        MisconfigurationException: in ``setup`` or at the start of ``fit``, for a Trainer or module that this cannot
            work with.

    Example:
        >>> from lightning_plugins.callbacks import MultiPrecisionQAT
        >>> trainer = pl.Trainer(callbacks=[MultiPrecisionQAT((8, 4, 2))], logger=False, enable_checkpointing=False)

    Reference:
        Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025, algorithms A.1 (accumulate) and A.2 (sequential).
    """

    @check_types
    def __init__(
        self,
        bits: Sequence[int] = (8, 6, 4, 2),
        *,
        stepping: Literal["accumulate", "sequential"] | None = None,
        alrs: ScalingRule = "eta",
        self_distillation: float = 0.0,
        sample_ids_fn: SampleIdsFn | None = None,
        start_from: str | None = None,
        evaluate: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        first_last_bits: int = FULL_PRECISION,
        depthwise_bits: int = 8,
        per_channel: bool = True,
        quantize_inputs: bool = True,
        input_init: InputInit = "percentile",
        scale_grad: ScaleGrad = "effective",
        batch_norm: BatchNorms = "per_precision",
        quantize_residual: bool = False,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        super().__init__(batch_fn=batch_fn, logits_fn=logits_fn)
        self.bits = check_precisions(bits)
        if stepping not in ("accumulate", "sequential", None):
            raise ValueError(f"stepping must be 'accumulate', 'sequential' or None, got {stepping!r}")
        self.scaling = AdaptiveLearningRateScaling(alrs, bits=self.bits)
        if self.scaling.needs_gradients and stepping == "accumulate":
            raise ValueError(
                f"alrs={alrs!r} scales the step of one precision by that precision's gradients, and "
                "stepping='accumulate' has one step for all; use stepping='sequential', or alrs='eta'"
            )
        if not 0 <= self_distillation <= 1:
            raise ValueError(f"self_distillation must lie in [0, 1], got {self_distillation!r}")
        self.stepping, self.alrs = stepping, alrs
        self._sequential = stepping == "sequential"
        self.self_distillation, self.sample_ids_fn = self_distillation, sample_ids_fn
        self.start_from, self.evaluate = start_from, evaluate
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.first_last_bits, self.depthwise_bits = first_last_bits, depthwise_bits
        self.per_channel, self.quantize_inputs = per_channel, quantize_inputs
        self.input_init, self.scale_grad = input_init, scale_grad
        self.batch_norm, self.quantize_residual = batch_norm, quantize_residual
        self._pl_module: pl.LightningModule | None = None
        self._handles: list[RemovableHandle] = []
        self._passes = self.bits  # a batch is trained in one pass for each
        self._now = self.bits[0]  # the precision of the pass, and the bits at which it computes
        self._bits_now: Bits = self.bits[0]
        self._lambdas: dict[int, float] = {}
        self._memory: ProgressiveSelfDistillation | None = None
        self._saved_memory: dict[str, Tensor] = {}
        self._correct: dict[str, MeanMetric] = {}
        self._clipped: dict[str, dict[int, Tensor]] = {}

    @property
    def backpropagates(self) -> bool:  # type: ignore[override]
        """Whether there is more than one pass, so that the loss it hands on is not the only one."""
        return len(self._passes) > 1

    @property
    def changes_targets(self) -> bool:  # type: ignore[override]
        """Whether it softens the targets."""
        return self.self_distillation > 0

    @property
    def remembers_predictions(self) -> bool:
        """Whether it knows the samples again."""
        return self.self_distillation > 0

    # Structure

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_composition(trainer)
        if stage == "fit":  # before anything is converted
            self._refuse_manual_optimization(pl_module)
            self._choose_stepping(trainer)
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # the layers may come from there, and Lightning calls it only later
        self._pl_module = pl_module
        if not quantized_layers(pl_module):
            start = self._read_start() if stage == "fit" else None
            converted = start is not None and any(key.endswith(SPEC_KEY) for key in start)
            if start is not None and not converted:
                self._load_start(pl_module, start)
            try:
                convert_(
                    pl_module,
                    self.bits,
                    include=self.include,
                    exclude=self.exclude,
                    first_last_bits=self.first_last_bits,
                    depthwise_bits=self.depthwise_bits,
                    per_channel=self.per_channel,
                    quantize_inputs=self.quantize_inputs,
                    input_init=self.input_init,
                    scale_grad=self.scale_grad,
                    batch_norm=self.batch_norm,
                    quantize_residual=self.quantize_residual,
                )
            except ValueError as error:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
            if start is not None and converted:
                self._load_start(pl_module, start)
        elif (found := model_precisions(pl_module)) != self.bits:
            raise MisconfigurationException(
                f"{type(self).__name__} trains {self.bits} bits and met a module that is converted for {found} "
                "already; use those bits, or call lightning_plugins.quantization.restore_(module) first"
            )
        super().setup(trainer, pl_module, stage)

    def _read_start(self) -> dict[str, Any] | None:
        if self.start_from is None:
            return None
        if not Path(self.start_from).is_file():
            raise MisconfigurationException(
                f"{type(self).__name__}(start_from={self.start_from!r}): there is no such checkpoint"
            )
        checkpoint = torch.load(self.start_from, map_location="cpu", weights_only=True)
        return dict(checkpoint.get("state_dict", checkpoint))

    def _load_start(self, pl_module: pl.LightningModule, state: dict[str, Any]) -> None:
        try:
            pl_module.load_state_dict(state)
        except RuntimeError as error:
            raise MisconfigurationException(
                f"{type(self).__name__}(start_from={self.start_from!r}) needs a checkpoint of this very module, in "
                f"fp32 or converted for {self.bits} bits: {error}"
            ) from error

    # What a subclass changes

    def _bits_at(self, trainer: pl.Trainer, bits: int) -> Bits:
        """Return the bits at which the pass for a precision computes."""
        return bits

    def _bits_at_rest(self) -> Bits:
        """Return the bits at which the module is outside of the training step."""
        return self.bits[0]

    def _evaluated(self) -> dict[str, Bits]:
        """Return the bits at which accuracy is measured, by the end of the metric's name."""
        return {f"{b}bit": b for b in self.bits}

    # What others evaluate

    def variant_names(self) -> tuple[str, ...]:
        return tuple(self._evaluated())

    @contextmanager
    def variant(self, pl_module: pl.LightningModule, name: str) -> Iterator[pl.LightningModule]:
        switch_(pl_module, self._evaluated()[name])
        self.active_variant = name
        try:
            yield pl_module
        finally:
            self.active_variant = None
            self._rest(pl_module)

    def variant_bytes(self, pl_module: pl.LightningModule, name: str) -> int | None:
        return cost(pl_module, self._evaluated()[name]).packed_alone_bytes

    def _choose_stepping(self, trainer: pl.Trainer) -> None:
        obstacle = None
        if trainer.accumulate_grad_batches != 1:
            obstacle = f"accumulate_grad_batches={trainer.accumulate_grad_batches}"
        elif getattr(trainer.precision_plugin, "scaler", None) is not None:
            obstacle = f"precision={trainer.precision!r}, whose loss scaling knows one step a batch"
        self._sequential = self.stepping != "accumulate" and obstacle is None
        if obstacle and (self.stepping == "sequential" or (self.stepping is None and self.scaling.needs_gradients)):
            why = "" if self.stepping else f", which alrs={self.alrs!r} needs,"
            raise MisconfigurationException(
                f"{type(self).__name__}: stepping='sequential'{why} steps at each precision of each batch, and this "
                f"Trainer has {obstacle}; change that, or use stepping='accumulate' with alrs='eta'"
            )
        if obstacle and self.stepping is None:
            rank_zero_warn(
                f"{type(self).__name__} takes one step for all precisions, since this Trainer has {obstacle}; stepping "
                "at each precision is usually more accurate. Say stepping='accumulate' to have this without the "
                "warning."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._take_scales(trainer, pl_module)

    def _take_scales(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups = self._scale_groups(pl_module)
        give_groups(trainer, pl_module, groups, owner=type(self).__name__)
        if not self._sequential and self.alrs != "frozen":
            # All precisions pull at these; what each one adds counts as much as a step of its own would.
            hook = self._weigh_gradient
            self._handles = [scale.register_hook(hook) for scale in groups[None]]  # type: ignore[no-untyped-call]

    def _scale_groups(self, pl_module: pl.LightningModule) -> dict[int | None, list[nn.Parameter]]:
        groups = scale_parameters(pl_module)
        if self.scaling.scales_batch_norm:
            for b, parameters in batch_norm_and_bias_parameters(pl_module).items():
                groups.setdefault(b, []).extend(parameters)
        return groups

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave(pl_module)
        super().teardown(trainer, pl_module, stage)

    def _leave(self, pl_module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if quantized_layers(pl_module):
            self._rest(pl_module)

    def _rest(self, pl_module: pl.LightningModule) -> None:
        switch_(pl_module, self._bits_at_rest())

    # Training

    def around_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> STEP_OUTPUT:
        """Run the step at every precision, the highest first; the one at the lowest is left to Lightning."""
        ids = None
        if self.self_distillation:
            ids, batch = self._soften(trainer, batch)
        for b in self._passes[:-1]:
            step_here = partial(self._step_at, b, pl_module, step, batch, batch_idx, ids)
            if self._sequential:
                self._update(trainer, pl_module, step_here)
            elif (loss := _loss_of(step_here())) is not None:
                self.backward(loss)
        output = self._step_at(self._passes[-1], pl_module, step, batch, batch_idx, ids)
        loss = _loss_of(output)
        if loss is None or trainer.world_size == 1:
            return output
        # Processes exchange gradients once, in the last backward pass, and wait for every parameter; those of other
        # precisions have no part in its graph.
        loss = loss + 0.0 * sum(p.sum() for p in pl_module.parameters() if p.requires_grad)
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _step_at(
        self, bits: int, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int, ids: Tensor | None
    ) -> STEP_OUTPUT:
        self._now, self._bits_now = bits, self._bits_at(pl_module.trainer, bits)
        switch_(pl_module, self._bits_now)
        remember = ids is not None and bits == self._passes[0]
        seen: list[Tensor] = []

        def see(output: Any) -> Any:
            if isinstance(output, Tensor) and output.ndim == 2:
                seen.append(output.detach())
            return output

        restore = tap_forward(pl_module, see) if remember else None
        try:
            # A compiled net would be compiled twice, with the measuring of the scales and without; and once more for
            # each plan that a single step is taken at.
            lasting = not isinstance(self._bits_now, Mapping) or self._bits_now == self._bits_at_rest()
            if lasting and self._is_initialized(pl_module, self._bits_now):
                output = step(batch, batch_idx)
            else:
                with torch.compiler.set_stance("force_eager"):
                    output = step(batch, batch_idx)
        finally:
            if restore is not None:
                restore()
        if remember:
            self._remember(ids, seen)
        return output

    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Callable[[], STEP_OUTPUT]) -> None:
        """Take a whole optimizer step, within the one that Lightning takes for this batch."""
        (optimizer,) = trainer.optimizers

        def closure() -> Tensor | None:
            loss = _loss_of(step())
            optimizer.zero_grad()
            if loss is not None:
                with torch.autocast(pl_module.device.type, enabled=False):
                    trainer.strategy.backward(loss, optimizer)
                if trainer.world_size > 1:
                    for parameter in pl_module.parameters():
                        if parameter.grad is not None:
                            parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")
            return loss

        trainer.strategy.optimizer_step(optimizer, closure, model=pl_module)
        optimizer.zero_grad()
        clamp_scales_(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        lr = float(optimizer.param_groups[0]["lr"])
        own = [group for group in optimizer.param_groups if group.get("name") == "quant_scales"]
        if not self._sequential:
            quantized = self.scaling.bits
            self._lambdas = {b: self.scaling.learning_rate(lr, b) for b in quantized}
            for group in own:
                group["lr"] = self._lambdas[quantized[0] if group["bits"] is None else group["bits"]]
            return
        gradients = [layer.weight_scale.grad for layer in quantized_layers(pl_module).values()]
        present = [gradient for gradient in gradients if gradient is not None]
        in_use = {self._now, *(self._bits_now.values() if isinstance(self._bits_now, Mapping) else ())}
        for b in in_use - {FULL_PRECISION}:
            self._lambdas[b] = self.scaling.learning_rate(lr, b, present)
        # A zero from another process would still be a step of the momentum.
        idle = idle_parameters(pl_module)
        for group in own:
            group["lr"] = self._lambdas.get(self._now if group["bits"] is None else group["bits"], lr)
            if group["bits"] is not None and group["bits"] not in in_use:
                idle += group["params"]
        for parameter in idle:
            parameter.grad = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        clamp_scales_(pl_module)
        self._rest(pl_module)

    def _weigh_gradient(self, grad: Tensor) -> Tensor:
        return grad * self.scaling.factor(self._now) if self._now != FULL_PRECISION else grad

    @staticmethod
    def _is_initialized(pl_module: pl.LightningModule, bits: Bits) -> bool:
        for name, layer in quantized_layers(pl_module).items():
            b = bits[name] if isinstance(bits, Mapping) else bits
            quantizer = layer.input_quantizer
            if quantizer is not None and b in quantizer.bits and not quantizer.is_ready(b):
                return False
        residual = [module for module in pl_module.modules() if isinstance(module, ResidualQuantizer)]
        return bits == FULL_PRECISION or all(quantizer.is_ready(quantizer.BITS) for quantizer in residual)

    # Self-distillation

    def _soften(self, trainer: pl.Trainer, batch: Any) -> tuple[Tensor, Any]:
        """Return the samples' indices, and the batch with soft targets where there are predictions to soften with."""
        if self.sample_ids_fn is not None:
            ids = self.sample_ids_fn(batch)
        elif isinstance(batch, (tuple, list)) and len(batch) > 2 and isinstance(batch[2], Tensor):
            ids = batch[2]
        else:
            raise MisconfigurationException(
                "self_distillation remembers each sample's prediction and needs to know the samples: give the data "
                "module with_index=True, so that batches are (inputs, targets, indices), or pass sample_ids_fn"
            )
        if self._memory is None:
            return ids, batch
        _, targets = self.batch_fn(batch)
        return ids, self.replace(batch, targets, self._memory.soft_targets(ids, targets, epoch=trainer.current_epoch))

    def _remember(self, ids: Tensor | None, seen: list[Tensor]) -> None:
        assert ids is not None
        assert self._pl_module is not None
        if not seen or len(seen[-1]) != len(ids):
            raise MisconfigurationException(
                f"self_distillation reads the logits (N, C) that forward returns, and the training_step of "
                f"{type(self._pl_module).__name__} did not call it on the batch; call self(inputs) there"
            )
        if self._memory is None:
            self._memory = self._make_memory(self._pl_module.trainer, num_classes=seen[-1].shape[1])
        self._memory.remember(ids, seen[-1])

    def _make_memory(self, trainer: pl.Trainer, *, num_classes: int) -> ProgressiveSelfDistillation:
        return ProgressiveSelfDistillation(
            len(trainer.train_dataloader.dataset),  # type: ignore[union-attr]
            num_classes=num_classes,
            num_epochs=max(trainer.max_epochs or 1, 1),
            alpha=self.self_distillation,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._saved_memory:
            self._memory = self._make_memory(trainer, num_classes=self._saved_memory["current"].shape[1])
            self._memory.previous, self._memory.current = self._saved_memory["previous"], self._saved_memory["current"]
            self._saved_memory = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._memory is not None:
            if trainer.world_size > 1:  # each process has seen its own share of the samples, a few of them twice
                total = trainer.strategy.reduce(self._memory.current.to(pl_module.device), reduce_op="sum").cpu()
                self._memory.current = total / total.sum(1, keepdim=True).clamp_min(1.0)
            self._memory.next_epoch()
        pl_module.log_dict(self._scale_metrics(pl_module), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        if self._memory is None:
            return {}
        return {"previous": self._memory.previous, "current": self._memory.current}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_memory = dict(state_dict)

    # Evaluation and logging

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == 0 and not trainer.sanity_checking:
            self._evaluate(trainer, pl_module, batch, batch_idx)

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
            self._evaluate(trainer, pl_module, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.evaluate and not trainer.sanity_checking:
            pl_module.log_dict(self._accuracies("val"), sync_dist=True)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.evaluate:
            pl_module.log_dict(self._accuracies("test"), sync_dist=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.evaluate and trainer.loggers:
            accuracies = {b: self._last_accuracies[f"{b}bit"] for b in self.bits}
            log_figure(trainer, "test/accuracy_over_bits", accuracy_figure(accuracies))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.loggers:
            return
        log_figure(trainer, "quantization/codes", code_histograms(pl_module, self.scaling.bits))
        rows = self._layer_rows(pl_module)
        log_table(trainer, "quantization/layers", list(rows[0]), [list(row.values()) for row in rows])

    def _start_evaluation(self, pl_module: pl.LightningModule) -> None:
        if self.evaluate:
            self._correct = {
                name: MeanMetric(nan_strategy="disable").to(pl_module.device) for name in self._evaluated()
            }

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.evaluate:
            return
        inputs, targets = self.batch_fn(batch)
        for name, bits in self._evaluated().items():
            with self.variant(pl_module, name), torch.no_grad(), trainer.precision_plugin.forward_context():
                handles = self._watch_clipping(pl_module, bits) if batch_idx == 0 else []
                logits = self.logits_fn(pl_module, inputs)
                for handle in handles:
                    handle.remove()
            if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.is_floating_point():
                raise MisconfigurationException(
                    f"{type(self).__name__} measures accuracy from logits (N, C) and integer targets (N,), found "
                    f"{tuple(logits.shape)} and {tuple(targets.shape)} {targets.dtype}; pass evaluate=False, or "
                    "batch_fn and logits_fn that give those"
                )
            self._correct[name].update((logits.argmax(1) == targets).float())

    def _watch_clipping(self, pl_module: pl.LightningModule, bits: Bits) -> list[RemovableHandle]:
        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(layer: Any, args: tuple[Any, ...]) -> None:
                if layer.quantizes_input():
                    share = layer.input_quantizer.clipped_share(args[0], layer.num_bits)
                    b = bits[name] if isinstance(bits, Mapping) else bits
                    self._clipped.setdefault(name, {})[b] = share

            return hook

        return [layer.register_forward_pre_hook(watch(name)) for name, layer in quantized_layers(pl_module).items()]

    def _accuracies(self, stage: str) -> dict[str, Tensor]:
        metrics = self._each_accuracy(stage)
        uniform = [metrics[f"{stage}/acc_{b}bit"] for b in self.bits]
        return metrics | {f"{stage}/acc_bits_mean": torch.stack(uniform).mean()}

    def _each_accuracy(self, stage: str) -> dict[str, Tensor]:
        values = {name: metric.compute() for name, metric in self._correct.items()}
        self._last_accuracies = {name: float(value) for name, value in values.items()}
        return {f"{stage}/acc_{name}": value for name, value in values.items()}

    def _scale_metrics(self, pl_module: pl.LightningModule) -> dict[str, float | Tensor]:
        layers = quantized_layers(pl_module).values()
        metrics: dict[str, float | Tensor] = {f"quantization/lambda_{b}bit": lr for b, lr in self._lambdas.items()}
        means = torch.stack([layer.weight_scale.detach().mean() for layer in layers])
        metrics["quantization/weight_scale"] = means.mean()
        for b in self.scaling.bits:
            shares = [layer.clipped_weight_share(b) for layer in layers if b in layer.bits]
            if shares:
                metrics[f"quantization/clipped_weights_{b}bit"] = torch.stack(shares).mean()
            scales = [
                layer.input_quantizer.scales[str(b)].detach()
                for layer in layers
                if layer.input_quantizer is not None and b in layer.input_quantizer.bits
            ]
            if scales:
                metrics[f"quantization/input_scale_{b}bit"] = torch.stack(scales).mean()
            inputs = [shares[b] for shares in self._clipped.values() if b in shares]
            if inputs:
                metrics[f"quantization/clipped_inputs_{b}bit"] = torch.stack(inputs).mean()
        return metrics

    def _layer_rows(self, pl_module: pl.LightningModule) -> list[dict[str, Any]]:
        rows = []
        for name, layer in quantized_layers(pl_module).items():
            row: dict[str, Any] = {"layer": name, "bits": " ".join(map(str, layer.bits))}
            row["weights"] = layer.weight.numel()
            row["weight_scale"] = layer.weight_scale.detach().mean()
            for b in self.scaling.bits:
                row[f"clipped_weights_{b}bit"] = layer.clipped_weight_share(b) if b in layer.bits else None
                row[f"clipped_inputs_{b}bit"] = self._clipped.get(name, {}).get(b)
            rows.append(row)
        return rows

    def export(self, directory: Path) -> list[Path]:
        """Write ``packed.safetensors``, which :func:`.load_packed` reads, and ``cost.txt``, the size of each layer."""
        if self._pl_module is None or not all(self._is_initialized(self._pl_module, b) for b in self.scaling.bits):
            return []
        sizes = "\n\n".join(f"{b} bits\n{cost(self._pl_module, b)}" for b in self.scaling.bits)
        return [
            save_packed(self._pl_module, directory / "packed.safetensors"),
            write_atomically(directory / "cost.txt", sizes.encode()),
        ]


def _loss_of(output: STEP_OUTPUT) -> Tensor | None:
    if isinstance(output, dict):
        loss: Tensor | None = output.get("loss")
        return loss
    assert output is None or isinstance(output, Tensor)
    return output
