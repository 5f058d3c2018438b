"""Training at adversarially perturbed weights."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_plugins.callbacks.robustness.adversarial_training import AdversarialTraining
from lightning_plugins.callbacks.training_step import Step, TrainingStepCallback
from lightning_plugins.checks import check_types

__all__ = ["AdversarialWeightPerturbation"]


class AdversarialWeightPerturbation(TrainingStepCallback):
    r"""Take each gradient where the loss is highest in a neighbourhood of the weights.

    The step runs twice. The first gives the gradient :math:`g_l` of each weight :math:`\theta_l`, which is moved by
    :math:`\gamma\, \|\theta_l\|_2\, g_l / \|g_l\|_2`; the second is the one whose gradient is used. The weights
    are put back before the optimizer steps (the released code steps first, so that weight decay and momentum act on the
    moved weights). Weights are the parameters with more than one dimension. The first run changes no statistics of
    batch normalisations. Costs one forward and backward pass, and no second attack.

    Put it before :class:`AdversarialTraining` in the list of callbacks. What the module logs in its step is logged
    twice.

    Args:
        gamma: size of the perturbation relative to the weights, at least 0; the paper has 0.01, and 0.005 with TRADES.
        warmup_epochs: epochs at the beginning without a perturbation.

    Raises:
        ValueError: for an argument out of range.
        MisconfigurationException: in ``setup``, if it stands behind what attacks the batch or changes the loss, and
            under a strategy that shards weights.

    Example:
        >>> from lightning_plugins.callbacks import AdversarialTraining, AdversarialWeightPerturbation
        >>> callbacks = [AdversarialWeightPerturbation(gamma=0.01), AdversarialTraining()]

    Reference:
        Wu, Xia, Wang, *Adversarial Weight Perturbation Helps Robust Generalization*, 2020.
    """

    repeats_step = True
    needs_whole_weights = True

    @check_types
    def __init__(self, gamma: float = 0.01, *, warmup_epochs: int = 0) -> None:
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma must be at least 0, got {gamma!r}")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs!r}")
        self.gamma, self.warmup_epochs = gamma, warmup_epochs
        self._saved: dict[nn.Parameter, Tensor] = {}

    def around_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> STEP_OUTPUT:
        """Run the step, move the weights along its gradient, and run it again on the same examples."""
        if not self.gamma or trainer.current_epoch < self.warmup_epochs:
            return step(batch, batch_idx)
        self._put_back()  # a step that was skipped
        with ExitStack() as stack:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, AdversarialTraining):
                    stack.enter_context(callback.keeping_examples())
            norms = [module for module in pl_module.modules() if isinstance(module, _NormBase)]
            buffers = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers(recurse=False)}
            output = step(batch, batch_idx)
            loss = output.get("loss") if isinstance(output, dict) else output
            if not isinstance(loss, Tensor):
                return output
            self._move(pl_module, loss)
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
            return step(batch, batch_idx)

    def _move(self, pl_module: pl.LightningModule, loss: Tensor) -> None:
        weights = [p for p in pl_module.parameters() if p.requires_grad and p.ndim > 1]
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is None:
                    continue
                length = torch.linalg.vector_norm(gradient.float())
                if not torch.isfinite(length):
                    continue
                self._saved[weight] = weight.detach().clone()
                size = self.gamma * torch.linalg.vector_norm(weight.float())
                weight.add_((size / (length + 1e-20) * gradient.float()).to(weight.dtype))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()  # for each micro-batch: the only order that holds under accumulation

    def _put_back(self) -> None:
        if not self._saved:
            return
        with torch.no_grad():
            for weight, value in self._saved.items():
                weight.copy_(value)
        self._saved = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._put_back()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._put_back()
        super().teardown(trainer, pl_module, stage)
