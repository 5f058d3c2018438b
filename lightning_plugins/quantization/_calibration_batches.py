"""What goes through a network while it is quantized after training: batches, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.quantization.convert import Model, check_converted, model_precisions, quantized_layers, switch_
from lightning_plugins.quantization.copying import copy_network
from lightning_plugins.quantization.layers import FULL_PRECISION

Forward = Callable[[nn.Module, Tensor], Tensor]

CHECKS = 20  # times that the held-out error is measured during a fit


def call(model: nn.Module, inputs: Tensor) -> Tensor:
    output: Tensor = model(inputs)
    return output


def on_device(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for batch in batches:
        inputs, targets = (
            (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)
        )
        if not isinstance(inputs, Tensor):
            raise TypeError(f"a batch must be a tensor or start with one, found a {type(inputs).__name__}")
        yield inputs.to(device), targets.to(device) if isinstance(targets, Tensor) else None


def full_precision_copy(model: Model) -> Model:
    """Copy a converted model as the full-precision net that it is at 32 bits."""
    return switch_(copy_network(model), FULL_PRECISION).eval()


def split(count: int) -> tuple[slice, slice]:
    """Return the rows to fit on, and the last fifth to judge by."""
    if count < 2:
        raise ValueError(f"calibration needs at least 2 samples, got {count}; a few hundred give good results")
    held = max(1, count // 5)
    return slice(0, count - held), slice(count - held, count)


def as_list(batches: Iterable[Any]) -> list[Any]:
    known = list(batches)
    if not known:
        raise ValueError("there are no calibration batches; give a list of (inputs, targets)")
    return known


def check_model(model: nn.Module) -> None:
    check_converted(model)
    if FULL_PRECISION not in model_precisions(model):
        raise ValueError(
            f"post-training quantization compares with the full-precision net, and this model was converted for "
            f"{model_precisions(model)} bits; convert it with 32 among them: convert_(model, (8, 4, 32))"
        )
    if any(layer.codes is not None for layer in quantized_layers(model).values()):
        raise ValueError("a model that was read from a packed file has no fp32 weights; start from the trained model")


def check_fit_arguments(mode: str, num_steps: int, batch_size: int) -> None:
    if mode not in ("parallel", "sequential"):
        raise ValueError(f"mode must be 'parallel' or 'sequential', got {mode!r}")
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
