from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_plugins.models.binary_resnet import BinaryResNet, binary_resnet20
from lightning_plugins.quantization.binary import (
    binary_activation,
    normalize_samples,
    periodic_binary,
    periodic_regularizer,
    quantization_error,
    sign_ste,
)
from lightning_plugins.quantization.binary_deploy import export_binary_onnx, load_binary, save_binary, to_deploy_binary
from lightning_plugins.quantization.binary_layers import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    binary_layers,
    convert_binary_,
    load_binary_checkpoint,
    restore_binary_,
    set_frequency_,
    set_stage_,
)
from lightning_plugins.quantization.figures import binary_figure
from toys import assert_same_weights


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_net() -> nn.Sequential:
    """All three kinds of layers between two that stay real."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Hardtanh(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.Flatten(2),
        nn.Conv1d(6, 5, 3, padding="same", padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(80, 12),
        nn.Hardtanh(),
        nn.Linear(12, 3),
    )


# Functions


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("frequency", [1.0, 20.0])
def test_the_weight_is_periodic(stage, frequency):
    weight = randn(1000, dtype=torch.float64)
    shifted = weight + 2 * math.pi / frequency
    torch.testing.assert_close(
        periodic_binary(shifted, frequency, stage=stage), periodic_binary(weight, frequency, stage=stage)
    )
    half = periodic_binary(weight + math.pi / frequency, frequency, stage=stage)
    torch.testing.assert_close(half, -periodic_binary(weight, frequency, stage=stage))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stage_2_is_exactly_minus_or_plus_one(dtype):
    weight = torch.cat([randn(10_000), torch.tensor([0.0, -0.0, 1e-30])]).to(dtype)
    binary = periodic_binary(weight, 20.0)
    assert binary.dtype == dtype
    assert binary.unique().tolist() == [-1.0, 1.0]
    assert binary[-3:].tolist() == [1.0, 1.0, 1.0]
    assert binary_activation(weight).unique().tolist() == sign_ste(weight).unique().tolist() == [-1.0, 1.0]
    assert binary_activation(weight)[-3:].tolist() == sign_ste(weight)[-3:].tolist() == [1.0, 1.0, 1.0]


def test_what_is_not_finite_is_not_hidden():
    wrong = torch.tensor([math.nan])
    assert periodic_binary(wrong, 20.0).isnan()
    assert binary_activation(wrong).isnan()
    assert sign_ste(wrong).isnan()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_gradient_is_that_of_the_sine(stage):
    weight = randn(50, dtype=torch.float64).requires_grad_()
    upstream = randn(50, seed=1, dtype=torch.float64)
    (grad,) = torch.autograd.grad(periodic_binary(weight, 20.0, stage=stage), weight, upstream)
    torch.testing.assert_close(grad, upstream * 20 * torch.cos(20 * weight))


def test_gradcheck_of_stage_1_and_of_the_regularizer():
    weight = randn(6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: periodic_binary(w, 20.0, stage=1), weight)
    assert torch.autograd.gradcheck(lambda w: periodic_regularizer(w, 20.0), weight)


def test_the_gradient_of_activations_is_a_triangle():
    inputs = torch.tensor([-1.5, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0], requires_grad=True)
    binary_activation(inputs).backward(torch.full((7,), 2.0))
    assert inputs.grad.tolist() == [0, 0, 3, 4, 2, 0, 0]
    # Its integral goes from -1 to 1: on average an activation moves as far as the sign does.
    dense = torch.linspace(-2, 2, 4001, dtype=torch.float64, requires_grad=True)
    binary_activation(dense).sum().backward()
    torch.testing.assert_close(torch.trapezoid(dense.grad, dense.detach()).item(), 2.0, rtol=1e-6, atol=0)


def test_binary_activation_under_vmap():
    inputs = randn(4, 3)
    grads = torch.func.vmap(torch.func.grad(lambda x: binary_activation(x).sum()))(inputs)
    torch.testing.assert_close(grads, (2 - 2 * inputs.abs()).clamp_min(0))


def test_the_straight_through_gradient_has_its_limits_included():
    weight = torch.tensor([-1.1, -1.0, 0.2, 1.0, 1.1], requires_grad=True)
    sign_ste(weight).sum().backward()
    assert weight.grad.tolist() == [0, 1, 1, 1, 0]


def test_each_sample_is_normalised_by_its_own_variance():
    inputs = 5 * randn(3, 2, 4, 4) + 2
    normalised = normalize_samples(inputs)
    for sample, result in zip(inputs, normalised, strict=True):
        variance = ((sample - sample.mean()) ** 2).sum() / sample.numel()
        torch.testing.assert_close(result, sample / (variance + 1e-5) ** 0.5)
    assert normalize_samples(inputs.bfloat16()).dtype == torch.float32
    assert normalize_samples(torch.ones(2, 1)).isfinite().all()


@pytest.mark.parametrize("product", [0.5, 1.0, 2.0, 5.0, 20.0])
def test_quantization_error_of_laplace_weights_has_its_closed_form(product):
    frequency = 20.0
    uniform = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    weight = -product / frequency * uniform.sign() * torch.log1p(-2 * uniform.abs())
    s = 1 / product
    expected = 1 - s / math.tanh(math.pi * s / 2) / (1 + s**2)
    assert abs(float(quantization_error(weight, frequency)) - expected) < 2e-3


def test_quantization_error_is_the_distance_of_the_two_stages():
    weight = randn(100)
    distance = (periodic_binary(weight, 7.0, stage=1) - periodic_binary(weight, 7.0)).abs().mean()
    torch.testing.assert_close(quantization_error(weight, 7.0), distance)
    assert quantization_error(torch.zeros(3), 20.0) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_regularizer_and_its_gradient(sign):
    weight = randn(30, dtype=torch.float64).requires_grad_()
    value = periodic_regularizer(weight, 20.0, sign=sign)
    torch.testing.assert_close(value, sign * torch.sin(20 * weight).square().mean())
    (0.037 * value).backward()
    torch.testing.assert_close(weight.grad, sign * 0.037 * 20 * torch.sin(40 * weight.detach()) / 30)


@pytest.mark.parametrize("frequency", [0.0, -1.0, math.nan, math.inf, True])
def test_wrong_frequencies(frequency):
    for function in (periodic_binary, periodic_regularizer, quantization_error):
        with pytest.raises(
            ValueError, match="frequency must be positive and finite.*20.0|frequency .*must be a number, got nan"
        ):
            function(torch.zeros(1), frequency)


def test_wrong_arguments_of_functions():
    with pytest.raises(ValueError, match="stage must be 1 .* or 2 .*got 3"):
        periodic_binary(torch.zeros(1), 1.0, stage=3)
    with pytest.raises(ValueError, match="sign must be 1 .* or -1"):
        periodic_regularizer(torch.zeros(1), 1.0, sign=0)


# Layers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_layers_compute_what_the_paper_says(stage, training):
    net = convert_binary_(small_net(), keep_real=("first", "last"), stage=stage).train(training)
    assert [type(layer) for layer in binary_layers(net).values()] == [BinaryConv2d, BinaryConv1d, BinaryLinear]
    for layer, inputs in ((net[3], randn(4, 6, 8, 8)), (net[6], randn(4, 6, 16)), (net[8], randn(4, 80))):
        weight = torch.sin(20 * layer.weight)
        weight = weight if stage == 1 else torch.where(weight < 0, -1.0, 1.0)
        signs = torch.where(inputs < 0, -1.0, 1.0)
        if layer is net[3]:
            plain = F.conv2d(signs, weight, None, 2, 1, 1, 2)
        elif layer is net[6]:
            plain = F.conv1d(F.pad(signs, (1, 1), mode="circular"), weight)
        else:
            plain = F.linear(signs, weight)
        channels = (1, -1, *[1] * (inputs.ndim - 2))
        expected = plain * layer.alpha.view(channels) + layer.bias.view(channels)
        torch.testing.assert_close(layer(inputs), expected)
        torch.testing.assert_close(layer(inputs[0]), expected[0])  # without a batch


def test_gradients_reach_weights_scales_and_inputs():
    conv = convert_binary_(nn.Sequential(nn.Conv2d(3, 4, 3)), keep_real=(), stage=2)[0]
    inputs = randn(2, 3, 5, 5).requires_grad_()
    upstream = randn(2, 4, 3, 3, seed=1)
    conv(inputs).backward(upstream)
    signs = torch.where(inputs < 0, -1.0, 1.0).detach()
    weight = periodic_binary(conv.weight, 20.0).detach().requires_grad_()
    F.conv2d(signs, weight).backward(upstream * conv.alpha.detach())
    torch.testing.assert_close(conv.weight.grad, weight.grad * 20 * torch.cos(20 * conv.weight.detach()))
    torch.testing.assert_close(
        conv.alpha.grad, (upstream * F.conv2d(signs, weight)).sum((0, 2, 3), keepdim=True)[0].detach()
    )
    assert conv.alpha.shape == (4, 1, 1)
    reference = inputs.detach().clone().requires_grad_()
    normalised = normalize_samples(reference)
    signs = signs.clone().requires_grad_()
    F.conv2d(signs, weight.detach()).backward(upstream * conv.alpha.detach())
    normalised.backward(signs.grad * (2 - 2 * normalised.detach().abs()).clamp_min(0))
    torch.testing.assert_close(inputs.grad, reference.grad)


def test_evaluation_does_not_depend_on_the_scale_of_inputs():
    conv = convert_binary_(nn.Sequential(nn.Conv2d(3, 4, 3)), keep_real=(), stage=2)[0]
    inputs = randn(2, 3, 5, 5)
    in_training = conv(inputs)
    conv.eval()
    assert torch.equal(conv(inputs), conv(1000 * inputs))
    assert torch.equal(conv(inputs), in_training)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_sine_stays_in_float32(stage):
    """In bfloat16 the phase of a large weight would be wrong by radians."""
    net = convert_binary_(nn.Sequential(nn.Linear(64, 64)), keep_real=(), stage=stage)
    nn.init.normal_(net[0].weight, std=5.0)
    expected = net[0].binary_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net[0].binary_weight(), expected)
        assert net(randn(2, 64)).dtype == torch.bfloat16
    half = net.bfloat16()[0]
    exact = periodic_binary(half.weight.float(), 20.0, stage=stage)
    torch.testing.assert_close(half.binary_weight(), exact.bfloat16(), rtol=0, atol=0)
    assert half(randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_a_compiled_net_gives_the_same():
    layer = convert_binary_(nn.Sequential(nn.Linear(6, 4)), keep_real=(), stage=2)[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = randn(2, 6)
    expected, found = layer(inputs), compiled(inputs)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(output.sum(), layer.weight)[0] for output in (expected, found)]
    torch.testing.assert_close(*grads)


# Conversion


def test_first_last_shortcuts_and_depthwise_layers_stay_real():
    from torchvision.models import resnet18

    net = convert_binary_(resnet18(num_classes=5))
    assert len(binary_layers(net)) == 16
    assert not {"conv1", "fc", "layer2.0.downsample.0"} & binary_layers(net).keys()
    everything = convert_binary_(resnet18(num_classes=5), keep_real=())
    assert {"conv1", "fc", "layer2.0.downsample.0"} <= binary_layers(everything).keys()
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    assert list(binary_layers(convert_binary_(depthwise, keep_real=("depthwise",)))) == ["1"]


def test_a_third_party_net_trains_and_deploys():
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    for part in list(net.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU):
                setattr(part, name, nn.Hardtanh())
    convert_binary_(net, stage=2)
    images = torch.rand(2, 3, 32, 32)
    net(images).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
    net.eval()
    torch.testing.assert_close(to_deploy_binary(net)(images), net(images))


def test_conversion_keeps_objects_names_hooks_and_draws_nothing_from_the_global_generator():
    net = small_net()
    weights, layers, calls = [id(p) for p in net.parameters()], list(net), []
    net[3].register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    convert_binary_(net, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(net) == layers
    assert [id(p) for name, p in net.named_parameters() if not name.endswith("alpha")] == weights
    net(randn(2, 1, 8, 8))
    assert calls
    assert all((net[i].alpha > 0).all() and (net[i].alpha < 1).all() for i in (3, 6, 8))
    again, other = convert_binary_(small_net(), seed=3), convert_binary_(small_net(), seed=4)
    assert torch.equal(net[3].alpha, again[3].alpha)
    assert not torch.equal(net[3].alpha, other[3].alpha)


def test_restore_leaves_no_trace():
    net, plain = small_net(), small_net()
    parametrizations.weight_norm(net[3])
    parametrizations.weight_norm(plain[3])
    attributes = [set(vars(module)) for module in plain.modules()]
    convert_binary_(net)
    assert isinstance(net[3], BinaryConv2d)
    assert net[3].binary_weight().requires_grad
    restore_binary_(net)
    assert [set(vars(module)) for module in net.modules()] == attributes
    assert [type(module).__name__ for module in net.modules()] == [type(m).__name__ for m in plain.modules()]
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert_same_weights(net, plain)
    assert not net._state_dict_hooks
    assert not net._load_state_dict_pre_hooks
    torch.testing.assert_close(net(randn(2, 1, 8, 8)), plain(randn(2, 1, 8, 8)))


def test_transformers_do_not_read_past_the_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = convert_binary_(nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 2)), stage=2).eval()
    assert list(binary_layers(net)) == ["1.linear1", "1.linear2"]
    calls = []
    layer.linear1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        net(randn(2, 3, 8))
    assert calls
    assert not restore_binary_(net)[1]._forward_pre_hooks


def test_wrong_conversions():
    with pytest.raises(ValueError, match="nothing is left to make binary in Sequential.*keep_real="):
        convert_binary_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="binary already; restore_binary_"):
        convert_binary_(convert_binary_(small_net()))
    with pytest.raises(ValueError, match="include: no Conv1d.* matches 'conv.*they are 0, 3"):
        convert_binary_(small_net(), include=["conv*"])
    with pytest.raises(TypeError, match=r"write \['3'\]"):
        convert_binary_(small_net(), exclude="3")
    with pytest.raises(ValueError, match="keep_real must be among .*got .'middle'"):
        convert_binary_(small_net(), keep_real=["middle"])
    with pytest.raises(TypeError, match="must be a sequence, each 'first' or"):
        convert_binary_(small_net(), keep_real="first")
    with pytest.raises(ValueError, match="estimator must be 'periodic' or 'sign'"):
        convert_binary_(small_net(), estimator="cosine")
    with pytest.raises(ValueError, match="run a batch through the model"):
        convert_binary_(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="no binary layers; convert_binary_ it first"):
        set_stage_(small_net(), 2)
    with pytest.raises(ValueError, match="stage must be"):
        set_stage_(convert_binary_(small_net()), 0)
    with pytest.raises(ValueError, match="frequency must be"):
        set_frequency_(convert_binary_(small_net()), -2.0)


def test_the_sign_estimator_is_the_plain_binary_layer():
    net = convert_binary_(small_net(), estimator="sign", stage=2)
    assert torch.equal(net[3].binary_weight(), sign_ste(net[3].weight))
    set_stage_(net, 1)
    assert torch.equal(net[3].binary_weight(), net[3].weight.clamp(-1, 1))


# Checkpoints


def test_stage_2_takes_stage_1s_weights_and_keeps_their_signs():
    first = convert_binary_(small_net(), frequency=11.0, seed=1)
    second = convert_binary_(small_net(), stage=2, seed=2)
    second.load_state_dict(first.state_dict())
    assert second[3].frequency == 11.0  # weights have their signs at their own frequency only
    assert second[3].stage == 1
    set_stage_(second, 2)
    for name, layer in binary_layers(first).items():
        assert torch.equal(layer.binary_weight().sign(), binary_layers(second)[name].binary_weight())
        assert torch.equal(layer.alpha, binary_layers(second)[name].alpha)


def test_a_checkpoint_says_what_it_is(tmp_path):
    net = set_stage_(convert_binary_(small_net(), frequency=7.0, exclude=["8"]), 2).eval()
    path = tmp_path / "net.pt"
    torch.save({"state_dict": net.state_dict()}, path)
    state = torch.load(path, weights_only=True)["state_dict"]
    with pytest.raises(RuntimeError, match="load_binary_checkpoint.*BinaryQAT"):
        small_net().load_state_dict(state)
    for source in (path, state):
        loaded = load_binary_checkpoint(small_net(), source).eval()
        assert list(binary_layers(loaded)) == ["3", "6"]
        assert torch.equal(loaded(randn(2, 1, 8, 8)), net(randn(2, 1, 8, 8)))
    part = nn.Sequential(convert_binary_(small_net(), frequency=7.0, stage=2))  # a part of a larger module
    loaded = load_binary_checkpoint(nn.Sequential(small_net()), part.state_dict())
    assert loaded[0][3].frequency == 7.0
    with pytest.raises(RuntimeError, match="other layers are binary in the checkpoint"):
        convert_binary_(small_net()).load_state_dict(state)
    with pytest.raises(ValueError, match="not the checkpoint of a binary model"):
        load_binary_checkpoint(small_net(), small_net().state_dict())
    with pytest.raises(RuntimeError, match="another architecture"):
        load_binary_checkpoint(nn.Sequential(nn.Linear(2, 2)), state)


def test_a_checkpoint_of_the_plain_net_loads_into_a_binary_one():
    plain, net = small_net(), convert_binary_(small_net())
    with torch.no_grad():
        plain[3].weight.add_(1)
    alpha = net[3].alpha.detach().clone()
    net.load_state_dict(plain.state_dict())
    assert torch.equal(net[3].weight, plain[3].weight)
    assert torch.equal(net[3].alpha, alpha)


# Deployment


def trained_digits() -> tuple[nn.Module, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    torch.manual_seed(0)
    net = convert_binary_(BinaryResNet(1, in_channels=1, width=8), stage=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(25):
        batch = slice(step * 48, step * 48 + 48)
        optimizer.zero_grad()
        F.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    return net.eval(), images[1200:]


def test_deployed_saved_and_onnx_nets_agree_on_digits(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, images = trained_digits()
    with torch.no_grad():
        expected = net(images)
    deployed = to_deploy_binary(net)
    torch.testing.assert_close(deployed(images), expected)
    loaded = load_binary(save_binary(net, tmp_path / "net.safetensors"), BinaryResNet(1, in_channels=1, width=8))
    assert torch.equal(loaded(images), deployed(images))
    path = export_binary_onnx(net, tmp_path / "net.onnx", example_input=images[:8])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.995
    assert expected.argmax(1).unique().numel() > 3
    import onnx

    codes = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8
    ]
    assert len(codes) == 3
    assert all(set(each.flatten()) == {-1, 1} for each in codes)


def test_a_file_has_one_bit_for_each_weight(tmp_path):
    net = set_stage_(convert_binary_(small_net()), 2)
    tensors = safetensors.torch.load_file(save_binary(net, tmp_path / "net.safetensors"))
    weight = net[6].weight  # 5 x 6 x 3 = 90 weights take 12 bytes
    signs = tensors["6.signs"]
    assert signs.dtype == torch.uint8
    assert len(signs) == 12
    bits = [bool(int(signs[i // 8]) >> (i % 8) & 1) for i in range(90)]
    assert bits == (periodic_binary(weight, 20.0).flatten() > 0).tolist()
    assert not any(name in tensors for name in ("3.weight", "6.weight", "8.weight"))
    assert {"0.weight", "3.alpha", "3.bias", "1.running_mean"} <= tensors.keys()


def test_deployment_makes_pruning_and_parametrizations_permanent_in_the_copy_alone(tmp_path):
    net = small_net()
    prune.l1_unstructured(net[3], "weight", amount=0.3)
    parametrizations.weight_norm(net[8])
    set_stage_(convert_binary_(net), 2).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = randn(3, 1, 8, 8)
    deployed = to_deploy_binary(net)
    torch.testing.assert_close(deployed(images), net(images))
    assert "weight_orig" not in dict(deployed[3].named_parameters())
    assert_same_weights(net, before)
    assert isinstance(net[3], BinaryConv2d)
    loaded = load_binary(save_binary(net, tmp_path / "net.safetensors"), small_net())
    assert torch.equal(loaded(images), deployed(images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_stage_1_and_diverged_nets_are_not_deployed(tmp_path):
    net = convert_binary_(small_net())
    with pytest.raises(ValueError, match="stage 1, where weights are real; train stage 2, or set_stage_"):
        save_binary(net, tmp_path / "net.safetensors")
    set_stage_(net, 2)
    net[3].weight.data[0] = math.nan
    with pytest.raises(ValueError, match="'3' has weights that are not finite"):
        save_binary(net, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="convert_binary_ it first"):
        to_deploy_binary(small_net())
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_files_are_refused(tmp_path):
    net = set_stage_(convert_binary_(small_net()), 2)
    path = save_binary(net, tmp_path / "net.safetensors")
    content = path.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for position in range(0, len(content), 97):
        bad.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(ValueError, match="bad.safetensors"):
            load_binary(bad, small_net())
    for length in (0, 7, 100, len(content) - 1):
        bad.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged.*copy it again"):
            load_binary(bad, small_net())
    bad.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    with pytest.raises(ValueError, match="none that save_binary wrote"):
        load_binary(bad, small_net())
    with pytest.raises(FileNotFoundError):
        load_binary(tmp_path / "absent", small_net())


def test_files_of_other_architectures_are_refused(tmp_path):
    path = save_binary(set_stage_(convert_binary_(small_net()), 2), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="another architecture: layer '3' had a weight"):
        load_binary(path, nn.Sequential(nn.Linear(2, 2)))
    wide = small_net()
    wide[10] = nn.Linear(12, 4)
    with pytest.raises(ValueError, match="another architecture: '10.bias' has shape"):
        load_binary(path, wide)
    assert type(wide[3]) is nn.Conv2d  # refused before anything is changed
    with pytest.raises(ValueError, match="not binary; make a fresh one"):
        load_binary(path, load_binary(path, small_net()))


# The net


@pytest.mark.parametrize("size", [4, 7, 28])
def test_the_binary_resnet_takes_images_of_any_size(size):
    net = binary_resnet20(in_channels=1, width=4)
    assert net(torch.rand(2, 1, size, size)).shape == (2, 10)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 19  # and the classifier: 20
    assert not any(isinstance(module, nn.ReLU) for module in net.modules())
    assert len(binary_layers(convert_binary_(net))) == 18


def test_the_shortcuts_of_the_binary_resnet_have_no_parameters():
    net = BinaryResNet(1, in_channels=2, width=3).eval()
    unit = net.stages[1][0]
    nn.init.zeros_(unit.conv.weight)
    inputs = randn(1, 3, 4, 4)
    pooled = F.avg_pool2d(inputs, 2).clamp(-1, 1)
    outputs = unit(inputs)
    torch.testing.assert_close(outputs[:, 1:4], pooled)
    assert not outputs[:, :1].any()
    assert not outputs[:, 4:].any()
    with pytest.raises(ValueError, match="width must be at least 1"):
        binary_resnet20(width=0)


def test_the_figure_has_a_bar_for_each_layer():
    figure = binary_figure(convert_binary_(small_net()))
    waves, errors = figure.axes
    assert len(errors.patches) == 3
    assert abs(sum(bar.get_height() for bar in waves.patches) - 100) < 1e-3
