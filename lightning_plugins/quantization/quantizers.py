"""Quantizers: integer codes, and their differentiable stand-ins for training.

One rule for ties, half to even, holds in training, in switching and in export: 1 of 4 codes that switch from 8 to 6
bits lies exactly between two, so another rule anywhere would give another network.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_plugins.checks import check_types

__all__ = [
    "code_range",
    "conv_on_quantized",
    "double_rounding",
    "fake_quantize",
    "linear_on_quantized",
    "lsq_scale",
    "percentile_scale",
    "quantize_codes",
    "switch_codes",
    "weight_scale",
]

ScaleGrad = Literal["effective", "exact"]
ConvArguments = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation, groups."""

SMALLEST_SCALE = 1e-8


def code_range(bits: int, *, signed: bool = True) -> tuple[int, int]:
    """Return the lowest and the highest integer code of a precision.

    Args:
        bits: 2 to 8.
        signed: two's complement; otherwise from 0.

    Raises:
        ValueError: for other bits.

    Example:
        >>> code_range(4), code_range(4, signed=False)
        ((-8, 7), (0, 15))
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie in 2..8, got {bits!r}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@check_types
def quantize_codes(weight: Tensor, scale: Tensor, *, bits: int, high_bits: int = 8) -> Tensor:
    """Return the integer codes of a weight by Double Rounding: first to ``high_bits``, from there to ``bits``.

    ``q_h = clip(round(W / s_h))``, ``q_b = clip(round(q_h / 2^(h - b)))``, both half to even.

    Args:
        weight: floating point, any shape.
        scale: step of the ``high_bits`` codes, positive; one value, or one for each slice along dimension 0.
        bits: 2 to ``high_bits``.
        high_bits: at most 8.

    Returns:
        int8 codes of the weight's shape.

    Raises:
        ValueError: for bits out of range or a scale of another shape.

    Example:
        >>> quantize_codes(torch.tensor([0.4, -3.0, 9.0]), torch.tensor(0.1), bits=4, high_bits=6)
        tensor([ 1, -8,  7], dtype=torch.int8)

    Reference:
        Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025, equations 1 and 2.
    """
    _check_bits(bits, high_bits)
    with torch.no_grad():
        weight, scale = _in_float(weight), _in_float(scale)
        codes = _round_twice(weight / _align(scale, weight), bits, high_bits, signed=True)
        if codes.isnan().any():
            raise ValueError("weight and scale must be finite to have codes, got NaN; look for the step that diverged")
    return codes.to(torch.int8)


@check_types
def switch_codes(codes: Tensor, *, high_bits: int, bits: int) -> Tensor:
    """Return the ``bits`` codes that ``high_bits`` codes stand for, in integer arithmetic alone.

    Always start from the highest codes that are stored: switching is not transitive, 8 to 4 to 2 bits differs from 8 to
    2 bits on 24 of the 256 codes.

    Args:
        codes: int8, in the range of ``high_bits``.
        high_bits: at most 8.
        bits: 2 to ``high_bits``.

    Returns:
        int8 codes.

    Raises:
        ValueError: for bits out of range.
        TypeError: for codes that are no signed integers.

    Example:
        >>> switch_codes(torch.tensor([-128, -24, 8, 24, 40, 127], dtype=torch.int8), high_bits=8, bits=4)
        tensor([-8, -2,  0,  2,  2,  7], dtype=torch.int8)

    Reference:
        Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025, equation 2.
    """
    _check_bits(bits, high_bits)
    if codes.is_floating_point() or codes.dtype in (torch.uint8, torch.bool):
        raise TypeError(f"codes must be signed integers, got {codes.dtype}; quantize_codes makes them from weights")
    shift = high_bits - bits
    if shift == 0:
        return codes.to(torch.int8)
    wide = codes.to(torch.int16)  # adding the half would overflow int8
    # Half to even without leaving the integers: the half is added, less one where the result would be even.
    rounded = (wide + (2 ** (shift - 1) - 1) + ((wide >> shift) & 1)) >> shift
    switched: Tensor = rounded.clamp(*code_range(bits)).to(torch.int8)
    return switched


@check_types
def double_rounding(
    weight: Tensor, scale: Tensor, *, bits: int, high_bits: int = 8, scale_grad: ScaleGrad = "effective"
) -> Tensor:
    """Fake-quantize a weight to ``bits``, by way of its ``high_bits`` codes; differentiable in weight and scale.

    Forward: ``q_b * s_h * 2^(h - b)`` with the codes of :func:`quantize_codes`. Backward, with the upstream gradient G
    and ``u = W / (s_h 2^(h-b))``: ``dW = G`` where u lies in the range of ``bits``, else 0; ``ds_h = g * sum(G * rho)``
    with rho the clipping limit outside and ``round(u) - u`` inside, ``g = 1 / sqrt(N * Qp)``, N weights to a scale.
    With ``bits == high_bits`` this is learned step size quantization (LSQ).

    Args:
        weight: floating point, any shape; half precision is computed in float32.
        scale: ``s_h``, step of the ``high_bits`` codes, positive; one value, or one for each slice along dimension 0.
        bits: 2 to ``high_bits``.
        high_bits: at most 8.
        scale_grad: ``"effective"`` is the paper's, the gradient of the step ``s_h 2^(h-b)`` that is in effect;
            ``"exact"`` has the chain rule's further factor ``2^(h-b)``.

    Returns:
        The quantized weight, shape and dtype of ``weight``.

    Raises:
        ValueError: for bits out of range, another ``scale_grad``, or a scale of another shape.

    Example:
        >>> weight = torch.tensor([[0.40, -3.0], [0.26, 0.05]])
        >>> double_rounding(weight, torch.tensor([0.1, 0.01]), bits=4, high_bits=6)
        tensor([[ 0.4000, -3.2000],
                [ 0.2400,  0.0400]])

    Reference:
        Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025, equations 1 to 3 and 13. The released code sums
        the gradient of a per-channel scale over the whole tensor; here each channel has its own, as in LSQ (Esser et
        al., 2020).
    """
    _check_bits(bits, high_bits)
    if scale_grad not in ("effective", "exact"):
        raise ValueError(f"scale_grad must be 'effective' or 'exact', got {scale_grad!r}")
    _need_floats("weight", weight)
    return _quantize(weight, scale, bits, high_bits, signed=True, exact=scale_grad == "exact")


@check_types
def fake_quantize(inputs: Tensor, scale: Tensor, *, bits: int, signed: bool = True) -> Tensor:
    """Round to the multiples of ``scale`` that ``bits`` can hold; differentiable by LSQ's straight-through rule.

    ``clip(round(x / s), Qn, Qp) * s``; gradients as in :func:`double_rounding` with ``bits == high_bits``. For
    activations N counts the whole batch, as the published code does.

    Args:
        inputs: floating point, any shape; half precision is computed in float32.
        scale: positive; one value, or one for each slice along dimension 0.
        bits: 2 to 8.
        signed: codes of both signs; otherwise from 0, for what comes out of a ReLU.

    Returns:
        The quantized values, shape and dtype of ``inputs``.

    Raises:
        ValueError: for bits out of range, a scale of another shape, or inputs that are not floating-point.

    Example:
        >>> fake_quantize(torch.tensor([0.24, 0.26, 9.0]), torch.tensor(0.1), bits=2, signed=False)
        tensor([0.2000, 0.3000, 0.3000])

    Reference:
        Esser et al., *Learned Step Size Quantization*, 2020.
    """
    code_range(bits, signed=signed)
    _need_floats("inputs", inputs)
    return _quantize(inputs, scale, bits, bits, signed=signed, exact=False)


def conv_on_quantized(
    inputs: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arguments: ConvArguments,
    *,
    bits: int,
    signed: bool,
) -> Tensor:
    """Convolve ``fake_quantize(inputs, scale)`` with ``weight``.

    In float32 nothing is kept for backward that a plain convolution would not keep: the quantized inputs are made
    again, tile by tile in the cache, instead of being stored. Under autocast and in half precision one quantized copy
    is kept.

    Args:
        inputs: ``(N, C, ...)`` with one or two spatial dimensions.
        scale: of the inputs, one value.
        weight: ready for use, quantized or not.
        bias: or None.
        arguments: stride, zero padding, dilation (tuples) and groups.
        bits: of the inputs.
        signed: of the inputs.
    """
    if _needs_composition(inputs, weight):
        convolve = F.conv1d if weight.ndim == 3 else F.conv2d
        return convolve(fake_quantize(inputs, scale, bits=bits, signed=signed), weight, bias, *arguments)
    output: Tensor = _OnQuantized.apply(inputs, scale, weight, bias, bits, signed, arguments)
    return output


def linear_on_quantized(
    inputs: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, *, bits: int, signed: bool
) -> Tensor:
    """As :func:`conv_on_quantized`, for a linear layer on inputs ``(..., C)``."""
    if _needs_composition(inputs, weight):
        return F.linear(fake_quantize(inputs, scale, bits=bits, signed=signed), weight, bias)
    output: Tensor = _OnQuantized.apply(inputs, scale, weight, bias, bits, signed, None)
    return output


def weight_scale(weight: Tensor, *, bits: int, per_channel: bool = True) -> Tensor:
    """Return a first scale for a weight: ``max(|mean - 3 std|, |mean + 3 std|) / 2^(bits - 1)``.

    Args:
        weight: output channels first.
        bits: of the highest codes.
        per_channel: one scale ``(C,)`` for each output channel; otherwise one for all, ``2 mean|W| / sqrt(Qp)``.

    Example:
        >>> weight_scale(torch.tensor([[1.0, -1.0], [3.0, 3.0]]), bits=4)
        tensor([0.5303, 0.3750])

    Reference:
        Bhalgat et al., *LSQ+*, 2020, for channels; Esser et al., *Learned Step Size Quantization*, 2020, for tensors.
    """
    weight = _in_float(weight.detach())
    if not per_channel:
        return lsq_scale(weight, bits=bits, signed=True)
    flat = weight.flatten(1)
    mean, std = flat.mean(1), flat.std(1) if flat.shape[1] > 1 else flat.new_zeros(len(flat))
    widest = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs())
    return (widest / 2.0 ** (bits - 1)).clamp_min(SMALLEST_SCALE)


def lsq_scale(values: Tensor, *, bits: int, signed: bool) -> Tensor:
    """Return LSQ's first scale, ``2 mean|x| / sqrt(Qp)``: one value.

    Example:
        >>> lsq_scale(torch.tensor([1.0, 3.0]), bits=2, signed=False)
        tensor(2.3094)
    """
    high = code_range(bits, signed=signed)[1]
    return (2 * _in_float(values.detach()).abs().mean() / math.sqrt(high)).clamp_min(SMALLEST_SCALE)


def percentile_scale(values: Tensor, *, bits: int, signed: bool) -> Tensor:
    """Return the scale that spreads the codes over all but 0.1 % of the values at each end: one value.

    Where that range is empty (nearly all values alike) the largest magnitude takes its place.

    Example:
        >>> percentile_scale(torch.arange(1001.0), bits=8, signed=False)
        tensor(3.9137)
    """
    low, high = code_range(bits, signed=signed)
    flat = _in_float(values.detach()).flatten()
    at = (round(0.001 * (flat.numel() - 1)) + 1, round(0.999 * (flat.numel() - 1)) + 1)
    width = flat.kthvalue(at[1]).values - flat.kthvalue(at[0]).values
    return torch.where(width > 0, width / (high - low), flat.abs().max() / high).clamp_min(SMALLEST_SCALE)


def smallest_scale(dtype: torch.dtype) -> float:
    """Return the least scale that a dtype can hold: float16 would round 1e-8 to 0."""
    return max(SMALLEST_SCALE, torch.finfo(dtype).tiny)


def _check_bits(bits: int, high_bits: int) -> None:
    if not 2 <= bits <= high_bits <= 8:
        raise ValueError(f"need 2 <= bits <= high_bits <= 8, got bits={bits!r}, high_bits={high_bits!r}")


def _need_floats(name: str, values: Tensor) -> None:
    if isinstance(values, Tensor) and not values.is_floating_point():  # a graph is traced without looking
        raise ValueError(f"{name} must be floating-point, got {values.dtype}; use {name}.float()")


def _in_float(values: Tensor) -> Tensor:
    """Steps in float32 or better: bfloat16 around code 127 is spaced by a half, and rounding would see nothing."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _align(scale: Tensor, values: Tensor) -> Tensor:
    """Shape a scale so that it broadcasts along dimension 0 of the values."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim != 1 or values.ndim == 0 or len(scale) != len(values):
        raise ValueError(
            f"scale must hold one value or one for each of the {values.shape[0] if values.ndim else 1} slices along "
            f"dimension 0, got shape {tuple(scale.shape)}"
        )
    return scale.view(-1, *[1] * (values.ndim - 1))


def _round_twice(u: Tensor, bits: int, high_bits: int, *, signed: bool) -> Tensor:
    """Turn ``x / s_h`` into the codes of ``bits``, as floats, in place."""
    u.round_().clamp_(*code_range(high_bits, signed=signed))
    if bits < high_bits:
        u.mul_(2.0 ** (bits - high_bits)).round_().clamp_(*code_range(bits, signed=signed))
    return u


def _gradient_factor(values: Tensor, scale: Tensor, bits: int, high_bits: int, *, signed: bool, exact: bool) -> float:
    """LSQ's ``1 / sqrt(N Qp)``, with the chain rule's power of two if asked for."""
    shared = max(values.numel() // scale.numel(), 1)
    factor = 1 / math.sqrt(shared * code_range(bits, signed=signed)[1])
    return factor * 2 ** (high_bits - bits) if exact else factor


def _quantize(inputs: Tensor, scale: Tensor, bits: int, high_bits: int, *, signed: bool, exact: bool) -> Tensor:
    working = _in_float(inputs.new_empty(0)).dtype
    aligned = _align(scale.to(working), inputs)
    if torch.compiler.is_compiling():
        return _composed(inputs.to(working), aligned, bits, high_bits, signed=signed, exact=exact).to(inputs.dtype)
    output: Tensor = _FakeQuantize.apply(inputs, aligned, bits, high_bits, signed, exact)
    return output


def _composed(values: Tensor, scale: Tensor, bits: int, high_bits: int, *, signed: bool, exact: bool) -> Tensor:
    """The same by plain operations and detached residuals: what a compiler fuses by itself, and slow without one."""
    factor = _gradient_factor(values, scale, bits, high_bits, signed=signed, exact=exact)
    step = (scale * 2.0 ** (high_bits - bits)).detach() + factor * (scale - scale.detach())
    codes = _round_twice(values.detach() / scale.detach(), bits, high_bits, signed=signed)
    low, high = code_range(bits, signed=signed)
    u = values / step
    # Not clamp: whether its gradient passes on the limits themselves depends on the version of torch.
    inside = torch.where((u >= low) & (u <= high), u, u.detach().clamp(low, high))
    straight = (inside + (inside.round() - inside).detach()) * step
    return codes * step.detach() + (straight - straight.detach())


class _FakeQuantize(Function):
    """Forward and backward by hand: it keeps its two inputs and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, scale: Tensor, bits: int, high_bits: int, signed: bool, exact: bool
    ) -> Tensor:
        ctx.save_for_backward(inputs, scale)
        ctx.arguments = bits, high_bits, signed, exact
        return _forward(_in_float(inputs), scale, bits, high_bits, signed=signed).to(inputs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scale = ctx.saved_tensors
        values, grad = _in_float(inputs), _in_float(grad)
        bits, high_bits, signed, exact = ctx.arguments
        limits = code_range(bits, signed=signed)
        grad_values, sums = torch.empty_like(values), []
        step = scale * 2.0 ** (high_bits - bits)
        for value, grad_value, upstream, part_of_step in _tiles(values, grad_values, grad, step):
            u = value / part_of_step
            _mask(upstream, u, limits, out=grad_value)
            through = _sum_of_products(grad_value, u, scale)
            sums.append(_sum_of_products(upstream, u.round_().clamp_(*limits), scale) - through)
        factor = _gradient_factor(values, scale, bits, high_bits, signed=signed, exact=exact)
        return grad_values.to(inputs.dtype), factor * _join(sums, scale), None, None, None, None


class _OnQuantized(Function):
    """A convolution (or, without its arguments, a linear layer) on fake-quantized inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bits: int,
        signed: bool,
        arguments: ConvArguments | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, scale, weight)
        ctx.arguments = bits, signed, arguments
        quantized = _forward(inputs, scale.reshape(()), bits, bits, signed=signed, output=_workspace(inputs))
        if arguments is None:
            return F.linear(quantized, weight, bias)
        return (F.conv1d if weight.ndim == 3 else F.conv2d)(quantized, weight, bias, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scale, weight = ctx.saved_tensors
        bits, signed, arguments = ctx.arguments
        needs_inputs, needs_scale, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        # <dx, x> over the quantized inputs equals <dW, W>, as the output is linear in both. The two are subtracted from
        # nearly equal sums, so this needs kernels that compute in full float32; by default CUDA's round to TF32.
        bilinear = inputs.device.type == "cpu"
        wanted = (needs_inputs or needs_scale, needs_weight or (needs_scale and bilinear), needs_bias)
        quantized = _forward(inputs, scale.reshape(()), bits, bits, signed=signed, output=_workspace(inputs))
        if arguments is None:
            grads = _linear_backward(grad, quantized, weight, wanted)
        else:
            grads = _conv_backward(grad, quantized, weight, arguments, wanted)
        grad_inputs, grad_weight, grad_bias = grads
        grad_scale = None
        if grad_inputs is not None:
            limits, step, sums = code_range(bits, signed=signed), scale.reshape(()), []
            # Nobody else has seen this tensor, so what falls outside of the range is cleared in place.
            for value, grad_value, code in _tiles(inputs, grad_inputs, inputs if bilinear else quantized):
                u = value / step
                whole = 0.0 if bilinear else _sum_of_products(grad_value, code, step) / step
                _mask(grad_value, u, limits, out=grad_value)
                sums.append(whole - _sum_of_products(grad_value, u, step))
            if needs_scale:
                total = _join(sums, step)
                if bilinear and grad_weight is not None:
                    total = total + torch.dot(grad_weight.flatten(), weight.flatten()) / step
                factor = _gradient_factor(inputs, scale, bits, bits, signed=signed, exact=False)
                grad_scale = (factor * total).view_as(scale)
        return grad_inputs, grad_scale, grad_weight, grad_bias, None, None, None


def _needs_composition(inputs: Tensor, weight: Tensor) -> bool:
    """Whether quantizer and layer stay apart: for a compiler, autocast, mixed or half dtypes, or without a batch."""
    return (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(inputs.device.type)
        or inputs.dtype != weight.dtype
        or inputs.dtype not in (torch.float32, torch.float64)
        or inputs.ndim < weight.ndim
    )


def _forward(
    values: Tensor, scale: Tensor, bits: int, high_bits: int, *, signed: bool, output: Tensor | None = None
) -> Tensor:
    output = torch.empty_like(values) if output is None else output
    step = scale * 2.0 ** (high_bits - bits)
    for value, part, part_of_scale, part_of_step in _tiles(values, output, scale, step):
        torch.div(value, part_of_scale, out=part)
        _round_twice(part, bits, high_bits, signed=signed).mul_(part_of_step)
    return output


def _workspace(like: Tensor) -> Tensor:
    """Return memory for a result that nobody keeps: on the CPU always the same, as the first use of a page is slow."""
    if like.device.type != "cpu" or not like.is_contiguous():
        return torch.empty_like(like)
    memory: dict[Any, Tensor] = vars(_WORKSPACES)
    if like.dtype not in memory or memory[like.dtype].numel() < like.numel():
        with torch.inference_mode(False):  # a tensor made under it could not be written outside
            memory[like.dtype] = torch.empty(like.numel(), dtype=like.dtype)
    return memory[like.dtype][: like.numel()].view(like.shape)


def _mask(grad: Tensor, u: Tensor, limits: tuple[int, int], *, out: Tensor) -> None:
    """Write ``grad`` where ``u`` lies within the limits, both included, else 0, in one pass."""
    number = np.float32 if u.dtype == torch.float32 else np.float64
    # The kernel leaves its limits out, so it is given the next floats beyond them.
    low = float(np.nextafter(number(limits[0]), number(-np.inf)))
    high = float(np.nextafter(number(limits[1]), number(np.inf)))
    torch.ops.aten.hardtanh_backward.grad_input(grad, u, low, high, grad_input=out)


def _conv_backward(
    grad: Tensor, inputs: Tensor, weight: Tensor, arguments: ConvArguments, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = arguments
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        grad, inputs, weight, [len(weight)], stride, padding, dilation, False, [0] * len(stride), groups, wanted
    )


def _linear_backward(
    grad: Tensor, inputs: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        grad @ weight if wanted[0] else None,
        rows.t() @ inputs.reshape(-1, inputs.shape[-1]) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )


def _sum_of_products(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Sum over all elements that share a scale."""
    if scale.ndim == 0:
        return torch.dot(a.flatten(), b.flatten())
    return (a * b).reshape(len(a), -1).sum(1)


def _join(sums: list[Tensor], scale: Tensor) -> Tensor:
    """Put the tiles' sums together, in the scale's shape."""
    return torch.stack(sums).sum() if scale.ndim == 0 else torch.cat(sums).view_as(scale)


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split along dimension 0 into pieces that stay in a core's cache while several passes go over them."""
    first = tensors[0]
    if first.device.type != "cpu" or first.ndim == 0 or first.numel() <= _TILE:
        yield tensors
        return
    rows = max(1, _TILE * len(first) // first.numel())
    count = -(-len(first) // rows)
    yield from zip(*(torch.split(t, rows) if t.ndim else [t] * count for t in tensors), strict=True)


_WORKSPACES = threading.local()  # one tensor for each thread and dtype, of the size of the largest input
_TILE = 2**18  # elements: 1 MiB of float32, and threads share it
