"""Converting, switching and restoring whole networks, and what their checkpoints hold."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.models import mobilenet_v3_small, resnet18

from lightning_plugins.models import resnet20
from lightning_plugins.quantization import (
    BitPlan,
    MultiPrecisionBatchNorm,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    ResidualQuantizer,
    active_plan,
    clamp_scales_,
    convert_,
    load_converted,
    quantized_layers,
    restore_,
    switch_,
)
from lightning_plugins.quantization.convert import SPEC_KEY, describe, scale_parameters
from lightning_plugins.quantization.layers import InputQuantizer
from lightning_plugins.quantization.quantizers import weight_scale
from toys import NUM_CLASSES, TinyModule, assert_same_weights, weights


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(n: int = 4, *, seed: int = 0, size: int = 16) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def mlp(*, width: int = 8) -> nn.Sequential:
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES)]
    return nn.Sequential(*layers)


def small(**arguments: Any) -> nn.Module:
    return resnet20(width=4, **arguments)


def trained(net: nn.Module, x: Tensor | None = None, *, steps: int = 2) -> nn.Module:
    """A few steps at each precision, so that every value has moved."""
    x = images() if x is None else x
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for bits in describe(net)["bits"]:
        switch_(net, bits).train()
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            clamp_scales_(net)
    return switch_(net, describe(net)["bits"][0]).eval()


def assert_same_network(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    assert describe(first) == describe(second)
    for bits in describe(first)["bits"]:
        assert torch.equal(switch_(first, bits).eval()(x), switch_(second, bits).eval()(x))


def placed(net: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, kind)]


# Which layers are converted


def test_by_default_all_but_the_first_and_the_last_layer():
    net = convert_(small())
    layers = quantized_layers(net)
    every = [name for name, module in small().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert list(layers) == every[1:-1]
    assert all(layer.bits == (8, 6, 4, 2) and layer.num_bits == 8 and layer.high_bits == 8 for layer in layers.values())
    assert type(net.stem[0]) is nn.Conv2d
    assert type(net.fc) is nn.Linear
    assert placed(net, MultiPrecisionBatchNorm) == placed(small(), nn.BatchNorm2d)


def test_first_and_last_and_depthwise_layers_have_least_bits():
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv1d(3, 6, 3),
                nn.Conv1d(6, 6, 3, groups=6),
                nn.Conv1d(6, 12, 3, groups=6),
                nn.Conv1d(12, 6, 3, groups=2),
                nn.Conv1d(6, 1, 1),
                nn.Conv1d(1, 4, 1),  # one channel in one group is no depthwise convolution
                nn.Flatten(),
                nn.Linear(4, 2),
            )

    def bits(**arguments: Any) -> dict[str, tuple[int, ...]]:
        return {name: layer.bits for name, layer in quantized_layers(convert_(Net(), (4, 2, 8), **arguments)).items()}

    full = (8, 4, 2)
    assert bits() == {"1": (8,), "2": (8,), "3": full, "4": full, "5": full}
    assert bits(first_last_bits=8)["0"] == bits(first_last_bits=8)["7"] == (8,)
    assert bits(first_last_bits=3)["0"] == (8, 4, 3)
    assert bits(first_last_bits=2)["7"] == full
    assert bits(depthwise_bits=2)["1"] == full
    assert bits(depthwise_bits=4)["2"] == (8, 4)
    assert "1" not in bits(depthwise_bits=32)
    low = convert_(Net(), (4, 2), first_last_bits=8)
    assert quantized_layers(low)["0"].bits == (8,)
    assert quantized_layers(low)["0"].high_bits == 8
    assert quantized_layers(low)["3"].high_bits == 4
    assert dict(active_plan(switch_(low, 2))) == {"0": 8, "1": 8, "2": 8, "3": 2, "4": 2, "5": 2, "7": 8}


def test_patterns_choose_layers():
    everything = {"first_last_bits": 8}
    assert list(quantized_layers(convert_(mlp(), include=("2",)))) == ["2"]
    assert list(quantized_layers(convert_(mlp(), include=("0", "[24]"), **everything))) == ["0", "2", "4"]
    assert list(quantized_layers(convert_(mlp(), exclude=("0", "4"), **everything))) == ["2"]
    net = convert_(small(), include=("stages.*",), exclude=("*.shortcut.*", "stages.2.*"))
    assert list(quantized_layers(net)) == [f"stages.{s}.{b}.conv{c}" for s in (0, 1) for b in range(3) for c in (1, 2)]


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_one_text_is_no_list_of_patterns(where):
    with pytest.raises((TypeError, ValueError), match=f"{where} must be a (list|sequence)"):
        convert_(mlp(), first_last_bits=8, **{where: "2*"})


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_pattern_that_matches_no_layer_is_an_error(where):
    with pytest.raises(ValueError, match=f"{where}.*'head'"):
        convert_(mlp(), first_last_bits=8, **{where: ("2", "head")})


def test_only_exact_classes_are_converted():
    class MyConv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), MyConv(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3),
                        nn.Conv3d(1, 1, 1), nn.Bilinear(2, 2, 2), nn.Conv2d(4, 3, 3))  # fmt: skip
    convert_(net)
    assert list(quantized_layers(net)) == ["3"]
    assert type(net[1]) is MyConv
    with pytest.raises(ValueError, match="nothing is left to quantize in Sequential: of its 0"):
        convert_(nn.Sequential(MyConv(3, 3, 3)))


def test_attention_is_left_alone_and_the_rest_of_a_transformer_computes_quantized():
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    convert_(net, (8, 2), first_last_bits=2, input_init="lsq")
    assert list(quantized_layers(net)) == ["linear1", "linear2"]
    x = torch.randn(4, 5, 8)
    switch_(net, 2).train()(x)
    with torch.no_grad():  # torch has a fast path here that reads the weights past the layers
        assert torch.allclose(net.eval()(x), net.train()(x), atol=1e-5)


def test_layers_stay_the_objects_they_are():
    net = small()
    seen: list[str] = []
    net.stages[0][0].conv1.register_forward_hook(lambda *args: seen.append("hook"))
    before = dict(net.named_modules())
    parameters = dict(net.named_parameters())
    outside = [net.stages[0][0].conv1]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    convert_(net)
    for name, module in before.items():
        if not isinstance(module, nn.BatchNorm2d):
            assert net.get_submodule(name) is module
    after = dict(net.named_parameters())
    for name, parameter in parameters.items():
        if name in after:
            assert after[name] is parameter
    assert {name for name in parameters if name not in after} == {n for n in parameters if ".bn" in n or n in BN_NAMES}
    assert type(outside[0]) is QuantConv2d
    assert optimizer.param_groups[0]["params"][0] is net.stem[0].weight
    net(images())
    assert seen == ["hook"]


BN_NAMES = {
    "stem.1.weight",
    "stem.1.bias",
    *(f"stages.{s}.0.shortcut.1.{k}" for s in (1, 2) for k in ("weight", "bias")),
}


def test_a_shared_layer_and_a_shared_normalisation_are_converted_once():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.one = nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)
            self.two, self.again = self.one, self.norm
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.again(self.two(self.norm(self.one(self.first(x))))))

    net, x = Shared(), torch.randn(6, 8)
    expected = net.eval()(x)
    convert_(net, (32, 8, 4))
    assert list(quantized_layers(net)) == ["one"]
    assert net.one is net.two
    assert isinstance(net.norm, MultiPrecisionBatchNorm)
    assert net.norm is net.again
    assert torch.equal(net(x), expected)
    trained(net, x)
    again = load_converted(Shared(), net.state_dict())
    assert_same_network(net, again, x)
    restore_(net)
    assert net.norm is net.again
    assert type(net.norm) is nn.BatchNorm1d
    assert_same_weights({n: v for n, v in weights(net).items() if n in Shared().state_dict()}, net)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(8), nn.LazyBatchNorm1d()])
def test_layers_without_weights_are_refused(lazy):
    net = nn.Sequential(nn.Linear(8, 8), lazy, nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"'1' has no (weights|values) yet; run a batch through the model"):
        convert_(net)
    net(torch.randn(4, 8))
    convert_(net)


def test_a_model_with_nothing_left_says_why():
    with pytest.raises(ValueError, match=r"of its 2 Conv1d, .* first_last_bits=8 quantizes the ends"):
        convert_(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"nothing is left"):
        convert_(mlp(), include=("0",))
    plain = mlp()
    with pytest.raises(ValueError, match=r"exclude=\['\*'\]"):
        convert_(plain, exclude=["*"])
    assert list(plain.state_dict()) == list(mlp().state_dict())


def test_converting_twice_is_refused():
    net = convert_(mlp())
    for model in (net, nn.ModuleDict({"net": net})):
        with pytest.raises(ValueError, match="converted already; restore_ it first"):
            convert_(model)
    assert convert_(restore_(net), (4, 2)) is net


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": (8, 9)}, r"bits must be different precisions of 2 to 8.*got \(8, 9\)"),
        ({"bits": (8, 1)}, "bits must be different precisions"),
        ({"bits": (8, 8)}, "bits must be different precisions"),
        ({"bits": (32,)}, "bits must be different precisions"),
        ({"bits": ()}, "bits must be different precisions"),
        ({"bits": (8, True)}, "bits must be different precisions"),
        ({"bits": (8, 16)}, "bits must be different precisions"),
        ({"bits": (8.0, 4.0)}, "a sequence, each a whole number"),
        ({"first_last_bits": 1}, "first_last_bits must be 2 to 8, or 32 for unquantized, got 1"),
        ({"first_last_bits": 16}, "first_last_bits must be 2 to 8"),
        ({"depthwise_bits": 0}, "depthwise_bits must be 2 to 8"),
        ({"input_init": "max"}, "input_init must be 'percentile' or 'lsq', got 'max'"),
        ({"scale_grad": "paper"}, "scale_grad must be 'effective' or 'exact'"),
        ({"batch_norm": "none"}, "batch_norm must be 'per_precision' or 'shared'"),
    ],
)
def test_wrong_arguments_change_nothing(arguments, message):
    net = small()
    with pytest.raises((ValueError, TypeError), match=message):
        convert_(net, **arguments)
    assert_same_weights(net, weights(net))
    assert list(net.state_dict()) == list(small().state_dict())


def test_options_reach_every_layer():
    options = {"per_channel": False, "scale_grad": "exact", "quantize_inputs": False, "batch_norm": "shared"}
    net = convert_(small(), (8, 4), **options)
    for layer in quantized_layers(net).values():
        assert layer.weight_scale.shape == ()
        assert layer.scale_grad == "exact"
        assert layer.input_quantizer is None
    assert placed(net, MultiPrecisionBatchNorm) == []
    lsq = convert_(small(), (8, 4), input_init="lsq")
    assert {layer.input_quantizer.init for layer in quantized_layers(lsq).values()} == {"lsq"}
    grads = {}
    for scale_grad in ("effective", "exact"):
        torch.manual_seed(0)
        layer = convert_(nn.Linear(4, 4), (8, 4), first_last_bits=2, scale_grad=scale_grad, quantize_inputs=False)
        switch_(layer, 4)(torch.ones(2, 4)).square().sum().backward()
        grads[scale_grad] = layer.weight_scale.grad
    assert torch.equal(grads["exact"], 16 * grads["effective"])


def test_a_model_that_is_one_layer():
    for layer, kind in ((nn.Conv1d(3, 3, 1), QuantConv1d), (nn.Linear(3, 3), QuantLinear)):
        plain = type(layer)
        assert type(convert_(layer, (8, 4), first_last_bits=2)) is kind
        assert list(quantized_layers(layer)) == [""]
        assert type(restore_(layer)) is plain


# Precisions


def test_full_precision_among_the_bits_is_the_plain_network_exactly():
    plain, x = small(), images()
    net = convert_(copy.deepcopy(plain), (8, 32, 2))
    for model in (plain, net):
        model.train()
        model(x).square().sum().backward()
    for bits in (32, 2, 32):
        switch_(net, bits)
    assert_same_weights(
        {name: p.grad for name, p in plain.named_parameters()},
        {
            name: (net.get_parameter(name) if name in dict(net.named_parameters()) else bn_at(net, name, 32)).grad
            for name, _ in plain.named_parameters()
        },
    )
    assert torch.equal(net.eval()(x), plain.eval()(x))
    assert not torch.equal(switch_(net, 2)(x), plain(x))


def bn_at(net: nn.Module, name: str, bits: int) -> Tensor:
    module, _, kind = name.rpartition(".")
    return getattr(net.get_submodule(f"{module}.norms.{bits}"), kind)


@pytest.mark.parametrize("switched", [False, True])
def test_full_precision_with_residual_quantizers_is_the_plain_network_too(switched):
    plain, x = small().eval(), images()
    net = convert_(copy.deepcopy(plain), (32, 8), first_last_bits=8, quantize_residual=True)
    if switched:
        switch_(switch_(net, 8), 32)
    assert torch.equal(net(x), plain(x))


def test_a_single_precision():
    net = convert_(small(), bits=(8,))
    trained(net)
    assert dict(active_plan(net)) == dict.fromkeys(quantized_layers(net), 8)
    with pytest.raises(ValueError, match=r"one of the model's precisions \(8,\), got 4"):
        switch_(net, 4)


def test_switching_and_back_changes_no_state():
    net = trained(convert_(small(), (8, 4, 2)))
    before, expected = weights(net), net(images())
    for bits in (2, 4, 8, 4, 8):
        assert switch_(net, bits) is net
    assert_same_weights(net, before)
    assert torch.equal(net(images()), expected)
    assert not torch.equal(switch_(net, 2)(images()), expected)


def test_plans_switch_layers_and_their_batch_normalisations():
    net = convert_(small(), (8, 4, 2))
    names = list(quantized_layers(net))
    plan = BitPlan({name: (8, 4, 2)[n % 3] for n, name in enumerate(names)})
    switch_(net, plan)
    assert active_plan(net) == plan
    norms = {name: net.get_submodule(name) for name in placed(net, MultiPrecisionBatchNorm)}
    followed = {norm.follows for norm in norms.values()}
    assert followed == {"stem.0", *names}
    assert norms["stages.0.0.bn1"].follows == "stages.0.0.conv1"
    assert norms["stages.1.0.shortcut.1"].follows == "stages.1.0.shortcut.0"
    for norm in norms.values():
        assert norm.num_bits == plan.get(norm.follows, 8)
    assert norms["stem.1"].num_bits == 8
    switch_(net, 2)
    assert {norm.num_bits for norm in norms.values()} == {2}


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_plan_in_use_is_the_network_in_use(bits):
    # Else a search that starts from the uniform nets would measure other networks than those that were trained.
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6),
                nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(864, 3),
            )  # fmt: skip

    net = trained(convert_(Net(), (8, 4, 2)))
    expected = switch_(net, bits)(images())
    assert torch.equal(switch_(net, active_plan(net))(images()), expected)


def test_wrong_switches_change_nothing():
    net = convert_(mlp(), (8, 4))
    switch_(net, 4)
    with pytest.raises(ValueError, match=r"bits must be one of the model's precisions \(8, 4\), got 6"):
        switch_(net, 6)
    with pytest.raises(ValueError, match=r"missing: \['2'\], not in the model: \['3'\]"):
        switch_(net, {"3": 8})
    with pytest.raises(ValueError, match=r"layer '2' was converted for \(8, 4\) bits, the plan says 2"):
        switch_(net, {"2": 2})
    with pytest.raises(ValueError, match="Sequential has no quantized layers; convert_ it first"):
        switch_(mlp(), 4)
    assert dict(active_plan(net)) == {"2": 4}


def test_a_precision_that_is_no_integer_never_half_switches():
    net = convert_(small(), (8, 4))
    try:
        switch_(net, 4.0)
    except (TypeError, ValueError):
        switch_(net, 8)
    net(images())


def test_each_precision_has_its_scales():
    net = trained(convert_(small(), (8, 4)))
    groups = scale_parameters(net)
    layers = quantized_layers(net)
    assert set(groups) == {None, 8, 4}
    assert len(groups[None]) == len(groups[8]) == len(groups[4]) == len(layers)
    with torch.no_grad():
        for scale in groups[None] + groups[8]:
            scale.fill_(-1.0)
    clamp_scales_(net)
    assert all((scale == 1e-8).all() for scale in groups[None] + groups[8])
    assert all((scale > 1e-8).all() for scale in groups[4])


def test_there_is_nothing_to_clamp_in_a_plain_model():
    clamp_scales_(mlp())


# Checkpoints


def test_a_checkpoint_of_the_fp32_network_loads_and_scales_start_anew():
    plain = small(num_classes=7)
    for _ in range(3):
        plain.train()(images())
    net = trained(convert_(small(num_classes=7), (8, 4)))
    net.load_state_dict(plain.state_dict())
    state = net.state_dict()
    for name, value in plain.state_dict().items():
        if name in state:
            assert torch.equal(state[name], value)
        else:
            module, _, kind = name.rpartition(".")
            for bits in (8, 4):
                assert torch.equal(state[f"{module}.norms.{bits}.{kind}"], value)
    for layer in quantized_layers(net).values():
        assert torch.equal(layer.weight_scale, weight_scale(layer.weight, bits=8))
        assert not layer.input_quantizer.ready.any()
        assert not layer.input_quantizer.is_ready(8)
    expected = convert_(copy.deepcopy(plain), (8, 4)).eval()(images())
    assert torch.equal(net.eval()(images()), expected)


def test_the_state_of_a_converted_network_names_its_loader_where_it_does_not_fit():
    net = convert_(small())
    with pytest.raises(RuntimeError, match=r"lightning_plugins\.quantization\.load_converted\(model, checkpoint\)"):
        small().load_state_dict(net.state_dict())
    outer = nn.ModuleDict({"net": small()})
    with pytest.raises(RuntimeError, match=r"load_converted\(model, checkpoint\)"):
        outer.load_state_dict({f"net.{name}": value for name, value in net.state_dict().items()})
    assert list(net.state_dict()).count(SPEC_KEY) == 1


CONVERSIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "low": {"bits": (4, 3, 2)},
    "one": {"bits": (8,)},
    "full": {"bits": (32, 8, 4)},
    "ends": {"bits": (8, 2), "first_last_bits": 8},
    "residual": {"bits": (8, 4), "quantize_residual": True},
    "tensor": {"bits": (8, 4), "per_channel": False, "scale_grad": "exact", "input_init": "lsq"},
    "weights only": {"bits": (8, 4), "quantize_inputs": False, "batch_norm": "shared"},
    "some": {"bits": (8, 4), "exclude": ("stages.1.*",)},
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_converted_network_comes_back(name, tmp_path):
    net = trained(convert_(small(), **CONVERSIONS[name]))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    again = load_converted(small(), state)
    assert_same_weights(again, net)
    assert_same_network(again, net, images())
    load_converted(again, state)  # twice
    assert_same_network(again, net, images())
    torch.save({"epoch": 3, "pytorch-lightning_version": "2.6.6", "state_dict": state}, tmp_path / "lightning.ckpt")
    torch.save(state, tmp_path / "state.pt")
    for file in ("lightning.ckpt", "state.pt"):
        assert_same_network(load_converted(small(), str(tmp_path / file)), net, images())
    assert load_converted(small(), tmp_path / "state.pt").state_dict().keys() == state.keys()


def test_loading_leaves_the_checkpoint_as_it_was():
    net = convert_(small())
    for state in (net.state_dict(), small().state_dict()):
        keys = list(state)
        net.load_state_dict(state)
        assert list(state) == keys


def test_a_model_at_lower_bits_is_loaded_as_such_or_at_the_highest():
    net = switch_(convert_(small(), (8, 4)), 4)
    assert set(active_plan(load_converted(small(), net.state_dict())).values()) == {8}


def test_a_lightning_module_is_converted_and_loaded_whole(tmp_path):
    module = convert_(TinyModule(), (8, 4), first_last_bits=8)
    trained(module, torch.randn(16, 8))
    torch.save({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    assert_same_network(load_converted(TinyModule(), tmp_path / "last.ckpt"), module, torch.randn(5, 8))


def test_a_converted_part_of_a_module_comes_back(tmp_path):
    module = TinyModule()
    convert_(module.net, (8, 4), first_last_bits=8)
    trained(module, torch.randn(16, 8))
    again = load_converted(TinyModule(), {"state_dict": module.state_dict()})
    assert_same_network(again, module, torch.randn(5, 8))
    restore_(module)
    assert list(module.state_dict()) == list(TinyModule().state_dict())


def test_a_plain_checkpoint_is_not_one_of_a_converted_model():
    with pytest.raises(ValueError, match="not the checkpoint of a converted model; load it with load_state_dict"):
        load_converted(small(), small().state_dict())


def test_a_checkpoint_of_another_architecture_leaves_the_model_plain():
    from lightning_plugins.models import convnet3

    net, other = convert_(small()), convnet3(width=4)
    before = list(other.state_dict())
    with pytest.raises(RuntimeError):
        load_converted(other, net.state_dict())
    assert list(other.state_dict()) == before
    shallow = nn.Sequential(*list(small().children())[:2])
    with pytest.raises(RuntimeError):
        load_converted(shallow, net.state_dict())
    assert placed(shallow, MultiPrecisionBatchNorm) == []


@pytest.mark.parametrize("batch_norm", ["per_precision", "shared"])
def test_a_checkpoint_of_other_precisions_is_refused(batch_norm):
    arguments: dict[str, Any] = {"quantize_inputs": False, "batch_norm": batch_norm}
    net = convert_(small(), (8, 4), **arguments)
    with pytest.raises(RuntimeError):
        convert_(small(), (4, 2), **arguments).load_state_dict(net.state_dict())


def test_copies_and_pickles_are_the_same_network():
    net = trained(convert_(small(), (8, 4), quantize_residual=True))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for again in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert_same_weights(again, net)
        assert_same_network(again, net, images())
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.add_(1.0)
        assert not torch.equal(again.eval()(images()), net.eval()(images()))
        restore_(again)
        assert list(again.state_dict()) == list(small().state_dict())
    assert SPEC_KEY in net.state_dict()


# Restoring


@pytest.mark.parametrize("name", CONVERSIONS)
def test_restoring_gives_the_fp32_network(name):
    plain, x = small().eval(), images()
    net = copy.deepcopy(plain)
    attributes = {path: set(vars(module)) for path, module in net.named_modules()}
    convert_(net, **CONVERSIONS[name])
    assert restore_(net) is net
    assert [(path, type(module)) for path, module in net.named_modules()] == [
        (path, type(module)) for path, module in plain.named_modules()
    ]
    assert list(net.state_dict()) == list(plain.state_dict())
    assert_same_weights(net, plain)
    assert torch.equal(net(x), plain(x))
    for path, module in net.named_modules():
        assert set(vars(module)) == attributes[path], path
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks
    small().load_state_dict(net.state_dict())


def test_restoring_keeps_what_was_learned():
    net = trained(convert_(small(), (8, 4)))
    weight, norm = net.stages[0][0].conv1.weight, net.stages[0][0].bn1.norms["8"]
    assert not torch.equal(norm.running_mean, net.stages[0][0].bn1.norms["4"].running_mean)
    restore_(net)
    assert net.stages[0][0].conv1.weight is weight
    assert net.stages[0][0].bn1 is norm
    assert restore_(net) is net  # nothing to do


def test_packed_layers_cannot_be_restored():
    net = convert_(mlp(), (8, 4))
    net[2].keep_only_codes_(net[2].weight_codes(8))
    with pytest.raises(ValueError, match="no fp32 weights to restore"):
        restore_(net)


# Pruning and parametrizations


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruning_goes_together_with_quantization(when):
    net, x = mlp(), torch.randn(32, 8)
    if when == "after":
        convert_(net, (8, 4))
    prune.l1_unstructured(net[2], "weight", amount=0.5)
    if when == "before":
        convert_(net, (8, 4))
    mask = net[2].weight_mask
    for bits in (8, 4):
        switch_(net, bits).train()
        net.zero_grad()
        net(x).square().sum().backward()
        assert (net[2].weight_codes()[mask == 0] == 0).all()
        assert (net[2].quantized_weight()[mask == 0] == 0).all()
        assert (net[2].weight_orig.grad[mask == 0] == 0).all()
        assert (net[2].weight_orig.grad[mask == 1] != 0).any()
    with torch.no_grad():
        net[2].weight_orig.add_(0.1)
    net(x)
    assert torch.equal(net[2].weight, net[2].weight_orig * mask)
    again = mlp()
    prune.identity(again[2], "weight")
    load_converted(again, net.state_dict())
    assert_same_network(net, again, x)
    output = switch_(net, 4)(x)
    prune.remove(net[2], "weight")
    assert torch.equal(net(x), output)
    restore_(net)
    assert net.state_dict().keys() == mlp().state_dict().keys()
    assert (net[2].weight[mask == 0] == 0).all()


@pytest.mark.parametrize("kind", ["pruned", "parametrized"])
def test_a_checkpoint_of_the_fp32_network_sets_the_scales_of_effective_weights(kind):
    def make() -> nn.Module:
        net = mlp()
        if kind == "pruned":
            prune.l1_unstructured(net[2], "weight", amount=0.5)
        else:
            parametrizations.weight_norm(net[2])
        return net

    plain = make()
    with torch.no_grad():
        (plain[2].weight_orig if kind == "pruned" else plain[2].parametrizations.weight.original0).mul_(100)
    plain(torch.randn(3, 8))
    net = convert_(make(), (8, 4))
    net.load_state_dict(plain.state_dict())
    torch.testing.assert_close(net[2].weight_scale, weight_scale(plain[2].weight, bits=8))
    torch.testing.assert_close(net[2].weight_codes(), convert_(plain, (8, 4))[2].weight_codes())


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrizations_go_together_with_quantization(when):
    net, x = mlp(), torch.randn(32, 8)
    if when == "after":
        convert_(net, (8, 4))
    parametrizations.weight_norm(net[2])
    if when == "before":
        convert_(net, (8, 4))
    layer = net[2]
    assert list(quantized_layers(net)) == ["2"]
    for bits in (8, 4):
        switch_(net, bits).train()
        net.zero_grad()
        net(x).square().sum().backward()
        assert (layer.parametrizations.weight.original0.grad != 0).any()
        quantized = layer.weight_codes() * (layer.weight_scale * 2 ** (8 - bits)).view(-1, 1)
        torch.testing.assert_close(layer.quantized_weight(), quantized)
    copied = copy.deepcopy(net)
    assert_same_network(copied, net, x)
    again = mlp()
    parametrizations.weight_norm(again[2])
    assert_same_network(load_converted(again, net.state_dict()), net, x)
    output = switch_(net, 4)(x)
    parametrize.remove_parametrizations(again[2], "weight")
    assert type(again[2]) is QuantLinear
    torch.testing.assert_close(switch_(again, 4)(x), output)
    restore_(net)
    assert isinstance(net[2], nn.Linear)
    assert not isinstance(net[2], QuantLinear)
    torch.testing.assert_close(net[2](x), F.linear(x, net[2].weight, net[2].bias))
    parametrize.remove_parametrizations(net[2], "weight")
    assert type(net[2]) is nn.Linear
    assert net.state_dict().keys() == mlp().state_dict().keys()


@pytest.mark.parametrize("kind", ["pruned", "parametrized"])
def test_packing_removes_every_form_of_the_weight(kind):
    net, x = mlp(), torch.randn(3, 8)
    if kind == "pruned":
        prune.l1_unstructured(net[2], "weight", amount=0.5)
    else:
        parametrizations.weight_norm(net[2])
    convert_(net, (8, 4)).eval()
    output = net(x).detach()
    net[2].keep_only_codes_(net[2].weight_codes(8))
    assert torch.equal(net(x), output)
    assert not [name for name in net.state_dict() if name.startswith("2.") and ("weight_" in name or "param" in name)
                and name != "2.weight_scale"]  # fmt: skip


# Residual sums


def residual_places(net: nn.Module) -> tuple[list[str], list[str]]:
    found: tuple[list[str], list[str]] = [], []
    for name, module in net.named_modules():
        if isinstance(module, ResidualQuantizer):
            found[module.to_output].append(name.removesuffix(".residual_quantizer"))
    return found


def test_residual_quantizers_of_our_resnet20():
    net = convert_(small(), quantize_residual=True)
    inputs, outputs = residual_places(net)
    # Also those that change shapes, where two layers read the input.
    assert inputs == [f"stages.{s}.{b}" for s in range(3) for b in range(3)]
    assert sorted(outputs) == sorted(
        [f"stages.{s}.{b}.bn2" for s in range(3) for b in range(3)] + [f"stages.{s}.0.shortcut.1" for s in (1, 2)]
    )
    for name, layer in quantized_layers(net).items():
        reads_block_input = name.endswith(("conv1", "shortcut.0"))
        assert (8 not in layer.input_quantizer.bits) == reads_block_input, name
        assert layer.shared_input_bits == (8 if reads_block_input else 0)


def test_residual_quantizers_of_a_torchvision_resnet():
    net = convert_(resnet18(num_classes=3), (8, 4), quantize_residual=True)
    inputs, outputs = residual_places(net)
    assert inputs == [f"layer{s}.{b}" for s in range(1, 5) for b in range(2)]
    blocks = [f"layer{s}.{b}.bn2" for s in range(1, 5) for b in range(2)]
    assert sorted(outputs) == sorted(blocks + [f"layer{s}.0.downsample.1" for s in (2, 3, 4)])


def test_residual_quantizers_of_a_torchvision_mobilenet():
    net = mobilenet_v3_small(num_classes=3)
    blocks = [name for name, module in net.named_modules() if getattr(module, "use_res_connect", False)]
    last = [f"{name}.block.{len(net.get_submodule(name).block) - 1}.1" for name in blocks]
    assert len(blocks) == 6
    convert_(net, (8, 4), quantize_residual=True)
    assert residual_places(net) == (blocks, last)
    trained(net, images(size=32))
    assert_same_network(load_converted(mobilenet_v3_small(num_classes=3), net.state_dict()), net, images(size=32))
    depthwise = [layer for layer in quantized_layers(net).values() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert len(depthwise) == 11
    assert {layer.bits for layer in depthwise} == {(8,)}


@pytest.mark.parametrize("bits", [8, 4])
def test_both_summands_are_on_a_grid_of_256_values(bits):
    net = trained(convert_(small(), (8, 4), quantize_residual=True))
    seen: dict[str, Tensor] = {}
    block = net.stages[0][1]
    block.conv1.register_forward_pre_hook(lambda module, args: seen.update(input=args[0]))
    block.shortcut.register_forward_hook(lambda module, args, output: seen.update(shortcut=output))
    block.relu2.register_forward_pre_hook(lambda module, args: seen.update(sum=args[0]))
    switch_(net, bits)(images())
    first, second = block.residual_quantizer, block.bn2.residual_quantizer
    assert seen["input"] is seen["shortcut"]
    for value, quantizer in ((seen["shortcut"], first), (seen["sum"] - seen["shortcut"], second)):
        codes = value.detach() / quantizer.scales["8"].detach()
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert codes.round().min() >= (-128 if quantizer.signed else 0)
    assert not first.signed
    assert second.signed


def test_where_no_sum_is_found_there_is_an_error_and_no_change():
    net = mlp()
    with pytest.raises(ValueError, match=r"no residual sum was found in Sequential.*leave quantize_residual=False"):
        convert_(net, quantize_residual=True)
    assert list(net.state_dict()) == list(mlp().state_dict())


def test_a_sum_without_a_place_for_its_quantizer_is_an_error():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()
            self.last = nn.Linear(NUM_CLASSES, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.relu(self.last(self.layers(x)))

    with pytest.raises(ValueError, match=r"a summand in '1' comes from .*relu.*make it a module of its own"):
        convert_(nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 3)), quantize_residual=True)


def test_a_network_that_cannot_be_traced_is_converted_all_the_same():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                raise ValueError("too bright")
            return self.net(x)

    net = convert_(Branching(), (8, 4), quantize_residual=True)
    assert net.net.stages[0][0].bn1.follows == "net.stages.0.0.conv1"
    assert len(placed(net, ResidualQuantizer)) == 20
    trained(net)


def test_conversion_leaves_the_model_as_it_is_otherwise():
    net = small()
    net.train()
    net.stages[1].eval()
    net.stages[0][0].conv1.weight.requires_grad_(False)
    state, modes = torch.get_rng_state(), {name: module.training for name, module in net.named_modules()}
    convert_(net, (8, 4), quantize_residual=True)
    assert torch.equal(torch.get_rng_state(), state)
    for name, mode in modes.items():
        assert net.get_submodule(name).training == mode, name
    assert not net.stages[0][0].conv1.weight.requires_grad
    for name in placed(net, InputQuantizer) + placed(net, MultiPrecisionBatchNorm):
        parent = net.get_submodule(name.rpartition(".")[0])
        assert net.get_submodule(name).training == parent.training, name
