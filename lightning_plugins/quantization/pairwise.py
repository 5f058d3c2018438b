"""How much the quantization of one layer changes what that of another one costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from lightning_plugins import hessian
from lightning_plugins._processes import numbers_over_processes
from lightning_plugins._progress import progress_bar

__all__ = [
    "LossFn",
    "interactions_by_products",
    "loss_and_accuracy",
    "measured_interactions",
]

_VECTORS_AT_ONCE = 8
Batches = Sequence[tuple[Tensor, Tensor]]

LossFn = Callable[[Any, Tensor], Tensor]
"""From the model's output and targets to the mean loss of a batch."""


def interactions_by_products(
    model: nn.Module, loss_fn: LossFn, batches: Batches, deltas: Mapping[str, Tensor]
) -> Tensor:
    """Return ``I_lm = d_l' H d_m`` for all pairs of layers, from one Hessian-vector product for each layer.

    Args:
        model: in evaluation mode.
        loss_fn: of the model's output and targets, mean over the batch.
        batches: inputs and targets.
        deltas: what is added to the weight of each layer, by the layer's name.

    Returns:
        ``(L, L)`` float64, symmetric, in the order of ``deltas``.
    """
    names = list(deltas)
    matrix = torch.zeros(len(names), len(names), dtype=torch.float64)
    # Vectors share a gradient, but all of them at once would need a copy of the weights for each layer.
    starts = range(0, len(names), _VECTORS_AT_ONCE)
    for start in progress_bar(starts, title="Hessian-vector products"):
        some = names[start : start + _VECTORS_AT_ONCE]
        vectors = [{name: deltas[name]} for name in some]
        products = hessian.hessian_vector_products(model, loss_fn, batches, vectors, layers=names)
        for column, product in enumerate(products, start):
            for row, name in enumerate(names):
                matrix[row, column] = (deltas[name].double() * product[name].double()).sum()
    return (matrix + matrix.T) / 2


@torch.no_grad()
def measured_interactions(model: nn.Module, loss_fn: LossFn, batches: Batches, deltas: Mapping[str, Tensor]) -> Tensor:
    """Return ``I_lm = L(l, m) - L(l) - L(m) + L(none)`` for all pairs of layers, from a forward pass for each.

    ``L(l, m)`` is the mean loss with the weights of layers l and m perturbed. On the diagonal stands
    ``2 (L(l) - L(none))``, which is ``d_l' H d_l`` as far as the loss is quadratic and at a minimum. What is smaller
    than the rounding errors of the loss is noise.

    Args:
        model: in evaluation mode; its weights are changed, and put back bit by bit.
        loss_fn: of the model's output and targets, mean over the batch.
        batches: inputs and targets.
        deltas: what is added to the weight of each layer, by the layer's name.

    Returns:
        ``(L, L)`` float64, symmetric, in the order of ``deltas``.
    """
    names = list(deltas)
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    original = {name: weight.clone() for name, weight in weights.items()}

    def loss(*perturbed: str) -> float:
        try:
            for name in perturbed:
                weights[name].add_(deltas[name])
            return loss_and_accuracy(model, batches, loss_fn)[0]
        finally:
            for name in perturbed:
                weights[name].copy_(original[name])

    start = loss()
    alone = [loss(name) - start for name in names]
    matrix = torch.diag(2 * torch.tensor(alone, dtype=torch.float64))
    pairs = [(row, column) for row in range(len(names)) for column in range(row)]
    for row, column in progress_bar(pairs, title="loss of each pair of layers"):
        together = loss(names[row], names[column]) - start
        matrix[row, column] = matrix[column, row] = together - alone[row] - alone[column]
    return matrix


def loss_and_accuracy(model: nn.Module, batches: Iterable[Sequence[Tensor]], loss_fn: LossFn) -> tuple[float, float]:
    """Return the mean loss over samples and the accuracy in [0, 1], NaN if targets are not classes.

    With several processes (``torch.distributed``), all call it, each with its share of the data.

    Raises:
        ValueError: if there is no batch.
    """
    loss, correct, decisions, samples = 0.0, 0.0, 0.0, 0.0
    for inputs, targets in batches:
        outputs = model(inputs)
        loss += float(loss_fn(outputs, targets)) * len(inputs)
        samples += len(inputs)
        if isinstance(outputs, Tensor) and outputs.ndim > 1 and not targets.is_floating_point():
            predicted = outputs.argmax(1)
            if predicted.shape == targets.shape:
                correct += float((predicted == targets).sum())
                decisions += targets.numel()
    loss, correct, decisions, samples = numbers_over_processes(loss, correct, decisions, samples)
    if not samples:
        raise ValueError("batches is empty; an iterator that was read before has nothing left, pass a list")
    return loss / samples, correct / decisions if decisions else math.nan
