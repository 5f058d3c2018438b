"""Temperature scaling and the interface of calibrators."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from lightning_plugins.calibration import Calibrator, TemperatureScaling, ece, fit_temperature
from lightning_plugins.calibration.calibrator import check_fit_data

LOGITS = Path(__file__).parents[3] / "shared/data/logits"


def sample(n: int, num_classes: int, *, temperature: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 logits whose best temperature is about ``temperature``, because labels are drawn from their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return temperature * logits, labels


def slope(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """The exact loss's derivative in 1/T, by autograd in float64."""
    beta = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits.double() * beta, labels), beta)
    return gradient.item()


def reference(logits: Tensor, labels: Tensor) -> float:
    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits.double() / math.exp(log_temperature), labels).item()

    return math.exp(minimize_scalar(loss, bounds=(-6.9, 6.9), method="bounded", options={"xatol": 1e-10}).x)


def test_two_classes_have_a_closed_form():
    # Margin m, share q right: the best temperature makes the sigmoid of m / T equal to q.
    logits = torch.tensor([[3.0, 0.0]]).repeat(10, 1)
    labels = torch.tensor([0] * 8 + [1] * 2)
    assert fit_temperature(logits, labels) == pytest.approx(3 / math.log(4), rel=1e-12)


@pytest.mark.parametrize(("n", "num_classes"), [(7, 2), (300, 10), (3000, 100), (20_000, 30)])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 2.5, 30.0])
def test_equals_a_slow_minimiser_and_has_no_slope(n, num_classes, temperature):
    logits, labels = sample(n, num_classes, temperature=temperature)
    labels[0] = logits[0].argmin()  # no sample is separable
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(reference(logits, labels), rel=1e-5)
    assert abs(slope(logits, labels, fitted)) * max(1.0, 1 / fitted) < 1e-8 * max(1.0, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_logits_give_the_minimum_of_their_own_loss(dtype):
    logits, labels = sample(20_000, 50, temperature=2.5)  # enough elements for float32 tiles
    logits = logits.to(dtype)
    fitted = fit_temperature(logits, labels)
    best = fit_temperature(logits.double(), labels)
    assert fitted == pytest.approx(best, rel=1e-8)
    assert abs(slope(logits, labels, fitted)) < 1e-6
    losses = [F.cross_entropy(logits.double() / t, labels).item() for t in (fitted, best)]
    assert losses[0] - losses[1] < 1e-9


@given(scale=st.floats(0.05, 20.0), seed=st.integers(0, 20), num_classes=st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_scaling_the_logits_scales_the_temperature(scale, seed, num_classes):
    logits, labels = sample(200, num_classes, seed=seed)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale * fit_temperature(logits, labels), rel=1e-6)


def test_scaling_many_float32_logits_scales_the_temperature():
    logits, labels = (part for part in sample(20_000, 50))
    logits = logits.float()
    assert fit_temperature(3.3 * logits, labels) == pytest.approx(3.3 * fit_temperature(logits, labels), rel=1e-6)


@given(seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_order_of_rows_and_of_classes_and_shifts_of_rows_do_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = sample(150, 5, seed=seed)
    fitted = fit_temperature(logits, labels)
    rows, classes = torch.randperm(150, generator=generator), torch.randperm(5, generator=generator)
    assert fit_temperature(logits[rows], labels[rows]) == pytest.approx(fitted, rel=1e-8)
    assert fit_temperature(logits[:, classes], classes.argsort()[labels]) == pytest.approx(fitted, rel=1e-8)
    shifts = 100 * torch.randn(150, 1, generator=generator, dtype=torch.float64)
    assert fit_temperature(logits + shifts, labels) == pytest.approx(fitted, rel=1e-8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_recovers_the_temperature_that_made_the_labels(temperature):
    logits, labels = sample(50_000, 10, temperature=temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.02)


def test_calibrated_outputs_need_no_second_calibration():
    logits, labels = sample(2000, 10, temperature=2.5)
    calibrator = TemperatureScaling().fit(logits, labels)
    assert fit_temperature(calibrator(logits), labels) == pytest.approx(1.0, rel=1e-7)
    assert ece(calibrator(logits), labels, input="log_probs") < 0.5 * ece(logits, labels, input="logits")
    assert calibrator.fit_info["nll_after"] == pytest.approx(
        F.cross_entropy(logits / calibrator.temperature, labels).item(), rel=1e-9
    )
    assert calibrator.fit_info["nll_before"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-9)
    assert calibrator.fit_info["converged"] is True
    assert calibrator.fit_info["gradient"] < 1e-8
    assert set(map(type, calibrator.fit_info.values())) <= {int, float, bool}


@given(seed=st.integers(0, 100), temperature=st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_the_order_of_classes_is_kept(seed, temperature):
    logits, labels = sample(50, 6, temperature=temperature, seed=seed)
    labels[0] = logits[0].argmin()
    calibrator = TemperatureScaling().fit(logits, labels)
    assert calibrator.preserves_ranking
    assert torch.equal(calibrator(logits).argsort(1), logits.argsort(1))


def test_before_a_fit_it_is_a_log_softmax():
    logits, _ = sample(5, 4)
    calibrator = TemperatureScaling()
    assert not calibrator.is_fitted
    assert calibrator.temperature == 1
    assert torch.equal(calibrator(logits), logits.log_softmax(1))


def test_leading_dimensions_pass_through():
    logits, labels = sample(24, 4)
    calibrator = TemperatureScaling().fit(logits, labels)
    assert torch.equal(calibrator(logits.view(2, 3, 4, 4)), calibrator(logits).view(2, 3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_outputs_are_float32_or_wider(dtype):
    logits, labels = sample(40, 3)
    calibrator = TemperatureScaling().fit(logits.to(dtype), labels)
    log_probs = calibrator(logits.to(dtype))
    assert log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(log_probs.exp().sum(1), torch.ones((), dtype=log_probs.dtype))


def test_state_round_trip():
    logits, labels = sample(100, 3, temperature=2.0)
    fitted = TemperatureScaling().fit(logits, labels)
    loaded = TemperatureScaling()
    loaded.load_state_dict(fitted.state_dict())
    assert loaded.is_fitted
    assert loaded.temperature == fitted.temperature
    assert torch.equal(loaded(logits), fitted(logits))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()])
def test_casting_a_model_leaves_the_temperature_alone(cast):
    logits, labels = sample(100, 3, temperature=2.0)
    calibrator = TemperatureScaling().fit(logits, labels)
    model = cast(nn.Sequential(nn.Linear(2, 3), copy.deepcopy(calibrator)))
    assert model[1].temperature == calibrator.temperature


def test_moves_to_a_device_without_float64():
    def refuse_float64(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return tensor

    calibrator = TemperatureScaling().fit(*sample(100, 3, temperature=2.0))
    expected = calibrator.temperature
    calibrator._apply(refuse_float64)
    assert calibrator.log_temperature.dtype == torch.float32
    assert calibrator.temperature == pytest.approx(expected, rel=1e-6)


def test_survives_a_lightning_checkpoint(tmp_path):
    class Calibrated(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)
            self.calibrator = TemperatureScaling()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.calibrator(self.net(inputs))

    module = Calibrated()
    module.calibrator.fit(*sample(60, 3, temperature=2.0))
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Calibrated.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.calibrator.is_fitted
    assert loaded.calibrator.temperature == module.calibrator.temperature


def test_exports_with_its_net():
    model = nn.Sequential(nn.Linear(4, 3), TemperatureScaling().fit(*sample(60, 3, temperature=2.0))).eval()
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: batch},))
    assert torch.allclose(program.module()(inputs[:2]), model(inputs[:2]))


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad])
def test_fits_for_callers_without_gradients(guard):
    logits, labels = sample(100, 3, temperature=2.0)
    expected = TemperatureScaling().fit(logits, labels).temperature
    with guard():
        calibrator = TemperatureScaling().fit(logits.clone(), labels.clone())
        assert calibrator.temperature == expected
        assert fit_temperature(logits.clone(), labels.clone()) == expected
    calibrator.fit(logits, labels)  # buffers made inside are not bound to inference mode
    (logits.clone().requires_grad_() * 1.0).sum().backward()
    assert not calibrator(logits).requires_grad


def test_a_calibrator_may_use_gradients_under_inference_mode():
    class Bias(Calibrator):
        preserves_ranking = False

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.zeros(3))

        def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
            weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
            # The product keeps the logits for the backward pass, which a tensor of inference mode does not allow.
            loss = F.cross_entropy(logits * weight + bias, labels)
            self.bias = -torch.autograd.grad(loss, (weight, bias))[1]
            return {"converged": False, "iterations": 1}

        def _calibrate(self, logits: Tensor) -> Tensor:
            return (logits + self.bias).log_softmax(-1)

    logits, labels = sample(100, 3)
    with torch.inference_mode(), pytest.warns(UserWarning, match="stopped before it converged, after 1 iterations"):
        bias = Bias().fit(logits.float().clone(), labels.clone())
    assert bias.fit_info["nll_after"] < bias.fit_info["nll_before"]


def test_a_rise_of_the_loss_is_reported():
    class Worse(TemperatureScaling):
        def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
            self.log_temperature = torch.tensor(3.0)
            return {"converged": True}

    with pytest.warns(UserWarning, match="raised the negative log-likelihood.*use the uncalibrated logits"):
        Worse().fit(*sample(100, 3))


def test_is_deterministic_and_leaves_arguments_and_random_state_alone():
    logits, labels = sample(5000, 60, temperature=2.0)
    logits = logits.float()
    before, state = (logits.clone(), labels.clone()), torch.get_rng_state()
    first, second = (TemperatureScaling().fit(logits, labels) for _ in range(2))
    assert first.temperature == second.temperature
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


def test_a_failed_fit_leaves_the_state():
    logits, labels = sample(100, 3, temperature=2.0)
    calibrator = TemperatureScaling().fit(logits, labels)
    before = calibrator.temperature
    with pytest.raises(ValueError, match="finite"):
        calibrator.fit(logits * float("nan"), labels)
    assert calibrator.temperature == before


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_separable_data_stop_at_the_lower_bound(scale):
    logits = scale * (2 * torch.eye(3) - 1)
    with pytest.warns(UserWarning, match="bound 0.001.*all but certain.*more held-out data"):
        assert fit_temperature(logits, torch.arange(3)) == 1e-3


def test_one_sample():
    with pytest.warns(UserWarning, match="bound 0.001"):
        assert fit_temperature(torch.tensor([[2.0, 1.0]]), torch.tensor([0])) == 1e-3
    with pytest.warns(UserWarning, match="no better than a uniform guess.*all but uniform"):
        assert fit_temperature(torch.tensor([[2.0, 1.0]]), torch.tensor([1])) == 1e3


def test_logits_that_hardly_differ_stop_at_the_lower_bound():
    logits = torch.tensor([[1e-5, 0.0]]).repeat(4, 1)
    with pytest.warns(UserWarning, match="hardly differ"):
        assert fit_temperature(logits, torch.tensor([0, 0, 0, 1])) == 1e-3


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_constant_rows_have_temperature_one(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_temperature(torch.full((4, 2), value), torch.tensor([0, 1, 1, 0])) == 1


@pytest.mark.parametrize("scale", [1e-2, 3e2])
def test_extreme_scales_are_found(scale):
    logits, labels = sample(500, 5)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale * fit_temperature(logits, labels), rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "remedy"),
    [
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2).long(), TypeError, "raw outputs"),
        (torch.zeros(2, 3, 4), torch.zeros(2).long(), ValueError, r"\(2, 3, 4\); .*movedim"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "argmax"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), ValueError, "not one-hot"),
        (torch.zeros(2, 3), torch.zeros(3).long(), ValueError, r"shape \(2,\)"),
        (torch.zeros(0, 3), torch.zeros(0).long(), ValueError, "at least one held-out"),
        (torch.zeros(2, 1), torch.zeros(2).long(), ValueError, "torch.cat"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, "found 3; drop the rows"),
        (torch.zeros(2, 3), torch.tensor([-100, 1]), ValueError, "found -100"),
        (torch.tensor([[0.0, float("nan")]]), torch.tensor([0]), ValueError, "drop those rows"),
        (torch.tensor([[0.0, -float("inf")]]), torch.tensor([0]), ValueError, "clamp_min"),
        (
            torch.tensor([[0.2, 0.8], [1.0, 0.0]]),
            torch.tensor([0, 1]),
            ValueError,
            r"look like probabilities.*\.log\(\)",
        ),
        (torch.tensor([[0.2, 0.8]]).bfloat16(), torch.tensor([0]), ValueError, "look like probabilities"),
    ],
)
def test_unfit_data_are_refused(logits, labels, error, remedy):
    for fit in (fit_temperature, TemperatureScaling().fit):
        with pytest.raises(error, match=remedy):
            fit(logits, labels)


def test_logits_in_the_unit_interval_that_are_no_probabilities_are_taken():
    logits = torch.tensor([[0.2, 0.9], [0.6, 0.1]])
    assert check_fit_data(logits, torch.tensor([0, 1]))[0] is not None


def test_integer_logits_are_refused_in_forward():
    with pytest.raises(TypeError, match="raw outputs"):
        TemperatureScaling()(torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.skipif(not LOGITS.is_dir(), reason=f"the public logits are not in {LOGITS}")
@pytest.mark.parametrize(
    ("name", "uncalibrated", "scaled", "temperature"),
    [("densenet40", 21.08, 6.10, 3.090), ("wideresnet28", 9.11, 4.43, 1.665)],
)
def test_public_logits_give_the_published_errors(name, uncalibrated, scaled, temperature):
    data = np.load(LOGITS / f"sctl-{name}-cifar10-lt.npz")
    parts = (torch.from_numpy(data[key]) for key in ("logits_val", "labels_val", "logits_test", "labels_test"))
    logits_val, labels_val, logits, labels = parts
    calibrator = TemperatureScaling().fit(logits_val, labels_val)
    assert calibrator.temperature == pytest.approx(temperature, abs=5e-4)
    assert 100 * ece(logits, labels, input="logits").item() == pytest.approx(uncalibrated, abs=0.005)
    assert 100 * ece(calibrator(logits), labels, input="log_probs").item() == pytest.approx(scaled, abs=0.01)
