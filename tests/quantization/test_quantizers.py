"""Codes, fake quantization and its gradients, against closed forms and slow references."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_plugins.quantization import double_rounding, fake_quantize, quantize_codes, quantizers, switch_codes
from lightning_plugins.quantization.quantizers import (
    _composed,
    _FakeQuantize,
    code_range,
    conv_on_quantized,
    linear_on_quantized,
    lsq_scale,
    percentile_scale,
    weight_scale,
)

ALL_CODES = torch.arange(-128, 128).to(torch.int8)
SWITCHES = [(h, b) for h in range(2, 9) for b in range(2, h + 1)]
GRADIENTS = {torch.float32: {"rtol": 2e-4, "atol": 2e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(tensor: Tensor, *, needs: bool = True) -> Tensor:
    return tensor.detach().clone().requires_grad_(needs)


def lsq_loop(
    weight: Tensor, scales: list[float], upstream: Tensor, *, bits: int, signed: bool, shift: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, dW and ds of learned step size quantization, one number at a time; one scale for each row."""
    low, high = code_range(bits, signed=signed)
    output, grad = torch.empty_like(weight), torch.empty_like(weight)
    grad_scale = torch.zeros(len(scales), dtype=weight.dtype)
    for row, row_scale in enumerate(scales):
        scale = row_scale * 2**shift
        for column in range(weight.shape[1]):
            u, g = weight[row, column].item() / scale, upstream[row, column].item()
            output[row, column] = min(max(round(u), low), high) * scale  # Python rounds half to even too
            grad[row, column] = g if low <= u <= high else 0.0
            rho = low if u < low else high if u > high else round(u) - u
            grad_scale[row] += g * rho
    return output, grad, grad_scale / math.sqrt(weight.shape[1] * high)


# Integer codes


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_golden_codes_of_8_to_4_bits(dtype):
    codes = torch.tensor([-128, -120, -24, -8, -7, 7, 8, 24, 40, 119, 120, 127], dtype=dtype)
    expected = torch.tensor([-8, -8, -2, 0, 0, 0, 0, 2, 2, 7, 7, 7], dtype=torch.int8)
    switched = switch_codes(codes, high_bits=8, bits=4)
    assert switched.dtype == torch.int8
    assert torch.equal(switched, expected)


@pytest.mark.parametrize(("high_bits", "bits"), SWITCHES)
def test_the_integer_formula_is_rounding_half_to_even(high_bits, bits):
    codes = torch.arange(-(2 ** (high_bits - 1)), 2 ** (high_bits - 1)).to(torch.int8)
    rounded = torch.round(codes.double() / 2 ** (high_bits - bits)).clamp(*code_range(bits)).to(torch.int8)
    assert torch.equal(switch_codes(codes, high_bits=high_bits, bits=bits), rounded)
    low, high = code_range(bits)
    exact = [min(max(round(code / 2 ** (high_bits - bits)), low), high) for code in codes.tolist()]
    assert switch_codes(codes, high_bits=high_bits, bits=bits).tolist() == exact


@pytest.mark.parametrize(("high_bits", "bits"), SWITCHES)
def test_quantize_then_switch_is_quantize(high_bits, bits):
    weight = torch.cat((draw(2000, dtype=torch.float32), torch.arange(-300.0, 300.0) * 0.01))
    scale = torch.tensor(0.02)
    high = quantize_codes(weight, scale, bits=high_bits, high_bits=high_bits)
    low = quantize_codes(weight, scale, bits=bits, high_bits=high_bits)
    assert torch.equal(switch_codes(high, high_bits=high_bits, bits=bits), low)


@pytest.mark.parametrize(("high_bits", "bits"), SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_training_and_codes_are_one_network(high_bits, bits, dtype):
    weight, scale = draw(4, 100).to(dtype), torch.tensor([0.5, 0.02, 0.013, 0.1]).to(dtype)
    codes = quantize_codes(weight, scale, bits=bits, high_bits=high_bits)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    expected = codes.to(working) * (scale.to(working) * 2 ** (high_bits - bits)).view(-1, 1)
    assert torch.equal(double_rounding(weight, scale, bits=bits, high_bits=high_bits), expected.to(dtype))


def test_switching_is_not_transitive():
    by_way_of_4 = switch_codes(switch_codes(ALL_CODES, high_bits=8, bits=4), high_bits=4, bits=2)
    assert (by_way_of_4 != switch_codes(ALL_CODES, high_bits=8, bits=2)).sum() == 24


def test_switching_leaves_the_stored_codes_alone():
    stored = ALL_CODES.clone()
    first = switch_codes(stored, high_bits=8, bits=2)
    for bits in (8, 4, 6, 3):
        switch_codes(stored, high_bits=8, bits=bits)
    assert torch.equal(stored, ALL_CODES)
    assert torch.equal(switch_codes(stored, high_bits=8, bits=2), first)


def test_a_quarter_of_the_switches_to_6_bits_are_ties():
    ties = (ALL_CODES.double() / 4 % 1).abs() == 0.5
    assert ties.double().mean() == 0.25
    half_up = ((ALL_CODES.int() + 2) >> 2).clamp(-32, 31)
    assert (half_up != switch_codes(ALL_CODES, high_bits=8, bits=6)).double().mean() == pytest.approx(0.125, abs=0.005)


@given(
    values=st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=50),
    scale=st.floats(1e-3, 1.0),
    switch=st.sampled_from(SWITCHES),
)
@settings(max_examples=200, deadline=None)
def test_inside_the_range_the_error_is_bounded(values, scale, switch):
    high_bits, bits = switch
    shift = high_bits - bits
    weight = torch.tensor(values, dtype=torch.float64) * scale * 2 ** (high_bits - 1)  # u in [-1, 1] of the range
    quantized = double_rounding(weight, torch.tensor(scale, dtype=torch.float64), bits=bits, high_bits=high_bits)
    step = scale * 2**shift
    low, high = code_range(bits)
    inside = (weight / step >= low) & (weight / step <= high)
    error = (quantized - weight).abs()[inside]
    assert (error <= step * (0.5 + 2.0 ** (-shift - 1)) * (1 + 1e-12)).all()


@given(switch=st.sampled_from(SWITCHES), scale=st.floats(1e-3, 10.0), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_quantizing_twice_changes_nothing_and_order_is_kept(switch, scale, seed):
    high_bits, bits = switch
    weight = draw(64, seed=seed).sort().values * scale * 2 ** (high_bits - 2)
    arguments: dict[str, Any] = {"bits": bits, "high_bits": high_bits}
    codes = quantize_codes(weight, torch.tensor(scale, dtype=torch.float64), **arguments)
    assert (codes.diff() >= 0).all()
    once = double_rounding(weight, torch.tensor(scale, dtype=torch.float64), **arguments)
    again = quantize_codes(once, torch.tensor(scale, dtype=torch.float64), **arguments)
    assert torch.equal(again, codes)


def test_wrong_arguments_say_what_to_do():
    weight, scale = torch.ones(2, 3), torch.tensor(0.1)
    for bits, high_bits in ((1, 8), (9, 9), (6, 4), (0, 8)):
        with pytest.raises(ValueError, match="need 2 <= bits <= high_bits <= 8"):
            quantize_codes(weight, scale, bits=bits, high_bits=high_bits)
        with pytest.raises(ValueError, match="need 2 <= bits <= high_bits <= 8"):
            double_rounding(weight, scale, bits=bits, high_bits=high_bits)
        with pytest.raises(ValueError, match="need 2 <= bits <= high_bits <= 8"):
            switch_codes(ALL_CODES, bits=bits, high_bits=high_bits)
    with pytest.raises(TypeError, match="quantize_codes makes them from weights"):
        switch_codes(weight, high_bits=8, bits=4)
    with pytest.raises(ValueError, match="scale_grad must be 'effective' or 'exact'"):
        double_rounding(weight, scale, bits=4, scale_grad="paper")
    with pytest.raises(ValueError, match=r"bits must lie in 2\.\.8"):
        fake_quantize(weight, scale, bits=32)
    for wrong in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match="one value or one for each of the 2 slices"):
            double_rounding(weight, wrong, bits=4)


def test_a_weight_that_is_no_number_gets_no_code():
    with pytest.raises(ValueError, match="finite"):
        quantize_codes(torch.tensor([float("nan"), 1.0]), torch.tensor(0.1), bits=8)


# First scales


def test_first_scales_have_closed_forms():
    weight = draw(5, 40, dtype=torch.float32) + 0.3
    mean, std = weight.double().mean(1), weight.double().std(1)
    by_channel = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 128
    torch.testing.assert_close(weight_scale(weight, bits=8).double(), by_channel, rtol=1e-5, atol=0)
    whole = 2 * weight.double().abs().mean() / math.sqrt(127)
    torch.testing.assert_close(weight_scale(weight, bits=8, per_channel=False).double(), whole, rtol=1e-5, atol=0)
    assert lsq_scale(weight, bits=8, signed=True).item() == pytest.approx(whole.item(), rel=1e-5)
    assert weight_scale(torch.zeros(2, 3), bits=4).tolist() == [pytest.approx(1e-8)] * 2  # never 0
    assert weight_scale(torch.ones(2, 1), bits=4).tolist() == [0.125, 0.125]  # one value has no deviation


@pytest.mark.parametrize(("bits", "signed"), list(product((2, 4, 8), (True, False))))
def test_percentiles_are_those_of_numpy(bits, signed):
    values = draw(3, 1001, dtype=torch.float32).flatten()[:2001]  # 0.001 and 0.999 fall on values
    low, high = np.quantile(values.numpy(), (0.001, 0.999))
    expected = (high - low) / (2**bits - 1)
    assert percentile_scale(values[torch.randperm(2001)], bits=bits, signed=signed).item() == pytest.approx(expected)


def test_percentiles_of_few_different_values_fall_back_on_the_largest():
    mostly_zero = torch.zeros(10_000)
    mostly_zero[3] = 6.0
    assert percentile_scale(mostly_zero, bits=2, signed=False).item() == 2.0
    assert percentile_scale(torch.tensor([-3.0]), bits=3, signed=True).item() == 1.0


# Gradients


@pytest.mark.parametrize(("bits", "signed"), list(product((2, 3, 4, 8), (True, False))))
def test_fake_quantize_is_lsq(bits, signed):
    values, upstream = 2 * draw(3, 50), draw(3, 50, seed=1)
    scales = [0.9 / 2**bits, 5.0 / 2**bits, 2.0 / 2**bits]
    x, s = leaf(values), leaf(torch.tensor(scales, dtype=torch.float64))
    output = fake_quantize(x, s, bits=bits, signed=signed)
    output.backward(upstream)
    expected = lsq_loop(values, scales, upstream, bits=bits, signed=signed)
    for found, reference in zip((output.detach(), x.grad, s.grad), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-13)
    alone = leaf(torch.tensor(scales[2], dtype=torch.float64))
    fake_quantize(values, alone, bits=bits, signed=signed).backward(upstream)
    _, _, flat = lsq_loop(values.reshape(1, -1), scales[2:], upstream.reshape(1, -1), bits=bits, signed=signed)
    torch.testing.assert_close(alone.grad, flat[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("high_bits", range(2, 9))
@pytest.mark.parametrize("scale_grad", ["effective", "exact"])
def test_at_the_highest_bits_double_rounding_is_lsq(high_bits, scale_grad):
    values, upstream, scales = draw(3, 40), draw(3, 40, seed=1), [0.5, 1.5 / 2**high_bits, 6.0 / 2**high_bits]
    w, s = leaf(values), leaf(torch.tensor(scales, dtype=torch.float64))
    output = double_rounding(w, s, bits=high_bits, high_bits=high_bits, scale_grad=scale_grad)
    output.backward(upstream)
    expected = lsq_loop(values, scales, upstream, bits=high_bits, signed=True)
    for found, reference in zip((output.detach(), w.grad, s.grad), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("high_bits", "bits"), [(8, 6), (8, 4), (8, 2), (6, 3), (4, 2)])
def test_at_lower_bits_the_gradient_is_that_of_a_single_rounding(high_bits, bits):
    shift = high_bits - bits
    values, upstream, scales = draw(3, 40), draw(3, 40, seed=1), [0.02, 1.5 / 2**high_bits, 6.0 / 2**high_bits]
    _, grad, grad_scale = lsq_loop(values, scales, upstream, bits=bits, signed=True, shift=shift)
    for scale_grad, factor in (("effective", 1), ("exact", 2**shift)):
        w, s = leaf(values), leaf(torch.tensor(scales, dtype=torch.float64))
        double_rounding(w, s, bits=bits, high_bits=high_bits, scale_grad=scale_grad).backward(upstream)
        torch.testing.assert_close(w.grad, grad, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(s.grad, factor * grad_scale, rtol=1e-12, atol=1e-13)


class FrozenRounding(torch.autograd.Function):
    """``clip(u)`` plus a residual that stays what it was at the base point; the quantizer gives the gradient."""

    @staticmethod
    def forward(ctx, weight, scale, residual, bits, high_bits):
        ctx.save_for_backward(weight, scale)
        ctx.arguments = bits, high_bits
        step = scale.view(-1, *[1] * (weight.ndim - 1)) * 2 ** (high_bits - bits)
        return ((weight / step).clamp(*code_range(bits)) + residual) * step

    @staticmethod
    def backward(ctx, upstream):
        bits, high_bits = ctx.arguments
        weight, scale = map(leaf, ctx.saved_tensors)
        with torch.enable_grad():
            quantized = double_rounding(weight, scale, bits=bits, high_bits=high_bits, scale_grad="exact")
        grad_weight, grad_scale = torch.autograd.grad(quantized, (weight, scale), upstream)
        lsq_factor = 1 / math.sqrt(weight.numel() // scale.numel() * code_range(bits)[1])
        return grad_weight, grad_scale / lsq_factor, None, None, None


@pytest.mark.parametrize(("high_bits", "bits"), [(8, 8), (8, 4), (8, 2), (6, 4), (4, 4), (3, 2)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients_by_finite_differences_of_a_frozen_rounding(high_bits, bits, per_channel):
    weight = draw(3, 2, 5, seed=high_bits)
    scale = torch.tensor([0.9, 1.7, 4.0] if per_channel else [1.7], dtype=torch.float64) / 2 ** (high_bits - 1)
    u = weight / (scale.view(-1, 1, 1) * 2 ** (high_bits - bits))
    low, high = code_range(bits)
    # Not on a boundary of the range, where there is no derivative.
    assert min((u - low).abs().min(), (u - high).abs().min()) > 1e-3
    assert ((u < low) | (u > high)).any()
    assert ((u > low) & (u < high)).any()
    residual = u.clamp(low, high).round() - u.clamp(low, high)
    assert torch.autograd.gradcheck(
        lambda w, s: FrozenRounding.apply(w, s, residual, bits, high_bits), (leaf(weight), leaf(scale))
    )


@pytest.mark.parametrize(("high_bits", "bits"), SWITCHES)
def test_exact_is_effective_times_the_power_of_two(high_bits, bits):
    grads = {}
    for scale_grad in ("effective", "exact"):
        w, s = leaf(draw(3, 30)), leaf(torch.tensor([0.01, 0.02, 0.5], dtype=torch.float64))
        output = double_rounding(w, s, bits=bits, high_bits=high_bits, scale_grad=scale_grad)
        output.backward(draw(3, 30, seed=1))
        grads[scale_grad] = output.detach(), w.grad, s.grad
    assert torch.equal(grads["effective"][0], grads["exact"][0])
    assert torch.equal(grads["effective"][1], grads["exact"][1])
    assert torch.equal(grads["effective"][2], grads["exact"][2] / 2 ** (high_bits - bits))


@pytest.mark.parametrize(("high_bits", "bits"), [(8, 8), (8, 4), (8, 2)])
def test_each_channel_has_its_own_scale_gradient(high_bits, bits):
    weight, scale, upstream = draw(4, 3, 3, 3), torch.full((4,), 0.02, dtype=torch.float64), draw(4, 3, 3, 3, seed=1)

    def gradient(g: Tensor) -> Tensor:
        s = leaf(scale)
        double_rounding(weight, s, bits=bits, high_bits=high_bits).backward(g)
        return s.grad

    first, second = gradient(upstream), gradient(upstream + torch.eye(4)[2].double().view(4, 1, 1, 1))
    assert torch.equal(first[[0, 1, 3]], second[[0, 1, 3]])
    assert first[2] != second[2]
    assert first.unique().numel() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bits", "signed"), list(product((2, 4, 8), (True, False))))
@pytest.mark.parametrize("way", ["fake_quantize", "linear", "conv", "composed"])
def test_range_limits_belong_to_the_range_and_the_next_floats_do_not(dtype, bits, signed, way):
    number = np.float32 if dtype == torch.float32 else np.float64
    low, high = (number(limit) for limit in code_range(bits, signed=signed))
    points = [low, np.nextafter(low, number(-np.inf)), high, np.nextafter(high, number(np.inf))]
    x, one = leaf(torch.tensor(np.array(points))), torch.ones((), dtype=dtype)
    if way == "fake_quantize":
        output = fake_quantize(x, one, bits=bits, signed=signed)
    elif way == "linear":
        output = linear_on_quantized(x.view(4, 1), one, torch.ones(1, 1, dtype=dtype), None, bits=bits, signed=signed)
    elif way == "conv":
        arguments = (1,), (0,), (1,), 1
        weight = torch.ones(1, 1, 1, dtype=dtype)
        output = conv_on_quantized(x.view(1, 1, 4), one, weight, None, arguments, bits=bits, signed=signed)
    else:
        output = _composed(x, one, bits, bits, signed=signed, exact=False)
    output.sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_the_limits_of_the_weights_gradient_are_those_of_the_lower_bits(bits):
    low, high = (limit * 2.0 ** (8 - bits) for limit in code_range(bits))
    points = [low, np.nextafter(low, -np.inf), high, np.nextafter(high, np.inf)]
    w = leaf(torch.tensor(points, dtype=torch.float64))
    double_rounding(w, torch.ones((), dtype=torch.float64), bits=bits).sum().backward()
    assert w.grad.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_second_derivative_is_refused():
    x, s = leaf(draw(5)), leaf(torch.tensor(0.1, dtype=torch.float64))
    (grad,) = torch.autograd.grad(fake_quantize(x, s, bits=4).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
    weight = leaf(draw(2, 5))
    output = linear_on_quantized(x, s, weight, None, bits=4, signed=True)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


# The function by hand against plain operations

INPUTS = {
    "0-d": lambda: draw()[()],
    "1-d": lambda: draw(7),
    "2-d": lambda: draw(40, 11),
    "3-d": lambda: draw(6, 5, 9),
    "4-d": lambda: draw(8, 6, 5, 4),
    "channels last": lambda: draw(8, 6, 5, 4).contiguous(memory_format=torch.channels_last),
    "after a ReLU": lambda: draw(9, 30).relu(),  # 0 is a limit of the unsigned range
    "transposed": lambda: draw(11, 40).t(),
    "strided": lambda: draw(20, 22)[::2, ::3],
    "expanded": lambda: draw(1, 30).expand(9, 30),
    "empty batch": lambda: draw(0, 6, 5, 4),
    "empty slices": lambda: draw(3, 0),
    "one row": lambda: draw(1, 300),
}


@pytest.mark.parametrize("tile", [2**18, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("upstream", ["dense", "channels last", "expanded", "strided"])
@pytest.mark.parametrize("name", INPUTS)
def test_by_hand_equals_plain_operations(monkeypatch, name, dtype, upstream, tile):
    monkeypatch.setattr(quantizers, "_TILE", tile)
    values = INPUTS[name]().to(dtype)
    grad = draw(*values.shape, seed=5).to(dtype) if values.ndim else draw(1, seed=5)[0].to(dtype)
    if upstream == "expanded":
        grad = torch.tensor(0.7, dtype=dtype).expand_as(values)
    elif upstream == "strided" and values.ndim:
        grad = draw(*values.shape, 2, seed=5).to(dtype)[..., 1]
    elif upstream == "channels last" and values.ndim == 4:
        grad = grad.contiguous(memory_format=torch.channels_last)
    scales = [torch.tensor(0.11, dtype=dtype), torch.tensor([0.11], dtype=dtype)]
    if values.ndim and len(values):
        scales.append(0.05 + draw(len(values), seed=6).abs().to(dtype) / 10)
    for scale, (bits, high_bits, signed, exact) in product(scales, [(4, 8, True, True), (3, 3, False, False)]):
        found = []
        for quantize in (_FakeQuantize.apply, None):
            x, s = leaf(values) if name != "expanded" else values.detach().requires_grad_(), leaf(scale)
            aligned = quantizers._align(s, x)
            if quantize is None:
                output = _composed(x, aligned, bits, high_bits, signed=signed, exact=exact)
            else:
                output = quantize(x, aligned, bits, high_bits, signed, exact)
            found.append((output.detach(), *torch.autograd.grad(output, (x, s), grad)))
        (by_hand, grad_x, grad_s), (composed, plain_x, plain_s) = found
        assert torch.equal(by_hand, composed)
        torch.testing.assert_close(grad_x, plain_x)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
        torch.testing.assert_close(grad_s, plain_s, **tolerance)


def test_the_default_tile_cuts_what_is_larger():
    values = draw(3, 2**17, dtype=torch.float32)
    assert values.numel() > quantizers._TILE
    assert len(list(quantizers._tiles(values))) == 2
    x, s = leaf(values), leaf(torch.tensor([0.01, 0.02, 0.03]))
    y, t = leaf(values), leaf(torch.tensor([0.01, 0.02, 0.03]))
    double_rounding(x, s, bits=4).square().sum().backward()
    _composed(y, t.view(3, 1), 4, 8, signed=True, exact=False).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(s.grad, t.grad, rtol=1e-4, atol=1e-4)


def test_inputs_are_never_written():
    values, scale, grad = draw(9, 30), torch.tensor(0.1, dtype=torch.float64), draw(9, 4, seed=2)
    x, s, upstream, weight = leaf(values), leaf(scale), grad.clone(), leaf(draw(4, 30))
    linear_on_quantized(x, s, weight, None, bits=4, signed=True).backward(upstream)
    fake_quantize(x, s, bits=4).backward(draw(9, 30))
    assert torch.equal(x, values)
    assert torch.equal(s, scale)
    assert torch.equal(upstream, grad)


def test_half_precision_is_computed_in_float32():
    values, scale = draw(50, 40, dtype=torch.float32) * 0.5, torch.tensor(0.011)
    for dtype in (torch.bfloat16, torch.float16):
        x, s, rounded = leaf(values.to(dtype)), leaf(scale), values.to(dtype).float()
        output = fake_quantize(x, s, bits=8)
        assert output.dtype == dtype
        assert torch.equal(output, fake_quantize(rounded, scale, bits=8).to(dtype))
        output.backward(torch.ones_like(output))
        assert x.grad.dtype == dtype
        assert s.grad.dtype == torch.float32
        reference = leaf(scale)
        fake_quantize(rounded, reference, bits=8).sum().backward()
        torch.testing.assert_close(s.grad, reference.grad)


# Layers on quantized inputs against quantizer and layer apart

CONVOLUTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({"padding": 1}, (3, 4, 9, 8)),
    "no padding": ({}, (3, 4, 9, 8)),
    "stride": ({"stride": 2, "padding": 1}, (3, 4, 9, 8)),
    "uneven strides": ({"stride": (2, 3), "padding": (0, 2)}, (3, 4, 9, 8)),
    "dilation": ({"dilation": 2, "padding": 2}, (3, 4, 9, 8)),
    "grouped": ({"groups": 2, "padding": 1}, (3, 4, 9, 8)),
    "depthwise": ({"groups": 4, "padding": 1}, (3, 4, 9, 8)),
    "1-d": ({"padding": 1}, (3, 4, 9)),
    "1-d grouped with stride and dilation": ({"groups": 2, "stride": 2, "dilation": 2}, (3, 4, 9)),
    "empty batch": ({"padding": 1}, (0, 4, 9, 8)),
    "one image": ({"padding": 1}, (4, 9, 8)),
    "one series": ({"padding": 1}, (4, 9)),
}


def as_tuple(value: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * n


def both_ways(fused: Any, apart: Any, tensors: tuple[Tensor, ...], needs: tuple[bool, ...], dtype: torch.dtype) -> None:
    found = []
    for compute in (fused, apart):
        leaves = [leaf(tensor, needs=need) for tensor, need in zip(tensors, needs, strict=True)]
        output = compute(*leaves)
        if output.requires_grad:
            output.backward(draw(*output.shape, seed=9).to(dtype))
        found.append((output.detach(), [tensor.grad for tensor in leaves]))
    (output, grads), (expected, expected_grads) = found
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-12)
    for need, grad, expected_grad in zip(needs, grads, expected_grads, strict=True):
        assert (grad is not None) == need
        if need:
            torch.testing.assert_close(grad, expected_grad, **GRADIENTS[dtype])


NEEDS = [(True,) * 4, (False, True, True, True), (True, False, True, True), (True, True, False, True)] + [
    (False, True, False, False),
    (True, False, False, False),
    (False, False, True, False),
    (False, False, False, True),
    (False,) * 4,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [2**18, 40])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_on_quantized_inputs(monkeypatch, name, tile, dtype):
    monkeypatch.setattr(quantizers, "_TILE", tile)
    arguments, shape = CONVOLUTIONS[name]
    n = 1 if "1-d" in name or "series" in name else 2
    groups = arguments.get("groups", 1)
    stride, padding, dilation = (
        as_tuple(arguments.get(key, default), n) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    weight, convolve = draw(8, 4 // groups, *(3,) * n, seed=1), F.conv1d if n == 1 else F.conv2d
    tensors = tuple(t.to(dtype) for t in (draw(*shape), torch.tensor(0.21), weight, draw(8, seed=2)))
    for bits, signed in ((4, True), (3, False)):
        both_ways(
            lambda x, s, w, b, bits=bits, signed=signed: conv_on_quantized(
                x, s, w, b, (stride, padding, dilation, groups), bits=bits, signed=signed
            ),
            lambda x, s, w, b, bits=bits, signed=signed: convolve(
                fake_quantize(x, s, bits=bits, signed=signed), w, b, stride, padding, dilation, groups
            ),
            tensors,
            (True,) * 4,
            dtype,
        )


@pytest.mark.parametrize("layout", ["channels last", "strided", "expanded"])
def test_convolution_on_inputs_of_other_layouts(layout):
    x = draw(3, 4, 9, 8)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = draw(6, 4, 9, 16)[::2, :, :, ::2]
    else:
        x = draw(1, 4, 9, 8).expand(3, -1, -1, -1)
    weight, s, t = draw(8, 4, 3, 3, seed=1), leaf(torch.tensor(0.2).double()), leaf(torch.tensor(0.2).double())
    first, second = x.detach().requires_grad_(), x.detach().requires_grad_()
    found = conv_on_quantized(first, s, weight, None, ((1, 1), (1, 1), (1, 1), 1), bits=4, signed=True)
    expected = F.conv2d(fake_quantize(second, t, bits=4), weight, None, 1, 1)
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.sum().backward()  # an expanded gradient
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(s.grad, t.grad)


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_only_what_is_asked_for_gets_a_gradient(kind, needs):
    arguments = (1,), (1,), (1,), 1
    if kind == "conv":
        tensors = draw(2, 4, 7), torch.tensor(0.21).double(), draw(8, 4, 3, seed=1), draw(8, seed=2)
        both_ways(
            lambda x, s, w, b: conv_on_quantized(x, s, w, b, arguments, bits=3, signed=True),
            lambda x, s, w, b: F.conv1d(fake_quantize(x, s, bits=3), w, b, *arguments),
            tensors,
            needs,
            torch.float64,
        )
    else:
        tensors = draw(2, 4, 7), torch.tensor(0.21).double(), draw(8, 7, seed=1), draw(8, seed=2)
        both_ways(
            lambda x, s, w, b: linear_on_quantized(x, s, w, b, bits=3, signed=True),
            lambda x, s, w, b: F.linear(fake_quantize(x, s, bits=3), w, b),
            tensors,
            needs,
            torch.float64,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [2**18, 20])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7), (2, 3, 5, 7), (0, 7), (3, 0, 7)])
def test_linear_layer_on_quantized_inputs(monkeypatch, shape, tile, dtype):
    monkeypatch.setattr(quantizers, "_TILE", tile)
    tensors = tuple(t.to(dtype) for t in (draw(*shape), torch.tensor([0.21]), draw(4, 7, seed=1), draw(4, seed=2)))
    both_ways(
        lambda x, s, w, b: linear_on_quantized(x, s, w, b, bits=3, signed=True),
        lambda x, s, w, b: F.linear(fake_quantize(x, s, bits=3), w, b),
        tensors,
        (True,) * 4,
        dtype,
    )


def test_the_scale_gradient_of_a_layer_is_as_good_as_that_of_the_quantizer():
    # <dx, round(u) - u> as the difference of two large sums must not cost what float32 can give.
    x, weight = draw(16, 16, 16, 16, dtype=torch.float32).relu(), 0.06 * draw(16, 16, 3, 3, seed=1, dtype=torch.float32)
    upstream = draw(16, 16, 16, 16, seed=2, dtype=torch.float32) + draw(16, 1, 1, seed=3, dtype=torch.float32)
    scale, arguments = torch.tensor(3.0 / 255), ((1, 1), (1, 1), (1, 1), 1)
    exact, fused = leaf(scale.double()), leaf(scale)
    # In float32 too the exact one rounds what float32 rounds.
    quantized = fake_quantize(leaf(x), scale, bits=8, signed=False).double()
    rho = quantized / scale.double() - (x.double() / scale.double()).clamp(max=255)
    outside = x.double() / scale.double() > 255
    rho[outside] = 255
    (grad,) = torch.autograd.grad(
        F.conv2d(y := leaf(quantized), weight.double(), None, *arguments), y, upstream.double()
    )
    exact = (grad * rho).sum() / math.sqrt(x.numel() * 255)
    conv_on_quantized(leaf(x), fused, weight, None, arguments, bits=8, signed=False).backward(upstream)
    assert fused.grad.item() == pytest.approx(exact.item(), rel=2e-3)


def test_a_layer_keeps_no_more_than_its_inputs():
    x, s, weight = leaf(draw(8, 4, 9, 9)), leaf(torch.tensor(0.2).double()), leaf(draw(8, 4, 3, 3))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        conv_on_quantized(x, s, weight, None, ((1, 1), (1, 1), (1, 1), 1), bits=4, signed=True)
        fake_quantize(x, s, bits=4)
    mine = {tensor.untyped_storage().data_ptr() for tensor in (x, s, weight)}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == mine


def test_half_precision_inputs_are_kept_as_they_are():
    x = leaf(draw(8, 4, 9, 9, dtype=torch.bfloat16))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize(x, leaf(torch.tensor(0.2)), bits=4)
    assert sum(tensor.nbytes for tensor in kept if tensor.numel() > 1) <= x.nbytes


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_autocast_leaves_the_codes_alone(kind):
    x, s = leaf(draw(8, 16, 6, 6, dtype=torch.float32)), leaf(torch.tensor(3 / 128))
    weight = leaf(draw(8, 16, 3, 3, dtype=torch.float32) if kind == "conv" else draw(8, 6, dtype=torch.float32))
    step = torch.tensor(0.03)
    with torch.autocast("cpu", torch.bfloat16):
        w = double_rounding(weight, step, bits=4)
        assert torch.equal(w, quantize_codes(weight, step, bits=4) * (step * 16))
        if kind == "conv":
            output = conv_on_quantized(x, s, w, None, ((1, 1), (0, 0), (1, 1), 1), bits=8, signed=True)
            expected = F.conv2d(quantize_codes(x, s, bits=8) * s, w)
        else:
            output = linear_on_quantized(x, s, w, None, bits=8, signed=True)
            expected = F.linear(quantize_codes(x, s, bits=8) * s, w)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    output.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in (x, s, weight))
