"""Adversarial training at the cost of ordinary training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_plugins.batches import BatchFn
from lightning_plugins.callbacks.robustness._attacking import PixelScale
from lightning_plugins.callbacks.training_step import Step, TrainingStepCallback
from lightning_plugins.checks import check_types

__all__ = ["FreeAdversarialTraining"]


class FreeAdversarialTraining(TrainingStepCallback):
    r"""Train each batch several times in a row, and let every backward pass also move its perturbation.

    One backward pass gives the gradient of the weights, which the optimizer takes as always, and that of the
    perturbation, which goes a step of the whole radius along its sign:
    :math:`\delta \leftarrow \Pi(\delta + \epsilon\, \mathrm{sign}\, \nabla_\delta L)`. The perturbation goes on
    from batch to batch. An epoch has as many updates as before: of the batches that the loader gives, each
    ``num_replays``-th is kept and replayed, and those between are passed over. So an epoch sees a random share
    ``1 / num_replays`` of the data, and after as many epochs as without attack each sample has been seen about as often
    as in the paper, which divides the number of epochs instead. The loader must shuffle.

    Inputs must lie in [0, 1], or ``mean`` and ``std`` be given. The loss is the module's own. Logged once an epoch:
    ``robustness/perturbation``, the mean absolute perturbation as a share of the radius. Each process carries its own
    perturbation. Resuming within an epoch begins with a new batch and the perturbation of the epoch's start.

    Args:
        eps: radius of the linf ball on the [0, 1] pixel scale.
        num_replays: updates on each batch, at least 1; the paper has 4 to 10, and 8 as its best.
        mean: of each channel, if the inputs are normalised outside of the module.
        std: likewise.
        batch_fn: takes the batch, returns its inputs and targets; default the first two elements of a tuple or list.

    Raises:
        ValueError: for an argument out of range.
        MisconfigurationException: in ``setup``, with accumulated gradients or beside :class:`AdversarialTraining`.

    Example:
        >>> from lightning_plugins.callbacks import FreeAdversarialTraining
        >>> callback = FreeAdversarialTraining(eps=8 / 255, num_replays=8)

    Reference:
        Shafahi et al., *Adversarial Training for Free!*, 2019, algorithm 1.
    """

    attacks_batch = True
    changes_batch = True
    replays_batch = True

    @check_types
    def __init__(
        self,
        eps: float = 8 / 255,
        *,
        num_replays: int = 8,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_fn: BatchFn | None = None,
    ) -> None:
        super().__init__(batch_fn=batch_fn)
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be at least 0, on the [0, 1] pixel scale, got {eps!r}")
        if num_replays < 1:
            raise ValueError(f"num_replays must be at least 1, got {num_replays!r}")
        self.eps, self.num_replays = eps, num_replays
        self.mean, self.std = mean, std
        self._scale = PixelScale(mean, std)
        self._perturbation: Tensor | None = None  # of the largest batch so far
        self._saved: Tensor | None = None  # of all processes, at the end of an epoch
        self._batch: Any = None
        self._leaf: Tensor | None = None  # the inputs of this step
        self._start = self._free = torch.empty(0)  # the perturbation in them, and where it can have a gradient
        self._size = MeanMetric(nan_strategy="disable")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "FreeAdversarialTraining needs an update after every replay; set accumulate_grad_batches=1, found "
                f"{trainer.accumulate_grad_batches}"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._saved is not None:
            self._perturbation = self._saved[trainer.global_rank % len(self._saved)].clone()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batch = None
        self._size.to(pl_module.device).reset()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        self._leaf = None
        if self._batch is None or idx % self.num_replays == 0:
            self._batch = batch

    def around_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> STEP_OUTPUT:
        """Run the step on the kept batch, perturbed."""
        batch = self._batch
        inputs, _ = self.batch_fn(batch)
        images = self._scale.images(inputs).float()
        if self._leaf is None:
            self._start = self._perturbation_of(images)
            # A leaf, so that callbacks that repeat the step can backpropagate to it several times.
            perturbed = (images + self._start).clamp(0.0, 1.0)
            self._leaf = self._scale.inputs(perturbed, inputs.dtype).to(inputs.dtype).requires_grad_()
            self._free = (
                images + self._start == perturbed
            )  # beyond [0, 1] it has no gradient; at 0 and 1 it has (clamp's own would be 0)
        return step(self.replace(batch, inputs, self._leaf), batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        leaf, self._leaf = self._leaf, None
        if leaf is None or leaf.grad is None or self._perturbation is None:
            return
        with torch.no_grad():
            # Where a scaled gradient overflowed the optimizer made no step either.
            moved = self._start + self.eps * (self._free * leaf.grad.float().sign()).nan_to_num()
            self._perturbation[: len(leaf)] = moved.clamp(-self.eps, self.eps)
            if self.eps:
                self._size.update(self._perturbation[: len(leaf)].abs().mean() / self.eps)
            if trainer.is_last_batch:
                shape = self._perturbation.shape
                self._saved = pl_module.all_gather(self._perturbation).reshape(-1, *shape)  # type: ignore[union-attr]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.eps and self._size.update_called:
            pl_module.log("robustness/perturbation", self._size.compute(), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._saved is None else {"perturbations": self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict.get("perturbations")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._batch = self._leaf = None
        super().teardown(trainer, pl_module, stage)

    def _perturbation_of(self, images: Tensor) -> Tensor:
        known = self._perturbation
        if known is None or known.shape[1:] != images.shape[1:]:
            known = torch.zeros_like(images)
        known = known.to(images)
        if len(known) < len(images):
            known = torch.cat([known, images.new_zeros(len(images) - len(known), *images.shape[1:])])
        self._perturbation = known
        return known[: len(images)]
