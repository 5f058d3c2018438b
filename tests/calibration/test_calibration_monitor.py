"""CalibrationMonitor: what only it can be asked. The promises of every callback are in tests/test_callbacks.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_plugins.calibration import ece, reliability_bins
from lightning_plugins.calibration._criteria import criterion_of
from lightning_plugins.calibration._monitoring import CalibrationSums, accuracy_bands
from lightning_plugins.callbacks import CalibrationMonitor, PostHocCalibration
from toys import TinyModule, make_trainer, toy_data

ALL = ("ece", "mce", "classwise_ece", "nll", "brier", "debiased_ece", "equal_mass_ece", "ks")


class Frozen(TinyModule):
    """Does not learn, so that one and two processes have the same net."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(toy_data(51, seed=1))


def expected(module: pl.LightningModule, loader: DataLoader[Any]) -> tuple[dict[str, float], Tensor, Tensor]:
    with torch.no_grad():
        pairs = [(module(inputs).log_softmax(1), labels) for inputs, labels in loader]
    log_probs, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    values = {name: criterion_of(log_probs, labels, name) for name in ALL if name != "mce"}
    values["mce"] = ece(log_probs, labels, norm="max", input="log_probs").item()
    return values, log_probs, labels


def test_all_metrics_are_those_of_all_samples_together(tmp_path):
    module = Frozen()
    trainer = make_trainer(tmp_path, 1, CalibrationMonitor(ALL))
    trainer.fit(module)
    trainer.test(module, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, value in expected(module, module.test_dataloader())[0].items():
        assert logged[f"test/calibration_{name}"] == pytest.approx(value, abs=1e-5), name
    trainer.validate(module, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, value in expected(module, module.val_dataloader())[0].items():
        assert logged[f"val/calibration_{name}"] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("by", ["label", "prediction", "function"])
def test_groups(tmp_path, by):
    def odd(batch: Any, labels: Tensor, predictions: Tensor) -> Tensor:
        return 2 * (batch[0][:, 0] > 0).long()  # there is no group 1

    arguments = {"group_fn": odd} if by == "function" else {"groups": by}
    module = Frozen()
    trainer = make_trainer(tmp_path, 1, CalibrationMonitor(["ece"], min_group_size=2, **arguments))
    trainer.validate(module, verbose=False)
    _, log_probs, labels = expected(module, module.val_dataloader())
    inputs = torch.cat([batch[0] for batch in module.val_dataloader()])
    groups = {"label": labels, "prediction": log_probs.argmax(1), "function": odd([inputs], labels, labels)}[by]
    errors = [
        ece(log_probs[groups == g], labels[groups == g], input="log_probs").item()
        for g in groups.unique()
        if (groups == g).sum() >= 2
    ]
    assert float(trainer.callback_metrics["val/calibration_group_ece_max"]) == pytest.approx(max(errors), abs=1e-6)
    assert float(trainer.callback_metrics["val/calibration_group_ece_mean"]) == pytest.approx(
        sum(errors) / len(errors), abs=1e-6
    )


def test_errors_that_cancel_are_seen_in_groups():
    sums = CalibrationSums()
    log_probs = torch.tensor([[0.75, 0.25]]).log().repeat(200, 1)
    labels = torch.zeros(200, dtype=torch.long)
    labels[100:150] = 1  # group 0 is always right, group 1 half of the time
    sums.update(log_probs, labels, torch.arange(200) // 100)
    assert sums.metrics()["ece"] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(sums.group_errors(), torch.tensor([0.25, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("first", [True, False])
def test_test_outputs_are_measured_as_the_module_returns_them_calibrated(tmp_path, first):
    monitor, calibration = CalibrationMonitor(["nll", "ks"]), PostHocCalibration()
    callbacks = [monitor, calibration] if first else [calibration, monitor]
    module = TinyModule()
    trainer = make_trainer(tmp_path, 4, *callbacks)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    metrics = trainer.callback_metrics
    assert float(metrics["test/calibration_nll"]) == pytest.approx(float(metrics["test/nll_after"]), rel=1e-5)
    assert float(metrics["test/calibration_nll"]) != pytest.approx(float(metrics["test/nll_before"]), rel=1e-4)
    assert "forward" not in vars(module)
    assert not module._forward_hooks


def test_no_second_forward_pass_and_a_logits_fn_of_ones_own(tmp_path):
    class Counting(Frozen):
        calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(inputs)

    module = Counting()
    trainer = make_trainer(tmp_path, 1, CalibrationMonitor())
    trainer.validate(module, verbose=False)
    assert module.calls == len(module.val_dataloader())
    monitor = CalibrationMonitor(["nll"], logits_fn=lambda module, inputs: torch.zeros(len(inputs), 3))
    trainer = make_trainer(tmp_path, 1, monitor)
    trainer.validate(module, verbose=False)
    assert float(trainer.callback_metrics["val/calibration_nll"]) == pytest.approx(torch.tensor(3.0).log().item())


def test_a_forward_without_logits_is_named(tmp_path):
    class Dictionary(Frozen):
        def forward(self, inputs: Tensor) -> Any:
            return {"logits": self.net(inputs)}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    module = Dictionary()
    with pytest.raises(MisconfigurationException, match="found dict; pass logits_fn"):
        make_trainer(tmp_path, 1, CalibrationMonitor()).validate(module, verbose=False)
    assert not module._forward_hooks


@pytest.mark.parametrize("bands", ["binomial", "bootstrap", None])
def test_a_diagram_for_every_epoch(tmp_path, bands):
    trainer = make_trainer(
        tmp_path,
        2,
        CalibrationMonitor(bands=bands),
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
    )
    trainer.fit(TinyModule())
    assert len(list((tmp_path / "media" / "val").glob("calibration_diagram*.png"))) == 2


def test_bands_hold_the_true_accuracy_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    for method in "binomial", "bootstrap":
        inside = []
        for _ in range(60):
            probs = torch.rand(600, generator=generator) / 2 + 0.5
            labels = (torch.rand(600, generator=generator) > probs).long()
            bins = reliability_bins(torch.stack([probs, 1 - probs], 1), labels, num_bins=5)
            low, high = accuracy_bands(bins, method, num_resamples=300)
            filled = bins.count > 50
            inside.append(((low <= bins.confidence) & (bins.confidence <= high))[filled].double())
        assert 0.9 < torch.cat(inside).mean() < 0.99
        assert low[:2].isnan().all()
        assert (low <= bins.accuracy)[filled].all()
        assert (bins.accuracy <= high)[filled].all()


def test_sums_do_not_depend_on_how_samples_come():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 4, generator=generator), torch.randint(4, (200,), generator=generator)
    log_probs = logits.log_softmax(1)
    whole, parts = CalibrationSums(), CalibrationSums()
    whole.update(log_probs, labels, labels)
    order = torch.randperm(200, generator=generator)
    for rows in order.split(33):
        parts.update(log_probs[rows], labels[rows], labels[rows])
    assert whole.metrics() == pytest.approx(parts.metrics(), abs=1e-9)
    torch.testing.assert_close(whole.group_errors(), parts.group_errors())
    assert whole.metrics()["nll"] == pytest.approx(F.nll_loss(log_probs, labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"metrics": ["ECE"]}, "metrics must be names of ece"),
        ({"metrics": "ece"}, "metrics must be names of ece"),
        ({"groups": "class"}, "or pass group_fn"),
        ({"groups": "label", "group_fn": lambda *_: 0}, "leave one of them out"),
        ({"bands": "normal"}, "bands must be"),
        ({"num_bins": 0}, "num_bins must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, remedy):
    with pytest.raises(ValueError, match=remedy):
        CalibrationMonitor(**arguments)


def test_groups_that_are_no_groups_are_refused(tmp_path):
    monitor = CalibrationMonitor(group_fn=lambda batch, labels, predictions: labels - 1)
    with pytest.raises(ValueError, match="group_fn must return integers from 0"):
        make_trainer(tmp_path, 1, monitor).validate(Frozen(), verbose=False)


class Saves(pl.Callback):
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        Path(trainer.default_root_dir, f"rank-{trainer.global_rank}.json").write_text(json.dumps(metrics))


@pytest.mark.processes
def test_two_processes_measure_what_one_does(tmp_path):
    # 51 samples: the sampler repeats one to make the shares equal
    monitors = [CalibrationMonitor(ALL, groups="prediction") for _ in range(2)]
    one = make_trainer(tmp_path, 1, monitors[0])
    one.fit(Frozen())
    make_trainer(tmp_path, 1, monitors[1], Saves(), strategy="ddp_fork", devices=2).fit(Frozen())
    for rank in (0, 1):
        metrics = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        names = [name for name in metrics if name.startswith("val/")]
        assert len(names) == len(ALL) + 2
        for name in names:
            assert metrics[name] == pytest.approx(float(one.callback_metrics[name]), abs=1e-6), name
