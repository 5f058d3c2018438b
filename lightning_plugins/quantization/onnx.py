"""Writing a quantized network as an ONNX file that integer runtimes run fast."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.checks import warn_caller
from lightning_plugins.files import write_atomically
from lightning_plugins.quantization.deploy import _DeployLayer, to_deploy

__all__ = ["export_onnx"]

OPSET = 21

# By what share of the largest output the median sample may be off. As the graph is written, float rounding moves a few
# activations to the next code: up to 2 % on untrained nets. As onnxruntime fuses it, rounded biases move more of them:
# up to 17 %. A wrong graph is off by all of it.
_TOLERANCES = {"ORT_DISABLE_ALL": 0.1, "ORT_ENABLE_ALL": 0.5}


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    bits: int | Mapping[str, int],
    example_input: Tensor | tuple[Tensor, ...],
    verify: bool = True,
) -> Path:
    """Write a converted model at fixed bits as one ONNX file, in QDQ form at opset 21.

    Weights are INT8 initialisers, whatever their bits; activations pass through ``QuantizeLinear`` and
    ``DequantizeLinear``, with the codes clipped between the two below 8 bits. onnxruntime turns this into integer
    arithmetic. That is faster than fp32 only if what enters residual sums is quantized too
    (``convert_(..., quantize_residual=True)``). The batch size is free. The file's metadata hold the bits of each layer
    as JSON, under ``lightning_plugins.bits``.

    Args:
        model: converted by :func:`.convert_` and trained, or read by :func:`.load_packed`; a LightningModule too. It
            stays as it is.
        path: the file to write; its folder is made.
        bits: one of the model's precisions, or a :class:`.BitPlan`.
        example_input: what the model takes, one tensor or a tuple of them, each with the batch in dimension 0.
        verify: run the file in onnxruntime on ``example_input`` and compare it with :func:`.to_deploy` before it is
            written.

    Returns:
        The path.

    Raises:
        ImportError: without onnx and onnxscript.
        ValueError: as :func:`.to_deploy` does.
        RuntimeError: if onnxruntime's outputs are far off: for the median sample, by more than 10 % of the largest
            output as the graph is written, or more than 50 % as onnxruntime optimises it.

    Warns:
        UserWarning: if the file cannot be verified because onnxruntime is missing.

    Example:
        >>> import tempfile
        >>> from lightning_plugins.quantization import convert_
        >>> _ = torch.manual_seed(0)
        >>> net = convert_(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), (8, 4), first_last_bits=4)
        >>> x = torch.rand(16, 8)
        >>> _ = net.train()(x)  # stands for training: it sets the input scales
        >>> export_onnx(net, f"{tempfile.mkdtemp()}/net.onnx", bits=8, example_input=x).name
        'net.onnx'
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export_onnx needs {' and '.join(missing)}: pip install 'lightning-plugins[onnx]'")
    inputs = tuple(x.detach().cpu() for x in ((example_input,) if isinstance(example_input, Tensor) else example_input))
    deployed = to_deploy(model, bits).cpu()
    with torch.no_grad():
        expected = deployed(*inputs)
    layers = {name: module for name, module in deployed.named_modules() if isinstance(module, _DeployLayer)}
    for layer in layers.values():
        layer.suit_integers_()
    plan = {name: layer.bits for name, layer in layers.items()}
    content = _onnx_bytes(deployed, inputs, plan)
    if verify:
        _verify(content, inputs, expected)
    return write_atomically(path, content)


def _onnx_bytes(model: nn.Module, inputs: tuple[Tensor, ...], plan: Mapping[str, int]) -> bytes:
    batch = torch.export.Dim("batch", min=2)  # torch 2.9 treats one as a case of its own; the graph takes it
    # From a batch of one an exporter concludes that the batch size is always one.
    example = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in inputs)
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # torch 2.9 warns of torchvision's operators, which are not in the graph
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # it reports on its own internals
            program = torch.onnx.export(
                model,
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"] if len(inputs) == 1 else None,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                external_data=False,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces with this machine's paths
    for value in proto.graph.value_info:
        del value.metadata_props[:]
    proto.metadata_props.add(key="lightning_plugins.bits", value=json.dumps(plan))
    content: bytes = proto.SerializeToString()
    return content


def _verify(content: bytes, inputs: tuple[Tensor, ...], expected: Any) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        warn_caller(
            "the ONNX file was not verified, because onnxruntime is missing: pip install 'lightning-plugins[onnx]', or "
            "pass verify=False"
        )
        return
    import onnxruntime

    for level, tolerance in _TOLERANCES.items():
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        for found, wanted in zip(outputs, _tensors(expected), strict=True):
            difference = (torch.from_numpy(found) - wanted).abs().flatten(1).amax(1).median()
            largest = wanted.abs().max()
            if not difference <= tolerance * largest:
                agreement = (torch.from_numpy(found).flatten(1).argmax(1) == wanted.flatten(1).argmax(1)).float().mean()
                raise RuntimeError(
                    f"the ONNX graph is wrong in onnxruntime {onnxruntime.__version__} with {level}: the median sample "
                    f"is off by {difference:.3g}, where the largest output is {largest:.3g}, and argmax agrees for "
                    f"{agreement:.1%} of the samples; no file was written. Please report it, or pass verify=False"
                )


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for part in parts for tensor in _tensors(part)]
