"""Weights and activations of one bit: periodic binarization (BiPer), its layers, conversion, files and export."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically
from lightning_plugins.quantization.convert import (
    Model,
    _class_with_parametrizations,
    _matches,
    _no_fast_path,
    load_described,
)
from lightning_plugins.quantization.copying import copy_network
from lightning_plugins.quantization.deploy import _make_weights_permanent, _onnx
from lightning_plugins.quantization.onnx import _onnx_bytes, _verify
from lightning_plugins.quantization.packed import _checksum, _make_plain
from lightning_plugins.quantization.quantizers import _in_float

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "binary_activation",
    "binary_layers",
    "convert_binary_",
    "export_binary_onnx",
    "load_binary",
    "load_binary_checkpoint",
    "normalize_samples",
    "periodic_binary",
    "periodic_regularizer",
    "quantization_error",
    "restore_binary_",
    "save_binary",
    "set_frequency_",
    "set_stage_",
    "sign_ste",
    "to_deploy_binary",
]

Stage = Literal[1, 2]
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

FORMAT = "lightning_plugins.quantization.binary"
VERSION = 1


# Functions


@check_types
def periodic_binary(weight: Tensor, frequency: float, *, stage: Stage = 2) -> Tensor:
    r"""Binarize a weight by a square wave, with the gradient of the sine of the same period.

    Stage 1 returns :math:`\sin(\omega W)`. Stage 2 returns :math:`\mathrm{sign}(\sin(\omega W))`, where the sign of 0
    is +1. The gradient of both is :math:`G\,\omega\cos(\omega W)`. Computed in float32 at least, whatever the dtype,
    and whether or not autocast is on.

    Args:
        weight: any shape.
        frequency: :math:`\omega` in radians per unit of weight, above 0; the paper has 20.
        stage: 1 or 2.

    Returns:
        The same shape and dtype. In stage 2 each value is exactly -1 or +1, or NaN where the weight is not finite.

    Raises:
        ValueError: for another frequency or stage.

    Example:
        >>> periodic_binary(torch.tensor([-0.1, 0.0, 0.1, 0.2]), 20.0)
        tensor([-1.,  1.,  1., -1.])

    Reference:
        Vargas et al., *BiPer: Binary Neural Networks using a Periodic Function*, 2024.
    """
    wave = torch.sin(check_frequency(frequency) * _in_float(weight))
    if _check_stage(stage) == 2:
        wave = _sign(wave.detach()) + (wave - wave.detach())  # the difference is exactly 0
    return wave.to(weight.dtype)


@check_types
def sign_ste(weight: Tensor) -> Tensor:
    """Return the sign of a weight, +1 for 0, with the straight-through gradient: G where ``|weight| <= 1``, else 0.

    The baseline that periodic binarization is compared with.

    Example:
        >>> sign_ste(torch.tensor([-0.1, 0.0, 3.0]))
        tensor([-1.,  1.,  1.])

    Reference:
        Hubara et al., *Binarized Neural Networks*, 2016.
    """
    inside = _clip(weight)
    return _sign(weight.detach()) + (inside - inside.detach())


@check_types
def binary_activation(inputs: Tensor) -> Tensor:
    """Return the sign of activations, +1 for 0, with the gradient ``G max(0, 2 - 2 |inputs|)``.

    That is the derivative of a piecewise polynomial that goes from -1 to 1 between -1 and 1.

    Args:
        inputs: any shape; :func:`normalize_samples` brings them to the range in which the gradient is not 0.

    Returns:
        -1 and +1 in the same shape and dtype; NaN stays NaN.

    Example:
        >>> binary_activation(torch.tensor([-0.3, 0.0, 2.0]))
        tensor([-1.,  1.,  1.])

    Reference:
        Liu et al., *Bi-Real Net*, 2018.
    """
    output: Tensor = _BinaryActivation.apply(inputs)
    return output


@check_types
def normalize_samples(inputs: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Divide each sample by its standard deviation, without centring: ``a / sqrt(Var(a) + eps)``.

    The variance is the population's, over all dimensions but the first. Computed, and returned, in float32 at least.

    Args:
        inputs: ``(N, ...)``.
        eps: added to the variance, at least 0; with 0 a constant sample gives NaN.

    Raises:
        ValueError: for a negative ``eps``.

    Example:
        >>> normalize_samples(torch.tensor([[3.0, -3.0], [0.0, 0.0]]))
        tensor([[ 1.0000, -1.0000],
                [ 0.0000,  0.0000]])
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps!r}")
    values = inputs if inputs.dtype == torch.float64 else inputs.float()
    variance = values.var(tuple(range(1, values.ndim)), correction=0, keepdim=True)
    return values / torch.sqrt(variance + eps)


@check_types
def periodic_regularizer(weight: Tensor, frequency: float, *, sign: Literal[1, -1] = 1) -> Tensor:
    r"""Return :math:`\pm\,\mathrm{mean}(\tfrac12 - \tfrac12\cos 2\omega W) = \pm\,\mathrm{mean}\sin^2(\omega W)`.

    Args:
        weight: any shape.
        frequency: :math:`\omega`, above 0.
        sign: +1, as in the released code, is least where the sine is 0; -1 is least where it is -1 or +1, which is
            where the quantization error is 0.

    Returns:
        One value in [0, 1] or [-1, 0]; its gradient is :math:`\pm\,\omega\sin(2\omega W)/n` for n weights.

    Raises:
        ValueError: for another frequency or sign.

    Example:
        >>> periodic_regularizer(torch.tensor([0.0, torch.pi / 2]), 1.0)
        tensor(0.5000)
    """
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 (as released) or -1, got {sign!r}")
    phase = 2 * check_frequency(frequency) * _in_float(weight)
    return sign * (0.5 - 0.5 * torch.cos(phase)).mean()


@check_types
def quantization_error(weight: Tensor, frequency: float) -> Tensor:
    r"""Return how far the sine is from the square wave: :math:`1 - \mathrm{mean}|\sin(\omega W)|`, in [0, 1].

    For Laplace weights of scale :math:`\beta` it is :math:`1 - s\coth(\pi s/2)/(1+s^2)` with
    :math:`s = 1/(\omega\beta)`: it falls with the frequency, down to :math:`1 - 2/\pi = 0.363`.

    Args:
        weight: any shape.
        frequency: :math:`\omega`, above 0.

    Raises:
        ValueError: for another frequency.

    Example:
        >>> quantization_error(torch.tensor([0.0, torch.pi / 2]), 1.0)
        tensor(0.5000)
    """
    return 1 - torch.sin(check_frequency(frequency) * _in_float(weight)).abs().mean()


def check_frequency(frequency: float) -> float:
    """Return the frequency.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if isinstance(frequency, bool) or not 0 < frequency < math.inf:
        raise ValueError(f"frequency must be positive and finite, got {frequency!r}; the paper has 20.0")
    return float(frequency)


def _check_stage(stage: int) -> int:
    if stage not in (1, 2) or isinstance(stage, bool):
        raise ValueError(f"stage must be 1 (real weights, the sine) or 2 (binary weights), got {stage!r}")
    return stage


def _sign(values: Tensor) -> Tensor:
    """-1 or +1, +1 for 0; NaN passes, as a net that has diverged must not look sound."""
    return torch.where(values < 0, -1.0, torch.where(values >= 0, 1.0, values))


def _clip(weight: Tensor) -> Tensor:
    """Clip to [-1, 1] with a gradient on the limits, which clamp's depends on the version of torch."""
    return torch.where(weight.abs() <= 1, weight, weight.detach().clamp(-1, 1))


class _BinaryActivation(Function):
    """Keeps its input and nothing else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return _sign(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        slope: Tensor = (2 - 2 * inputs.abs()).clamp_min(0)
        return grad * slope


# Layers


class _BinaryLayer(nn.Module):
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
        return sign_ste(self.weight) if self.stage == 2 else _clip(self.weight)

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


class BinaryConv2d(_BinaryLayer, nn.Conv2d):
    """A ``Conv2d`` with binary inputs and weights and a scale for each output channel; by :func:`convert_binary_`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve; zero padding stays 0."""
        return self._scaled(self._conv_forward(self.binary_inputs(inputs), self.binary_weight(), None))


class BinaryConv1d(_BinaryLayer, nn.Conv1d):
    """A ``Conv1d`` with binary inputs and weights and a scale for each output channel; by :func:`convert_binary_`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve; zero padding stays 0."""
        return self._scaled(self._conv_forward(self.binary_inputs(inputs), self.binary_weight(), None))


class BinaryLinear(_BinaryLayer, nn.Linear):
    """A ``Linear`` with binary inputs and weights and a scale for each output; by :func:`convert_binary_`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer."""
        return self._scaled(F.linear(self.binary_inputs(inputs), self.binary_weight()))


_BINARY: dict[type[nn.Module], type[_BinaryLayer]] = {
    nn.Conv1d: BinaryConv1d,
    nn.Conv2d: BinaryConv2d,
    nn.Linear: BinaryLinear,
}


# Conversion


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
    options = {"frequency": check_frequency(frequency), "stage": _check_stage(stage), "estimator": estimator}
    if estimator not in ("periodic", "sign"):
        raise ValueError(f"estimator must be 'periodic' or 'sign', got {estimator!r}")
    check_keep_real(keep_real)
    if binary_layers(model):
        raise ValueError("the model is binary already; restore_binary_ it first, or keep what it is")
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise ValueError(f"layer {name!r} has no weights yet; run a batch through the model before convert_binary_")
    candidates = {name: module for name, module in model.named_modules() if _plain_class(module) is not None}
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
        if isinstance(module, _BinaryLayer):
            module.remove_alpha()
            cls = _class_with_parametrizations(module, _plain_class_of(module))
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
def binary_layers(model: nn.Module) -> dict[str, _BinaryLayer]:
    """Return the binary layers of a model by name, in the order of their registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BinaryLayer)}


@check_types
def set_stage_(model: Model, stage: Stage) -> Model:
    """Let all binary layers of a model use real weights (stage 1) or binary ones (stage 2), in place.

    Raises:
        ValueError: for another stage, or a model without binary layers.
    """
    _check_stage(stage)
    for layer in _checked_layers(model).values():
        layer.stage = stage
    return model


@check_types
def set_frequency_(model: Model, frequency: float) -> Model:
    """Let all binary layers of a model use another frequency, in place; this changes which weights are +1.

    Raises:
        ValueError: for another frequency, or a model without binary layers.
    """
    check_frequency(frequency)
    for layer in _checked_layers(model).values():
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
        if _plain_class(module := model.get_submodule(name)) is None:
            raise ValueError(f"{name!r} was a convolution or linear layer, here it is a {type(module).__name__}")
    generator = torch.Generator().manual_seed(seed)
    for name, options in layers.items():
        module = model.get_submodule(name)
        plain = _plain_class(module)
        assert plain is not None
        module.__class__ = _class_with_parametrizations(module, _BINARY[plain])
        assert isinstance(module, _BinaryLayer)
        module.add_alpha(**options, generator=generator)
    model._register_state_dict_hook(_add_description)  # type: ignore[no-untyped-call]
    model._register_load_state_dict_pre_hook(_take_description, with_module=True)  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and binary_layers(module):
            module.register_forward_pre_hook(_no_fast_path)


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The layer class that a module exactly is, parametrizations aside."""
    cls = type(module).__bases__[0] if is_parametrized(module) else type(module)
    return cls if cls in _BINARY else None


def _plain_class_of(layer: _BinaryLayer) -> type[nn.Module]:
    return next(plain for plain, binary in _BINARY.items() if isinstance(layer, binary))


def _checked_layers(model: nn.Module) -> dict[str, _BinaryLayer]:
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


# Deployment


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
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.Hardtanh(), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> deployed = to_deploy_binary(convert_binary_(net, stage=2))
        >>> x = torch.rand(16, 8)
        >>> deployed[2].codes.dtype, torch.allclose(deployed(x), net.eval()(x))
        (torch.int8, True)
    """
    for name, layer in _checked_layers(model).items():
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
        _deploy_(layer, _plain_class_of(layer), signs.to(torch.int8), alpha, kept)
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
    about = {"version": VERSION, "shapes": shapes, "checksum": _checksum(tensors, {}, shapes)}
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
    if any(isinstance(part, _BinaryLayer | _DeployLayer) for part in module.modules()):
        raise ValueError("load_binary takes a module that is not binary; make a fresh one, or restore_binary_ this one")
    _make_plain(module)
    modules = dict(module.named_modules())
    for layer, shape in shapes.items():
        weight = getattr(modules.get(layer), "weight", None)
        found = tuple(weight.shape) if isinstance(weight, Tensor) else None
        if layer not in modules or _plain_class(modules[layer]) is None or found != tuple(shape):
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
        plain = _plain_class(target)
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
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__", {})
    except Exception as error:  # safetensors leaves some kinds of damage to whatever its own code stumbles over
        raise ValueError(
            f"{path!r} is no safetensors file, or a damaged one ({error}); copy it again, or write it with save_binary"
        ) from error
    if FORMAT not in metadata:
        raise ValueError(f"{path!r} is a safetensors file, but none that save_binary wrote")
    try:
        about = json.loads(metadata[FORMAT])
        version, shapes, checksum = (about[key] for key in ("version", "shapes", "checksum"))
        newer = version > VERSION
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path!r} is damaged: its header cannot be read ({error!r}); copy it again") from error
    if newer:
        raise ValueError(
            f"{path!r} has version {version} of its format, this lightning_plugins reads {VERSION}; upgrade it"
        )
    if checksum != _checksum(tensors, {}, shapes):
        raise ValueError(f"{path!r} is damaged: its checksum differs from the one that was written; copy it again")
    return shapes, tensors


# Pictures


def binary_figure(model: nn.Module) -> Figure:
    """Draw where the weights of a binary model stand on the wave, and the quantization error of each layer.

    Args:
        model: converted by :func:`convert_binary_` with the periodic estimator.
    """
    from matplotlib.figure import Figure

    layers = binary_layers(model)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    waves, errors = figure.subplots(1, 2, width_ratios=(3, 4))
    with torch.no_grad():
        values = torch.cat([torch.sin(each.frequency * _in_float(each.weight)).flatten() for each in layers.values()])
        heights = [float(quantization_error(each.weight, each.frequency)) for each in layers.values()]
    counts = torch.histc(values.cpu(), bins=41, min=-1, max=1)
    width = 2 / len(counts)
    centres = [-1 + (i + 0.5) * width for i in range(len(counts))]
    waves.bar(centres, (100 * counts / counts.sum()).tolist(), width=0.9 * width, color="#4477aa")
    waves.set_xlabel("sine of frequency times weight")
    waves.set_ylabel("weights (%)")
    errors.bar(range(len(heights)), heights, width=0.8, color="#4477aa")
    errors.axhline(1 - 2 / math.pi, color="#aa3377", linestyle="--", linewidth=1)
    errors.annotate(
        "uniform phase: 1 - 2/π", (0.99, 1 - 2 / math.pi), (0, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", color="#aa3377", fontsize=9,
    )  # fmt: skip
    errors.set_xticks(range(len(heights)), [str(i + 1) for i in range(len(heights))], fontsize=8)
    errors.set_xlabel("binary layer")
    errors.set_ylabel("quantization error")
    for axes in (waves, errors):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
