"""The one way in which callbacks take part in the training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lightning_plugins.batches import BatchFn, LogitsFn, forward_logits, inputs_and_targets, replace_tensor
from lightning_plugins.callbacks._borrow import borrow_attribute, tap_forward
from lightning_plugins.callbacks._composition import check_composition
from lightning_plugins.checks import check_types
from lightning_plugins.logging import log_callback_hyperparameters

__all__ = ["Step", "TrainingStepCallback"]

Step = Callable[[Any, int], STEP_OUTPUT]
"""What a callback calls with ``(batch, batch_idx)``: the next callback inwards, at last the module's own step."""


class _StepChain:
    """The wrapped ``training_step`` of one module: the callbacks around it, the first one outermost."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        training_step = pl_module.training_step
        if is_param_in_hook_signature(training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.training_step takes `dataloader_iter`, so there is no batch that a "
                "callback could change; take `batch` instead."
            )
        self.pl_module = pl_module
        self.inner = training_step
        # Lightning passes the index only to a step that asks for it, and so do we.
        self.inner_takes_index = is_param_in_hook_signature(training_step, "batch_idx", min_args=2)
        self.callbacks: list[TrainingStepCallback] = []
        self.pending: dict[Tensor, Tensor] = {}  # parameter -> gradient of the losses that backward() has taken
        self.restore = borrow_attribute(pl_module, "training_step", self.training_step)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module (weight averaging, deployment) has the plain step: no callbacks, no half-made gradients.
        return {**vars(self), "callbacks": [], "pending": {}, "restore": None}

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        self.pending.clear()  # left over if the previous step was skipped
        return self._call(0, batch, batch_idx)

    def _call(self, depth: int, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        if depth < len(self.callbacks):
            step = partial(self._call, depth + 1)
            return self.callbacks[depth].around_training_step(
                self.pl_module.trainer, self.pl_module, step, batch, batch_idx
            )
        return self.inner(batch, batch_idx) if self.inner_takes_index else self.inner(batch)

    def backward(self, loss: Tensor) -> None:
        trainer = self.pl_module.trainer
        parameters = [parameter for parameter in self.pl_module.parameters() if parameter.requires_grad]
        # Lightning zeroes the gradients after the step has returned. What is in .grad now (the last update's gradients,
        # or the sum over earlier micro-batches) is put back, and what this loss adds waits for add_pending_gradients().
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            # The strategy scales the loss where the precision needs it. Backward passes do not belong under autocast.
            # Its on_before_backward hook puts the pending gradients of earlier losses into .grad, so that these join.
            with torch.autocast(self.pl_module.device.type, enabled=False):
                trainer.strategy.backward(loss / trainer.accumulate_grad_batches, None)
            self.pending = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        finally:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient

    def add_pending_gradients(self) -> None:
        for parameter, gradient in self.pending.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self.pending.clear()


class TrainingStepCallback(pl.Callback):
    """Base of the callbacks that change a batch, repeat the training step, or change its loss.

    A subclass overrides :meth:`around_training_step`. Several of them nest in the order of the Trainer's callback list,
    the first one outermost: what it hands to ``step`` is what the next one receives as its batch. Everything happens
    inside the module's ``training_step``, hence under the Trainer's precision and strategy, and Lightning does the
    backward pass, accumulation, clipping and the optimizer step as always. The module gets its own step back when
    fitting ends, also when it ends by an exception.

    Works with any LightningModule under automatic optimization whose ``forward`` returns logits and whose batch starts
    with inputs and targets; for others there are the two arguments. What the module logs inside its step is logged once
    for each call of ``step``.

    Args:
        batch_fn: takes the batch, returns its inputs and targets (the batch's own tensors, not computed ones, so that
            :meth:`replace` can find them). Default: the first two elements of a tuple or list.
        logits_fn: takes the module and inputs, returns logits ``(N, C)``. Default: ``pl_module(inputs)``.

    Other callbacks ask these attributes, all of them False here, whether they can work beside this one, and in which
    order; a subclass sets those that are true of it.

    Attributes:
        replaces_loss: it drops the loss of the step for one of its own, from the inputs and targets it got.
        adds_to_loss: it adds to the loss of the step.
        ignores_targets: what it adds does not depend on the batch.
        changes_batch: it runs the step on other inputs than it got.
        changes_targets: it runs the step on other targets than it got.
        replays_batch: it runs the step on another batch than the one it got.
        repeats_step: it runs the step more than once for one gradient.
        backpropagates: it backpropagates losses itself, by :meth:`backward` or in optimizer steps of its own.
        needs_whole_weights: it reads or changes weights, so strategies that shard them are refused.

    Raises:
        MisconfigurationException: in ``setup``, for a module with manual optimization or with a ``dataloader_iter``
            step, beside callbacks that it cannot work with in this order, and under a strategy that it cannot.

    Example:
        >>> from lightning_plugins.callbacks import TrainingStepCallback
        >>> class InputNoise(TrainingStepCallback):
        ...     changes_batch = True
        ...
        ...     def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
        ...         inputs, _ = self.batch_fn(batch)
        ...         noisy = inputs + 0.1 * torch.randn_like(inputs)
        ...         return step(self.replace(batch, inputs, noisy), batch_idx)
    """

    batch_fn: BatchFn = staticmethod(inputs_and_targets)
    logits_fn: LogitsFn = staticmethod(forward_logits)
    replaces_loss = False
    adds_to_loss = False
    ignores_targets = False
    changes_batch = False
    changes_targets = False
    replays_batch = False
    repeats_step = False
    backpropagates = False
    needs_whole_weights = False
    _chain: _StepChain | None = None

    @check_types
    def __init__(self, *, batch_fn: BatchFn | None = None, logits_fn: LogitsFn | None = None) -> None:
        if batch_fn is not None:
            self.batch_fn = batch_fn
        if logits_fn is not None:
            self.logits_fn = logits_fn

    def around_training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> STEP_OUTPUT:
        """Call ``step(batch, batch_idx)`` zero or more times and return the output that Lightning will use.

        Args:
            trainer: the Trainer.
            pl_module: the bare module, also where a strategy wraps it.
            step: the next callback inwards, at last the module's own ``training_step``.
            batch: the batch, on the device, as the callback outside of this one handed it over.
            batch_idx: its index in the epoch.

        Returns:
            A scalar loss, a dictionary with the key ``"loss"``, or None to skip the update.
        """
        raise NotImplementedError(f"{type(self).__name__} must override around_training_step")

    def replace(self, batch: Any, old: Tensor, new: Tensor) -> Any:
        """Return the batch with ``new`` in the place of its tensor ``old``; see :func:`.replace_tensor`."""
        return replace_tensor(batch, old, new)

    def step_with_logits(
        self, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int
    ) -> tuple[Tensor, STEP_OUTPUT]:
        """Run the step and return the logits that ``forward`` gave in it, with their graph, and the step's output.

        A step that does without ``forward`` is followed by a pass of ``logits_fn``.
        """
        seen: list[Tensor] = []

        def see(output: Any) -> Any:
            if isinstance(output, Tensor) and output.ndim == 2:
                seen.append(output)
            return output

        restore = tap_forward(pl_module, see)
        try:
            output = step(batch, batch_idx)
        finally:
            restore()
        logits = seen[-1] if seen else self.logits_fn(pl_module, self.batch_fn(batch)[0])
        return logits, output

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a further loss now, as if it had been added to the one that the step returns.

        For methods with several losses in one update: each graph is freed before the next forward pass, so the memory
        is that of one. Accumulation, loss scaling, clipping and the reduction over processes hold: the gradients join
        those of the returned loss just before its backward pass, and processes exchange the sum once. Callable only
        inside :meth:`around_training_step`. Other callbacks see one ``on_before_backward`` / ``on_after_backward`` for
        each loss.

        Args:
            loss: scalar with a graph, not yet divided by ``accumulate_grad_batches``.
        """
        if self._chain is None:
            raise RuntimeError("backward() belongs inside around_training_step; outside of it use loss.backward()")
        self._chain.backward(loss)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_composition(trainer)
        self._refuse_manual_optimization(pl_module)
        owner = getattr(vars(pl_module).get("training_step"), "__self__", None)
        self._chain = owner if isinstance(owner, _StepChain) else _StepChain(pl_module)
        self._chain.callbacks.append(self)
        log_callback_hyperparameters(trainer, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_manual_optimization(pl_module)  # the module's own setup, which runs after ours, may have set it

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._chain is not None:
            self._chain.add_pending_gradients()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave_chain()  # Lightning calls no teardown after an exception

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave_chain()

    def _leave_chain(self) -> None:
        if self._chain is None:
            return
        self._chain.callbacks.remove(self)
        if not self._chain.callbacks:
            self._chain.restore()
        self._chain = None

    def _refuse_manual_optimization(self, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} changes the loss that Lightning backpropagates, but {type(pl_module).__name__} "
                "has automatic_optimization=False and backpropagates inside its own step; use automatic optimization, "
                "or call the method's function from lightning_plugins in your step."
            )
