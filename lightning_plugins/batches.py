"""Reading inputs and targets out of a batch, and putting changed ones back, whatever the batch looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_plugins.checks import check_types

__all__ = ["BatchFn", "LogitsFn", "forward_logits", "inputs_and_targets", "replace_tensor"]

BatchFn = Callable[[Any], tuple[Tensor, Tensor]]
"""From a batch to its inputs and targets."""

LogitsFn = Callable[[pl.LightningModule, Tensor], Tensor]
"""From a module and inputs ``(N, ...)`` to logits ``(N, C)``."""


def inputs_and_targets(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the first two elements of a tuple or list batch: the default ``batch_fn``.

    Raises:
        TypeError: if the batch has another form; the message says how to pass a ``batch_fn``.

    Example:
        >>> import torch
        >>> inputs, targets = inputs_and_targets([torch.zeros(2, 3), torch.tensor([0, 1]), "names"])
        >>> inputs.shape, targets.shape
        (torch.Size([2, 3]), torch.Size([2]))
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2]):
        return batch[0], batch[1]
    form = f"a {type(batch).__name__}"
    if isinstance(batch, dict):
        form += f" with keys {sorted(map(str, batch))}"
    raise TypeError(
        f"a batch (inputs, targets, ...) of tensors was expected, found {form}; pass "
        "batch_fn=lambda batch: (inputs, targets) that picks the two tensors out of it"
    )


@check_types
def replace_tensor(batch: Any, old: Tensor, new: Tensor) -> Any:
    """Return a copy of ``batch`` in which the tensor ``old``, found by identity, is ``new``.

    Tuples, named tuples, lists, dictionaries and dataclasses are rebuilt at any depth; everything else is kept by
    reference.

    Raises:
        ValueError: if ``old`` is not an element of ``batch``, which happens when a ``batch_fn`` returns a tensor that
            it computed.

    Example:
        >>> import torch
        >>> batch = {"image": torch.zeros(1), "label": torch.ones(1)}
        >>> replace_tensor(batch, batch["image"], torch.tensor([5.0]))
        {'image': tensor([5.]), 'label': tensor([1.])}
    """
    found = False

    def swap(tensor: Tensor) -> Tensor:
        nonlocal found
        if tensor is old:
            found = True
            return new
        return tensor

    replaced = apply_to_collection(batch, Tensor, swap)
    if not found:
        raise ValueError(
            "the tensor to replace is not an element of the batch; batch_fn must return the batch's own tensors, "
            "not computed ones"
        )
    return replaced


@check_types
def forward_logits(pl_module: pl.LightningModule, inputs: Tensor) -> Tensor:
    """Return ``pl_module(inputs)``: the default ``logits_fn``."""
    logits: Tensor = pl_module(inputs)
    return logits
