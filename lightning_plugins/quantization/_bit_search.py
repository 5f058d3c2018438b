"""The search for the bits of each layer under a limit: exact, monotone, by order, or by scipy."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_plugins.checks import warn_caller

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

# A budget is a product or a sum of floats, so that what exactly meets it may come out a rounding error above. Costs in
# bits, bytes and bit operations are integers, which floats hold exactly up to 2^53.
TOLERANCE = 1e-12

# Usual tables keep below 10,000 of them; without a limit, unusual ones would fill the memory.
MOST_PARTIAL_PLANS = 100_000


@dataclass(frozen=True)
class Item:
    """Layers that share their bits: one, or a group. Costs and losses are by candidate, ``bits`` from the highest."""

    names: tuple[str, ...]
    bits: tuple[int, ...]
    costs: Floats
    losses: Floats
    importance: float
    total_importance: float

    def restricted(self, choices: Sequence[int]) -> Item:
        """Return the item with some of its candidates."""
        kept = list(choices)
        return replace(self, bits=tuple(self.bits[k] for k in kept), costs=self.costs[kept], losses=self.losses[kept])


@dataclass(frozen=True)
class Infeasible:
    """No plan fits; ``least`` is what the cheapest one costs."""

    least: float


def listed(bits: Iterable[int]) -> str:
    return ", ".join(str(b) for b in sorted(bits, reverse=True))


def drop_infinite(items: Sequence[Item]) -> list[Item]:
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


def linear_items(items: Sequence[Item]) -> list[Item]:
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


def ordered_plan(items: Sequence[Item], limit: float, bits: Sequence[int] | None) -> list[int] | Infeasible:
    free = [number for number, item in enumerate(items) if len(item.bits) > 1]
    used = {b for number in free for b in items[number].bits}
    if len(used) > 2:
        raise ValueError(
            f"method='order' takes two precisions, the candidates are {listed(used)}; pass bits=(high, low)"
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
        return Infeasible(min(cost))
    for number in lowered[:count]:
        chosen[number] = 1
    return [item.bits[k] for item, k in zip(items, chosen, strict=True)]


def milp_plan(items: Sequence[Item], limit: float) -> list[int] | Infeasible:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    least = sum(float(item.costs.min()) for item in items)
    if least > limit:
        return Infeasible(least)
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


class Trail:
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
class Entries:
    """Partial plans that none of them beats: by rising cost and falling loss, with their numbers in a trail."""

    costs: Floats
    losses: Floats
    nodes: Integers

    def take(self, kept: NDArray[Any]) -> Entries:
        return Entries(self.costs[kept], self.losses[kept], self.nodes[kept])


_NOTHING = Entries(np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64))


def first_entries(cost: float = 0.0, loss: float = 0.0) -> Entries:
    return Entries(np.array([cost]), np.array([loss]), np.array([-1]))


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


def extended(
    entries: Entries, trail: Trail, number: int, item: Item, choices: Sequence[int], limit: float = math.inf
) -> Entries:
    """Return the partial plans with one item more, at one of these candidates."""
    picked = np.array(choices, dtype=np.int64)
    costs = np.add.outer(item.costs[picked], entries.costs).ravel()
    losses = np.add.outer(item.losses[picked], entries.losses).ravel()
    kept = np.flatnonzero(costs <= limit)
    kept = kept[_undominated(costs[kept], losses[kept])]
    choice, parent = np.divmod(kept, max(len(entries.costs), 1))
    return Entries(costs[kept], losses[kept], trail.add(number, entries.nodes[parent], picked[choice]))


def monotone_plan(items: Sequence[Item], limit: float) -> list[int] | Infeasible:
    if len({item.importance for item in items if len(item.bits) > 1}) < 2:
        return least_loss_plan(items, limit)
    entries, trail = _monotone_entries(items, limit)
    if not len(entries.costs):
        cheapest, _ = _monotone_entries([replace(item, losses=np.zeros(len(item.bits))) for item in items], math.inf)
        if not len(cheapest.costs):
            raise ValueError(
                "with these candidates no plan gives more important layers at least as many bits; use method='pareto'"
            )
        return Infeasible(float(cheapest.costs[0]))
    choices = trail.back(int(entries.nodes[-1]))
    return [item.bits[choices[number]] for number, item in enumerate(items)]


def _monotone_entries(items: Sequence[Item], limit: float) -> tuple[Entries, Trail]:
    """Go through the layers, the most important first, with partial plans by the least bits that they may have."""
    trail = Trail()
    start = first_entries()
    for number, item in enumerate(items):
        if len(item.bits) == 1:
            start = extended(start, trail, number, item, [0])
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
                    entries = extended(entries, trail, number, items[number], choices, room)
                merged = _merge(merged, entries)
            following[low] = merged
        states = following
    return (states[levels[-1]] if levels else start), trail


def _merge(first: Entries, second: Entries) -> Entries:
    costs, losses = np.append(first.costs, second.costs), np.append(first.losses, second.losses)
    kept = _undominated(costs, losses)
    return Entries(costs[kept], losses[kept], np.append(first.nodes, second.nodes)[kept])


class _Choices:
    """Candidates of all items as plain lists, which are faster than arrays for few values; losses start at 0."""

    def __init__(self, items: Sequence[Item]) -> None:
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


def least_loss_plan(items: Sequence[Item], limit: float) -> list[int] | Infeasible:
    least = sum(float(item.costs.min()) for item in items)
    if least > limit:
        return Infeasible(least)
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
    trail = Trail()
    entries = first_entries(
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
        entries = Entries(costs[alive][survivors], losses[alive][survivors], nodes)
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
