"""Scales of weights and inputs from a few batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.quantization._calibration_batches import Forward, as_list, call, check_model, on_device
from lightning_plugins.quantization.convert import Model, quantized_layers, switch_
from lightning_plugins.quantization.layers import FULL_PRECISION, InputQuantizer, ResidualQuantizer, _QuantLayer
from lightning_plugins.quantization.packed import borrowed
from lightning_plugins.quantization.quantizers import SMALLEST_SCALE, code_range, double_rounding, smallest_scale

__all__ = ["calibrate_scales_"]

Bits = int | Mapping[str, int]
_SAMPLED = 2**15  # values of each batch that an input's scale is searched on


@check_types
def calibrate_scales_(model: Model, batches: Iterable[Any], plan: Bits, *, forward: Forward | None = None) -> Model:
    """Set the scales of a converted model for a plan from its weights and some data, without training, in place.

    Each scale is the one with the least mean squared error among fractions of the range: for every output channel of a
    weight (its present scale is a candidate too, so that a weight on its grid stays there), and for the input of a
    layer in the full-precision net. One weight scale serves all precisions of a layer, so only the plan's precision is
    at its best afterwards.

    Args:
        model: converted by ``convert_(model, (*bits, 32))``; left at the plan.
        batches: inputs, or tuples that start with them.
        plan: bits of each layer, or of all.
        forward: takes the model and inputs and runs it; default ``model(inputs)``.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no precision 32 or only codes, if the plan does not fit it, without batches, or for
            inputs that are not finite.

    Example:
        >>> from lightning_plugins.quantization import convert_
        >>> net = convert_(nn.Sequential(nn.Linear(4, 8)), (4, 32), first_last_bits=4)
        >>> net = calibrate_scales_(net, [torch.rand(50, 4)], 4)
        >>> net[0].input_quantizer.is_ready(4)
        True
    """
    check_model(model)
    known = as_list(batches)
    switch_(model, plan)
    for layer in quantized_layers(model).values():
        if layer.num_bits != FULL_PRECISION:
            _search_weight_scale(layer)
    wanted = _inputs_to_quantize(model)
    ranges = {quantizer: (math.inf, -math.inf) for quantizer in wanted}

    def see_range(quantizer: InputQuantizer, values: Tensor) -> None:
        low, high = (float(bound) for bound in values.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError("the inputs of a layer are not finite; look at the calibration data and the weights")
        ranges[quantizer] = min(low, ranges[quantizer][0]), max(high, ranges[quantizer][1])

    run = forward or call
    with borrowed(model, FULL_PRECISION), _watch_inputs(wanted, see_range):
        for inputs, _ in on_device(model, known):
            run(model, inputs)
    candidates: dict[InputQuantizer, Tensor] = {}
    for quantizer, (low, high) in ranges.items():
        limits = code_range(wanted[quantizer][1], signed=low < 0)
        widest = max(high / limits[1], low / limits[0] if low < 0 else 0.0)
        if 0 < widest < math.inf:  # else the layer was not run, or nothing but 0 goes in
            scale = quantizer.scales[str(wanted[quantizer][1])]
            fractions = torch.linspace(1.0, 0.1, 91, dtype=scale.dtype, device=scale.device)
            candidates[quantizer] = (widest * fractions).clamp_min(SMALLEST_SCALE)
    errors = {quantizer: torch.zeros_like(scales) for quantizer, scales in candidates.items()}
    generator = torch.Generator().manual_seed(0)

    def see_error(quantizer: InputQuantizer, values: Tensor) -> None:
        if quantizer not in candidates:
            return
        flat = values.flatten().to(candidates[quantizer].dtype)
        if len(flat) > _SAMPLED:
            flat = flat[torch.randint(len(flat), (_SAMPLED,), generator=generator).to(flat.device)]
        scales = candidates[quantizer][:, None]
        codes = (flat / scales).round_().clamp_(*code_range(wanted[quantizer][1], signed=ranges[quantizer][0] < 0))
        errors[quantizer] += (codes * scales - flat).square_().sum(1)

    with borrowed(model, FULL_PRECISION), _watch_inputs(wanted, see_error):
        for inputs, _ in on_device(model, known):
            run(model, inputs)
    with torch.no_grad():
        for quantizer, scales in candidates.items():
            bits = wanted[quantizer][1]
            quantizer.scales[str(bits)].copy_(scales[errors[quantizer].argmin()])
            quantizer.ready[quantizer.bits.index(bits)] = True
            quantizer.signed.fill_(ranges[quantizer][0] < 0)
            quantizer._read_buffers()
    return model


@torch.no_grad()
def _search_weight_scale(layer: _QuantLayer) -> None:
    weight = layer.weight.detach()
    weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    rows = weight.flatten(1) if layer.per_channel else weight.reshape(1, -1)
    bits, high_bits = layer.num_bits, layer.high_bits
    low, high = code_range(bits)
    widest = torch.maximum(rows.amax(1) / high, rows.amin(1) / low) * 2.0 ** (bits - high_bits)
    best = layer.weight_scale.detach().to(rows).reshape(-1).clone()
    least = torch.full_like(best, math.inf)
    for scale in (best.clone(), *(widest * fraction for fraction in torch.linspace(1.0, 0.1, 91).tolist())):
        scale = scale.clamp_min(smallest_scale(layer.weight_scale.dtype))
        error = (double_rounding(rows, scale, bits=bits, high_bits=high_bits) - rows).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    layer.weight_scale.copy_(best.reshape(layer.weight_scale.shape))


def _inputs_to_quantize(model: nn.Module) -> dict[InputQuantizer, tuple[nn.Module, int]]:
    """Return the quantizers in use, each with the module whose first argument is what it quantizes, and its bits."""
    wanted: dict[InputQuantizer, tuple[nn.Module, int]] = {}
    for module in model.modules():
        if isinstance(module, ResidualQuantizer):
            wanted[module] = module, module.BITS
        elif isinstance(module, _QuantLayer) and module.quantizes_input():
            assert module.input_quantizer is not None
            wanted[module.input_quantizer] = module, module.num_bits
    return wanted


def scales_are_set(model: nn.Module) -> bool:
    return all(quantizer.is_ready(bits) for quantizer, (_, bits) in _inputs_to_quantize(model).items())


@contextmanager
def _watch_inputs(
    wanted: Mapping[InputQuantizer, tuple[nn.Module, int]], see: Callable[[InputQuantizer, Tensor], None]
) -> Iterator[None]:
    def watch(quantizer: InputQuantizer) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, kwargs: see(quantizer, args[0] if args else next(iter(kwargs.values())))

    handles = [
        module.register_forward_pre_hook(watch(quantizer), with_kwargs=True)
        for quantizer, (module, _) in wanted.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
