"""Training on mixtures of samples, in any module and any Trainer."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lightning_plugins.batches import BatchFn
from lightning_plugins.callbacks._borrow import tap_forward
from lightning_plugins.callbacks._classes import epochs_done, training_progress
from lightning_plugins.callbacks.training_step import Step, TrainingStepCallback
from lightning_plugins.checks import check_types
from lightning_plugins.mixing import BatchMixing, CutMix, FMix, LabelLambda, MixedLabels, Mixup, mixed_accuracy

__all__ = ["MixedSampleAugmentation"]


class MixedSampleAugmentation(TrainingStepCallback):
    r"""Train on mixtures of the samples of a batch: mixup, mixup of several points, CutMix, FMix.

    The batch is mixed inside the training step, on the device, once for all repetitions of that step. The module's step
    runs once, on mixed inputs and targets that pass for the integer labels it expects (:class:`.MixedLabels`): its
    cross-entropy, NLL or focal loss is :math:`\sum_k \lambda_k\, \ell(f, y_k)`, with its class weights and label
    smoothing, and ``F.one_hot`` gives soft labels; metrics, and anything else that needs one class, see the class with
    the largest share. A step whose loss does neither is refused. With ``soft_targets`` the step gets plain soft labels
    ``(N, C)`` instead.

    Callbacks behind this one work on the mixed batch: :class:`AdversarialTraining` attacks mixed images. Before it they
    work on the original one, and what replaces the loss by one from its own targets must stand behind.

    Logged once an epoch, where the step calls ``forward``: ``calibration/train_mixed_acc``, the accuracy of the last
    forward pass against the mixed labels, each counted with its share.

    Validation and test data are never mixed. A net trained like this can be less sure than it should be; fit
    :class:`PostHocCalibration` on plain validation data.

    Args:
        policy: ``"mixup"``, ``"cutmix"``, ``"fmix"``, or a :class:`.BatchMixing` such as
            :class:`.ForegroundRecombine` that brings its own arguments.
        alpha: of the Beta or Dirichlet distribution of shares, above 0.
        prob: chance of a batch to be mixed, in [0, 1].
        stop_epoch: mix no more from this epoch on, counted from 0; a float below 1 is a share of the training. None
            mixes to the end.
        label_lambda: for mixup, the labels' shares: ``"same"`` as the inputs, ``"independent"``, or a number in [0, 1],
            the share of the dominant input's label. Labels have the larger share where their input has it.
        per_sample: for mixup and FMix, draw shares for each sample.
        num_points: for mixup, samples in a mixture, at least 2.
        decay: for FMix, power by which high frequencies of the mask are damped.
        max_soft: for FMix, share of the mask that may be a soft edge on either side, in [0, 0.5].
        soft_targets: give the step soft labels ``(N, C)`` in place of labels that pass for integers.
        num_classes: C of soft labels; default the module's ``num_classes``.
        seed: of the draws, at least 0, together with the step, the batch and the process.
        batch_fn: takes the batch, returns its inputs and targets; default the first two elements of a tuple or list.

    Raises:
        ValueError: for an argument out of range.
        MisconfigurationException: in ``setup``, behind a callback that replaces the loss by one from unmixed targets,
            before one that replays unmixed batches, or without a number of classes where one is needed; in training,
            if the batch cannot be mixed or the loss did not read the mixed labels.

    Example:
        >>> from lightning_plugins.callbacks import MixedSampleAugmentation
        >>> callback = MixedSampleAugmentation("mixup", stop_epoch=0.6)  # plain training for the last 40 %

    Reference:
        H. Zhang, M. Cisse, Y. Dauphin, D. Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018. Early
        stopping and independent label shares: D. Zou, Y. Cao, Y. Li, Q. Gu, "The Benefits of Mixup for Feature
        Learning", ICML 2023. More references at the functions in :mod:`lightning_plugins.mixing`.
    """

    mixes_samples = True
    changes_batch = True
    changes_targets = True

    @check_types
    def __init__(
        self,
        policy: Literal["mixup", "cutmix", "fmix"] | BatchMixing = "mixup",
        *,
        alpha: float = 1.0,
        prob: float = 1.0,
        stop_epoch: int | float | None = None,
        label_lambda: LabelLambda = "same",
        per_sample: bool = False,
        num_points: int = 2,
        decay: float = 3.0,
        max_soft: float = 0.0,
        soft_targets: bool = False,
        num_classes: int | None = None,
        seed: int = 0,
        batch_fn: BatchFn | None = None,
    ) -> None:
        super().__init__(batch_fn=batch_fn)
        if not 0 <= prob <= 1:
            raise ValueError(f"prob must lie in [0, 1], got {prob!r}")
        if stop_epoch is not None and not 0 <= stop_epoch < float("inf"):
            raise ValueError(f"stop_epoch must be at least 0, or None to mix to the end, got {stop_epoch!r}")
        if not (isinstance(seed, int) and seed >= 0):
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}")
        given = {
            name
            for name, value, default in (
                ("alpha", alpha, 1.0),
                ("label_lambda", label_lambda, "same"),
                ("per_sample", per_sample, False),
                ("num_points", num_points, 2),
                ("decay", decay, 3.0),
                ("max_soft", max_soft, 0.0),
            )
            if value != default
        }
        if policy == "mixup":
            used = {"alpha", "label_lambda", "per_sample", "num_points"}
            self._mixing: BatchMixing = Mixup(
                alpha=alpha, label_lambda=label_lambda, per_sample=per_sample, num_points=num_points
            )
        elif policy == "cutmix":
            used = {"alpha"}
            self._mixing = CutMix(alpha=alpha)
        elif policy == "fmix":
            used = {"alpha", "per_sample", "decay", "max_soft"}
            self._mixing = FMix(alpha=alpha, decay=decay, max_soft=max_soft, per_sample=per_sample)
        elif isinstance(policy, BatchMixing):
            used, self._mixing = set(), policy
        else:
            raise ValueError(f"policy must be 'mixup', 'cutmix', 'fmix' or a BatchMixing, got {policy!r}")
        if given - used:
            name = policy if isinstance(policy, str) else type(policy).__name__
            raise ValueError(
                f"{name} knows no {', '.join(sorted(given - used))}; leave that out or give it to the policy"
            )
        self.policy, self.alpha, self.prob, self.stop_epoch = policy, alpha, prob, stop_epoch
        self.label_lambda, self.per_sample, self.num_points = label_lambda, per_sample, num_points
        self.decay, self.max_soft = decay, max_soft
        self.soft_targets, self.num_classes, self.seed = soft_targets, num_classes, seed
        self._kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._accuracies: list[Tensor] = []  # of this epoch's batches, on their device

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            if self.soft_targets:
                self._classes(pl_module)
            if self._is_share() and training_length_is_unknown(trainer):
                raise MisconfigurationException(
                    f"stop_epoch={self.stop_epoch} is a share of the training, and this run has neither max_epochs nor "
                    "max_steps; set one of them, or give an epoch"
                )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._accuracies = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        self._kept = None

    def around_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> STEP_OUTPUT:
        """Run the step on the mixed batch."""
        if self._is_over(trainer, batch_idx):
            return step(batch, batch_idx)
        inputs, targets = self.batch_fn(batch)
        mixed_targets = targets
        generator = self._generator(trainer, batch_idx)
        # The same draw comes first in every batch, whether it is needed or not.
        if float(torch.rand((), generator=generator, dtype=torch.float64)) < self.prob:
            mixed, mixed_targets = self._mixed(pl_module, inputs, targets, generator)
            batch = self.replace(self.replace(batch, inputs, mixed), targets, mixed_targets)
        logits, output = _run(pl_module, step, batch, batch_idx)
        loss = output.get("loss") if isinstance(output, dict) else output
        if isinstance(mixed_targets, MixedLabels) and isinstance(loss, Tensor) and not mixed_targets.used:
            raise MisconfigurationException(
                f"the loss of {type(pl_module).__name__}.training_step did not read the mixed labels and would train "
                "on the class with the largest share alone; compute it with F.cross_entropy, F.nll_loss or F.one_hot "
                "of the batch's targets, put takes_mixed_labels on a function of your own, or pass soft_targets=True "
                "for a loss that takes labels (N, C)"
            )
        if logits is not None and len(logits) == len(mixed_targets):
            self._accuracies.append(mixed_accuracy(logits, mixed_targets))
        return output

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._kept = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._accuracies:
            pl_module.log("calibration/train_mixed_acc", torch.stack(self._accuracies).mean(), sync_dist=True)
            self._accuracies = []

    def _is_share(self) -> bool:
        return isinstance(self.stop_epoch, float) and 0 < self.stop_epoch < 1

    def _is_over(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        if self.stop_epoch is None:
            return False
        now = training_progress(trainer, batch_idx) if self._is_share() else epochs_done(trainer, batch_idx)
        return now >= self.stop_epoch

    def _mixed(
        self, pl_module: pl.LightningModule, inputs: Tensor, targets: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        # A callback around this one may repeat the step, and those inside know a batch again by its tensors. A mixture
        # with a graph to the inputs serves one backward pass; the generator makes the same one again.
        known = self._kept is not None and self._kept[0] is inputs and self._kept[1] is targets
        if self._kept is None or not known or inputs.requires_grad:
            classes = self._classes(pl_module) if self.soft_targets else None
            try:
                mixed = self._mixing.mix(inputs, targets, num_classes=classes, generator=generator)
            except (TypeError, ValueError) as error:
                raise MisconfigurationException(f"MixedSampleAugmentation could not mix the batch: {error}") from error
            self._kept = (inputs, targets, *mixed)
        return self._kept[2], self._kept[3]

    def _classes(self, pl_module: pl.LightningModule) -> int:
        classes = self.num_classes if self.num_classes is not None else getattr(pl_module, "num_classes", None)
        if not isinstance(classes, int):
            raise MisconfigurationException(
                f"soft_targets=True needs the number of classes, and {type(pl_module).__name__} has no num_classes; "
                "pass num_classes=C"
            )
        return classes

    def _generator(self, trainer: pl.Trainer, batch_idx: int) -> torch.Generator:
        words = [self.seed, trainer.global_step, batch_idx, trainer.global_rank]
        return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


def training_length_is_unknown(trainer: pl.Trainer) -> bool:
    """Return whether a run has no end that is known before."""
    return (trainer.max_epochs is None or trainer.max_epochs < 0) and trainer.max_steps < 0


def _run(pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int) -> tuple[Tensor | None, STEP_OUTPUT]:
    """Return the logits of the last call of ``forward`` in the step, detached, None without a call, and its output."""
    last: list[Tensor] = []

    def see(output: Any) -> Any:
        if isinstance(output, Tensor) and output.ndim == 2:
            last[:] = [output.detach()]
        return output

    restore = tap_forward(pl_module, see)
    try:
        output = step(batch, batch_idx)
    finally:
        restore()
    return last[0] if last else None, output
