"""From a table of sensitivities to a plan: the bits of each layer under a budget."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically
from lightning_plugins.quantization._bit_search import (
    TOLERANCE,
    Entries,
    Infeasible,
    Item,
    Trail,
    drop_infinite,
    extended,
    first_entries,
    least_loss_plan,
    linear_items,
    listed,
    milp_plan,
    monotone_plan,
    ordered_plan,
)
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
        chosen = ordered_plan(items, limit, bits)
    elif method == "dr-release":
        chosen = least_loss_plan(linear_items(items), limit)
    elif method == "hawq-v2":
        chosen = monotone_plan(drop_infinite(items), limit)
    else:
        chosen = (least_loss_plan if method == "pareto" else milp_plan)(drop_infinite(items), limit)
    if isinstance(chosen, Infeasible):
        raise ValueError(costs.too_small(budget, chosen))
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
    items = drop_infinite(_items(table, costs, groups, pins, bits))
    trail, entries = Trail(), first_entries()
    # Small items first: the lists stay shorter, and the intervals finer.
    for number in sorted(range(len(items)), key=lambda i: float(np.ptp(items[i].costs))):
        item = items[number]
        entries = extended(entries, trail, number, item, range(len(item.bits)))
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
        items: Sequence[Item],
        entries: Entries,
        trail: Trail,
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
            raise ValueError(self._costs.too_small(budget, Infeasible(float(self._entries.costs[0]))))
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
            raise ValueError(f"layer {name!r} has no loss at {b} bits, only at {listed(layer.losses)}; change the plan")
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

    def too_small(self, budget: float, found: Infeasible) -> str:
        """Say that no plan fits a budget."""
        return (
            f"no plan fits a budget of {budget:g} ({self.unit}), the cheapest costs {found.least / self.scale:.6g}: "
            "raise the budget, or allow lower bits (candidates of the table, bits=, pins=, groups=)"
        )

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


def _items(
    table: SensitivityTable,
    costs: _Costs,
    groups: Sequence[Sequence[str]],
    pins: Mapping[str, int] | None,
    bits: Sequence[int] | None,
) -> list[Item]:
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
            Item(
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
        raise ValueError(f"{who} is pinned to different bits, {listed(held)}; pin it to one, or take it apart")
    if held and not held <= available:
        raise ValueError(
            f"{who} is pinned to {listed(held)} bits, but the table has losses only at {listed(available)}"
        )
    allowed = held or (available if bits is None else available & set(bits))
    if not allowed:
        raise ValueError(f"{who} has none of the bits {listed(bits or ())}, only {listed(available)}; pin it to one")
    return tuple(sorted(allowed, reverse=True))


def _bits_of(plan: Mapping[str, int], name: str) -> int:
    if name not in plan:
        raise ValueError(f"the plan lacks layer {name!r} of the table; it has {', '.join(plan)}")
    return plan[name]


def _plan(table: SensitivityTable, chosen: Mapping[tuple[str, ...], int]) -> BitPlan:
    bits = {name: b for names, b in chosen.items() for name in names}
    return BitPlan({name: bits[name] for name in table.layers})
