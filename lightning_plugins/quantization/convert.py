"""Turning a network into one that computes at several precisions, and switching between them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_plugins.checks import check_types
from lightning_plugins.quantization.graph import (
    ResidualSums,
    _adds,
    _calls,
    _graphs,
    normalized_layers,
    residual_sums,
)
from lightning_plugins.quantization.layers import (
    FULL_PRECISION,
    InputInit,
    InputQuantizer,
    MultiPrecisionBatchNorm,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    ResidualQuantizer,
    _QuantLayer,
)
from lightning_plugins.quantization.plan import BitPlan
from lightning_plugins.quantization.quantizers import ScaleGrad, smallest_scale

__all__ = [
    "active_plan",
    "clamp_scales_",
    "convert_",
    "load_converted",
    "quantized_layers",
    "restore_",
    "shortcut_layers",
    "switch_",
]

Model = TypeVar("Model", bound=nn.Module)
BatchNorms = Literal["per_precision", "shared", "transitional"]

_QUANTIZED: dict[type[nn.Module], type[_QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
}

# An entry of every state_dict of a converted model. It holds the conversion (as JSON in bytes), and its name is what a
# plain model that is given this state_dict says of it.
SPEC_KEY = (
    "made by lightning_plugins.quantization.convert_: load this with "
    "lightning_plugins.quantization.load_converted(model, checkpoint), "
    "or give the Trainer the callback that made it"
)


@check_types
def convert_(
    model: Model,
    bits: Sequence[int] = (8, 6, 4, 2),
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    first_last_bits: int = FULL_PRECISION,
    depthwise_bits: int = 8,
    per_channel: bool = True,
    quantize_inputs: bool = True,
    input_init: InputInit = "percentile",
    scale_grad: ScaleGrad = "effective",
    batch_norm: BatchNorms = "per_precision",
    quantize_residual: bool = False,
) -> Model:
    """Let the convolutions and linear layers of a model compute at several precisions, in place.

    Layers stay the objects they are, with their parameters' names, hooks and parametrizations; each gains a weight
    scale and a quantizer of its inputs. Batch normalisations become one for each precision. The model is left at its
    highest precision; :func:`switch_` changes that. Only exact ``Conv1d``, ``Conv2d`` and ``Linear`` layers are
    converted, not subclasses, whose forward may be another one.

    Args:
        model: any module, trained or not. Weight scales start from its weights as they are now.
        bits: the precisions: 2 to 8, and 32 for full precision beside them.
        include: convert only layers whose names match one of these patterns.
        exclude: nor those whose names match one of these.
        first_last_bits: least bits of the first and the last layer, in the order in which the modules are registered;
            32, the default, leaves them as they are.
        depthwise_bits: least bits of depthwise convolutions, which lose everything at 2.
        per_channel: one weight scale for each output channel; otherwise one for each layer.
        quantize_inputs: quantize what goes into the layers too.
        input_init: how input scales start; see :class:`.InputQuantizer`.
        scale_grad: gradient of the weight scales; see :func:`.double_rounding`.
        batch_norm: one for each precision, ``"transitional"`` for one for each pair of the bits of the layer before, in
            the order of the layers, and the bits of the layer itself (see :class:`.MultiPrecisionBatchNorm`), or
            ``"shared"`` as it is.
        quantize_residual: also quantize what enters residual sums to 8 bits, which integer runtimes need to be fast.

    Returns:
        The same model.

    Raises:
        ValueError: for arguments out of range, a model that is converted already, or one in which nothing is left to
            convert under these rules.

    Example:
        >>> from lightning_plugins.models import resnet20
        >>> net = convert_(resnet20(width=4), bits=(8, 4))
        >>> net = switch_(net, 4)
        >>> list(quantized_layers(net))[:2]
        ['stages.0.0.conv1', 'stages.0.0.conv2']
    """
    precisions = check_precisions(bits)
    _check_choices(input_init, scale_grad, batch_norm)
    for name, least in {"first_last_bits": first_last_bits, "depthwise_bits": depthwise_bits}.items():
        if not (2 <= least <= 8 or least == FULL_PRECISION):
            raise ValueError(f"{name} must be 2 to 8, or 32 for unquantized, got {least!r}")
    if quantized_layers(model):
        raise ValueError("the model is converted already; restore_ it first, or keep what it is")
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise ValueError(f"layer {name!r} has no weights yet; run a batch through the model before convert_")
    candidates = {name: module for name, module in model.named_modules() if _float_class(module) is not None}
    for argument, patterns in {"include": include, "exclude": exclude}.items():
        if isinstance(patterns, str):
            raise TypeError(f"{argument} must be a list of patterns, got the text {patterns!r}; write [{patterns!r}]")
        for pattern in patterns:
            if candidates and not any(fnmatchcase(name, pattern) for name in candidates):
                names = ", ".join(candidates)
                raise ValueError(f"{argument}: no Conv1d, Conv2d or Linear layer matches {pattern!r}; they are {names}")
    ends = {name for name in (*list(candidates)[:1], *list(candidates)[-1:])}
    layers: dict[str, dict[str, Any]] = {}
    for name, module in candidates.items():
        if not _matches(name, include) or _matches(name, exclude):
            continue
        depthwise = getattr(module, "groups", 1) == getattr(module, "in_channels", 0) > 1
        least = max(first_last_bits if name in ends else 0, depthwise_bits if depthwise else 0)
        if least != FULL_PRECISION:
            layers[name] = {"bits": sorted({max(b, least) for b in precisions}, reverse=True)}
    if not layers:
        raise ValueError(
            f"nothing is left to quantize in {type(model).__name__}: of its {len(candidates)} Conv1d, Conv2d and "
            f"Linear layers the first and the last have first_last_bits={first_last_bits}, and "
            f"include={list(include)} and exclude={list(exclude)} leave none of the others; first_last_bits=8 "
            "quantizes the ends too"
        )
    sums = residual_sums(model) if quantize_residual else ResidualSums()
    shared = {layer for block, readers in sums.inputs.items() for layer in readers}
    for name, layer in layers.items():
        layer |= {
            "per_channel": per_channel,
            "scale_grad": scale_grad,
            "quantize_input": quantize_inputs,
            "input_init": input_init,
            "shared_input_bits": ResidualQuantizer.BITS if name in shared else 0,
        }
    norms: dict[str, str | None] = {}
    transitions: dict[str, str] = {}
    if batch_norm != "shared":
        follows = normalized_layers(model)
        norms = {name: follows.get(name) for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if batch_norm == "transitional":
        before = _previous_layers(list(layers), shortcut_layers(model))
        transitions = {norm: before[layer] for norm, layer in norms.items() if layer is not None and layer in before}
    spec = {
        "bits": list(precisions),
        "layers": layers,
        "norms": norms,
        "transitions": transitions,
        "residual": {"inputs": list(sums.inputs), "outputs": list(sums.outputs), "init": input_init},
    }
    apply_spec_(model, spec)
    return model


@check_types
def switch_(model: Model, bits: int | Mapping[str, int]) -> Model:
    """Let a converted model compute at other bits from now on, in place.

    A plan that is the same as a uniform precision is that precision.

    Args:
        model: converted by :func:`convert_`, or read by :func:`.load_packed`.
        bits: one of its precisions for all layers (a layer with a larger least precision takes that one), or a
            :class:`.BitPlan` with an entry for each quantized layer. Under a plan a batch normalisation goes with the
            layer that it follows, a transitional one also with the layer before; one that follows none takes the
            highest precision below 32.

    Returns:
        The same model.

    Raises:
        ValueError: for a precision that the model, or one of its layers, was not converted for, or a plan that does not
            name exactly its layers.
    """
    check_converted(model)
    layers = quantized_layers(model)
    precisions = _precisions(layers)
    if not isinstance(bits, Mapping):
        if bits not in precisions:
            raise ValueError(f"bits must be one of the model's precisions {precisions}, got {bits!r}")
        bits = precisions[precisions.index(bits)]
        plan = _uniform(layers, bits)
    else:
        plan = dict(bits)
        if plan.keys() != layers.keys():
            missing, unknown = sorted(layers.keys() - plan.keys()), sorted(plan.keys() - layers.keys())
            raise ValueError(
                f"a plan must name exactly the quantized layers; missing: {missing}, not in the model: {unknown}"
            )
        for name, value in plan.items():
            if value not in layers[name].bits:
                raise ValueError(f"layer {name!r} was converted for {layers[name].bits} bits, the plan says {value}")
        # The plan of a uniform precision is that precision, also for normalisations that follow no layer.
        bits = next((b for b in precisions if _uniform(layers, b) == plan), bits)
    for name, layer in layers.items():
        layer.num_bits = plan[name]
    full = all(value == FULL_PRECISION for value in plan.values())
    highest = FULL_PRECISION if full else max(b for b in precisions if b != FULL_PRECISION)
    for module in model.modules():
        if isinstance(module, MultiPrecisionBatchNorm):
            for attribute, layer_name in {"num_bits": module.follows, "previous_bits": module.previous}.items():
                wanted = plan.get(layer_name or "", highest) if isinstance(bits, Mapping) else bits
                setattr(module, attribute, wanted if wanted in module.bits else highest)
        elif isinstance(module, ResidualQuantizer):
            module.num_bits = FULL_PRECISION if full else module.BITS
    return model


@check_types
def restore_(model: Model) -> Model:
    """Undo :func:`convert_`, in place: the fp32 weights as trained, batch normalisations of the highest precision."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _QuantLayer):
            if module.codes is not None:
                raise ValueError("a model that was read from a packed file has no fp32 weights to restore")
            module.remove_quantizers()
            cls = _class_with_parametrizations(module, _float_class_of(type(module)))
            module.__class__ = cls  # type: ignore[assignment]
        elif isinstance(module, MultiPrecisionBatchNorm):
            _replace(model, name, module.norms[module.key(module.bits[0], module.bits[0])])
        if "residual_quantizer" in module._modules:
            ResidualQuantizer.detach_(module)
    for module in model.modules():
        forget_spec_(module)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _no_fast_path]:
            del module._forward_pre_hooks[key]
    return model


def _uniform(layers: Mapping[str, _QuantLayer], bits: int) -> dict[str, int]:
    return {name: min(b for b in layer.bits if b >= bits) for name, layer in layers.items()}


@check_types
def load_converted(model: Model, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> Model:
    """Convert a plain model as a checkpoint says, and load the checkpoint into it.

    Args:
        model: of the architecture that was converted, with whatever weights.
        checkpoint: the path of a Lightning checkpoint or of a saved ``state_dict``, or either of them loaded.

    Returns:
        The same model, converted.

    Raises:
        ValueError: if the checkpoint is not one of a converted model.
        RuntimeError: if it does not fit the model.
    """
    return load_described(
        model,
        checkpoint,
        key=SPEC_KEY,
        convert=None if quantized_layers(model) else apply_spec_,
        missing="this is not the checkpoint of a converted model; load it with load_state_dict before convert_",
    )


def load_described(
    model: Model,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    key: str,
    convert: Callable[[nn.Module, Any], None] | None,
    missing: str,
) -> Model:
    """Load a checkpoint that describes its own conversion.

    Args:
        model: to load into.
        checkpoint: a path, or what is there.
        key: end of the name of the entries that hold the description, as JSON in bytes.
        convert: converts a part of the model by its description; None if the model is converted already.
        missing: the error for a checkpoint without such an entry.
    """
    if isinstance(checkpoint, Mapping):
        loaded = checkpoint
    else:
        try:
            loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, IndexError, KeyError, EOFError) as error:
            # torch's sentence would propose to run what is in the file
            raise ValueError(f"{os.fspath(checkpoint)!r} is no checkpoint of tensors and plain data") from error
    state: dict[str, Any] = dict(loaded.get("state_dict", loaded))
    prefixes = [name.removesuffix(key) for name in state if name.endswith(key)]
    if not prefixes:
        raise ValueError(missing)
    if convert is not None:
        for prefix in prefixes:
            try:
                part = model.get_submodule(prefix.removesuffix("."))
                convert(part, json.loads(bytes(state[prefix + key].tolist())))
            except AttributeError as error:
                raise RuntimeError(f"the checkpoint is one of another architecture: {error}") from error
    model.load_state_dict(state)
    return model


@check_types
def quantized_layers(model: nn.Module) -> dict[str, _QuantLayer]:
    """Return the quantized layers of a model by name, in the order of their registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _QuantLayer)}


@check_types
def active_plan(model: nn.Module) -> BitPlan:
    """Return the bits at which each quantized layer of a model computes now."""
    return BitPlan({name: layer.num_bits for name, layer in quantized_layers(model).items()})


def scale_parameters(model: nn.Module) -> dict[int | None, list[nn.Parameter]]:
    """Return the scales of a converted model: inputs' by precision, and under None those that all precisions share."""
    groups: dict[int | None, list[nn.Parameter]] = {None: []}
    for module in model.modules():
        if isinstance(module, _QuantLayer):
            groups[None].append(module.weight_scale)
        elif isinstance(module, ResidualQuantizer):
            groups[None] += module.scales.values()
        elif isinstance(module, InputQuantizer):
            for b in module.bits:
                groups.setdefault(b, []).append(module.scales[str(b)])
    return groups


def batch_norm_and_bias_parameters(model: nn.Module) -> dict[int | None, list[nn.Parameter]]:
    """Return the parameters of batch normalisations by precision, and under None the biases, which all share."""
    groups: dict[int | None, list[nn.Parameter]] = {None: []}
    for module in model.modules():
        if isinstance(module, MultiPrecisionBatchNorm):
            for key, (b, _) in module.keys().items():
                groups.setdefault(b, []).extend(module.norms[key].parameters())
        elif isinstance(getattr(module, "bias", None), nn.Parameter) and not isinstance(module, _BatchNorm):
            groups[None].append(module.bias)  # type: ignore[arg-type]
    return groups


def idle_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the scales and normalisations' parameters that have no part in what a model computes at its bits now."""
    idle: list[nn.Parameter] = []
    inputs_at: dict[InputQuantizer, int | None] = {}
    for layer in quantized_layers(model).values():
        if layer.num_bits == FULL_PRECISION:
            idle.append(layer.weight_scale)
        if layer.input_quantizer is not None:
            inputs_at[layer.input_quantizer] = layer.num_bits if layer.quantizes_input() else None
    for module in model.modules():
        if isinstance(module, MultiPrecisionBatchNorm):
            active = module.active
            idle += [p for norm in module.norms.values() if norm is not active for p in norm.parameters()]
        elif isinstance(module, ResidualQuantizer) and module.num_bits == FULL_PRECISION:
            idle += module.scales.values()
    for quantizer, bits in inputs_at.items():
        idle += [quantizer.scales[str(b)] for b in quantizer.bits if b != bits]
    return idle


@check_types
@torch.no_grad()
def clamp_scales_(model: nn.Module) -> None:
    """Keep every scale positive; call it after each optimizer step."""
    scales: list[torch.Tensor] = [scale for group in scale_parameters(model).values() for scale in group]
    for dtype in {scale.dtype for scale in scales}:
        torch._foreach_clamp_min_([scale for scale in scales if scale.dtype == dtype], smallest_scale(dtype))


def shortcut_layers(model: nn.Module) -> dict[str, str]:
    """Return the convolutions on residual shortcuts, each with the layer that takes its bits' lead.

    A shortcut is a convolution of kernel size 1 whose output reaches a sum through no other convolution or linear
    layer, and whose input another such layer reads too, from which another one follows on the way to the sum: the first
    convolution of the block. What ``torch.fx`` cannot trace has none.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    found: dict[str, str] = {}
    for prefix, graph in _graphs(model):
        for node in graph.nodes:
            if not _calls(model, prefix, node, (nn.Conv1d, nn.Conv2d)) or not node.args:
                continue
            kernel = model.get_submodule(f"{prefix}{node.target}").kernel_size
            if any(size != 1 for size in kernel) or not _leads_to_sum(model, prefix, node, kinds):  # type: ignore[union-attr]
                continue
            readers = [user for user in node.args[0].users if _calls(model, prefix, user, kinds)]
            leaders = [user for user in readers if not _leads_to_sum(model, prefix, user, kinds)]
            if leaders:
                found[f"{prefix}{node.target}"] = f"{prefix}{leaders[0].target}"
    return found


def _leads_to_sum(model: nn.Module, prefix: str, node: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether what a node computes goes into a sum, one user after another, without passing a further layer."""
    while len(node.users) == 1:
        (node,) = node.users
        if _adds(node):
            return True
        if _calls(model, prefix, node, kinds):
            return False
    return False


def _previous_layers(names: Sequence[str], shortcuts: Mapping[str, str]) -> dict[str, str]:
    """Return each layer's predecessor in the order of the layers; a shortcut has that of the layer it goes with."""
    chain = [name for name in names if shortcuts.get(name) not in names]
    previous = dict(zip(chain[1:], chain, strict=False))
    shared = {name: previous[shortcuts[name]] for name in names if name not in chain and shortcuts[name] in previous}
    return previous | shared


def check_precisions(bits: Sequence[int]) -> tuple[int, ...]:
    """Return the precisions, highest first.

    Raises:
        ValueError: if one is out of range or named twice, or none is below 32.
    """
    precisions = tuple(sorted(bits, reverse=True))
    allowed = (*range(2, 9), FULL_PRECISION)
    wrong = [b for b in precisions if isinstance(b, bool) or not isinstance(b, int) or b not in allowed]
    if wrong or len(set(precisions)) < len(precisions) or all(b == FULL_PRECISION for b in precisions):
        raise ValueError(
            f"bits must be different precisions of 2 to 8, with or without 32 beside them, got {tuple(bits)!r}"
        )
    return precisions


def model_precisions(model: nn.Module) -> tuple[int, ...]:
    """Return the precisions that :func:`switch_` takes for a converted model, highest first."""
    return _precisions(quantized_layers(model))


def _precisions(layers: Mapping[str, _QuantLayer]) -> tuple[int, ...]:
    return tuple(sorted({b for layer in layers.values() for b in layer.precisions}, reverse=True))


def check_converted(model: nn.Module) -> None:
    """Refuse a model without quantized layers.

    Raises:
        ValueError: for such a model.
    """
    if not any(isinstance(module, _QuantLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no quantized layers; convert_ it first")


def describe(model: nn.Module) -> dict[str, Any]:
    """Return how a model was converted, as plain JSON that :func:`apply_spec_` understands."""
    spec: dict[str, Any] = {
        "bits": list(model_precisions(model)),
        "layers": {name: layer.describe() for name, layer in quantized_layers(model).items()},
        "norms": {},
        "residual": {"inputs": [], "outputs": [], "init": "percentile"},
    }
    for name, module in model.named_modules():
        if isinstance(module, MultiPrecisionBatchNorm):
            spec["norms"][name] = module.follows
            if module.previous is not None:
                spec.setdefault("transitions", {})[name] = module.previous
        if "residual_quantizer" in module._modules:
            quantizer = module.residual_quantizer
            assert isinstance(quantizer, ResidualQuantizer)
            spec["residual"]["outputs" if quantizer.to_output else "inputs"].append(name)
            spec["residual"]["init"] = quantizer.init
    return spec


def apply_spec_(model: nn.Module, spec: Mapping[str, Any]) -> None:
    """Convert a model as :func:`describe` described another one of its architecture; all of it or nothing."""
    for name in (*spec["norms"], *spec["residual"]["inputs"], *spec["residual"]["outputs"]):
        model.get_submodule(name)
    for name in spec["layers"]:
        if _float_class(module := model.get_submodule(name)) is None:
            raise ValueError(f"{name!r} was a convolution or linear layer, here it is a {type(module).__name__}")
    transitions = spec.get("transitions", {})
    for name, follows in spec["norms"].items():
        norm = model.get_submodule(name)
        many = MultiPrecisionBatchNorm(norm, spec["bits"], follows=follows, previous=transitions.get(name))
        _replace(model, name, many)
    for name, layer in spec["layers"].items():
        module = model.get_submodule(name)
        float_class = _float_class(module)
        assert float_class is not None
        module.__class__ = _class_with_parametrizations(module, _QUANTIZED[float_class])
        assert isinstance(module, _QuantLayer)
        module.add_quantizers(**layer, precisions=spec["bits"])
    parameter = next(model.parameters())
    for kind in ("inputs", "outputs"):
        for name in spec["residual"][kind]:
            quantizer = ResidualQuantizer(init=spec["residual"]["init"], to_output=kind == "outputs").to(parameter)
            quantizer.attach_(model.get_submodule(name))
    model._register_state_dict_hook(_add_spec)  # type: ignore[no-untyped-call]
    model._register_load_state_dict_pre_hook(_drop_spec, with_module=True)  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and quantized_layers(module):
            module.register_forward_pre_hook(_no_fast_path)
    switch_(model, spec["bits"][0])


def _add_spec(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    spec = json.dumps(describe(model)).encode()
    state_dict[prefix + SPEC_KEY] = torch.tensor(list(spec), dtype=torch.uint8)


def _drop_spec(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *args: list[str]
) -> None:
    packed = state_dict.pop(prefix + SPEC_KEY, None)
    if packed is None or not strict:
        return
    theirs, ours = json.loads(bytes(packed.tolist())), describe(model)
    bits = [{name: layer["bits"] for name, layer in spec["layers"].items()} for spec in (theirs, ours)]
    if theirs["bits"] != ours["bits"] or bits[0] != bits[1]:
        args[-1].append(
            f"the checkpoint was converted for {theirs['bits']} bits, the model for {ours['bits']}, or other layers "
            "were; load_converted converts a plain model as the checkpoint was"
        )


def forget_spec_(module: nn.Module) -> None:
    """Let a module's ``state_dict`` be silent about a conversion."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_add_spec, _drop_spec):
                del hooks[key]


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """Do nothing: while a hook is there, torch's transformer layers do not read the weights past our layers."""


def _float_class_of(cls: type[nn.Module]) -> type[nn.Module]:
    return next(float_class for float_class, quantized in _QUANTIZED.items() if issubclass(cls, quantized))


def _float_class(module: nn.Module) -> type[nn.Module] | None:
    """The layer class that a module exactly is, parametrizations aside."""
    cls = type(module).__bases__[0] if is_parametrized(module) else type(module)
    return cls if cls in _QUANTIZED else None


def _class_with_parametrizations(module: nn.Module, cls: type[nn.Module]) -> type[nn.Module]:
    if not is_parametrized(module):
        return cls
    # torch keeps the parametrized tensors as properties of a class made for this one module.
    made = type(module)
    properties = {name: value for name, value in vars(made).items() if isinstance(value, property)}
    special = {name: vars(made)[name] for name in ("__deepcopy__", "__getstate__") if name in vars(made)}
    return type(f"Parametrized{cls.__name__}", (cls,), properties | special)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another one, everywhere where the model has it."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_choices(input_init: str, scale_grad: str, batch_norm: str) -> None:
    choices = {
        "input_init": (input_init, ("percentile", "lsq")),
        "scale_grad": (scale_grad, ("effective", "exact")),
        "batch_norm": (batch_norm, ("per_precision", "shared", "transitional")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
