"""Calibration measures against values by hand, slow references, and each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_plugins.calibration.binned import (
    average_calibration_error,
    classwise_ece,
    mce,
    root_mean_square_calibration_error,
)
from lightning_plugins.calibration.bootstrap import bootstrap_interval, calibration_report
from lightning_plugins.calibration.groups import group_ece
from lightning_plugins.calibration.kernel_density import ece_kde
from lightning_plugins.calibration.metrics import _edges, bin_index, ece
from lightning_plugins.calibration.ranked import aurc, debiased_ece, eaurc, equal_mass_ece, ks_error, sweep_ece
from lightning_plugins.calibration.scoring import (
    brier,
    brier_decomposition,
    calibration_refinement_nll,
    l1_to_posterior,
    nll,
)
from lightning_plugins.calibration.smooth import kde_ece, smooth_ece
from lightning_plugins.calibration.temperature import fit_temperature

TOP_LABEL = [
    ece,
    equal_mass_ece,
    debiased_ece,
    sweep_ece,
    ks_error,
    smooth_ece,
    kde_ece,
    mce,
    average_calibration_error,
    root_mean_square_calibration_error,
]
ALL = [*TOP_LABEL, classwise_ece, aurc, eaurc, nll, brier]


def predictions(n: int, num_classes: int, seed: int = 0, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (sharpness * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(1)


def overconfident(n: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    probs, labels = predictions(n, num_classes, seed)
    return (probs.log() * 2).softmax(1), labels


CONSTANT = torch.tensor([[0.9, 0.1]]).repeat(10, 1), torch.tensor([0] * 6 + [1] * 4)


@pytest.mark.parametrize("measure", [m for m in TOP_LABEL if m is not debiased_ece])
def test_one_confidence_by_hand(measure):
    probs, labels = CONSTANT
    assert measure(probs, labels).item() == pytest.approx(0.3, abs=2e-4)
    assert measure(probs, labels.flip(0)).item() == pytest.approx(0.3, abs=2e-4)


@pytest.mark.parametrize("measure", ALL)
def test_always_right_and_certain_is_zero(measure):
    # The kernel of kde_ece is no narrower than 0.001.
    tolerance = 1e-3 if measure is kde_ece else 1e-7
    assert measure(torch.eye(3), torch.arange(3)).item() == pytest.approx(0, abs=tolerance)


def test_constant_base_rate():
    probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).repeat(10, 1)
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    for measure in (ece, equal_mass_ece, ks_error, smooth_ece, classwise_ece, sweep_ece):
        assert measure(probs, labels).item() == pytest.approx(0, abs=1e-7)
    parts = brier_decomposition(probs, labels)
    assert brier(probs, labels).item() == pytest.approx(0.25 + 0.21 + 0.16)
    assert parts.uncertainty.item() == pytest.approx(0.62)
    assert max(abs(parts.resolution.item()), abs(parts.reliability.item())) < 1e-15


@pytest.mark.parametrize("measure", [ece, equal_mass_ece, ks_error, smooth_ece, classwise_ece])
def test_falls_with_the_root_of_the_samples_for_a_calibrated_sampler(measure):
    few, many = (sum(measure(*predictions(n, 10, seed)).item() for seed in range(4)) for n in (500, 50_000))
    assert 4 < few / many < 20


def test_debiasing_removes_part_of_the_floor():
    for seed in range(5):
        probs, labels = predictions(2000, 10, seed)
        assert debiased_ece(probs, labels) < equal_mass_ece(probs, labels)
    plain = root_mean_square_calibration_error(*predictions(2000, 10))
    assert root_mean_square_calibration_error(*predictions(2000, 10), debias=True) < plain


@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), num_classes=st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_order_and_precision_do_not_matter(seed, n, num_classes):
    probs, labels = predictions(n, num_classes, seed)
    probs = (probs * 8).round().add(0.5)  # many ties
    probs = probs / probs.sum(1, keepdim=True)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for measure in ALL:
        value = measure(probs, labels).item()
        assert measure(probs[order], labels[order]).item() == pytest.approx(value, abs=1e-6), measure
        assert value >= -0.5
    assert ks_error(probs, labels) <= equal_mass_ece(probs, labels, num_bins=n) + 1e-6
    one_bin = ece(probs, labels, num_bins=1)
    assert one_bin.item() == pytest.approx(equal_mass_ece(probs, labels, num_bins=1).item(), abs=1e-6)
    assert one_bin <= ks_error(probs, labels) + 1e-6
    assert -1e-6 <= eaurc(probs, labels) <= aurc(probs, labels)


@pytest.mark.parametrize("measure", ALL)
def test_kinds_of_input_and_precisions_agree(measure):
    probs, labels = overconfident(400, 4)
    expected = measure(probs, labels).item()
    assert measure(probs.log() + 3, labels, input="logits").item() == pytest.approx(expected, abs=1e-6)
    assert measure(probs.log(), labels, input="log_probs").item() == pytest.approx(expected, abs=1e-6)
    assert measure(probs.float(), labels).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("measure", ALL)
def test_without_samples_it_is_nan(measure):
    assert measure(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).isnan()


@pytest.mark.parametrize("measure", ALL)
def test_wrong_scores_and_labels_are_refused(measure):
    with pytest.raises(ValueError, match='pass input="logits"'):
        measure(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="drop the rows of ignored"):
        measure(torch.tensor([[0.5, 0.5]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="drop those rows"):
        measure(torch.tensor([[math.nan, 0.5]]), torch.tensor([0]), input="logits")
    with pytest.raises(ValueError, match="input must be one of"):
        measure(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), input="auto")


@pytest.mark.parametrize("num_bins", [1, 7, 15, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bin_index_is_a_search(num_bins, dtype):
    edges = (torch.arange(num_bins + 1, dtype=torch.float64) / num_bins).to(dtype)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(1000, dtype=dtype, generator=generator)
    values = torch.cat([edges, torch.nextafter(edges, edges + 1), torch.nextafter(edges, edges - 1), draws])
    inner = _edges(num_bins, dtype, values.device)[1:-1]
    assert torch.equal(bin_index(values, num_bins), torch.bucketize(values, inner))


def test_equal_mass_and_debiased_are_their_loops():
    probs, labels = overconfident(103, 4)
    confidence, predicted = probs.max(1)
    order = confidence.argsort()
    value = reference = 0.0
    for c, a in zip(
        confidence[order].tensor_split(6), (predicted == labels)[order].double().tensor_split(6), strict=True
    ):
        gap = (a.mean() - c.mean()).item()
        value += abs(gap) * len(c) / 103
        deviation = math.sqrt(a.mean().item() * (1 - a.mean().item()) / len(c))
        draws = gap + deviation * torch.distributions.Normal(0.0, 1.0).icdf(
            (torch.arange(100_000) + 0.5).double() / 1e5
        )
        reference += (2 * abs(gap) - draws.abs().mean().item()) * len(c) / 103
    assert equal_mass_ece(probs, labels, num_bins=6).item() == pytest.approx(value, abs=1e-6)
    assert debiased_ece(probs, labels, num_bins=6).item() == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_sweep_is_its_loop(seed):
    probs, labels = overconfident(60, 3, seed)
    confidence, predicted = probs.max(1)
    right = (predicted == labels)[confidence.argsort()].double()
    num_bins = 1
    while num_bins < 60:
        means = [part.mean().item() for part in right.tensor_split(num_bins + 1)]
        if any(b < a - 1e-9 for a, b in zip(means, means[1:], strict=False)):
            break
        num_bins += 1
    expected = equal_mass_ece(probs, labels, num_bins=num_bins).item()
    assert sweep_ece(probs, labels).item() == pytest.approx(expected, abs=1e-7)


def test_risk_coverage_is_its_loop():
    probs, labels = overconfident(50, 3)
    confidence, predicted = probs.max(1)
    errors = (predicted != labels)[confidence.argsort(descending=True)].double().tolist()
    risks = [sum(errors[:k]) / k for k in range(1, 51)]
    ideal = [sum(sorted(errors)[:k]) / k for k in range(1, 51)]
    assert aurc(probs, labels).item() == pytest.approx(sum(risks) / 50, abs=1e-6)
    assert eaurc(probs, labels).item() == pytest.approx((sum(risks) - sum(ideal)) / 50, abs=1e-6)


@pytest.mark.parametrize("width", [0.02, 0.2])
def test_smooth_ece_is_its_integral(width):
    probs, labels = overconfident(500, 4)
    confidence, predicted = probs.max(1)
    residual = confidence - (predicted == labels).double()
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    kernel = sum(
        torch.exp(-0.5 * ((grid - image) / width) ** 2)
        for k in range(-3, 4)
        for image in (confidence + 2 * k, -confidence + 2 * k)
    ) / (width * math.sqrt(2 * math.pi))
    expected = torch.trapezoid((kernel @ residual / 500).abs(), dx=1 / 2000).item()
    assert smooth_ece(probs, labels, width=width).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("measure", [smooth_ece, kde_ece, ks_error, equal_mass_ece])
def test_samples_at_the_end_of_the_interval_count_in_full(measure):
    assert measure(torch.eye(2).repeat(5, 1), torch.zeros(10, dtype=torch.long)).item() == pytest.approx(0.5, abs=2e-3)


def test_smooth_ece_is_near_its_own_width():
    probs, labels = overconfident(2000, 4)
    value = smooth_ece(probs, labels).item()
    assert smooth_ece(probs, labels, width=value).item() == pytest.approx(value, abs=2e-3)


def test_kde_ece_is_its_integral():
    probs, labels = overconfident(300, 3)
    confidence, predicted = probs.max(1)
    right = predicted == labels
    reach = 3 * confidence[right].std(correction=0).item() * 600**-0.2
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]

    def density(points: Tensor) -> Tensor:
        images = torch.cat([points, -points, 2 - points])
        return (35 / 32 / reach * (1 - ((grid - images) / reach) ** 2).clamp_min(0) ** 3).sum(1) / len(points)

    everything, of_right = density(confidence), density(confidence[right])
    accuracy = (right.double().mean() * of_right / everything.clamp_min(1e-300)).clamp_max(1)
    for power in (1.0, 2.0):
        expected = torch.trapezoid((grid.squeeze() - accuracy).abs() ** power * everything, dx=1 / 4000).item()
        assert kde_ece(probs, labels, power=power).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("threshold", [None, 0.25])
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_classwise_is_its_loop(threshold, binning):
    probs, labels = overconfident(301, 4)
    total = 0.0
    for j in range(4):
        p, y = probs[:, j], (labels == j).double()
        if threshold is not None:
            p, y = p[probs[:, j] > threshold], y[probs[:, j] > threshold]
        if binning == "mass":
            order = p.argsort()
            parts = zip(p[order].tensor_split(5), y[order].tensor_split(5), strict=True)
        else:
            index = [(p > b / 5) & (p <= (b + 1) / 5) for b in range(5)]
            parts = ((p[i], y[i]) for i in index)
        total += sum(abs(a.sum().item() - b.sum().item()) for a, b in parts) / len(p)
    options = {"threshold": threshold, "binning": binning, "num_bins": 5}
    assert classwise_ece(probs, labels, reduction="sum", **options).item() == pytest.approx(total, abs=1e-6)
    assert classwise_ece(probs, labels, **options).item() == pytest.approx(total / 4, abs=1e-6)


def test_the_other_binned_measures_by_hand():
    probs, labels = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]]), torch.tensor([0, 0, 1, 1, 1])
    assert average_calibration_error(probs, labels).item() == pytest.approx(0.5)
    assert mce(probs, labels).item() == pytest.approx(0.6)
    assert mce(probs, labels, min_count=2).item() == pytest.approx(0.4)
    assert mce(probs, labels, min_count=5).isnan()
    mean_square = (4 * 0.16 + 0.36) / 5
    assert root_mean_square_calibration_error(probs, labels).item() == pytest.approx(math.sqrt(mean_square))
    debiased = (4 * (0.16 - 0.25 / 3) + 0.36) / 5
    value = root_mean_square_calibration_error(probs, labels, debias=True)
    assert value.item() == pytest.approx(math.sqrt(debiased))


@pytest.mark.parametrize("num_bins", [1, 3, 15])
def test_brier_identity_is_exact(num_bins):
    probs, labels = overconfident(500, 5)
    one_hot = torch.nn.functional.one_hot(labels, 5)
    expected = (probs - one_hot).square().sum(1).mean().item()
    parts = brier_decomposition(probs, labels, num_bins=num_bins)
    assert parts.brier.item() == pytest.approx(expected, abs=1e-12)
    three = parts.reliability - parts.resolution + parts.uncertainty
    assert abs(three.item() - expected) > 1e-5
    assert brier(probs, labels).item() == pytest.approx(expected, rel=1e-6)


def test_log_likelihood_of_large_logits_is_exact():
    assert nll(torch.tensor([[0.0, 300.0]]), torch.tensor([0]), input="logits").item() == 300
    assert nll(torch.tensor([[0.0, 1.0]]), torch.tensor([0])).item() == pytest.approx(87.34, abs=0.01)


def test_refinement_is_what_a_temperature_leaves():
    probs, labels = overconfident(3000, 4)
    logits = probs.log()
    parts = calibration_refinement_nll(logits, labels, input="logits")
    after = nll(logits / fit_temperature(logits, labels), labels, input="logits")
    assert parts.refinement.item() == pytest.approx(after.item(), abs=1e-6)
    assert (parts.calibration + parts.refinement).item() == pytest.approx(nll(probs, labels).item(), abs=1e-6)
    folded = calibration_refinement_nll(probs, labels, num_folds=5)
    assert folded.refinement.item() == pytest.approx(parts.refinement.item(), abs=1e-3)
    assert folded.refinement >= parts.refinement
    with pytest.raises(ValueError, match="num_folds must lie in"):
        calibration_refinement_nll(probs, labels, num_folds=1)


def test_groups_show_what_the_whole_hides():
    probs = torch.tensor([[0.75, 0.25]]).repeat(8, 1)
    labels, groups = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), torch.tensor([0] * 4 + [2] * 4)
    assert ece(probs, labels) == 0
    by_group = group_ece(probs, labels, groups, reduction="none")
    assert by_group[[0, 2]].tolist() == [0.25, 0.25]
    assert by_group[1].isnan()
    assert group_ece(probs, labels, groups, reduction="mean") == 0.25
    one = group_ece(*overconfident(200, 4), torch.zeros(200, dtype=torch.long))
    assert one.item() == pytest.approx(ece(*overconfident(200, 4)).item())
    with pytest.raises(ValueError, match="groups must lie in"):
        group_ece(probs, labels, groups, num_groups=2)


def test_distance_to_the_posterior():
    assert l1_to_posterior(torch.eye(2), torch.eye(2).flip(0)).item() == 2
    with pytest.raises(ValueError, match="shape of probs"):
        l1_to_posterior(torch.eye(2), torch.eye(3))


@pytest.mark.parametrize("kind", ["canonical", "top_label"])
def test_kernel_density_is_its_loop(kind):
    probs, labels = predictions(12, 3)
    h = 0.2
    points, targets = probs, torch.nn.functional.one_hot(labels, 3).double()
    if kind == "top_label":
        confidence, predicted = probs.max(1)
        points = torch.stack([confidence, 1 - confidence], 1)
        targets = (predicted == labels).double()[:, None]
    total = 0.0
    for j in range(12):
        weights = [
            0.0 if i == j else torch.distributions.Dirichlet(points[i] / h + 1).log_prob(points[j]).exp().item()
            for i in range(12)
        ]
        q = sum(w * t for w, t in zip(weights, targets, strict=True)) / sum(weights)
        total += (q - points[j, : len(q)]).abs().sum().item() / 12
    assert ece_kde(probs, labels, kind=kind, bandwidth=h).item() == pytest.approx(total, abs=1e-9)


def test_kernel_density_gradient_bandwidth_and_sample():
    logits, labels = predictions(8, 3)[0].log(), predictions(8, 3)[1]
    for kind in ("canonical", "top_label"):
        assert torch.autograd.gradcheck(
            lambda z, kind=kind: ece_kde(z, labels, kind=kind, bandwidth=0.3, power=2, input="logits"),
            logits.clone().requires_grad_(),
        )
    probs, labels = overconfident(600, 3)
    few = {"kind": "top_label", "bandwidth": 0.02}
    assert ece_kde(probs, labels, **few) > 2 * ece_kde(*predictions(600, 3), **few)
    assert 0 < ece_kde(probs, labels) < 1
    assert ece_kde(probs, labels, max_samples=100) == ece_kde(probs, labels, max_samples=100)
    with pytest.raises(ValueError, match="use larger batches"):
        ece_kde(probs[:1], labels[:1])


def test_report_agrees_with_the_functions():
    probs, labels = overconfident(500, 4)
    report = calibration_report(probs, labels, num_bootstrap=60)
    for measure in (nll, brier, ece, equal_mass_ece, classwise_ece, ks_error, smooth_ece, debiased_ece):
        estimate = report[measure.__name__]
        assert estimate.value == pytest.approx(measure(probs, labels).item(), abs=1e-6)
        assert estimate.low < estimate.high
    slow = bootstrap_interval(equal_mass_ece, probs, labels, num_samples=60)
    assert report["equal_mass_ece"].low == pytest.approx(slow.low, abs=0.02)
    assert report["equal_mass_ece"].high == pytest.approx(slow.high, abs=0.02)
    assert calibration_report(probs, labels, num_bootstrap=0)["ece"].low is None
    assert calibration_report(probs, labels, seed=1, num_bootstrap=5) == calibration_report(
        probs, labels, seed=1, num_bootstrap=5
    )


def test_interval_of_a_mean_has_the_width_theory_gives():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, 1, generator=generator)
    state = torch.random.get_rng_state()
    estimate = bootstrap_interval(lambda v, _: v.mean(), values, torch.zeros(1000), num_samples=1000)
    assert torch.equal(state, torch.random.get_rng_state())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / math.sqrt(1000), rel=0.1)
    with pytest.raises(ValueError, match="0.95 is customary"):
        bootstrap_interval(ece, *CONSTANT, level=95)
