"""One network whose layers are trained at bits of their own: drawing them, and searching the plans that work best."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_plugins.batches import BatchFn, inputs_and_targets
from lightning_plugins.checks import check_types
from lightning_plugins.quantization.allocation import (
    Unit,
    allocate_bits,
    diverse_plans,
    plan_cost,
    predicted_loss,
)
from lightning_plugins.quantization.convert import (
    check_converted,
    check_precisions,
    quantized_layers,
    shortcut_layers,
)
from lightning_plugins.quantization.layers import FULL_PRECISION, MultiPrecisionBatchNorm
from lightning_plugins.quantization.packed import borrowed
from lightning_plugins.quantization.pairwise import LossFn
from lightning_plugins.quantization.plan import BitPlan
from lightning_plugins.quantization.scores import evaluate_plan
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "EvaluatedPlan",
    "PlanSearch",
    "draw_bits",
    "roulette",
    "roulette_probabilities",
    "search_plans",
    "sensitive_layers",
    "switching_probability",
    "tied_layers",
    "weigh_perturbations",
]


def roulette_probabilities(bits: Sequence[int], *, sensitive: bool) -> dict[int, float]:
    """Return the probability with which a layer is drawn at each precision.

    A sensitive layer takes b bits with probability ``b / sum(B)``, any other one with ``1 / |B|``.

    Args:
        bits: the precisions B.
        sensitive: whether the layer is.

    Example:
        >>> sum(b * p for b, p in roulette_probabilities((8, 6, 4, 2), sensitive=True).items())
        6.0

    Reference:
        Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025, algorithm 1.
    """
    weights = _weights(bits, sensitive=sensitive)
    return {b: weight / sum(weights.values()) for b, weight in weights.items()}


def roulette(r: float, bits: Sequence[int], *, sensitive: bool) -> int:
    """Return the precision on which a roulette wheel stops.

    The precisions lie on the wheel from the highest to the lowest, as wide as :func:`roulette_probabilities` says; the
    first one up to whose end it is at least ``r`` is taken.

    Args:
        r: in (0, 1].
        bits: the precisions.
        sensitive: whether the layer is.

    Raises:
        ValueError: for ``r`` out of range.

    Example:
        >>> [roulette(r, (8, 6, 4, 2), sensitive=True) for r in (1e-9, 0.4, 0.41, 1.0)]
        [8, 8, 6, 2]
    """
    if not 0 < r <= 1:
        raise ValueError(f"r must lie in (0, 1], got {r!r}; take 1 - u of a uniform draw u from [0, 1)")
    return _stop(r, _weights(bits, sensitive=sensitive))


def _stop(r: float, weights: Mapping[int, int]) -> int:
    total = sum(weights.values())
    return next(b for b, end in zip(weights, accumulate(weights.values()), strict=True) if r * total <= end)


def _weights(bits: Sequence[int], *, sensitive: bool) -> dict[int, int]:
    return {b: b if sensitive else 1 for b in check_precisions(bits) if b != FULL_PRECISION}


def switching_probability(epoch: int, num_epochs: int, *, sigma: float = 0.5, warmup_epochs: int = 10) -> float:
    """Return the probability with which a layer leaves the precision of the pass in an epoch.

    ``sigma * (epoch + 1) / num_epochs`` after the warm-up, in which it is 0.

    Args:
        epoch: from 0.
        num_epochs: of the whole training; later epochs stay at ``sigma``.
        sigma: probability in the last epoch, in [0, 1]. The released code has 1/2 and tries 1/5 to 2/3.
        warmup_epochs: first epochs, in which all layers are at the precision of the pass.

    Example:
        >>> [switching_probability(epoch, 20) for epoch in (9, 10, 19)]
        [0.0, 0.275, 0.5]

    Reference:
        Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025, algorithm A.3; the numbers are the release's.
    """
    return 0.0 if epoch < warmup_epochs else sigma * min((epoch + 1) / num_epochs, 1.0)


@check_types
def sensitive_layers(importance: Mapping[str, float]) -> tuple[str, ...]:
    """Return the layers of at least mean importance, infinite values aside; the mean is over these layers alone.

    About half of the layers are sensitive in this sense, and all of them if they are equally important.

    Example:
        >>> sensitive_layers({"conv1": 0.5, "conv2": 0.1, "conv3": 0.2})
        ('conv1',)
    """
    finite = [value for value in importance.values() if value < math.inf]
    mean = math.fsum(finite) / len(finite) if finite else math.inf
    # The mean of equal values may come out a rounding error above them.
    return tuple(name for name, value in importance.items() if value >= mean * (1 - 1e-12))


@check_types
def draw_bits(
    layers: Mapping[str, Sequence[int]],
    bits: int,
    *,
    sigma: float,
    sensitive: Collection[str],
    generator: torch.Generator,
    ties: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Draw the bits of every layer for one pass of training: Hessian-aware stochastic bit switching.

    With probability ``sigma`` a layer spins the :func:`roulette`, otherwise it has the bits of the pass. All random
    numbers are taken from the generator in one call, however many layers switch.

    Args:
        layers: the precisions that each layer can take, 32 among them is passed over. The wheel has those of any layer;
            a layer that cannot take what was drawn takes its next higher one.
        bits: precision of the pass, below 32.
        sigma: in [0, 1].
        sensitive: names of the sensitive layers.
        generator: on the CPU.
        ties: layers that take the draw of another one, such as :func:`.shortcut_layers`.

    Returns:
        Bits by name, for :func:`.switch_`.

    Raises:
        TypeError: for another generator.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw_bits({"a": (8, 4), "b": (8,)}, 4, sigma=0.0, sensitive=("a",), generator=generator)
        {'a': 4, 'b': 8}
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator on the CPU, got a {type(generator).__name__}")
    everything = sorted({b for own in layers.values() for b in own} - {FULL_PRECISION} | {bits}, reverse=True)
    wheels = [_weights(everything, sensitive=prefers_high) for prefers_high in (False, True)]
    switches, spins = torch.rand(2, len(layers), generator=generator, dtype=torch.float64).tolist()
    drawn = {}
    for name, switch, spin in zip(layers, switches, spins, strict=True):
        drawn[name] = _stop(1 - spin, wheels[name in sensitive]) if switch < sigma else bits
    for name, leader in (ties or {}).items():
        if name in drawn and leader in drawn:
            drawn[name] = drawn[leader]
    return {name: min(b for b in layers[name] if b >= value) for name, value in drawn.items()}


@check_types
def tied_layers(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the groups of quantized layers that a plan should give equal bits: shortcuts with their blocks' first."""
    layers = quantized_layers(model)
    groups: dict[str, tuple[str, ...]] = {}
    for name, leader in shortcut_layers(model).items():
        if name in layers and leader in layers:
            groups[leader] = (*groups.get(leader, (leader,)), name)
    return list(groups.values())


@check_types
@torch.no_grad()
def weigh_perturbations(model: nn.Module, importance: Mapping[str, float]) -> SensitivityTable:
    """Return a table for given importances: losses ``t_l |Q_b(W_l) - W_l|^2``, with the importance t of layer l.

    Args:
        model: converted by :func:`.convert_`.
        importance: by layer, at least one entry for each quantized layer; others are passed over.

    Raises:
        ValueError: if a layer is missing, or a value is negative or not finite.
    """
    check_converted(model)
    layers = quantized_layers(model)
    if missing := layers.keys() - importance.keys():
        raise ValueError(
            f"the sensitivities lack the layers {sorted(missing)}; the model's quantized layers are {', '.join(layers)}"
        )
    rows = {}
    for name, layer in layers.items():
        value = float(importance[name])
        if not 0 <= value < math.inf:
            raise ValueError(f"the sensitivity of {name!r} must be at least 0 and finite, got {value!r}; clamp it")
        before, losses = layer.num_bits, {}
        for b in (b for b in layer.bits if b != FULL_PRECISION):
            layer.num_bits = b
            losses[b] = value * float((layer.quantized_weight() - layer.weight).double().square().sum())
        layer.num_bits = before
        rows[name] = LayerSensitivity(value, losses, num_weights=layer.weight.numel())
    return SensitivityTable("given", rows)


@dataclass(frozen=True)
class EvaluatedPlan:
    """A plan and how the supernet does under it.

    Attributes:
        plan: the bits of each layer.
        cost: in the unit of the search.
        loss: mean over the samples.
        accuracy: in [0, 1]; NaN if targets are not classes.
        predicted: loss by the table of sensitivities.
    """

    plan: BitPlan
    cost: float
    loss: float
    accuracy: float
    predicted: float

    @property
    def quality(self) -> tuple[float, float]:
        """What is compared: the accuracy, then the loss."""
        return (0.0 if math.isnan(self.accuracy) else self.accuracy), -self.loss


@dataclass(frozen=True)
class PlanSearch:
    """The plans that a search has evaluated.

    Attributes:
        plans: all of them, by rising cost.
        unit: of the costs.
    """

    plans: tuple[EvaluatedPlan, ...]
    unit: str = "average_bits"

    @property
    def frontier(self) -> tuple[EvaluatedPlan, ...]:
        """The plans that none of the others beats in both cost and quality, by rising cost."""
        kept: list[EvaluatedPlan] = []
        for plan in sorted(self.plans, key=lambda plan: (plan.cost, *(-part for part in plan.quality))):
            if not kept or plan.quality > kept[-1].quality:
                kept.append(plan)
        return tuple(kept)

    def best(self, budget: float) -> EvaluatedPlan:
        """Return the best plan that was evaluated within a budget.

        Raises:
            ValueError: if there is none.
        """
        within = [plan for plan in self.frontier if plan.cost <= budget * (1 + 1e-12)]
        if not within:
            least = min(plan.cost for plan in self.plans)
            raise ValueError(f"no plan within {budget:g} ({self.unit}) was evaluated, the cheapest costs {least:g}")
        return within[-1]

    def figure(self) -> Figure:
        """Draw accuracy over cost: every plan a dot, the frontier a line."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        classes = not any(math.isnan(plan.accuracy) for plan in self.plans)

        def points(plans: Sequence[EvaluatedPlan]) -> tuple[list[float], list[float]]:
            return [p.cost for p in plans], [100 * p.accuracy if classes else p.loss for p in plans]

        axes.plot(*points(self.plans), ".", color="#bbbbbb", label="evaluated")
        axes.plot(*points(self.frontier), "o-", color="#4477aa", markersize=4, label="frontier")
        axes.set_xlabel(self.unit.replace("_", " "))
        axes.set_ylabel("accuracy (%)" if classes else "loss")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        return figure


@check_types
def search_plans(
    model: nn.Module,
    table: SensitivityTable,
    batches: Iterable[Any],
    *,
    budgets: Sequence[float],
    unit: Unit = "average_bits",
    num_candidates: int = 8,
    reestimate_on: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    batch_fn: BatchFn | None = None,
) -> PlanSearch:
    """Find the plans under which a supernet does best, by evaluating what the sensitivities suggest.

    For each budget the candidates are the plan of least predicted loss, the one of the released code
    (``"dr-release"``), and the best of those in which one layer is held elsewhere (:func:`.diverse_plans`). Each plan
    is evaluated once; nothing is trained, and the model stays as it is. Shortcuts have the bits of their blocks' first
    convolution.

    Args:
        model: converted and trained at mixed bits.
        table: sensitivities of exactly its quantized layers.
        batches: of inputs and targets to evaluate on: not those of the test.
        budgets: one or more, in ``unit``.
        unit: see :func:`.allocate_bits`.
        num_candidates: most plans to evaluate for a budget, at least 1.
        reestimate_on: batches on which the statistics of batch normalisations are estimated anew for each plan, as
            cumulative averages. Default: they stay as trained, which transitional normalisations are for.
        loss_fn: of output and targets. Default: cross entropy.
        batch_fn: takes a batch, returns inputs and targets. Default: the first two elements.

    Raises:
        ValueError: for a budget that no plan fits, no budgets, or ``num_candidates`` below 1.

    Example:
        >>> from lightning_plugins.models import resnet20
        >>> from lightning_plugins.quantization import convert_
        >>> _ = torch.manual_seed(0)
        >>> net = convert_(resnet20(width=4), bits=(8, 4), batch_norm="transitional")
        >>> table = weigh_perturbations(net, dict.fromkeys(quantized_layers(net), 1.0))
        >>> batch = (torch.rand(4, 3, 8, 8), torch.arange(4))
        >>> search = search_plans(net, table, [batch], budgets=(5, 6), num_candidates=2)
        >>> search.best(5).cost <= 5
        True

    Reference:
        Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025, algorithm 2.
    """
    if not budgets or num_candidates < 1:
        raise ValueError(
            "search_plans needs one budget or more and num_candidates of at least 1, got "
            f"{tuple(budgets)} and {num_candidates!r}"
        )
    groups = tied_layers(model)
    data, moments = list(batches), None if reestimate_on is None else list(reestimate_on)
    found: dict[tuple[int, ...], EvaluatedPlan] = {}
    for budget in budgets:
        first = diverse_plans(table, budget=budget, unit=unit, groups=groups)
        first.sort(key=lambda plan: predicted_loss(table, plan))
        candidates = first[:1]
        if num_candidates > 1:
            released = allocate_bits(table, budget=budget, unit=unit, groups=groups, method="dr-release")
            candidates = [*candidates, released, *first[1 : num_candidates - 1]]
        for plan in candidates:
            if (key := tuple(plan.values())) in found:
                continue
            with _reestimated(model, plan, moments, batch_fn or inputs_and_targets):
                loss, accuracy = evaluate_plan(model, plan, data, loss_fn, batch_fn=batch_fn)
            cost = plan_cost(table, plan, unit=unit)
            found[key] = EvaluatedPlan(plan, cost, loss, accuracy, predicted_loss(table, plan))
    return PlanSearch(tuple(sorted(found.values(), key=lambda plan: plan.cost)), unit)


@contextmanager
def _reestimated(
    model: nn.Module, plan: Mapping[str, int], batches: Sequence[Any] | None, batch_fn: BatchFn
) -> Iterator[None]:
    """Have the statistics of a plan's batch normalisations estimated on these batches; give the old ones back."""
    if batches is None:
        yield
        return
    with borrowed(model, plan):
        inactive = {
            norm
            for module in model.modules()
            if isinstance(module, MultiPrecisionBatchNorm)
            for norm in module.norms.values()
            if norm is not module.active
        }
        norms = [
            m for m in model.modules() if isinstance(m, _BatchNorm) and m not in inactive and m.track_running_stats
        ]
        kept = [([buffer.clone() for buffer in norm.buffers()], norm.momentum) for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            for batch in batches:
                inputs = batch_fn(batch)[0]
                model(inputs.to(next(model.parameters()).device))
            for norm in norms:
                norm.eval()
            yield
        finally:
            for norm, (buffers, momentum) in zip(norms, kept, strict=True):
                norm.momentum = momentum
                for buffer, old in zip(norm.buffers(), buffers, strict=True):
                    buffer.copy_(old)
