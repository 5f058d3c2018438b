"""Sizes and bit operations: by hand, and against the files."""

from __future__ import annotations

import dataclasses

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import mobilenet_v3_small

from lightning_plugins.models import resnet20
from lightning_plugins.quantization import BitPlan, active_plan, convert_, quantized_layers, switch_
from lightning_plugins.quantization.accounting import cost
from lightning_plugins.quantization.packed import load_packed, save_packed


class Small(nn.Module):
    """Five layers whose cost can be worked out on paper."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3, padding=1)
        self.conv = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6, bias=False)
        self.linear = nn.Linear(4, 5)
        self.head = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x).relu()))
        return self.head(self.linear(self.depthwise(x.relu())).flatten(1))


SIGNALS = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def seen(net: nn.Module, inputs: Tensor) -> nn.Module:
    """The net after a batch at each precision."""
    precisions = {b for layer in quantized_layers(net).values() for b in layer.precisions}
    for b in sorted(precisions):
        switch_(net.train(), b)(inputs)
    return switch_(net, max(precisions))


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return seen(convert_(Small(), (8, 4, 2)), SIGNALS)


def test_layers_by_hand(small):
    result = cost(small, 4, example_input=SIGNALS)
    found = {layer.name: dataclasses.astuple(layer)[1:] for layer in result.layers}
    assert found == {  # weights, bits, input bits, multiply-adds, quantized
        "stem": (2 * 4 * 3, 32, 32, 24 * 8, False),
        "conv": (2 * 6 * 3, 4, 4, 36 * 4, True),
        "depthwise": (6 * 3, 8, 8, 18 * 4, True),  # which keeps 8 bits
        "linear": (4 * 5, 4, 4, 20 * 6, True),  # applied to each of six rows
        "head": (30 * 3, 32, 32, 90, False),
    }
    assert result.macs == 192 + 144 + 72 + 120 + 90
    assert result.bops == 144 * 16 + 72 * 64 + 120 * 16 + (192 + 90) * 1024
    assert result.weight_bits == 36 * 4 + 18 * 8 + 20 * 4
    assert result.average_bits == pytest.approx((36 * 4 + 18 * 8 + 20 * 4) / 74)
    assert result.average_bits_per_layer == pytest.approx(16 / 3)


def test_bytes_by_hand(small):
    result = cost(small, 4)
    alone, every = result.packed_alone, result.packed
    assert (every.weights, alone.weights) == (36 + 18 + 20, 18 + 18 + 10)
    # Per layer: a scale for each output channel, one for its inputs at each precision that it takes, and their sign.
    assert (every.scales, alone.scales) == (4 * (6 + 6 + 5 + 3 + 1 + 3) + 3, 4 * (6 + 6 + 5 + 3) + 3)
    assert (every.batch_norms, alone.batch_norms) == (3 * (4 * 4 * 6 + 8), 4 * 4 * 6 + 8)
    assert every.biases == alone.biases == 4 * (6 + 5)
    assert every.unquantized == alone.unquantized == 4 * (24 + 4 + 90 + 3)
    assert result.packed_bytes == every.total == sum(dataclasses.astuple(every))
    assert result.packed_alone_bytes == alone.total


@pytest.mark.parametrize("bits", [2, 3, 5, 7])
def test_the_last_byte_of_each_layer_is_filled_up(bits):
    net = convert_(Small(), (bits,), depthwise_bits=2)
    assert cost(net).packed.weights == -(-36 * bits // 8) - (-18 * bits // 8) - (-20 * bits // 8)
    assert cost(net).weight_bits == bits * 74


NETS = {
    "small": (Small, SIGNALS, (8, 4, 2), {}),
    "width16": (resnet20, IMAGES, (8, 6, 4, 2), {}),
    "full": (lambda: resnet20(width=4), IMAGES, (32, 8, 3), {"batch_norm": "shared"}),
    "ends": (lambda: resnet20(width=4), IMAGES, (4, 3), {"first_last_bits": 8, "per_channel": False}),
    "residual": (lambda: resnet20(width=4), IMAGES, (8, 4), {"quantize_residual": True}),
    "mobilenet": (mobilenet_v3_small, IMAGES, (8, 4), {"quantize_inputs": False}),
}


@pytest.mark.parametrize("name", NETS)
def test_predicted_sizes_are_those_of_the_files(name, tmp_path):
    make, inputs, bits, arguments = NETS[name]
    net = convert_(make(), bits, **arguments)
    turn = {layer: 8 if i % 2 else bits.bits[-1] for i, (layer, bits) in enumerate(quantized_layers(net).items())}
    plan = turn if 8 in bits else bits[-1]
    predicted = [(chosen, cost(net, chosen)) for chosen in (bits[-1], plan)]  # before any training
    seen(net, inputs)
    content = save_packed(net, tmp_path / "all").read_bytes()
    on_disk = dict.fromkeys(("weights", "scales", "batch_norms", "biases", "unquantized"), 0)
    modules = dict(net.named_modules())
    for tensor, value in safetensors.torch.load(content).items():
        owner = tensor.rpartition(".")[0]
        kind = "unquantized"
        if tensor.endswith(".codes"):
            kind = "weights"
        elif tensor.endswith((".weight_scale", ".signed", ".scales")):
            kind = "scales"
        elif ".norms." in tensor or type(modules.get(owner)) is nn.BatchNorm2d:
            kind = "batch_norms"
        elif owner in quantized_layers(net) and tensor.endswith(".bias"):
            kind = "biases"
        on_disk[kind] += value.numel() * value.element_size()
    for chosen, result in predicted:
        assert result.packed_bytes == len(content)
        assert result.packed_alone_bytes == save_packed(net, tmp_path / "plan", plan=chosen).stat().st_size
        assert {kind: getattr(result.packed, kind) for kind in on_disk} == on_disk


def test_resnet20_in_numbers():
    net = convert_(resnet20(in_channels=1), (8, 6, 4, 2))
    at_8, at_2 = (cost(net, b, example_input=torch.rand(1, 1, 28, 28)) for b in (8, 2))
    assert sum(layer.num_weights for layer in at_8.layers) == 272_186 - 2 * 784 - 10  # less normalisations and bias
    assert at_8.packed.weights == at_8.packed_alone.weights == 269_824
    assert at_2.packed_alone.weights == 269_824 / 4
    assert at_8.packed == at_2.packed
    ends = sum(layer.bops for layer in at_8.layers if not layer.quantized)
    assert (at_8.bops - ends) == 16 * (at_2.bops - ends)


def test_full_precision():
    net = convert_(resnet20(width=4), (32, 8))
    result = cost(net, 32, example_input=IMAGES)
    assert result.average_bits == result.average_bits_per_layer == 32
    assert result.bops == 1024 * result.macs
    assert result.packed_alone is None
    assert result.packed_alone_bytes is None
    assert result.packed == cost(net, 8).packed
    assert "these bits alone" not in str(result)
    mixed = active_plan(switch_(net, 8)).edit({"stages.0.0.conv1": 32})
    assert cost(net, mixed).packed_alone is None


def test_inputs_that_come_quantized():
    net = convert_(resnet20(width=4), (32, 8, 4), quantize_residual=True)
    shared = "stages.0.1.conv1"
    assert quantized_layers(net)[shared].shared_input_bits == 8

    def input_bits(net: nn.Module, bits: int | BitPlan) -> int:
        return next(layer.activation_bits for layer in cost(net, bits).layers if layer.name == shared)

    assert [input_bits(net, b) for b in (32, 8, 4)] == [32, 8, 4]
    assert input_bits(net, active_plan(switch_(net, 8)).edit({shared: 32})) == 8
    net = convert_(resnet20(width=4), (32, 8, 4), quantize_residual=True, quantize_inputs=False)
    assert [input_bits(net, b) for b in (32, 8, 4)] == [32, 8, 8]
    assert all(layer.activation_bits == 32 for layer in cost(convert_(Small(), quantize_inputs=False)).layers)


def test_a_plan_in_use_is_the_default(small):
    plan = BitPlan({"conv": 2, "depthwise": 8, "linear": 8})
    named = cost(small, plan)
    assert named == cost(switch_(small, plan))
    assert named.weight_bits == 36 * 2 + 18 * 8 + 20 * 8


def test_the_batch_size_does_not_matter(small):
    results = [cost(small, 4, example_input=inputs) for inputs in (SIGNALS, SIGNALS[:1], (SIGNALS[:2],))]
    assert results[0] == results[1] == results[2]


class Twice(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


def test_layers_that_run_twice_or_never():
    net = convert_(Twice(), (8, 4))
    net.spare = nn.Linear(3, 3)
    result = cost(net, example_input=SIGNALS)
    assert {layer.name: layer.macs for layer in result.layers} == {
        "stem": 384, "conv": 288, "depthwise": 144, "linear": 240, "head": 180, "spare": 0,
    }  # fmt: skip


def test_the_model_is_left_as_it_was(small):
    small.train()
    small.norm.eval()
    switch_(small, 2)
    modes, plan = [module.training for module in small.modules()], active_plan(small)
    state = {name: value.clone() for name, value in small.state_dict().items()}
    cost(small, 8, example_input=SIGNALS)
    with pytest.raises(RuntimeError):
        cost(small, 8, example_input=torch.rand(1, 7, 7))
    assert [module.training for module in small.modules()] == modes
    assert active_plan(small) == plan
    assert small.norm.num_bits == 2
    assert not any(module._forward_hooks for module in small.modules())
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_a_loaded_model_costs_the_same(small, tmp_path):
    before = cost(small, 4, example_input=SIGNALS)
    loaded = load_packed(save_packed(small, tmp_path / "net"), Small())
    assert cost(loaded, 4, example_input=SIGNALS) == before
    alone = load_packed(save_packed(small, tmp_path / "alone", plan=4), Small())
    after = cost(alone)
    assert after.packed == after.packed_alone == before.packed_alone


def test_pruned_weights_count_as_they_are_stored(tmp_path):
    net = Small()
    prune.l1_unstructured(net.conv, "weight", amount=0.5)
    seen(convert_(net, (8, 4)), SIGNALS)
    result = cost(net, 4)
    assert result.layers[1].num_weights == 36
    assert result.packed_bytes == save_packed(net, tmp_path / "net").stat().st_size


def test_the_table(small):
    result = cost(small, 4, example_input=SIGNALS)
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "weights", "bits", "input", "bits", "MACs", "BOPs"]
    assert lines[1].split() == ["stem", "(unquantized)", "24", "32", "32", "192", "196,608"]
    assert lines[3].split() == ["depthwise", "18", "8", "8", "72", "4,608"]
    assert lines[6].split()[0] == "all"
    assert "4.97 per weight (5.33 per layer)" in lines[8]
    assert lines[-1].split() == ["total", *(f"{size:,}" for size in (result.packed_bytes, result.packed_alone_bytes))]
    assert len({len(line) for line in lines[:7]}) == 1
    assert "MACs" not in str(cost(small, 4))


def test_wrong_arguments(small):
    with pytest.raises(ValueError, match="no quantized layers; convert_ it first"):
        cost(Small())
    with pytest.raises(ValueError, match="bits must be one of the model's precisions"):
        cost(small, 3)
    with pytest.raises(ValueError, match="a plan must name exactly"):
        cost(small, {"conv": 8})
