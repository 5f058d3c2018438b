"""What a quantized network gets anew from data: the statistics of its batch normalisations, and its biases."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_plugins.checks import check_types
from lightning_plugins.modes import evaluation_mode
from lightning_plugins.quantization._calibration_batches import CHECKS, Forward, as_list, call, on_device, split
from lightning_plugins.quantization.convert import Model
from lightning_plugins.quantization.graph import _LAYERS
from lightning_plugins.quantization.layers import MultiPrecisionBatchNorm
from lightning_plugins.quantization.packed import borrowed

__all__ = ["reestimate_batch_norms_", "tune_biases_"]


@check_types
def reestimate_batch_norms_(model: Model, batches: Iterable[Any], *, forward: Forward | None = None) -> Model:
    """Measure the statistics of the batch normalisations in use anew, at the bits in use, in place.

    Each becomes the mean over the batches (``momentum=None``), in one pass. Of a normalisation for each precision, only
    the one in use changes. The paper folds them, puts new ones in and folds again; to the same end.

    Args:
        model: any model; a converted one at the bits that it is to be used at.
        batches: inputs, or tuples that start with them; of the same size, since each counts the same, and large, at
            least 32 or so.
        forward: takes the model and inputs and runs it; default ``model(inputs)``.

    Returns:
        The same model.

    Raises:
        ValueError: without batches, or for statistics that are not finite; the old ones are kept then.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2)).eval()
        >>> net = reestimate_batch_norms_(net, [torch.tensor([[0.0, 2.0], [4.0, 4.0]])])
        >>> net[0].running_mean
        tensor([2., 3.])

    Reference:
        Hubara et al., *Improving Post Training Neural Quantization*, 2020, section 5.1.
    """
    known, run = as_list(batches), forward or call
    norms = norms_in_use(model)
    before = [(norm, norm.momentum, deepcopy(norm.state_dict())) for norm in norms]
    done = False
    try:
        with evaluation_mode(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for inputs, _ in on_device(model, known):
                run(model, inputs)
        unused = [norm for norm in norms if norm.num_batches_tracked == 0]
        for norm, _, state in before:
            if norm in unused:
                norm.load_state_dict(state)
            elif not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):  # type: ignore[union-attr]
                raise ValueError("the statistics of a batch normalisation are not finite; look at the calibration data")
        done = True
    finally:
        for norm, momentum, state in before:
            norm.momentum = momentum
            if not done:
                norm.load_state_dict(state)
    return model


@check_types
def tune_biases_(
    model: nn.Module,
    batches: Iterable[Any],
    reference_logits: Tensor,
    *,
    num_steps: int = 600,
    batch_size: int = 50,
    learning_rate: float | None = None,
    seed: int = 0,
    forward: Forward | None = None,
) -> tuple[float, float]:
    """Train the biases and the last layer towards the full-precision net's predictions, in place.

    Minimises the Kullback-Leibler divergence to the full-precision softmax by SGD, at the bits in use, in evaluation
    mode. Biases are those of convolutions, linear layers and of the normalisations in use; nothing is folded here, so a
    normalisation's bias is the bias of the layer before it. A fifth of the samples, the last ones, is held out, and the
    parameters with the least divergence on it are kept, the ones from the start among them.

    Args:
        model: a converted model at the bits that it is to be used at.
        batches: inputs, or tuples that start with them; at least 2 samples in all.
        reference_logits: ``(N, C)`` for all samples, in their order.
        num_steps: of SGD; the released code makes up to 600.
        batch_size: samples of each random minibatch.
        learning_rate: default ``0.1 / C``: the release's 0.1 is for a divergence averaged over classes too, this one is
            per sample.
        seed: of the minibatches.
        forward: takes the model and inputs, returns logits; default ``model(inputs)``.

    Returns:
        The held-out divergence before and after, in nats per sample.

    Raises:
        ValueError: for wrong arguments, or other numbers of logits than samples.

    Example:
        >>> rng = torch.manual_seed(0)
        >>> net, inputs = nn.Linear(4, 3), torch.rand(50, 4)
        >>> before, after = tune_biases_(net, [inputs], 5 * torch.randn(50, 3), num_steps=50)
        >>> after < before
        True

    Reference:
        Hubara et al., *Improving Post Training Neural Quantization*, 2020, section 5.2.
    """
    if num_steps < 0 or batch_size < 1:
        raise ValueError(f"need num_steps >= 0 and batch_size >= 1, got {num_steps!r} and {batch_size!r}")
    run = forward or call
    inputs = torch.cat([part for part, _ in on_device(model, as_list(batches))])
    if reference_logits.ndim != 2 or len(reference_logits) != len(inputs):
        raise ValueError(
            f"reference_logits must be (N, C) with one row for each of the {len(inputs)} samples, got "
            f"{tuple(reference_logits.shape)}"
        )
    train, held = split(len(inputs))
    if not reference_logits.isfinite().all():
        raise ValueError("reference_logits must be finite, found NaN or infinity; look at the network they come from")
    targets = reference_logits.detach().to(inputs.device).float().log_softmax(1)
    rate = 0.1 / reference_logits.shape[1] if learning_rate is None else learning_rate
    parameters = _biases_and_last_weight(model)

    def divergence(rows: Tensor | slice) -> Tensor:
        logits = run(model, inputs[rows]).float().log_softmax(1)
        if logits.shape[1:] != targets.shape[1:]:
            raise ValueError(
                f"reference_logits must have the {tuple(logits.shape[1:])} classes of the model, got "
                f"{tuple(targets.shape[1:])}"
            )
        return F.kl_div(logits, targets[rows], log_target=True, reduction="batchmean")

    @torch.no_grad()
    def held_out() -> float:
        parts = [slice(i, min(i + 256, held.stop)) for i in range(held.start, held.stop, 256)]
        total: float = math.fsum(float(divergence(part)) * (part.stop - part.start) for part in parts)
        return total / float(held.stop - held.start)

    generator = torch.Generator().manual_seed(seed)
    needed = [parameter.requires_grad for parameter in parameters]
    best = [parameter.detach().clone() for parameter in parameters]
    with borrowed(model):  # its torch.no_grad() is lifted for the steps
        first = least = held_out()
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for step in range(num_steps):
                rows = torch.randint(train.stop, (batch_size,), generator=generator).to(inputs.device)
                with torch.enable_grad():
                    gradients = torch.autograd.grad(divergence(rows), parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(rate * gradient)
                if (step + 1) % max(1, num_steps // CHECKS) == 0 or step + 1 == num_steps:
                    now = held_out()
                    if now < least:
                        least, best = now, [parameter.detach().clone() for parameter in parameters]
        finally:
            for parameter, value, flag in zip(parameters, best, needed, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(flag)
    return first, least


def norms_in_use(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch normalisations that have statistics, without those of precisions that are not in use."""
    resting = _resting(model)
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module not in resting and module.running_mean is not None
    ]


def _resting(model: nn.Module) -> set[nn.Module]:
    return {
        part
        for module in model.modules()
        if isinstance(module, MultiPrecisionBatchNorm)
        for bits, norm in module.norms.items()
        if bits != str(module.num_bits)
        for part in norm.modules()
    }


def _biases_and_last_weight(model: nn.Module) -> list[nn.Parameter]:
    resting = _resting(model)
    found: dict[nn.Parameter, None] = {}
    last = None
    for module in model.modules():
        if isinstance(module, (*_LAYERS, _BatchNorm)) and module not in resting:
            if isinstance(module.bias, nn.Parameter):
                found[module.bias] = None
            if isinstance(module, _LAYERS):
                last = module
    weight = None if last is None else last._parameters.get("weight")
    if isinstance(weight, nn.Parameter):
        found[weight] = None
    return list(found)
