"""Histogram, Bayesian, scaled and top-label binning."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_plugins.calibration import TemperatureScaling
from lightning_plugins.calibration._scores import replace_confidence
from lightning_plugins.calibration.binning import (
    BayesianBinning,
    HistogramBinning,
    PlattBinning,
    TopLabelHistogramBinning,
    _equal_mass_edges,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*raised the negative log-likelihood")


def sample(n: int, num_classes: int, seed: int = 0, factor: float = 2.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return factor * logits, labels


def test_equal_mass_edges():
    scores = torch.tensor([0.9, 0.1, 0.2, 0.3, 0.4]).double()
    assert _equal_mass_edges(scores, 2).tolist() == pytest.approx([0.35])  # sizes 3 and 2, as tensor_split
    assert _equal_mass_edges(scores, 1).tolist() == []
    assert len(_equal_mass_edges(scores, 50)) == 4
    tied = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.5, 0.9]).double()
    assert _equal_mass_edges(tied, 3).tolist() == pytest.approx([0.7])
    assert len(_equal_mass_edges(torch.full((7,), 0.5).double(), 3)) == 0
    many = torch.rand(1003, generator=torch.Generator().manual_seed(0)).double()
    counts = torch.searchsorted(_equal_mass_edges(many, 10), many).bincount()
    assert counts.tolist() == [101] * 3 + [100] * 7


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_histogram_values_are_the_shares_in_a_loop_over_bins(binning):
    logits, labels = sample(400, 3)
    calibrator = HistogramBinning(6, binning=binning).fit(logits, labels)
    probs = logits.softmax(1)
    expected = torch.empty_like(probs)
    for k in range(3):
        if binning == "width":
            edges = [b / 6 for b in range(7)]
        else:
            chunks = probs[:, k].sort().values.tensor_split(6)
            edges = [0.0, *((a[-1] + b[0]).item() / 2 for a, b in zip(chunks, chunks[1:], strict=False)), 1.0]
        for low, high in zip(edges, edges[1:], strict=False):
            inside = (probs[:, k] > low) & (probs[:, k] <= high)
            expected[inside, k] = (labels[inside] == k).double().mean()
    levels, _ = calibrator._levels(logits)
    assert torch.allclose(levels, expected)
    # On the data of the fit every class is, bin by bin, as frequent as it says.
    assert levels.mean(0).tolist() == pytest.approx((labels.bincount() / 400).tolist())
    total = expected.sum(1, keepdim=True)
    assert torch.allclose(calibrator(logits).exp(), expected / total)


def test_an_empty_bin_gives_its_midpoint_and_a_row_of_zeros_its_probabilities():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    calibrator = HistogramBinning(4).fit(logits, torch.tensor([0, 1]))
    assert calibrator.values[0].tolist() == [0, 0.375, 0.625, 1]
    calibrator.values = torch.zeros_like(calibrator.values)
    assert torch.allclose(calibrator(logits), logits.log_softmax(1))


def test_a_score_at_an_edge_is_in_the_bin_below():
    calibrator = HistogramBinning(2).fit(torch.zeros(3, 2), torch.tensor([0, 0, 1]))
    assert calibrator.values.tolist() == [[pytest.approx(2 / 3), 0.75], [pytest.approx(1 / 3), 0.75]]
    assert calibrator(torch.zeros(2)).exp().tolist() == pytest.approx([2 / 3, 1 / 3])


def test_platt_binning_gives_means_of_the_scaled_scores():
    logits, labels = sample(300, 3)
    calibrator = PlattBinning(5).fit(logits, labels)
    scaled = TemperatureScaling().fit(logits, labels)(logits).exp()
    levels, _ = calibrator._levels(logits)
    for k in range(3):
        for chunk in scaled[:, k].argsort().tensor_split(5):
            assert levels[chunk, k].tolist() == pytest.approx([scaled[chunk, k].mean().item()] * len(chunk))
    assert list(calibrator.quantities()) == ["temperature"]
    assert list(PlattBinning(scaling="vector").fit(logits, labels).quantities())[0] == "scale_min"


def slow_bayesian(scores: list[float], hits: list[int], strength: float) -> list[float]:
    """The method's own definition, model by model and bin by bin, for scores without ties."""
    n = len(scores)
    order = sorted(range(n), key=scores.__getitem__)
    logs, outputs = [], []
    for b in range(max(1, int(n ** (1 / 3) / 10)), min(n, int(10 * n ** (1 / 3))) + 1):
        log, output = 0.0, [0.0] * n
        cuts = [j * n // b for j in range(b + 1)]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            inside = order[start:stop]
            low = (scores[order[start - 1]] + scores[order[start]]) / 2 if start else 0.0
            high = (scores[order[stop - 1]] + scores[order[stop]]) / 2 if stop < n else 1.0
            prior, middle = strength / b, (low + high) / 2
            alpha, beta, m = prior * middle, prior * (1 - middle), sum(hits[i] for i in inside)
            log += math.lgamma(prior) - math.lgamma(prior + len(inside))
            log += math.lgamma(m + alpha) - math.lgamma(alpha)
            log += math.lgamma(len(inside) - m + beta) - math.lgamma(beta)
            for i in inside:
                output[i] = (m + alpha) / (len(inside) + prior)
        logs.append(log)
        outputs.append(output)
    weights = [math.exp(log - max(logs)) for log in logs]
    return [sum(w * o[i] for w, o in zip(weights, outputs, strict=True)) / sum(weights) for i in range(n)]


@pytest.mark.parametrize("n", [5, 60, 400])
def test_bayesian_binning_equals_a_slow_one(n):
    logits, labels = sample(n, 2, seed=3)
    calibrator = BayesianBinning().fit(logits, labels)
    levels, _ = calibrator._levels(logits)
    scores = logits.softmax(1)[:, 1].tolist()
    expected = slow_bayesian(scores, labels.tolist(), 2.0)
    assert levels[:, 1].tolist() == pytest.approx(expected, abs=1e-6)


def test_bayesian_binning_with_ties():
    logits = torch.tensor([[1.0, -1.0]] * 6 + [[-1.0, 1.0]] * 6)
    calibrator = BayesianBinning().fit(logits, torch.tensor([0] * 5 + [1] * 7))
    levels, _ = calibrator._levels(logits)
    assert len(calibrator.edges[0]) == 1
    assert 0.7 < levels[0, 0] < 5 / 6
    assert 0.0 < levels[-1, 0] < 0.1


def test_top_label_binning_gives_accuracies_of_bins_of_a_class():
    logits, labels = sample(2000, 3)
    calibrator = TopLabelHistogramBinning(40).fit(logits, labels)
    confidence, predicted = logits.softmax(1).max(1)
    after = calibrator(logits).exp()
    checked = 0
    for k in range(3):
        index = (predicted == k).nonzero().squeeze(1)
        for chunk in confidence[index].argsort().tensor_split(len(index) // 40):
            accuracy = (labels[index[chunk]] == k).double().mean().item()
            if accuracy > 0.34:
                assert after[index[chunk], k].tolist() == pytest.approx([accuracy] * len(chunk), abs=1e-9)
                checked += 1
    assert checked > 40
    assert torch.equal(after.argmax(1), predicted)
    assert 0 < calibrator.fit_info["guarded"] < 0.5


def test_top_label_binning_leaves_classes_that_were_never_predicted():
    logits, labels = sample(200, 3)
    logits[:, 2] -= 50
    labels = labels.clamp_max(1)
    calibrator = TopLabelHistogramBinning().fit(logits, labels)
    other = torch.tensor([[0.0, 1.0, 2.0]]).double()
    assert torch.allclose(calibrator(other), other.log_softmax(1), atol=1e-9)


@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 8), wide=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_replaced_confidence_keeps_the_order_and_the_sum(seed, num_classes, wide):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if wide else torch.float32
    log_probs = (5 * torch.randn(20, num_classes, generator=generator, dtype=dtype)).log_softmax(1)
    confidence = torch.rand(20, generator=generator, dtype=dtype)
    confidence[:2] = torch.tensor([0.0, 1.0])
    found, guarded = replace_confidence(log_probs, confidence)
    assert found.isfinite().all()
    assert torch.allclose(found.exp().sum(1), torch.ones((), dtype=dtype), atol=1e-5)
    assert torch.equal(found.float().argmax(1), log_probs.argmax(1))
    in_order = found.gather(1, log_probs.argsort(1))
    assert (in_order.diff(dim=1) >= -1e-5).all()
    kept = found.amax(1).exp()
    assert torch.allclose(kept[confidence > 1.01 / num_classes], confidence[confidence > 1.01 / num_classes], atol=1e-5)
    # Without the guard the others keep their proportions.
    rest = found[~guarded].exp() / log_probs[~guarded].exp()
    rest = rest.scatter(1, log_probs[~guarded].argmax(1, keepdim=True), math.nan)
    if num_classes > 2 and len(rest):
        tolerance = 1e-9 if wide else 1e-3
        lowest, highest = rest.nan_to_num(math.inf).amin(1), rest.nan_to_num(-math.inf).amax(1)
        assert ((highest - lowest) <= tolerance * highest + 1e-30)[confidence[~guarded] < 1].all()


def test_masked_classes_stay_finite_where_a_confidence_is_replaced():
    log_probs = torch.tensor([[0.0, -math.inf, -math.inf], [-1.0, -0.5, -math.inf]]).log_softmax(1)
    found, _ = replace_confidence(log_probs, torch.tensor([0.9, 0.6]))
    assert not found.isnan().any()
    assert found.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize(
    ("build", "remedy"),
    [
        (lambda: HistogramBinning(0), "num_bins must be at least 1, got 0"),
        (lambda: HistogramBinning(binning="equal"), "one of width, mass, got 'equal'"),
        (lambda: PlattBinning(0), "num_bins must be at least 1"),
        (lambda: PlattBinning(scaling="matrix"), "one of temperature, vector"),
        (lambda: BayesianBinning(strength=0.0), "strength must be positive"),
        (lambda: TopLabelHistogramBinning(0), "points_per_bin must be at least 1"),
        (lambda: HistogramBinning().fit(*sample(40, 3))(torch.zeros(2, 4)), "fitted on 3 classes, got logits of 4"),
        (lambda: TopLabelHistogramBinning().fit(*sample(40, 3))(torch.zeros(2, 4)), "fitted on 3 classes"),
    ],
)
def test_wrong_arguments_are_refused(build, remedy):
    with pytest.raises(ValueError, match=remedy):
        build()
