"""Allocators: every rule against brute force, HAWQ's published plans, frontiers, errors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.quantization import _bit_search
from lightning_plugins.quantization.allocation import (
    allocate_bits,
    diverse_plans,
    load_latency,
    pareto_frontier,
    plan_cost,
    predicted_loss,
    save_latency,
)
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable

# fmt: off
TRACE = [.06857826, .03162379, .03298575, .01205663, .02222431, .00596336, .06931772, .00807129, .00372905, .00530698,
         .00209011, .00737569, .00210454, .00151197, .00158041, .00078146, .00451841, .00098745, .00072944]
ERROR_8 = [.0235, .0125, .0102, .0082, .0145, .0344, .0023, .0287, .0148, .0333, .0682, .0027, .0448, .0336, .0576,
           .1130, .0102, .0947, .0532]
ERROR_4 = [6.7430, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, .6827, 9.0942, 4.8857, 10.7599, 21.7546, .8603, 14.5324,
           10.9651, 18.7706, 36.4044, 3.1572, 29.6994, 17.4016]
WEIGHTS = [36864] * 4 + [73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824, 589824, 1179648, 2359296,
           131072, 2359296, 2359296]
# fmt: on
SHORTCUTS = [("4", "6"), ("9", "11"), ("14", "16")]
RESNET18 = SensitivityTable(
    "HAWQ-V3's notebook",
    {
        str(i): LayerSensitivity(t, {8: t * at_8, 4: t * at_4}, num_weights=n)
        for i, (t, at_8, at_4, n) in enumerate(zip(TRACE, ERROR_8, ERROR_4, WEIGHTS, strict=True))
    },
)


def random_table(num_layers, seed, bits=(8, 6, 4, 2), *, uneven=False):
    """Sizes over four orders of magnitude, losses near importance x 4^-bits; some layers may lack candidates."""
    rng = np.random.default_rng(seed)
    layers = {}
    for i in range(num_layers):
        importance = float(np.exp(rng.normal(0, 2)))
        losses = {b: importance * 4.0**-b * float(np.exp(rng.normal(0, 0.3))) for b in bits}
        if uneven and i:
            losses = {b: losses[b] for b in rng.permutation(bits)[: rng.integers(1, len(bits) + 1)].tolist()}
        size = int(np.exp(rng.uniform(math.log(400), math.log(2.4e6))))
        layers[f"layer.{i}"] = LayerSensitivity(importance, losses, size, macs=size * int(rng.integers(1, 800)))
    return SensitivityTable("random", layers)


def changed(table, **values):
    """The same layers with another value, by name, of some field."""
    return SensitivityTable(
        "changed",
        {
            name: replace(layer, **{field: by_name[name] for field, by_name in values.items()})
            for name, layer in table.layers.items()
        },
    )


def random_latency(table, seed):
    rng = np.random.default_rng(seed)
    return {name: {b: float(rng.uniform(0.1, 2.0)) for b in layer.losses} for name, layer in table.layers.items()}


def all_plans(table, groups=(), pins=None):
    candidates = [
        [(pins or {}).get(name)] if name in (pins or {}) else list(layer.losses) for name, layer in table.layers.items()
    ]
    for bits in itertools.product(*candidates):
        plan = dict(zip(table.layers, bits, strict=True))
        if all(len({plan[name] for name in group}) == 1 for group in groups):
            yield plan


def unit_options(table, unit, seed=0):
    options = {"unit": unit}
    if unit == "latency":
        options["latency"] = random_latency(table, seed)
    if unit == "bops" and seed % 2:
        options["activation_bits"] = 8
    return options


UNITS = ["average_bits", "average_bits_per_layer", "bytes", "bops", "latency"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_is_that_of_brute_force(unit, seed):
    table = random_table(4 + seed % 3, seed, uneven=seed > 2)
    options = unit_options(table, unit, seed)
    scored = [(plan_cost(table, plan, **options), predicted_loss(table, plan)) for plan in all_plans(table)]
    costs = sorted({cost for cost, _ in scored})
    for budget in [costs[0], costs[len(costs) // 7], costs[len(costs) // 3], costs[-1], 2 * costs[-1]]:
        best = min(loss for cost, loss in scored if cost <= budget)
        for method in ("pareto", "milp"):
            plan = allocate_bits(table, budget=budget, method=method, **options)
            assert list(plan) == list(table.layers)
            assert predicted_loss(table, plan) == pytest.approx(best, rel=1e-10), method
            assert plan_cost(table, plan, **options) <= budget * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_groups_and_pins_hold_in_the_optimum(seed):
    table = random_table(6, seed)
    groups, pins = [("layer.1", "layer.4"), ["layer.2", "layer.3"]], {"layer.0": 8}
    plans = list(all_plans(table, groups, pins))
    budget = sorted(plan_cost(table, plan) for plan in plans)[len(plans) // 4]
    best = min(predicted_loss(table, plan) for plan in plans if plan_cost(table, plan) <= budget)
    for method in ("pareto", "milp"):
        plan = allocate_bits(table, budget=budget, method=method, groups=groups, pins=pins)
        assert dict(plan) in plans
        assert predicted_loss(table, plan) == pytest.approx(best, rel=1e-10)
    frontier = pareto_frontier(table, groups=groups, pins=pins)
    assert predicted_loss(table, frontier.plan(budget)) == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize(("num_layers", "seed"), [(30, 0), (30, 1), (60, 2), (60, 3), (100, 4)])
def test_both_solvers_agree_on_larger_tables(num_layers, seed):
    table = random_table(num_layers, seed)
    for budget in (2.4, 4.0, 6.5):
        found = {method: allocate_bits(table, budget=budget, method=method) for method in ("pareto", "milp")}
        assert plan_cost(table, found["pareto"]) <= budget * (1 + 1e-9)
        losses = {method: predicted_loss(table, plan) for method, plan in found.items()}
        assert losses["pareto"] == pytest.approx(losses["milp"], rel=1e-8)


@pytest.mark.parametrize("method", ["pareto", "milp"])
@pytest.mark.parametrize(
    ("share", "at_4", "gain", "omega"),
    [
        (0.75, {13, 18}, -1.274272537, 0.033440591),
        (0.5, {15, 17, 18}, -1.233207199, 0.074505930),
        (0.25, {14, 15, 16, 17, 18}, -1.189413550, 0.118299578),
    ],
)
def test_the_published_plans_of_hawq_v3(method, share, at_4, gain, omega):
    plan = allocate_bits(RESNET18, budget=4 + share * 4, method=method, groups=SHORTCUTS)
    assert {int(name) for name, b in plan.items() if b == 4} == at_4
    # The notebook's objective is what the layers at 8 bits save.
    saved = sum(TRACE[i] * (ERROR_8[i] - ERROR_4[i]) for i in range(19) if i not in at_4)
    assert saved == pytest.approx(gain, abs=5e-10)
    assert predicted_loss(RESNET18, plan) == pytest.approx(omega, abs=5e-10)
    in_bytes = allocate_bits(RESNET18, budget=sum(WEIGHTS) * (4 + share * 4) / 8, unit="bytes", groups=SHORTCUTS)
    assert in_bytes == plan
    assert pareto_frontier(RESNET18, groups=SHORTCUTS).plan(4 + share * 4) == plan


def brute_frontier(table, options):
    points = sorted((plan_cost(table, plan, **options), predicted_loss(table, plan)) for plan in all_plans(table))
    kept = []
    for cost, loss in points:
        if not kept or loss < kept[-1][1] * (1 - 1e-12):
            kept.append((cost, loss))
    return np.array(kept)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_is_that_of_brute_force(unit, seed):
    table = random_table(5, seed, uneven=seed == 2)
    options = unit_options(table, unit, seed)
    frontier = pareto_frontier(table, **options)
    assert frontier.exact
    np.testing.assert_allclose(frontier.points, brute_frontier(table, options), rtol=1e-10)


@pytest.mark.parametrize("resolution", [None, 0.01])
def test_points_of_a_frontier_are_plans(resolution):
    table = random_table(18, 5)
    frontier = pareto_frontier(table, resolution=resolution)
    assert frontier.exact == (resolution is None)
    assert (np.diff(frontier.points, axis=0) * [1, -1] > 0).all()
    for cost, loss in frontier.points[:: max(1, len(frontier) // 40)]:
        plan = frontier.plan(cost)
        assert plan_cost(table, plan) == pytest.approx(cost, rel=1e-12)
        assert predicted_loss(table, plan) == pytest.approx(loss, rel=1e-10)
        if frontier.exact:
            assert predicted_loss(table, allocate_bits(table, budget=cost)) == pytest.approx(loss, rel=1e-10)
    assert set(frontier.plan(2).values()) == {2}
    assert frontier.points[0, 0] == pytest.approx(2)
    assert frontier.points[-1].tolist() == pytest.approx([8, predicted_loss(table, dict.fromkeys(table.layers, 8))])


def test_merged_costs_bound_a_frontier_and_stay_near_it():
    table = random_table(120, 0, bits=(8, 7, 6, 5, 4, 3, 2))
    frontier = pareto_frontier(table, resolution=0.001)
    assert 300 < len(frontier) < 1010
    for budget in (2.5, 3.0, 4.0, 6.0):
        best = predicted_loss(table, allocate_bits(table, budget=budget))
        assert best * (1 - 1e-9) <= predicted_loss(table, frontier.plan(budget)) <= 1.04 * best


@given(seed=st.integers(0, 1000), first=st.floats(2, 9), second=st.floats(2, 9))
@settings(max_examples=40, deadline=None)
def test_more_budget_never_loses_more(seed, first, second):
    table = random_table(12, seed)
    low, high = sorted([first, second])
    losses = [predicted_loss(table, allocate_bits(table, budget=budget)) for budget in (low, high)]
    assert losses[1] <= losses[0] * (1 + 1e-10)


@given(seed=st.integers(0, 1000), unit=st.sampled_from(UNITS), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_solver_and_frontier_agree_for_any_budget(seed, unit, share):
    table = random_table(14, seed, uneven=True)
    options = unit_options(table, unit, seed)
    frontier = pareto_frontier(table, **options)
    budget = frontier.points[0, 0] + share * (frontier.points[-1, 0] - frontier.points[0, 0])
    plan = allocate_bits(table, budget=budget, **options)
    assert plan_cost(table, plan, **options) <= budget * (1 + 1e-9)
    assert predicted_loss(table, plan) == pytest.approx(predicted_loss(table, frontier.plan(budget)), rel=1e-10)


@pytest.mark.parametrize("losses", [{8: 0.0, 4: 0.0}, {8: 1.0, 4: 1.0}, {8: -3.0, 4: -1.0}, {8: 2.0, 4: 1.0}])
def test_equal_zero_negative_and_inverted_losses(losses):
    table = SensitivityTable("flat", {name: LayerSensitivity(1.0, losses, 10) for name in "abcde"})
    best = min(sum(losses[b] for b in bits) for bits in itertools.product(losses, repeat=5) if sum(bits) <= 30)
    for method in ("pareto", "milp", "hawq-v2"):
        assert predicted_loss(table, allocate_bits(table, budget=6, method=method)) == pytest.approx(best)
    assert predicted_loss(table, pareto_frontier(table).plan(6)) == pytest.approx(best)


def test_identical_layers_are_solved_quickly():
    table = SensitivityTable(
        "same", {str(i): LayerSensitivity(1.0, {b: 4.0**-b for b in (8, 6, 4, 2)}, 1000) for i in range(120)}
    )
    for method in ("pareto", "hawq-v2"):
        plan = allocate_bits(table, budget=5, method=method)
        assert sorted(plan.values()) == [4] * 60 + [6] * 60


def test_a_search_that_is_cut_says_what_is_proven(monkeypatch):
    table = random_table(8, 0)
    losses = {name: {b: layer.num_weights * (8.0 - b) for b in (8, 6, 4, 2)} for name, layer in table.layers.items()}
    table = changed(table, losses=losses)
    best = predicted_loss(table, pareto_frontier(table).plan(4.3))
    assert predicted_loss(table, allocate_bits(table, budget=4.3)) == pytest.approx(best, rel=1e-12)
    monkeypatch.setattr(_bit_search, "MOST_PARTIAL_PLANS", 10)
    with pytest.warns(UserWarning, match="proven to be within .* of the least one, and not to be the least") as record:
        plan = allocate_bits(table, budget=4.3)
    assert record[0].filename == __file__
    proven = float(str(record[0].message).split("within ")[1].split()[0])
    assert best <= predicted_loss(table, plan) <= best + 1.1 * proven
    assert plan_cost(table, plan) <= 4.3


def monotone(table, plan):
    names = [name for name in table.layers if len(table.layers[name].losses) > 1]
    return all(
        plan[a] >= plan[b] for a in names for b in names if table.layers[a].importance > table.layers[b].importance
    )


@pytest.mark.parametrize("seed", range(12))
def test_hawq_v2_is_the_best_monotone_plan(seed):
    rng = np.random.default_rng(seed)
    table = random_table(6, seed, uneven=seed % 3 == 2)
    ties = {name: float(rng.integers(1, 4 if seed % 2 else 100)) for name in table.layers}
    table = changed(table, importance=ties)
    scored = [
        (plan_cost(table, plan), predicted_loss(table, plan)) for plan in all_plans(table) if monotone(table, plan)
    ]
    if not scored:
        with pytest.raises(ValueError, match="use method='pareto'"):
            allocate_bits(table, budget=8, method="hawq-v2")
        return
    costs = sorted(cost for cost, _ in scored)
    for budget in {costs[0], costs[len(costs) // 5], costs[len(costs) // 2], costs[-1]}:
        best = min(loss for cost, loss in scored if cost <= budget)
        plan = allocate_bits(table, budget=budget, method="hawq-v2")
        assert monotone(table, plan)
        assert plan_cost(table, plan) <= budget * (1 + 1e-9)
        assert predicted_loss(table, plan) == pytest.approx(best, rel=1e-10)
    with pytest.raises(ValueError, match=rf"cheapest costs {costs[0]:.5g}"):
        allocate_bits(table, budget=costs[0] * 0.999, method="hawq-v2")


def test_hawq_v2_leaves_pins_outside_of_the_order_and_takes_a_group_as_one_layer():
    table = random_table(8, 1)
    least = table.order()[0]
    plan = allocate_bits(table, budget=4, method="hawq-v2", pins={least: 8})
    rest = [plan[name] for name in table.order() if name != least]
    assert plan[least] == 8
    assert rest == sorted(rest)
    first, last = table.order()[1], table.order()[-2]
    plan = allocate_bits(table, budget=4, method="hawq-v2", groups=[(first, last)])
    rest = [plan[name] for name in table.order() if name not in (first, last)]
    assert plan[first] == plan[last]
    assert rest == sorted(rest)


@pytest.mark.parametrize("budget", [4.0, 4.7, 5.5, 7.99, 8.0])
def test_order_lowers_as_many_layers_as_the_budget_asks_for(budget):
    table = random_table(10, 3, bits=(8, 4))
    plan = allocate_bits(table, budget=budget, method="order")
    order = table.order()
    lowered = [name for name in order if plan[name] == 4]
    assert lowered == order[: len(lowered)]
    assert plan_cost(table, plan) <= budget
    if lowered:
        assert plan_cost(table, plan.edit({lowered[-1]: 8})) > budget


def test_order_keeps_what_is_infinitely_important_and_passes_over_other_layers():
    layers = {
        "a": LayerSensitivity(math.inf, {8: 0.0, 6: 1.0, 4: math.inf}, 100),
        "b": LayerSensitivity(-0.2, {8: 0.0, 6: 1.0, 4: 2.0}, 100),
        "c": LayerSensitivity(-0.9, {8: 0.0}, 100),
        "d": LayerSensitivity(-0.8, {8: 0.0, 6: 1.0, 4: 2.0}, 100),
    }
    table = SensitivityTable("zd", layers)
    assert dict(allocate_bits(table, budget=7, method="order", bits=(8, 4))) == {"a": 8, "b": 8, "c": 8, "d": 4}
    assert dict(allocate_bits(table, budget=6.9, method="order", bits=(8, 4))) == {"a": 8, "b": 4, "c": 8, "d": 4}
    pinned = allocate_bits(table, budget=6, method="order", bits=(8, 4), pins={"[ab]": 6})
    assert dict(pinned) == {"a": 6, "b": 6, "c": 8, "d": 4}
    with pytest.raises(ValueError, match=r"the cheapest costs 6: raise the budget"):
        allocate_bits(table, budget=5.9, method="order", bits=(8, 4))
    with pytest.raises(ValueError, match=r"the candidates are 8, 6, 4; pass bits=\(high, low\)"):
        allocate_bits(table, budget=7, method="order")


@pytest.mark.parametrize("seed", range(5))
def test_dr_release_gives_the_sensitive_layers_their_bits(seed):
    table = random_table(6, seed)
    same_size = changed(table, num_weights=dict.fromkeys(table.layers, 1000))
    for budget in (3.1, 4.0, 5.7):
        plan = allocate_bits(same_size, budget=budget, method="dr-release")
        assert monotone(same_size, plan)
        assert set(plan.values()) >= {8, 2}
        gains = {
            sum(table.layers[name].importance * b for name, b in candidate.items())
            for candidate in all_plans(table)
            if plan_cost(table, candidate) <= budget
        }
        plan = allocate_bits(table, budget=budget, method="dr-release")
        gain = sum(table.layers[name].importance * b for name, b in plan.items())
        assert gain == pytest.approx(max(gains), rel=1e-10)


def test_dr_release_keeps_the_infinite_and_refuses_the_negative():
    layers = {
        "a": LayerSensitivity(math.inf, {8: 0.0, 4: 1.0}, 100),
        "b": LayerSensitivity(3.0, {8: 0.0, 4: 1.0}, 100),
        "c": LayerSensitivity(1.0, {8: 0.0, 4: 1.0}, 100),
    }
    table = SensitivityTable("t", layers)
    assert dict(allocate_bits(table, budget=6.7, method="dr-release")) == {"a": 8, "b": 8, "c": 4}
    assert set(allocate_bits(table, budget=6.7, method="dr-release").values()) == {8, 4}
    negative = SensitivityTable("lim", {"a": LayerSensitivity(-0.5, {8: 0.0, 4: 1.0}, 100)})
    with pytest.raises(ValueError, match="'a' has -0.5: it would get the fewest bits; use method='order'"):
        allocate_bits(negative, budget=8, method="dr-release")


def test_an_infinite_loss_is_a_last_resort():
    layers = {
        "a": LayerSensitivity(1.0, {8: 0.0, 4: math.inf}, 100),
        "b": LayerSensitivity(1.0, {8: math.inf, 4: math.inf}, 100),
        "c": LayerSensitivity(1.0, {8: 0.0, 4: 0.1}, 100),
    }
    table = SensitivityTable("t", layers)
    for method in ("pareto", "milp", "hawq-v2"):
        plan = allocate_bits(table, budget=5.4, method=method)
        assert dict(plan) == {"a": 8, "b": 4, "c": 4}
        with pytest.raises(ValueError, match=r"the cheapest costs 5\.33333"):
            allocate_bits(table, budget=5.3, method=method)


def test_units():
    layers = {
        "a": LayerSensitivity(1.0, {8: 0.0, 4: 1.0, 2: 2.0}, 10, macs=100),
        "b": LayerSensitivity(1.0, {8: 0.0, 4: 1.0, 2: 2.0}, 33, macs=7),
    }
    table, plan = SensitivityTable("t", layers), {"a": 8, "b": 2, "not in the table": 8}
    assert plan_cost(table, plan) == pytest.approx((10 * 8 + 33 * 2) / 43)
    assert plan_cost(table, plan, unit="average_bits_per_layer") == 5
    assert plan_cost(table, plan, unit="bytes") == 10 + 9  # 66 bits take 9 bytes
    assert plan_cost(table, plan, unit="bops") == 100 * 64 + 7 * 4
    assert plan_cost(table, plan, unit="bops", activation_bits=8) == 100 * 64 + 7 * 16
    assert plan_cost(table, plan, unit="latency", latency={"a": {8: 0.25}, "b": {2: 0.5}}) == 0.75
    assert predicted_loss(table, plan) == 2


def test_a_budget_that_is_met_exactly_is_met():
    layers = {name: LayerSensitivity(1.0, {3: 0.0, 2: 1.0}, 1) for name in "abcdefghij"}
    latency = dict.fromkeys(layers, {3: 0.3, 2: 0.1})
    table = SensitivityTable("t", layers)
    assert 4.35 * 100 < 435  # what the tolerance is for
    for cost in range(21, 30):
        assert sum(allocate_bits(table, budget=cost / 10).values()) == cost
    for count in range(1, 10):
        budget = count * 0.3 + (10 - count) * 0.1
        plan = allocate_bits(table, budget=budget, unit="latency", latency=latency)
        assert list(plan.values()).count(3) == count


def test_diverse_plans_hold_one_layer_elsewhere():
    table = random_table(6, 2, bits=(8, 4, 2))
    options = {"budget": 6, "method": "dr-release", "groups": [("layer.0", "layer.1")]}
    plans = diverse_plans(table, pins={"layer.5": 8}, **options)
    assert plans[0] == allocate_bits(table, pins={"layer.5": 8}, **options)
    assert len(plans) > 3
    assert len({tuple(plan.values()) for plan in plans}) == len(plans)
    for plan in plans:
        assert plan_cost(table, plan) <= 6
        assert plan["layer.5"] == 8
        assert plan["layer.0"] == plan["layer.1"]
    for name, b in itertools.product(["layer.0", "layer.2", "layer.3", "layer.4"], [4, 2]):
        assert allocate_bits(table, pins={"layer.5": 8, name: b}, **options) in plans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.9}, r"no plan fits a budget of 1\.9 \(average_bits\), the cheapest costs 2: raise the budget"),
        ({"budget": -1}, "no plan fits a budget of -1"),
        ({"budget": math.nan}, "budget .*must be a number, got nan"),
        ({"method": "greedy"}, "method must be one of pareto, milp, hawq-v2, order, dr-release, got 'greedy'"),
        ({"unit": "megabytes"}, "unit must be one of average_bits, .*, got 'megabytes'"),
        ({"unit": "latency"}, "needs latency=, milliseconds by layer and bits"),
        ({"latency": {}}, "latency= is for unit='latency'"),
        ({"activation_bits": 8}, "activation_bits= is for unit='bops'"),
        ({"unit": "latency", "latency": {"a": {8: 1.0}}}, "no time for layer 'a' at 4 bits; measure it"),
        ({"unit": "latency", "latency": {"a": {8: 1.0, 4: math.nan}}}, "each value a number or None, got .*nan"),
        ({"unit": "bops"}, "lacks for layer 'b'; make the table with an example input"),
        ({"pins": {"c*": 8}}, r"no layer of the table matches the pin 'c\*'; it has a, b"),
        ({"pins": {"a": 6}}, "layer 'a' is pinned to 6 bits, but the table has losses only at 8, 4"),
        ({"pins": {"a": 8, "b": 4}, "groups": [("a", "b")]}, "group a, b is pinned to different bits, 8, 4"),
        ({"bits": (2,)}, "layer 'a' has none of the bits 2, only 8, 4; pin it to one"),
        ({"groups": [("a", "c")]}, "groups= names layer 'c', which the table lacks; it has a, b"),
        ({"groups": [("a", "b"), ("b",)]}, "groups= names layer 'b' twice"),
    ],
)
def test_wrong_use_says_what_to_do(options, message):
    layers = {
        "a": LayerSensitivity(1.0, {8: 0.0, 4: 1.0}, 0, macs=1),
        "b": LayerSensitivity(1.0, {8: 0.0, 4: 1.0, 2: 3.0}, 10),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        allocate_bits(SensitivityTable("t", layers), **{"budget": 6} | options)


def test_wrong_use_of_the_other_functions():
    layers = {"a": LayerSensitivity(1.0, {8: 0.0}, 10), "b": LayerSensitivity(1.0, {4: 0.0}, 10)}
    table = SensitivityTable("t", layers)
    with pytest.raises(ValueError, match="group a, b has no candidate bits in common; take it apart"):
        pareto_frontier(table, groups=[("a", "b")])
    with pytest.raises(ValueError, match="no plan fits a budget of 5 .* cheapest costs 6"):
        pareto_frontier(table).plan(5)
    with pytest.raises(ValueError, match=r"resolution must lie in \(0, 1\)"):
        pareto_frontier(table, resolution=0)
    with pytest.raises(ValueError, match="the plan lacks layer 'b' of the table"):
        plan_cost(table, {"a": 8})
    with pytest.raises(ValueError, match="layer 'b' has no loss at 8 bits, only at 4"):
        predicted_loss(table, {"a": 8, "b": 8})


def test_pins_may_lie_outside_of_bits_and_take_their_group_along():
    table = random_table(5, 0)
    plan = allocate_bits(table, budget=8, bits=(4, 2), pins={"*": 2, "layer.3": 8}, groups=[("layer.1", "layer.2")])
    assert dict(plan) == {f"layer.{i}": 8 if i == 3 else 2 for i in range(5)}
    plan = allocate_bits(table, budget=8, bits=(4, 2), pins={"layer.2": 6}, groups=[("layer.1", "layer.2")])
    assert dict(plan) == {f"layer.{i}": 6 if i in (1, 2) else 4 for i in range(5)}


def test_latency_tables_come_back_from_json(tmp_path):
    latency = {"a": {8: 0.5, 4: 0.25}, "b": {8: 1.0}}
    path = save_latency(tmp_path / "latency.json", latency)
    assert load_latency(path) == latency
    for content in (b"", b"[1]", b'{"a": 3}', b'{"a": {"eight": 1}}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a latency table .* maps layer names to milliseconds by bits"):
            load_latency(path)


def test_the_picture_marks_the_chosen_plan(tmp_path):
    table = random_table(6, 0)
    frontier = pareto_frontier(table, unit="bytes")
    plan = allocate_bits(table, budget=4)
    (axes,) = frontier.figure(chosen=plan).axes
    marked = axes.lines[-1].get_xydata()[0].tolist()
    assert marked == pytest.approx([plan_cost(table, plan, unit="bytes"), predicted_loss(table, plan)])
    assert axes.get_yscale() == "log"
    frontier.figure().savefig(tmp_path / "frontier.png")
    flat = SensitivityTable("flat", {"a": LayerSensitivity(1.0, {8: 0.0, 4: 1.0}, 10)})
    assert pareto_frontier(flat).figure().axes[0].get_yscale() == "linear"
