"""What a module would have become without the callbacks, to compare it with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_plugins.callbacks._composition import check_composition
from lightning_plugins.callbacks._variants import HasVariants
from lightning_plugins.checks import check_types
from lightning_plugins.logging import log_callback_hyperparameters

__all__ = ["PlainTwin"]


class PlainTwin(HasVariants, pl.Callback):
    """Train the same module without any callback first, and let others evaluate it beside the one of this run.

    The twin is a copy of the module as it comes in: the same weights, and in training the same data, epochs, batches
    and limits, in a Trainer of its own without callbacks and loggers. It becomes what a run without callbacks gives.
    When ``fit`` starts it is trained to the end; every checkpoint holds it, so a run that is resumed trains it again
    only if it is to last longer than before, and then from the start. The module itself, its data and its random state
    do not notice.

    Callbacks that evaluate a net in several states meet the twin as one more of them: :class:`PostHocCalibration`, and
    :class:`RobustnessEvaluation` with ``per_variant=True``, log ``test/ece_before_fp32``,
    ``test/robust_acc_balanced_fp32`` and so on; :class:`VariantComparison` puts it into its table.

    Data must come from a data module or from the module itself. With several processes each one trains the twin alone,
    on all of the data, as one process would.

    Args:
        name: of the twin, at the end of what is measured of it.

    Raises:
        ValueError: for an empty name or one with a slash.
        MisconfigurationException: in ``setup``, if a callback that takes part in training stands before this one, or
            data were handed to ``fit`` as loaders, or the strategy shards weights.

    Example:
        >>> from lightning_plugins.callbacks import MultiPrecisionQAT, PlainTwin
        >>> callbacks = [PlainTwin(), MultiPrecisionQAT((8, 4, 2))]
        >>> trainer = pl.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    another_net = True
    copies_module = True
    needs_whole_weights = True

    @check_types
    def __init__(self, name: str = "fp32") -> None:
        if not name or "/" in name:
            raise ValueError(f"name must be a word without a slash, got {name!r}")
        self.name = name
        self._twin: pl.LightningModule | None = None
        self._trained = False
        self._limits: list[int | None] = []  # epochs and steps that it was trained for
        self._saved: dict[str, Tensor] = {}

    # What others evaluate

    def variant_names(self) -> tuple[str, ...]:
        return (self.name,) if self._trained else ()

    @contextmanager
    def variant(self, pl_module: pl.LightningModule, name: str) -> Iterator[pl.LightningModule]:
        assert self._twin is not None
        yield self._twin.to(pl_module.device).eval()

    def variant_bytes(self, pl_module: pl.LightningModule, name: str) -> int | None:
        assert self._twin is not None
        tensors: list[Tensor] = list(self._twin.state_dict().values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # When

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_composition(trainer)
        if stage == "fit":
            own_data = is_overridden("train_dataloader", pl_module)
            if getattr(trainer, "datamodule", None) is None and not own_data:
                raise MisconfigurationException(
                    "PlainTwin reads the training data a second time and cannot do so with loaders that were handed to "
                    "fit; pass a LightningDataModule, or give the module a train_dataloader"
                )
            log_callback_hyperparameters(trainer, self)
        if self._twin is None:
            self._twin = copy.deepcopy(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        limits = [trainer.max_epochs, trainer.max_steps]
        if self._saved and self._limits == limits:
            self._load()
            return
        self._saved, self._limits = {}, limits
        rank_zero_info(f"PlainTwin trains the net without the callbacks first, as {self.name!r}.")
        self._train(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load()
        if not self._trained:
            rank_zero_warn(
                "PlainTwin has no trained net to compare with; run trainer.fit before, or pass ckpt_path= of a "
                "checkpoint that was saved with this callback."
            )

    # State

    def state_dict(self) -> dict[str, Any]:
        module = self._saved
        if self._twin is not None and self._trained:
            module = {name: value.cpu() for name, value in self._twin.state_dict().items()}
        return {"module": module, "limits": self._limits} if module else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved, self._limits = dict(state_dict["module"]), list(state_dict["limits"])

    # Mechanism

    def _load(self) -> None:
        if not self._saved:
            return
        assert self._twin is not None
        if is_overridden("configure_model", self._twin):
            self._twin.configure_model()
        self._twin.load_state_dict(self._saved)
        self._saved, self._trained = {}, True

    def _train(self, trainer: pl.Trainer) -> None:
        assert self._twin is not None
        device = trainer.strategy.root_device
        datamodule = copy.copy(getattr(trainer, "datamodule", None))  # its data are shared, its Trainer is not
        with isolate_rng():
            own = pl.Trainer(
                accelerator="gpu" if device.type == "cuda" else device.type,
                devices=[device.index or 0] if device.type == "cuda" else 1,
                plugins=[LightningEnvironment()],  # one process, whatever started this one
                precision=trainer.precision,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=trainer.progress_bar_callback is not None,
                num_sanity_val_steps=0,
                **{name: getattr(trainer, name) for name in _PASSED_ON},
            )
            own.fit(self._twin, datamodule=datamodule)
        self._twin.eval()
        self._trained = True
        if trainer.world_size > 1:  # sums may differ in the last bit between machines
            state = {name: value.cpu() for name, value in self._twin.state_dict().items()}
            self._twin.load_state_dict(trainer.strategy.broadcast(state))


_PASSED_ON = (
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "fast_dev_run",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
    "max_epochs",
    "max_steps",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "val_check_interval",
)
