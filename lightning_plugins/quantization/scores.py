"""Scores that tell how many bits each layer of a network needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_plugins import hessian
from lightning_plugins._processes import numbers_over_processes
from lightning_plugins._progress import progress_bar
from lightning_plugins.batches import BatchFn, inputs_and_targets
from lightning_plugins.checks import check_types, warn_caller
from lightning_plugins.quantization.accounting import cost
from lightning_plugins.quantization.convert import (
    check_converted,
    check_precisions,
    convert_,
    model_precisions,
    quantized_layers,
    restore_,
    switch_,
)
from lightning_plugins.quantization.copying import copy_network
from lightning_plugins.quantization.layer_order import find_blocks, input_modification, keeps_shape, weight_tails
from lightning_plugins.quantization.layers import FULL_PRECISION, InputQuantizer
from lightning_plugins.quantization.packed import borrowed
from lightning_plugins.quantization.pairwise import (
    LossFn,
    interactions_by_products,
    loss_and_accuracy,
    measured_interactions,
)
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable

__all__ = ["Estimator", "Measure", "Method", "evaluate_plan", "inverted", "score_layers"]

Method = Literal["hawq-v1", "hawq-v2", "hawq-v3", "loss-increase", "pairwise", "lim", "zd", "random"]
Estimator = Literal["hvp", "measured"]
Measure = Literal["loss", "accuracy"]

_DATA_FREE = ("zd", "random")
_SMALLEST_INCREASE = 1e-6


@check_types
def score_layers(
    model: nn.Module,
    method: Method,
    batches: Iterable[Any] | None = None,
    *,
    bits: Sequence[int] | None = None,
    loss_fn: LossFn | None = None,
    batch_fn: BatchFn | None = None,
    seed: int = 0,
    num_probes: int = 200,
    tolerance: float = 0.05,
    kappa: float = 1.0,
    estimator: Estimator = "hvp",
    measure: Measure = "loss",
    blocks: Sequence[str] | None = None,
    centered: bool = False,
    two_sided: bool = True,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    first_last_bits: int = FULL_PRECISION,
    depthwise_bits: int = 8,
    per_channel: bool = True,
    quantize_inputs: bool = True,
) -> SensitivityTable:
    r"""Score the layers of a network for mixed precision; the model stays as it is.

    With the weights' perturbation ``d_l(b) = Q_b(W_l) - W_l``, where ``Q_b`` is what :func:`.convert_` gives the layer,
    ``n_l`` weights in layer l, and the Hessian ``H`` of the fp32 network's mean loss:

    ``"hawq-v1"``
        Importance ``lambda_max(H_ll) / n_l``, losses ``lambda_max(H_ll) * |d_l(b)|^2``.
    ``"hawq-v2"``, ``"hawq-v3"``
        Importance ``t_l = trace(H_ll) / n_l``, losses ``t_l * |d_l(b)|^2``. The two give the same numbers; the papers
        differ in how they search with them: version 2 among plans whose bits fall with the importance, version 3 among
        all plans, by an integer programme.
    ``"loss-increase"``
        Losses ``max(L(only layer l at b bits) - L(all at their highest), 1e-6)``, measured, weights and inputs of
        the layer at b bits; input scales that were never set come from the first batch. Importance: at the layer's
        lowest bits.
    ``"pairwise"``
        Pairwise-augmented sensitivity, a construction of this library. Importance
        ``t_l |d_l|^2 / 2 + kappa / 2 * sum_m max(0, I_lm)`` with the interaction ``I_lm = d_l' H d_m`` of two layers,
        both at their lowest bits; the matrix is in ``details["interactions"]``. In the losses the second term falls
        with ``|d_l(b)|``, in which it is linear. With ``kappa=0`` these are half the losses of HAWQ.
    ``"lim"``
        Importance: mean over samples of ``-cos(input, output)`` of the layer's block, see :func:`.find_blocks`. A block
        that changes the shape, such as the first one of a stage, cannot be compared; its importance is infinite.
    ``"zd"``
        Importance ``1 - ZD``, with ZD the share of weights further than one standard deviation from the mean, averaged
        over the weights of the layer's block. It needs no data, but finds blocks only with a batch; without one each
        layer stands alone. Infinite where weights are all equal.
    ``"random"``
        Importance drawn from [0, 1): a control. :func:`inverted` makes another one.

    The last three say nothing of bits: their losses are ``s_l |d_l(b)|^2 / |d_l(lowest)|^2``, where ``s_l`` is the
    importance (1 more for ``"lim"``, so that it is not negative). A layer of infinite importance loses there as much as
    twice all others together, a finite number that every solver takes.

    With several processes (``torch.distributed``), all call it, each with its share of the data, and get one table.

    Args:
        model: a plain network with trained weights, or a converted one, whose layers and precisions then count.
        method: one of the above.
        batches: of inputs and targets, up to about a thousand samples. Read once and kept, so that all layers meet the
            same data; a ``DataLoader``, a list or an iterator. Needed by all methods but ``"zd"`` and ``"random"``;
            the latter take from them what multiply-adds need.
        bits: candidate precisions, 2 to 8. Default: 8 and 4, or those of a converted model.
        loss_fn: of the model's output and targets, mean over the batch. Default: cross entropy.
        batch_fn: takes a batch, returns inputs and targets. Default: the first two elements.
        seed: of the probes and of ``"random"``.
        num_probes: most random probes of a trace (HAWQ versions 2 and 3, pairwise).
        tolerance: relative standard error at which a trace has had probes enough.
        kappa: weight of the interactions, at least 0 (pairwise).
        estimator: of the interactions (pairwise). ``"hvp"`` takes one Hessian-vector product for each layer,
            ``"measured"`` ``L(l and m) - L(l) - L(m) + L(none)`` from a forward pass for each pair, weights only.
        measure: ``"loss"`` or the drop of the ``"accuracy"`` (loss-increase).
        blocks: names or patterns of the blocks; ``()`` takes each layer on its own (lim, zd).
        centered: subtract channel means before comparing (lim); see :func:`.lim_score`.
        two_sided: count the weights of both tails (zd); see :func:`.zd_score`.
        include: see :func:`.convert_`, which chooses the layers of a plain network; so for the next ones.
        exclude: see there.
        first_last_bits: see there.
        depthwise_bits: see there.
        per_channel: see there.
        quantize_inputs: see there; matters for loss-increase alone.

    Returns:
        A table of exactly the layers that are quantized. Its ``details`` name the layers of at least mean importance
        (``"sensitive"``), and what the method used.

    Raises:
        ValueError: for an unknown method, missing or empty batches, arguments out of range, or a loss that is not
            finite.

    Warns:
        UserWarning: if curvature was negative and is taken as 0, or most layers are in blocks that LIM cannot compare.

    Example:
        >>> from lightning_plugins.models import resnet20
        >>> _ = torch.manual_seed(0)
        >>> table = score_layers(resnet20(width=4), "zd", bits=(8, 4, 2))
        >>> table.bits, len(table.layers), table.order()[0] in table.layers
        ((8, 4, 2), 20, True)

    Reference:
        Dong et al., *HAWQ* and *HAWQ-V2*, 2019; Yao et al., *HAWQ-V3*, 2020. Hubara et al., *Improving Post Training
        Neural Quantization*, 2020 (the table of loss increases). Dumitru et al., *Layer-Wise Quantization*, 2024 (lim
        and zd). That interactions belong into the order is the idea of *Augmenting Hessians with Inter-Layer
        Dependencies for Mixed-Precision Post-Training Quantization*, 2023 (arXiv 2306.04879); the formula is ours.
    """
    choices = {
        "method": (method, get_args(Method)),
        "estimator": (estimator, get_args(Estimator)),
        "measure": (measure, get_args(Measure)),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if not 0 <= kappa < math.inf:
        raise ValueError(f"kappa must be at least 0 and finite, got {kappa!r}")
    if batches is None and method not in _DATA_FREE:
        raise ValueError(f"method {method!r} needs batches of inputs and targets; pass a DataLoader or a list")
    selection: dict[str, Any] = {
        "include": tuple(include) if not isinstance(include, str) else include,
        "exclude": tuple(exclude) if not isinstance(exclude, str) else exclude,
        "first_last_bits": first_last_bits,
        "depthwise_bits": depthwise_bits,
        "per_channel": per_channel,
        "quantize_inputs": quantize_inputs,
    }
    # A data loader draws from the global generator each time it starts, and so may the model.
    with isolate_rng(), torch.inference_mode(False), torch.enable_grad():
        net = _prepare(model, batches, bits, selection, loss_fn or F.cross_entropy, batch_fn or inputs_and_targets)
        if method in ("hawq-v1", "hawq-v2", "hawq-v3"):
            scores = _hawq(net, method, num_probes=num_probes, tolerance=tolerance, seed=seed)
        elif method == "loss-increase":
            scores = _loss_increase(net, measure)
        elif method == "pairwise":
            scores = _pairwise(net, estimator, kappa, num_probes=num_probes, tolerance=tolerance, seed=seed)
        elif method == "lim":
            scores = _lim(net, blocks, centered=centered)
        elif method == "zd":
            scores = _zd(net, blocks, two_sided=two_sided)
        else:
            generator = torch.Generator().manual_seed(seed)
            drawn = dict(zip(net.bits, torch.rand(len(net.bits), generator=generator).tolist(), strict=True))
            scores = _Scores(drawn, _shaped(drawn, net.norms()), {"seed": seed})
        macs = net.macs()
    layers = {
        name: LayerSensitivity(
            importance=scores.importance[name],
            losses=scores.losses[name],
            num_weights=net.weight(name).numel(),
            macs=macs.get(name),
            error=scores.errors.get(name),
        )
        for name in net.bits
    }
    details = {"num_samples": net.num_samples, "sensitive": _sensitive(scores.importance)} | scores.details
    return SensitivityTable(method, layers, details)


@check_types
def inverted(table: SensitivityTable) -> SensitivityTable:
    """Return a control that is wrong on purpose: the most sensitive layer has the scores of the least, and so on.

    The layers' importances and their losses at their lowest bits are exchanged by rank, first with last; the losses
    keep their shape over bits.

    Example:
        >>> table = SensitivityTable("by hand", {
        ...     "conv1": LayerSensitivity(0.5, {8: 0.1, 4: 0.2}, num_weights=100),
        ...     "conv2": LayerSensitivity(0.1, {8: 0.0, 4: 0.1}, num_weights=900),
        ... })
        >>> print(inverted(table))
        layer  importance  weights  loss at 8  loss at 4
        conv1         0.1      100       0.05        0.1
        conv2         0.5      900          0        0.2
    """
    importance = _mirrored({name: layer.importance for name, layer in table.layers.items()})
    worst = {name: layer.losses[min(layer.losses)] for name, layer in table.layers.items()}
    exchanged = _mirrored(worst)
    layers = {}
    for name, layer in table.layers.items():
        losses = {b: exchanged[name] * _ratio(loss, worst[name]) for b, loss in layer.losses.items()}
        layers[name] = replace(layer, importance=importance[name], losses=losses, error=None)
    return SensitivityTable(f"inverted {table.method}", layers, {"of": dict(table.details)})


@check_types
def evaluate_plan(
    model: nn.Module,
    plan: int | Mapping[str, int],
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    batch_fn: BatchFn | None = None,
) -> tuple[float, float]:
    """Return the loss and the accuracy of a converted network at other bits; it keeps those that it has.

    Args:
        model: converted by :func:`.convert_`; evaluated in evaluation mode.
        plan: what :func:`.switch_` takes.
        batches: of inputs and targets.
        loss_fn: of the model's output and targets, mean over the batch. Default: cross entropy.
        batch_fn: takes a batch, returns inputs and targets. Default: the first two elements.

    Returns:
        Mean loss over samples, and the share of outputs in [0, 1] whose largest logit (along dimension 1) is the
        target; NaN if targets are not classes.

    Raises:
        ValueError: if the model is not converted, the plan does not fit it, or there is no batch.

    Example:
        >>> from lightning_plugins.models import resnet20
        >>> from lightning_plugins.quantization import convert_
        >>> _ = torch.manual_seed(0)
        >>> net = convert_(resnet20(width=4), bits=(8, 4))
        >>> loss, accuracy = evaluate_plan(net, 4, [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))])
        >>> net.stages[0][0].conv1.num_bits
        8
    """
    check_converted(model)
    pick, device = batch_fn or inputs_and_targets, _device(model)
    with isolate_rng(), borrowed(model, plan):
        pairs = ([part.to(device) for part in pick(batch)] for batch in batches)
        return loss_and_accuracy(model, pairs, loss_fn or F.cross_entropy)


@dataclass
class _Net:
    """Private copies of a model, and the data to score them on.

    Attributes:
        plain: without quantizers, in evaluation mode.
        converted: in evaluation mode.
        bits: candidate precisions of each layer, highest first.
        batches: inputs and targets on the model's device.
        loss_fn: mean loss of a batch.
    """

    plain: nn.Module
    converted: nn.Module
    bits: dict[str, tuple[int, ...]]
    batches: list[tuple[Tensor, Tensor]]
    loss_fn: LossFn

    @property
    def num_samples(self) -> int:
        return int(numbers_over_processes(sum(len(inputs) for inputs, _ in self.batches))[0])

    def weight(self, name: str) -> Tensor:
        weight = self.plain.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def perturbation(self, name: str, bits: int) -> Tensor:
        """What quantization adds to a layer's weight."""
        layer = quantized_layers(self.converted)[name]
        before, layer.num_bits = layer.num_bits, bits
        try:
            return layer.quantized_weight() - layer.weight
        finally:
            layer.num_bits = before

    def norms(self) -> dict[str, dict[int, float]]:
        """Squared norms of the perturbations."""
        return {
            name: {b: float(self.perturbation(name, b).double().square().sum()) for b in candidates}
            for name, candidates in self.bits.items()
        }

    @torch.no_grad()
    def plain_loss(self) -> float:
        """Loss of the plain copy.

        Raises:
            ValueError: if it is not finite.
        """
        loss = loss_and_accuracy(self.plain, self.batches, self.loss_fn)[0]
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of the network is {loss} on these batches before anything is quantized; "
                "look at its weights, the inputs and loss_fn"
            )
        return loss

    @torch.no_grad()
    def set_input_scales(self) -> None:
        """Give the input quantizers that have seen no data yet the scales of the first batch."""
        quantizers = [module for module in self.converted.modules() if isinstance(module, InputQuantizer)]
        for quantizer in quantizers:
            quantizer.train()
        for b in model_precisions(self.converted):
            switch_(self.converted, b)(self.batches[0][0])
        self.converted.eval()

    def macs(self) -> dict[str, int | None]:
        if not self.batches:
            return {}
        counted = cost(self.converted, example_input=self.batches[0][0][:1])
        return {layer.name: layer.macs for layer in counted.layers}


@dataclass
class _Scores:
    importance: dict[str, float]
    losses: dict[str, dict[int, float]]
    details: dict[str, Any]
    errors: Mapping[str, float | None] = field(default_factory=dict)


def _prepare(
    model: nn.Module,
    batches: Iterable[Any] | None,
    bits: Sequence[int] | None,
    selection: Mapping[str, Any],
    loss_fn: LossFn,
    batch_fn: BatchFn,
) -> _Net:
    if bits is not None and FULL_PRECISION in bits:
        raise ValueError(f"bits are the precisions to choose among, 2 to 8, got {tuple(bits)}; leave out 32")
    own = quantized_layers(model)
    if any(layer.codes is not None for layer in own.values()):
        raise ValueError("a model that was read from a packed file has no fp32 weights; score the one it was made from")
    copied = _without_parametrizations(copy_network(model)).eval()
    if own:
        defaults = score_layers.__kwdefaults__ or {}
        changed = [name for name, value in selection.items() if value != defaults[name]]
        if changed:
            raise ValueError(f"the model is converted already, so {' and '.join(changed)} cannot apply; leave them out")
        converted, plain = copied, restore_(copy_network(copied))
        available = [b for b in model_precisions(model) if b != FULL_PRECISION]
        wanted = tuple(available) if bits is None else check_precisions(bits)
        if unknown := [b for b in wanted if b not in available]:
            raise ValueError(f"bits must be among the model's precisions {available}, got {unknown}")
    else:
        wanted = check_precisions((8, 4) if bits is None else bits)
        plain = copied
        converted = convert_(copy_network(plain), (*wanted, FULL_PRECISION), batch_norm="shared", **selection).eval()
    candidates = {
        name: tuple(sorted({min(b for b in layer.bits if b >= w) for w in wanted}, reverse=True))
        for name, layer in quantized_layers(converted).items()
    }
    device = _device(model)
    read = [tuple(part.to(device) for part in batch_fn(batch)) for batch in batches or ()]
    # A tensor that was made in inference mode cannot take part in a backward pass.
    kept = [(x.clone() if x.is_inference() else x, y.clone() if y.is_inference() else y) for x, y in read]
    if batches is not None and not kept:
        raise ValueError("batches is empty; an iterator that was read before has nothing left, pass a new one")
    return _Net(plain, converted, candidates, kept, loss_fn)


def _without_parametrizations(model: nn.Module) -> nn.Module:
    """Make each weight the plain tensor that the layer computes with."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
        elif any(isinstance(h, prune.BasePruningMethod) and h._tensor_name == "weight" for h in _pre_hooks(module)):
            prune.remove(module, "weight")  # type: ignore[no-untyped-call]
    return model


def _pre_hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _hawq(net: _Net, method: str, *, num_probes: int, tolerance: float, seed: int) -> _Scores:
    names, norms = list(net.bits), net.norms()
    details: dict[str, Any] = {"seed": seed, "loss": net.plain_loss()}
    if method == "hawq-v1":
        estimates = hessian.top_eigenvalue(net.plain, net.loss_fn, net.batches, layers=names, seed=seed)
        details |= {"residual": {name: estimates[name].error for name in names}} | _curvatures(estimates)
        quantity = "top eigenvalue"
    else:
        estimates, settings = _traces(net, num_probes=num_probes, tolerance=tolerance, seed=seed)
        details |= settings
        quantity = "trace"
    values = _clamped(estimates, quantity)
    sizes = {name: net.weight(name).numel() for name in names}
    importance = {name: values[name] / sizes[name] for name in names}
    factor = values if method == "hawq-v1" else importance
    losses = {name: {b: factor[name] * norm for b, norm in norms[name].items()} for name in names}
    errors = {} if method == "hawq-v1" else {name: estimates[name].error / sizes[name] for name in names}
    return _Scores(importance, losses, details, errors)


def _traces(
    net: _Net, *, num_probes: int, tolerance: float, seed: int
) -> tuple[dict[str, hessian.Estimate], dict[str, Any]]:
    estimates = hessian.hessian_trace(
        net.plain,
        net.loss_fn,
        net.batches,
        layers=list(net.bits),
        num_probes=num_probes,
        tolerance=tolerance,
        seed=seed,
    )
    probes = {name: estimate.num_probes for name, estimate in estimates.items()}
    return estimates, {"num_probes": probes, "tolerance": tolerance} | _curvatures(estimates)


def _curvatures(estimates: Mapping[str, hessian.Estimate]) -> dict[str, Any]:
    return {"curvature": {name: estimate.curvature for name, estimate in estimates.items()}}


def _clamped(estimates: Mapping[str, hessian.Estimate], quantity: str) -> dict[str, float]:
    values = {name: estimate.value for name, estimate in estimates.items()}
    negative = {name: value for name, value in values.items() if value < 0}
    if negative:
        worst = min(negative, key=lambda name: negative[name])
        warn_caller(
            f"the {quantity} of the Hessian is negative, by noise or at a saddle, for {len(negative)} of {len(values)} "
            f"layers (the lowest is {negative[worst]:.3g} for {worst!r}) and is taken as 0; more samples, more probes "
            "or a network trained longer help"
        )
    return {name: max(value, 0.0) for name, value in values.items()}


def _loss_increase(net: _Net, measure: Measure) -> _Scores:
    net.set_input_scales()  # else each batch would measure its own, which is slower and not what is deployed
    highest = {name: candidates[0] for name, candidates in net.bits.items()}

    def evaluate(plan: Mapping[str, int]) -> float:
        loss, accuracy = evaluate_plan(net.converted, plan, net.batches, net.loss_fn)
        value = loss if measure == "loss" else -accuracy
        if not math.isfinite(value):
            raise ValueError(
                f"the {measure} is {value} with the bits {dict(plan)}; look at the network's weights, the inputs "
                "and loss_fn" + ("; accuracy needs integer classes as targets" if measure == "accuracy" else "")
            )
        return value

    start = evaluate(highest)
    losses = {name: {candidates[0]: 0.0} for name, candidates in net.bits.items()}
    trials = [(name, b) for name, candidates in net.bits.items() for b in candidates[1:]]
    for name, b in progress_bar(trials, title="loss increase of each layer"):
        losses[name][b] = max(evaluate(highest | {name: b}) - start, _SMALLEST_INCREASE)
    importance = {name: by_bits[net.bits[name][-1]] for name, by_bits in losses.items()}
    return _Scores(
        importance, losses, {"measure": measure, f"{measure} at highest bits": start if measure == "loss" else -start}
    )


def _pairwise(
    net: _Net, estimator: Estimator, kappa: float, *, num_probes: int, tolerance: float, seed: int
) -> _Scores:
    details: dict[str, Any] = {"seed": seed, "kappa": kappa, "estimator": estimator, "loss": net.plain_loss()}
    estimates, settings = _traces(net, num_probes=num_probes, tolerance=tolerance, seed=seed)
    traces = _clamped(estimates, "trace")
    lowest = {name: net.perturbation(name, candidates[-1]) for name, candidates in net.bits.items()}
    if estimator == "hvp":
        matrix = interactions_by_products(net.plain, net.loss_fn, net.batches, lowest)
    else:
        matrix = measured_interactions(net.plain, net.loss_fn, net.batches, lowest)
    off_diagonal = matrix.clamp_min(0).fill_diagonal_(0).sum(1).tolist()
    losses, errors = {}, {}
    for (name, norms), interaction in zip(net.norms().items(), off_diagonal, strict=True):
        size, largest = net.weight(name).numel(), norms[net.bits[name][-1]]
        losses[name] = {
            b: 0.5 * traces[name] / size * norm + 0.5 * kappa * interaction * math.sqrt(_ratio(norm, largest))
            for b, norm in norms.items()
        }
        errors[name] = 0.5 * estimates[name].error / size * largest
    importance = {name: by_bits[net.bits[name][-1]] for name, by_bits in losses.items()}
    return _Scores(importance, losses, details | settings | {"interactions": matrix.tolist()}, errors)


def _lim(net: _Net, patterns: Sequence[str] | None, *, centered: bool) -> _Scores:
    keeps = keeps_shape(net.plain, net.batches[0][0][:1])
    blocks = find_blocks(net.plain, net.bits, keeps, patterns=patterns)
    compared = dict.fromkeys(block for block in blocks.values() if keeps.get(block))
    found = input_modification(net.plain, net.batches, compared, centered=centered)
    importance = {name: found[block][0] if block in found else math.inf for name, block in blocks.items()}
    pinned = [name for name, value in importance.items() if value == math.inf]
    if 2 * len(pinned) > len(importance):
        warn_caller(
            f"LIM compares a block's input with its output, and for {len(pinned)} of {len(importance)} layers the two "
            "have different shapes; these are put last in the order, so another score tells more of this network"
        )
    scores = {name: value + 1 for name, value in importance.items()}
    errors = {name: found[block][1] for name, block in blocks.items() if block in found}
    return _Scores(importance, _shaped(scores, net.norms()), {"blocks": blocks, "centered": centered}, errors)


def _zd(net: _Net, patterns: Sequence[str] | None, *, two_sided: bool) -> _Scores:
    keeps = keeps_shape(net.plain, net.batches[0][0][:1]) if net.batches else {}
    blocks = find_blocks(net.plain, net.bits, keeps, patterns=() if patterns is None and not net.batches else patterns)
    tails = weight_tails(net.plain, blocks.values(), two_sided=two_sided)
    importance = {name: 1 - tails[block] for name, block in blocks.items()}
    return _Scores(importance, _shaped(importance, net.norms()), {"blocks": blocks, "two_sided": two_sided})


def _shaped(scores: Mapping[str, float], norms: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """Losses in proportion to non-negative scores, falling with bits as the squared perturbation does."""
    instead_of_infinity = 2 * sum(score for score in scores.values() if score < math.inf) or 1.0
    return {
        name: {
            b: min(scores[name], instead_of_infinity) * _ratio(norm, by_bits[min(by_bits)])
            for b, norm in by_bits.items()
        }
        for name, by_bits in norms.items()
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _mirrored(values: Mapping[str, float]) -> dict[str, float]:
    order = sorted(values, key=lambda name: values[name])
    return {name: values[other] for name, other in zip(order, reversed(order), strict=True)}


def _sensitive(importance: Mapping[str, float]) -> list[str]:
    finite = [value for value in importance.values() if value < math.inf]
    mean = sum(finite) / len(finite) if finite else math.inf
    return [name for name, value in importance.items() if value >= mean]
