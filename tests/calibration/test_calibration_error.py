"""Binned calibration error, its metric, its bins and their diagram."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_plugins.calibration import CalibrationError, ReliabilityBins, ece, reliability_bins, reliability_diagram


def predictions(n: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(1)


def slow_error(probs: Tensor, labels: Tensor, num_bins: int, norm: str) -> float:
    gaps, shares = [], []
    confidence, predicted = probs.max(1)
    for b in range(num_bins):
        inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
        if inside.any():
            right = (predicted == labels)[inside].double()
            gaps.append(abs(confidence[inside].mean().item() - right.mean().item()))
            shares.append(inside.double().mean().item())
    if norm == "max":
        return max(gaps)
    power = 1 if norm == "l1" else 2
    return sum(s * g**power for s, g in zip(shares, gaps, strict=True)) ** (1 / power)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_equals_a_loop_over_bins(norm, num_bins):
    probs, labels = predictions(500, 4)
    labels = labels.roll(3)
    expected = slow_error(probs, labels, num_bins, norm)
    assert ece(probs, labels, num_bins=num_bins, norm=norm).item() == pytest.approx(expected, rel=1e-6)
    assert reliability_bins(probs, labels, num_bins=num_bins).error(norm) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_one_confidence_by_hand(norm):
    probs, labels = torch.tensor([[0.9, 0.1]]).repeat(10, 1), torch.tensor([0] * 6 + [1] * 4)
    assert ece(probs, labels, norm=norm).item() == pytest.approx(0.3, abs=1e-7)


def test_confidence_one_is_in_the_last_bin():
    probs, labels = torch.tensor([[1.0, 0.0], [0.95, 0.05]]), torch.tensor([1, 0])
    assert ece(probs, labels).item() == pytest.approx(0.475)
    assert reliability_bins(probs, labels).count[-1] == 2
    # torchmetrics keeps it apart in a bin that is not one of the 15.
    assert multiclass_calibration_error(probs, labels, 2, n_bins=15).item() == pytest.approx(0.525)


def test_agrees_with_torchmetrics_inside_the_bins():
    probs, labels = predictions(3000, 5)
    for norm in ("l1", "l2", "max"):
        expected = multiclass_calibration_error(probs, labels, 5, n_bins=15, norm=norm)
        assert ece(probs, labels, norm=norm).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edge_belongs_to_the_bin_below(dtype):
    for numerator in (6, 7, 8, 9):
        probs = torch.tensor([[numerator / 10, 1 - numerator / 10]], dtype=dtype)
        assert reliability_bins(probs, torch.tensor([0]), num_bins=10).count[numerator - 1] == 1


def test_always_right_and_certain():
    probs = torch.eye(3)
    for norm in ("l1", "l2", "max"):
        assert ece(probs, torch.arange(3), norm=norm).item() == 0
    assert CalibrationError()(probs, torch.arange(3)) == 0


def test_constant_base_rate_has_no_error():
    probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).repeat(10, 1)
    assert ece(probs, torch.tensor([0] * 5 + [1] * 3 + [2] * 2)).item() == pytest.approx(0, abs=1e-7)


def test_of_equal_scores_the_first_class_is_predicted():
    probs = torch.full((4, 4), 0.25)
    bins = reliability_bins(probs, torch.arange(4), num_bins=10)
    assert bins.accuracy[2] == 0.25
    probs = torch.tensor([[0.1, 0.4, 0.4, 0.1], [0.5, 0.5, 0.0, 0.0]])
    assert reliability_bins(probs, torch.tensor([2, 1]), num_bins=1).accuracy[0] == 0
    assert reliability_bins(probs, torch.tensor([1, 0]), num_bins=1).accuracy[0] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("below_zero", [0.0, -0.0, -1e-7])
def test_ties_zeros_and_rounding_below_zero_equal_a_search_for_the_first_largest(dtype, below_zero):
    generator = torch.Generator().manual_seed(0)
    tickets = torch.randint(0, 3, (400, 8), generator=generator)
    tickets[:200] *= torch.rand(200, 8, generator=generator) < 0.3
    tickets[:, 0] += tickets.sum(1) == 0
    probs = (tickets / tickets.sum(1, keepdim=True)).to(dtype)  # many rows with several largest ones, some with 1/2
    probs[probs == 0] = below_zero
    assert (probs == probs.amax(1, keepdim=True)).sum() > 600
    labels = torch.randint(0, 8, (400,), generator=generator)
    first = torch.tensor([row.index(max(row)) for row in probs.tolist()])
    bins = reliability_bins(probs, labels, num_bins=1)
    assert bins.accuracy.item() == (first == labels).double().mean().item()
    assert bins.confidence.item() == pytest.approx(probs.amax(1).double().mean().item(), abs=1e-12)


def test_falls_with_the_root_of_the_samples_for_a_calibrated_sampler():
    errors = [ece(*predictions(n, 10)).item() for n in (1000, 100_000)]
    assert 4 < errors[0] / errors[1] < 25


def test_one_bin_is_mean_confidence_less_accuracy():
    probs, labels = predictions(200, 3)
    confidence, predicted = probs.max(1)
    expected = (confidence.mean() - (predicted == labels).double().mean()).abs()
    assert ece(probs, labels, num_bins=1).item() == pytest.approx(expected.item(), abs=1e-6)


@given(seed=st.integers(0, 1000), n=st.integers(1, 80), num_classes=st.integers(2, 7))
@settings(max_examples=30, deadline=None)
def test_order_and_batches_do_not_matter(seed, n, num_classes):
    probs, labels = predictions(n, num_classes, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    whole = ece(probs, labels).item()
    assert ece(probs[order], labels[order]).item() == pytest.approx(whole, abs=1e-7)
    metric = CalibrationError()
    cut = int(torch.randint(0, n + 1, (), generator=generator))
    for part in (slice(0, cut), slice(cut, n)):
        metric.update(probs[part], labels[part])
    assert metric.compute().item() == pytest.approx(whole, abs=1e-7)
    assert metric.bins().ece == pytest.approx(whole, abs=1e-7)
    assert 0 <= whole <= 1
    assert whole <= ece(probs, labels, norm="l2").item() + 1e-7 <= ece(probs, labels, norm="max").item() + 2e-7


def test_kinds_of_input_agree():
    probs, labels = predictions(300, 5)
    expected = ece(probs, labels).item()
    logits = probs.log() + torch.linspace(-50, 50, 300)[:, None]
    assert ece(logits, labels, input="logits").item() == pytest.approx(expected, abs=1e-6)
    assert ece(probs.log(), labels, input="log_probs").item() == pytest.approx(expected, abs=1e-6)
    assert ece(probs.float(), labels).item() == pytest.approx(expected, abs=1e-5)


def test_logits_in_the_unit_interval_are_still_logits():
    logits, labels = torch.tensor([[0.2, 0.9], [0.6, 0.1]]), torch.tensor([1, 1])
    assert ece(logits, labels, input="logits").item() == pytest.approx(ece(logits.softmax(1), labels).item(), abs=1e-7)


def test_masked_classes_are_taken():
    assert ece(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]), input="logits") == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [2, 1000])
def test_half_precision_probabilities_are_taken(dtype, num_classes):
    probs, labels = predictions(200, num_classes)
    expected = ece(probs.to(dtype).double() / probs.to(dtype).double().sum(1, keepdim=True), labels).item()
    assert ece(probs.to(dtype), labels).item() == pytest.approx(expected, abs=0.02)


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "labels", "kind", "error", "remedy"),
    [
        (torch.tensor([[2.0, -1.0]]), [0], "probs", ValueError, 'pass input="logits"; found values from -1 to 2'),
        (torch.tensor([[0.2, 0.9]]), [0], "probs", ValueError, 'pass input="logits"'),
        (torch.tensor([[-0.5, 0.7, 0.8]]), [0], "probs", ValueError, 'pass input="logits"'),
        (torch.tensor([[NAN, 0.5]]), [0], "probs", ValueError, "must be finite"),
        (torch.tensor([[math.inf, 0.5]]), [0], "probs", ValueError, "must be finite"),
        (torch.tensor([[0.5, 0.5], [NAN, NAN]]), [0, 0], "logits", ValueError, "drop those rows"),
        (torch.tensor([[math.inf, 0.5]]), [0], "logits", ValueError, "drop those rows"),
        (torch.tensor([[1.0, 0.5]]), [0], "log_probs", ValueError, 'pass input="logits"'),
        (torch.tensor([[0.5, 0.5]]), [2], "probs", ValueError, "found 2 to 2 for 2 classes"),
        (torch.tensor([[0.5, 0.5]]), [-100], "probs", ValueError, "drop the rows of ignored"),
        (torch.tensor([[0, 1]]), [0], "probs", TypeError, "not predicted classes"),
        (torch.tensor([0.5]), [0], "probs", ValueError, "torch.stack"),
        (torch.tensor([[0.5, 0.5]]), [0.0], "probs", TypeError, "labels.long"),
        (torch.tensor([[0.5, 0.5]]), [[0, 1]], "probs", ValueError, "not one-hot"),
    ],
)
def test_wrong_input_is_refused(scores, labels, kind, error, remedy):
    labels = torch.tensor(labels)
    for use in (ece, reliability_bins):
        with pytest.raises(error, match=remedy):
            use(scores, labels, input=kind)
    metric = CalibrationError(input=kind)
    with pytest.raises(error, match=remedy):
        metric.update(scores, labels)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"num_bins": 0}, "at least 1, got 0"),
        ({"norm": "l3"}, "l1, l2, max"),
        ({"input": "auto"}, "probs, logits, log_probs"),
    ],
)
def test_wrong_options_are_refused(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        CalibrationError(**options)
    with pytest.raises(ValueError, match=remedy):
        ece(torch.eye(2), torch.arange(2), **options)


def test_what_a_device_found_is_raised_by_compute():
    metric = CalibrationError()
    metric.update(torch.eye(2), torch.arange(2))
    metric.problems = torch.tensor([1, 0])
    with pytest.raises(ValueError, match='pass input="logits"; found in 1 of the updates'):
        metric.compute()
    metric.problems = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="ignored labels; found others in 2 of the updates"):
        metric.bins()


def test_without_samples_it_is_nan():
    metric = CalibrationError()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()
    for norm in ("l1", "l2", "max"):
        assert ece(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), norm=norm).isnan()


def test_state_is_small_resets_and_crosses_inference_mode():
    probs, labels = predictions(100, 3)
    metric = CalibrationError()
    with torch.inference_mode():
        metric.reset()
        metric.update(probs, labels)
    metric.update(probs, labels)
    assert metric.compute().item() == pytest.approx(ece(probs, labels).item())
    assert sum(state.numel() for state in metric.metric_state.values()) == 47
    metric.reset()
    assert metric.count.sum() == 0


def test_forward_gives_the_value_of_the_batch():
    probs, labels = predictions(100, 3)
    metric = CalibrationError()
    assert metric(probs, labels).item() == pytest.approx(ece(probs, labels).item())
    assert metric.bins().count.sum() == 100


def test_moves_to_a_device_without_float64():
    def refuse_float64(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return tensor

    probs, labels = predictions(100, 3)
    metric = CalibrationError()
    metric._apply(refuse_float64)
    metric.update(probs, labels)
    assert metric.compute().item() == pytest.approx(ece(probs, labels).item(), abs=1e-6)


def test_diagram_shows_one_or_two_sets(tmp_path):
    probs, labels = predictions(300, 4)
    bins = reliability_bins(probs, labels)
    assert isinstance(bins, ReliabilityBins)
    one = reliability_diagram(bins, title="A net")
    assert [axes.get_title() for axes in one.axes] == [f"ECE {100 * bins.ece:.1f} %", ""]
    assert one.get_suptitle() == "A net"
    two = reliability_diagram(bins, reliability_bins(probs, labels.roll(1)), labels=("raw", "scaled"))
    assert [axes.get_title().split("\n")[0] for axes in two.axes] == ["raw", "scaled", "", ""]
    two.savefig(tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 5000
    heights = [patch.get_height() for patch in one.axes[0].containers[0]]
    filled = bins.count > 0
    assert heights == pytest.approx(torch.minimum(bins.accuracy, bins.confidence)[filled].tolist())


def test_diagram_of_nothing_and_no_global_figures(tmp_path):
    import sys

    figure = reliability_diagram(reliability_bins(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)))
    figure.savefig(tmp_path / "empty.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
