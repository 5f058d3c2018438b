"""A trained network at fixed bits, made of plain modules that exporters understand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lightning_plugins.checks import check_types
from lightning_plugins.quantization.convert import (
    _add_spec,
    _class_with_parametrizations,
    _float_class_of,
    _replace,
    forget_spec_,
    quantized_layers,
    switch_,
)
from lightning_plugins.quantization.copying import copy_network
from lightning_plugins.quantization.graph import normalized_layers
from lightning_plugins.quantization.layers import (
    FULL_PRECISION,
    InputQuantizer,
    MultiPrecisionBatchNorm,
    ResidualQuantizer,
    _QuantConv,
    _quantize_first_input,
    _quantize_output,
    _QuantLayer,
)
from lightning_plugins.quantization.quantizers import code_range

__all__ = ["DeployConv", "DeployLinear", "DeployQuantizer", "to_deploy"]

# These classes normalise in evaluation as their statistics say; a user's own subclass may do something else.
_FOLDABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


@check_types
def to_deploy(model: nn.Module, bits: int | Mapping[str, int]) -> nn.Module:
    """Return an independent copy of a converted model that computes at fixed bits, for inference and export.

    Each quantized layer becomes a plain module that holds int8 codes, a scale for each output channel and the scale of
    its inputs; a batch normalisation that does nothing but normalise a layer's output is folded into that layer. The
    copy is in evaluation mode, needs no gradients, computes in float32 on the model's device, and gives the outputs of
    the model in evaluation at these bits, up to float rounding. Pruning masks and parametrizations are made permanent
    in it. It goes through ``torch.export`` and, by :func:`.export_onnx`, to ONNX.

    The user's own hooks on layers and normalisations that are replaced are left out.

    Args:
        model: converted by :func:`.convert_` and trained, or read by :func:`.load_packed`; a LightningModule too. It
            stays as it is.
        bits: one of its precisions, or a :class:`.BitPlan`, as in :func:`.switch_`.

    Returns:
        The copy, of the model's class, unless the model is itself one layer.

    Raises:
        ValueError: for bits that the model was not converted for, and if an input scale was never set at these bits.

    Example:
        >>> from lightning_plugins.quantization import convert_, switch_
        >>> _ = torch.manual_seed(0)
        >>> net = convert_(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), (8, 4), first_last_bits=4)
        >>> x = torch.rand(16, 8)
        >>> _ = switch_(net.train(), 4)(x)  # stands for training: it sets the input scales
        >>> deployed = to_deploy(net, 4)
        >>> deployed[2].codes.dtype, torch.allclose(deployed(x), net.eval()(x))
        (torch.int8, True)
    """
    copy = copy_network(model).eval().requires_grad_(False)
    switch_(copy, bits)
    _check_ready(copy)
    _make_weights_permanent(copy)
    follows = _foldable_norms(copy)
    residual = [
        (module, quantizer)
        for module in copy.modules()
        if isinstance(quantizer := module._modules.get("residual_quantizer"), ResidualQuantizer)
    ]
    for module, _ in residual:
        ResidualQuantizer.detach_(module)

    replaced: dict[nn.Module, nn.Module] = {}
    for module in list(copy.modules()):
        if isinstance(module, MultiPrecisionBatchNorm):
            replaced[module] = module.active
        elif isinstance(module, _QuantLayer):
            if module.num_bits == FULL_PRECISION:
                module.remove_quantizers()
                module.__class__ = _float_class_of(type(module))  # type: ignore[assignment]
            else:
                replaced[module] = DeployConv(module) if isinstance(module, _QuantConv) else DeployLinear(module)
    copy.float()  # codes come from the weights in their own type
    for norm, layer in follows.items():
        if _fold_(replaced.get(layer, layer), replaced.get(norm, norm)):
            replaced[norm] = nn.Identity()
    for name, module in list(copy.named_modules()):
        if module in replaced and name:
            _replace(copy, name, replaced[module])
    for module, quantizer in residual:
        if quantizer.num_bits != FULL_PRECISION:
            _attach_(replaced.get(module, module), quantizer)
    for module in copy.modules():
        forget_spec_(module)
    return replaced.get(copy, copy).eval().requires_grad_(False)


def _onnx(operator: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, **attributes: Any) -> Tensor:
    """Stand for an ONNX operator in a graph that is being exported.

    The exporter's own translations of torch's quantization operators would not do: they drop limits below 8 bits, make
    shifted codes signed, and know no scales for each channel before onnxscript 0.7.1.
    """
    return torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=inputs[0].shape)


class DeployQuantizer(nn.Module):
    """Round to integer codes and back.

    The arguments are constants, which exporters write into the graph; they are no part of the ``state_dict``.

    Args:
        scale: step of the codes, positive.
        bits: 2 to 8.
        signed: int8 codes of both signs; otherwise uint8 codes from 0.
    """

    def __init__(self, scale: float, *, bits: int, signed: bool) -> None:
        super().__init__()
        self.scale, self.bits, self.signed = scale, bits, signed

    @classmethod
    def like(cls, quantizer: InputQuantizer, bits: int) -> DeployQuantizer:
        """Take scale and sign from a trained quantizer."""
        return cls(float(quantizer.scales[str(bits)]), bits=bits, signed=bool(quantizer.signed))

    @property
    def shift(self) -> int:
        """By how many bits codes are shifted to the left in ONNX.

        Integer runtimes round biases to multiples of input scale times weight scale, which at few bits moves many of
        the next layer's codes. A finer scale moves few. Seven bits, because processors without VNNI saturate when they
        add two products of eight. ONNX shifts unsigned integers only.
        """
        return 0 if self.signed else max(7 - self.bits, 0)

    @property
    def integer_scale(self) -> float:
        """Step of the shifted codes."""
        return self.scale / float(2**self.shift)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs as multiples of the scale."""
        low, high = code_range(self.bits, signed=self.signed)
        if not torch.onnx.is_in_onnx_export():
            # A division, as in training and in ONNX, and by a tensor, or a GPU would multiply by 1 / scale: that gives
            # another code at a tie, and what comes from 8-bit codes has ties.
            step = torch.full((), self.scale, dtype=torch.float32, device=inputs.device)
            return (inputs.float() / step).round().clamp(low, high) * step
        dtype = torch.int8 if self.signed else torch.uint8
        scale, zero = torch.tensor(self.scale), torch.zeros((), dtype=dtype)
        codes = _onnx("QuantizeLinear", (inputs, scale, zero), dtype)
        if self.bits < 8:
            codes = codes.clamp(low, high)  # QuantizeLinear saturates at the limits of the type
        if self.shift:
            scale = torch.tensor(self.integer_scale)
            codes = _onnx("BitShift", (codes, torch.tensor(self.shift, dtype=dtype)), dtype, direction="LEFT")
        return _onnx("DequantizeLinear", (codes, scale, zero), torch.float32)

    def extra_repr(self) -> str:
        """Show the codes' format."""
        return f"scale={self.scale:.4g}, bits={self.bits}, signed={self.signed}"


class _DeployLayer(nn.Module):
    """What the deployed layers share.

    Attributes:
        codes: int8, of the weight's shape, in the range of ``bits``.
        scale: ``(C,)`` for C output channels; negative where a folded normalisation was.
        bias: ``(C,)`` or None.
        input_quantizer: quantizes what comes in, or None.
        input_scale: step of the integers that come in, from this quantizer or one upstream; None if they are floats.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: _QuantLayer) -> None:
        super().__init__()
        self.bits = layer.num_bits
        self.normalized = False
        codes = layer.weight_codes()
        step = layer.weight_scale.detach().float() * 2.0 ** (layer.high_bits - layer.num_bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", step.expand(len(codes)).clone())
        bias = cast(Tensor | None, layer.bias)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.input_quantizer: DeployQuantizer | None = None
        self.input_scale: float | None = None
        if layer.quantizes_input():
            self.input_quantizer = DeployQuantizer.like(cast(InputQuantizer, layer.input_quantizer), self.bits)
            self.input_scale = self.input_quantizer.integer_scale

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for."""
        if torch.onnx.is_in_onnx_export():
            return _onnx("DequantizeLinear", (self.codes, self.scale), torch.float32, axis=0)
        return self.codes * self.scale.view(-1, *[1] * (self.codes.ndim - 1))

    def suit_integers_(self) -> None:
        """Choose codes and scale so that the bias can be an integer beside them; the weight stays the same.

        Codes below 8 bits leave room for a multiple of theirs in int8. Of these multiples each channel takes the one at
        which its bias comes closest to a multiple of input scale times weight scale. In a channel that a normalisation
        has all but switched off the bias would not fit into 32 bits; there the scale grows, and codes become small.
        """
        if self.bias is None or self.input_scale is None:
            return
        unit = self.input_scale * self.scale.double()
        multiples = torch.arange(2 ** (8 - self.bits), 0, -1, device=unit.device)[:, None]
        in_units = self.bias * multiples / unit
        multiple = multiples[((in_units - in_units.round()) / multiples).abs().argmin(0), 0]
        scale = self.scale / multiple
        least = (self.bias.abs() / (self.input_scale * 2**30)).clamp_min(1e-20)
        grown = torch.where(scale.abs() < least, least, scale)
        factor = (multiple * (scale / grown)).view(-1, *[1] * (self.codes.ndim - 1))
        self.codes, self.scale = (self.codes * factor).round().to(torch.int8), grown

    def quantized(self, inputs: Tensor) -> Tensor:
        """Return the inputs as this layer sees them."""
        return inputs if self.input_quantizer is None else self.input_quantizer(inputs)

    def extra_repr(self) -> str:
        """Show shape and precision."""
        return f"{tuple(self.codes.shape)}, bits={self.bits}"


class DeployConv(_DeployLayer):
    """A convolution on int8 codes, one- or two-dimensional; made by :func:`to_deploy`."""

    def __init__(self, layer: _QuantConv) -> None:
        super().__init__(layer)
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        # Pairs of before and after, the last dimension first: what padding="same" came to as well.
        around = layer._reversed_padding_repeated_twice
        pairs = list(zip(around[::2], around[1::2], strict=True))
        by_kernel = layer.padding_mode == "zeros" and all(before == after for before, after in pairs)
        self.padding = tuple(before if by_kernel else 0 for before, _ in reversed(pairs))
        self.around = [] if by_kernel else list(around)
        self.padding_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve."""
        if self.around:
            inputs = F.pad(inputs, self.around, mode=self.padding_mode)
        convolve = F.conv1d if self.codes.ndim == 3 else F.conv2d
        return convolve(
            self.quantized(inputs), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class DeployLinear(_DeployLayer):
    """A linear layer on int8 codes; made by :func:`to_deploy`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer."""
        if self.normalized and inputs.ndim != 2:
            # Of anything else the normalisation would not have taken the dimension that this layer makes.
            raise ValueError(
                "a batch normalisation was folded into this linear layer, so its inputs must be (N, C), got shape "
                f"{tuple(inputs.shape)}; put an nn.Identity between the two in the model before convert_"
            )
        return F.linear(self.quantized(inputs), self.weight, self.bias)


def _check_ready(model: nn.Module) -> None:
    quantizers: list[tuple[str, InputQuantizer, int]] = [
        (name, cast(InputQuantizer, layer.input_quantizer), layer.num_bits)
        for name, layer in quantized_layers(model).items()
        if layer.quantizes_input()
    ]
    quantizers += [
        (name, module, module.num_bits)
        for name, module in model.named_modules()
        if isinstance(module, ResidualQuantizer) and module.num_bits != FULL_PRECISION
    ]
    missing = {name: bits for name, quantizer, bits in quantizers if not quantizer.is_ready(bits)}
    if missing:
        name, bits = next(iter(missing.items()))
        raise ValueError(
            f"{len(missing)} of {len(quantizers)} input scales were never set, first that of {name!r} at {bits} bits; "
            "train at these bits, or after switch_ run a few batches through the model in training mode"
        )


def _make_weights_permanent(model: nn.Module) -> None:
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
        if parametrize.is_parametrized(module):
            # Torch changes the class below, which this copy has in common with the model.
            module.__class__ = _class_with_parametrizations(module, type(module).__bases__[0])
            for name in list(cast(nn.ModuleDict, module.parametrizations)):
                parametrize.remove_parametrizations(module, name)


def _foldable_norms(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return each batch normalisation that may be folded, with its layer."""
    # Names in `follows` count from the module that was converted, which may be part of this model.
    root = next((name for name, module in model.named_modules() if _is_converted_root(module)), "")
    modules = dict(model.named_modules())
    names = normalized_layers(model)  # of plain normalisations, which batch_norm="shared" leaves
    for name, module in modules.items():
        if isinstance(module, MultiPrecisionBatchNorm) and module.follows is not None:
            names[name] = f"{root}.{module.follows}".lstrip(".")
    return {modules[norm]: modules[layer] for norm, layer in names.items() if layer in modules}


def _fold_(layer: nn.Module, norm: nn.Module) -> bool:
    """Fold a normalisation into a layer, and say whether that was possible."""
    if type(norm) not in _FOLDABLE:
        return False
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        return False
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    if isinstance(layer, _DeployLayer) and len(layer.scale) == norm.num_features:
        scale, bias = fuse_conv_bn_weights(layer.scale[:, None], layer.bias, *statistics)
        layer.scale, layer.bias, layer.normalized = scale.detach().flatten(), bias.detach(), True
        return True
    if type(layer) in (nn.Conv1d, nn.Conv2d):
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics)
        return True
    return False


def _attach_(module: nn.Module, trained: ResidualQuantizer) -> None:
    quantizer = DeployQuantizer.like(trained, trained.BITS)
    module.add_module("residual_quantizer", quantizer)
    if trained.to_output:
        module.register_forward_hook(_quantize_output)
        return
    module.register_forward_pre_hook(_quantize_first_input, with_kwargs=True)
    for layer in module.modules():
        if isinstance(layer, _DeployLayer) and layer.input_quantizer is None:
            layer.input_scale = quantizer.integer_scale


def _is_converted_root(module: nn.Module) -> bool:
    return any(getattr(hook, "hook", hook) is _add_spec for hook in module._state_dict_hooks.values())
