"""Quantizing a trained network with a few hundred images and no training run: CalibTIP.

Each step is a function of its own: scales from data, AdaQuant layer by layer, statistics of batch normalisations,
biases; :func:`post_training_quantize` is all of them in their order.

The paper's quantizer has learned zero points. Here the house's quantizers are used, symmetric for weights and with
zero point 0 for inputs: what comes out packs, deploys and exports like any other converted model, and zero, hence
padding, is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.quantization._calibration_batches import (
    Forward,
    as_list,
    call,
    check_fit_arguments,
    check_model,
    full_precision_copy,
    on_device,
)
from lightning_plugins.quantization.accounting import cost
from lightning_plugins.quantization.adaquant import (
    MEMORY_LIMIT,
    LayerParameters,
    LearningRates,
    Mode,
    adaquant_,
    layer_parameters,
    set_layer_parameters,
)
from lightning_plugins.quantization.allocation import allocate_bits
from lightning_plugins.quantization.convert import active_plan, model_precisions, quantized_layers, switch_
from lightning_plugins.quantization.layers import FULL_PRECISION
from lightning_plugins.quantization.packed import borrowed
from lightning_plugins.quantization.plan import BitPlan
from lightning_plugins.quantization.retuning import norms_in_use, reestimate_batch_norms_, tune_biases_
from lightning_plugins.quantization.scale_calibration import Bits, calibrate_scales_
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PostTrainingReport", "StageResult", "post_training_quantize"]

LossFn = Callable[[Tensor, Tensor], Tensor]
Pipeline = Literal["full", "light"]
_Fitted = dict[tuple[str, int], LayerParameters]

SMALLEST_INCREASE = 1e-6  # of the loss, in the table: a layer that seems to gain is a layer that loses nothing


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
    check_model(model)
    check_fit_arguments(mode, num_steps, batch_size)
    run, loss_fn, calibration = forward or call, loss_fn or F.cross_entropy, as_list(batches)
    measured_on = calibration if evaluation is None else as_list(evaluation)
    reference = full_precision_copy(model)
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
        logits = [run(model, inputs) for inputs, _ in on_device(model, calibration)]
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
        originals = {name: layer_parameters(layer) for name, layer in quantized_layers(model).items()}
        for bits in candidates:
            for name, layer in quantized_layers(model).items():
                set_layer_parameters(layer, originals[name])
            calibrate_scales_(model, calibration, bits, forward=forward)
            if bits == candidates[-1]:
                note(f"naive at {bits} bits")
            if pipeline == "full":
                errors = fit(bits, "parallel")
                if bits == candidates[-1]:
                    note(f"adaquant at {bits} bits")
            for name, layer in quantized_layers(model).items():
                fitted.setdefault((name, layer.num_bits), layer_parameters(layer))
        table, highest = _loss_table(model, calibration, fitted, loss_fn, run)
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
    if norms := norms_in_use(model):
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
    first = next(on_device(model, batches))[0][:1]
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
        set_layer_parameters(layer, fitted[name, plan[name]])
    switch_(model, plan)


@torch.no_grad()
def _divergence(model: nn.Module, batches: Sequence[Any], wanted: Sequence[Tensor], run: Forward) -> float:
    """Return how far a model's predictions are from the wanted logits: mean Kullback-Leibler divergence in nats."""
    total, count = 0.0, 0
    with borrowed(model):
        for (inputs, _), logits in zip(on_device(model, batches), wanted, strict=True):
            ours, theirs = run(model, inputs).log_softmax(1), logits.log_softmax(1)
            total += float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
            count += len(inputs)
    return total / count


@torch.no_grad()
def _measure(model: nn.Module, batches: Sequence[Any], loss_fn: LossFn, run: Forward) -> StageResult:
    loss = correct = 0.0
    count = 0
    with borrowed(model):
        for inputs, targets in on_device(model, batches):
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
