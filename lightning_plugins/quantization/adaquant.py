"""AdaQuant: each layer of a quantized network is fitted to what it gave in full precision."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized

from lightning_plugins._progress import progress_bar
from lightning_plugins.checks import check_types, warn_caller
from lightning_plugins.quantization._calibration_batches import (
    CHECKS,
    Forward,
    as_list,
    call,
    check_fit_arguments,
    check_model,
    full_precision_copy,
    on_device,
    split,
)
from lightning_plugins.quantization.convert import quantized_layers, switch_
from lightning_plugins.quantization.graph import _LAYERS, _calls, _graphs
from lightning_plugins.quantization.layers import FULL_PRECISION, MultiPrecisionBatchNorm, _QuantLayer
from lightning_plugins.quantization.packed import borrowed
from lightning_plugins.quantization.quantizers import _align, smallest_scale
from lightning_plugins.quantization.scale_calibration import Bits, calibrate_scales_, scales_are_set

__all__ = ["LearningRates", "adaquant_"]

Mode = Literal["parallel", "sequential"]
MEMORY_LIMIT = 2**31
LayerParameters = dict[str, Tensor]


@check_types
@dataclass(frozen=True)
class LearningRates:
    """Adam's learning rates in AdaQuant, each relative to what it moves, so that they fit any layer and precision.

    The released code has absolute ones, tuned at 8 bits: 1e-5 for weights, 1e-3 for biases and weight ranges, 1e-1 for
    input ranges. At 8 bits and usual ranges the defaults are of their order; they were chosen at 3 bits on the digits.

    Attributes:
        weight: in steps of the quantizer; at 1e-3 a weight moves by at most about one step in 1000 iterations.
        bias: in root mean squares of the layer's output.
        weight_scale: of the logarithm, hence relative.
        input_scale: of the logarithm, hence relative.

    Raises:
        ValueError: for a negative rate.
    """

    weight: float = 5e-3
    bias: float = 1e-3
    weight_scale: float = 1e-3
    input_scale: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"the learning rate of {name} must be at least 0, got {value!r}")


@check_types
def adaquant_(
    model: nn.Module,
    batches: Iterable[Any],
    plan: Bits,
    *,
    mode: Mode = "parallel",
    num_steps: int = 1000,
    batch_size: int = 50,
    learning_rates: LearningRates | None = None,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    reference: nn.Module | None = None,
    forward: Forward | None = None,
    progress: bool = False,
) -> dict[str, tuple[float, float]]:
    """Fit weights, biases and scales of each quantized layer to the layer's full-precision output, in place: AdaQuant.

    Minimises ``|| f(Q(W + V), Q(X), b) - Y ||^2`` over V, the bias, the weight scale and the input scale by Adam, one
    layer after the other. X is the layer's input, in the full-precision net (``"parallel"``, the layers are
    independent) or in the net whose earlier layers are quantized already (``"sequential"``, which also makes up for
    their errors); Y is the output in the full-precision net. Where a batch normalisation does nothing but normalise the
    layer, both sides are compared behind it, as it is in evaluation, and where a ReLU follows, behind that: errors
    count as they go on to the next layer.

    A fifth of the rows, the last ones, is held out: the parameters with the least error on it are kept, the ones from
    the start among them, so that no layer becomes worse. Weights of exactly 0 (pruned ones) stay 0, and a weight that
    several modules share stays as it is. Scales that no data has set yet are set first, see
    :func:`calibrate_scales_`. The activations of one layer at a time are in memory.

    Args:
        model: converted by ``convert_(model, (*bits, 32))``; left at the plan.
        batches: inputs, or tuples that start with them; at least 2 samples in all.
        plan: bits of each layer, or of all. Layers at 32 are left out.
        mode: where a layer's input comes from.
        num_steps: iterations for each layer.
        batch_size: rows of each random minibatch.
        learning_rates: see :class:`LearningRates`.
        seed: of the minibatches.
        memory_limit: bytes for one layer's X and Y; a layer that needs more is fitted on fewer rows, with a warning.
        reference: the full-precision net, of the same conversion; default a copy of the model as it is now.
        forward: takes the model and inputs and runs it; default ``model(inputs)``.
        progress: whether to show a bar over the layers.

    Returns:
        For each layer, in the order in which they run, the held-out error before and after, relative to the mean square
        of the full-precision output.

    Raises:
        ValueError: for wrong arguments, too little data or memory, a model without precision 32, one of codes only, or
            one with pruned or parametrized weights that were not made permanent.

    Example:
        >>> from lightning_plugins.quantization import convert_
        >>> rng = torch.manual_seed(0)
        >>> net = convert_(nn.Sequential(nn.Linear(4, 8)), (4, 32), first_last_bits=4)
        >>> before, after = adaquant_(net, [torch.rand(50, 4)], 4, num_steps=20)["0"]
        >>> after <= before
        True

    Reference:
        Hubara et al., *Improving Post Training Neural Quantization*, 2020, section 3. The paper normalises by nothing
        and has zero points; here the error is relative and zero points are 0. An AdaRound-like limit of one step does
        not exist: a weight may move by several.
    """
    check_model(model)
    check_fit_arguments(mode, num_steps, batch_size)
    known, run, rates = as_list(batches), forward or call, learning_rates or LearningRates()
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if is_parametrized(layer) or prune.is_pruned(layer):
            raise ValueError(
                f"layer {name!r} has a weight that pruning or a parametrization makes; make it permanent first with "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
    reference = full_precision_copy(model) if reference is None else reference
    switch_(model, plan)
    if not scales_are_set(model):
        calibrate_scales_(model, known, plan, forward=forward)
    tails = _tails(reference)
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    names = [name for name in _execution_order(reference, known, run) if layers[name].num_bits != FULL_PRECISION]
    errors: dict[str, tuple[float, float]] = {}
    short: list[str] = []
    trimmed: list[str] = []
    for position, name in enumerate(progress_bar(names, title="AdaQuant", show=progress)):
        layer = layers[name]
        with borrowed(reference, FULL_PRECISION):
            x, y, total = _activations(reference, name, known, run, memory_limit)
        if mode == "sequential":
            del x
            with borrowed(model, plan):
                x, _, _ = _activations(model, name, known, run, memory_limit)
        if len(y) < total:
            trimmed.append(name)
        if len(y) < 2 * layer.weight[0].numel():
            short.append(name)
        generator = torch.Generator().manual_seed(1_000_003 * seed + position)
        errors[name] = _fit_layer(
            layer,
            x,
            y,
            tails.get(name, _identity),
            num_steps=num_steps,
            batch_size=batch_size,
            rates=rates,
            generator=generator,
            move_weight=uses[id(layer.weight)] == 1,
        )
        del x, y
    if short:
        warn_caller(
            f"AdaQuant may overfit {len(short)} of {len(names)} layers, which have fewer samples than twice the "
            "weights of an output channel; give more calibration data, or use pipeline='light'"
        )
    if trimmed:
        warn_caller(
            f"the activations of {len(trimmed)} layers ({trimmed[0]!r} first) did not fit into memory_limit="
            f"{memory_limit} bytes, and AdaQuant saw only a part of the samples there; raise memory_limit"
        )
    return errors


def layer_parameters(layer: _QuantLayer) -> LayerParameters:
    return {name: value.detach().clone() for name, value in layer.named_parameters()}


@torch.no_grad()
def set_layer_parameters(layer: _QuantLayer, values: LayerParameters) -> None:
    for name, parameter in layer.named_parameters():
        parameter.copy_(values[name])


def _fit_layer(
    layer: _QuantLayer,
    x: Tensor,
    y: Tensor,
    tail: Callable[[Tensor], Tensor],
    *,
    num_steps: int,
    batch_size: int,
    rates: LearningRates,
    generator: torch.Generator,
    move_weight: bool,
) -> tuple[float, float]:
    train, held = split(len(x))
    wanted = tail(y)
    power = float(wanted[: train.stop].double().square().mean()) or 1.0
    start = {name: value.detach() for name, value in layer.named_parameters()}
    step = _align(start["weight_scale"] * 2.0 ** (layer.high_bits - layer.num_bits), start["weight"])
    alive = start["weight"] != 0
    input_scale = f"input_quantizer.scales.{layer.num_bits}"
    free = {"weight_scale": (torch.zeros_like(start["weight_scale"]), rates.weight_scale)}
    if move_weight:
        free["weight"] = torch.zeros_like(start["weight"]), rates.weight
    if layer.quantizes_input():
        free[input_scale] = torch.zeros_like(start[input_scale]), rates.input_scale
    if "bias" in start:
        free["bias"] = torch.zeros_like(start["bias"]), rates.bias
    rms = float(y[: train.stop].double().square().mean().sqrt())

    def values() -> dict[str, Tensor]:
        made = {}
        for name, (change, _) in free.items():
            if name == "weight":
                made[name] = start[name] + step * change * alive
            elif name == "bias":
                made[name] = start[name] + rms * change
            else:
                made[name] = start[name] * change.exp()
        return made

    def squared_error(rows: Tensor | slice) -> Tensor:
        output: Tensor = functional_call(layer, values(), (x[rows],))
        return (tail(output) - wanted[rows]).square().mean() / power

    @torch.no_grad()
    def held_out() -> float:
        parts = [slice(i, min(i + batch_size, held.stop)) for i in range(held.start, held.stop, batch_size)]
        total: float = math.fsum(float(squared_error(part)) * (part.stop - part.start) for part in parts)
        return total / float(held.stop - held.start)

    first = least = held_out()
    best: dict[str, Tensor] | None = None
    groups = [{"params": [change.requires_grad_()], "lr": rate} for change, rate in free.values()]
    # Relative errors are small numbers, and so are LSQ's gradients of scales.
    optimizer = torch.optim.Adam(groups, eps=1e-12)
    training, layer.training = layer.training, False
    try:
        for iteration in range(num_steps):
            rows = torch.randint(train.stop, (batch_size,), generator=generator).to(x.device)
            with torch.enable_grad():
                gradients = torch.autograd.grad(squared_error(rows), [change for change, _ in free.values()])
            for (change, _), gradient in zip(free.values(), gradients, strict=True):
                change.grad = gradient
            optimizer.step()
            if (iteration + 1) % max(1, num_steps // CHECKS) == 0 or iteration + 1 == num_steps:
                now = held_out()
                if now < least:
                    with torch.no_grad():
                        least, best = now, values()
    finally:
        layer.training = training
    if best is not None:
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name in best:
                    floor = smallest_scale(parameter.dtype) if "scale" in name else -math.inf
                    parameter.copy_(best[name].clamp_min(floor))
    return first, least


def _identity(output: Tensor) -> Tensor:
    return output


def _tails(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return, by layer, what its output goes through before anything else reads it: normalisation, then ReLU."""
    tails: dict[str, Callable[[Tensor], Tensor]] = {}
    for prefix, graph in _graphs(model):
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            if not _calls(model, prefix, node, _LAYERS) or calls[node.target] > 1:
                continue
            norm, last = None, node
            follower = _only_user(last)
            if follower is not None and _calls(model, prefix, follower, (_BatchNorm, MultiPrecisionBatchNorm)):
                module = model.get_submodule(f"{prefix}{follower.target}")
                norm = module.norms[str(module.num_bits)] if isinstance(module, MultiPrecisionBatchNorm) else module
                last = follower
            follower = _only_user(last)
            relu = follower is not None and _is_relu(model, prefix, follower)
            tails[f"{prefix}{node.target}"] = _tail(norm if isinstance(norm, _BatchNorm) else None, relu=relu)
    return tails


def _tail(norm: _BatchNorm | None, *, relu: bool) -> Callable[[Tensor], Tensor]:
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return torch.relu if relu else _identity
    with torch.no_grad():
        slope = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            slope = slope * norm.weight
        shift = -norm.running_mean * slope
        if norm.bias is not None:
            shift = shift + norm.bias

    def apply(output: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (output.ndim - 2))
        normalised = output * slope.view(shape) + shift.view(shape)
        return normalised.relu() if relu else normalised

    return apply


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(model: nn.Module, prefix: str, node: fx.Node) -> bool:
    by_name = node.op == "call_function" and getattr(node.target, "__name__", "") in ("relu", "relu_")
    by_method = node.op == "call_method" and node.target in ("relu", "relu_")
    return by_name or by_method or _calls(model, prefix, node, (nn.ReLU,))


@torch.no_grad()
def _activations(
    model: nn.Module, name: str, batches: Sequence[Any], run: Forward, memory_limit: int
) -> tuple[Tensor, Tensor, int]:
    """Return a layer's inputs and outputs over the batches, as many as fit, and how many rows there would be."""
    taken: list[tuple[Tensor, Tensor]] = []
    rows = 0

    def take(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        nonlocal rows
        x = args[0] if args else next(iter(kwargs.values()))
        if taken and (x.shape[1:], output.shape[1:]) != (taken[0][0].shape[1:], taken[0][1].shape[1:]):
            raise ValueError(
                f"layer {name!r} was given inputs of shapes {tuple(taken[0][0].shape)} and {tuple(x.shape)}; "
                "calibration samples must have one size"
            )
        rows += len(x)
        each = (x[:1].nbytes + output[:1].nbytes) or 1
        if memory_limit // each < 10:
            raise ValueError(
                f"the activations of layer {name!r} take {each:,} bytes for each sample, and AdaQuant needs 10 at "
                f"least; memory_limit={memory_limit:,} must be raised"
            )
        room = memory_limit // each - sum(len(part) for part, _ in taken)
        if room > 0:  # copies, as what follows may work in place
            taken.append((x[:room].detach().clone(), output[:room].detach().clone()))

    handle = model.get_submodule(name).register_forward_hook(take, with_kwargs=True)
    try:
        for inputs, _ in on_device(model, batches):
            run(model, inputs)
    finally:
        handle.remove()
    return torch.cat([x for x, _ in taken]), torch.cat([y for _, y in taken]), rows


@torch.no_grad()
def _execution_order(model: nn.Module, batches: Sequence[Any], run: Forward) -> list[str]:
    """Return the names of the quantized layers that run, in the order in which they first do."""
    order: dict[str, None] = {}

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda layer, args: order.update({name: None})

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in quantized_layers(model).items()]
    try:
        with borrowed(model):
            run(model, next(on_device(model, batches))[0])
    finally:
        for handle in handles:
            handle.remove()
    return list(order)
