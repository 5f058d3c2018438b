from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from lightning_plugins.robustness.geometry import (
    AdversarialPowerLaw,
    LogitMargin,
    MinimalPerturbation,
    PerturbationNorm,
    fit_power_law,
    linearised_minimal_eps,
)
from lightning_plugins.robustness.masking import GradientMaskingCheck
from lightning_plugins.robustness.metrics import (
    AccuracyDisparity,
    AttackSuccessRate,
    BalancedRobustAccuracy,
    RobustAccuracy,
    RobustErrorDecomposition,
    TailRobustAccuracy,
    WorstClassRobustAccuracy,
    groups_by_count,
    halves_by_count,
)
from toys import toy_data

C = 4
TRIPLES = st.lists(st.tuples(*[st.integers(0, C - 1)] * 3), min_size=1, max_size=40)
ignore_empty_classes = pytest.mark.filterwarnings("ignore:.*leaves out classes:UserWarning")


def all_metrics() -> dict[str, object]:
    metrics = {
        f"robust_{average}_{clean}": RobustAccuracy(C, average=average, require_clean=clean)
        for average in ("micro", "macro", "none")
        for clean in (True, False)
    }
    metrics |= {f"attack_{average}": AttackSuccessRate(C, average=average) for average in ("micro", "macro", "none")}
    metrics |= {f"error_{average}": RobustErrorDecomposition(C, average=average) for average in ("micro", "none")}
    return metrics | {
        "balanced": BalancedRobustAccuracy(C),
        "worst": WorstClassRobustAccuracy(C),
        "tail": TailRobustAccuracy(C, {"head": [0], "tail": [2, 3]}),
        "range": AccuracyDisparity(C),
        "std": AccuracyDisparity(C, "std"),
        "head_tail": AccuracyDisparity(C, "head_tail", head=[0, 1], tail=[3]),
    }


def outcomes(n: int = 300, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % C
    right = torch.rand(2, n, generator=generator) < torch.tensor([[0.9], [0.5]])
    clean, attacked = torch.where(right, target, (target + 1) % C)
    return clean, attacked, target


def plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value.tolist()


# --- the accuracy family -----------------------------------------------------------------------------------------


@ignore_empty_classes
@settings(max_examples=25)
@given(TRIPLES)
def test_against_a_loop_over_samples(triples):
    clean, attacked, target = torch.tensor(triples).T
    rate = {}
    for c in range(C):
        rows = [(a == c, b == c) for a, b, y in triples if y == c]
        if rows:
            rate[c] = [sum(r) / len(rows) for r in (*zip(*rows, strict=True), [a and b for a, b in rows])]
    both = [a == y == b for a, b, y in triples]
    values = {name: metric(clean, attacked, target) for name, metric in all_metrics().items()}
    robust = {c: r[2] for c, r in rate.items()}

    assert values["robust_micro_True"].item() == pytest.approx(sum(both) / len(both))
    assert values["robust_micro_False"].item() == pytest.approx(sum(b == y for _, b, y in triples) / len(triples))
    assert values["robust_none_False"].tolist() == pytest.approx(
        [rate.get(c, [math.nan] * 3)[1] for c in range(C)], nan_ok=True
    )
    assert values["balanced"].item() == pytest.approx(sum(robust.values()) / len(robust))
    assert values["worst"].item() == pytest.approx(min(robust.values()))
    tail = [robust[c] for c in (2, 3) if c in robust]
    assert values["tail"]["tail"].item() == pytest.approx(sum(tail) / len(tail) if tail else math.nan, nan_ok=True)
    assert values["range"]["robust"].item() == pytest.approx(max(robust.values()) - min(robust.values()))
    mean = sum(robust.values()) / len(robust)
    spread = math.sqrt(sum((r - mean) ** 2 for r in robust.values()) / len(robust))
    assert values["std"]["robust"].item() == pytest.approx(spread, abs=1e-6)
    clean_right = sum(a == y for a, _, y in triples)
    expected = 1 - sum(both) / clean_right if clean_right else math.nan
    assert values["attack_micro"].item() == pytest.approx(expected, nan_ok=True, abs=1e-6)


@ignore_empty_classes
@settings(max_examples=25)
@given(TRIPLES)
def test_identities(triples):
    clean, attacked, target = torch.tensor(triples).T
    values = {name: metric(clean, attacked, target) for name, metric in all_metrics().items()}
    for average in ("micro", "none"):
        error = values[f"error_{average}"]
        torch.testing.assert_close(error["natural"] + error["boundary"], error["robust"], equal_nan=True)
        torch.testing.assert_close(1 - error["robust"], values[f"robust_{average}_True"], equal_nan=True)
    assert values["robust_micro_True"] <= (clean == target).float().mean() + 1e-6
    assert values["robust_micro_True"] <= values["robust_micro_False"]
    per_class = values["robust_none_True"]
    assert values["worst"] <= values["robust_macro_True"] + 1e-6
    assert values["robust_macro_True"] <= per_class[~per_class.isnan()].max() + 1e-6
    assert values["balanced"] == values["robust_macro_True"]


def test_macro_is_micro_on_a_balanced_test_set():
    batch = outcomes(200)
    assert RobustAccuracy(C)(*batch) == pytest.approx(BalancedRobustAccuracy(C)(*batch).item())


def test_without_an_attack_robust_accuracy_is_clean_accuracy():
    clean, _, target = outcomes()
    assert RobustAccuracy(C)(clean, clean, target) == (clean == target).float().mean()
    assert AttackSuccessRate(C)(clean, clean, target) == 0
    assert AccuracyDisparity(C)(clean, clean, target)["clean"] == AccuracyDisparity(C)(clean, clean, target)["robust"]


@pytest.mark.parametrize("name", list(all_metrics()))
def test_two_objects_merge_into_one_pass(name):
    batch = outcomes()
    whole, first, second = (all_metrics()[name] for _ in range(3))
    whole.update(*batch)
    first.update(*(part[:7] for part in batch))
    first.update(*(part[7:90] for part in batch))
    second.update(*(part[90:] for part in batch))
    first.merge_state(second)
    assert plain(first.compute()) == plain(whole.compute())


def reduced(first, second):
    """Return what ``first`` computes when another process holds ``second``."""
    theirs = iter([getattr(second, name) for name in second._reductions])
    first.dist_sync_fn = lambda tensor, group=None: [tensor, next(theirs)]
    first.distributed_available_fn = lambda: True
    return first.compute()


@pytest.mark.parametrize("name", ["robust_none_True", "tail", "error_none", "std"])
def test_two_processes_reduce_to_one_pass(name):
    batch = outcomes()
    whole, first, second = (all_metrics()[name] for _ in range(3))
    whole.update(*batch)
    first.update(*(part[:50] for part in batch))
    second.update(*(part[50:] for part in batch))
    assert plain(reduced(first, second)) == plain(whole.compute())


@pytest.mark.parametrize("name", list(all_metrics()))
def test_inference_mode_and_reset(name):
    batch = outcomes()
    fresh, metric = all_metrics()[name], all_metrics()[name]
    with torch.inference_mode():
        metric.update(*batch)
        metric.reset()
        metric.update(*(part.clone() for part in batch))
    metric.update(*batch)
    fresh.update(*batch)
    assert plain(metric.compute()) == plain(fresh.compute())  # twice the same batch, all rates equal


def test_counts_are_exact_integers():
    metric = RobustAccuracy(C)
    metric.update(*outcomes(100))
    for name in ("total", "clean", "attacked", "both"):
        state = getattr(metric, name)
        assert state.dtype == torch.long
        assert state.shape == (C,)
    metric.total += 2**40
    metric.total += 1
    assert (metric.total - 2**40).sum() == 104


def test_logits_and_classes_count_the_same():
    clean, attacked, target = outcomes()
    scores = [F.one_hot(pred, C).to(dtype) for pred, dtype in ((clean, torch.bfloat16), (attacked, torch.float32))]
    assert RobustAccuracy(C)(*scores, target) == RobustAccuracy(C)(clean, attacked, target)
    assert RobustAccuracy(C)(scores[0], attacked, target.int()) == RobustAccuracy(C)(clean, attacked, target)


def test_one_collection_keeps_the_counts_once():
    collection = MetricCollection(all_metrics())
    collection.update(*outcomes())
    assert len(collection.compute_groups) == 1
    collection.update(*outcomes(seed=1))
    alone = WorstClassRobustAccuracy(C)
    alone.update(*outcomes())
    alone.update(*outcomes(seed=1))
    assert collection.compute()["worst"] == alone.compute()


@pytest.mark.parametrize("name", ["robust_macro_True", "robust_none_True", "balanced", "worst", "tail", "range", "std"])
def test_an_empty_class_is_left_out_with_a_warning_and_never_0(name):
    clean, attacked, target = (part[part_target < 3] for part, part_target in [(p, outcomes()[2]) for p in outcomes()])
    metric = all_metrics()[name]
    metric.update(clean, attacked, target)
    with pytest.warns(UserWarning, match=r"leaves out classes without samples: \[3\]"):
        value = metric.compute()
    rates = torch.stack([(clean == target)[target == c] & (attacked == target)[target == c] for c in range(3)])
    rates = rates.float().mean(1)
    expected = {
        "robust_macro_True": rates.mean(),
        "balanced": rates.mean(),
        "worst": rates.min(),
        "robust_none_True": torch.cat([rates, torch.tensor([math.nan])]),
        "tail": rates[2],
        "range": rates.max() - rates.min(),
        "std": rates.std(correction=0),
    }[name]
    value = value.get("tail", value.get("robust")) if isinstance(value, dict) else value
    torch.testing.assert_close(value, expected, equal_nan=True)


def test_a_class_without_right_clean_predictions_is_left_out_of_the_success_rate():
    metric = AttackSuccessRate(2, average="macro")
    metric.update(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
    with pytest.warns(UserWarning, match=r"classes without right clean predictions: \[1\]"):
        assert metric.compute() == 0.5


@ignore_empty_classes
@pytest.mark.parametrize("name", list(all_metrics()))
def test_without_samples_everything_is_nan(name):
    metric = all_metrics()[name]
    metric.update(torch.empty(0, C), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    value = metric.compute()
    for part in value.values() if isinstance(value, dict) else [value]:
        assert part.isnan().all()


def test_the_gap_compares_two_models():
    clean, attacked, target = outcomes()
    robust, standard = AccuracyDisparity(C), AccuracyDisparity(C)
    robust.update(clean, attacked, target)
    standard.update(target, target, target)
    assert robust.gap(standard) == robust.compute()
    assert standard.gap(robust)["clean"] == -robust.compute()["clean"]
    with pytest.raises(ValueError, match="the same arguments"):
        robust.gap(AccuracyDisparity(C, "std"))


def test_groups():
    counts = torch.tensor([3000, 1798, 1078, 646, 387, 232, 139, 83, 50, 10])
    groups = groups_by_count(counts)
    assert groups == {"many": tuple(range(7)), "medium": (7, 8), "few": (9,)}
    assert groups_by_count([50, 60]) == {"medium": (0, 1)}
    assert halves_by_count(counts)["tail"] == (5, 6, 7, 8, 9)
    assert halves_by_count([1, 9, 5]) == {"head": (1, 2), "tail": (0,)}
    TailRobustAccuracy(10, groups)
    with pytest.raises(ValueError, match="few must not be above many"):
        groups_by_count([1, 2], few=5, many=4)
    with pytest.raises(ValueError, match="at least 2 classes"):
        halves_by_count([1])


@pytest.mark.parametrize(
    ("clean", "attacked", "target", "error", "message"),
    [
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), torch.tensor([0]), ValueError, "must not hold NaN"),
        (torch.tensor([0]), torch.tensor([[0.0, math.nan]]), torch.tensor([0]), ValueError, "must not hold NaN"),
        (torch.tensor([0]), torch.tensor([0]), torch.tensor([2]), ValueError, r"lie in \[0, 2\).*drop ignored labels"),
        (torch.tensor([0]), torch.tensor([0]), torch.tensor([-1]), ValueError, r"lie in \[0, 2\).*drop ignored labels"),
        (torch.tensor([0.0]), torch.tensor([0]), torch.tensor([0]), TypeError, r"pred_clean .* pass logits \(N, C\)"),
        (torch.zeros(1, 3), torch.tensor([0]), torch.tensor([0]), ValueError, r"pred_clean must be logits \(1, 2\)"),
        (torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0]), ValueError, r"pred_adv must be .* classes \(1,\)"),
        (torch.tensor([0]), torch.tensor([0]), torch.tensor([[1, 0]]), ValueError, r"pass target.argmax\(1\)"),
        (torch.tensor([0]), torch.tensor([0]), torch.tensor([0.0]), ValueError, "integer classes"),
    ],
)
def test_wrong_input_is_refused(clean, attacked, target, error, message):
    metric = RobustAccuracy(2)
    with pytest.raises(error, match=message):
        metric.update(clean, attacked, target)
    assert metric.total.sum() == 0


@pytest.mark.parametrize(("problems", "message"), [([1, 0], "must not hold NaN"), ([0, 2], r"in 2 update\(s\)")])
def test_problems_counted_on_a_device_are_raised_when_computing(problems, message):
    metric = WorstClassRobustAccuracy(2)
    metric.update(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    metric.problems = torch.tensor(problems)
    with pytest.raises(ValueError, match=message):
        metric.compute()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RobustAccuracy(1), "num_classes must be at least 2, got 1"),
        (lambda: RobustAccuracy(2, average="weighted"), "average must be one of micro, macro, none"),
        (lambda: AttackSuccessRate(2, average="x"), "average must be one of"),
        (lambda: RobustErrorDecomposition(2, average="x"), "average must be one of"),
        (lambda: AccuracyDisparity(2, "max"), "mode must be one of range, std, head_tail"),
        (lambda: AccuracyDisparity(2, "head_tail"), "head and tail must be given"),
        (lambda: AccuracyDisparity(2, head=[0], tail=[1]), "head and tail must be given"),
        (lambda: AccuracyDisparity(2, head=[0]), "head and tail must be given"),
        (
            lambda: AccuracyDisparity(2, "head_tail", head=[0], tail=[2]),
            r"tail must name .* classes in \[0, 2\)",
        ),
        (lambda: TailRobustAccuracy(2, {}), "at least one group"),
        (lambda: TailRobustAccuracy(2, {"rare": []}), "group 'rare' must name different classes"),
        (lambda: TailRobustAccuracy(2, {"rare": [1, 1]}), "group 'rare' must name different classes"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- norms, margins, curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_perturbation_norms(p):
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.rand(2, 6, 3, 4, 4, generator=generator)
    norms = torch.linalg.vector_norm(((x + delta).double() - x.double()).flatten(1), p, dim=1)
    whole, first, second = (PerturbationNorm(p) for _ in range(3))
    whole.update(x, x + delta)
    with torch.inference_mode():
        first.update(x[:2], x[:2] + delta[:2])
    second.update(x[2:], x[2:] + delta[2:])
    second.update(x[:0], x[:0])
    first.merge_state(second)
    for metric in (whole, first):
        value = metric.compute()
        assert value["mean"].item() == pytest.approx(norms.mean().item())
        assert value["max"].item() == pytest.approx(norms.max().item())


@pytest.mark.parametrize(
    ("p", "dtype"),
    [(1, torch.float32), (2, torch.float32), (math.inf, torch.float32), (math.inf, torch.bfloat16)],
)
def test_a_perturbation_on_the_budget_passes_in_spite_of_rounding(p, dtype):
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.rand(2, 4, 3, 64, 64, generator=generator)
    delta = (delta - 0.5).sign() * 8 / 255
    eps = torch.linalg.vector_norm(delta.flatten(1).double(), p, dim=1).max().item()
    PerturbationNorm(p, eps=eps).update(x.to(dtype), (x.to(dtype).float() + delta).to(dtype))


def test_a_perturbation_above_the_budget_is_refused():
    x = torch.zeros(2, 3)
    metric = PerturbationNorm(eps=0.1)
    with pytest.raises(ValueError, match=r"at most eps=0.1, got 0.1001; project onto the budget"):
        metric.update(x, x + 0.1001)
    with pytest.raises(ValueError, match="must be finite"):
        metric.update(x, x + math.nan)
    metric.update(x, x + 0.1)
    metric.excess = torch.tensor(0.1, dtype=torch.float64)  # as found on another device or process
    with pytest.raises(ValueError, match="at most eps=0.1"):
        metric.compute()


@settings(max_examples=50)
@given(st.lists(st.one_of(st.just(0.0), st.just(math.inf), st.floats(0, 3, width=32)), min_size=1, max_size=30))
def test_minimal_perturbations_against_sorting(values):
    eps_hat = torch.tensor(values)
    metric = MinimalPerturbation(2.0, num_bins=64)
    computed = metric(eps_hat)
    budgets, accuracy = metric.curve()
    assert accuracy.tolist() == pytest.approx([(eps_hat > budget).float().mean().item() for budget in budgets])
    assert computed["auc"].item() == pytest.approx(sum(min(v, 2.0) for v in values) / len(values) / 2.0, abs=1e-6)
    fooled = sorted(values)[math.ceil(len(values) / 2) - 1]
    expected = math.inf if fooled > 2 else fooled
    assert computed["median"].item() == pytest.approx(expected, abs=2.0 / 64 + 1e-6)


def test_minimal_perturbations_merge_and_keep_their_limits():
    eps_hat = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    whole, first, second = (MinimalPerturbation(1.0) for _ in range(3))
    whole.update(eps_hat)
    with torch.inference_mode():
        first.update(eps_hat[:300])
    second.update(eps_hat[300:])
    first.merge_state(second)
    assert first.compute()["median"] == whole.compute()["median"]
    assert first.compute()["auc"] == pytest.approx(whole.compute()["auc"].item())
    assert whole.compute()["median"].item() == pytest.approx(eps_hat.median().item(), abs=1 / 256)
    assert MinimalPerturbation(1.0)(torch.zeros(3))["auc"] == 0
    assert all(value.isnan() for value in MinimalPerturbation(1.0)(torch.empty(0)).values())
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="use 0 for samples"):
            MinimalPerturbation(1.0).update(torch.tensor([bad]))


def test_margins_have_the_density_of_their_distribution():
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(200_000, generator=generator).abs()
    logits = torch.stack([5 + margins, torch.full_like(margins, 5.0), torch.full_like(margins, -1.0)], 1)
    metric, second = LogitMargin(10.0), LogitMargin(10.0)
    metric.update(logits[:1000])
    second.update(logits[1000:, [1, 2, 0]])  # whichever class is the largest
    metric.merge_state(second)
    value = metric.compute()
    assert value["mean"].item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)
    assert value["density_at_zero"].item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.05)
    centres, density = metric.density()
    assert (density * (centres[1] - centres[0])).sum().item() == pytest.approx(1.0)
    third = LogitMargin(20.0, rank=3)
    third.update(logits)
    assert third.compute()["mean"].item() == pytest.approx(6 + math.sqrt(2 / math.pi), rel=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_margins_refuse_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="logits must be finite"):
        LogitMargin().update(torch.tensor([[bad, 1.0]]))


def test_a_power_law_is_found_exactly():
    eps = torch.tensor([0.01, 0.02, 0.04, 0.08, 0.5])
    law = fit_power_law(eps, (3 * eps**1.2).clamp_max(1))
    assert (law.scale, law.exponent, law.r_squared, law.num_points) == pytest.approx((3, 1.2, 1, 4))
    assert math.isnan(fit_power_law([0.1, 0.2], [0.9, 1.0]).exponent)
    with pytest.raises(ValueError, match="leave out the budget 0"):
        fit_power_law([0.0, 0.1], [0.1, 0.2])


def linear_model(num_classes: int = 5, dimensions: int = 20, n: int = 2000):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_classes, dimensions, generator=generator)
    return weight, torch.randn(n, dimensions, generator=generator)


def test_error_of_a_random_linear_model_grows_linearly():
    weight, x = linear_model()
    logits = x @ weight.T
    eps_hat = linearised_minimal_eps(logits, weight.expand(len(x), *weight.shape))
    top = logits.argmax(1)
    grid = torch.logspace(-3.3, -1, 12)
    # The exact worst case of a linear model: robust iff no other class can be reached.
    own = weight[top]
    worst = (logits.gather(1, top[:, None]) - logits)[None] - grid[:, None, None] * (own[:, None] - weight).abs().sum(2)
    worst = worst.scatter(2, top.expand(len(grid), -1)[..., None], math.inf).amin(2)
    error = (worst <= 0).double().mean(1)
    assert error.tolist() == pytest.approx((eps_hat <= grid[:, None]).double().mean(1).tolist(), abs=1.5 / len(x))

    law = fit_power_law(grid, error)
    assert 0.9 < law.exponent < 1.15
    assert law.r_squared > 0.98
    metric = AdversarialPowerLaw(grid.tolist())
    attacked = torch.where(worst <= 0, (top + 1) % 5, top)
    for rows in torch.arange(len(x)).chunk(3):
        with torch.inference_mode():
            metric.update(logits[rows], attacked[:, rows], top[rows])
    assert metric.compute()["exponent"].item() == pytest.approx(law.exponent, rel=1e-6)
    one_hot = F.one_hot(attacked, 5).float()
    assert AdversarialPowerLaw(grid.tolist())(logits, one_hot, top)["scale"].item() == pytest.approx(law.scale)


def test_a_power_law_counts_rightly_classified_samples_only():
    metric = AdversarialPowerLaw((0.1, 0.2), error_range=(0.01, 1.0))
    metric.update(torch.tensor([0, 0, 1]), torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([0, 0, 0]))
    assert metric.errors().tolist() == [0.5, 1.0]
    fresh = AdversarialPowerLaw((0.1, 0.2))
    fresh.update(torch.tensor([1]), torch.tensor([[1], [1]]), torch.tensor([0]))
    assert fresh.compute()["num_points"] == 0
    assert fresh.compute()["exponent"].isnan()
    with pytest.raises(ValueError, match="must not hold NaN"):
        metric.update(torch.tensor([[math.nan, 0.0]]), torch.tensor([[0], [0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"pred_adv must be integer classes \(2, 1\)"):
        metric.update(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_the_linearised_budget_flips_a_linear_model(p):
    weight, x = linear_model(n=50)
    weight, x = weight.double(), x.double()
    logits = x @ weight.T
    eps = linearised_minimal_eps(logits, weight.expand(len(x), *weight.shape), p=p)
    dual = {1: math.inf, 2: 2.0, 3: 1.5, math.inf: 1.0}[p]
    for row, radius, top in zip(logits, eps, logits.argmax(1), strict=True):
        others = [k for k in range(5) if k != top]
        least = min(((row[top] - row[k]) / (weight[top] - weight[k]).norm(dual)).item() for k in others)
        assert radius.item() == pytest.approx(least)
    flat = linearised_minimal_eps(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2, 2, 3))
    assert flat.tolist() == [math.inf, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerturbationNorm(0.5), "p must be at least 1"),
        (lambda: PerturbationNorm(eps=-1.0), "eps must be at least 0"),
        (lambda: PerturbationNorm(tol=math.nan), "tol must be at least 0"),
        (lambda: PerturbationNorm().update(torch.zeros(2, 3), torch.zeros(2, 4)), "of the same shape"),
        (lambda: MinimalPerturbation(0.0), "max_eps must be above 0"),
        (lambda: MinimalPerturbation(1.0, num_bins=0), "num_bins must be at least 1"),
        (lambda: MinimalPerturbation(1.0).update(torch.zeros(2, 2)), "one norm for each sample"),
        (lambda: LogitMargin(math.inf), "max_margin must be above 0 and finite"),
        (lambda: LogitMargin(num_bins=5), "num_bins must be at least 16"),
        (lambda: LogitMargin(rank=1), "rank must be at least 2"),
        (lambda: LogitMargin(rank=3).update(torch.zeros(4, 2)), "C at least rank=3"),
        (lambda: AdversarialPowerLaw([0.1]), "at least two different budgets"),
        (lambda: AdversarialPowerLaw([0.1, 0.0]), "budgets above 0"),
        (lambda: AdversarialPowerLaw([0.1, 0.2], error_range=(0.3, 0.1)), "error_range must be"),
        (lambda: fit_power_law([0.1], [0.1, 0.2]), "must both be"),
        (lambda: linearised_minimal_eps(torch.zeros(2, 3), torch.zeros(3, 3, 4)), "jacobian"),
        (lambda: linearised_minimal_eps(torch.zeros(2, 3), torch.zeros(2, 3, 4), p=0.5), "p must be at least 1"),
    ],
)
def test_wrong_arguments_of_geometry_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["norm", "minimal", "margin", "law"])
def test_geometry_of_two_processes_reduces_to_one_pass(name):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(40, 3, generator=generator)
    target = torch.arange(40) % 3
    make, arguments = {
        "norm": (lambda: PerturbationNorm(2), lambda rows: (values[rows], values[rows] ** 2)),
        "minimal": (lambda: MinimalPerturbation(1.0), lambda rows: (values[rows, 0],)),
        "margin": (lambda: LogitMargin(1.0), lambda rows: (values[rows],)),
        "law": (
            lambda: AdversarialPowerLaw((0.1, 0.2), error_range=(0.01, 1.0)),
            lambda rows: (
                target[rows],
                (target[rows] + (torch.tensor([[0.7], [0.4]]) < values[rows, :2].T)) % 3,
                target[rows],
            ),
        ),
    }[name]
    whole, first, second = make(), make(), make()
    whole.update(*arguments(slice(None)))
    first.update(*arguments(slice(0, 15)))
    second.update(*arguments(slice(15, None)))
    expected = plain(whole.compute())
    assert plain(reduced(first, second)) == {key: pytest.approx(value) for key, value in expected.items()}


# --- masked gradients ---------------------------------------------------------------------------------------------

HONEST = {
    "fgsm": 0.652,
    "pgd": 0.629,
    "pgd_restarts": 0.625,
    "targeted": 0.613,
    "black_box": 0.617,
    "by_eps": {0.05: 0.7, 0.1: 0.629, 0.5: 0.0},
    "by_steps": {1: 0.652, 20: 0.629, 100: 0.629},
    "zero_gradients": 0.0,
}


def test_an_honest_model_may_be_called_robust():
    verdict = GradientMaskingCheck()(**HONEST)
    assert not verdict.masked
    assert verdict.conclusive
    assert verdict.not_checked == ()
    assert verdict.robust_accuracy == verdict.upper_bound == 0.613
    assert str(verdict) == "no symptom of masked gradients"
    assert not GradientMaskingCheck(tolerance=0.002)(**HONEST).masked


@pytest.mark.parametrize(
    ("change", "reason", "sentence"),
    [
        ({"fgsm": 0.5}, "fgsm_beats_pgd", "0.500 under FGSM is below 0.629 under PGD"),
        ({"pgd_restarts": 0.5}, "restarts_beat_pgd", "from 0.629 to 0.500"),
        ({"black_box": 0.5}, "black_box_beats_white_box", "0.500 without gradients is below 0.613"),
        ({"by_eps": {0.1: 0.6, 0.5: 0.1}}, "survives_large_eps", "0.100 is left at eps=0.5"),
        (
            {"by_eps": {0.1: 0.6, 0.2: 0.7, 0.5: 0.0}},
            "accuracy_rises_with_eps",
            "0.600 at eps=0.1 to 0.700 at 0.2",
        ),
        ({"by_steps": {20: 0.7, 1: 0.6}}, "accuracy_rises_with_steps", "from 0.600 at steps=1 to 0.700 at 20"),
        ({"zero_gradients": 0.2}, "zero_gradients", "20.0% of the samples"),
    ],
)
def test_each_symptom_is_named_and_refused(change, reason, sentence):
    verdict = GradientMaskingCheck()(**(HONEST | change))
    assert list(verdict.reasons) == [reason]
    assert sentence in verdict.reasons[reason]
    with pytest.raises(ValueError, match=f"no robust accuracy to report: {reason}"):
        _ = verdict.robust_accuracy


def test_what_was_not_looked_at_is_not_taken_for_granted():
    verdict = GradientMaskingCheck()(fgsm=0.6, pgd=0.5)
    assert not verdict.masked
    assert not verdict.conclusive
    assert set(verdict.not_checked) >= {"black_box_beats_white_box", "survives_large_eps", "zero_gradients"}
    with pytest.raises(ValueError, match="not checked: .*black_box.*use upper_bound"):
        _ = verdict.robust_accuracy
    assert verdict.upper_bound == 0.5
    assert "survives_large_eps" in GradientMaskingCheck()(**(HONEST | {"by_eps": {0.1: 0.6, 0.4: 0.1}})).not_checked


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GradientMaskingCheck(tolerance=2), r"tolerance must lie in \[0, 1\]"),
        (lambda: GradientMaskingCheck()(fgsm=50, pgd=0.4), "fgsm .* not percent"),
        (lambda: GradientMaskingCheck()(fgsm=0.5, pgd=math.nan), "pgd .*must be a number"),
        (lambda: GradientMaskingCheck()(fgsm=0.5, pgd=0.4, by_eps={0.0: 1.0}), "by_eps must have keys above 0"),
        (lambda: GradientMaskingCheck()(fgsm=0.5, pgd=0.4, by_steps={0: 1.0}), "by_steps must have keys of at least 1"),
        (lambda: GradientMaskingCheck()(fgsm=0.5, pgd=0.4, by_eps={0.1: 2.0}), r"by_eps\[0.1\]"),
    ],
)
def test_wrong_measurements_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def attacked_inputs(model, x, y, eps, *, steps):
    delta, zero = torch.zeros_like(x), 0.0
    for step in range(steps):
        moved = (x + delta).requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(moved), y, reduction="sum"), moved)
        if step == 0:
            zero = (grad == 0).all(1).float().mean().item()
        delta = (delta + (eps if steps == 1 else 2.5 * eps / steps) * grad.sign()).clamp(-eps, eps)
    return x + delta, zero


def test_the_canary_scaled_logits_are_called_masked():
    x, y = toy_data(256).tensors
    weight = torch.linalg.lstsq(torch.cat([x, torch.ones(256, 1)], 1), F.one_hot(y, 3).float()).solution

    def net(scale):
        return lambda inputs: scale * (torch.cat([inputs, torch.ones(len(inputs), 1)], 1) @ weight)

    def verdict(scale):
        model = net(scale)

        def accuracy(eps, steps):
            moved, zero = attacked_inputs(model, x, y, eps, steps=steps)
            metric = RobustAccuracy(3)
            return metric(model(x), model(moved), y).item(), zero

        transferred = attacked_inputs(net(1.0), x, y, 0.3, steps=20)[0]  # needs no gradient of the model attacked
        pgd, zero = accuracy(0.3, 20)
        return GradientMaskingCheck()(
            fgsm=accuracy(0.3, 1)[0],
            pgd=pgd,
            black_box=RobustAccuracy(3)(model(x), model(transferred), y).item(),
            by_eps={eps: accuracy(eps, 20)[0] for eps in (0.1, 0.3, 5.0)},
            zero_gradients=zero,
        )

    assert not verdict(1.0).masked
    canary = verdict(1e4)
    assert set(canary.reasons) >= {"black_box_beats_white_box", "survives_large_eps", "zero_gradients"}


def test_nothing_here_warns_on_full_classes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in all_metrics().values():
            metric(*outcomes())
