"""Binary networks for inference: int8 codes in memory, ONNX, and files with one bit for each weight."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._sealed_files import checksum, read_sealed
from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically
from lightning_plugins.quantization.binary_layers import (
    BinaryLayer,
    binary_layers,
    checked_layers,
    plain_class,
    plain_class_of,
    restore_binary_,
)
from lightning_plugins.quantization.convert import Model
from lightning_plugins.quantization.copying import copy_network
from lightning_plugins.quantization.deploy import _make_weights_permanent, _onnx
from lightning_plugins.quantization.onnx import _onnx_bytes, _verify
from lightning_plugins.quantization.packed import _make_plain

__all__ = ["export_binary_onnx", "load_binary", "save_binary", "to_deploy_binary"]

FORMAT = "lightning_plugins.quantization.binary"
VERSION = 1


class _DeployLayer(nn.Module):
    """A binary layer for inference: int8 codes of -1 and +1 in place of the weight."""

    codes: Tensor
    alpha: Tensor

    def keep_only_codes_(self, codes: Tensor, alpha: Tensor, bias: Tensor | None) -> None:
        """Replace the parameters of a plain layer, whose class has just been changed to this one."""
        del self.weight, self.bias
        self.register_buffer("codes", codes)
        self.register_buffer("alpha", alpha)
        self.register_buffer("bias", bias)

    def _inputs_and_weight(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if torch.onnx.is_in_onnx_export():
            # Of a cast the exporter would make a float constant, where the codes are few.
            weight = _onnx("DequantizeLinear", (self.codes, torch.tensor(1.0)), torch.float32)
        else:
            weight = self.codes.to(self.alpha.dtype)
        # Not through an autograd.Function, which exporters do not see into.
        return torch.where(inputs < 0, -1.0, 1.0).to(weight.dtype), weight

    def _scaled(self, output: Tensor) -> Tensor:
        output, bias = output * self.alpha, self.bias
        return output + bias.view(self.alpha.shape) if isinstance(bias, Tensor) else output


class _DeployConv2d(_DeployLayer, nn.Conv2d):
    def forward(self, inputs: Tensor) -> Tensor:
        return self._scaled(self._conv_forward(*self._inputs_and_weight(inputs), None))


class _DeployConv1d(_DeployLayer, nn.Conv1d):
    def forward(self, inputs: Tensor) -> Tensor:
        return self._scaled(self._conv_forward(*self._inputs_and_weight(inputs), None))


class _DeployLinear(_DeployLayer, nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return self._scaled(F.linear(*self._inputs_and_weight(inputs)))


_DEPLOYED: dict[type[nn.Module], type[_DeployLayer]] = {
    nn.Conv1d: _DeployConv1d,
    nn.Conv2d: _DeployConv2d,
    nn.Linear: _DeployLinear,
}


@check_types
def to_deploy_binary(model: Model) -> Model:
    """Return an independent copy of a binary model for inference and export.

    Its binary layers hold int8 codes of -1 and +1, ``alpha`` and the bias, and no weights. The copy is in evaluation
    mode, needs no gradients, computes in float32, and gives what the model gives in evaluation. Pruning masks and
    parametrizations are made permanent. It goes through ``torch.export`` and :func:`export_binary_onnx`.

    Args:
        model: converted by :func:`convert_binary_` and trained in stage 2; a LightningModule too. It stays as it is.

    Raises:
        ValueError: if the model is not binary, is in stage 1, or has weights that are not finite.

    Example:
        >>> from lightning_plugins.quantization import convert_binary_
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.Hardtanh(), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> deployed = to_deploy_binary(convert_binary_(net, stage=2))
        >>> x = torch.rand(16, 8)
        >>> deployed[2].codes.dtype, torch.allclose(deployed(x), net.eval()(x))
        (torch.int8, True)
    """
    for name, layer in checked_layers(model).items():
        if layer.stage != 2:
            raise ValueError(
                f"layer {name!r} is in stage 1, where weights are real; train stage 2, or set_stage_(model, 2) to take "
                "the signs as they are"
            )
    copy = copy_network(model)
    copy.eval().requires_grad_(False)
    _make_weights_permanent(copy)
    for name, layer in binary_layers(copy).items():
        signs, alpha, bias = layer.binary_weight(), layer.alpha.detach(), layer.bias
        if not bool(torch.isfinite(signs).all()):
            raise ValueError(f"layer {name!r} has weights that are not finite; has training diverged?")
        layer.remove_alpha()
        kept = bias.detach() if isinstance(bias, Tensor) else None
        _deploy_(layer, plain_class_of(layer), signs.to(torch.int8), alpha, kept)
    return restore_binary_(copy.float())  # what is left to restore are the hooks of the conversion


def _deploy_(layer: nn.Module, plain: type[nn.Module], codes: Tensor, alpha: Tensor, bias: Tensor | None) -> None:
    layer.__class__ = _DEPLOYED[plain]
    assert isinstance(layer, _DeployLayer)
    layer.keep_only_codes_(codes, alpha, bias)


def export_binary_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_input: Tensor | tuple[Tensor, ...],
    verify: bool = True,
) -> Path:
    """Write a binary model as one ONNX file, at opset 21, with binary weights as INT8 initialisers of -1 and +1.

    ONNX has no binary convolution: runtimes widen the codes to float32 when they load the file, and compute as fast as
    they do in fp32. The batch size is free. :func:`save_binary` writes one bit for each weight.

    Args:
        model: as :func:`to_deploy_binary` takes it.
        path: the file to write; its folder is made.
        example_input: what the model takes, one tensor or a tuple of them, each with the batch in dimension 0.
        verify: run the file in onnxruntime on ``example_input`` and compare it with :func:`to_deploy_binary` before it
            is written.

    Returns:
        The path.

    Raises:
        ImportError: without onnx and onnxscript.
        ValueError: as :func:`to_deploy_binary` does.
        RuntimeError: if onnxruntime's outputs are far off.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export_binary_onnx needs {' and '.join(missing)}: pip install 'lightning-plugins[onnx]'")
    inputs = tuple(x.detach().cpu() for x in ((example_input,) if isinstance(example_input, Tensor) else example_input))
    deployed = to_deploy_binary(model).cpu()
    with torch.no_grad():
        expected = deployed(*inputs)
    content = _onnx_bytes(deployed, inputs, dict.fromkeys(binary_layers(model), 1))
    if verify:
        _verify(content, inputs, expected)
    return write_atomically(path, content)


@check_types
def save_binary(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a binary model with one bit for each binary weight: a file that :func:`load_binary` reads.

    A safetensors file. In place of a binary layer's weight it has ``<layer>.signs``, uint8: bit k of byte i, where bit
    0 is worth 1, says whether weight ``8 i + k`` of the flattened tensor is +1. All other tensors are there as
    :func:`to_deploy_binary` has them. The header holds, as JSON, the shapes of the weights and a checksum.

    Args:
        model: as :func:`to_deploy_binary` takes it.
        path: the file; ``.safetensors`` is the usual ending.

    Returns:
        The path.

    Raises:
        ValueError: as :func:`to_deploy_binary` does, or if the ``state_dict`` has something that is no tensor.
        OSError: if the file cannot be written; what stood there is whole.

    Example:
        >>> import tempfile
        >>> from lightning_plugins.quantization import convert_binary_
        >>> net = convert_binary_(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2)), stage=2)
        >>> fresh = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = load_binary(save_binary(net, f"{folder}/net.safetensors"), fresh)
        >>> x = torch.rand(3, 8)
        >>> torch.equal(loaded(x), to_deploy_binary(net)(x))
        True
    """
    deployed = to_deploy_binary(model)
    shapes = {
        name: list(layer.codes.shape) for name, layer in deployed.named_modules() if isinstance(layer, _DeployLayer)
    }
    tensors: dict[str, Tensor] = {}
    for key, value in deployed.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} is no tensor but a {type(value).__name__}; a packed file holds tensors")
        layer, _, attribute = key.rpartition(".")
        if layer in shapes and attribute == "codes":
            tensors[f"{layer}.signs"] = _pack(value.cpu())
        else:
            # A copy, as safetensors takes no tensors that share memory.
            tensors[key] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
    about = {"version": VERSION, "shapes": shapes, "checksum": checksum(tensors, [{}, shapes])}
    return write_atomically(path, safetensors.torch.save(tensors, {FORMAT: json.dumps(about, separators=(",", ":"))}))


@check_types
def load_binary(path: str | os.PathLike[str], module: Model) -> Model:
    """Turn a fresh module into the model that :func:`save_binary` wrote, in place.

    It computes what :func:`to_deploy_binary` of that model does, is in evaluation mode and cannot be trained.

    Args:
        path: the file. It is data, nothing in it is run.
        module: of the architecture that was saved, not converted, with whatever weights.

    Returns:
        The same module.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, not one of :func:`save_binary`, or of a newer version; if the module is
            binary already or of another architecture.
    """
    name = os.fspath(path)
    shapes, tensors = _decode(Path(path).read_bytes(), name)
    if any(isinstance(part, BinaryLayer | _DeployLayer) for part in module.modules()):
        raise ValueError("load_binary takes a module that is not binary; make a fresh one, or restore_binary_ this one")
    _make_plain(module)
    modules = dict(module.named_modules())
    for layer, shape in shapes.items():
        weight = getattr(modules.get(layer), "weight", None)
        found = tuple(weight.shape) if isinstance(weight, Tensor) else None
        if layer not in modules or plain_class(modules[layer]) is None or found != tuple(shape):
            raise ValueError(
                f"{name!r} is of another architecture: layer {layer!r} had a weight {tuple(shape)}, in this "
                f"{type(module).__name__} it has {found or 'none'}"
            )
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for layer, shape in shapes.items():
        del expected[f"{layer}.weight"]
        expected[f"{layer}.signs"] = (-(-math.prod(shape) // 8),)
        expected[f"{layer}.alpha"] = (shape[0], *[1] * (len(shape) - 2))
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    for key in sorted(expected.keys() | given.keys()):
        if expected.get(key) != given.get(key):
            raise ValueError(
                f"{name!r} is of another architecture: {key!r} has shape {given.get(key, 'none')} in the file and "
                f"{expected.get(key, 'none')} in this {type(module).__name__}"
            )
    for layer, shape in shapes.items():
        target = modules[layer]
        plain = plain_class(target)
        assert plain is not None
        weight, bias = target.weight, target.bias
        assert isinstance(weight, Tensor)
        tensors[f"{layer}.codes"] = _unpack(tensors.pop(f"{layer}.signs"), shape)
        alpha = weight.new_empty(tensors[f"{layer}.alpha"].shape)
        kept = bias.detach() if isinstance(bias, Tensor) else None
        _deploy_(target, plain, weight.new_empty(shape, dtype=torch.int8), alpha, kept)
    module.load_state_dict(tensors)
    module.eval().requires_grad_(False)
    return module


def _pack(codes: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits((codes > 0).flatten().numpy(), bitorder="little"))


def _unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits.astype(np.int8) * 2 - 1).reshape(tuple(shape))


def _decode(content: bytes, path: str) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    about, tensors = read_sealed(
        content,
        path,
        form=FORMAT,
        version=VERSION,
        writer="save_binary",
        described=lambda about: [{}, about["shapes"]],
    )
    return about["shapes"], tensors
