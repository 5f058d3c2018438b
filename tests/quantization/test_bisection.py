"""Bisection over an order of layers, by a metric that is measured."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.quantization.bisection import bisect_bits

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def metric_of(drops):
    """A metric that falls by the drop of each layer at its bits."""
    return lambda plan: 1.0 - sum(drops[name].get(b, 0.0) for name, b in plan.items())


@given(num_layers=st.integers(1, 26), allowed=st.integers(0, 30))
@settings(deadline=None)
def test_one_step_finds_the_optimum_of_a_monotone_metric(num_layers, allowed):
    order = list(LETTERS[:num_layers])
    calls = []

    def evaluate(plan):
        calls.append(plan)
        return -float(sum(b == 4 for b in plan.values()))

    result = bisect_bits(order, evaluate, bits=(8, 4), target=-allowed)
    lowered = [name for name in order if result.plan[name] == 4]
    assert lowered == order[: min(allowed, num_layers)]
    assert result.metric == -len(lowered)
    assert result.evaluations == len(calls) == len(result.history)
    # One for the start, and what the method promises.
    assert result.evaluations <= 1 + math.ceil(math.log2(num_layers)) + 2


@given(
    drops=st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 0.1), st.floats(0, 0.1)), min_size=1, max_size=20),
    target=st.floats(0.3, 1.0),
)
@settings(deadline=None)
def test_several_precisions_each_start_from_what_is_lowered(drops, target):
    order = list(LETTERS[: len(drops)])
    table = {name: {6: a, 4: a + b, 2: a + b + c} for name, (a, b, c) in zip(order, drops, strict=True)}
    evaluate = metric_of(table)
    result = bisect_bits(order, evaluate, bits=(8, 6, 4, 2), target=target)
    # Step by step, by trying every count.
    plan, active = dict.fromkeys(order, 8), order
    for low in (6, 4, 2):
        counts = [k for k in range(len(active) + 1) if evaluate(plan | dict.fromkeys(active[:k], low)) >= target]
        active = active[: max(counts)]
        plan |= dict.fromkeys(active, low)
    assert dict(result.plan) == plan
    assert result.metric == evaluate(plan) >= target
    assert result.evaluations <= 1 + 3 * (math.ceil(math.log2(len(order))) + 2)


@given(metrics=st.lists(st.floats(0, 1), min_size=2, max_size=24), target=st.floats(0, 1))
@settings(deadline=None)
def test_what_comes_back_was_evaluated_and_is_feasible_for_any_metric(metrics, target):
    order = list(LETTERS[: len(metrics) - 1])
    metrics[0] = 1.0
    result = bisect_bits(order, lambda plan: metrics[sum(b == 4 for b in plan.values())], bits=(8, 4), target=target)
    seen = result.history
    chosen = [evaluation for evaluation in seen if evaluation.plan == result.plan]
    assert chosen
    assert chosen[0].feasible
    assert chosen[0].metric == result.metric >= target
    assert max(e.num_lowered for e in seen if e.feasible) == sum(b == 4 for b in result.plan.values())
    assert len(seen) <= 1 + math.ceil(math.log2(len(order))) + 2


def test_plans_beyond_a_dip_are_found():
    metrics = [1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 0.5, 0.5, 0.5]
    result = bisect_bits("abcdefgh", lambda plan: metrics[list(plan.values()).count(4)], bits=(8, 4), target=0.9)
    assert list(result.plan.values()).count(4) == 5


def test_layers_go_only_where_they_can():
    candidates = {"a": (8, 6, 4), "b": (8,), "c": (8, 4), "d": (8, 6), "e": (6, 4)}
    result = bisect_bits(list("abcde"), lambda plan: 1.0, bits=(8, 6, 4), target=0.5, candidates=candidates)
    assert dict(result.plan) == {"a": 4, "b": 8, "c": 4, "d": 6, "e": 4}
    assert dict(result.history[0].plan) == {"a": 8, "b": 8, "c": 8, "d": 8, "e": 6}
    # The step to 6 bits stops after a; c lies beyond.
    result = bisect_bits(
        list("abcde"), lambda plan: -float(plan["d"] == 6), bits=(8, 6, 4), target=0, candidates=candidates
    )
    assert dict(result.plan) == {"a": 4, "b": 8, "c": 8, "d": 8, "e": 6}


def test_a_start_keeps_other_layers_and_raises_none():
    start = {"stem": 8, "a": 4, "b": 8, "c": 8, "head": 32}
    result = bisect_bits(["c", "a", "b"], lambda plan: 1.0, bits=(8, 6), target=0.5, start=start)
    assert dict(result.plan) == {"stem": 8, "a": 4, "b": 6, "c": 6, "head": 32}
    assert list(result.plan) == list(start)


def test_a_ratio_is_of_the_start_or_of_a_baseline():
    evaluate = metric_of({name: {4: 0.1} for name in "abcd"})
    assert bisect_bits("abcd", evaluate, bits=(8, 4), ratio=0.79).target == pytest.approx(0.79)
    result = bisect_bits("abcd", evaluate, bits=(8, 4), ratio=0.75, baseline=1.04)
    assert (result.target, result.baseline) == (pytest.approx(0.78), 1.04)
    assert list(result.plan.values()).count(4) == 2
    with pytest.raises(ValueError, match=r"needs a baseline that is a positive number, got -1\.0; give target="):
        bisect_bits("ab", lambda plan: -1.0, bits=(8, 4), ratio=0.9)


def test_a_start_below_the_target_is_refused():
    with pytest.raises(ValueError, match=r"the starting plan reaches 0\.5, below the target of 0\.6; lower the target"):
        bisect_bits("ab", lambda plan: 0.5, bits=(8, 4), target=0.6)
    with pytest.raises(ValueError, match="the starting plan reaches nan"):
        bisect_bits("ab", lambda plan: math.nan, bits=(8, 4), target=-math.inf)


def test_a_metric_that_is_not_a_number_misses_every_target():
    result = bisect_bits("abc", lambda plan: math.nan if plan["b"] == 4 else 1.0, bits=(8, 4), target=0.0)
    assert dict(result.plan) == {"a": 4, "b": 8, "c": 8}


def outcomes_of(lost, n=1000):
    """900 of 1000 samples are right; each lowered layer loses some of these."""

    def evaluate(plan):
        right = torch.arange(n) < 900
        right[: lost * sum(b == 4 for b in plan.values())] = False
        return right

    return evaluate


def test_outcomes_of_samples_give_paired_standard_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = bisect_bits("abcd", outcomes_of(10), bits=(8, 4), ratio=0.97)
    assert result.baseline == pytest.approx(0.9)
    assert list(result.plan.values()).count(4) == 2
    assert result.metric == pytest.approx(0.88)
    assert result.history[0].standard_error == 0
    chosen = next(evaluation for evaluation in result.history if evaluation.plan == result.plan)
    share = 20 / 1000
    assert chosen.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 1000))
    # An outside reference is paired as well.
    result = bisect_bits("abcd", outcomes_of(10), bits=(8, 4), target=0.85, baseline=torch.ones(1000))
    assert result.baseline == 1
    assert result.history[0].standard_error == pytest.approx(math.sqrt(0.9 * 0.1 / 1000))


def test_a_target_within_the_noise_is_told():
    noise = torch.Generator().manual_seed(0)
    flips = {name: torch.randperm(1000, generator=noise)[:40] for name in "abcd"}

    def evaluate(plan):
        right = torch.arange(1000) < 900
        for name, places in flips.items():
            if plan[name] == 4:
                right[places] = ~right[places]
        return right.double()

    with pytest.warns(UserWarning, match="less than one standard error .* noise decides which plan is feasible"):
        bisect_bits("abcd", evaluate, bits=(8, 4), ratio=0.9999)
    with pytest.warns(UserWarning, match=r"target lies 9\.3e-05 below the baseline of 0\.93, .*\(0\.00255\)"):
        bisect_bits("ab", lambda plan: 0.93, bits=(8, 4), ratio=0.9999, num_samples=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bisect_bits("ab", lambda plan: 0.93, bits=(8, 4), ratio=0.99, num_samples=10_000)
        bisect_bits("ab", lambda plan: 0.93, bits=(8, 4), ratio=0.9999)  # nothing is known of the noise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": []}, "order must name at least one layer"),
        ({"order": ["a", "a"]}, "each once, got"),
        ({"bits": (8,)}, r"at least two precisions, highest first, such as \(8, 4\), got \(8,\)"),
        ({"bits": (4, 8)}, "highest first"),
        ({"target": None}, "give either target= or ratio="),
        ({"ratio": 0.9}, "give either target= or ratio="),
        ({"target": math.nan}, "target .*must be a number"),
        ({"target": None, "ratio": 99}, r"ratio must lie in \(0, 1\], got 99; target= takes the metric itself"),
        ({"start": {"a": 8}}, "start lacks layer 'b' of the order"),
        ({"candidates": {"b": ()}}, "layer 'b' has no candidates; leave it out of order"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
    ],
)
def test_wrong_use_says_what_to_do(options, message):
    arguments = {"order": ["a", "b"], "bits": (8, 4), "target": 0.5} | options
    with pytest.raises(ValueError, match=message):
        bisect_bits(arguments.pop("order"), lambda plan: 1.0, **arguments)


def test_outcomes_must_fit_each_other():
    lengths = iter([10, 9])
    with pytest.raises(ValueError, match="evaluate gave 9 outcomes, the baseline has 10; both must be of the same"):
        bisect_bits("ab", lambda plan: torch.ones(next(lengths)), bits=(8, 4), target=0.5)
    with pytest.raises(ValueError, match=r"must have shape \(N,\), got \(2, 3\)"):
        bisect_bits("ab", lambda plan: torch.ones(2, 3), bits=(8, 4), target=0.5)
    scalar = bisect_bits("ab", lambda plan: torch.tensor(0.75), bits=(8, 4), target=0.5)
    assert scalar.metric == 0.75
    assert scalar.history[1].standard_error is None


def test_confidence_asks_for_a_distance_of_standard_errors():
    baseline = torch.ones(400)

    def evaluate(plan):
        """Each lowered layer gets four more samples wrong."""
        outcomes = baseline.clone()
        outcomes[: 4 * sum(b == 4 for b in plan.values())] = 0
        return outcomes

    order = list(LETTERS[:20])
    found = {
        confidence: bisect_bits(order, evaluate, bits=(8, 4), ratio=0.95, baseline=baseline, confidence=confidence)
        for confidence in (0.5, 0.95, 0.999)
    }
    lowered = {c: sum(b == 4 for b in result.plan.values()) for c, result in found.items()}
    # k layers lose 0.01 k with an error of sqrt(0.01 k (1 - 0.01 k) / 400).
    assert lowered == {0.5: 5, 0.95: 3, 0.999: 2}
    assert [e.feasible for e in found[0.95].history] == [
        e.metric >= 0.95 + 1.6449 * e.standard_error for e in found[0.95].history
    ]


def test_confidence_needs_outcomes_and_a_sensible_number():
    with pytest.raises(ValueError, match=r"confidence must lie in \[0\.5, 1\)"):
        bisect_bits(["a"], lambda plan: torch.ones(4), bits=(8, 4), ratio=0.9, confidence=1.0)
    with pytest.raises(ValueError, match="needs the outcomes"):
        bisect_bits(["a"], lambda plan: 1.0, bits=(8, 4), ratio=0.9, confidence=0.95)
    worse = torch.tensor([1.0, 0.0] * 8)
    with pytest.raises(ValueError, match="1.64 standard errors above the target of 0.9; lower"):
        bisect_bits(["a"], lambda plan: worse, bits=(8, 4), ratio=0.9, baseline=torch.ones(16), confidence=0.95)
