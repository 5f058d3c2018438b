"""Training binary weights and activations with any Trainer and module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_plugins.batches import BatchFn, LogitsFn
from lightning_plugins.callbacks._composition import check_composition
from lightning_plugins.callbacks.quantization._conversion import ConvertsLayers
from lightning_plugins.callbacks.training_step import Step, TrainingStepCallback
from lightning_plugins.checks import check_types
from lightning_plugins.logging import log_figure, log_table
from lightning_plugins.quantization.binary import check_frequency, periodic_regularizer, quantization_error
from lightning_plugins.quantization.binary_deploy import save_binary
from lightning_plugins.quantization.binary_layers import (
    REAL,
    Estimator,
    Real,
    binary_layers,
    check_keep_real,
    convert_binary_,
    set_frequency_,
    set_stage_,
)
from lightning_plugins.quantization.figures import binary_figure

__all__ = ["BinaryQAT"]

# The released settings for CIFAR-10.
_REGULARIZER = {1: 0.037, 2: 0.0468}


class BinaryQAT(ConvertsLayers, TrainingStepCallback):
    """Train a network with weights and activations of one bit: BiPer, in two stages.

    In ``setup`` the module's convolutions and linear layers are made binary in place (see :func:`.convert_binary_`),
    before optimizers are made and weights restored, so checkpoints load and runs resume. In stage 1 activations are
    binary and weights are ``sin(frequency * W)``; in stage 2 weights are the sign of that. The module is validated and
    tested as the stage has it, so what stage 1 reports is not the accuracy of a binary network, and a checkpoint that
    is the best of a whole run may be one of stage 1.

    To the loss that the training step returns this adds a regularizer; it calls ``step`` once and leaves the batch
    alone. The module stays binary after the run; :func:`.restore_binary_` takes that back. A checkpoint of such a run
    is one of a converted module: with this callback in the Trainer it loads anywhere; without, ``load_from_checkpoint``
    and ``test(ckpt_path=...)`` fail and say so, and :func:`.load_binary_checkpoint` converts and loads a fresh module.

    Logged once an epoch: ``quantization/binary_error`` (mean over layers of ``1 - mean|sin(frequency * W)|``, in
    [0, 1]), ``quantization/binary_regularizer`` (sum over layers, unweighted), ``quantization/binary_frequency``,
    ``quantization/binary_stage`` and ``quantization/binary_alpha`` (mean magnitude); at the end of training the figure
    ``quantization/binary_weights`` and the table ``quantization/binary_layers``.

    Args:
        frequency: of the square wave, in radians per unit of weight. The paper has 20.
        stage_split: when stage 2 begins: a whole number of epochs, or as a float the share in [0, 1] of the Trainer's
            ``max_epochs``. 0 trains stage 2 alone, 1.0 stage 1 alone. A run that is to stop early and to go on later
            with another ``max_epochs`` needs the number. The paper has 600 of 900 epochs.
        frequency_start: frequency of the first epoch, from which it goes to ``frequency`` in equal steps through stage
            1. None, as the paper has it: constant.
        regularizer: weight of :func:`.periodic_regularizer` in stage 1, summed over layers. None is the 0.037 that was
            released for CIFAR-10, or 0 where the estimator is ``"sign"``.
        stage2_regularizer: the same in stage 2; None is the released 0.0468 (0 for ImageNet).
        regularizer_sign: 1 as released, where it is least at a sine of 0; -1 where it is least at a sine of -1 or +1.
        stage2_lr_factor: what the optimizer's learning rates are multiplied with during its steps in stage 2, on top of
            the scheduler, which does not see it. The release starts a new schedule at 0.0037 / 0.021 = 0.18 of stage
            1's rate.
        stage2_weight_decay: weight decay during the optimizer's steps in stage 2, for parameter groups where it is not
            0; None leaves it. The release goes from 0.0016 to 0.00016.
        start_from: a checkpoint of the same module, in fp32 or of a binary one, whose weights ``fit`` starts from; for
            the two stages in two runs, with ``stage_split=0`` in the second.
        estimator: ``"periodic"``, or ``"sign"`` for the straight-through baseline, which has no frequency.
        include: make only layers binary whose names match one of these patterns.
        exclude: nor those whose names match one of these.
        keep_real: kinds of layers that stay as they are, see :func:`.convert_binary_`. None is all four:
            ``("first", "last", "shortcuts", "depthwise")``.
        seed: of the first values of the layers' scales.
        batch_fn: as in :class:`.TrainingStepCallback`; not used.
        logits_fn: likewise.

    Raises:
        ValueError: for a wrong argument.
        MisconfigurationException: in ``setup``, for a Trainer or module that this cannot work with.

    Warns:
        UserWarning: at the first step, if layers get inputs of one sign only, as behind a ReLU.

    Example:
        >>> from lightning_plugins.callbacks import BinaryQAT
        >>> trainer = pl.Trainer(callbacks=[BinaryQAT()], logger=False, enable_checkpointing=False)

    Reference:
        Vargas et al., *BiPer: Binary Neural Networks using a Periodic Function*, 2024.
    """

    makes_layers_binary = True
    ignores_targets = True

    @check_types
    def __init__(
        self,
        frequency: float = 20.0,
        *,
        stage_split: int | float = 2 / 3,
        frequency_start: float | None = None,
        regularizer: float | None = None,
        stage2_regularizer: float | None = None,
        regularizer_sign: Literal[1, -1] = 1,
        stage2_lr_factor: float = 1.0,
        stage2_weight_decay: float | None = None,
        start_from: str | None = None,
        estimator: Estimator = "periodic",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        keep_real: Sequence[Real] | None = None,
        seed: int = 0,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        super().__init__(batch_fn=batch_fn, logits_fn=logits_fn)
        self.frequency = check_frequency(frequency)
        self.frequency_start = None if frequency_start is None else check_frequency(frequency_start)
        whole = isinstance(stage_split, int) and not isinstance(stage_split, bool)
        if not (stage_split >= 0 if whole else isinstance(stage_split, float) and 0 <= stage_split <= 1):
            raise ValueError(
                f"stage_split must be a whole number of epochs or, as a float in [0, 1], a share, got {stage_split!r}"
            )
        self.stage_split = stage_split
        if estimator not in ("periodic", "sign"):
            raise ValueError(f"estimator must be 'periodic' or 'sign', got {estimator!r}")
        self.estimator: Estimator = estimator
        if estimator == "sign" and (regularizer or stage2_regularizer or frequency_start is not None):
            raise ValueError(
                "estimator='sign' has no wave, so regularizer, stage2_regularizer and frequency_start must be left out"
            )
        for name, value in {"regularizer": regularizer, "stage2_regularizer": stage2_regularizer}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}; regularizer_sign=-1 turns it round")
        self.regularizer, self.stage2_regularizer = regularizer, stage2_regularizer
        if regularizer_sign not in (1, -1):
            raise ValueError(f"regularizer_sign must be 1 (as released) or -1, got {regularizer_sign!r}")
        self.regularizer_sign = regularizer_sign
        if not 0 < stage2_lr_factor < float("inf"):
            raise ValueError(f"stage2_lr_factor must be positive and finite, got {stage2_lr_factor!r}")
        if stage2_weight_decay is not None and not stage2_weight_decay >= 0:
            raise ValueError(f"stage2_weight_decay must be at least 0, or None, got {stage2_weight_decay!r}")
        self.stage2_lr_factor, self.stage2_weight_decay = stage2_lr_factor, stage2_weight_decay
        self.start_from = start_from
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.keep_real: tuple[Real, ...] = REAL if keep_real is None else tuple(keep_real)
        check_keep_real(self.keep_real)
        self.seed = seed
        self._pl_module: pl.LightningModule | None = None
        self._handles: list[RemovableHandle] = []
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = []  # a parameter group and what it had
        self._has_looked = False
        self._split = 0

    @property
    def adds_to_loss(self) -> bool:  # type: ignore[override]
        """Whether there is a regularizer."""
        return any(self._regularizer_weight(stage) for stage in (1, 2))

    # Structure

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_composition(trainer)
        if stage == "fit":  # before anything is converted
            self._refuse_manual_optimization(pl_module)
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # the layers may come from there, and Lightning calls it only later
        self._pl_module = pl_module
        self._split = self._first_epoch_of_stage_2(trainer) if stage == "fit" else 0
        layers = binary_layers(pl_module)
        if not layers:
            try:
                convert_binary_(
                    pl_module,
                    frequency=self.frequency,
                    stage=1 if self.stage_split else 2,
                    estimator=self.estimator,
                    include=self.include,
                    exclude=self.exclude,
                    keep_real=self.keep_real,
                    seed=self.seed,
                )
            except ValueError as error:
                raise MisconfigurationException(f"BinaryQAT: {error}") from error
            if self.start_from is not None and stage == "fit":
                self._load_start(pl_module, self.start_from)
        elif found := {layer.estimator for layer in layers.values()} - {self.estimator}:
            raise MisconfigurationException(
                f"BinaryQAT(estimator={self.estimator!r}) met a module that is binary with estimator={found.pop()!r} "
                "already; use that, or call lightning_plugins.quantization.restore_binary_(module) first"
            )
        self._has_looked = False
        super().setup(trainer, pl_module, stage)

    def _first_epoch_of_stage_2(self, trainer: pl.Trainer) -> int:
        if isinstance(self.stage_split, int):
            return self.stage_split
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise MisconfigurationException(
                f"BinaryQAT(stage_split={self.stage_split}) is a share of the run's epochs, and this Trainer has "
                f"max_epochs={trainer.max_epochs}; set max_epochs, or give stage_split as a whole number of epochs"
            )
        return round(self.stage_split * trainer.max_epochs)

    @staticmethod
    def _load_start(pl_module: pl.LightningModule, path: str) -> None:
        if not Path(path).is_file():
            raise MisconfigurationException(f"BinaryQAT(start_from={path!r}): there is no such checkpoint")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        try:
            pl_module.load_state_dict(checkpoint.get("state_dict", checkpoint))
        except RuntimeError as error:
            raise MisconfigurationException(
                f"BinaryQAT(start_from={path!r}) needs a checkpoint of this very module, in fp32 or binary: {error}"
            ) from error

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.stage2_lr_factor != 1 or self.stage2_weight_decay is not None:
            for optimizer in trainer.optimizers:
                # Only for as long as a step takes: schedulers compute the next rate from the one that they see.
                before = optimizer.register_step_pre_hook(self._adjust_groups)
                after = optimizer.register_step_post_hook(self._restore_groups)
                self._handles += [before, after]

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave_optimizers()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave_optimizers()
        super().teardown(trainer, pl_module, stage)

    def _leave_optimizers(self) -> None:
        self._restore_groups()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # Training

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        set_stage_(pl_module, 1 if epoch < self._split else 2)
        frequency = self.frequency
        if self.frequency_start is not None and epoch < self._split:
            frequency = self.frequency_start + (self.frequency - self.frequency_start) * epoch / self._split
        set_frequency_(pl_module, frequency)

    def around_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> STEP_OUTPUT:
        """Run the step once and add the regularizer to its loss."""
        output = step(batch, batch_idx) if self._has_looked else self._look(pl_module, step, batch, batch_idx)
        weight = self._regularizer_weight(1 if trainer.current_epoch < self._split else 2)
        if output is None or weight == 0:
            return output
        extra = weight * self._regularizer(pl_module)
        if isinstance(output, Tensor):
            return output + extra
        return {**output, "loss": output["loss"] + extra}

    def _regularizer_weight(self, stage: int) -> float:
        given = self.regularizer if stage == 1 else self.stage2_regularizer
        if given is not None:
            return given
        return _REGULARIZER[stage] if self.estimator == "periodic" else 0.0

    def _regularizer(self, pl_module: pl.LightningModule) -> Tensor:
        parts = [
            periodic_regularizer(layer.weight, layer.frequency, sign=self.regularizer_sign)
            for layer in binary_layers(pl_module).values()
        ]
        return torch.stack(parts).sum()

    def _look(self, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Run the first step and warn of layers whose inputs have one sign, from which they cannot learn anything."""
        negative: dict[str, bool] = {}

        def watch(name: str) -> Any:
            def hook(layer: Any, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor):
                    negative[name] = negative.get(name, False) or bool((args[0] < 0).any())

            return hook

        handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in binary_layers(pl_module).items()]
        try:
            with torch.compiler.set_stance("force_eager"):
                output = step(batch, batch_idx)
        finally:
            for handle in handles:
                handle.remove()
        self._has_looked = True
        if blind := [name for name, seen in negative.items() if not seen]:
            rank_zero_warn(
                f"{len(blind)} of {len(negative)} binary layers, first {blind[0]!r}, get inputs that are never "
                "negative, so all of their signs are +1 and they learn nothing: put nn.Hardtanh in the place of "
                "nn.ReLU before them, as in lightning_plugins.models.binary_resnet20, or exclude these layers"
            )
        return output

    def _adjust_groups(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        assert self._pl_module is not None
        if self._pl_module.current_epoch < self._split:
            return
        for group in optimizer.param_groups:
            self._kept.append((group, {key: group[key] for key in ("lr", "weight_decay") if key in group}))
            group["lr"] = group["lr"] * self.stage2_lr_factor
            if self.stage2_weight_decay is not None and group.get("weight_decay", 0) != 0:
                group["weight_decay"] = self.stage2_weight_decay

    def _restore_groups(self, *args: Any) -> None:
        for group, values in self._kept:
            group.update(values)
        self._kept = []

    # Logging

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = list(binary_layers(pl_module).values())
        with torch.no_grad():
            metrics: dict[str, float | Tensor] = {
                "quantization/binary_stage": float(layers[0].stage),
                "quantization/binary_alpha": torch.stack([layer.alpha.abs().float().mean() for layer in layers]).mean(),
            }
            if self.estimator == "periodic":
                errors = [quantization_error(layer.weight, layer.frequency).float() for layer in layers]
                metrics["quantization/binary_error"] = torch.stack(errors).mean()
                metrics["quantization/binary_regularizer"] = self._regularizer(pl_module)
                metrics["quantization/binary_frequency"] = layers[0].frequency
        pl_module.log_dict(metrics, sync_dist=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.loggers:
            return
        rows = []
        for name, layer in binary_layers(pl_module).items():
            with torch.no_grad():
                positive = (layer.binary_weight() > 0).float().mean()
                error = quantization_error(layer.weight, layer.frequency) if self.estimator == "periodic" else None
                spread = layer.weight.float().std(correction=0)
                rows.append([name, layer.weight.numel(), spread, error, positive, layer.alpha.float().abs().mean()])
        columns = ["layer", "weights", "weight_std", "quantization_error", "positive_share", "alpha"]
        log_table(trainer, "quantization/binary_layers", columns, rows)
        if self.estimator == "periodic":
            log_figure(trainer, "quantization/binary_weights", binary_figure(pl_module))

    def export(self, directory: Path) -> list[Path]:
        """Write ``binary.safetensors``, which :func:`.load_binary` reads; nothing if the module is in stage 1."""
        if self._pl_module is None or any(layer.stage != 2 for layer in binary_layers(self._pl_module).values()):
            return []
        return [save_binary(self._pl_module, directory / "binary.safetensors")]
