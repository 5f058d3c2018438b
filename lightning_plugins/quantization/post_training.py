"""Quantizing a trained network with a few hundred images and no training run: CalibTIP.

Each step is a function of its own: scales from data, AdaQuant layer by layer, statistics of batch normalisations,
biases; :func:`post_training_quantize` is all of them in their order.

The paper's quantizer has learned zero points. Here the house's quantizers are used, symmetric for weights and with
zero point 0 for inputs: what comes out packs, deploys and exports like any other converted model, and zero, hence
padding, is exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized

from lightning_plugins._progress import progress_bar
from lightning_plugins.checks import check_types, warn_caller
from lightning_plugins.modes import evaluation_mode
from lightning_plugins.quantization.accounting import cost
from lightning_plugins.quantization.convert import (
    Model,
    active_plan,
    check_converted,
    model_precisions,
    quantized_layers,
    switch_,
)
from lightning_plugins.quantization.copying import copy_network
from lightning_plugins.quantization.graph import _LAYERS, _calls, _graphs
from lightning_plugins.quantization.layers import (
    FULL_PRECISION,
    InputQuantizer,
    MultiPrecisionBatchNorm,
    ResidualQuantizer,
    _QuantLayer,
)
from lightning_plugins.quantization.packed import borrowed
from lightning_plugins.quantization.plan import BitPlan
from lightning_plugins.quantization.quantizers import (
    SMALLEST_SCALE,
    _align,
    code_range,
    double_rounding,
    smallest_scale,
)
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "LearningRates",
    "PostTrainingReport",
    "StageResult",
    "adaquant_",
    "calibrate_scales_",
    "post_training_quantize",
    "reestimate_batch_norms_",
    "tune_biases_",
]

Bits = int | Mapping[str, int]
Forward = Callable[[nn.Module, Tensor], Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]
Mode = Literal["parallel", "sequential"]
Pipeline = Literal["full", "light"]

MEMORY_LIMIT = 2**31
SMALLEST_INCREASE = 1e-6  # of the loss, in the table: a layer that seems to gain is a layer that loses nothing

_SAMPLED = 2**15  # values of each batch that an input's scale is searched on
_CHECKS = 20  # times that the held-out error is measured during a fit


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


@dataclass(frozen=True)
class StageResult:
    """What a network reaches after one stage.

    Attributes:
        loss: mean over the samples.
        accuracy: fraction in [0, 1].
    """

    loss: float
    accuracy: float


@dataclass(frozen=True)
class PostTrainingReport:
    """What post-training quantization did; ``print`` shows it as a table.

    Attributes:
        plan: the bits of each layer.
        average_bits: per weight of the quantized layers.
        stages: loss and accuracy by stage, in their order.
        errors: of each layer that AdaQuant fitted, the held-out error of its output before and after, relative to the
            mean square of the full-precision output.
        table: losses by layer and precision, where a plan was searched.
        predicted_increase: of the calibration loss over that of all layers at their highest precision: the sum over the
            chosen entries of the table.
        measured_increase: the same, measured with the whole plan in effect.
    """

    plan: BitPlan
    average_bits: float
    stages: Mapping[str, StageResult]
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    table: SensitivityTable | None = None
    predicted_increase: float | None = None
    measured_increase: float | None = None

    def __str__(self) -> str:
        width = max(map(len, ("stage", *self.stages)))
        lines = [f"{'stage':<{width}}    loss  accuracy"]
        lines += [f"{name:<{width}}  {s.loss:>6.4f}  {100 * s.accuracy:>7.2f}%" for name, s in self.stages.items()]
        lines.append(f"average bits per quantized weight: {self.average_bits:.2f}")
        if self.predicted_increase is not None and self.measured_increase is not None:
            lines.append(
                "increase of the calibration loss over the highest precision: "
                f"{self.predicted_increase:.4g} predicted, {self.measured_increase:.4g} measured"
            )
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Draw the accuracy after each stage."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(4.5, 0.95 * len(self.stages) + 1), 3.4), layout="constrained")
        axes = figure.add_subplot()
        values = [100 * stage.accuracy for stage in self.stages.values()]
        colors = ["#888888", *["#4477aa"] * (len(values) - 1)]
        bars = axes.bar(range(len(values)), values, color=colors, width=0.7)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
        axes.set_xticks(range(len(values)), [name.replace(" ", "\n") for name in self.stages], fontsize=8)
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(0, 110)
        axes.spines[["top", "right"]].set_visible(False)
        return figure


@check_types
def post_training_quantize(
    model: nn.Module,
    batches: Iterable[Any],
    plan: Bits | None = None,
    *,
    budget: float | None = None,
    unit: str = "average_bits",
    pipeline: Pipeline = "full",
    mode: Mode = "sequential",
    num_steps: int = 1000,
    batch_size: int = 50,
    learning_rates: LearningRates | None = None,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    evaluation: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    progress: bool = False,
) -> PostTrainingReport:
    """Quantize a trained network with calibration data alone, in place.

    Scales from data, AdaQuant, with a ``budget`` the choice of a plan, statistics of the batch normalisations, biases.
    The new statistics stay only if the predictions on the calibration data come closer to those of full precision.
    Afterwards the model computes at the plan, and its weights are those that were fitted for it: its other precisions,
    32 among them, are no longer what they were. Keep a copy of the model if the full-precision one is still needed.

    With a ``budget`` every candidate precision is fitted first (``"parallel"``); a layer's loss at a precision is what
    the calibration loss rises by when that layer alone leaves the highest precision, with the parameters fitted for it,
    and :func:`.allocate_bits` chooses.

    Args:
        model: trained, converted by ``convert_(model, (*bits, 32))``, with its weights and not only codes.
        batches: ``(inputs, targets, ...)`` of at least 2 samples in all, a few hundred to a thousand for good results,
            in random order and without augmentation. All of them are held in memory.
        plan: bits of each layer, or of all.
        budget: what :func:`.allocate_bits` may spend, in place of a plan.
        unit: of the budget.
        pipeline: ``"light"`` leaves AdaQuant and the tuning of biases out: seconds instead of minutes.
        mode: of AdaQuant at the plan; see :func:`adaquant_`.
        num_steps: of AdaQuant, for each layer.
        batch_size: of its random minibatches.
        learning_rates: of AdaQuant.
        seed: of minibatches.
        memory_limit: bytes for one layer's inputs and outputs.
        evaluation: batches to measure the stages on; default the calibration data, which flatters.
        loss_fn: mean loss from logits and targets; default cross-entropy.
        forward: takes the model and inputs, returns logits ``(N, C)``; default ``model(inputs)``.
        progress: whether to show a bar.

    Returns:
        What every stage gave, the plan, and the table behind it.

    Raises:
        ValueError: for wrong arguments, or a model that was not converted with 32 among its bits.

    Example:
        >>> from lightning_plugins.quantization import convert_
        >>> rng = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> net = convert_(net, (8, 4, 32), first_last_bits=8)
        >>> batches = [(torch.rand(20, 4), torch.arange(20) % 3)]
        >>> report = post_training_quantize(net, batches, 4, pipeline="light")
        >>> list(report.stages), report.plan
        (['full precision', 'naive'], BitPlan({'0': 8, '2': 8}))

    Reference:
        Hubara et al., *Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming*,
        2020 (CalibTIP), sections 3 to 5.
    """
    if (plan is None) == (budget is None):
        raise ValueError(f"give either plan or budget, got plan={plan!r} and budget={budget!r}")
    if pipeline not in ("full", "light"):
        raise ValueError(f"pipeline must be 'full' or 'light', got {pipeline!r}")
    _check_model(model)
    _check_fit_arguments(mode, num_steps, batch_size)
    run, loss_fn, calibration = forward or _call, loss_fn or F.cross_entropy, _as_list(batches)
    measured_on = calibration if evaluation is None else _as_list(evaluation)
    reference = _reference(model)
    stages: dict[str, StageResult] = {}
    errors: dict[str, tuple[float, float]] = {}

    def fit(bits: Bits, how: Mode) -> dict[str, tuple[float, float]]:
        return adaquant_(
            model,
            calibration,
            bits,
            mode=how,
            num_steps=num_steps,
            batch_size=batch_size,
            learning_rates=learning_rates,
            seed=seed,
            memory_limit=memory_limit,
            reference=reference,
            forward=forward,
            progress=progress,
        )

    def note(stage: str) -> None:
        stages[stage] = _measure(model, measured_on, loss_fn, run)

    with borrowed(model, FULL_PRECISION):
        note("full precision")
        logits = [run(model, inputs) for inputs, _ in _on_device(model, calibration)]
    table, predicted, increase = None, None, None
    if plan is not None:
        calibrate_scales_(model, calibration, plan, forward=forward)
        note("naive")
        if pipeline == "full":
            errors = fit(plan, mode)
            note("adaquant")
    else:
        fitted: _Fitted = {}
        candidates = [b for b in model_precisions(model) if b != FULL_PRECISION]
        originals = {name: _parameters(layer) for name, layer in quantized_layers(model).items()}
        for bits in candidates:
            for name, layer in quantized_layers(model).items():
                _set_parameters(layer, originals[name])
            calibrate_scales_(model, calibration, bits, forward=forward)
            if bits == candidates[-1]:
                note(f"naive at {bits} bits")
            if pipeline == "full":
                errors = fit(bits, "parallel")
                if bits == candidates[-1]:
                    note(f"adaquant at {bits} bits")
            for name, layer in quantized_layers(model).items():
                fitted.setdefault((name, layer.num_bits), _parameters(layer))
        table, highest = _loss_table(model, calibration, fitted, loss_fn, run)
        from lightning_plugins.quantization.allocation import allocate_bits

        assert budget is not None
        chosen: BitPlan = allocate_bits(table, budget=budget, unit=unit)  # type: ignore[arg-type]
        plan = chosen
        _assemble(model, fitted, chosen)
        predicted = sum(table.layers[name].losses[b] for name, b in chosen.items())
        increase = _measure(model, calibration, loss_fn, run).loss - highest
        note("integer programme")
        if pipeline == "full" and mode == "sequential":
            errors = fit(chosen, "sequential")
            note("adaquant at the plan")
    if norms := _norms_in_use(model):
        known = [deepcopy(norm.state_dict()) for norm in norms]
        before = _divergence(model, calibration, logits, run)
        reestimate_batch_norms_(model, calibration, forward=forward)
        if _divergence(model, calibration, logits, run) > before:  # AdaQuant may leave nothing to correct
            for norm, state in zip(norms, known, strict=True):
                norm.load_state_dict(state)
        note("batch norms")
    if pipeline == "full":
        tune_biases_(model, calibration, torch.cat(logits), batch_size=batch_size, seed=seed, forward=forward)
        note("biases")
    return PostTrainingReport(
        plan=active_plan(model),
        average_bits=cost(model).average_bits,
        stages=stages,
        errors=errors,
        table=table,
        predicted_increase=predicted,
        measured_increase=increase,
    )


@check_types
def calibrate_scales_(model: Model, batches: Iterable[Any], plan: Bits, *, forward: Forward | None = None) -> Model:
    """Set the scales of a converted model for a plan from its weights and some data, without training, in place.

    Each scale is the one with the least mean squared error among fractions of the range: for every output channel of a
    weight (its present scale is a candidate too, so that a weight on its grid stays there), and for the input of a
    layer in the full-precision net. One weight scale serves all precisions of a layer, so only the plan's precision is
    at its best afterwards.

    Args:
        model: converted by ``convert_(model, (*bits, 32))``; left at the plan.
        batches: inputs, or tuples that start with them.
        plan: bits of each layer, or of all.
        forward: takes the model and inputs and runs it; default ``model(inputs)``.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no precision 32 or only codes, if the plan does not fit it, without batches, or for
            inputs that are not finite.

    Example:
        >>> from lightning_plugins.quantization import convert_
        >>> net = convert_(nn.Sequential(nn.Linear(4, 8)), (4, 32), first_last_bits=4)
        >>> net = calibrate_scales_(net, [torch.rand(50, 4)], 4)
        >>> net[0].input_quantizer.is_ready(4)
        True
    """
    _check_model(model)
    known = _as_list(batches)
    switch_(model, plan)
    for layer in quantized_layers(model).values():
        if layer.num_bits != FULL_PRECISION:
            _search_weight_scale(layer)
    wanted = _inputs_to_quantize(model)
    ranges = {quantizer: (math.inf, -math.inf) for quantizer in wanted}

    def see_range(quantizer: InputQuantizer, values: Tensor) -> None:
        low, high = (float(bound) for bound in values.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError("the inputs of a layer are not finite; look at the calibration data and the weights")
        ranges[quantizer] = min(low, ranges[quantizer][0]), max(high, ranges[quantizer][1])

    run = forward or _call
    with borrowed(model, FULL_PRECISION), _watch_inputs(wanted, see_range):
        for inputs, _ in _on_device(model, known):
            run(model, inputs)
    candidates: dict[InputQuantizer, Tensor] = {}
    for quantizer, (low, high) in ranges.items():
        limits = code_range(wanted[quantizer][1], signed=low < 0)
        widest = max(high / limits[1], low / limits[0] if low < 0 else 0.0)
        if 0 < widest < math.inf:  # else the layer was not run, or nothing but 0 goes in
            scale = quantizer.scales[str(wanted[quantizer][1])]
            fractions = torch.linspace(1.0, 0.1, 91, dtype=scale.dtype, device=scale.device)
            candidates[quantizer] = (widest * fractions).clamp_min(SMALLEST_SCALE)
    errors = {quantizer: torch.zeros_like(scales) for quantizer, scales in candidates.items()}
    generator = torch.Generator().manual_seed(0)

    def see_error(quantizer: InputQuantizer, values: Tensor) -> None:
        if quantizer not in candidates:
            return
        flat = values.flatten().to(candidates[quantizer].dtype)
        if len(flat) > _SAMPLED:
            flat = flat[torch.randint(len(flat), (_SAMPLED,), generator=generator).to(flat.device)]
        scales = candidates[quantizer][:, None]
        codes = (flat / scales).round_().clamp_(*code_range(wanted[quantizer][1], signed=ranges[quantizer][0] < 0))
        errors[quantizer] += (codes * scales - flat).square_().sum(1)

    with borrowed(model, FULL_PRECISION), _watch_inputs(wanted, see_error):
        for inputs, _ in _on_device(model, known):
            run(model, inputs)
    with torch.no_grad():
        for quantizer, scales in candidates.items():
            bits = wanted[quantizer][1]
            quantizer.scales[str(bits)].copy_(scales[errors[quantizer].argmin()])
            quantizer.ready[quantizer.bits.index(bits)] = True
            quantizer.signed.fill_(ranges[quantizer][0] < 0)
            quantizer._read_buffers()
    return model


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
    _check_model(model)
    _check_fit_arguments(mode, num_steps, batch_size)
    known, run, rates = _as_list(batches), forward or _call, learning_rates or LearningRates()
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if is_parametrized(layer) or prune.is_pruned(layer):
            raise ValueError(
                f"layer {name!r} has a weight that pruning or a parametrization makes; make it permanent first with "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
    reference = _reference(model) if reference is None else reference
    switch_(model, plan)
    if not _scales_are_set(model):
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


@check_types
def reestimate_batch_norms_(model: Model, batches: Iterable[Any], *, forward: Forward | None = None) -> Model:
    """Measure the statistics of the batch normalisations in use anew, at the bits in use, in place.

    Each becomes the mean over the batches (``momentum=None``), in one pass. Of a normalisation for each precision, only
    the one in use changes. The paper folds them, puts new ones in and folds again; to the same end.

    Args:
        model: any model; a converted one at the bits that it is to be used at.
        batches: inputs, or tuples that start with them; of the same size, since each counts the same, and large, at
            least 32 or so.
        forward: takes the model and inputs and runs it; default ``model(inputs)``.

    Returns:
        The same model.

    Raises:
        ValueError: without batches, or for statistics that are not finite; the old ones are kept then.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2)).eval()
        >>> net = reestimate_batch_norms_(net, [torch.tensor([[0.0, 2.0], [4.0, 4.0]])])
        >>> net[0].running_mean
        tensor([2., 3.])

    Reference:
        Hubara et al., *Improving Post Training Neural Quantization*, 2020, section 5.1.
    """
    known, run = _as_list(batches), forward or _call
    norms = _norms_in_use(model)
    before = [(norm, norm.momentum, deepcopy(norm.state_dict())) for norm in norms]
    done = False
    try:
        with evaluation_mode(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for inputs, _ in _on_device(model, known):
                run(model, inputs)
        unused = [norm for norm in norms if norm.num_batches_tracked == 0]
        for norm, _, state in before:
            if norm in unused:
                norm.load_state_dict(state)
            elif not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):  # type: ignore[union-attr]
                raise ValueError("the statistics of a batch normalisation are not finite; look at the calibration data")
        done = True
    finally:
        for norm, momentum, state in before:
            norm.momentum = momentum
            if not done:
                norm.load_state_dict(state)
    return model


@check_types
def tune_biases_(
    model: nn.Module,
    batches: Iterable[Any],
    reference_logits: Tensor,
    *,
    num_steps: int = 600,
    batch_size: int = 50,
    learning_rate: float | None = None,
    seed: int = 0,
    forward: Forward | None = None,
) -> tuple[float, float]:
    """Train the biases and the last layer towards the full-precision net's predictions, in place.

    Minimises the Kullback-Leibler divergence to the full-precision softmax by SGD, at the bits in use, in evaluation
    mode. Biases are those of convolutions, linear layers and of the normalisations in use; nothing is folded here, so a
    normalisation's bias is the bias of the layer before it. A fifth of the samples, the last ones, is held out, and the
    parameters with the least divergence on it are kept, the ones from the start among them.

    Args:
        model: a converted model at the bits that it is to be used at.
        batches: inputs, or tuples that start with them; at least 2 samples in all.
        reference_logits: ``(N, C)`` for all samples, in their order.
        num_steps: of SGD; the released code makes up to 600.
        batch_size: samples of each random minibatch.
        learning_rate: default ``0.1 / C``: the release's 0.1 is for a divergence averaged over classes too, this one is
            per sample.
        seed: of the minibatches.
        forward: takes the model and inputs, returns logits; default ``model(inputs)``.

    Returns:
        The held-out divergence before and after, in nats per sample.

    Raises:
        ValueError: for wrong arguments, or other numbers of logits than samples.

    Example:
        >>> rng = torch.manual_seed(0)
        >>> net, inputs = nn.Linear(4, 3), torch.rand(50, 4)
        >>> before, after = tune_biases_(net, [inputs], 5 * torch.randn(50, 3), num_steps=50)
        >>> after < before
        True

    Reference:
        Hubara et al., *Improving Post Training Neural Quantization*, 2020, section 5.2.
    """
    if num_steps < 0 or batch_size < 1:
        raise ValueError(f"need num_steps >= 0 and batch_size >= 1, got {num_steps!r} and {batch_size!r}")
    run = forward or _call
    inputs = torch.cat([part for part, _ in _on_device(model, _as_list(batches))])
    if reference_logits.ndim != 2 or len(reference_logits) != len(inputs):
        raise ValueError(
            f"reference_logits must be (N, C) with one row for each of the {len(inputs)} samples, got "
            f"{tuple(reference_logits.shape)}"
        )
    train, held = _split(len(inputs))
    if not reference_logits.isfinite().all():
        raise ValueError("reference_logits must be finite, found NaN or infinity; look at the network they come from")
    targets = reference_logits.detach().to(inputs.device).float().log_softmax(1)
    rate = 0.1 / reference_logits.shape[1] if learning_rate is None else learning_rate
    parameters = _biases_and_last_weight(model)

    def divergence(rows: Tensor | slice) -> Tensor:
        logits = run(model, inputs[rows]).float().log_softmax(1)
        if logits.shape[1:] != targets.shape[1:]:
            raise ValueError(
                f"reference_logits must have the {tuple(logits.shape[1:])} classes of the model, got "
                f"{tuple(targets.shape[1:])}"
            )
        return F.kl_div(logits, targets[rows], log_target=True, reduction="batchmean")

    @torch.no_grad()
    def held_out() -> float:
        parts = [slice(i, min(i + 256, held.stop)) for i in range(held.start, held.stop, 256)]
        total: float = math.fsum(float(divergence(part)) * (part.stop - part.start) for part in parts)
        return total / float(held.stop - held.start)

    generator = torch.Generator().manual_seed(seed)
    needed = [parameter.requires_grad for parameter in parameters]
    best = [parameter.detach().clone() for parameter in parameters]
    with borrowed(model):  # its torch.no_grad() is lifted for the steps
        first = least = held_out()
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for step in range(num_steps):
                rows = torch.randint(train.stop, (batch_size,), generator=generator).to(inputs.device)
                with torch.enable_grad():
                    gradients = torch.autograd.grad(divergence(rows), parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(rate * gradient)
                if (step + 1) % max(1, num_steps // _CHECKS) == 0 or step + 1 == num_steps:
                    now = held_out()
                    if now < least:
                        least, best = now, [parameter.detach().clone() for parameter in parameters]
        finally:
            for parameter, value, flag in zip(parameters, best, needed, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(flag)
    return first, least


# The choice of a plan

_LayerParameters = dict[str, Tensor]
_Fitted = dict[tuple[str, int], _LayerParameters]


def _loss_table(
    model: nn.Module, batches: Sequence[Any], fitted: _Fitted, loss_fn: LossFn, run: Forward
) -> tuple[SensitivityTable, float]:
    """Measure what the loss rises by when one layer leaves the highest precision; also return the loss there."""
    options: dict[str, list[int]] = {}
    for name, bits in fitted:
        options.setdefault(name, []).append(bits)
    top = {name: max(bits) for name, bits in options.items()}
    _assemble(model, fitted, top)
    base = _measure(model, batches, loss_fn, run).loss
    first = next(_on_device(model, batches))[0][:1]
    try:
        counts = {layer.name: layer.macs for layer in cost(model, example_input=first).layers}
    except Exception:  # a custom forward: the model may not be callable on inputs alone
        counts = {}
    layers = {}
    for name, candidates in options.items():
        losses = {}
        for bits in sorted(candidates, reverse=True):
            losses[bits] = 0.0
            if bits != top[name]:
                _assemble(model, fitted, top | {name: bits})
                losses[bits] = max(_measure(model, batches, loss_fn, run).loss - base, SMALLEST_INCREASE)
        weights = quantized_layers(model)[name].weight.numel()
        layers[name] = LayerSensitivity(losses[min(losses)], losses, weights, counts.get(name))
    samples = sum(len(batch[0]) for batch in batches)
    return SensitivityTable("calibtip", layers, {"num_samples": samples, "loss_at_highest": base}), base


def _assemble(model: nn.Module, fitted: _Fitted, plan: Mapping[str, int]) -> None:
    for name, layer in quantized_layers(model).items():
        _set_parameters(layer, fitted[name, plan[name]])
    switch_(model, plan)


def _parameters(layer: _QuantLayer) -> _LayerParameters:
    return {name: value.detach().clone() for name, value in layer.named_parameters()}


@torch.no_grad()
def _set_parameters(layer: _QuantLayer, values: _LayerParameters) -> None:
    for name, parameter in layer.named_parameters():
        parameter.copy_(values[name])


# Fitting one layer


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
    train, held = _split(len(x))
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
            if (iteration + 1) % max(1, num_steps // _CHECKS) == 0 or iteration + 1 == num_steps:
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


@torch.no_grad()
def _search_weight_scale(layer: _QuantLayer) -> None:
    weight = layer.weight.detach()
    weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    rows = weight.flatten(1) if layer.per_channel else weight.reshape(1, -1)
    bits, high_bits = layer.num_bits, layer.high_bits
    low, high = code_range(bits)
    widest = torch.maximum(rows.amax(1) / high, rows.amin(1) / low) * 2.0 ** (bits - high_bits)
    best = layer.weight_scale.detach().to(rows).reshape(-1).clone()
    least = torch.full_like(best, math.inf)
    for scale in (best.clone(), *(widest * fraction for fraction in torch.linspace(1.0, 0.1, 91).tolist())):
        scale = scale.clamp_min(smallest_scale(layer.weight_scale.dtype))
        error = (double_rounding(rows, scale, bits=bits, high_bits=high_bits) - rows).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    layer.weight_scale.copy_(best.reshape(layer.weight_scale.shape))


# What stands behind a layer


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


# Running the net


@torch.no_grad()
def _divergence(model: nn.Module, batches: Sequence[Any], wanted: Sequence[Tensor], run: Forward) -> float:
    """Return how far a model's predictions are from the wanted logits: mean Kullback-Leibler divergence in nats."""
    total, count = 0.0, 0
    with borrowed(model):
        for (inputs, _), logits in zip(_on_device(model, batches), wanted, strict=True):
            ours, theirs = run(model, inputs).log_softmax(1), logits.log_softmax(1)
            total += float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
            count += len(inputs)
    return total / count


def _call(model: nn.Module, inputs: Tensor) -> Tensor:
    output: Tensor = model(inputs)
    return output


def _on_device(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for batch in batches:
        inputs, targets = (
            (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)
        )
        if not isinstance(inputs, Tensor):
            raise TypeError(f"a batch must be a tensor or start with one, found a {type(inputs).__name__}")
        yield inputs.to(device), targets.to(device) if isinstance(targets, Tensor) else None


@torch.no_grad()
def _measure(model: nn.Module, batches: Sequence[Any], loss_fn: LossFn, run: Forward) -> StageResult:
    loss = correct = 0.0
    count = 0
    with borrowed(model):
        for inputs, targets in _on_device(model, batches):
            logits = run(model, inputs)
            if targets is None or logits.ndim != 2 or len(targets) != len(logits):
                found = "none" if targets is None else f"of shape {tuple(targets.shape)}"
                raise ValueError(
                    f"batches must be (inputs, targets) with one target for each row of the logits (N, C), got logits "
                    f"of shape {tuple(logits.shape)} and targets {found}"
                )
            loss += float(loss_fn(logits, targets)) * len(logits)
            labels = targets if targets.ndim == 1 else targets.argmax(1)
            correct += float((logits.argmax(1) == labels).sum())
            count += len(logits)
    return StageResult(loss / count, correct / count)


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
        for inputs, _ in _on_device(model, batches):
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
            run(model, next(_on_device(model, batches))[0])
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


# Parts of a converted model


def _reference(model: Model) -> Model:
    """Copy a converted model as the full-precision net that it is at 32 bits."""
    return switch_(copy_network(model), FULL_PRECISION).eval()


def _inputs_to_quantize(model: nn.Module) -> dict[InputQuantizer, tuple[nn.Module, int]]:
    """Return the quantizers in use, each with the module whose first argument is what it quantizes, and its bits."""
    wanted: dict[InputQuantizer, tuple[nn.Module, int]] = {}
    for module in model.modules():
        if isinstance(module, ResidualQuantizer):
            wanted[module] = module, module.BITS
        elif isinstance(module, _QuantLayer) and module.quantizes_input():
            assert module.input_quantizer is not None
            wanted[module.input_quantizer] = module, module.num_bits
    return wanted


def _scales_are_set(model: nn.Module) -> bool:
    return all(quantizer.is_ready(bits) for quantizer, (_, bits) in _inputs_to_quantize(model).items())


@contextmanager
def _watch_inputs(
    wanted: Mapping[InputQuantizer, tuple[nn.Module, int]], see: Callable[[InputQuantizer, Tensor], None]
) -> Iterator[None]:
    def watch(quantizer: InputQuantizer) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, kwargs: see(quantizer, args[0] if args else next(iter(kwargs.values())))

    handles = [
        module.register_forward_pre_hook(watch(quantizer), with_kwargs=True)
        for quantizer, (module, _) in wanted.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norms_in_use(model: nn.Module) -> list[_BatchNorm]:
    resting = {
        part
        for module in model.modules()
        if isinstance(module, MultiPrecisionBatchNorm)
        for bits, norm in module.norms.items()
        if bits != str(module.num_bits)
        for part in norm.modules()
    }
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module not in resting and module.running_mean is not None
    ]


def _biases_and_last_weight(model: nn.Module) -> list[nn.Parameter]:
    resting = {
        part
        for module in model.modules()
        if isinstance(module, MultiPrecisionBatchNorm)
        for bits, norm in module.norms.items()
        if bits != str(module.num_bits)
        for part in norm.modules()
    }
    found: dict[nn.Parameter, None] = {}
    last = None
    for module in model.modules():
        if isinstance(module, (*_LAYERS, _BatchNorm)) and module not in resting:
            if isinstance(module.bias, nn.Parameter):
                found[module.bias] = None
            if isinstance(module, _LAYERS):
                last = module
    weight = None if last is None else last._parameters.get("weight")
    if isinstance(weight, nn.Parameter):
        found[weight] = None
    return list(found)


def _split(count: int) -> tuple[slice, slice]:
    """Return the rows to fit on, and the last fifth to judge by."""
    if count < 2:
        raise ValueError(f"calibration needs at least 2 samples, got {count}; a few hundred give good results")
    held = max(1, count // 5)
    return slice(0, count - held), slice(count - held, count)


def _as_list(batches: Iterable[Any]) -> list[Any]:
    known = list(batches)
    if not known:
        raise ValueError("there are no calibration batches; give a list of (inputs, targets)")
    return known


def _check_model(model: nn.Module) -> None:
    check_converted(model)
    if FULL_PRECISION not in model_precisions(model):
        raise ValueError(
            f"post-training quantization compares with the full-precision net, and this model was converted for "
            f"{model_precisions(model)} bits; convert it with 32 among them: convert_(model, (8, 4, 32))"
        )
    if any(layer.codes is not None for layer in quantized_layers(model).values()):
        raise ValueError("a model that was read from a packed file has no fp32 weights; start from the trained model")


def _check_fit_arguments(mode: str, num_steps: int, batch_size: int) -> None:
    if mode not in ("parallel", "sequential"):
        raise ValueError(f"mode must be 'parallel' or 'sequential', got {mode!r}")
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
