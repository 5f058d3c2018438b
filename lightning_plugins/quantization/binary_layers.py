"""Layers with binary inputs and weights, and the conversion of a network to them and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_plugins.checks import check_types
from lightning_plugins.quantization.binary import (
    Stage,
    binary_activation,
    check_frequency,
    check_stage,
    clip,
    normalize_samples,
    periodic_binary,
    sign_ste,
)
from lightning_plugins.quantization.convert import (
    Model,
    _class_with_parametrizations,
    _matches,
    _no_fast_path,
    load_described,
)

__all__ = [
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "binary_layers",
    "convert_binary_",
    "load_binary_checkpoint",
    "restore_binary_",
    "set_frequency_",
    "set_stage_",
]

Estimator = Literal["periodic", "sign"]
Real = Literal["first", "last", "shortcuts", "depthwise"]

REAL: tuple[Real, ...] = ("first", "last", "shortcuts", "depthwise")

# An entry of every state_dict of a converted model. It holds the conversion (as JSON in bytes), and its name is what a
# plain model that is given this state_dict says of it.
BINARY_KEY = (
    "made by lightning_plugins.quantization.convert_binary_: load this with "
    "lightning_plugins.quantization.load_binary_checkpoint(model, checkpoint), "
    "or give the Trainer the BinaryQAT callback that made it"
)


class BinaryLayer(nn.Module):
    """What the binary layers share. A plain layer becomes one by changing its class, so all that refers to it holds.

    Attributes:
        alpha: what the output is multiplied with, one value for each output channel; ``(C, 1, 1)`` before images.
        frequency: of the square wave.
        stage: 1 or 2.
        estimator: ``"periodic"``, or ``"sign"`` for the straight-through baseline.
    """

    weight: Tensor
    alpha: nn.Parameter
    frequency: float
    stage: int
    estimator: Estimator

    def add_alpha(self, *, frequency: float, stage: int, estimator: Estimator, generator: torch.Generator) -> None:
        """Give a layer, whose class has just been changed to this one, what it needs beyond its weights."""
        weight = self.weight
        shape = (len(weight), *[1] * (weight.ndim - 2))
        self.alpha = nn.Parameter(torch.rand(shape, generator=generator).to(weight))
        self.frequency, self.stage, self.estimator = frequency, stage, estimator

    def remove_alpha(self) -> None:
        """Take away all that :meth:`add_alpha` gave."""
        del self.alpha, self.frequency, self.stage, self.estimator

    def describe(self) -> dict[str, Any]:
        """Return the arguments of :meth:`add_alpha`, without the generator."""
        return {"frequency": self.frequency, "stage": self.stage, "estimator": self.estimator}

    def binary_weight(self) -> Tensor:
        """Return the weight as the layer uses it, differentiable: -1 and +1 in stage 2, between them in stage 1."""
        if self.estimator == "periodic":
            return periodic_binary(self.weight, self.frequency, stage=self.stage)  # type: ignore[arg-type]
        return sign_ste(self.weight) if self.stage == 2 else clip(self.weight)

    def binary_inputs(self, inputs: Tensor) -> Tensor:
        """Return the inputs as the layer uses them: -1 and +1."""
        if not self.training:
            return binary_activation(inputs)  # a sign is the same at any scale
        batched = inputs.ndim >= self.weight.ndim
        values = normalize_samples(inputs if batched else inputs[None])
        return binary_activation(values if batched else values[0]).to(inputs.dtype)

    def _scaled(self, output: Tensor) -> Tensor:
        output = output * self.alpha.to(output.dtype)
        bias = self.bias
        return output + bias.to(output.dtype).view(self.alpha.shape) if isinstance(bias, Tensor) else output

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of the plain net has none; the first values stay.
        state_dict.setdefault(prefix + "alpha", self.alpha.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Add what is binary to what the plain layer says of itself."""
        wave = f"frequency={self.frequency:g}" if self.estimator == "periodic" else "estimator='sign'"
        return f"{super().extra_repr()}, {wave}, stage={self.stage}"


class BinaryConv2d(BinaryLayer, nn.Conv2d):
    """A ``Conv2d`` with binary inputs and weights and a scale for each output channel; by :func:`convert_binary_`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve; zero padding stays 0."""
        return self._scaled(self._conv_forward(self.binary_inputs(inputs), self.binary_weight(), None))


class BinaryConv1d(BinaryLayer, nn.Conv1d):
    """A ``Conv1d`` with binary inputs and weights and a scale for each output channel; by :func:`convert_binary_`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve; zero padding stays 0."""
        return self._scaled(self._conv_forward(self.binary_inputs(inputs), self.binary_weight(), None))


class BinaryLinear(BinaryLayer, nn.Linear):
    """A ``Linear`` with binary inputs and weights and a scale for each output; by :func:`convert_binary_`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer."""
        return self._scaled(F.linear(self.binary_inputs(inputs), self.binary_weight()))


_BINARY: dict[type[nn.Module], type[BinaryLayer]] = {
    nn.Conv1d: BinaryConv1d,
    nn.Conv2d: BinaryConv2d,
    nn.Linear: BinaryLinear,
}


@check_types
def convert_binary_(
    model: Model,
    *,
    frequency: float = 20.0,
    stage: Stage = 1,
    estimator: Estimator = "periodic",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    keep_real: Sequence[Real] = REAL,
    seed: int = 0,
) -> Model:
    """Make the convolutions and linear layers of a model binary, in place.

    Each becomes ``alpha * layer(sign(inputs), binary weight)``, plus its bias. Layers stay the objects they are, with
    their parameters' names, hooks and parametrizations. Only exact ``Conv1d``, ``Conv2d`` and ``Linear`` layers are
    converted, not subclasses, whose forward may be another one.

    What comes out of a ReLU has one sign only, so a binary layer behind one learns nothing from its inputs: give the
    network ``Hardtanh`` in its place, as :func:`.binary_resnet20` has it.

    Args:
        model: any module, trained or not.
        frequency: of the square wave. A weight distribution of standard deviation s fills several half-periods where
            ``frequency * s`` is above 1; far below that the sine is nearly linear.
        stage: 1 for real weights (the sine) on binary inputs, 2 for binary weights too; :func:`set_stage_` changes it.
        estimator: ``"sign"`` makes weights by :func:`sign_ste` instead (clipped to [-1, 1] in stage 1): the baseline.
        include: convert only layers whose names match one of these patterns.
        exclude: nor those whose names match one of these.
        keep_real: kinds of layers that stay as they are: the ``"first"`` and the ``"last"`` in the order in which the
            modules are registered; ``"shortcuts"``, which are 1x1 convolutions with ``downsample``, ``shortcut`` or
            ``proj`` in the path of their name; ``"depthwise"`` convolutions.
        seed: of the first values of ``alpha``, which are uniform in (0, 1).

    Returns:
        The same model.

    Raises:
        ValueError: for arguments out of range, a model that is binary already, or one in which nothing is left to
            convert under these rules.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
        >>> list(binary_layers(convert_binary_(net)))
        ['2']
        >>> net[2].binary_weight().unique().numel() > 2, set_stage_(net, 2)[2].binary_weight().unique().tolist()
        (True, [-1.0, 1.0])
    """
    options = {"frequency": check_frequency(frequency), "stage": check_stage(stage), "estimator": estimator}
    if estimator not in ("periodic", "sign"):
        raise ValueError(f"estimator must be 'periodic' or 'sign', got {estimator!r}")
    check_keep_real(keep_real)
    if binary_layers(model):
        raise ValueError("the model is binary already; restore_binary_ it first, or keep what it is")
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise ValueError(f"layer {name!r} has no weights yet; run a batch through the model before convert_binary_")
    candidates = {name: module for name, module in model.named_modules() if plain_class(module) is not None}
    for argument, patterns in {"include": include, "exclude": exclude}.items():
        if isinstance(patterns, str):
            raise TypeError(f"{argument} must be a list of patterns, got the text {patterns!r}; write [{patterns!r}]")
        for pattern in patterns:
            if candidates and not any(fnmatchcase(name, pattern) for name in candidates):
                raise ValueError(
                    f"{argument}: no Conv1d, Conv2d or Linear layer matches {pattern!r}; they are "
                    + ", ".join(candidates)
                )
    names = [
        name
        for name, module in candidates.items()
        if _matches(name, include)
        and not _matches(name, exclude)
        and not _kinds(name, module, list(candidates)) & set(keep_real)
    ]
    if not names:
        raise ValueError(
            f"nothing is left to make binary in {type(model).__name__}: of its {len(candidates)} plain Conv1d, Conv2d "
            f"and Linear layers keep_real={list(keep_real)}, include={list(include)} and exclude={list(exclude)} leave "
            "none; keep_real=() keeps no kind of layer, and a layer that is quantized already is no plain one"
        )
    _apply(model, dict.fromkeys(names, options), seed)
    return model


@check_types
def restore_binary_(model: Model) -> Model:
    """Undo :func:`convert_binary_`, in place: plain layers with the real weights as trained, without ``alpha``."""
    for module in list(model.modules()):
        if isinstance(module, BinaryLayer):
            module.remove_alpha()
            cls = _class_with_parametrizations(module, plain_class_of(module))
            module.__class__ = cls  # type: ignore[assignment]
    for module in model.modules():
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "hook", hook) in (_add_description, _take_description):
                    del hooks[key]
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _no_fast_path]:
            del module._forward_pre_hooks[key]
    return model


@check_types
def binary_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    """Return the binary layers of a model by name, in the order of their registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLayer)}


@check_types
def set_stage_(model: Model, stage: Stage) -> Model:
    """Let all binary layers of a model use real weights (stage 1) or binary ones (stage 2), in place.

    Raises:
        ValueError: for another stage, or a model without binary layers.
    """
    check_stage(stage)
    for layer in checked_layers(model).values():
        layer.stage = stage
    return model


@check_types
def set_frequency_(model: Model, frequency: float) -> Model:
    """Let all binary layers of a model use another frequency, in place; this changes which weights are +1.

    Raises:
        ValueError: for another frequency, or a model without binary layers.
    """
    check_frequency(frequency)
    for layer in checked_layers(model).values():
        layer.frequency = float(frequency)
    return model


@check_types
def load_binary_checkpoint(model: Model, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> Model:
    """Convert a plain model as a checkpoint says, and load the checkpoint, which brings frequency and stage, into it.

    Args:
        model: of the architecture that was converted, with whatever weights.
        checkpoint: the path of a Lightning checkpoint or of a saved ``state_dict``, or either of them loaded.

    Returns:
        The same model, converted.

    Raises:
        ValueError: if the checkpoint is not one of a binary model.
        RuntimeError: if it does not fit the model.
    """
    return load_described(
        model,
        checkpoint,
        key=BINARY_KEY,
        convert=None if binary_layers(model) else _apply,
        missing="this is not the checkpoint of a binary model; load it with load_state_dict before convert_binary_",
    )


def check_keep_real(keep_real: Sequence[str]) -> None:
    """Refuse kinds of layers that do not exist.

    Raises:
        TypeError: for a text in place of a list.
        ValueError: for an unknown kind.
    """
    if isinstance(keep_real, str):
        raise TypeError(f"keep_real must be a list of kinds, got the text {keep_real!r}; write [{keep_real!r}]")
    if unknown := set(keep_real) - set(REAL):
        raise ValueError(f"keep_real must be among {list(REAL)}, got {sorted(unknown)}")


def _kinds(name: str, module: nn.Module, candidates: list[str]) -> set[str]:
    """The kinds of layers, as ``keep_real`` has them, that a layer belongs to."""
    kinds = {kind for kind, at in (("first", 0), ("last", -1)) if name == candidates[at]}
    if not isinstance(module, nn.Linear):
        pointwise = all(side == 1 for side in module.kernel_size)  # type: ignore[union-attr]
        if pointwise and {"downsample", "shortcut", "proj"} & set(name.split(".")):
            kinds.add("shortcuts")
        if module.groups == module.in_channels > 1:  # type: ignore[operator]
            kinds.add("depthwise")
    return kinds


def _apply(model: nn.Module, layers: Mapping[str, Mapping[str, Any]], seed: int = 0) -> None:
    """Convert layers by name; all of them or none."""
    for name in layers:
        if plain_class(module := model.get_submodule(name)) is None:
            raise ValueError(f"{name!r} was a convolution or linear layer, here it is a {type(module).__name__}")
    generator = torch.Generator().manual_seed(seed)
    for name, options in layers.items():
        module = model.get_submodule(name)
        plain = plain_class(module)
        assert plain is not None
        module.__class__ = _class_with_parametrizations(module, _BINARY[plain])
        assert isinstance(module, BinaryLayer)
        module.add_alpha(**options, generator=generator)
    model._register_state_dict_hook(_add_description)  # type: ignore[no-untyped-call]
    model._register_load_state_dict_pre_hook(_take_description, with_module=True)  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and binary_layers(module):
            module.register_forward_pre_hook(_no_fast_path)


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The layer class that a module exactly is, parametrizations aside."""
    cls = type(module).__bases__[0] if is_parametrized(module) else type(module)
    return cls if cls in _BINARY else None


def plain_class_of(layer: BinaryLayer) -> type[nn.Module]:
    return next(plain for plain, binary in _BINARY.items() if isinstance(layer, binary))


def checked_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    layers = binary_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no binary layers; convert_binary_ it first")
    return layers


def _add_description(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    text = json.dumps({name: layer.describe() for name, layer in binary_layers(model).items()}).encode()
    state_dict[prefix + BINARY_KEY] = torch.tensor(list(text), dtype=torch.uint8)


def _take_description(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *args: list[str]
) -> None:
    packed = state_dict.pop(prefix + BINARY_KEY, None)
    if packed is None:  # of the plain net
        return
    theirs, ours = json.loads(bytes(packed.tolist())), binary_layers(model)
    if strict and theirs.keys() != ours.keys():
        args[-1].append(
            f"other layers are binary in the checkpoint ({sorted(theirs.keys() - ours.keys())}) than in the model "
            f"({sorted(ours.keys() - theirs.keys())}); load_binary_checkpoint converts a plain model as it was"
        )
        return
    for name in theirs.keys() & ours.keys():
        # Weights mean something at their frequency only; the stage tells what was trained.
        for key, value in theirs[name].items():
            setattr(ours[name], key, value)
