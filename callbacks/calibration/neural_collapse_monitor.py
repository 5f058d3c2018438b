"""Watch the features of a class collapse to a point as training goes on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_plugins.batches import BatchFn, LogitsFn, forward_logits, inputs_and_targets
from lightning_plugins.calibration.neural_collapse import collapse_curves, mixed_collapse, neural_collapse
from lightning_plugins.callbacks._composition import check_composition
from lightning_plugins.callbacks._distributed import gather_rows
from lightning_plugins.callbacks.calibration._features import (
    classes_of,
    evaluating,
    find_head,
    head_inputs_and_outputs,
    training_batches,
)
from lightning_plugins.checks import check_types
from lightning_plugins.logging import log_callback_hyperparameters, log_figure

__all__ = ["NeuralCollapseMonitor"]

_SHARES = tuple(step / 10 for step in range(11))
_PAIRS = 100


class NeuralCollapseMonitor(pl.Callback):
    """Log the signs of neural collapse on a fixed part of the training data, every few epochs.

    Logged as ``calibration/nc1``, ``nc1_trace``, ``nc2_norm``, ``nc2_angle``, ``nc2_norm_head``, ``nc2_angle_head``,
    ``nc3``, ``nc4`` (see :class:`.NeuralCollapse`), with ``mixed`` also ``calibration/mixed_alignment``,
    ``mixed_plane``, ``mixed_gap``, ``mixed_margin`` (see :class:`.MixedCollapse`); after training the figure
    ``calibration/neural_collapse``, all of them over epochs. Nothing is trained or changed. The features are those in
    eval mode, of samples without augmentation where the data are ours, after the epoch's last step.

    For nets trained on mixtures the clean measures do not describe the geometry, and ``mixed`` does: pairs of samples
    of the same and of different classes, at shares 0, 0.1, ..., 1.

    Args:
        every_n_epochs: at least 1; the last epoch is measured only if it falls on it.
        num_samples: of the training set, drawn once by ``seed``; all of them if there are fewer. At least 2.
        mixed: measure mixtures too: of all pairs of classes, or 100 drawn ones, 11 images each.
        head: name of the linear classifier in the module; None for the last linear layer.
        seed: of the samples, at least 0.
        batch_fn: takes the batch, returns ``(inputs, targets)``; default the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``; default ``pl_module(inputs)``.

    Raises:
        ValueError: for a wrong argument.
        MisconfigurationException: in ``setup`` for a module without a linear head, and for a strategy that shards
            weights; later for inputs that cannot be mixed.

    Example:
        >>> from lightning_plugins.callbacks import NeuralCollapseMonitor
        >>> trainer = pl.Trainer(callbacks=[NeuralCollapseMonitor(5)], logger=False, enable_checkpointing=False)

    Reference:
        V. Papyan, X. Y. Han, D. L. Donoho, "Prevalence of neural collapse during the terminal phase of deep learning
        training", PNAS 2020; Q. Fisher, H. Meng, V. Papyan, "Pushing Boundaries: Mixup's Influence on Neural Collapse",
        ICLR 2024.
    """

    needs_whole_weights = True

    @check_types
    def __init__(
        self,
        every_n_epochs: int = 1,
        *,
        num_samples: int = 2000,
        mixed: bool = False,
        head: str | None = None,
        seed: int = 0,
        batch_fn: BatchFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        for name, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("num_samples", num_samples, 2),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        self.every_n_epochs, self.num_samples, self.mixed = every_n_epochs, num_samples, mixed
        self.head, self.seed = head, seed
        self.batch_fn: BatchFn = batch_fn or inputs_and_targets
        self.logits_fn: LogitsFn = logits_fn or forward_logits
        self.epochs: list[int] = []
        self.history: dict[str, list[float]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_composition(trainer)
            if is_overridden("configure_model", pl_module):
                pl_module.configure_model()  # the head may come from there, and Lightning calls it only later
            find_head(pl_module, self.head)
            log_callback_hyperparameters(trainer, self)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs:
            return
        head = find_head(pl_module, self.head)
        with evaluating(pl_module, self.seed):
            values = self._measure(trainer, pl_module, head)
        if not values:
            return
        self.epochs.append(epoch)
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)
        pl_module.log_dict({f"calibration/{name}": value for name, value in values.items()}, sync_dist=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epochs and trainer.loggers and trainer.is_global_zero:
            log_figure(trainer, "calibration/neural_collapse", collapse_curves(self.epochs, self.history))

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": list(self.epochs), "history": {name: list(values) for name, values in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])
        self.history = {name: list(values) for name, values in state_dict["history"].items()}

    # Mechanism

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, head: nn.Linear) -> dict[str, float]:
        rows: list[tuple[Tensor, Tensor]] = []
        for batch in training_batches(trainer, self._choose):
            inputs, targets = self.batch_fn(batch)
            features, _ = head_inputs_and_outputs(trainer, pl_module, head, self.logits_fn, inputs)
            rows.append((features, classes_of(targets)))
            if sum(len(labels) for _, labels in rows) >= self.num_samples:  # of a stream
                break
        features, labels = (gather_rows(trainer, torch.cat(parts)) for parts in zip(*rows, strict=True))
        weight = head.weight.detach().cpu()
        bias = None if head.bias is None else head.bias.detach().cpu()
        try:
            values = asdict(neural_collapse(features, labels, weight, bias))
        except ValueError as error:  # the same in all processes; a monitor must not end a training
            rank_zero_warn(f"NeuralCollapseMonitor has nothing to log for epoch {trainer.current_epoch + 1}: {error}")
            return {}
        if self.mixed:
            mixed = self._mixed_features(trainer, pl_module, head)
            values |= {f"mixed_{name}": value for name, value in asdict(mixed_collapse(*mixed, weight, bias)).items()}
        return values

    def _choose(self, size: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(size, generator=generator)[: self.num_samples].tolist()

    def _mixed_features(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, head: nn.Linear
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features of mixtures, the classes of their samples, and the shares; all processes make the same."""
        inputs, labels = self._two_of_each_class(trainer)
        if not inputs.is_floating_point():
            raise MisconfigurationException(
                f"mixed=True mixes inputs, which must be floating-point, found {inputs.dtype}; set mixed=False"
            )
        classes = labels[::2]
        count = len(classes)
        pairs = torch.combinations(torch.arange(count))
        generator = torch.Generator().manual_seed(self.seed)
        pairs = pairs[torch.randperm(len(pairs), generator=generator)[:_PAIRS]]
        same = torch.arange(count)
        # Within a class: its two samples; of two classes: the first of each.
        left, right = torch.cat([2 * same, 2 * pairs[:, 0]]), torch.cat([2 * same + 1, 2 * pairs[:, 1]])
        shares = torch.tensor(_SHARES)
        features = []
        for a, b in zip(torch.split(left, 8), torch.split(right, 8), strict=True):
            weight = shares.to(inputs).view(1, -1, *[1] * (inputs.ndim - 1))
            mixtures = weight * inputs[a][:, None] + (1 - weight) * inputs[b][:, None]
            out, _ = head_inputs_and_outputs(trainer, pl_module, head, self.logits_fn, mixtures.flatten(0, 1))
            features.append(out.view(len(a), len(shares), -1).cpu())
        labels = labels.cpu()
        return torch.cat(features), labels[left], labels[right], shares

    def _two_of_each_class(self, trainer: pl.Trainer) -> tuple[Tensor, Tensor]:
        """Return two samples of each class that has as many, sorted by class."""
        found: dict[int, list[Tensor]] = {}
        for batch in training_batches(trainer, self._choose, share=False):
            inputs, targets = self.batch_fn(batch)
            for sample, label in zip(inputs, classes_of(targets).tolist(), strict=True):
                if len(found.setdefault(label, [])) < 2:
                    found[label].append(sample)
            if len(found) and sum(map(len, found.values())) >= self.num_samples:
                break
        kept = sorted(label for label, samples in found.items() if len(samples) == 2)
        if len(kept) < 2:
            raise MisconfigurationException(
                f"mixed=True needs two samples of two classes, found them for classes {kept}; raise num_samples"
            )
        inputs = torch.stack([sample for label in kept for sample in found[label]])
        return inputs, torch.tensor(kept).repeat_interleave(2)
