"""The packed file: a converted network at all of its precisions, or at one, without the fp32 weights of its layers.

A safetensors file. The codes of a quantized layer are one row of bytes, see :func:`pack_codes`; input scales and batch
normalisations of several precisions are stacked along dimension 0, highest precision first; all other tensors have the
names and shapes that they have in the module. The header holds, as JSON under one key, how the model was converted, the
shapes of the weights, and a checksum over all of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from lightning_plugins._sealed_files import checksum, read_sealed
from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically
from lightning_plugins.modes import evaluation_mode
from lightning_plugins.quantization.convert import (
    Model,
    apply_spec_,
    check_converted,
    describe,
    quantized_layers,
    switch_,
)
from lightning_plugins.quantization.layers import (
    FULL_PRECISION,
    InputQuantizer,
    MultiPrecisionBatchNorm,
    ResidualQuantizer,
    _QuantLayer,
)
from lightning_plugins.quantization.quantizers import code_range, quantize_codes, switch_codes

__all__ = ["load_packed", "pack_codes", "save_packed", "unpack_codes"]

FORMAT = "lightning_plugins.quantization.packed"
VERSION = 1

Kind = Literal["weights", "scales", "batch_norms", "biases", "unquantized"]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes densely into bytes: n codes of b bits take ``ceil(n b / 8)`` bytes.

    Codes follow one another in the order of the flattened tensor, each as ``bits`` bits of two's complement, least
    significant bit first: bit k of code i is bit ``(i b + k) mod 8`` of byte ``(i b + k) div 8``, where bit 0 of a byte
    is worth 1. What is left of the last byte is 0.

    Args:
        codes: int8, any shape, in the range of ``bits``.
        bits: 2 to 8.

    Returns:
        uint8, one dimension.

    Raises:
        TypeError: for codes of another dtype.
        ValueError: for other bits, or a code out of their range.

    Example:
        >>> pack_codes(torch.tensor([1, -1, -8, 7], dtype=torch.int8), bits=4)
        tensor([241, 120], dtype=torch.uint8)
    """
    low, high = code_range(bits)
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {codes.dtype}; quantize_codes makes them from weights")
    flat = codes.flatten()
    if flat.numel() and not (low <= int(flat.min()) and int(flat.max()) <= high):
        raise ValueError(
            f"codes of {bits} bits lie in {low}..{high}, got {int(flat.min())}..{int(flat.max())}; "
            "switch_codes brings them to fewer bits"
        )
    # Eight codes fill `bits` bytes, and fit into one 64-bit integer on the way.
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    words = torch.zeros(len(groups), dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= (groups[:, i].long() & (2**bits - 1)) << (i * bits)
    columns = [((words >> (8 * i)) & 255).to(torch.uint8) for i in range(bits)]
    return torch.stack(columns, 1).flatten()[: packed_bytes(flat.numel(), bits)].clone()


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        packed: uint8, one dimension.
        bits: 2 to 8.
        shape: of the codes.

    Returns:
        int8 codes.

    Raises:
        ValueError: for other bits, or if ``packed`` is not what codes of this shape take.

    Example:
        >>> unpack_codes(torch.tensor([241, 120], dtype=torch.uint8), bits=4, shape=(2, 2))
        tensor([[ 1, -1],
                [-8,  7]], dtype=torch.int8)
    """
    code_range(bits)
    count = prod(shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (packed_bytes(count, bits),):
        raise ValueError(
            f"{count} codes of {bits} bits are uint8 of shape {(packed_bytes(count, bits),)}, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    groups = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    words = torch.zeros(len(groups), dtype=torch.int64, device=packed.device)
    for i in range(bits):
        words |= groups[:, i].long() << (8 * i)
    sign = 2 ** (bits - 1)
    columns = [((((words >> (i * bits)) & (2**bits - 1)) ^ sign) - sign).to(torch.int8) for i in range(8)]
    return torch.stack(columns, 1).flatten()[:count].reshape(tuple(shape)).clone()


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes ``count`` codes take."""
    return -(-count * bits // 8)


@check_types
def save_packed(model: nn.Module, path: str | os.PathLike[str], *, plan: int | Mapping[str, int] | None = None) -> Path:
    """Write a converted model as codes: one file that :func:`load_packed` reads and :func:`.switch_` switches.

    The file has the highest codes of each quantized layer once, packed without gaps, and what its precisions need
    beside them: weight scales, input scales, batch normalisations. Everything else is stored as it is. Weights that
    pruning (``torch.nn.utils.prune``) or parametrizations make are stored as made, without the tensors that they are
    made from. A weight that a layer shares with a module that is not quantized stays, as that module's. Of a model with
    full precision among its precisions, 32 bits and their batch normalisations are left out, as the file has no fp32
    weights for them. The model is left as it was.

    Args:
        model: converted by :func:`.convert_`, and trained or at least run in training mode at each precision.
        path: the file; ``.safetensors`` is the usual ending.
        plan: write a smaller file for this plan (or this one precision) alone. The model that is loaded from it
            computes what this one does under the plan, bit by bit, and cannot be switched to anything else.

    Returns:
        The path.

    Raises:
        ValueError: if the model is not converted; if an input scale has not been set yet; if the plan does not fit the
            model or asks for 32 bits; if a weight is not finite, or a scale not positive.
        OSError: if the file cannot be written; what stood there is whole.

    Example:
        >>> import tempfile
        >>> from lightning_plugins.models import resnet20
        >>> from lightning_plugins.quantization import convert_, switch_
        >>> net = convert_(resnet20(width=4), bits=(8, 4))
        >>> for bits in (8, 4):
        ...     _ = switch_(net, bits)(torch.rand(2, 3, 8, 8))
        >>> with torch.device("meta"):
        ...     fresh = resnet20(width=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = load_packed(save_packed(net, f"{folder}/net.safetensors"), fresh)
        >>> images = torch.rand(1, 3, 8, 8)
        >>> torch.equal(switch_(loaded, 4)(images), switch_(net, 4).eval()(images))
        True
    """
    check_converted(model)
    alone = plan is not None
    with borrowed(model, plan):
        for name, layer in quantized_layers(model).items():
            if alone and layer.num_bits == FULL_PRECISION:
                raise ValueError(
                    "a packed file holds no fp32 weights: plan must give each layer 2 to 8 bits, "
                    f"got {FULL_PRECISION} for {name!r}"
                )
        _check_ready(model, alone=alone)
        spec = file_spec(model, plan)
        entries = tensor_entries(model, alone=alone)
        tensors = {name: _read(name, entry, alone=alone) for name, entry in entries.items()}
        shapes = weight_shapes(model)
    return write_atomically(path, encode(tensors, spec, shapes, checksum(tensors, [spec, shapes])))


@check_types
def load_packed(path: str | os.PathLike[str], module: Model) -> Model:
    """Turn a fresh module into the model that :func:`save_packed` wrote, in place.

    The quantized layers have codes in place of weights, so the module computes but cannot be trained. It comes in
    evaluation mode, at its highest precision; :func:`.switch_` changes that.

    Args:
        path: the file. It is data, nothing in it is run.
        module: of the architecture that was saved, not converted, with whatever weights: they are not looked at. It may
            lie on the meta device, which costs no memory and no time (``with torch.device("meta"): net = resnet20()``)
            and is then brought to the CPU.

    Returns:
        The same module.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, not one of :func:`save_packed`, or of a newer version; if the module is
            converted already or of another architecture; if it lies on the meta device and has buffers that no
            ``state_dict`` holds.
    """
    name = os.fspath(path)
    with torch.device("cpu"):  # the caller may be inside `with torch.device("meta")`
        spec, shapes, tensors = _decode(Path(path).read_bytes(), name)
    if quantized_layers(module):
        raise ValueError("load_packed takes a module that is not converted; make a fresh one, or restore_ this one")
    _make_plain(module)
    _check_architecture(module, spec, shapes, name)
    apply_spec_(module, spec)
    entries = tensor_entries(module)
    _check_tensors(entries, tensors, name)
    for key, entry in entries.items():
        _write(entry, tensors[key])
    for submodule in module.modules():
        if isinstance(submodule, InputQuantizer):  # a file is of scales that are all set
            device = submodule.signed.device
            submodule.ready = torch.ones(len(submodule.bits), dtype=torch.bool, device=device)
            submodule._read_buffers()
    left = [key for key, value in chain(module.named_parameters(), module.named_buffers()) if value.is_meta]
    if left:
        raise ValueError(
            f"{left[0]!r} of {type(module).__name__} is on the meta device and no part of its state_dict, so it is not "
            f"in {name!r} either; build the module on the CPU"
        )
    module.eval()
    module.requires_grad_(False)
    return module


@contextmanager
def borrowed(model: nn.Module, bits: int | Mapping[str, int] | None = None) -> Iterator[None]:
    """Have a converted model in evaluation mode, without gradients, at other bits; give it back as it was."""
    kinds = (_QuantLayer, MultiPrecisionBatchNorm, ResidualQuantizer)
    active = [
        (module, name, getattr(module, name))
        for module in model.modules()
        if isinstance(module, kinds)
        for name in ("num_bits", "previous_bits")
        if hasattr(module, name)
    ]
    try:
        with evaluation_mode(model), torch.no_grad():
            if bits is not None:
                switch_(model, bits)
            yield
    finally:
        for module, name, value in active:
            setattr(module, name, value)


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        kind: what it is counted as.
        shape: in the file.
        dtype: in the file.
        places: module and attribute where it stands: several for a tensor that modules share.
        stacked: the places have one slice each, along dimension 0.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    places: list[tuple[nn.Module, str]]
    stacked: bool = False

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def tensor_entries(model: nn.Module, *, alone: bool = False) -> dict[str, Entry]:
    """Return the tensors of the file of a converted model by name; with ``alone``, for the bits in use only."""
    entries: dict[str, Entry] = {}
    inside: set[nn.Module] = set()  # parts of modules that are treated as one
    input_bits: dict[nn.Module, tuple[int, ...]] = {}
    shared: dict[int, Entry] = {}
    for name, module in model.named_modules():
        if module in inside:
            continue
        prefix = f"{name}." if name else ""
        if is_parametrized(module):
            inside |= set(module.parametrizations.modules())
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{name!r} ({type(module).__name__}) has state that is no tensor; a packed file holds tensors"
            )
        if isinstance(module, MultiPrecisionBatchNorm):
            inside |= set(module.norms.modules())
            norms = [module.active] if alone else _kept_norms(module)
            for key in _tensor_names(norms[0]):
                entries[f"{prefix}norms.{key}"] = _stacked("batch_norms", [(norm, key) for norm in norms])
            continue
        if isinstance(module, InputQuantizer):
            inside |= set(module.scales.modules())
            places: list[tuple[nn.Module, str]] = [(module.scales, str(b)) for b in input_bits.get(module, module.bits)]
            entries[f"{prefix}scales"] = _stacked("scales", places)
            entries[f"{prefix}signed"] = Entry("scales", (), torch.bool, [(module, "signed")])
            continue
        names = _tensor_names(module)
        if isinstance(module, _QuantLayer):
            if module.codes is None and "weight" not in names:
                raise ValueError(
                    f"the weight of layer {name!r} is made by a hook; only torch.nn.utils.prune and parametrizations "
                    "(torch.nn.utils.parametrizations) can be packed"
                )
            size = packed_bytes(prod(weight_shape(module)), module.num_bits if alone else module.high_bits)
            entries[f"{prefix}codes"] = Entry("weights", (size,), torch.uint8, [(module, "weight")])
            names = [key for key in names if key not in ("weight", "codes")]
            if alone and module.input_quantizer is not None:
                if module.quantizes_input():
                    input_bits[module.input_quantizer] = (module.num_bits,)
                else:
                    inside |= set(module.input_quantizer.modules())
        for key in names:
            value = _effective(module, key)
            if id(value) in shared:
                shared[id(value)].places.append((module, key))
                continue
            entry = Entry(_kind(module, key), tuple(value.shape), value.dtype, [(module, key)])
            entries[f"{prefix}{key}"] = entry
            if value is module._parameters.get(key) or value is module._buffers.get(key):
                shared[id(value)] = entry
    return entries


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight, of which it may have only the codes."""
    codes = layer.codes if isinstance(layer, _QuantLayer) else None
    weight = layer.weight if codes is None else codes
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)


def weight_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of the weights of all quantized layers."""
    return {name: list(weight_shape(layer)) for name, layer in quantized_layers(model).items()}


def file_spec(model: nn.Module, plan: int | Mapping[str, int] | None) -> dict[str, Any]:
    """Return how the model of a file is to be converted; the plan, if any, is in use already."""
    spec = describe(model)
    layers = quantized_layers(model)
    for name, layer in spec["layers"].items():
        layer["bits"] = list(_kept(layer["bits"], None if plan is None else layers[name].num_bits))
    if plan is None:
        spec["bits"] = list(_kept(spec["bits"], None))
    else:
        # One precision, under which each layer takes its only bits: the lowest, as layers may have more but not fewer.
        spec["bits"] = [min(plan.values()) if isinstance(plan, Mapping) else plan]
    return spec


def encode(tensors: Mapping[str, Tensor], spec: Mapping[str, Any], shapes: Mapping[str, Any], checksum: str) -> bytes:
    """Return the bytes of a file."""
    # One key: safetensors writes several in an order of its own, and equal models would give unequal files.
    about = {"version": VERSION, "spec": spec, "shapes": shapes, "checksum": checksum}
    return safetensors.torch.save(dict(tensors), {FORMAT: json.dumps(about, separators=(",", ":"))})


def _decode(content: bytes, path: str) -> tuple[dict[str, Any], dict[str, list[int]], dict[str, Tensor]]:
    about, tensors = read_sealed(
        content,
        path,
        form=FORMAT,
        version=VERSION,
        writer="save_packed",
        described=lambda about: [about["spec"], about["shapes"]],
    )
    return about["spec"], about["shapes"], tensors


def _kept(bits: Sequence[int], only: int | None) -> tuple[int, ...]:
    return tuple(b for b in bits if b != FULL_PRECISION) if only is None else (only,)


def _kept_norms(norm: MultiPrecisionBatchNorm) -> list[nn.Module]:
    return [norm.norms[key] for key, bits in norm.keys().items() if FULL_PRECISION not in bits]


def _stacked(kind: Kind, places: list[tuple[nn.Module, str]]) -> Entry:
    first = _effective(*places[0])
    return Entry(kind, (len(places), *first.shape), first.dtype, places, stacked=True)


def _kind(module: nn.Module, name: str) -> Kind:
    if isinstance(module, _BatchNorm):
        return "batch_norms"
    if isinstance(module, _QuantLayer):
        return {"weight_scale": "scales", "bias": "biases"}.get(name, "unquantized")  # type: ignore[return-value]
    return "unquantized"


def _pruning(module: nn.Module) -> dict[str, prune.BasePruningMethod]:
    hooks = module._forward_pre_hooks.values()
    return {hook._tensor_name: hook for hook in hooks if isinstance(hook, prune.BasePruningMethod)}


def _tensor_names(module: nn.Module) -> list[str]:
    """The tensors of a module itself, as its forward sees them."""
    names = [name for name, value in module._parameters.items() if value is not None]
    names += [
        name
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    ]
    for name in _pruning(module):
        names = [other for other in names if other not in (f"{name}_orig", f"{name}_mask")] + [name]
    if is_parametrized(module):
        names += list(module.parametrizations)  # type: ignore[arg-type]
    return names


def _effective(module: nn.Module, name: str) -> Tensor:
    pruning = _pruning(module).get(name)
    # The attribute of a pruned tensor is as old as the last forward.
    value: Tensor = getattr(module, name) if pruning is None else pruning.apply_mask(module)  # type: ignore[no-untyped-call]
    return value


def _read(name: str, entry: Entry, *, alone: bool) -> Tensor:
    if entry.kind == "weights":
        layer, attribute = entry.places[0]
        assert isinstance(layer, _QuantLayer)
        high = layer.high_bits
        if layer.codes is None:
            weight = _effective(layer, attribute)
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(
                    f"{name!r} cannot be packed: there are weights that are not finite; has training diverged?"
                )
            codes = quantize_codes(weight, layer.weight_scale, bits=high, high_bits=high)
        else:
            codes = layer.codes
        bits = layer.num_bits if alone else high
        return pack_codes(switch_codes(codes, high_bits=high, bits=bits), bits).cpu()
    values = [_effective(*place).detach() for place in entry.places]
    value = torch.stack(values) if entry.stacked else values[0]
    layer, attribute = entry.places[0]
    if isinstance(layer, _QuantLayer) and attribute == "weight_scale" and alone:
        value = value * 2.0 ** (layer.high_bits - layer.num_bits)
    if entry.kind == "scales" and value.is_floating_point() and not bool((value > 0).all() and value.isfinite().all()):
        raise ValueError(
            f"{name!r} has scales that are not positive; call clamp_scales_ after each optimizer step, and train again"
        )
    # A copy, as safetensors takes no tensors that share memory.
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write(entry: Entry, tensor: Tensor) -> None:
    if entry.kind == "weights":
        layer = entry.places[0][0]
        assert isinstance(layer, _QuantLayer)
        codes = _beside(unpack_codes(tensor, layer.high_bits, weight_shape(layer)), layer.weight)
        layer.keep_only_codes_(codes)
        return
    parts = tensor.unbind() if entry.stacked else [tensor]
    for index, part in enumerate(parts):
        places = entry.places[index : index + 1] if entry.stacked else entry.places
        first, attribute = places[0]
        value = _beside(part.clone(), _effective(first, attribute))
        parameter = nn.Parameter(value, requires_grad=False)
        for module, name in places:
            if name in module._parameters:
                module._parameters[name] = parameter
            else:
                module._buffers[name] = value


def _beside(value: Tensor, old: Tensor) -> Tensor:
    return value if old.is_meta else value.to(old.device)


def _make_plain(module: nn.Module) -> None:
    """Take pruning and parametrizations away: the file has what they made."""
    for submodule in list(module.modules()):
        for name in _pruning(submodule):
            prune.remove(submodule, name)  # type: ignore[no-untyped-call]
        if is_parametrized(submodule):
            for name in list(submodule.parametrizations):  # type: ignore[arg-type]
                remove_parametrizations(submodule, name)


def _check_ready(model: nn.Module, *, alone: bool) -> None:
    needed: dict[nn.Module, tuple[str, tuple[int, ...]]] = {
        module: (name, module.bits) for name, module in model.named_modules() if isinstance(module, InputQuantizer)
    }
    if alone:
        for layer in quantized_layers(model).values():
            if layer.input_quantizer is not None:
                name, _ = needed[layer.input_quantizer]
                needed[layer.input_quantizer] = name, (layer.num_bits,) if layer.quantizes_input() else ()
    for module, (name, bits) in needed.items():
        assert isinstance(module, InputQuantizer)
        missing = [b for b in bits if not module.is_ready(b)]
        if missing:
            raise ValueError(
                f"the input scale of {name!r} at {missing[0]} bits is not set yet; train a step, or run a batch in "
                "training mode, at each precision"
            )


def _check_architecture(
    module: nn.Module, spec: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], path: str
) -> None:
    modules = dict(module.named_modules())
    kind = type(module).__name__
    residual = spec["residual"]
    for name in chain(spec["layers"], spec["norms"], residual["inputs"], residual["outputs"]):
        if name not in modules:
            raise ValueError(f"{path!r} is of another architecture: {kind} has no {name!r}")
    for name in spec["norms"]:
        if not isinstance(modules[name], _BatchNorm):
            raise ValueError(
                f"{path!r} is of another architecture: {name!r} was a batch normalisation, in this {kind} it is a "
                f"{type(modules[name]).__name__}"
            )
    for name, shape in shapes.items():
        weight = getattr(modules[name], "weight", None)
        found = None if not isinstance(weight, Tensor) or is_lazy(weight) else list(weight.shape)
        if found != list(shape):
            raise ValueError(
                f"{path!r} is of another architecture: the weight of {name!r} had shape {tuple(shape)}, in this {kind} "
                f"it has {tuple(found) if found else 'none'}"
            )


def _check_tensors(entries: Mapping[str, Entry], tensors: Mapping[str, Tensor], path: str) -> None:
    for kind, names in {
        "lacks a tensor that the module has": entries.keys() - tensors.keys(),
        "has a tensor that the module lacks": tensors.keys() - entries.keys(),
    }.items():
        if names:
            raise ValueError(f"{path!r} is of another architecture: it {kind}, {min(names)!r}")
    for name, entry in entries.items():
        if tuple(tensors[name].shape) != entry.shape:
            raise ValueError(
                f"{path!r} is of another architecture: {name!r} has shape {tuple(tensors[name].shape)} in the file and "
                f"{entry.shape} in the module"
            )
