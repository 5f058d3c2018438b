"""A network at fixed bits, in plain modules: equal to the trained one, and ready for exporters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_plugins.models import CifarResNet
from lightning_plugins.modules import ImageClassifier
from lightning_plugins.quantization import BitPlan, convert_, quantized_layers, switch_
from lightning_plugins.quantization.convert import model_precisions
from lightning_plugins.quantization.deploy import (
    DeployConv,
    DeployLinear,
    DeployQuantizer,
    to_deploy,
)
from lightning_plugins.quantization.layers import MultiPrecisionBatchNorm, ResidualQuantizer, _QuantLayer
from lightning_plugins.quantization.packed import load_packed, save_packed
from lightning_plugins.quantization.quantizers import fake_quantize
from toys import TinyModule, assert_same_weights, make_trainer, weights

BITS = (8, 4, 2)


def train(model: nn.Module, inputs: Tensor, bits: tuple[int, ...] = BITS, *, seed: int = 0) -> nn.Module:
    """Set every input scale, statistic and affine parameter to something of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        for b in bits:
            for _ in range(2):
                switch_(model, b)(inputs)
        for name, parameter in model.named_parameters():
            factor = 0.8 + 0.4 * torch.rand(parameter.shape, generator=generator)
            if "scale" in name:
                parameter.mul_(factor)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):  # scales of both signs
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                module.weight[::3] *= -1
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return model.eval()


def outputs(model: nn.Module, inputs: Tensor, bits: Any) -> Tensor:
    with torch.no_grad():
        return switch_(model, bits)(inputs)


def assert_equal_up_to_ties(found: Tensor, wanted: Tensor) -> None:
    """Nearly all rows to 1e-5; in the others an activation fell on the other side of a boundary between codes."""
    difference = (found - wanted).abs().flatten(1).amax(1)
    assert (difference < 1e-5 * max(1.0, float(wanted.abs().max()))).float().mean() >= 0.8, difference
    assert difference.max() < 0.2 * wanted.abs().max()


def conv_net(**arguments: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, **arguments),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def small_resnet() -> nn.Module:
    return CifarResNet(1, in_channels=1, width=4)


def made(make: Callable[[], nn.Module], inputs: Tensor, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    model(inputs)
    model = convert_(model, **({"bits": BITS, "first_last_bits": 2} | arguments))
    return train(model, inputs, model_precisions(model))


IMAGES = torch.rand(16, 3, 7, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"first_last_bits": 32},
        {"per_channel": False, "bits": (8, 4)},
        {"quantize_inputs": False},
        {"batch_norm": "shared"},
    ],
    ids=str,
)
def test_equals_the_trained_network(bits, arguments):
    model = made(conv_net, IMAGES, **arguments)
    bits = max(bits, min(arguments.get("bits", BITS)))
    deployed = to_deploy(model, bits)
    assert_equal_up_to_ties(deployed(IMAGES), outputs(model, IMAGES, bits))
    assert not any(isinstance(m, _QuantLayer | MultiPrecisionBatchNorm | nn.BatchNorm2d) for m in deployed.modules())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same"},
        {"padding": "same", "kernel_size": (2, 4), "dilation": (1, 2)},
        {"padding": "valid"},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "replicate", "kernel_size": 2},
        {"groups": 4, "dilation": 2},
        {"groups": 8, "padding": 1},
        {"kernel_size": (1, 3), "padding": (0, 2), "stride": (2, 1)},
    ],
    ids=str,
)
def test_every_kind_of_convolution(bits, arguments):
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, **({"kernel_size": 3} | arguments)))

    model = made(make, IMAGES, depthwise_bits=2)
    deployed = to_deploy(model, bits)
    assert isinstance(deployed[2], DeployConv)
    assert_equal_up_to_ties(deployed(IMAGES), outputs(model, IMAGES, bits))
    exported = torch.export.export(deployed, (IMAGES,))
    torch.testing.assert_close(exported.module()(IMAGES), deployed(IMAGES))


@pytest.mark.parametrize("bits", BITS)
def test_one_dimension_and_signed_inputs(bits):
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(4, 6, 3, padding="same"),
            nn.BatchNorm1d(6),
            nn.GELU(),
            nn.Conv1d(6, 6, 2, padding="same", groups=2),
        )

    signals = torch.randn(16, 4, 9, generator=torch.Generator().manual_seed(0))
    model = made(make, signals)
    deployed = to_deploy(model, bits)
    assert deployed[3].input_quantizer.signed
    assert_equal_up_to_ties(deployed(signals), outputs(model, signals, bits))


def test_what_a_layer_holds_is_the_closed_form():
    model = made(conv_net, IMAGES)
    layer, norm = model[3], model[4].norms["4"]
    deployed = to_deploy(model, 4)[3]
    assert deployed.codes.dtype == torch.int8
    assert int(deployed.codes.min()) >= -8
    assert int(deployed.codes.max()) <= 7
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(deployed.scale, layer.weight_scale * 2**4 * factor)
    torch.testing.assert_close(deployed.bias, norm.bias + (layer.bias - norm.running_mean) * factor)
    assert (deployed.scale < 0).any()
    assert deployed.input_quantizer.scale == layer.input_quantizer.scales["4"].item()
    torch.testing.assert_close(deployed.weight, deployed.codes * deployed.scale.view(-1, 1, 1, 1))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_a_quantizer_stops_at_the_highest_code_of_its_bits(bits, signed):
    quantizer = DeployQuantizer(0.5, bits=bits, signed=signed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    found = quantizer(torch.tensor([-1e6, 0.2, 0.25, 0.75, 1e6]))
    assert found.tolist() == [0.5 * low, 0.0, 0.0, min(1.0, 0.5 * high), 0.5 * high]


def test_residual_network_with_and_without_quantized_sums():
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for quantize_residual in (False, True):
        torch.manual_seed(0)
        model = convert_(small_resnet(), BITS, quantize_residual=quantize_residual)
        train(model, images)
        for bits in BITS:
            deployed = to_deploy(model, bits)
            assert_equal_up_to_ties(deployed(images), outputs(model, images, bits))
            kinds = {type(module) for module in deployed.modules()}
            assert nn.BatchNorm2d not in kinds
            assert ResidualQuantizer not in kinds
            blocks = [name for name, _ in deployed.named_modules() if name.endswith("residual_quantizer")]
            assert bool(blocks) is quantize_residual


def test_ties_of_requantized_codes_fall_as_in_training():
    # 8-bit codes that are quantized again, to n / 3 times their step, have ties: the last digit of a float decides.
    codes = torch.arange(256.0)
    for step in torch.rand(20, generator=torch.Generator().manual_seed(0)):
        for n in range(200, 256):
            scale = step * n / 3
            wanted = fake_quantize(codes * step, scale, bits=2, signed=False)
            assert torch.equal(DeployQuantizer(float(scale), bits=2, signed=False)(codes * step), wanted)


def test_a_mixed_plan_decides_layer_by_layer():
    model = made(conv_net, IMAGES, first_last_bits=2)
    plan = BitPlan(dict(zip(quantized_layers(model), (8, 2, 4), strict=True)))
    deployed = to_deploy(model, plan)
    assert [m.bits for m in deployed.modules() if isinstance(m, DeployConv | DeployLinear)] == [8, 2, 4]
    assert_equal_up_to_ties(deployed(IMAGES), outputs(model, IMAGES, plan))


@pytest.mark.parametrize("make", [conv_net, small_resnet])
def test_full_precision_layers_stay_float(make):
    torch.manual_seed(0)
    model, images = make(), IMAGES if make is conv_net else torch.rand(8, 1, 8, 8)
    model(images)
    convert_(model, (32, 8), first_last_bits=8, quantize_residual=make is small_resnet)
    train(model, images, (32, 8))
    deployed = to_deploy(model, 32)
    kinds = {type(module) for module in deployed.modules()}
    assert not kinds & {DeployConv, DeployLinear, DeployQuantizer, nn.BatchNorm2d}
    assert nn.Conv2d in kinds
    torch.testing.assert_close(deployed(images), outputs(model, images, 32), rtol=1e-5, atol=1e-5)


def test_only_what_follows_a_layer_is_folded():
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(F.relu(self.bn(x)))
            return x.mean((2, 3)) + self.last(x).amax((2, 3))  # the conv's output is used unnormalised too

    model = made(PreActivation, IMAGES)
    deployed = to_deploy(model, 4)
    assert [type(m) for m in (deployed.bn, deployed.last)] == [nn.BatchNorm2d, nn.BatchNorm2d]
    assert_equal_up_to_ties(deployed(IMAGES), outputs(model, IMAGES, 4))


def test_normalisations_that_cannot_be_folded_stay():
    class Odd(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 1),
            Odd(4),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Conv2d(4, 2, 1),
        )

    model = made(make, IMAGES)
    deployed = to_deploy(model, 4)
    assert isinstance(deployed[1], Odd)
    assert isinstance(deployed[3], nn.BatchNorm2d)
    assert_equal_up_to_ties(deployed(IMAGES), outputs(model, IMAGES, 4))


@pytest.mark.parametrize("affine", [True, False])
def test_a_normalisation_after_a_linear_layer(affine):
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6, affine=True), nn.ReLU(), nn.Linear(6, 3))

    rows = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    model = made(make, rows)
    if not affine:
        for norm in model[1].norms.values():
            norm.weight = norm.bias = None
    deployed = to_deploy(model, 4)
    assert type(deployed[1]) is nn.Identity
    assert_equal_up_to_ties(deployed(rows), outputs(model, rows, 4))
    # Here the normalisation would have taken dimension 1, and the linear layer the last.
    with pytest.raises(ValueError, match=r"must be \(N, C\), got shape \(16, 6, 6\); put an nn.Identity between"):
        deployed(torch.rand(16, 6, 6))


def test_the_copy_shares_nothing_and_the_model_stays(tmp_path):
    model = made(conv_net, IMAGES)
    switch_(model, 8).train()
    before, kinds = weights(model), [type(module) for module in model.modules()]
    deployed = to_deploy(model, 4)
    assert_same_weights(model, before)
    assert [type(module) for module in model.modules()] == kinds
    assert model.training
    assert all(layer.num_bits == 8 for layer in quantized_layers(model).values())
    assert not deployed.training
    assert not any(p.requires_grad for p in deployed.parameters())
    places = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not places & {tensor.data_ptr() for tensor in deployed.state_dict().values()}
    again = to_deploy(model, 4)
    again.load_state_dict(deployed.state_dict())  # no entry of the conversion is left in it
    assert all("lightning_plugins" not in key for key in deployed.state_dict())
    torch.save(deployed, tmp_path / "deployed.pt")
    loaded = torch.load(tmp_path / "deployed.pt", weights_only=False)
    torch.testing.assert_close(copy.deepcopy(loaded)(IMAGES), deployed(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["mask", "iterative", "parametrized"])
def test_effective_weights_are_deployed(how):
    torch.manual_seed(0)
    model = conv_net()
    model(IMAGES)
    if how == "parametrized":
        parametrizations.weight_norm(model[3])
    else:
        prune.l1_unstructured(model[3], "weight", amount=0.5)
    convert_(model, BITS, first_last_bits=2)
    train(model, IMAGES)
    if how == "iterative":
        prune.l1_unstructured(model[3], "weight", amount=0.5)
    elif how == "mask":
        switch_(model.train(), 4)(IMAGES).sum().backward()  # the pruned weight is a result with a graph now
        with torch.no_grad():
            model[3].weight_orig.mul_(2.0)  # and stale
        model.eval()
    deployed = to_deploy(model, 4)
    wanted = outputs(model, IMAGES, 4)
    assert_equal_up_to_ties(deployed(IMAGES), wanted)
    if how != "parametrized":
        assert ((deployed[3].codes == 0).float().mean() >= (0.5 if how == "mask" else 0.75)).item()


@pytest.mark.parametrize("content", ["all precisions", 4])
def test_a_packed_model(tmp_path, content):
    model = made(conv_net, IMAGES)
    wanted = outputs(model, IMAGES, 4)
    save_packed(model, tmp_path / "net.safetensors", plan=None if content == "all precisions" else content)
    torch.manual_seed(1)
    empty = conv_net()
    empty(IMAGES)
    loaded = load_packed(tmp_path / "net.safetensors", empty)
    assert_equal_up_to_ties(to_deploy(loaded, 4)(IMAGES), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_become_float32(dtype):
    torch.manual_seed(0)
    model = conv_net()
    model(IMAGES)
    convert_(model.to(dtype), BITS)  # the ends stay float
    train(model, IMAGES.to(dtype))
    deployed = to_deploy(model, 4)
    assert torch.equal(deployed[3].codes, model[3].weight_codes(4))
    assert {t.dtype for t in deployed.state_dict().values() if t.is_floating_point()} == {torch.float32}
    wanted = outputs(model, IMAGES.to(dtype), 4).float()
    if dtype == torch.float64:
        assert_equal_up_to_ties(deployed(IMAGES), wanted)
    else:
        assert (deployed(IMAGES) - wanted).abs().median() < 0.1 * wanted.abs().max()


def test_a_lightning_module_is_copied_without_its_trainer(tmp_path):
    module = TinyModule()
    convert_(module, (8, 4), first_last_bits=4)
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(module)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    for b in (8, 4):
        switch_(module.train(), b)(x)
    deployed = to_deploy(module, 4)
    assert isinstance(deployed, TinyModule)
    assert deployed._trainer is None
    assert module.trainer is trainer
    assert_equal_up_to_ties(deployed(x), outputs(module.eval(), x, 4))
    exported = torch.export.export(deployed, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:3]), deployed(x[:3]))


def test_a_network_that_was_converted_before_it_got_its_module():
    torch.manual_seed(0)
    net = convert_(small_resnet(), (8, 4))
    images = torch.rand(4, 1, 8, 8)
    module: pl.LightningModule = ImageClassifier(train(net, images, (8, 4)), num_classes=10, mean=[0.0], std=[1.0])
    deployed = to_deploy(module, 4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    assert_equal_up_to_ties(deployed(images), outputs(module.eval(), images, 4))


def test_a_single_layer_and_shared_layers():
    rows = torch.rand(8, 6)
    layer = train(convert_(nn.Linear(6, 6), (8, 4), first_last_bits=4), rows, (8, 4))
    deployed = to_deploy(layer, 4)
    assert isinstance(deployed, DeployLinear)
    assert_equal_up_to_ties(deployed(rows), outputs(layer, rows, 4))

    shared = nn.Linear(6, 6)
    model = train(convert_(nn.Sequential(shared, nn.ReLU(), shared), (8, 4), first_last_bits=4), rows, (8, 4))
    deployed = to_deploy(model, 4)
    assert deployed[0] is deployed[2]
    assert_equal_up_to_ties(deployed(rows), outputs(model, rows, 4))


@pytest.mark.parametrize("quantize_residual", [False, True])
def test_torch_export_gives_the_same_at_any_batch_size(quantize_residual, tmp_path):
    torch.manual_seed(0)
    images = torch.rand(6, 1, 8, 8)
    model = convert_(small_resnet(), (8, 4), quantize_residual=quantize_residual)
    deployed = to_deploy(train(model, images, (8, 4)), 4)
    program = torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (images, images[:1], images.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(loaded(batch), deployed(batch), rtol=1e-6, atol=1e-6)


def test_scales_that_were_never_set_are_named():
    torch.manual_seed(0)
    model = conv_net()
    model(IMAGES)
    convert_(model, BITS, first_last_bits=2)
    train(model, IMAGES, (8, 4))
    with pytest.raises(ValueError, match="3 of 3 input scales were never set, first that of '0' at 2 bits"):
        to_deploy(model, 2)
    images = torch.rand(2, 1, 8, 8)
    net = convert_(small_resnet(), (8,), quantize_residual=True)
    with pytest.raises(ValueError, match="input scales were never set"):
        to_deploy(net, 8)
    to_deploy(train(net, images, (8,)), 8)


def test_wrong_bits_and_unconverted_models():
    model = made(conv_net, IMAGES)
    with pytest.raises(ValueError, match=r"bits must be one of the model's precisions \(8, 4, 2\), got 5"):
        to_deploy(model, 5)
    with pytest.raises(ValueError, match="a plan must name exactly"):
        to_deploy(model, {"0": 4})
    with pytest.raises(ValueError, match="convert_ it first"):
        to_deploy(nn.Linear(2, 2), 8)
