"""The ONNX file: what is in it, what onnxruntime makes of it, and that both compute what torch does."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_plugins.data import DigitsDataModule
from lightning_plugins.models import CifarResNet
from lightning_plugins.modules import ImageClassifier
from lightning_plugins.quantization import BitPlan, convert_, quantized_layers, switch_
from lightning_plugins.quantization import onnx as module_under_test
from lightning_plugins.quantization.convert import clamp_scales_
from lightning_plugins.quantization.deploy import DeployConv, DeployQuantizer, to_deploy
from lightning_plugins.quantization.onnx import export_onnx
from toys import make_trainer

BITS = (8, 4, 2)
PLAIN = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
DEFAULT = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def run(path: Path, *inputs: Tensor, level: Any = DEFAULT, optimized: Path | None = None) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    return torch.from_numpy(output)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def assert_equal_up_to_ties(found: Tensor, wanted: Tensor) -> None:
    """Nearly all rows to 1e-5; in the others an activation fell on the other side of a boundary between codes."""
    difference = (found - wanted).abs().flatten(1).amax(1)
    assert (difference < 1e-5 * max(1.0, float(wanted.abs().max()))).float().mean() >= 0.8, difference
    assert difference.max() < 0.2 * wanted.abs().max()


def set_scales(model: nn.Module, inputs: Tensor, bits: tuple[int, ...] = BITS) -> nn.Module:
    """What training would leave: every scale and affine parameter is something of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for b in bits:
            switch_(model.train(), b)(inputs)
        for name, parameter in model.named_parameters():
            if "scale" in name:
                parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
                norm.weight[::3] *= -1
                norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
    return model.eval()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 5),
    )


IMAGES = torch.rand(32, 3, 7, 7, generator=torch.Generator().manual_seed(1))


MIXED = BitPlan({"0": 8, "3": 2, "6": 4, "9": 8})


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return set_scales(convert_(small_net(), BITS, first_last_bits=2), IMAGES)


@pytest.fixture(scope="module")
def files(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """The small net at each precision, exported from a single example."""
    folder = tmp_path_factory.mktemp("onnx")
    plans = {8: 8, 4: 4, "mixed": MIXED}
    return {
        name: export_onnx(net, folder / f"of {name}" / "net.onnx", bits=plan, example_input=IMAGES[:1])
        for name, plan in plans.items()
    }


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A residual network that reads digits, trained at 8 and 4 bits."""
    torch.manual_seed(0)
    images, labels = digits
    model = CifarResNet(1, in_channels=1, width=8)
    for converted in (False, True):
        if converted:
            convert_(model, (8, 4), quantize_residual=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02 if converted else 0.1, momentum=0.9)
        for _ in range(60 if converted else 80):
            batch = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            for b in (8, 4) if converted else ():
                F.cross_entropy(switch_(model.train(), b)(images[batch]), labels[batch]).backward()
            if not converted:
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            if converted:
                clamp_scales_(model)
    return model.eval()


@pytest.mark.parametrize("bits", [8, 4])
def test_trained_network_in_onnxruntime(trained, digits, tmp_path, bits):
    images, labels = digits
    path = export_onnx(trained, tmp_path / "net.onnx", bits=bits, example_input=images[:8])
    assert path.stat().st_size < 0.6 * 4 * sum(parameter.numel() for parameter in CifarResNet(1, width=8).parameters())
    with torch.no_grad():
        wanted = switch_(trained, bits)(images)
    assert (wanted.argmax(1) == labels).float().mean() > 0.8  # a network that has learned
    plain = run(path, images, level=PLAIN)
    assert_equal_up_to_ties(plain, wanted)
    fused = run(path, images, optimized=tmp_path / "fused.onnx")
    assert (fused.argmax(1) == wanted.argmax(1)).float().mean() >= 0.995
    convolutions = sum("Conv" in type(layer).__name__ for layer in quantized_layers(trained).values())
    assert operators(tmp_path / "fused.onnx")["QLinearConv"] == convolutions


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_in_the_file(net, files, bits):
    path = files[bits]
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [each.version for each in model.opset_import if each.domain == ""] == [21]
    metadata = {each.key: each.value for each in model.metadata_props}
    assert json.loads(metadata["lightning_plugins.bits"]) == dict.fromkeys("0369", bits)
    initializers = {each.name: each for each in model.graph.initializer}
    shapes = {tuple(layer.weight.shape) for layer in quantized_layers(net).values()}
    weights = [each for each in initializers.values() if tuple(each.dims) in shapes]
    assert {each.data_type for each in weights} == {TensorProto.INT8}
    assert len(weights) == 4
    assert max(len(np.unique(numpy_helper.to_array(each)[0])) for each in weights) <= 2**bits
    counts = operators(path)
    assert (counts["DequantizeLinear"], counts["QuantizeLinear"]) == (8, 4)
    assert counts["Clip"] == counts["BitShift"] == (0 if bits == 8 else 4)
    assert "BatchNormalization" not in counts
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers:
            scale = numpy_helper.to_array(initializers[node.input[1]])
            assert scale.shape == (initializers[node.input[0]].dims[0],)  # one for each channel
        if node.op_type == "QuantizeLinear":
            kind = initializers[node.input[2]]
            assert kind.data_type == TensorProto.UINT8
            assert numpy_helper.to_array(kind) == 0
    text = path.read_bytes()
    assert b"test_onnx.py" not in text  # nor any other path of this machine
    assert str(Path(torch.__file__).parent).encode() not in text


@pytest.mark.parametrize("bits", [8, 4, "mixed"])
def test_outputs_at_any_batch_size(net, files, bits):
    path, deployed = files[bits], to_deploy(net, MIXED if bits == "mixed" else bits)
    assert any((m.scale < 0).any() for m in deployed.modules() if isinstance(m, DeployConv))
    for images in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        assert_equal_up_to_ties(run(path, images, level=PLAIN), deployed(images))
    fused, wanted = run(path, IMAGES), deployed(IMAGES)
    assert (fused - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("bits", [4, {"0": 8, "2": 7}], ids=str)
def test_activations_beyond_the_range_are_clipped(tmp_path, bits):
    torch.manual_seed(0)
    model = convert_(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)), (8, 7, 4), first_last_bits=2)
    set_scales(model, torch.randn(8, 1, 4, 4), (8, 7, 4))
    with torch.no_grad():
        for scale in model[2].input_quantizer.scales.values():
            scale.mul_(0.3)
    x = torch.linspace(-50, 50, 400).view(1, 1, 20, 20)  # far beyond what set the scales
    path = export_onnx(model, tmp_path / "net.onnx", bits=bits, example_input=x)
    deployed = to_deploy(model, bits)
    for layer, inputs in ((deployed[0], x), (deployed[2], 50 * deployed[:2](x))):
        quantizer, signed = layer.input_quantizer, bool((inputs < 0).any())
        assert isinstance(quantizer, DeployQuantizer)
        assert quantizer.signed is signed
        assert quantizer(inputs).max() == pytest.approx((2 ** (layer.bits - signed) - 1) * quantizer.scale)
    for level in (PLAIN, DEFAULT):
        torch.testing.assert_close(run(path, x, level=level), deployed(x), rtol=1e-3, atol=1e-3)


def test_channels_that_are_switched_off_survive_integer_biases(tmp_path):
    model = set_scales(convert_(small_net(), (8, 4), first_last_bits=4), IMAGES, (8, 4))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[:6] = torch.tensor([0.0, 0.0, 1e-25, 1e-8, -1e-7, 1e-5])
                module.bias[0] = 0.0
    plan = {"0": 8, "3": 4, "6": 8, "9": 4}
    path = export_onnx(model, tmp_path / "net.onnx", bits=plan, example_input=IMAGES)
    wanted = to_deploy(model, plan)(IMAGES)
    assert_equal_up_to_ties(run(path, IMAGES, level=PLAIN), wanted)
    assert (run(path, IMAGES) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_integer_biases_are_closer_than_plain_rounding(net, files, tmp_path, monkeypatch):
    wanted = to_deploy(net, 4)(IMAGES)
    fine = run(files[4], IMAGES)
    monkeypatch.setattr(DeployQuantizer, "shift", 0)
    monkeypatch.setattr(DeployConv, "suit_integers_", lambda self: None)
    coarse = run(export_onnx(net, tmp_path / "coarse.onnx", bits=4, example_input=IMAGES), IMAGES)
    assert (fine - wanted).abs().mean() < 0.2 * (coarse - wanted).abs().mean()


def test_residual_sums_become_integer_sums(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn(self.conv(x)) + x)

    images = torch.rand(16, 3, 8, 8)
    counts = {}
    for quantize_residual in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Block(), Block(), nn.Flatten(), nn.Linear(144, 3))
        set_scales(convert_(model, (8,), quantize_residual=quantize_residual), images, (8,))
        with torch.no_grad():
            model[2].bn.norms["8"].weight[0] = 1e-9
        path = export_onnx(model, tmp_path / "net.onnx", bits=8, example_input=images)
        found = run(path, images, optimized=tmp_path / "fused.onnx")
        wanted = to_deploy(model, 8)(images)
        assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
        fused = operators(tmp_path / "fused.onnx")
        counts[quantize_residual] = fused["QLinearConv"], fused["QLinearAdd"]
    # The last sum has no quantizer behind it.
    assert counts == {False: (0, 0), True: (2, 1)}


def test_a_lightning_module_from_a_trainer_and_nothing_is_said(tmp_path, capfd):
    data = DigitsDataModule(batch_size=64)
    module = ImageClassifier(CifarResNet(1, in_channels=1, width=4), num_classes=10, mean=[0.3], std=[0.4])
    convert_(module, (8, 4))
    trainer = make_trainer(tmp_path, 1, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(module, data)
    images = torch.rand(16, 1, 8, 8)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export_onnx(module, str(tmp_path / "net.onnx"), bits=8, example_input=images)
    assert capfd.readouterr() == ("", "")
    assert module.trainer is trainer
    with torch.no_grad():
        assert_equal_up_to_ties(run(path, images, level=PLAIN), switch_(module.eval(), 8)(images))


def test_two_inputs(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.second((self.first(x) * y).relu())

    x, y = torch.rand(16, 4), torch.rand(16, 6)
    model = convert_(Two(), (8,), first_last_bits=8)
    model.train()(x, y)
    path = export_onnx(model, tmp_path / "net.onnx", bits=8, example_input=(x, y))
    assert_equal_up_to_ties(run(path, x[:5], y[:5], level=PLAIN), to_deploy(model, 8)(x[:5], y[:5]))


def test_a_wrong_graph_is_found_and_leaves_the_old_file(net, files, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    wrong = onnx.load(files[8])
    for initializer in wrong.graph.initializer:
        if initializer.data_type == TensorProto.INT8 and len(initializer.dims) == 4:
            initializer.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(initializer), initializer.name))
    monkeypatch.setattr(module_under_test, "_onnx_bytes", lambda *_: wrong.SerializeToString())
    with pytest.raises(RuntimeError, match=r"ORT_DISABLE_ALL: the median sample is off by .* no file was written"):
        export_onnx(net, path, bits=8, example_input=IMAGES)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    export_onnx(net, path, bits=8, example_input=IMAGES, verify=False)
    assert path.read_bytes() == wrong.SerializeToString()


def test_missing_packages(net, files, tmp_path, monkeypatch):
    monkeypatch.setattr(module_under_test, "_onnx_bytes", lambda *_: files[8].read_bytes())
    find_spec = importlib.util.find_spec
    absent = {"onnxruntime"}
    monkeypatch.setattr(
        module_under_test.importlib.util, "find_spec", lambda name, *a: None if name in absent else find_spec(name, *a)
    )
    with pytest.warns(UserWarning, match="not verified, because onnxruntime is missing: pip install"):
        path = export_onnx(net, tmp_path / "net.onnx", bits=8, example_input=IMAGES)
    assert path.exists()
    absent.add("onnxscript")
    with pytest.raises(ImportError, match=r"export_onnx needs onnxscript: pip install 'lightning-plugins\[onnx\]'"):
        export_onnx(net, tmp_path / "other.onnx", bits=8, example_input=IMAGES)
    assert not (tmp_path / "other.onnx").exists()


def test_bits_and_scales_are_checked(tmp_path):
    model = convert_(small_net(), BITS, first_last_bits=2)
    with pytest.raises(ValueError, match="input scales were never set"):
        export_onnx(model, tmp_path / "net.onnx", bits=8, example_input=IMAGES)
    with pytest.raises(ValueError, match="bits must be one of the model's precisions"):
        export_onnx(model, tmp_path / "net.onnx", bits=3, example_input=IMAGES)
