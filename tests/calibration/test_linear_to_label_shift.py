"""What every post-hoc calibrator with a table row here promises."""

from __future__ import annotations

import copy
import inspect
import json
import typing

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_plugins.calibration import CalibratedModule, Calibrator, TemperatureScaling
from lightning_plugins.calibration.binning import (
    BayesianBinning,
    HistogramBinning,
    PlattBinning,
    TopLabelHistogramBinning,
)
from lightning_plugins.calibration.ensemble_temperature import EnsembleTemperatureScaling
from lightning_plugins.calibration.isotonic import IsotonicCalibration
from lightning_plugins.calibration.label_shift import PriorCorrectedTemperature
from lightning_plugins.calibration.linear import DirichletCalibration, MatrixScaling, VectorScaling
from lightning_plugins.calibration.spline import SplineCalibration

pytestmark = pytest.mark.filterwarnings("ignore:.*(raised the negative log-likelihood|stopped before it converged)")

ROWS = {
    "temperature": lambda: TemperatureScaling(loss="brier", smooth=True),
    "ensemble": EnsembleTemperatureScaling,
    "vector": VectorScaling,
    "matrix": MatrixScaling,
    "dirichlet": lambda: DirichletCalibration(off_diagonal_grid=(10.0,), bias_grid=(1.0,), num_folds=3),
    "histogram_width": HistogramBinning,
    "histogram_mass": lambda: HistogramBinning(binning="mass"),
    "platt": PlattBinning,
    "platt_vector": lambda: PlattBinning(scaling="vector"),
    "bayesian": BayesianBinning,
    "top_label": TopLabelHistogramBinning,
    "isotonic": IsotonicCalibration,
    "isotonic_multiclass": lambda: IsotonicCalibration("multiclass"),
    "spline": SplineCalibration,
    "prior": PriorCorrectedTemperature,
}
EVERY = pytest.mark.parametrize("name", ROWS)


def sample(n: int = 120, num_classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return 3 * logits, labels


@EVERY
@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [(2, torch.float32), (2, torch.bfloat16), (4, torch.float64), (5, torch.float16), (100, torch.bfloat16)],
)
def test_gives_finite_log_probabilities_of_any_type_and_size(name, num_classes, dtype):
    logits, labels = sample(300, num_classes)
    calibrator = ROWS[name]().fit(logits.to(dtype), labels)
    fresh = sample(50, num_classes, seed=1)[0].to(dtype)
    log_probs = calibrator(fresh)
    assert log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert log_probs.isfinite().all()
    assert log_probs.exp().sum(1).tolist() == pytest.approx([1] * 50, abs=1e-4)
    assert torch.allclose(calibrator(fresh[:1]), log_probs[:1], atol=1e-5)
    assert torch.allclose(calibrator(fresh[0]), log_probs[0], atol=1e-5)
    assert torch.allclose(calibrator(fresh.view(5, 10, num_classes)), log_probs.view(5, 10, num_classes), atol=1e-5)
    if calibrator.preserves_ranking and dtype != torch.float16:
        assert torch.equal(log_probs.argmax(1), fresh.argmax(1))
    assert all(isinstance(value, float) for value in calibrator.quantities().values())
    assert {type(value) for value in calibrator.fit_info.values()} <= {int, float, bool}
    json.dumps(calibrator.fit_info)


@EVERY
def test_is_the_identity_before_a_fit(name):
    logits, _ = sample(20)
    calibrator = ROWS[name]()
    assert not calibrator.is_fitted
    assert torch.allclose(calibrator(logits), logits.log_softmax(1), atol=1e-6)
    assert all(isinstance(value, float) for value in calibrator.quantities().values())


@EVERY
def test_a_state_goes_into_a_calibrator_of_any_past(name, tmp_path):
    logits, labels = sample()
    fitted = ROWS[name]().fit(logits, labels)
    torch.save(fitted.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for loaded in (ROWS[name](), ROWS[name]().fit(*sample(300, 7))):
        loaded.load_state_dict(state)
        assert loaded.is_fitted
        assert torch.equal(loaded(logits), fitted(logits))
    assert torch.equal(copy.deepcopy(fitted)(logits), fitted(logits))
    with torch.device("meta"):
        assigned = ROWS[name]()
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(logits), fitted(logits))


@EVERY
def test_refits_are_as_fits_and_touch_nothing_else(name):
    logits, labels = sample()
    before, state = (logits.clone(), labels.clone()), torch.get_rng_state()
    first = ROWS[name]().fit(logits, labels)
    second = ROWS[name]().fit(*sample(300, 7)).fit(logits, labels)
    assert torch.equal(first(logits), second(logits))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
    with torch.inference_mode():
        third = ROWS[name]().fit(logits.clone(), labels.clone())
    assert torch.equal(third(logits), first(logits))
    assert not any(buffer.is_inference() or buffer.requires_grad for buffer in third.buffers())


@EVERY
def test_a_failed_fit_leaves_the_state(name):
    logits, labels = sample()
    calibrator = ROWS[name]().fit(logits, labels)
    before = calibrator(logits)
    with pytest.raises(ValueError, match="finite"):
        calibrator.fit(logits * float("nan"), labels)
    assert torch.equal(calibrator(logits), before)


@EVERY
def test_a_model_in_half_precision_leaves_it_alone(name):
    logits, labels = sample()
    calibrator = ROWS[name]().fit(logits, labels)
    model = nn.Sequential(nn.Linear(2, 4), copy.deepcopy(calibrator)).to(torch.bfloat16)
    assert torch.equal(model[1](logits), calibrator(logits))


@EVERY
def test_exports_with_its_net(name):
    logits, labels = sample()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(4, 4)
    model = CalibratedModule(net, ROWS[name]().fit(logits, labels)).eval()
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch")
    program = torch.export.export(_Positional(model), (inputs,), dynamic_shapes=({0: batch},))
    for n in (2, 6):
        assert torch.allclose(program.module()(inputs[:n]), model(inputs[:n]), atol=1e-6)


class _Positional(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs)


@EVERY
def test_survives_a_lightning_checkpoint(name, tmp_path):
    class Calibrated(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.calibrator = ROWS[name]()

    module = Calibrated()
    logits, labels = sample()
    module.calibrator.fit(logits, labels)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Calibrated.load_from_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(loaded.calibrator(logits), module.calibrator(logits))


@pytest.mark.parametrize("kind", sorted({type(build()) for build in ROWS.values()}, key=lambda kind: kind.__name__))
def test_the_command_line_can_build_it(kind):
    assert issubclass(kind, Calibrator)
    hints = typing.get_type_hints(kind.__init__)
    for parameter in inspect.signature(kind).parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert parameter.name in hints


def test_a_buffer_of_fixed_size_still_refuses_another_one():
    with pytest.raises(RuntimeError, match="size mismatch"):
        TemperatureScaling().load_state_dict({"fitted": torch.tensor(True), "log_temperature": torch.zeros(3, 1)})
