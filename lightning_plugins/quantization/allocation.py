"""From a table of sensitivities to a plan: the bits of each layer under a budget."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_plugins.checks import check_types, warn_caller
from lightning_plugins.files import write_atomically
from lightning_plugins.quantization.packed import packed_bytes
from lightning_plugins.quantization.plan import BitPlan
from lightning_plugins.quantization.sensitivity import SensitivityTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Frontier",
    "allocate_bits",
    "diverse_plans",
    "load_latency",
    "pareto_frontier",
    "plan_cost",
    "predicted_loss",
    "save_latency",
]

Method: TypeAlias = Literal["pareto", "milp", "hawq-v2", "order", "dr-release"]
Unit: TypeAlias = Literal["average_bits", "average_bits_per_layer", "bytes", "bops", "latency"]
Latency: TypeAlias = Mapping[str, Mapping[int, float]]
Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

# A budget is a product or a sum of floats, so that what exactly meets it may come out a rounding error above. Costs in
# bits, bytes and bit operations are integers, which floats hold exactly up to 2^53.
TOLERANCE = 1e-12

# Usual tables keep below 10,000 of them; without a limit, unusual ones would fill the memory.
MOST_PARTIAL_PLANS = 100_000


@check_types
def allocate_bits(
    table: SensitivityTable,
    *,
    budget: float,
    method: Method = "pareto",
    unit: Unit = "average_bits",
    activation_bits: int | None = None,
    latency: Latency | None = None,
    groups: Sequence[Sequence[str]] = (),
    pins: Mapping[str, int] | None = None,
    bits: Sequence[int] | None = None,
) -> BitPlan:
    """Choose the bits of every layer of a table under a budget, by one of five rules.

    - ``"pareto"``: the least sum of losses, exactly. Partial plans that cost more and lose more than another are
      dropped, and so are those that, by the linear relaxation of what is left, cannot beat the best plan known. Where
      more than 100,000 remain, as if all layers save the same per unit of cost, a warning says what is proven.
    - ``"milp"``: the same optimum from ``scipy.optimize.milp``: slower, an independent check.
    - ``"hawq-v2"``: the least sum of losses among plans in which a layer of higher importance never has fewer bits.
      Layers of equal importance are free among themselves. A layer with one candidate, such as a pinned one, stands
      outside of the order.
    - ``"order"``: two precisions; as many layers as the budget allows get the lower one, the least important first.
      Layers of infinite importance keep the higher one. Losses play no part.
    - ``"dr-release"``: the largest sum of importance times bits, as in the released code of Double Rounding (its paper
      prints a minimum, which would give the most sensitive layers the fewest bits), with a budget that may be met from
      below. This gives extreme plans: the highest bits for the most sensitive layers, the lowest for the rest, and few
      in between. Losses play no part; a layer of infinite importance keeps its highest candidate.

    A candidate with an infinite loss is used only where its layer has no other. Of plans that are equally good, any
    may be returned.

    Args:
        table: of any score.
        budget: the most that the plan may cost, in ``unit``, up to 1e-12 of it for rounding.
        method: see above.
        unit: ``"average_bits"`` per weight, ``sum(n b) / sum(n)``; ``"average_bits_per_layer"``; ``"bytes"`` of the
            packed weight codes; ``"bops"``, bit operations per image, multiply-adds x bits of weights x bits of
            inputs; ``"latency"``, milliseconds. All count the table's layers, and no others.
        activation_bits: bits of every layer's input, for ``"bops"``; default those of its weights.
        latency: milliseconds by layer and bits, for ``"latency"``, measured on the target.
        groups: layers that must have equal bits, such as a shortcut and the first convolution of its block. Their
            candidates are those that all of them have. For ``"hawq-v2"`` and ``"order"`` a group is one layer, with the
            mean importance of its weights.
        pins: bits of layers by name or pattern, later ones win; they may lie outside of ``bits``. A pinned layer takes
            its group along.
        bits: candidates; default all for which the table has losses.

    Warns:
        UserWarning: if the search was cut, with the distance from the least loss that is proven.

    Raises:
        ValueError: for a budget below what the cheapest plan costs, layers without a candidate or without the cost
            that the unit needs, or options that contradict each other.
        RuntimeError: if scipy's solver ends without a proven optimum.

    Example:
        >>> from lightning_plugins.quantization.sensitivity import LayerSensitivity
        >>> table = SensitivityTable("by hand", {
        ...     "conv1": LayerSensitivity(0.5, {8: 0.0, 4: 0.2, 2: 3.0}, num_weights=100),
        ...     "conv2": LayerSensitivity(0.1, {8: 0.0, 4: 0.1, 2: 1.0}, num_weights=900),
        ... })
        >>> plan = allocate_bits(table, budget=4.5)
        >>> dict(plan), predicted_loss(table, plan), plan_cost(table, plan)
        ({'conv1': 8, 'conv2': 4}, 0.1, 4.4)
        >>> dict(allocate_bits(table, budget=500, unit="bytes", pins={"conv1": 2}))
        {'conv1': 2, 'conv2': 4}

    Reference:
        Dong et al., *HAWQ-V2*, 2020 (monotone plans); Yao et al., *HAWQ-V3*, 2021 (integer programme); Huang et al.,
        *Nearly Lossless Adaptive Bit Switching*, 2025 (``"dr-release"``); Dumitru et al., *Layer-Wise Quantization*,
        2024 (``"order"``).
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    costs = _Costs(table, unit, activation_bits, latency)
    items = _items(table, costs, groups, pins, bits)
    limit = costs.limit(budget)
    if method == "order":
        chosen = _order(items, limit, bits)
    elif method == "dr-release":
        chosen = _least_loss(_linear(items), limit)
    elif method == "hawq-v2":
        chosen = _monotone(_finite(items), limit)
    else:
        chosen = (_least_loss if method == "pareto" else _milp)(_finite(items), limit)
    if isinstance(chosen, _Infeasible):
        raise ValueError(chosen.message(budget, costs))
    return _plan(table, dict(zip((item.names for item in items), chosen, strict=True)))


@check_types
def pareto_frontier(
    table: SensitivityTable,
    *,
    unit: Unit = "average_bits",
    activation_bits: int | None = None,
    latency: Latency | None = None,
    groups: Sequence[Sequence[str]] = (),
    pins: Mapping[str, int] | None = None,
    bits: Sequence[int] | None = None,
    resolution: float | None = None,
) -> Frontier:
    """Find all plans that no other beats in both cost and loss: the answers to every budget at once.

    A dynamic programme goes through the layers and keeps the partial plans that are not dominated. Their number can
    explode for many layers whose sizes have no common measure (half a million after 60 layers of random sizes with four
    candidates): then give a ``resolution``, or ask :func:`allocate_bits` for single budgets.

    Args:
        table: see :func:`allocate_bits`, as for the other arguments.
        unit: of the costs.
        activation_bits: for ``"bops"``.
        latency: for ``"latency"``.
        groups: layers that must have equal bits.
        pins: bits of layers by name or pattern.
        bits: candidates.
        resolution: None for the exact frontier; otherwise a fraction in (0, 1), such as 0.001: the costs of partial
            plans are cut into intervals of this fraction of their range, and from each only the plan of least loss goes
            on. What comes out is inexact: true plans with their true costs and losses, but not proven to be on the
            frontier. With 200 layers and 0.001 their losses were up to 2 % above the least ones, with 0.0001 0.2 %.

    Raises:
        ValueError: as :func:`allocate_bits`, or for a resolution out of range.

    Example:
        >>> from lightning_plugins.quantization.sensitivity import LayerSensitivity
        >>> table = SensitivityTable("by hand", {
        ...     "conv1": LayerSensitivity(0.5, {8: 0.0, 4: 0.2}, num_weights=100),
        ...     "conv2": LayerSensitivity(0.1, {8: 0.0, 4: 0.1}, num_weights=300),
        ... })
        >>> frontier = pareto_frontier(table)
        >>> for cost, loss in frontier.points:
        ...     print(f"{cost:.2f} bits: {loss:.2f}", dict(frontier.plan(cost)))
        4.00 bits: 0.30 {'conv1': 4, 'conv2': 4}
        5.00 bits: 0.10 {'conv1': 8, 'conv2': 4}
        8.00 bits: 0.00 {'conv1': 8, 'conv2': 8}
    """
    if resolution is not None and not 0 < resolution < 1:
        raise ValueError(f"resolution must lie in (0, 1), or be None for the exact frontier, got {resolution!r}")
    costs = _Costs(table, unit, activation_bits, latency)
    items = _finite(_items(table, costs, groups, pins, bits))
    trail, entries = _Trail(), _start()
    # Small items first: the lists stay shorter, and the intervals finer.
    for number in sorted(range(len(items)), key=lambda i: float(np.ptp(items[i].costs))):
        item = items[number]
        entries = _extend(entries, trail, number, item, range(len(item.bits)))
        width = (resolution or 0.0) * float(np.ptp(entries.costs))
        if width:
            intervals = np.floor((entries.costs - entries.costs[0]) / width)
            last = np.append(intervals[1:] != intervals[:-1], True)
            last[0] = True  # the cheapest plan of all, which a small budget needs
            entries = entries.take(last)
    return Frontier(table, costs, items, entries, trail, exact=resolution is None)


class Frontier:
    """The plans that no other beats in both cost and loss, made by :func:`pareto_frontier`.

    Attributes:
        unit: of the costs.
        exact: whether every point is proven to lie on the frontier.
        points: ``(P, 2)``, cost and predicted loss of each plan, by rising cost and falling loss.
    """

    def __init__(
        self,
        table: SensitivityTable,
        costs: _Costs,
        items: Sequence[_Item],
        entries: _Entries,
        trail: _Trail,
        *,
        exact: bool,
    ) -> None:
        self.unit, self.exact = costs.unit, exact
        self.points = np.stack([entries.costs / costs.scale, entries.losses], 1)
        self._table, self._costs, self._items, self._entries, self._trail = table, costs, items, entries, trail

    def __len__(self) -> int:
        return len(self.points)

    def plan(self, budget: float) -> BitPlan:
        """Return the plan of least loss that costs at most ``budget``, in the frontier's unit.

        Raises:
            ValueError: if the cheapest plan costs more.
        """
        count = int(np.searchsorted(self._entries.costs, self._costs.limit(budget), side="right"))
        if not count:
            raise ValueError(_Infeasible(float(self._entries.costs[0])).message(budget, self._costs))
        choices = self._trail.back(int(self._entries.nodes[count - 1]))
        return _plan(self._table, {item.names: item.bits[choices[number]] for number, item in enumerate(self._items)})

    def figure(self, chosen: Mapping[str, int] | None = None) -> Figure:
        """Draw loss over cost; a plan, which need not be on the frontier, may be marked."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.step(self.points[:, 0], self.points[:, 1], where="post", color="#4477aa", linewidth=1)
        if len(self) <= 200:
            axes.plot(self.points[:, 0], self.points[:, 1], ".", color="#4477aa")
        losses = self.points[:, 1]
        if chosen is not None:
            cost = sum(self._costs.of(name, chosen[name]) for name in self._table.layers) / self._costs.scale
            loss = predicted_loss(self._table, chosen)
            losses = np.append(losses, loss)
            axes.plot([cost], [loss], "o", color="#cc6677", label=f"chosen: {cost:.4g}, loss {loss:.3g}")
            axes.legend(frameon=False, fontsize=9)
        if losses.min() > 0:
            axes.set_yscale("log")
        axes.set_xlabel(_LABELS[self.unit])
        axes.set_ylabel(f"predicted loss ({self._table.method})")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        return figure


@check_types
def predicted_loss(table: SensitivityTable, plan: Mapping[str, int]) -> float:
    """Return the sum of the losses that a table predicts for its layers at a plan's bits.

    Layers of the plan that the table does not hold are not counted.

    Raises:
        ValueError: if the plan lacks a layer, or has bits for which the table holds no loss.
    """
    losses = []
    for name, layer in table.layers.items():
        b = _bits_of(plan, name)
        if b not in layer.losses:
            raise ValueError(f"layer {name!r} has no loss at {b} bits, only at {_list(layer.losses)}; change the plan")
        losses.append(layer.losses[b])
    return math.fsum(losses)


@check_types
def plan_cost(
    table: SensitivityTable,
    plan: Mapping[str, int],
    *,
    unit: Unit = "average_bits",
    activation_bits: int | None = None,
    latency: Latency | None = None,
) -> float:
    """Return what the layers of a table cost at a plan's bits, in the unit of a budget: see :func:`allocate_bits`.

    Layers of the plan that the table does not hold are not counted.

    Raises:
        ValueError: if the plan lacks a layer, or the cost of one is not known.
    """
    costs = _Costs(table, unit, activation_bits, latency)
    return math.fsum(costs.of(name, _bits_of(plan, name)) for name in table.layers) / costs.scale


@check_types
def diverse_plans(
    table: SensitivityTable,
    *,
    budget: float,
    method: Method = "pareto",
    unit: Unit = "average_bits",
    activation_bits: int | None = None,
    latency: Latency | None = None,
    groups: Sequence[Sequence[str]] = (),
    pins: Mapping[str, int] | None = None,
    bits: Sequence[int] | None = None,
) -> list[BitPlan]:
    """Return distinct plans to choose from by evaluation: the best one, then those with one layer held elsewhere.

    For each layer and each of its candidates below the largest bits of the best plan, the layer is pinned there and the
    others are allocated again, as in the released code of Double Rounding.

    Args:
        table: see :func:`allocate_bits`, as for the other arguments.
        budget: the most that each plan may cost.
        method: of :func:`allocate_bits`.
        unit: of the budget.
        activation_bits: for ``"bops"``.
        latency: for ``"latency"``.
        groups: layers that must have equal bits.
        pins: bits of layers by name or pattern; they hold in all plans.
        bits: candidates.

    Raises:
        ValueError: as :func:`allocate_bits`.
    """
    options: dict[str, Any] = {"budget": budget, "method": method, "unit": unit, "activation_bits": activation_bits}
    options |= {"latency": latency, "groups": groups, "bits": bits}
    best = allocate_bits(table, pins=pins, **options)
    plans = [best]
    for item in _items(table, _Costs(table, unit, activation_bits, latency), groups, pins, bits):
        for b in item.bits:
            if len(item.bits) == 1 or b >= max(best.values()) or b == best[item.names[0]]:
                continue
            # Only the pins of other layers stay, resolved to names: a pattern could match this layer too.
            held = {name: best[name] for name in _resolve(table, pins)} | dict.fromkeys(item.names, b)
            try:
                plan = allocate_bits(table, pins=held, **options)
            except ValueError:  # with this layer there, nothing fits the budget
                continue
            if plan not in plans:
                plans.append(plan)
    return plans


@check_types
def save_latency(path: str | os.PathLike[str], latency: Latency) -> Path:
    """Write milliseconds by layer and bits as JSON."""
    return write_atomically(
        path, (json.dumps({name: dict(row) for name, row in latency.items()}, indent=2) + "\n").encode()
    )


@check_types
def load_latency(path: str | os.PathLike[str]) -> dict[str, dict[int, float]]:
    """Read what :func:`save_latency` writes: ``{"layer": {"8": milliseconds, ...}, ...}``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: {int(b): float(value) for b, value in row.items()} for name, row in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is not a latency table ({error}); it maps layer names to milliseconds by bits"
        ) from error


_LABELS: dict[str, str] = {
    "average_bits": "average bits of a weight",
    "average_bits_per_layer": "average bits of a layer",
    "bytes": "bytes of the weights",
    "bops": "bit operations per image",
    "latency": "milliseconds",
}


class _Costs:
    """What a layer costs at some bits, such that the costs of layers add up, and ``scale`` of them make one unit."""

    def __init__(
        self, table: SensitivityTable, unit: Unit, activation_bits: int | None, latency: Latency | None
    ) -> None:
        if unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")
        if (latency is None) == (unit == "latency"):
            raise ValueError(
                "unit='latency' needs latency=, milliseconds by layer and bits"
                if latency is None
                else f"latency= is for unit='latency', got unit={unit!r}; leave one of them out"
            )
        if activation_bits is not None and unit != "bops":
            raise ValueError(f"activation_bits= is for unit='bops', got unit={unit!r}; leave one of them out")
        missing = [name for name, layer in table.layers.items() if unit == "bops" and layer.macs is None]
        if missing:
            raise ValueError(
                f"bit operations need multiply-adds, which the table lacks for layer {missing[0]!r}; make the table "
                "with an example input, or set LayerSensitivity.macs"
            )
        self.table, self.unit, self.activation_bits, self.latency = table, unit, activation_bits, latency
        self.scale = 1.0
        if unit == "average_bits":
            self.scale = float(sum(layer.num_weights for layer in table.layers.values()))
        elif unit == "average_bits_per_layer":
            self.scale = float(len(table.layers))

    def limit(self, budget: float) -> float:
        """Convert a budget to the layers' costs."""
        if math.isnan(budget):
            raise ValueError(f"the budget must be a number of {self.unit}, got {budget!r}")
        return budget * self.scale + TOLERANCE * abs(budget * self.scale) if math.isfinite(budget) else budget

    def of(self, name: str, b: int) -> float:
        """Return the cost of a layer at b bits."""
        layer = self.table.layers[name]
        if self.latency is not None:
            value = self.latency.get(name, {}).get(b, math.nan)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"the latency table has no time for layer {name!r} at {b} bits; measure it, or restrict bits="
                )
            return float(value)
        if self.unit == "average_bits":
            return float(layer.num_weights * b)
        if self.unit == "average_bits_per_layer":
            return float(b)
        if self.unit == "bytes":
            return float(packed_bytes(layer.num_weights, b))
        return float((layer.macs or 0) * b * (self.activation_bits or b))


@dataclass(frozen=True)
class _Item:
    """Layers that share their bits: one, or a group. Costs and losses are by candidate, ``bits`` from the highest."""

    names: tuple[str, ...]
    bits: tuple[int, ...]
    costs: Floats
    losses: Floats
    importance: float
    total_importance: float

    def restricted(self, choices: Sequence[int]) -> _Item:
        """Return the item with some of its candidates."""
        kept = list(choices)
        return replace(self, bits=tuple(self.bits[k] for k in kept), costs=self.costs[kept], losses=self.losses[kept])


@dataclass(frozen=True)
class _Infeasible:
    """No plan fits; ``least`` is what the cheapest one costs."""

    least: float

    def message(self, budget: float, costs: _Costs) -> str:
        return (
            f"no plan fits a budget of {budget:g} ({costs.unit}), the cheapest costs {self.least / costs.scale:.6g}: "
            "raise the budget, or allow lower bits (candidates of the table, bits=, pins=, groups=)"
        )


def _items(
    table: SensitivityTable,
    costs: _Costs,
    groups: Sequence[Sequence[str]],
    pins: Mapping[str, int] | None,
    bits: Sequence[int] | None,
) -> list[_Item]:
    """Return the layers, groups as one, in the order of the table."""
    member: dict[str, tuple[str, ...]] = {}
    for group in groups:
        for name in group:
            if name not in table.layers:
                raise ValueError(
                    f"groups= names layer {name!r}, which the table lacks; it has {', '.join(table.layers)}"
                )
            if name in member:
                raise ValueError(f"groups= names layer {name!r} twice; join its groups to one")
            member[name] = tuple(group)
    pinned = _resolve(table, pins)
    items = []
    for names in dict.fromkeys(member.get(name, (name,)) for name in table.layers):
        layers = [table.layers[name] for name in names]
        candidates = _candidates(table, names, pinned, bits)
        weights = [layer.num_weights for layer in layers]
        importances = [layer.importance for layer in layers]
        mean = importances[0]
        if len(names) > 1:
            mean = sum(t * n for t, n in zip(importances, weights, strict=True)) / sum(weights)
        items.append(
            _Item(
                names,
                candidates,
                np.array([sum(costs.of(name, b) for name in names) for b in candidates]),
                np.array([sum(layer.losses[b] for layer in layers) for b in candidates]),
                mean,
                sum(importances),
            )
        )
    return items


def _resolve(table: SensitivityTable, pins: Mapping[str, int] | None) -> dict[str, int]:
    resolved: dict[str, int] = {}
    for pattern, b in (pins or {}).items():
        names = [name for name in table.layers if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"no layer of the table matches the pin {pattern!r}; it has {', '.join(table.layers)}")
        resolved |= dict.fromkeys(names, b)
    return resolved


def _candidates(
    table: SensitivityTable, names: tuple[str, ...], pinned: Mapping[str, int], bits: Sequence[int] | None
) -> tuple[int, ...]:
    who = f"layer {names[0]!r}" if len(names) == 1 else f"the group {', '.join(names)}"
    available = set.intersection(*(set(table.layers[name].losses) for name in names))
    if not available:
        raise ValueError(f"{who} has no candidate bits in common; take it apart, or add losses to the table")
    held = {pinned[name] for name in names if name in pinned}
    if len(held) > 1:
        raise ValueError(f"{who} is pinned to different bits, {_list(held)}; pin it to one, or take it apart")
    if held and not held <= available:
        raise ValueError(f"{who} is pinned to {_list(held)} bits, but the table has losses only at {_list(available)}")
    allowed = held or (available if bits is None else available & set(bits))
    if not allowed:
        raise ValueError(f"{who} has none of the bits {_list(bits or ())}, only {_list(available)}; pin it to one")
    return tuple(sorted(allowed, reverse=True))


def _list(bits: Iterable[int]) -> str:
    return ", ".join(str(b) for b in sorted(bits, reverse=True))


def _bits_of(plan: Mapping[str, int], name: str) -> int:
    if name not in plan:
        raise ValueError(f"the plan lacks layer {name!r} of the table; it has {', '.join(plan)}")
    return plan[name]


def _plan(table: SensitivityTable, chosen: Mapping[tuple[str, ...], int]) -> BitPlan:
    bits = {name: b for names, b in chosen.items() for name in names}
    return BitPlan({name: bits[name] for name in table.layers})


def _finite(items: Sequence[_Item]) -> list[_Item]:
    """Drop candidates of infinite loss where others exist; where all are, any of them is as good."""
    kept = []
    for item in items:
        finite = [k for k, loss in enumerate(item.losses.tolist()) if math.isfinite(loss)]
        if not finite:
            item = replace(item, losses=np.zeros(len(item.bits)))
        elif len(finite) < len(item.bits):
            item = item.restricted(finite)
        kept.append(item)
    return kept


def _linear(items: Sequence[_Item]) -> list[_Item]:
    """Return items whose loss is importance times the bits that are missing to the highest candidate."""
    linear = []
    for item in items:
        if item.total_importance < 0:
            raise ValueError(
                f"method='dr-release' needs importances of at least 0, layer {item.names[0]!r} has "
                f"{item.total_importance:g}: it would get the fewest bits; use method='order'"
            )
        if math.isinf(item.total_importance):
            linear.append(replace(item.restricted([0]), losses=np.zeros(1)))
        else:
            missing = item.bits[0] - np.array(item.bits)
            linear.append(replace(item, losses=item.total_importance * missing))
    return linear


def _order(items: Sequence[_Item], limit: float, bits: Sequence[int] | None) -> list[int] | _Infeasible:
    free = [number for number, item in enumerate(items) if len(item.bits) > 1]
    used = {b for number in free for b in items[number].bits}
    if len(used) > 2:
        raise ValueError(
            f"method='order' takes two precisions, the candidates are {_list(used)}; pass bits=(high, low)"
        )
    chosen = [0] * len(items)
    lowered = sorted(
        (number for number in free if items[number].importance < math.inf), key=lambda i: items[i].importance
    )
    cost = [sum(float(item.costs[0]) for item in items)]
    for number in lowered:
        cost.append(cost[-1] + float(items[number].costs[1] - items[number].costs[0]))
    count = next((k for k, value in enumerate(cost) if value <= limit), None)
    if count is None:
        return _Infeasible(min(cost))
    for number in lowered[:count]:
        chosen[number] = 1
    return [item.bits[k] for item, k in zip(items, chosen, strict=True)]


def _milp(items: Sequence[_Item], limit: float) -> list[int] | _Infeasible:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    least = sum(float(item.costs.min()) for item in items)
    if least > limit:
        return _Infeasible(least)
    owner = np.repeat(np.arange(len(items)), [len(item.bits) for item in items])
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    costs = np.concatenate([item.costs for item in items])
    losses = np.concatenate([item.losses - item.losses.min() for item in items])
    # The solver stops at an absolute gap of 1e-6 and forgives 1e-6 of the budget, so both must be large numbers. Costs
    # that are integers stay so, which helps it more.
    gain = 1e4 / (_greedy(_Choices(items), limit).loss or 1.0)
    if np.any(costs % 1):
        costs, limit = costs * (1e6 / limit), 1e6
    result = milp(
        gain * losses,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None], -np.inf, limit)],
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.status != 0:
        raise RuntimeError(f"scipy.optimize.milp found no proven optimum ({result.message}); use method='pareto'")
    parts = np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1)
    chosen = [int(part[result.x[part].argmax()]) for part in parts]
    if costs[chosen].sum() > limit * (1 + TOLERANCE):
        raise RuntimeError("scipy.optimize.milp exceeded the budget within its tolerance; use method='pareto'")
    return [item.bits[k - part[0]] for item, k, part in zip(items, chosen, parts, strict=True)]


class _Trail:
    """Remembers by which choice of which item each partial plan came from which smaller one."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.items: list[int] = []
        self.parents: list[Integers] = []
        self.choices: list[Integers] = []
        self.size = 0

    def add(self, item: int, parents: Integers, choices: Integers) -> Integers:
        """Return numbers for new partial plans."""
        self.starts.append(self.size)
        self.items.append(item)
        self.parents.append(parents)
        self.choices.append(choices)
        self.size += len(parents)
        return np.arange(self.size - len(parents), self.size)

    def back(self, node: int) -> dict[int, int]:
        """Return the choice for each item of a partial plan."""
        found = {}
        while node >= 0:
            block = bisect_right(self.starts, node) - 1
            place = node - self.starts[block]
            found[self.items[block]] = int(self.choices[block][place])
            node = int(self.parents[block][place])
        return found


@dataclass(frozen=True)
class _Entries:
    """Partial plans that none of them beats: by rising cost and falling loss, with their numbers in a trail."""

    costs: Floats
    losses: Floats
    nodes: Integers

    def take(self, kept: NDArray[Any]) -> _Entries:
        return _Entries(self.costs[kept], self.losses[kept], self.nodes[kept])


_NOTHING = _Entries(np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64))


def _start(cost: float = 0.0, loss: float = 0.0) -> _Entries:
    return _Entries(np.array([cost]), np.array([loss]), np.array([-1]))


def _undominated(costs: Floats, losses: Floats) -> Integers:
    """Return the places of the pairs that no other beats, by rising cost."""
    order = np.argsort(costs, kind="stable")  # merges what is sorted in parts
    ordered = losses[order]
    better = np.ones(len(order), bool)
    better[1:] = ordered[1:] < np.minimum.accumulate(ordered)[:-1]
    order = order[better]
    # Of those with equal costs the last has the least loss.
    last = np.ones(len(order), bool)
    last[:-1] = costs[order[1:]] != costs[order[:-1]]
    return np.asarray(order[last])


def _extend(
    entries: _Entries, trail: _Trail, number: int, item: _Item, choices: Sequence[int], limit: float = math.inf
) -> _Entries:
    """Return the partial plans with one item more, at one of these candidates."""
    picked = np.array(choices, dtype=np.int64)
    costs = np.add.outer(item.costs[picked], entries.costs).ravel()
    losses = np.add.outer(item.losses[picked], entries.losses).ravel()
    kept = np.flatnonzero(costs <= limit)
    kept = kept[_undominated(costs[kept], losses[kept])]
    choice, parent = np.divmod(kept, max(len(entries.costs), 1))
    return _Entries(costs[kept], losses[kept], trail.add(number, entries.nodes[parent], picked[choice]))


def _monotone(items: Sequence[_Item], limit: float) -> list[int] | _Infeasible:
    if len({item.importance for item in items if len(item.bits) > 1}) < 2:
        return _least_loss(items, limit)
    entries, trail = _monotone_plans(items, limit)
    if not len(entries.costs):
        cheapest, _ = _monotone_plans([replace(item, losses=np.zeros(len(item.bits))) for item in items], math.inf)
        if not len(cheapest.costs):
            raise ValueError(
                "with these candidates no plan gives more important layers at least as many bits; use method='pareto'"
            )
        return _Infeasible(float(cheapest.costs[0]))
    choices = trail.back(int(entries.nodes[-1]))
    return [item.bits[choices[number]] for number, item in enumerate(items)]


def _monotone_plans(items: Sequence[_Item], limit: float) -> tuple[_Entries, _Trail]:
    """Go through the layers, the most important first, with partial plans by the least bits that they may have."""
    trail = _Trail()
    start = _start()
    for number, item in enumerate(items):
        if len(item.bits) == 1:
            start = _extend(start, trail, number, item, [0])
    free = sorted((i for i in range(len(items)) if len(items[i].bits) > 1), key=lambda i: -items[i].importance)
    levels = sorted({b for number in free for b in items[number].bits}, reverse=True)
    states = dict.fromkeys(levels, start)
    done = 0
    for _, tied in groupby(free, key=lambda i: items[i].importance):
        members = list(tied)
        done += len(members)
        room = limit - sum(float(items[number].costs.min()) for number in free[done:])
        merged, following = _NOTHING, {}
        for low in levels:
            # A layer alone takes the least bits itself; of tied ones any may.
            for high in [low] if len(members) == 1 else [b for b in levels if b >= low]:
                entries = states[high]
                for number in members:
                    choices = [k for k, b in enumerate(items[number].bits) if low <= b <= high]
                    entries = _extend(entries, trail, number, items[number], choices, room)
                merged = _merge(merged, entries)
            following[low] = merged
        states = following
    return (states[levels[-1]] if levels else start), trail


def _merge(first: _Entries, second: _Entries) -> _Entries:
    costs, losses = np.append(first.costs, second.costs), np.append(first.losses, second.losses)
    kept = _undominated(costs, losses)
    return _Entries(costs[kept], losses[kept], np.append(first.nodes, second.nodes)[kept])


class _Choices:
    """Candidates of all items as plain lists, which are faster than arrays for few values; losses start at 0."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self.costs: list[list[float]] = [item.costs.tolist() for item in items]
        self.losses: list[list[float]] = [(item.losses - item.losses.min()).tolist() for item in items]
        self.kept = [_undominated_few(c, v) for c, v in zip(self.costs, self.losses, strict=True)]

    def steps(self) -> list[tuple[int, int, float, float]]:
        """Return the linear relaxation: item, candidate, more cost and less loss of each step, the best value first.

        From the cheapest candidate on, the steps of an item go along the lower convex hull of its candidates.
        """
        steps = []
        for number, (cost, loss, kept) in enumerate(zip(self.costs, self.losses, self.kept, strict=True)):
            hull: list[int] = []
            for k in kept:
                while len(hull) > 1 and _lies_above(cost, loss, hull[-2], hull[-1], k):
                    hull.pop()
                hull.append(k)
            for a, b in zip(hull, hull[1:], strict=False):
                steps.append((number, b, cost[b] - cost[a], loss[a] - loss[b]))
        return sorted(steps, key=lambda step: -step[3] / step[2])


def _undominated_few(costs: list[float], losses: list[float]) -> list[int]:
    kept, best = [], math.inf
    for k in sorted(range(len(costs)), key=lambda k: (costs[k], losses[k])):
        if losses[k] < best:
            kept.append(k)
            best = losses[k]
    return kept


def _lies_above(costs: list[float], losses: list[float], a: int, b: int, c: int) -> bool:
    return (losses[b] - losses[a]) * (costs[c] - costs[a]) >= (losses[c] - losses[a]) * (costs[b] - costs[a])


@dataclass(frozen=True)
class _First:
    """A plan by taking steps of the relaxation while they fit, its loss, and what the first that did not fit tells.

    ``price`` is the loss that one more unit of budget would save; no plan loses less than ``bound``. Without a price
    all steps fitted, and the plan is the best of all.
    """

    choices: list[int]
    loss: float
    price: float | None
    bound: float


def _greedy(choices: _Choices, limit: float) -> _First:
    chosen = [kept[0] for kept in choices.kept]
    room = limit - sum(cost[k] for cost, k in zip(choices.costs, chosen, strict=True))
    price, bound, stopped = None, 0.0, set()
    for number, k, cost, gain in choices.steps():
        if number in stopped:
            continue
        if cost <= room:
            chosen[number] = k
            room -= cost
            continue
        if price is None:
            price = gain / cost
            bound = sum(loss[k] for loss, k in zip(choices.losses, chosen, strict=True)) - room * price
        stopped.add(number)
    loss = sum(loss[k] for loss, k in zip(choices.losses, chosen, strict=True))
    return _First(chosen, loss, price, bound)


def _least_loss(items: Sequence[_Item], limit: float) -> list[int] | _Infeasible:
    least = sum(float(item.costs.min()) for item in items)
    if least > limit:
        return _Infeasible(least)
    choices = _Choices(items)
    first = _greedy(choices, limit)
    chosen = first.choices if first.price is None else _improve(choices, first, first.price, limit)
    return [item.bits[k] for item, k in zip(items, chosen, strict=True)]


def _below(loss: float) -> float:
    """What a loss must be under to be an improvement; equal sums differ by rounding."""
    return loss * (1 - TOLERANCE)


def _improve(choices: _Choices, first: _First, price: float, limit: float) -> list[int]:
    """Return the best of all plans, given one. ``choices`` loses the candidates that cannot be in a better one."""
    distances = []
    for number, (cost, loss) in enumerate(zip(choices.costs, choices.losses, strict=True)):
        priced = {k: loss[k] + price * cost[k] for k in choices.kept[number]}
        least = min(priced.values())
        # At this price, a plan with candidate k loses at least priced[k] - least more than the bound.
        kept = [k for k, value in priced.items() if first.bound + value - least < _below(first.loss)]
        if not kept:
            return first.choices
        choices.kept[number] = kept
        distances.append(min((priced[k] - least for k in kept if priced[k] > least), default=math.inf))
    # The items whose candidates differ most go first: they leave the fewest partial plans.
    order = sorted(range(len(distances)), key=lambda number: -distances[number])
    undecided = [number for number in order if len(choices.kept[number]) > 1]
    decided = [(number, choices.kept[number][0]) for number in order if len(choices.kept[number]) == 1]
    place_of = {number: place for place, number in enumerate(undecided)}
    steps = choices.steps()
    places = np.array([place_of[step[0]] for step in steps], dtype=np.int64)
    step_costs, step_gains = (np.array([step[part] for step in steps]) for part in (2, 3))
    cheapest = _sums_after([choices.costs[number][choices.kept[number][0]] for number in undecided])
    lightest = _sums_after([choices.losses[number][choices.kept[number][-1]] for number in undecided])

    best, end, proven = first.loss, None, math.inf
    trail = _Trail()
    entries = _start(
        sum(choices.costs[number][k] for number, k in decided), sum(choices.losses[number][k] for number, k in decided)
    )
    for place, number in enumerate(undecided):
        kept = choices.kept[number]
        costs = np.add.outer([choices.costs[number][k] for k in kept], entries.costs).ravel()
        losses = np.add.outer([choices.losses[number][k] for k in kept], entries.losses).ravel()
        # The least loss that the items to come add, over what they cost: linear between these corners.
        later = places > place
        corners = cheapest[place + 1] + np.append(0.0, step_costs[later].cumsum())
        heights = lightest[place + 1] + np.append(step_gains[later][::-1].cumsum()[::-1], 0.0)
        room = limit - costs
        bounds = losses + np.interp(room, corners, heights)
        alive = np.flatnonzero((room >= corners[0]) & (bounds < _below(best)))
        if not len(alive):
            break
        if len(alive) > MOST_PARTIAL_PLANS:
            ranked = alive[np.argsort(bounds[alive], kind="stable")]
            alive, proven = ranked[:MOST_PARTIAL_PLANS], min(proven, float(bounds[ranked[MOST_PARTIAL_PLANS]]))
        # The corner below is a plan.
        corner = np.searchsorted(corners, room[alive], side="right") - 1
        completed = losses[alive] + heights[corner]
        least_place = int(completed.argmin())
        choice, parent = np.divmod(alive, len(entries.costs))
        picked, parents = np.array(kept)[choice], entries.nodes[parent]
        if completed[least_place] < _below(best):
            best = float(completed[least_place])
            end = place, int(picked[least_place]), int(parents[least_place]), int(corner[least_place])
        survivors = _undominated(costs[alive], losses[alive])
        nodes = trail.add(number, parents[survivors], picked[survivors])
        entries = _Entries(costs[alive][survivors], losses[alive][survivors], nodes)
    if proven < _below(best):
        warn_caller(
            f"the plan's loss is proven to be within {best - proven:.2g} of the least one, and not to be the least: "
            f"more than {MOST_PARTIAL_PLANS:,} partial plans were as promising, as happens where all layers save the "
            "same per unit of cost"
        )
    if end is None:
        return first.choices
    place, last, node, corner_steps = end
    chosen = {number: kept[0] for number, kept in enumerate(choices.kept)} | trail.back(node) | {undecided[place]: last}
    for step in [step for step, p in zip(steps, places, strict=True) if p > place][:corner_steps]:
        chosen[step[0]] = step[1]
    return [chosen[number] for number in range(len(choices.kept))]


def _sums_after(values: list[float]) -> Floats:
    """Return the sum of the values from each place on, and 0 at last."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)
