"""h-calibration: its loss, its maps, its fit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.calibration import CalibratedModule, HCalibration, TemperatureScaling, ece, h_calibration_loss
from lightning_plugins.calibration._criteria import criterion_of
from lightning_plugins.calibration.h_calibration import _cluster_bounds
from lightning_plugins.calibration.monotone_maps import (
    IntegralMap,
    PiecewiseLinearMap,
    TemperatureEnsemble,
    piecewise_linear,
)

MAPS = ("linear", "piecewise_linear", "nonlinear")


def sample(n: int, num_classes: int, *, factor: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits ``factor`` times those whose softmax the labels are drawn from."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return factor * logits, labels


def slow_loss(probs: Tensor, labels: Tensor, window: int, num_clusters: int, tolerance: float = 1e-20) -> Tensor:
    """The published form: two convolutions, k-means by distances."""
    hits = F.one_hot(labels, probs.shape[1]).flatten().double()
    values, order = probs.flatten().double().sort(stable=True)
    hits = hits[order]
    kernel = torch.full((1, 1, window + 1), 1 / (window + 1), dtype=torch.float64)
    means = [
        F.conv1d(part[None, None], kernel, padding=window // 2)[0, 0]
        for part in (values * (1 - hits), (1 - values) * hits)
    ]
    excess = ((means[0] - means[1]).abs() - tolerance).clamp_min(0)
    fixed = values.detach()
    low, high = fixed[0], fixed[-1]
    centres = low + (high - low) * (torch.arange(num_clusters) + 0.5) / num_clusters
    for _ in range(25):
        nearest = (fixed[:, None] - centres).abs().argmin(1)
        centres = torch.stack(
            [fixed[nearest == k].mean() if (nearest == k).any() else c for k, c in enumerate(centres)]
        )
    return torch.stack([excess[nearest == k].mean() for k in range(num_clusters) if (nearest == k).any()]).mean()


def test_by_hand():
    probs = torch.tensor([[0.9, 0.1]], dtype=torch.float64).repeat(10, 1)
    labels = torch.tensor([0] * 6 + [1] * 4)
    # Without a window every event stands alone: 6 x 0.1 and 4 x 0.9 in either cluster.
    loss = h_calibration_loss(probs, labels, window=0, num_clusters=2)
    assert loss.item() == pytest.approx(0.42, abs=1e-12)
    loss = h_calibration_loss(probs, labels, window=0, num_clusters=2, tolerance=0.2)
    assert loss.item() == pytest.approx(4 * 0.7 / 10, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "num_classes", "window", "num_clusters"), [(40, 3, 10, 4), (300, 10, 200, 15), (7, 3, 20, 3)]
)
def test_equals_the_convolution_form_with_its_gradient(dtype, n, num_classes, window, num_clusters):
    logits, labels = sample(n, num_classes, factor=1.5)
    probs = logits.to(dtype).softmax(1)
    fast, slow = probs.clone().requires_grad_(), probs.double().requires_grad_()
    loss = h_calibration_loss(fast, labels, window=window, num_clusters=num_clusters)
    expected = slow_loss(slow, labels, window, num_clusters)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), abs=tolerance)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-5, atol=tolerance)


def test_gradient_is_that_of_finite_differences():
    logits, labels = sample(30, 3)
    probs = logits.double().softmax(1).requires_grad_()
    (gradient,) = torch.autograd.grad(h_calibration_loss(probs, labels, window=6, num_clusters=3), probs)
    generator = torch.Generator().manual_seed(0)
    for index in torch.randperm(90, generator=generator)[:12].tolist():
        shift = torch.zeros(90, dtype=torch.float64)
        shift[index] = 1e-9  # too little to change the order
        up, down = (
            h_calibration_loss(probs.detach() + sign * shift.view(30, 3), labels, window=6, num_clusters=3)
            for sign in (1, -1)
        )
        assert ((up - down) / 2e-9).item() == pytest.approx(gradient.flatten()[index].item(), abs=1e-5)


def test_calibrated_probabilities_leave_the_noise_of_a_window_and_sharpened_ones_more():
    logits, labels = sample(10_000, 10)
    floors = {window: h_calibration_loss(logits.softmax(1), labels, window=window).item() for window in (50, 200, 800)}
    # The mean size of a normal deviation at p = 1/2, the most there can be, is an upper bound.
    assert 0.005 < floors[200] < math.sqrt(2 / math.pi * 0.25 / 201)
    assert floors[50] / floors[200] == pytest.approx(2, rel=0.25)
    assert floors[200] / floors[800] == pytest.approx(2, rel=0.35)
    assert h_calibration_loss((1.5 * logits).softmax(1), labels).item() > 3 * floors[200]


def test_leaving_classes_out_averages_over_them():
    logits, labels = sample(60, 4)
    probs = logits.double().softmax(1).requires_grad_()
    parts = [h_calibration_loss(probs[labels != c], labels[labels != c], window=20) for c in labels.unique().tolist()]
    expected = torch.stack(parts).mean()
    loss = h_calibration_loss(probs, labels, window=20, leave_one_class_out=True)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    gradients = [torch.autograd.grad(value, probs, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_clusters_are_intervals_around_their_means():
    values = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort().values ** 3
    bounds = _cluster_bounds(values, 5)
    centres = torch.stack([values[a:b].mean() for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
    nearest = (values[:, None] - centres).abs().argmin(1)
    assert (nearest == torch.arange(5).repeat_interleave(bounds.diff())).float().mean() > 0.98
    assert _cluster_bounds(torch.full((9,), 0.5, dtype=torch.float64), 3).diff().sum() == 9


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"window": 3}, "window must be even"),
        ({"num_clusters": 0}, "num_clusters must be at least 1"),
        ({"tolerance": -1.0}, "tolerance must be at least 0"),
        ({"window": 30}, "lower window or pass more samples"),
        ({"window": 26, "leave_one_class_out": True}, "lower window or set leave_one_class_out=False"),
    ],
)
def test_wrong_arguments_of_the_loss(arguments, remedy):
    logits, labels = sample(10, 3)
    with pytest.raises(ValueError, match=remedy):
        h_calibration_loss(logits.softmax(1), labels, **arguments)
    with pytest.raises(TypeError, match=r"pass logits.softmax\(1\)"):
        h_calibration_loss(logits.long(), labels)
    with pytest.raises(TypeError, match="integer classes"):
        h_calibration_loss(logits.softmax(1), labels.float())
    with pytest.raises(ValueError, match="one row of probabilities"):
        h_calibration_loss(logits.softmax(1), labels[:4])


# Maps


@pytest.mark.parametrize("make", [TemperatureEnsemble, PiecewiseLinearMap, IntegralMap])
def test_a_map_is_the_identity_at_first(make):
    log_probs = sample(50, 7)[0].log_softmax(1)
    torch.testing.assert_close(make()(log_probs), log_probs)


@pytest.mark.parametrize("make", [lambda: TemperatureEnsemble(8), PiecewiseLinearMap, IntegralMap])
@pytest.mark.parametrize("seed", range(3))
def test_random_parameters_keep_the_order_of_every_row(make, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 8 * torch.randn(10_000, 10, generator=generator)
    logits[:100, 3] = logits[:100, 5]  # ties
    log_probs, module = logits.log_softmax(1), make()
    leaves = module.start(log_probs, generator)
    leaves = {
        name: leaf + (name != "scale") * torch.randn(leaf.shape, generator=generator) for name, leaf in leaves.items()
    }
    module.store(leaves)
    mapped = module(log_probs)
    order = log_probs.argsort(dim=1, stable=True)
    assert (mapped.gather(1, order).diff(dim=1) >= 0).all()
    assert torch.equal(mapped[:100, 3], mapped[:100, 5])
    # The predicted class is among the largest, where rounding has made several of them equal.
    assert (mapped.gather(1, log_probs.argmax(1, keepdim=True))[:, 0] == mapped.amax(1)).all()
    torch.testing.assert_close(module.evaluate(leaves, log_probs), mapped, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mapped.exp().sum(1), torch.ones(10_000))


def test_the_piecewise_linear_map_is_the_integral_of_its_slopes():
    slopes = torch.rand(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = torch.linspace(0, 120, 2401, dtype=torch.float64)
    steps = slopes[((inputs[:-1] + 0.025) / 10).long().clamp_max(9)] * inputs.diff()
    expected = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    torch.testing.assert_close(piecewise_linear(inputs, slopes), expected)


def test_the_gradient_of_the_segments():
    slopes = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = torch.tensor([[0.3, 25.0], [99.0, 130.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(piecewise_linear, (inputs, slopes))


@pytest.mark.parametrize(
    ("make", "name"),
    [(TemperatureEnsemble, "num_members"), (PiecewiseLinearMap, "num_segments"), (IntegralMap, "hidden")],
)
def test_maps_of_no_size_are_refused(make, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make(0)


# Fit


@pytest.mark.parametrize("name", MAPS)
def test_an_overconfident_net_is_calibrated_as_well_as_by_its_temperature(name):
    logits, labels = sample(2000, 5, factor=2.5)
    test_logits, test_labels = sample(4000, 5, factor=2.5, seed=1)
    before = ece(test_logits, test_labels, input="logits").item()
    scaled = TemperatureScaling().fit(logits, labels)
    best = ece(scaled(test_logits), test_labels, input="log_probs").item()
    random = torch.random.get_rng_state()
    epochs = 1500 if name == "linear" else 400
    calibrator = HCalibration(name, size=8 if name == "linear" else None, max_epochs=epochs, patience=60)
    calibrator.fit(logits, labels)
    assert torch.equal(torch.random.get_rng_state(), random)
    after = ece(calibrator(test_logits), test_labels, input="log_probs").item()
    assert after < 0.5 * before
    assert after < best + 0.012
    assert (calibrator(test_logits).argmax(1) == test_logits.argmax(1)).float().mean() > 0.999
    fresh = HCalibration(name, size=8 if name == "linear" else None)
    fresh.load_state_dict(calibrator.state_dict())
    torch.testing.assert_close(fresh(test_logits), calibrator(test_logits), rtol=0, atol=0)


def bent(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overconfident where unsure, underconfident where sure: no temperature serves both."""
    logits, labels = sample(n, 4, seed=seed)
    gap = logits.log_softmax(1)
    return torch.where(gap > -1, 2.0 * gap, gap - 1.0), labels


@pytest.mark.filterwarnings("ignore:.*HCalibration")
def test_the_step_halves_after_step_patience_epochs_without_a_better_ece():
    logits, labels = bent(500)

    def scores(step_patience: int | None) -> Tensor:
        calibrator = HCalibration(select_by="nll", max_epochs=60, patience=20, step_patience=step_patience)
        return calibrator.fit(logits, labels)(logits)

    assert torch.equal(scores(None), scores(10))
    assert not torch.equal(scores(1), scores(10))


@pytest.mark.filterwarnings("ignore:.*HCalibration")
@pytest.mark.parametrize("select_by", ["debiased_ece", "classwise_ece", "ece", "nll"])
def test_the_state_that_is_kept_is_the_best_by_the_selector(select_by):
    logits, labels = bent(1000)
    calibrator = HCalibration(select_by=select_by, max_epochs=80).fit(logits, labels)
    info = calibrator.fit_info
    assert criterion_of(calibrator(logits), labels, select_by) == pytest.approx(info["selector"], abs=1e-5)
    assert (
        info["selector"]
        < info["selector_before"]
        == pytest.approx(criterion_of(logits.log_softmax(1), labels, select_by), abs=1e-6)
    )


@pytest.mark.filterwarnings("ignore:.*HCalibration")
def test_the_seed_fixes_the_fit_and_batches_work():
    logits, labels = sample(600, 4, factor=2.5)
    fits = [
        HCalibration("nonlinear", max_epochs=15, batch_size=200, seed=seed).fit(logits, labels)(logits)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2])
    assert ece(fits[0], labels, input="log_probs") < ece(logits, labels, input="logits")


@pytest.mark.filterwarnings("ignore:.*HCalibration")
def test_small_data_lower_the_window():
    logits, labels = sample(8, 3)
    assert HCalibration(max_epochs=3).fit(logits, labels).fit_info["window"] == 22
    assert HCalibration(max_epochs=3).fit(logits[:1], labels[:1]).fit_info["window"] == 2


def test_an_unfinished_fit_says_so():
    with pytest.warns(UserWarning, match="stopped before it converged, after 3 iterations"):
        HCalibration(max_epochs=3).fit(*sample(200, 3, factor=3.0))


@pytest.mark.filterwarnings("ignore:.*HCalibration")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_batches_of_one_and_two_classes(dtype):
    logits, labels = sample(300, 2, factor=3.0)
    calibrator = HCalibration(max_epochs=20).fit(logits.to(dtype), labels)
    output = calibrator(logits[0].to(dtype))
    assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(calibrator(logits[:1].to(dtype))[0], output)
    calibrator.to(torch.bfloat16)
    assert calibrator.map.slopes.dtype == torch.float64


def test_wrong_data_and_arguments():
    logits, labels = sample(20, 3)
    with pytest.raises(ValueError, match="logits must be finite"):
        HCalibration().fit(logits * float("nan"), labels)
    with pytest.raises(ValueError, match="labels must lie in"):
        HCalibration().fit(logits, labels + 3)
    for arguments, remedy in (
        ({"map": "cubic"}, "map must be one of linear"),
        ({"select_by": "mce"}, "select_by must be one of"),
        ({"window": 5}, "window must be even"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"size": 0}, "size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=remedy):
            HCalibration(**arguments)


@pytest.mark.filterwarnings("ignore:.*HCalibration")
@pytest.mark.parametrize("name", MAPS)
def test_a_net_and_its_map_export(name, tmp_path):
    import onnxruntime

    logits, labels = sample(300, 4, factor=3.0)
    calibrator = HCalibration(name, max_epochs=25).fit(logits, labels)
    module, inputs = CalibratedModule(torch.nn.Linear(6, 4), calibrator).eval(), torch.randn(5, 6)
    expected = module(inputs)
    torch.testing.assert_close(torch.export.export(module, (inputs,)).module()(inputs), expected)
    torch.onnx.export(module, (inputs,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)
