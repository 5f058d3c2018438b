"""Layers that hold one set of weights and compute at several precisions."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_plugins._processes import distributed
from lightning_plugins.checks import check_types
from lightning_plugins.quantization.quantizers import (
    SMALLEST_SCALE,
    ScaleGrad,
    _align,
    code_range,
    conv_on_quantized,
    double_rounding,
    fake_quantize,
    linear_on_quantized,
    lsq_scale,
    percentile_scale,
    quantize_codes,
    smallest_scale,
    switch_codes,
    weight_scale,
)

__all__ = [
    "FULL_PRECISION",
    "InputQuantizer",
    "MultiPrecisionBatchNorm",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "ResidualQuantizer",
]

FULL_PRECISION = 32
"""The precision at which nothing is quantized."""

InputInit = Literal["percentile", "lsq"]


class InputQuantizer(nn.Module):
    """Quantize activations with one learned scale for each precision.

    A scale starts from the first batch that is seen in training mode at its precision (the mean over processes where
    there are several); the first of them also decides between codes of both signs and, where no value is negative,
    codes from 0. Before that, in evaluation, every batch gets a scale of its own.

    Args:
        bits: the precisions, each 2 to 8.
        init: ``"percentile"`` spreads the codes over all but 0.1 % of the values at each end, ``"lsq"`` starts from
            ``2 mean|x| / sqrt(Qp)``.

    Shape:
        - input and output of any one shape.

    Example:
        >>> quantizer = InputQuantizer((8, 4))
        >>> quantizer(torch.linspace(0, 1, 1001), bits=4).unique().numel()
        16
    """

    ready: Tensor
    signed: Tensor

    @check_types
    def __init__(self, bits: Sequence[int], *, init: InputInit = "percentile") -> None:
        super().__init__()
        if init not in ("percentile", "lsq"):
            raise ValueError(f"init must be 'percentile' or 'lsq', got {init!r}")
        self.bits = tuple(bits)
        self.init = init
        self.scales = nn.ParameterDict({str(b): nn.Parameter(torch.ones(())) for b in self.bits})
        self.register_buffer("ready", torch.zeros(len(self.bits), dtype=torch.bool))
        self.register_buffer("signed", torch.zeros((), dtype=torch.bool))
        # The buffers in plain Python: looking into a tensor would make an accelerator wait and break a compiled graph.
        self._ready: tuple[int, ...] = ()
        self._signed = False

    def is_ready(self, bits: int) -> bool:
        """Whether the scale of a precision has been set, from data or from a checkpoint."""
        return bits in self._ready

    def scale_and_sign(self, inputs: Tensor, bits: int) -> tuple[Tensor, bool]:
        """Return the scale to use for these inputs, and whether codes have both signs; set them where it is time to."""
        if bits in self._ready:
            return self.scales[str(bits)], self._signed
        measured: tuple[Tensor, bool] = self._measure(inputs, bits, store=self.training)
        return measured

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _measure(self, inputs: Tensor, bits: int, *, store: bool) -> tuple[Tensor, bool]:
        inputs = inputs.detach()
        self._read_buffers()  # averaged models and DistributedDataParallel write them without load_state_dict
        if bits in self._ready:
            return self.scales[str(bits)], self._signed
        signed = self._signed if self._ready else bool((inputs < 0).any())
        together = store and distributed()
        if together and not self._ready:
            flag = torch.tensor(float(signed), device=inputs.device)
            torch.distributed.all_reduce(flag)
            signed = bool(flag > 0)
        measure = percentile_scale if self.init == "percentile" else lsq_scale
        known = inputs if inputs.numel() else inputs.new_zeros(1)
        scale = measure(known, bits=bits, signed=signed)
        if not store:
            return scale, signed
        if together:
            torch.distributed.all_reduce(scale)
            scale /= torch.distributed.get_world_size()
        parameter = self.scales[str(bits)]
        if SMALLEST_SCALE < scale < torch.inf:  # else all are 0, or one is no number; the next batch may tell more
            with torch.no_grad():
                parameter.copy_(scale)
                self.ready[self.bits.index(bits)] = True
                self.signed.fill_(signed)
            self._read_buffers()
        return parameter, signed

    @check_types
    def forward(self, inputs: Tensor, bits: int) -> Tensor:
        """Return the inputs, fake-quantized."""
        scale, signed = self.scale_and_sign(inputs, bits)
        return fake_quantize(inputs, scale, bits=bits, signed=signed)

    def clipped_share(self, inputs: Tensor, bits: int) -> Tensor:
        """Return the share of these inputs, in [0, 1], that lies outside of the range at a precision."""
        scale, signed = self._measure(inputs, bits, store=False)
        low, high = code_range(bits, signed=signed)
        share: Tensor = ((inputs < low * scale) | (inputs > high * scale)).float().mean()
        return share

    def _read_buffers(self) -> None:
        self._ready = tuple(b for b, ready in zip(self.bits, self.ready.tolist(), strict=True) if ready)
        self._signed = bool(self.signed)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):  # a checkpoint of the fp32 net: start anew
            state_dict |= {prefix + key: value for key, value in self.state_dict().items()}
            state_dict[prefix + "ready"] = torch.zeros_like(self.ready)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.ready.is_meta:
            self._read_buffers()

    def extra_repr(self) -> str:
        """Name the precisions."""
        return f"bits={self.bits}"


class _QuantLayer(nn.Module):
    """What the quantized layers share. An fp32 layer becomes one by changing its class, so all that refers to it holds.

    Attributes:
        bits: the precisions it can take, highest first; 32 among them is full precision.
        precisions: those of the whole model; a layer with a least precision of its own takes fewer.
        high_bits: precision of the codes that all others derive from.
        num_bits: the precision in use.
        weight_scale: step of the ``high_bits`` codes, ``(C,)`` or one value.
        input_quantizer: quantizes what comes in, or None.
        shared_input_bits: the input comes quantized at this precision already (0: it does not).
    """

    weight: Tensor
    codes: Tensor | None
    bits: tuple[int, ...]
    precisions: tuple[int, ...]
    num_bits: int
    high_bits: int
    weight_scale: nn.Parameter
    input_quantizer: InputQuantizer | None
    per_channel: bool
    scale_grad: ScaleGrad
    shared_input_bits: int
    quantize_input: bool
    input_init: InputInit

    def add_quantizers(
        self,
        bits: Sequence[int],
        *,
        precisions: Sequence[int],
        per_channel: bool = True,
        scale_grad: ScaleGrad = "effective",
        quantize_input: bool = True,
        input_init: InputInit = "percentile",
        shared_input_bits: int = 0,
    ) -> None:
        """Give a layer, whose class has just been changed to this one, what it needs beyond its weights."""
        self.bits, self.precisions = tuple(bits), tuple(precisions)
        quantized = tuple(b for b in self.bits if b != FULL_PRECISION)
        self.high_bits, self.num_bits = quantized[0], self.bits[0]
        self.per_channel, self.scale_grad, self.shared_input_bits = per_channel, scale_grad, shared_input_bits
        self.quantize_input, self.input_init = quantize_input, input_init
        weight = self.weight
        shape = weight.shape[:1] if per_channel else ()
        self.weight_scale = nn.Parameter(torch.ones(shape, dtype=weight.dtype, device=weight.device))
        if not weight.is_meta:
            self.reset_weight_scale()
        own = tuple(b for b in quantized if b != shared_input_bits)
        self.input_quantizer = None
        if quantize_input and own:
            self.input_quantizer = InputQuantizer(own, init=input_init).to(weight).train(self.training)
        self.register_buffer("codes", None)
        self.register_load_state_dict_post_hook(_remake_weight_scale)  # type: ignore[no-untyped-call]

    def remove_quantizers(self) -> None:
        """Take away all that :meth:`add_quantizers` gave."""
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _remake_weight_scale]:
            del hooks[key]
        del self.weight_scale, self.input_quantizer, self.codes, self.bits, self.precisions, self.high_bits
        del self.num_bits, self.per_channel, self.scale_grad, self.shared_input_bits
        del self.quantize_input, self.input_init

    def describe(self) -> dict[str, Any]:
        """Return the arguments of :meth:`add_quantizers`, without the model's precisions."""
        return {
            "bits": list(self.bits),
            "per_channel": self.per_channel,
            "scale_grad": self.scale_grad,
            "quantize_input": self.quantize_input,
            "input_init": self.input_init,
            "shared_input_bits": self.shared_input_bits,
        }

    def reset_weight_scale(self) -> None:
        """Set the scale from the weights as they are."""
        scale = weight_scale(self.weight, bits=self.high_bits, per_channel=self.per_channel)
        with torch.no_grad():
            self.weight_scale.copy_(scale.clamp_min(smallest_scale(self.weight_scale.dtype)))

    def weight_codes(self, bits: int | None = None) -> Tensor:
        """Return the int8 codes of the weight at a precision; default the one in use."""
        bits = self.num_bits if bits is None else bits
        if self.codes is not None:
            return switch_codes(self.codes, high_bits=self.high_bits, bits=bits)
        return quantize_codes(self.weight, self.weight_scale, bits=bits, high_bits=self.high_bits)

    def quantized_weight(self) -> Tensor:
        """Return the weight at the precision in use, differentiable while there are weights and not only codes."""
        if self.codes is None:
            if self.num_bits == FULL_PRECISION:
                return self.weight
            return double_rounding(
                self.weight, self.weight_scale, bits=self.num_bits, high_bits=self.high_bits, scale_grad=self.scale_grad
            )
        codes = self.weight_codes().to(self.weight_scale.dtype)
        step = self.weight_scale.detach() * 2.0 ** (self.high_bits - self.num_bits)
        return codes * _align(step, codes)

    @torch.no_grad()
    def clipped_weight_share(self, bits: int) -> Tensor:
        """Return the share of the weights, in [0, 1], that lies outside of the range at a precision."""
        low, high = code_range(bits)
        scale = self.weight_scale * 2.0 ** (self.high_bits - bits)
        u = self.weight / _align(scale, self.weight)
        return ((u < low) | (u > high)).float().mean()

    def keep_only_codes_(self, codes: Tensor) -> None:
        """Replace the weights by their highest codes; training ends here."""
        if parametrize.is_parametrized(self, "weight"):
            parametrize.remove_parametrizations(self, "weight")
        elif prune.is_pruned(self):
            prune.remove(self, "weight")  # type: ignore[no-untyped-call]
        del self.weight
        self.codes = codes

    def quantizes_input(self) -> bool:
        """Whether this layer itself quantizes its input at the precision in use."""
        return self.input_quantizer is not None and self.num_bits not in (FULL_PRECISION, self.shared_input_bits)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        fresh = prefix + "weight_scale" not in state_dict  # a checkpoint of the fp32 net
        if fresh:
            state_dict[prefix + "weight_scale"] = self.weight_scale.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._scale_is_stale = fresh and self.codes is None and not self.weight_scale.is_meta

    def extra_repr(self) -> str:
        """Add the precisions to what the fp32 layer says of itself."""
        return f"{super().extra_repr()}, bits={self.bits}, num_bits={self.num_bits}"


def _remake_weight_scale(layer: nn.Module, keys: Any) -> None:
    """After the whole layer was loaded: parametrizations come after it, and pruning masks the weight in the forward."""
    if layer.__dict__.pop("_scale_is_stale", False):
        assert isinstance(layer, _QuantLayer)
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(layer, None)
        layer.reset_weight_scale()


class _QuantConv(_QuantLayer):
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    _reversed_padding_repeated_twice: list[int]

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve at the precision in use."""
        padding = self.padding
        if self.padding_mode != "zeros":
            inputs = F.pad(inputs, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.stride)
        weight = self.quantized_weight()
        if isinstance(padding, str):
            # Only "same" may be uneven; what is even goes to the kernel, the rest is padded here.
            before, after = self._reversed_padding_repeated_twice[::2], self._reversed_padding_repeated_twice[1::2]
            even = tuple(min(pair) for pair in zip(before, after, strict=True))
            extra = [side - e for b, a, e in zip(before, after, even, strict=True) for side in (b, a)]
            inputs, padding = (F.pad(inputs, extra) if any(extra) else inputs), even[::-1]
        arguments = self.stride, padding, self.dilation, self.groups
        if self.quantizes_input():
            scale, signed = self.input_quantizer.scale_and_sign(inputs, self.num_bits)  # type: ignore[union-attr]
            return conv_on_quantized(inputs, scale, weight, self.bias, arguments, bits=self.num_bits, signed=signed)
        return (F.conv1d if weight.ndim == 3 else F.conv2d)(inputs, weight, self.bias, *arguments)


class QuantConv2d(_QuantConv, nn.Conv2d):
    """A ``Conv2d``, also grouped or depthwise, at several precisions; made by :func:`.convert_`."""


class QuantConv1d(_QuantConv, nn.Conv1d):
    """A ``Conv1d``, also grouped or depthwise, at several precisions; made by :func:`.convert_`."""


class QuantLinear(_QuantLayer, nn.Linear):
    """A ``Linear`` layer at several precisions; made by :func:`.convert_`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer at the precision in use."""
        weight = self.quantized_weight()
        if self.quantizes_input():
            scale, signed = self.input_quantizer.scale_and_sign(inputs, self.num_bits)  # type: ignore[union-attr]
            return linear_on_quantized(inputs, scale, weight, self.bias, bits=self.num_bits, signed=signed)
        return F.linear(inputs, weight, self.bias)


class MultiPrecisionBatchNorm(nn.Module):
    """One batch normalisation for each precision, chosen by ``num_bits``; each starts as a copy of the fp32 one.

    A precision's net has its own activations, hence its own statistics; switching without switching them is the classic
    silent error. With ``previous`` it is transitional: one for each pair of the bits of the layer before and those of
    the layer that it follows, chosen by ``previous_bits`` and ``num_bits``, for nets whose layers have bits of their
    own. A checkpoint of the fp32 net loads: every precision gets its values. A transitional one also takes a checkpoint
    of one normalisation for each precision: each pair gets the values of the layer's bits.

    Args:
        norm: the batch normalisation to multiply.
        bits: the precisions.
        follows: name of the layer whose output it normalises, and nothing else; None if that is not known.
        previous: name of the quantized layer before that one; None for one normalisation for each precision.

    Example:
        >>> norm = MultiPrecisionBatchNorm(nn.BatchNorm2d(3), (8, 4))
        >>> norm.num_bits = 4
        >>> norm(torch.rand(2, 3, 5, 5)).shape
        torch.Size([2, 3, 5, 5])
        >>> list(MultiPrecisionBatchNorm(nn.BatchNorm2d(3), (8, 4), follows="conv2", previous="conv1").norms)
        ['8_8', '8_4', '4_8', '4_4']

    Reference:
        Bulat, Tzimiropoulos, *Bit-Mixer: Mixed-Precision Networks with Runtime Bit-Width Selection*, 2021, for the
        transitional form.
    """

    @check_types
    def __init__(
        self, norm: nn.Module, bits: Sequence[int], *, follows: str | None = None, previous: str | None = None
    ) -> None:
        super().__init__()
        if not bits:
            raise ValueError("bits must hold at least one precision, such as (8, 4)")
        self.follows, self.previous = follows, previous
        self.bits = tuple(sorted(bits, reverse=True))
        self.num_bits = self.previous_bits = self.bits[0]
        self.norms = nn.ModuleDict({key: deepcopy(norm) for key in self.keys()})
        self.training = self.norms.training = norm.training

    def key(self, num_bits: int, previous_bits: int) -> str:
        """Return the name in ``norms`` of the one for these bits."""
        return str(num_bits) if self.previous is None else f"{previous_bits}_{num_bits}"

    def keys(self) -> dict[str, tuple[int, int]]:
        """Return the names in ``norms``, each with the layer's bits and those of the layer before."""
        before = self.bits if self.previous is not None else self.bits[:1]
        pairs = [(b, p if self.previous is not None else b) for p in before for b in self.bits]
        return {self.key(b, p): (b, p) for b, p in pairs}

    @property
    def active(self) -> nn.Module:
        """The one in use."""
        return self.norms[self.key(self.num_bits, self.previous_bits)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise with the statistics of the precision in use."""
        output: Tensor = self.active(inputs)
        return output

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.active.state_dict():
            value = state_dict.pop(prefix + name, None)  # that of the fp32 net's one normalisation
            for key, (b, _) in self.keys().items():
                of_bits = value if value is not None else state_dict.get(f"{prefix}norms.{b}.{name}")
                if of_bits is not None:
                    state_dict[f"{prefix}norms.{key}.{name}"] = of_bits
            if self.previous is not None:
                for b in self.bits:
                    state_dict.pop(f"{prefix}norms.{b}.{name}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ResidualQuantizer(InputQuantizer):
    """Quantize what enters a residual sum to 8 bits, so that an integer runtime adds integers.

    It sits on a module as ``residual_quantizer`` and is called by a hook: on what goes in (a block whose input is added
    to what it computes) or on what comes out (a normalisation or layer whose output is added).
    """

    BITS = 8

    @check_types
    def __init__(self, *, init: InputInit = "percentile", to_output: bool = False) -> None:
        super().__init__((self.BITS,), init=init)
        self.to_output = to_output
        self.num_bits = self.BITS

    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        """Return the inputs, fake-quantized unless the net is at full precision."""
        return inputs if self.num_bits == FULL_PRECISION else super().forward(inputs, self.BITS)

    def attach_(self, module: nn.Module) -> None:
        """Put this quantizer on a module."""
        module.add_module("residual_quantizer", self.train(module.training))
        if self.to_output:
            module.register_forward_hook(_quantize_output)
        else:
            module.register_forward_pre_hook(_quantize_first_input, with_kwargs=True)

    @staticmethod
    def detach_(module: nn.Module) -> None:
        """Take it off again."""
        del module.residual_quantizer
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_quantize_output, _quantize_first_input)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


# At module level, so that a model with these hooks can be copied and pickled.
def _quantize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return module.residual_quantizer(output)  # type: ignore[operator, no-any-return]


def _quantize_first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if args:
        return (module.residual_quantizer(args[0]), *args[1:]), kwargs  # type: ignore[operator]
    first = next(iter(kwargs))
    return args, kwargs | {first: module.residual_quantizer(kwargs[first])}  # type: ignore[operator]
