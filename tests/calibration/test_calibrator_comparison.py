"""CalibratorComparison: what only it can be asked. The promises of every callback are in tests/test_callbacks.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_plugins.calibration import (
    Calibrator,
    CalibratorSelection,
    TemperatureScaling,
    VectorScaling,
    calibration_report,
)
from lightning_plugins.calibration import _comparison as comparison
from lightning_plugins.callbacks import CalibratorComparison, PostHocCalibration
from toys import TinyModule, make_trainer, toy_data


class Frozen(TinyModule):
    """Does not learn, so that one and two processes have the same net; overconfident."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 4 * inputs[:, :3] + 0 * self.net(inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(toy_data(51, seed=1))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(toy_data(45, seed=2))


class Data(pl.LightningDataModule):
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(toy_data(51, seed=1), batch_size=16)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(toy_data(45, seed=2), batch_size=16)


def few(**arguments: Any) -> CalibratorComparison:
    return CalibratorComparison([TemperatureScaling(), VectorScaling()], num_bootstrap=3, **arguments)


def outputs(module: pl.LightningModule, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        pairs = [(module(inputs), labels) for inputs, labels in loader]
    return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))


def expected(module: pl.LightningModule) -> dict[str, float]:
    """What a few lines of plain code say about temperature scaling."""
    logits, labels = outputs(module, module.test_dataloader())
    calibrator = TemperatureScaling().fit(*outputs(module, module.val_dataloader()))
    report = calibration_report(calibrator(logits), labels, input="log_probs", num_bootstrap=0)
    return {name: estimate.value for name, estimate in report.items()}


@pytest.mark.parametrize("way", ["fit", "validate", "bare test", "bare test of a data module"])
def test_the_numbers_are_those_of_plain_code(tmp_path, way):
    module, callback = Frozen(), few()
    trainer = make_trainer(tmp_path, 1, callback)
    if way == "fit":
        trainer.fit(module)
    elif way == "validate":
        trainer.validate(module, verbose=False)
    data = {"datamodule": Data()} if way.endswith("module") else {}
    trainer.test(module, verbose=False, **data)
    measured = callback.results["TemperatureScaling"]["metrics"]
    assert list(callback.results) == ["uncalibrated", "TemperatureScaling", "VectorScaling"]
    assert tuple(measured) == comparison.REPORTED
    for name, value in expected(module).items():
        if name in measured:
            assert measured[name]["value"] == pytest.approx(value, abs=1e-6), name
    for name in ("nll", "ece"):
        logged = trainer.callback_metrics[f"test/{name}/TemperatureScaling"]
        assert logged == pytest.approx(measured[name]["value"], abs=1e-6)


def test_fits_follow_the_weights(tmp_path):
    callback = few()
    trainer = make_trainer(tmp_path, 1, callback)
    module = TinyModule()
    trainer.fit(module)
    trainer.test(module, verbose=False)
    first = callback.results["TemperatureScaling"]["quantities"]["temperature"]
    longer = TinyModule()
    trainer = make_trainer(tmp_path, 4, callback)
    trainer.fit(longer)
    trainer.test(longer, verbose=False)
    assert callback.results["TemperatureScaling"]["quantities"]["temperature"] != first
    assert callback.results["TemperatureScaling"]["metrics"]["nll"]["value"] == pytest.approx(
        expected(longer)["nll"], abs=1e-6
    )


@pytest.mark.parametrize("order", [0, 1])
def test_a_calibrated_forward_is_not_calibrated_again(tmp_path, order):
    callbacks = [few(), PostHocCalibration()]
    trainer = make_trainer(tmp_path, 1, *(callbacks if order else callbacks[::-1]))
    module = Frozen()
    trainer.fit(module)
    trainer.test(module, verbose=False)
    logits, labels = outputs(module, module.test_dataloader())
    raw = torch.nn.functional.cross_entropy(logits, labels).item()
    assert callbacks[0].results["uncalibrated"]["metrics"]["nll"]["value"] == pytest.approx(raw, abs=1e-6)
    assert "forward" not in vars(module)


def test_what_cannot_be_fitted_stays_in_the_table_with_the_reason(tmp_path):
    greedy = CalibratorSelection([TemperatureScaling(), VectorScaling()], num_folds=100)
    callback = CalibratorComparison({"T": TemperatureScaling(), "h": greedy}, num_bootstrap=0)
    trainer = make_trainer(tmp_path, 1, callback)
    with pytest.warns(UserWarning, match="goes on without h: 100 folds"):
        trainer.validate(Frozen(), verbose=False)
    trainer.test(Frozen(), verbose=False)
    assert callback.results["h"]["metrics"] == {}
    assert "lower num_folds" in callback.results["h"]["failure"]
    assert callback.results["T"]["failure"] is None
    assert "test/nll/h" not in trainer.callback_metrics
    columns, rows = comparison.table_of(callback._contestants, ["nll"])
    assert [len(row) for row in rows] == [len(columns)] * 3
    assert rows[2][-1].startswith("not fitted: ")


def test_without_validation_data_it_says_so_and_compares_nothing(tmp_path):
    class NoValidation(Frozen):
        val_dataloader = pl.LightningModule.val_dataloader

    callback = few()
    trainer = make_trainer(tmp_path, 1, callback)
    with pytest.warns(UserWarning, match="run trainer.fit or trainer.validate before"):
        trainer.test(NoValidation(), verbose=False)
    assert callback.results == {}
    assert callback.export(tmp_path) == []


def test_table_figure_and_file(tmp_path):
    callback = few(metrics=["ece", "accuracy"])
    trainer = make_trainer(tmp_path, 1, callback, logger=CSVLogger(tmp_path, name="", version=""))
    trainer.fit(Frozen())
    trainer.test(Frozen(), verbose=False)
    lines = (tmp_path / "media/test/calibrators-step_00000004.csv").read_text().splitlines()
    assert lines[0].startswith("calibrator,ece,ece_low,ece_high,accuracy,")
    assert [line.split(",")[0] for line in lines[1:]] == ["uncalibrated", "TemperatureScaling", "VectorScaling"]
    assert (tmp_path / "media/test/calibrators-step_00000004.png").stat().st_size > 10_000
    (path,) = callback.export(tmp_path / "exports")
    report = json.loads(path.read_text())
    assert (report["calibration_samples"], report["test_samples"]) == (51, 45)
    assert report["calibrators"] == callback.results
    assert report["best"]["accuracy"] in callback.results
    assert report["calibrators"]["TemperatureScaling"]["predictions_kept"] == 1
    assert report["calibrators"]["uncalibrated"]["metrics"]["ece"]["low"] is not None


def test_all_calibrators_are_there_and_named():
    import lightning_plugins.calibration as public

    offered = {name for name in public.__all__ if isinstance(getattr(public, name), type)}
    offered = {name for name in offered if issubclass(getattr(public, name), Calibrator)}
    compared = {type(calibrator).__name__ for calibrator in comparison.all_calibrators().values()}
    assert compared == offered - {"Calibrator", "CalibratorSelection"}
    assert CalibratorComparison().calibrators == tuple(comparison.all_calibrators())


def test_every_calibrator_survives_a_few_dozen_samples():
    logits, labels = outputs(Frozen(), Frozen().loader(toy_data(90)))
    contestants = comparison.fit_all(comparison.all_calibrators(), logits, labels)
    comparison.evaluate(contestants, logits, labels, num_bootstrap=0)
    assert [c.name for c in contestants if c.failure] == []
    for contestant in contestants:
        assert json.loads(json.dumps(contestant.plain(), allow_nan=False))["metrics"]["nll"]["value"] is not None
        if contestant.calibrator is not None and contestant.calibrator.preserves_ranking:
            assert contestant.kept == 1, contestant.name
    order = comparison.ranked(contestants, "accuracy")
    values = [contestant.estimates["accuracy"].value for contestant in order]
    assert values == sorted(values, reverse=True)
    values = [contestant.estimates["nll"].value for contestant in comparison.ranked(contestants, "nll")]
    assert values == sorted(values)


def test_wrong_arguments():
    for arguments, words in (
        ({"metrics": ["ece", "f1"]}, "metrics must be names of nll"),
        ({"metrics": "ece"}, "metrics must be names of nll"),
        ({"metrics": []}, "metrics must be names of nll"),
        ({"num_bins": 0}, "num_bins must be at least 1"),
        ({"num_bootstrap": 1}, "at least 2, or 0 for no intervals"),
        ({"dataloader_idx": -1}, "dataloader_idx must be at least 0"),
        ({"calibrators": []}, "at least one, or be None"),
        ({"calibrators": {"uncalibrated": TemperatureScaling()}}, "choose another"),
    ):
        with pytest.raises(ValueError, match=words):
            CalibratorComparison(**arguments)
    with pytest.raises(TypeError, match="must be Calibrator objects such as"):
        CalibratorComparison([torch.nn.Identity()])


def test_a_module_without_logits_is_told_what_to_pass(tmp_path):
    class Tuples(Frozen):
        def forward(self, inputs: Tensor) -> Any:
            return super().forward(inputs), None

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

        validation_step = test_step

    with pytest.raises(MisconfigurationException, match="found tuple; pass logits_fn"):
        make_trainer(tmp_path, 1, few()).validate(Tuples(), verbose=False)
    callback = few(logits_fn=lambda module, inputs: module(inputs)[0])
    trainer = make_trainer(tmp_path, 1, callback)
    trainer.test(Tuples(), verbose=False)
    assert callback.results


class Writes(pl.Callback):
    """Brings results back from the processes."""

    def __init__(self, comparison: CalibratorComparison) -> None:
        self.comparison = comparison

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(trainer.default_root_dir, f"rank-{trainer.global_rank}.json")
        metrics = {name: result["metrics"] for name, result in self.comparison.results.items()}
        path.write_text(json.dumps(metrics))


@pytest.mark.processes
def test_two_processes_give_what_one_gives(tmp_path):
    found = []
    for arguments in ({}, {"strategy": "ddp_fork", "devices": 2}):
        callback, module = few(), Frozen()
        trainer = make_trainer(tmp_path, 1, callback, Writes(callback), **arguments)
        trainer.validate(module, verbose=False) if not arguments else None
        trainer.test(module, verbose=False)
        found += [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank-*.json"))]
    one, first, second = found
    assert first == second
    for name, metrics in one.items():
        for metric, estimate in metrics.items():
            assert first[name][metric]["value"] == pytest.approx(estimate["value"], abs=1e-6), (name, metric)
