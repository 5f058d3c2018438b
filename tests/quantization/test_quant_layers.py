"""Quantized layers, input quantizers and batch normalisation per precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.models import resnet20
from lightning_plugins.quantization import (
    InputQuantizer,
    MultiPrecisionBatchNorm,
    ResidualQuantizer,
    clamp_scales_,
    convert_,
    double_rounding,
    fake_quantize,
    quantize_codes,
    quantized_layers,
    switch_,
    switch_codes,
)
from lightning_plugins.quantization.quantizers import lsq_scale, percentile_scale, weight_scale


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one_layer(layer: nn.Module, **arguments: Any) -> Any:
    return convert_(layer, **({"bits": (8, 4, 2), "first_last_bits": 8, "depthwise_bits": 2} | arguments))


def every_bit(layer: nn.Module, bits: tuple[int, ...] = (8, 4, 2), **arguments: Any) -> Any:
    """The layer at all bits; first and last are no exception."""
    return convert_(layer, bits, first_last_bits=min(bits), depthwise_bits=min(bits), **arguments)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "linear on one vector": (lambda: nn.Linear(6, 5), (6,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 7)),
    "stride and dilation": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), dilation=2, padding=(1, 2)), (2, 4, 8, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 8, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 8, 7)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 8, 7)),
    "same with even kernels": (lambda: nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3)), (2, 4, 8, 7)),
    "same with uneven kernels": (lambda: nn.Conv2d(4, 6, (5, 3), padding="same"), (2, 4, 8, 7)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 8, 7)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 8, 7)),
    "replicate": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 8, 7)),
    "circular same": (lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"), (2, 4, 8, 7)),
    "one image": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 8, 7)),
    "1-d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "1-d same with even kernel": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 9)),
    "1-d depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4, stride=2), (2, 4, 9)),
    "1-d replicate": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 9)),
    "1-d one series": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "empty batch": (lambda: nn.Conv2d(4, 6, 3, padding=1), (0, 4, 8, 7)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_fp32_layer_between_quantizers(name, bits, dtype):
    make, shape = LAYERS[name]
    plain = make().to(dtype)
    layer = every_bit(copy.deepcopy(plain))
    layer.train()(draw(16, *shape[1:], dtype=dtype) if shape[0] == 0 else draw(*shape, dtype=dtype))  # the 8-bit scale
    switch_(layer, bits)
    x, y = draw(*shape, dtype=dtype).requires_grad_(), draw(*shape, dtype=dtype).requires_grad_()
    if shape[0] == 0:
        layer(draw(16, *shape[1:], dtype=dtype))
    found = layer(x)
    input_scale = layer.input_quantizer.scales[str(bits)]
    s, t = (p.detach().clone().requires_grad_() for p in (input_scale, layer.weight_scale))
    weight = double_rounding(plain.weight, t, bits=bits)
    quantized = fake_quantize(y, s, bits=bits, signed=True)
    if isinstance(plain, nn.Linear):
        expected = F.linear(quantized, weight, plain.bias)
    else:
        expected = plain._conv_forward(quantized, weight, plain.bias)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **close)
    upstream = draw(*found.shape, seed=3, dtype=dtype)
    layer.zero_grad()
    found.backward(upstream)
    expected.backward(upstream)
    for one, other in ((x.grad, y.grad), (layer.weight.grad, plain.weight.grad), (layer.weight_scale.grad, t.grad)):
        torch.testing.assert_close(one, other, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=close["atol"])
    if plain.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **close)
    # Padding that is done before quantization adds to the count in LSQ's 1 / sqrt(N Qp).
    if getattr(plain, "padding_mode", "zeros") == "zeros" and "even" not in name:
        torch.testing.assert_close(input_scale.grad, s.grad, rtol=1e-3, atol=close["atol"])


@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_follow_from_weight_and_scale(per_channel):
    layer = every_bit(nn.Conv2d(3, 4, 3), per_channel=per_channel)
    assert layer.weight_scale.shape == ((4,) if per_channel else ())
    assert torch.equal(layer.weight_scale, weight_scale(layer.weight, bits=8, per_channel=per_channel))
    high = layer.weight_codes(8)
    for bits in (8, 4, 2):
        switch_(layer, bits)
        assert torch.equal(layer.weight_codes(), quantize_codes(layer.weight, layer.weight_scale, bits=bits))
        assert torch.equal(layer.weight_codes(), switch_codes(high, high_bits=8, bits=bits))
        scale = layer.weight_scale.view(-1, 1, 1, 1) if per_channel else layer.weight_scale
        assert torch.equal(layer.quantized_weight(), layer.weight_codes() * (scale * 2 ** (8 - bits)))


@pytest.mark.parametrize("per_channel", [True, False])
def test_without_its_weights_a_layer_switches_from_the_highest_codes(per_channel):
    layer = every_bit(nn.Conv2d(3, 4, 3), per_channel=per_channel).train()
    x, outputs = draw(2, 3, 6, 6), {}
    for bits in (8, 4, 2):
        layer.train()(x) if switch_(layer, bits) else None
        outputs[bits] = layer(x).detach(), layer.weight_codes()
    layer.keep_only_codes_(layer.weight_codes(8))
    assert "weight" not in dict(layer.named_parameters())
    assert layer.codes.dtype == torch.int8
    for bits in (8, 4, 8, 2, 4):
        switch_(layer, bits)
        assert torch.equal(layer.weight_codes(), outputs[bits][1])
        assert torch.equal(layer(x), outputs[bits][0])


def test_32_bits_is_the_plain_layer():
    plain = nn.Linear(5, 4)
    layer = every_bit(copy.deepcopy(plain), (32, 8, 2)).train()
    x = draw(3, 5)
    assert torch.equal(layer(x), plain(x))
    assert not layer.input_quantizer.is_ready(8)
    switch_(layer, 2)
    assert not torch.equal(layer(x), plain(x))
    switch_(layer, 32)
    assert torch.equal(layer(x), plain(x))
    assert "32" not in layer.input_quantizer.scales


def test_it_says_what_it_is():
    layer = every_bit(nn.Conv2d(3, 4, 3, bias=False), (4, 8))
    assert repr(layer).startswith("QuantConv2d(\n  3, 4, kernel_size=(3, 3), stride=(1, 1), bias=False, bits=(8, 4)")
    assert "num_bits=8" in repr(layer)
    assert "InputQuantizer(\n    bits=(8, 4)" in repr(layer)


# Input quantizers


@pytest.mark.parametrize(("init", "measure"), [("percentile", percentile_scale), ("lsq", lsq_scale)])
@pytest.mark.parametrize("signed", [True, False])
def test_scales_start_from_the_first_training_batch_of_their_precision(init, measure, signed):
    quantizer = InputQuantizer((8, 4, 2), init=init)
    batches = [draw(64, 9, seed=n) if signed else draw(64, 9, seed=n).abs() for n in range(4)]
    output = quantizer(batches[0], bits=4)
    first = measure(batches[0], bits=4, signed=signed)
    assert torch.equal(quantizer.scales["4"], first)
    assert torch.equal(output, fake_quantize(batches[0], first, bits=4, signed=signed))
    assert quantizer.ready.tolist() == [False, True, False]
    assert [quantizer.is_ready(b) for b in (8, 4, 2)] == [False, True, False]
    assert bool(quantizer.signed) == signed
    assert quantizer.scales["8"] == quantizer.scales["2"] == 1
    quantizer(batches[1], bits=4)
    assert torch.equal(quantizer.scales["4"], first)
    quantizer(batches[2], bits=2)
    assert torch.equal(quantizer.scales["2"], measure(batches[2], bits=2, signed=signed))
    assert quantizer.ready.tolist() == [False, True, True]


def test_the_first_batch_decides_on_the_sign_for_all_precisions():
    positive, negative = draw(50).abs(), -draw(50).abs()
    quantizer = InputQuantizer((8, 4))
    quantizer(positive, bits=8)
    assert (quantizer(negative, bits=4) == 0).all()
    assert not quantizer.signed
    quantizer = InputQuantizer((8, 4))
    quantizer(negative, bits=8)
    quantizer(positive, bits=4)
    assert quantizer.signed
    assert torch.equal(quantizer.scales["4"], percentile_scale(positive, bits=4, signed=True))


def test_a_batch_of_zeros_decides_nothing():
    quantizer = InputQuantizer((8, 4))
    assert (quantizer(torch.zeros(5, 3), bits=8) == 0).all()
    assert not quantizer.ready.any()
    assert not quantizer.is_ready(8)
    quantizer(draw(5, 3), bits=8)
    assert quantizer.is_ready(8)
    assert quantizer.signed


@pytest.mark.parametrize("init", ["percentile", "lsq"])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_decides_nothing(init, training):
    quantizer = InputQuantizer((8, 4), init=init).train(training)
    assert quantizer(torch.zeros(0, 3), bits=8).shape == (0, 3)
    assert not quantizer.ready.any()


@pytest.mark.parametrize("init", ["percentile", "lsq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_batch_that_is_not_finite_decides_nothing(init, value):
    quantizer, batch = InputQuantizer((8, 4), init=init), draw(50)
    batch[7] = value
    quantizer(batch, bits=8)
    assert not quantizer.ready.any()
    quantizer(draw(50), bits=8)
    assert quantizer.is_ready(8)
    assert quantizer.scales["8"].isfinite()


def test_before_training_evaluation_measures_each_batch_and_stores_nothing():
    quantizer = InputQuantizer((8, 4)).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    with torch.inference_mode():
        for seed in range(3):
            batch = draw(50, seed=seed)
            scale = percentile_scale(batch, bits=4, signed=True)
            assert torch.equal(quantizer(batch, bits=4), fake_quantize(batch, scale, bits=4))
        assert torch.equal(quantizer(batch.abs(), 8), quantizer(batch.abs(), 8))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert not quantizer.is_ready(4)


def test_a_ready_scale_is_learned_and_used_in_evaluation():
    quantizer = InputQuantizer((4,))
    quantizer(draw(50), bits=4)
    with torch.no_grad():
        quantizer.scales["4"].mul_(3)
    quantizer(draw(50, seed=1), bits=4).square().sum().backward()
    assert quantizer.scales["4"].grad != 0
    quantizer.eval()
    assert torch.equal(quantizer(draw(9), bits=4), fake_quantize(draw(9), quantizer.scales["4"], bits=4))


def test_flags_travel_with_the_state():
    quantizer = InputQuantizer((8, 4))
    quantizer(draw(50), bits=4)
    other = InputQuantizer((8, 4)).eval()
    other.load_state_dict(quantizer.state_dict())
    assert (other.is_ready(8), other.is_ready(4)) == (False, True)
    assert torch.equal(other(draw(9), bits=4), quantizer(draw(9), bits=4))
    copied = copy.deepcopy(quantizer)
    assert copied.is_ready(4)


def test_flags_count_however_they_came():
    # torch's AveragedModel and DistributedDataParallel write buffers without load_state_dict.
    net = every_bit(nn.Sequential(nn.Linear(4, 4)), (8, 4))
    average = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    net.train()(draw(64, 4))
    average.update_parameters(net)
    net.eval(), average.eval()
    x = draw(3, 4, seed=1)
    assert torch.equal(average(x), net(x))


def test_the_clipped_share_counts_what_lies_outside():
    quantizer = InputQuantizer((4, 2))
    quantizer(draw(50).abs(), bits=4)
    with torch.no_grad():
        quantizer.scales["4"].fill_(0.5)
    values = torch.tensor([-0.1, 0.0, 3.0, 7.5, 7.6, 100.0])
    assert quantizer.clipped_share(values, 4).item() == pytest.approx(0.5)


def test_looking_at_the_clipped_share_stores_nothing():
    quantizer = InputQuantizer((4,)).train()
    quantizer.clipped_share(draw(50), 4)
    assert not quantizer.is_ready(4)


def test_a_wrong_first_scale_is_refused():
    with pytest.raises(ValueError, match="init must be 'percentile' or 'lsq'"):
        InputQuantizer((8,), init="percentiles")


def measure_in_two_processes(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for init in ("percentile", "lsq"):
        quantizer = InputQuantizer((8, 4), init=init)
        # Only the first process sees a negative value, and only the second anything but zeros in the second batch.
        quantizer(draw(200) if rank == 0 else draw(200, seed=1).abs(), bits=8)
        quantizer(torch.zeros(200) if rank == 0 else draw(200, seed=2), bits=4)
        torch.save(quantizer.state_dict(), f"{folder}/{init}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.processes
def test_two_processes_start_from_one_scale(tmp_path):
    arguments: dict[str, Any] = {"args": (str(tmp_path),), "nprocs": 2, "start_method": "fork"}
    torch.multiprocessing.start_processes(measure_in_two_processes, **arguments)
    for init, measure in (("percentile", percentile_scale), ("lsq", lsq_scale)):
        first, second = (torch.load(tmp_path / f"{init}{rank}.pt") for rank in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        assert first["signed"]
        assert first["ready"].all()
        batches = draw(200), draw(200, seed=1).abs()
        mean = sum(measure(batch, bits=8, signed=True) for batch in batches) / 2
        torch.testing.assert_close(first["scales.8"], mean)
        assert first["scales.4"] > 0.4 * measure(draw(200, seed=2), bits=4, signed=True)


# Batch normalisation


def test_only_the_batch_normalisation_of_the_precision_in_use_changes():
    net = convert_(resnet20(width=4), (8, 4, 2)).train()
    for bits in (4, 2, 8):
        switch_(net, bits)
        before = {name: value.clone() for name, value in net.named_buffers()}
        net(draw(4, 3, 16, 16))
        changed = {name for name, value in net.named_buffers() if not torch.equal(value, before[name])}
        statistics = {name for name in before if ".norms." in name}
        assert changed & statistics == {name for name in statistics if f".norms.{bits}." in name}
        assert len(changed & statistics) == 3 * 21


def test_gradients_reach_only_the_precision_in_use():
    net = switch_(convert_(resnet20(width=4), (8, 4)), 4).train()
    net(draw(4, 3, 16, 16)).square().sum().backward()
    for name, parameter in net.named_parameters():
        of_8_bits = ".norms.8." in name or name.endswith("scales.8")
        assert (parameter.grad is None) == of_8_bits, name


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_each_precision_starts_as_the_normalisation_that_was(kind):
    norm = kind(3, eps=0.1, momentum=0.3)
    with torch.no_grad():
        norm.weight.copy_(draw(3))
        norm.running_mean.copy_(draw(3, seed=1))
    many = MultiPrecisionBatchNorm(norm, (4, 8, 2))
    assert many.bits == (8, 4, 2)
    assert many.num_bits == 8
    shape = (5, 3) if kind is nn.BatchNorm1d else (5, 3, 4, 4)
    x = draw(*shape)
    for bits in many.bits:
        many.num_bits = bits
        assert torch.equal(many.eval()(x), norm.eval()(x))
        assert many.norms[str(bits)] is not norm
    many.num_bits = 4
    many.train()(x)
    norm.train()(x)
    assert torch.equal(many.norms["4"].running_mean, norm.running_mean)
    assert many.norms["8"].num_batches_tracked == 0


def test_a_checkpoint_of_one_normalisation_fills_all():
    norm, many = nn.BatchNorm2d(3), MultiPrecisionBatchNorm(nn.BatchNorm2d(3), (8, 4))
    norm(draw(5, 3, 4, 4))
    many.load_state_dict(norm.state_dict())
    for bits in (8, 4):
        for name, value in norm.state_dict().items():
            assert torch.equal(many.state_dict()[f"norms.{bits}.{name}"], value)
    own = MultiPrecisionBatchNorm(nn.BatchNorm2d(3), (8, 4))
    own.load_state_dict(many.state_dict())
    with pytest.raises(RuntimeError, match=r"norms\.2"):
        MultiPrecisionBatchNorm(nn.BatchNorm2d(3), (8, 2)).load_state_dict(many.state_dict())


# Residual sums


def test_a_residual_quantizer_sits_on_a_module_and_leaves_it_whole():
    for to_output in (True, False):
        block = nn.Linear(4, 4)
        x = draw(5, 4)
        seen: list[Tensor] = []
        block.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
        plain = block(x)
        quantizer = ResidualQuantizer(to_output=to_output)
        quantizer.attach_(block)
        found = block(x)
        scale = quantizer.scales["8"]
        if to_output:
            assert torch.equal(found, fake_quantize(plain, scale, bits=8))
        else:
            assert torch.equal(found, F.linear(fake_quantize(x, scale, bits=8), block.weight, block.bias))
        quantizer.num_bits = 32
        assert torch.equal(block(x), plain)
        ResidualQuantizer.detach_(block)
        assert list(block.state_dict()) == ["weight", "bias"]
        assert torch.equal(block(x), plain)
        assert len(seen) == 4  # the user's own hook is still there


def test_a_block_may_be_called_by_keyword():
    block = nn.Linear(4, 4)
    ResidualQuantizer().attach_(block)
    assert block(input=draw(2, 4)).shape == (2, 4)


# Cost and numerics of whole networks


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(x)
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    del output
    return total


@pytest.mark.parametrize("bits", [8, 2])
def test_a_quantized_network_keeps_what_the_fp32_one_keeps_and_its_quantized_weights(bits):
    plain, x = resnet20(width=8).train(), draw(16, 3, 24, 24)
    net = switch_(convert_(copy.deepcopy(plain), (8, 2)), bits)
    net(x)
    weights = sum(layer.weight.nbytes + 64 * len(layer.weight) for layer in quantized_layers(net).values())
    assert kept_bytes(net, x) <= kept_bytes(plain, x) + weights
    assert weights < 0.05 * kept_bytes(plain, x)


def test_bf16_autocast_computes_the_same_codes():
    net = every_bit(nn.Conv2d(4, 6, 3), (8, 4)).train()
    x = draw(8, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
        output = net(x)
    scale = net.input_quantizer.scales["8"]
    assert torch.equal(scale, percentile_scale(x, bits=8, signed=True))
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantize_codes(x, scale, bits=8)
        expected = F.conv2d(codes * scale, net.weight_codes() * net.weight_scale.view(-1, 1, 1, 1), net.bias)
    assert torch.equal(output, expected)
    output.float().sum().backward()
    assert net.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_whole_network_of_another_dtype_trains(dtype):
    net = convert_(resnet20(width=4).to(dtype), (8, 4), first_last_bits=8).train()
    for bits in (8, 4):
        switch_(net, bits)
        output = net(draw(4, 3, 16, 16, dtype=dtype))
        assert output.dtype == dtype
        output.float().square().mean().backward()
    clamp_scales_(net)
    assert all(p.grad.isfinite().all() and p.dtype == dtype for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dead_channel_is_no_division_by_zero(dtype):
    plain = nn.Linear(4, 4)
    with torch.no_grad():
        plain.weight[1] = 0
    layer = every_bit(plain.to(dtype), (8, 4), quantize_inputs=False)
    assert layer(draw(3, 4).to(dtype)).isfinite().all()
    with torch.no_grad():
        layer.weight_scale.fill_(-1)
    clamp_scales_(layer)
    assert (layer.weight_scale > 0).all()
    assert layer(draw(3, 4).to(dtype)).isfinite().all()


@pytest.mark.slow
def test_compiled_equals_eager():
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)]
    eager, x = convert_(nn.Sequential(*layers), (8, 4), first_last_bits=8), draw(8, 3, 8, 8)
    for bits in (8, 4):
        switch_(eager, bits)(x)
    copied = copy.deepcopy(eager)
    compiled = torch.compile(copied, backend="aot_eager")
    for bits in (8, 4):
        switch_(eager, bits), switch_(copied, bits)
        expected, found = eager(x), compiled(x)
        torch.testing.assert_close(found, expected)
        for net, output in ((eager, expected), (copied, found)):
            net.zero_grad()
            output.square().sum().backward()
        for (name, one), other in zip(copied.named_parameters(), eager.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None:
                close = {"rtol": 1e-4, "atol": 1e-4 * other.grad.abs().max().item()}
                torch.testing.assert_close(one.grad, other.grad, **close)


def test_activation_memory_counts_nothing_twice():
    # x feeds two layers: each keeps x itself, no quantized copy.
    first, second = every_bit(nn.Linear(64, 8), (8, 4)), every_bit(nn.Linear(64, 8), (8, 4))
    x = draw(256, 64).requires_grad_()

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return first(x) + second(x)

    Both()(x)
    assert kept_bytes(Both(), x) <= x.nbytes + 2 * (first.weight.nbytes * 2 + 1024)


def test_the_first_scales_of_weights_lose_little():
    layer = every_bit(nn.Linear(400, 20), (8,))
    error = (layer.quantized_weight() - layer.weight).square().mean().sqrt()
    assert error < layer.weight.std() * 3 / 128 / math.sqrt(12) * 1.5
