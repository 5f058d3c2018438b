"""PostHocCalibration: what only it can be asked. The promises of every callback are in tests/test_callbacks.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.calibration import CalibratorSelection, HCalibration, TemperatureScaling, ece
from lightning_plugins.callbacks import PostHocCalibration
from toys import TinyModule, TorchvisionModule, assert_same_weights, image_and_label, make_trainer, toy_data

pytestmark = pytest.mark.filterwarnings("ignore:.*temperature stopped at its bound")


class Noisy(TinyModule):
    """Labels that are partly random, so that the best temperature is well inside its bounds; 50 validation samples."""

    @staticmethod
    def noisy(n: int, seed: int) -> TensorDataset:
        inputs, labels = toy_data(n, seed=seed).tensors
        generator = torch.Generator().manual_seed(seed)
        flip = torch.rand(n, generator=generator) < 0.3
        return TensorDataset(inputs, torch.where(flip, torch.randint(3, (n,), generator=generator), labels))

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.noisy(64, 0))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.noisy(50, 1))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.noisy(41, 2))


def logits_of(module: pl.LightningModule, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    module.eval()
    with torch.no_grad():
        pairs = [(module(inputs), labels) for inputs, labels in loader]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def fit(folder: Path, epochs: int = 6, **arguments: Any) -> tuple[PostHocCalibration, Noisy, pl.Trainer]:
    callback, module = PostHocCalibration(), Noisy()
    trainer = make_trainer(folder, epochs, callback, **arguments)
    trainer.fit(module)
    return callback, module, trainer


def test_after_fit_the_temperature_is_that_of_the_final_weights(tmp_path):
    callback, module, trainer = fit(tmp_path)
    logits, labels = logits_of(module, module.val_dataloader())
    expected = TemperatureScaling().fit(logits, labels)
    assert 1.05 < expected.temperature < 50  # a trained, overconfident net
    assert callback.calibrator.temperature == pytest.approx(expected.temperature, rel=1e-6)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["calibration/nll_before"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["calibration/nll_after"] == pytest.approx(F.nll_loss(expected(logits), labels).item(), rel=1e-5)
    assert metrics["calibration/nll_after"] < metrics["calibration/nll_before"]
    assert metrics["calibration/ece_before"] == pytest.approx(ece(logits.softmax(1), labels).item(), abs=1e-6)
    assert metrics["calibration/ece_after"] == pytest.approx(ece(expected(logits).exp(), labels).item(), abs=1e-6)
    assert metrics["calibration/temperature"] == pytest.approx(expected.temperature, rel=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"check_val_every_n_epoch": 4},
        {"max_steps": 10, "val_check_interval": 4},
        {"check_val_every_n_epoch": 4, "limit_val_batches": 2},
    ],
)
def test_weights_that_were_not_validated_last_are_calibrated_after_training(tmp_path, arguments):
    callback, module, trainer = fit(tmp_path, **arguments)
    batches = list(module.val_dataloader())[: arguments.get("limit_val_batches")]
    expected = TemperatureScaling().fit(*logits_of(module, batches))
    assert callback.calibrator.temperature == pytest.approx(expected.temperature, rel=1e-6)
    assert callback.fitted_at_step == trainer.global_step


def test_test_and_predict_are_calibrated_and_validation_is_not(tmp_path):
    callback, module, trainer = fit(tmp_path)
    logits, labels = logits_of(module, module.test_dataloader())
    calibrated = callback.calibrator(logits)
    trainer.test(module, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["test_loss"] == pytest.approx(F.nll_loss(calibrated, labels).item(), rel=1e-5)  # the module's own
    assert metrics["test/nll_after"] == pytest.approx(metrics["test_loss"], rel=1e-5)
    assert metrics["test/nll_before"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["test/ece_before"] == pytest.approx(ece(logits.softmax(1), labels).item(), abs=1e-6)
    assert metrics["test/ece_after"] == pytest.approx(ece(calibrated.exp(), labels).item(), abs=1e-6)
    predictions = torch.cat(trainer.predict(module, module.test_dataloader()))
    torch.testing.assert_close(predictions, calibrated)
    trainer.validate(module, verbose=False)
    validation, targets = logits_of(module, module.val_dataloader())
    expected = F.cross_entropy(validation, targets).item()
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(expected, rel=1e-5)


def test_calibrate_outputs_false_only_measures(tmp_path):
    callback, module = PostHocCalibration(calibrate_outputs=False), Noisy()
    trainer = make_trainer(tmp_path, 4, callback)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["test_loss"] == pytest.approx(metrics["test/nll_before"], rel=1e-5)
    assert metrics["test/nll_after"] != pytest.approx(metrics["test/nll_before"], rel=1e-3)
    logits, _ = logits_of(module, module.test_dataloader())
    torch.testing.assert_close(torch.cat(trainer.predict(module, module.test_dataloader())), logits)


def test_every_checkpoint_holds_the_temperature_of_its_weights(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback, module = PostHocCalibration(), Noisy()
    make_trainer(tmp_path, 3, callback, checkpoint, enable_checkpointing=True).fit(module)
    temperatures = []
    for path in sorted(tmp_path.glob("epoch*.ckpt")):
        saved = Noisy.load_from_checkpoint(path, weights_only=True)
        expected = TemperatureScaling().fit(*logits_of(saved, saved.val_dataloader())).temperature
        fresh = PostHocCalibration()
        make_trainer(tmp_path, 1, fresh).test(Noisy(), ckpt_path=path, weights_only=True, verbose=False)
        assert fresh.calibrator.temperature == pytest.approx(expected, rel=1e-6)
        temperatures.append(expected)
    assert len(set(temperatures)) == 3
    assert callback.calibrator.temperature == pytest.approx(temperatures[-1], rel=1e-6)


def test_validate_fits_on_demand_on_any_loader(tmp_path):
    callback, module = PostHocCalibration(), Noisy()
    trainer = make_trainer(tmp_path, 1, callback)
    held_out = DataLoader(Noisy.noisy(30, 5), batch_size=8)
    trainer.validate(module, held_out, verbose=False)
    expected = TemperatureScaling().fit(*logits_of(module, held_out))
    assert callback.calibrator.temperature == pytest.approx(expected.temperature, rel=1e-6)


def test_nothing_fitted_is_said_before_test_and_predict(tmp_path):
    trainer = make_trainer(tmp_path, 1, PostHocCalibration())
    with pytest.raises(MisconfigurationException, match=r"run trainer.fit or trainer.validate before"):
        trainer.test(Noisy(), verbose=False)
    with pytest.raises(MisconfigurationException, match=r"for predict; run trainer.fit"):
        trainer.predict(Noisy())
    with pytest.raises(RuntimeError, match=r"run trainer.fit or trainer.validate first"):
        PostHocCalibration().calibrated_module()


def test_logits_are_taken_from_validation_without_a_second_forward_pass(tmp_path):
    class Counting(Noisy):
        calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += not self.training
            return super().forward(inputs)

    module = Counting()
    make_trainer(tmp_path, 1, PostHocCalibration()).fit(module)
    assert module.calls == len(module.val_dataloader())


def test_a_step_that_preprocesses_is_calibrated_on_what_it_computed(tmp_path):
    class Preprocessing(Noisy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(2 * batch[0]), batch[1]))

    callback, module = PostHocCalibration(), Preprocessing()
    make_trainer(tmp_path, 4, callback).fit(module)
    loader = [(2 * inputs, labels) for inputs, labels in module.val_dataloader()]
    expected = TemperatureScaling().fit(*logits_of(module, loader))
    assert callback.calibrator.temperature == pytest.approx(expected.temperature, rel=1e-6)


def test_several_forward_calls_and_a_logits_fn_of_the_users_own(tmp_path):
    class TwoViews(Noisy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0] + 1)
            super().validation_step(batch, batch_idx)

    for arguments, factor in ({}, 1.0), ({"logits_fn": lambda module, inputs: 3 * module.net(inputs)}, 3.0):
        callback, module = PostHocCalibration(**arguments), TwoViews()
        make_trainer(tmp_path, 4, callback).fit(module)
        logits, labels = logits_of(module, module.val_dataloader())
        expected = TemperatureScaling().fit(factor * logits, labels)
        assert callback.calibrator.temperature == pytest.approx(expected.temperature, rel=1e-6)


def test_one_of_several_validation_loaders(tmp_path):
    class TwoLoaders(Noisy):
        def val_dataloader(self) -> list[DataLoader[Any]]:
            return [self.loader(self.noisy(20, 7)), self.loader(self.noisy(40, 8))]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    callback, module = PostHocCalibration(dataloader_idx=1), TwoLoaders()
    make_trainer(tmp_path, 4, callback).fit(module)
    expected = TemperatureScaling().fit(*logits_of(module, module.val_dataloader()[1]))
    assert callback.calibrator.temperature == pytest.approx(expected.temperature, rel=1e-6)


def test_the_deployed_module_stands_alone_and_exports(tmp_path):
    callback, module, _ = fit(tmp_path)
    deployed = callback.calibrated_module()
    inputs = torch.randn(5, 8)
    module.eval()
    torch.testing.assert_close(deployed(inputs), callback.calibrator(module(inputs)))
    torch.testing.assert_close(deployed(inputs).exp().sum(1), torch.ones(5))
    expected = deployed(inputs)
    program = torch.export.export(deployed, (inputs,))
    torch.testing.assert_close(program.module()(inputs), expected)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    torch.testing.assert_close(deployed(inputs), expected)


def test_the_deployed_module_runs_in_onnxruntime(tmp_path):
    import onnxruntime

    callback, _, _ = fit(tmp_path, 2)
    deployed, inputs = callback.calibrated_module(), torch.randn(5, 8)
    torch.onnx.export(deployed, (inputs,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), deployed(inputs), rtol=1e-4, atol=1e-5)


def test_export_writes_what_others_can_read(tmp_path):
    assert PostHocCalibration().export(tmp_path / "nothing") == []
    callback, _, _ = fit(tmp_path, 2)
    files = callback.export(tmp_path / "exports")
    assert sorted(path.name for path in files) == ["calibration.json", "calibrator.safetensors"]
    fresh = TemperatureScaling()
    fresh.load_state_dict(load_file(tmp_path / "exports" / "calibrator.safetensors"))
    assert fresh.temperature == pytest.approx(callback.calibrator.temperature)
    info = json.loads((tmp_path / "exports" / "calibration.json").read_text())
    assert info["quantities"]["temperature"] == pytest.approx(callback.calibrator.temperature)


def test_reliability_diagrams_reach_files_and_tensorboard(tmp_path):
    callback, module = PostHocCalibration(), Noisy()
    loggers = [CSVLogger(tmp_path, name="", version=""), TensorBoardLogger(tmp_path, name="", version="tb")]
    trainer = make_trainer(tmp_path, 2, callback, logger=loggers, log_every_n_steps=1)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    assert list((tmp_path / "media" / "calibration").glob("reliability*.png"))
    assert list((tmp_path / "media" / "test").glob("reliability*.png"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"calibration/reliability", "test/reliability"} <= set(events.Tags()["images"])
    assert {"calibration/ece_after", "test/nll_before"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("fault", ["step", "callback"])
def test_forward_comes_back_after_an_exception(tmp_path, fault):
    class Breaks(Noisy):
        broken = False

        def test_step(self, batch: Any, batch_idx: int) -> None:
            super().test_step(batch, batch_idx)
            if self.broken:
                raise ValueError("boom")

    callback, module = PostHocCalibration(), Breaks()
    trainer = make_trainer(tmp_path, 1, callback)
    trainer.fit(module)
    if fault == "step":
        module.broken = True
    else:
        callback.batch_fn = lambda batch: (_ for _ in ()).throw(ValueError("boom"))
    with pytest.raises(ValueError, match="boom"):
        trainer.test(module, verbose=False)
    assert "forward" not in vars(module)


def test_a_forward_that_returns_no_logits_is_named(tmp_path):
    class Dictionary(Noisy):
        def forward(self, inputs: Tensor) -> Any:
            return {"logits": self.net(inputs)}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0])["logits"], batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    def logits_fn(module: Any, inputs: Tensor) -> Tensor:
        return module.net(inputs)

    module = Dictionary()
    trainer = make_trainer(tmp_path, 1, PostHocCalibration(logits_fn=logits_fn))
    trainer.fit(module)
    with pytest.raises(MisconfigurationException, match="found dict; set calibrate_outputs=False"):
        trainer.test(module, verbose=False)
    trainer = make_trainer(tmp_path, 1, PostHocCalibration(logits_fn=logits_fn, calibrate_outputs=False))
    trainer.fit(module)
    trainer.test(module, verbose=False)


def test_networks_called_past_forward_fall_back_to_a_forward_pass(tmp_path):
    callback, module = PostHocCalibration(batch_fn=image_and_label), TorchvisionModule()
    make_trainer(tmp_path, 1, callback).fit(module)
    module.eval()
    with torch.no_grad():
        pairs = [(module(batch["image"]), batch["label"]) for batch in module.val_dataloader()]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    expected = TemperatureScaling().fit(logits, labels)
    assert callback.calibrator.temperature == pytest.approx(expected.temperature, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "remedy"),
    [
        ({"calibrator": "temperature"}, TypeError, r"such as TemperatureScaling\(\)"),
        ({"calibrator": []}, ValueError, "at least 2 to choose from"),
        ({"calibrator": ["temperature", "vector"]}, TypeError, r"such as TemperatureScaling\(\)"),
        ({"when": "never"}, ValueError, "when must be 'validation' or 'fit_end', got 'never'"),
        ({"num_bins": 0}, ValueError, "num_bins must be at least 1, got 0"),
        ({"dataloader_idx": -1}, ValueError, "dataloader_idx must be at least 0, got -1"),
    ],
)
def test_wrong_arguments(arguments, error, remedy):
    with pytest.raises(error, match=remedy):
        PostHocCalibration(**arguments)


def test_missing_and_empty_validation_data_are_answered_before_training(tmp_path):
    class Empty(Noisy):
        def val_dataloader(self) -> DataLoader[Any]:
            return self.loader(TensorDataset(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)))

    class NoStep(Noisy):
        validation_step = pl.LightningModule.validation_step

    class Absent(Noisy):
        val_dataloader = pl.LightningModule.val_dataloader

    for module in Empty(), NoStep(), Absent():
        with pytest.raises(MisconfigurationException, match="validation"):
            make_trainer(tmp_path, 1, PostHocCalibration()).fit(module)
        assert module.trainer.global_step == 0
    with pytest.raises(MisconfigurationException, match="loader 3 is empty or absent"):
        make_trainer(tmp_path, 1, PostHocCalibration(dataloader_idx=3)).fit(Noisy())


def test_logits_that_are_not_finite_stop_with_a_sentence(tmp_path):
    class Diverged(Noisy):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * float("nan")

    with pytest.raises(ValueError, match="logits must be finite"):
        make_trainer(tmp_path, 1, PostHocCalibration()).validate(Diverged(), verbose=False)


class Saves(pl.Callback):
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callback = next(c for c in trainer.callbacks if isinstance(c, PostHocCalibration))
        result = {"temperature": callback.calibrator.temperature, "nll": callback.calibrator.fit_info["nll_before"]}
        Path(trainer.default_root_dir, f"rank-{trainer.global_rank}.json").write_text(json.dumps(result))


@pytest.mark.processes
@pytest.mark.parametrize("n_val", [50, 51])  # 51: the sampler repeats one sample to make the shares equal
def test_two_processes_find_the_temperature_of_one(tmp_path, n_val):
    class Frozen(Noisy):
        """Does not learn, so that one and two processes have the same net."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def val_dataloader(self) -> DataLoader[Any]:
            return self.loader(self.noisy(n_val, 1))

    module = Frozen()
    expected = TemperatureScaling().fit(*logits_of(module, module.val_dataloader()))
    trainer = make_trainer(tmp_path, 1, PostHocCalibration(), Saves(), strategy="ddp_fork", devices=2)
    trainer.fit(Frozen())
    results = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    assert results[0]["temperature"] == pytest.approx(expected.temperature, rel=1e-6)
    assert results[0]["nll"] == pytest.approx(expected.fit_info["nll_before"], rel=1e-6)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    callback, module, trainer = fit(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    again, other = PostHocCalibration(), Noisy()
    make_trainer(tmp_path, 2, again).fit(other, ckpt_path=tmp_path / "done.ckpt", weights_only=True)
    assert_same_weights(module, other)
    assert again.calibrator.temperature == callback.calibrator.temperature


class CountsFits(TemperatureScaling):
    fits = 0

    def _fit(self, logits: Tensor, labels: Tensor) -> Any:
        self.fits += 1
        return super()._fit(logits, labels)


def test_a_slow_calibrator_is_fitted_once_after_training_and_on_validate(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback, module = PostHocCalibration(CountsFits(), when="fit_end"), Noisy()
    trainer = make_trainer(tmp_path, 3, callback, checkpoint, enable_checkpointing=True)
    trainer.fit(module)
    assert callback.calibrator.fits == 1
    assert callback.fitted_at_step == trainer.global_step
    expected = TemperatureScaling().fit(*logits_of(module, module.val_dataloader()))
    assert callback.calibrator.temperature == pytest.approx(expected.temperature, rel=1e-6)
    early = PostHocCalibration(when="fit_end")
    path = sorted(tmp_path.glob("epoch=0*.ckpt"))[0]
    with pytest.raises(MisconfigurationException, match="no fitted calibrator"):
        make_trainer(tmp_path, 1, early).test(Noisy(), ckpt_path=path, weights_only=True, verbose=False)
    trainer.validate(module, verbose=False)
    assert callback.calibrator.fits == 2
    assert "calibration/temperature" in trainer.callback_metrics


def test_a_run_that_goes_on_drops_the_calibrator_of_earlier_weights(tmp_path):
    callback, module = PostHocCalibration(when="fit_end"), Noisy()
    trainer = make_trainer(tmp_path, 1, callback)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    class Looks(pl.Callback):
        states: list[dict[str, Any]] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.states.append(trainer.callbacks[0].state_dict())

    again = PostHocCalibration(when="fit_end")
    make_trainer(tmp_path, 2, again, Looks()).fit(Noisy(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert Looks.states == [{}]
    assert again.is_fitted


@pytest.mark.filterwarnings("ignore:.*HCalibration")
def test_of_a_list_the_best_by_cross_validation_is_used_and_logged(tmp_path):
    candidates = [HCalibration(max_epochs=20), TemperatureScaling()]
    callback, module = PostHocCalibration(candidates, when="fit_end"), Noisy()
    trainer = make_trainer(tmp_path, 3, callback, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    trainer.fit(module)
    selection = callback.calibrator
    assert isinstance(selection, CalibratorSelection)
    expected = CalibratorSelection([HCalibration(max_epochs=20), TemperatureScaling()])
    expected.fit(*logits_of(module, module.val_dataloader()))
    assert selection.scores() == pytest.approx(expected.scores(), rel=1e-6)
    assert selection.chosen == expected.chosen
    (table,) = (tmp_path / "media" / "calibration").glob("selection*")
    assert "HCalibration" in table.read_text()
    callback.export(tmp_path / "exports")
    assert json.loads((tmp_path / "exports" / "calibration.json").read_text())["chosen"] == selection.chosen
    trainer.validate(module, verbose=False)
    assert float(trainer.callback_metrics["calibration/chosen"]) == selection._index
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    fresh = PostHocCalibration([HCalibration(), TemperatureScaling()], when="fit_end")
    make_trainer(tmp_path, 1, fresh).test(Noisy(), ckpt_path=tmp_path / "done.ckpt", weights_only=True, verbose=False)
    assert fresh.calibrator.chosen == selection.chosen


def test_a_list_of_one_is_that_one():
    one = TemperatureScaling()
    assert PostHocCalibration([one]).calibrator is one


def test_a_fit_without_any_validation_keeps_the_training(tmp_path):
    callback, module = PostHocCalibration(), Noisy()
    trainer = make_trainer(tmp_path, 1, callback, check_val_every_n_epoch=5)
    with pytest.warns(UserWarning, match="no validation ran; lower check_val_every_n_epoch"):
        trainer.fit(module)
    assert not callback.is_fitted
    trainer.validate(module, verbose=False)
    assert callback.is_fitted
