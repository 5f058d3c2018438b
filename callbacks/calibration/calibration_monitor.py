"""Watch how far a classifier's probabilities are from the truth, epoch by epoch and group by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from lightning_plugins.batches import BatchFn, LogitsFn, forward_logits, inputs_and_targets
from lightning_plugins.calibration import reliability_diagram
from lightning_plugins.calibration._criteria import criterion_of
from lightning_plugins.calibration._monitoring import CalibrationSums, accuracy_bands
from lightning_plugins.callbacks._distributed import gather_rows, num_repeated
from lightning_plugins.callbacks.calibration._logits import check_logits
from lightning_plugins.checks import check_types
from lightning_plugins.logging import log_callback_hyperparameters, log_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CalibrationMonitor"]

_STREAMING = ("ece", "mce", "classwise_ece", "nll", "brier")
_ROWS = ("debiased_ece", "equal_mass_ece", "ks", "smooth_ece")

GroupFn = Callable[[Any, Tensor, Tensor], Tensor]
"""From a batch, its labels and predictions ``(N,)`` to groups ``(N,)``, integers from 0."""


class CalibrationMonitor(pl.Callback):
    """Log calibration measures of the validation and test sets, their worst group, and a reliability diagram.

    What is measured is what ``forward`` returns inside the module's own step: in ``test``, calibrated values if a
    :class:`.PostHocCalibration` calibrates them. Nothing is trained, chosen or changed. Logits come for free from the
    one ``forward`` call of the step; where there is no such single call, one more forward pass is made.

    Logged under ``val/`` and ``test/`` (nats, or fractions): the chosen ``metrics``, as in ``val/calibration_ece``;
    with ``groups``, ``calibration_group_ece_max`` and ``_mean``, over the ECE inside groups of at least
    ``min_group_size`` samples; and ``calibration_diagram``, a reliability diagram with bands of the accuracy of
    each bin, every validation epoch and after ``test``. An ECE over all samples can be small because the errors of
    groups, overlapping classes for instance, cancel in it.

    ``ece``, ``mce``, ``classwise_ece``, ``nll`` and ``brier``, the groups and the diagram are running sums, whose
    memory does not grow with the data; ``debiased_ece``, ``equal_mass_ece``, ``ks`` and ``smooth_ece`` keep the
    log-probabilities of an epoch on the CPU (50,000 x 1,000: 200 MB). With several processes every one holds the
    figures of all, samples that a sampler repeats left out.

    Args:
        metrics: names, of those above; default ``ece``, ``classwise_ece``, ``nll``, ``brier``.
        num_bins: equal-width bins, at least 1.
        groups: ``"label"`` (true class) or ``"prediction"``; None for no groups.
        group_fn: takes the batch, labels and predictions, returns groups ``(N,)``, integers from 0; instead of
            ``groups``.
        min_group_size: samples below which a group does not count, at least 1.
        bands: ``"binomial"`` (Wilson) or ``"bootstrap"``, 95 %; None for no bands.
        dataloader_idx: which of several loaders to watch.
        batch_fn: takes the batch, returns ``(inputs, targets)``; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; given, it is always used.

    Raises:
        ValueError: for a wrong argument.
        MisconfigurationException: if ``forward`` does not return logits and there is no ``logits_fn``.

    Example:
        >>> from lightning_plugins.callbacks import CalibrationMonitor
        >>> monitor = CalibrationMonitor(["ece", "ks", "nll"], groups="label")
        >>> trainer = pl.Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    @check_types
    def __init__(
        self,
        metrics: Sequence[str] | None = None,
        *,
        num_bins: int = 15,
        groups: Literal["label", "prediction"] | None = None,
        group_fn: GroupFn | None = None,
        min_group_size: int = 1,
        bands: Literal["binomial", "bootstrap"] | None = "binomial",
        dataloader_idx: int = 0,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        names = tuple(metrics) if metrics is not None else ("ece", "classwise_ece", "nll", "brier")
        if isinstance(metrics, str) or not set(names) <= {*_STREAMING, *_ROWS}:
            raise ValueError(f"metrics must be names of {', '.join((*_STREAMING, *_ROWS))}, got {metrics!r}")
        if groups not in (None, "label", "prediction"):
            raise ValueError(f"groups must be 'label', 'prediction' or None, got {groups!r}; or pass group_fn")
        if groups is not None and group_fn is not None:
            raise ValueError("groups and group_fn both say what the groups are; leave one of them out")
        if bands not in (None, "binomial", "bootstrap"):
            raise ValueError(f"bands must be 'binomial', 'bootstrap' or None, got {bands!r}")
        for name, value, least in (
            ("num_bins", num_bins, 1),
            ("min_group_size", min_group_size, 1),
            ("dataloader_idx", dataloader_idx, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        self.metrics = names
        self.num_bins, self.groups, self.group_fn, self.min_group_size = num_bins, groups, group_fn, min_group_size
        self.bands, self.dataloader_idx = bands, dataloader_idx
        self.batch_fn: BatchFn = batch_fn or inputs_and_targets
        self.logits_fn = logits_fn
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._seen: list[Any] = []
        self._reset()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            log_callback_hyperparameters(trainer, self)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seen.clear()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == self.dataloader_idx and not trainer.sanity_checking:
            self._collect(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hook()
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module, "val", trainer.val_dataloaders)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seen.clear()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == self.dataloader_idx:
            self._collect(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hook()
        self._finish(trainer, pl_module, "test", trainer.test_dataloaders)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove_hook()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hook()
        self._reset()

    # Mechanism

    def _reset(self) -> None:
        self._sums = CalibrationSums(self.num_bins)
        self._rows: list[tuple[Tensor, Tensor]] = []
        # The newest batch: its last sample may turn out to be one that a sampler has repeated.
        self._newest: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._count = 0
        self._seen.clear()

    def _start(self, pl_module: pl.LightningModule) -> None:
        self._reset()
        # A hook sees what callers of the module see, after any other callback has replaced forward.
        self._hook = pl_module.register_forward_hook(lambda module, inputs, output: self._seen.append(output))

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        inputs, labels = self.batch_fn(batch)
        seen = [output for output in self._seen if isinstance(output, Tensor) and output.ndim == 2]
        if self.logits_fn is None and len(self._seen) == len(seen) == 1 and len(seen[0]) == len(labels):
            logits = seen[0].detach()
        else:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                logits = (self.logits_fn or forward_logits)(pl_module, inputs)
        self._seen.clear()
        check_logits(self, logits)
        log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
        groups = None
        if self.groups == "label":
            groups = labels
        elif self.groups == "prediction":
            groups = log_probs.argmax(1)
        elif self.group_fn is not None:
            groups = self.group_fn(batch, labels, log_probs.argmax(1))
            if groups.shape != labels.shape or groups.is_floating_point() or int(groups.min()) < 0:
                raise ValueError(
                    f"group_fn must return integers from 0 of shape {tuple(labels.shape)}, got {groups.dtype} of shape "
                    f"{tuple(groups.shape)}; give every sample the number of its group"
                )
        self._add_newest()
        self._newest = (log_probs, labels, groups)
        self._count += len(labels)

    def _add_newest(self, leave_out: int = 0) -> None:
        if self._newest is None:
            return
        log_probs, labels, groups = self._newest
        kept = slice(len(labels) - leave_out)
        self._sums.update(log_probs[kept], labels[kept], None if groups is None else groups[kept])
        if set(self.metrics) & set(_ROWS):
            self._rows.append((log_probs.cpu(), labels.cpu()))  # repeated ones go when all are gathered
        self._newest = None

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, loaders: Any) -> None:
        repeated = self._num_repeated(trainer, loaders)
        self._add_newest(leave_out=int(trainer.global_rank >= trainer.world_size - repeated))
        total = self._gather_sums(trainer)
        if not total:
            return
        metrics = self._sums.metrics()
        if names := [name for name in self.metrics if name in _ROWS]:
            log_probs, labels = (gather_rows(trainer, torch.cat(parts)) for parts in zip(*self._rows, strict=True))
            metrics |= {name: criterion_of(log_probs[:total], labels[:total], name) for name in names}
        logged = {f"{stage}/calibration_{name}": metrics[name] for name in self.metrics}
        if self.groups is not None or self.group_fn is not None:
            sizes = self._sums.bins[:, 0].sum(1)
            errors = self._sums.group_errors()[sizes >= self.min_group_size]
            if len(errors):
                logged[f"{stage}/calibration_group_ece_max"] = errors.max().item()
                logged[f"{stage}/calibration_group_ece_mean"] = errors.mean().item()
        pl_module.log_dict(logged, sync_dist=True)
        if trainer.loggers and trainer.is_global_zero:
            log_figure(trainer, f"{stage}/calibration_diagram", self._draw())
        self._reset()

    def _num_repeated(self, trainer: pl.Trainer, loaders: Any) -> int:
        """How many processes hold, as their last sample, one that was repeated to make the shares equal."""
        if trainer.world_size == 1:
            return 0
        gathered = int(
            trainer.strategy.reduce(torch.tensor(self._count, device=trainer.strategy.root_device), reduce_op="sum")
        )
        return num_repeated(trainer, CombinedLoader(loaders).flattened[self.dataloader_idx], gathered)

    def _gather_sums(self, trainer: pl.Trainer) -> int:
        """Add up the sums of all processes and return the number of samples."""
        sums = self._sums
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            sizes = torch.tensor([len(sums.bins), len(sums.classes)], device=device)
            most = trainer.strategy.all_gather(sizes).amax(0).tolist()
            sums.grow(*most)
            for name in ("totals", "bins", "classes"):
                gathered = trainer.strategy.all_gather(getattr(sums, name).to(device))
                setattr(sums, name, gathered.sum(0).cpu())
        return int(sums.totals[0])

    def _draw(self) -> Figure:
        bins = self._sums.reliability_bins()
        figure = reliability_diagram(bins)
        if self.bands is not None:
            low, high = accuracy_bands(bins, self.bands)
            filled = bins.count > 0
            middle = ((bins.edges[1:] + bins.edges[:-1]) / 2)[filled]
            accuracy = bins.accuracy[filled]
            reach = torch.stack([accuracy - low[filled], high[filled] - accuracy]).clamp_min(0)
            figure.axes[0].errorbar(
                middle.numpy(), accuracy.numpy(), reach.numpy(), fmt="none", ecolor="#333333", elinewidth=1, capsize=2
            )
        return figure
