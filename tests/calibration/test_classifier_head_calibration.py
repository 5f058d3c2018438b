"""ClassifierHeadCalibration: what only it can be asked. tests/test_callbacks.py has the promises of every callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.calibration import FeatureStatistics, TemperatureScaling, calibrate_head_, ece
from lightning_plugins.callbacks import ClassifierHeadCalibration, PostHocCalibration
from toys import TinyModule, assert_same_weights, make_trainer, toy_data, weights


class Imbalanced(TinyModule):
    """63 training samples, of which every tenth of class 2 is left."""

    def train_dataloader(self) -> DataLoader[Any]:
        inputs, labels = toy_data(120).tensors
        kept = (labels < 2) | (torch.arange(120) % 10 == 2)
        return DataLoader(TensorDataset(inputs[kept][:63], labels[kept][:63]), batch_size=8, shuffle=True)


def features_of(module: TinyModule, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module.net[:2](inputs)


def expected_head(module: TinyModule, before: dict[str, Tensor], **arguments: Any) -> torch.nn.Linear:
    statistics = FeatureStatistics(3, 16).update(*collected(module))
    head = torch.nn.Linear(16, 3)
    head.load_state_dict({name: before[f"net.2.{name}"] for name in ("weight", "bias")})
    calibrate_head_(head, statistics, **arguments)
    return head


def collected(module: TinyModule) -> tuple[Tensor, Tensor]:
    inputs, labels = module.train_dataloader().dataset.tensors
    return features_of(module, inputs), labels


def test_the_head_is_retrained_on_the_training_features_and_nothing_else_changes(tmp_path):
    plain, module = Imbalanced(), Imbalanced()
    torch.manual_seed(0)
    make_trainer(tmp_path, 3).fit(plain)
    torch.manual_seed(0)
    callback = ClassifierHeadCalibration(50)
    trainer = make_trainer(tmp_path, 3, callback)
    trainer.fit(module)
    before, after = weights(plain), weights(module)
    for name in ("net.0.weight", "net.0.bias"):
        assert torch.equal(before[name], after[name])
    head = expected_head(module, before, samples_per_class=50)
    torch.testing.assert_close(module.net[2].weight, head.weight)
    torch.testing.assert_close(module.net[2].bias, head.bias)
    assert callback.collected.counts.tolist() == torch.bincount(collected(module)[1]).tolist()
    metrics = trainer.callback_metrics
    for when, net in ("before", plain), ("after", module):
        inputs, labels = module.val_dataloader().dataset.tensors
        logits = net.net(inputs)
        assert metrics[f"calibration/head_acc_{when}"] == (logits.argmax(1) == labels).float().mean()
        torch.testing.assert_close(metrics[f"calibration/head_ece_{when}"], ece(logits, labels, input="logits"))
        nll = torch.nn.functional.cross_entropy(logits, labels)
        torch.testing.assert_close(metrics[f"calibration/head_nll_{when}"], nll.detach())
    assert metrics["calibration/head_loss_after"] < metrics["calibration/head_loss_before"]


def test_the_rare_class_is_found_more_often(tmp_path):
    torch.manual_seed(0)  # the order of the samples
    module = Imbalanced(n_val=300)
    trainer = make_trainer(tmp_path, 1, ClassifierHeadCalibration(learning_rate=0.05))
    trainer.fit(module)
    metrics = trainer.callback_metrics
    assert metrics["calibration/head_balanced_acc_after"] > metrics["calibration/head_balanced_acc_before"] + 0.05


@pytest.mark.parametrize("arguments", [{}, {"check_val_every_n_epoch": 5}, {"limit_val_batches": 0}, {"max_steps": 5}])
def test_checkpoints_of_the_last_epoch_hold_the_new_head(tmp_path, arguments):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callback, module = ClassifierHeadCalibration(20), Imbalanced()
    trainer = make_trainer(tmp_path, 2, callback, checkpoint, enable_checkpointing=True, **arguments)
    trainer.fit(module)
    newest = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert_same_weights(module, Imbalanced.load_from_checkpoint(newest, weights_only=True))
    assert callback.calibrated_at_step == trainer.global_step
    first = torch.load(min(tmp_path.glob("*.ckpt")), weights_only=True)
    assert arguments or not first["callbacks"].get("ClassifierHeadCalibration")


def test_an_early_stop_is_calibrated_once(tmp_path):
    class Counting(Imbalanced):
        def on_train_end(self) -> None:
            self.head = self.net[2].weight.detach().clone()

    for on_train_epoch_end in (False, True):
        stop = EarlyStopping("val_loss", min_delta=100, patience=1, check_on_train_epoch_end=on_train_epoch_end)
        callback, module = ClassifierHeadCalibration(20), Counting()
        trainer = make_trainer(tmp_path, 9, stop, callback)
        trainer.fit(module)
        assert trainer.current_epoch < 9
        assert callback.calibrated_at_step == trainer.global_step
        trained = {f"net.2.{name}": value for name, value in callback._trained.items()}
        head = expected_head(module, trained, samples_per_class=20)
        torch.testing.assert_close(module.net[2].weight, head.weight)


def test_training_goes_on_from_the_trained_head(tmp_path):
    straight, module = TinyModule(), TinyModule()
    make_trainer(tmp_path, 3).fit(straight)
    first = make_trainer(tmp_path, 1, ClassifierHeadCalibration(20))
    first.fit(module)
    first.save_checkpoint(tmp_path / "first.ckpt")
    callback, resumed = ClassifierHeadCalibration(20), TinyModule()
    make_trainer(tmp_path, 3, callback).fit(resumed, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert torch.equal(straight.net[0].weight, resumed.net[0].weight)
    assert torch.equal(straight.net[2].weight, callback._trained["weight"])
    # A new training of the same module by the same callback starts where the module is.
    head = resumed.net[2].weight.detach().clone()
    seen = []

    class Sees(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(pl_module.net[2].weight.detach().clone())

    make_trainer(tmp_path, 1, callback, Sees()).fit(resumed)
    assert torch.equal(seen[0], head)


def test_statistics_of_clients_from_files_and_objects(tmp_path):
    inputs, labels = toy_data(90, seed=4).tensors
    module = TinyModule()
    statistics = FeatureStatistics(3, 16).update(features_of(module, inputs), labels)
    one = FeatureStatistics(3, 16).update(features_of(module, inputs[:50]), labels[:50])
    two = FeatureStatistics(3, 16).update(features_of(module, inputs[50:]), labels[50:])
    path = str(one.save(tmp_path / "one.safetensors"))
    callback = ClassifierHeadCalibration(20, statistics=[path, two])

    class Still(TinyModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    net = Still()
    make_trainer(tmp_path, 1, callback).fit(net)
    head = torch.nn.Linear(16, 3)
    head.load_state_dict(module.net[2].state_dict())
    calibrate_head_(head, statistics, samples_per_class=20)
    torch.testing.assert_close(net.net[2].weight, head.weight)
    with pytest.raises(RuntimeError, match="use_training_data=True"):
        callback.save_statistics(tmp_path / "none")
    both = ClassifierHeadCalibration(20, statistics=[path, two], use_training_data=True)
    make_trainer(tmp_path, 1, both).fit(Still())
    saved = FeatureStatistics.load(both.save_statistics(tmp_path / "mine.safetensors"))
    assert saved.counts.sum() == 64


def test_a_client_without_some_classes_keeps_its_head_and_gives_its_statistics(tmp_path):
    class OneClass(TinyModule):
        def train_dataloader(self) -> DataLoader[Any]:
            inputs, labels = toy_data(60).tensors
            return self.loader(TensorDataset(inputs[labels == 1], labels[labels == 1]))

    callback, plain, module = ClassifierHeadCalibration(), OneClass(), OneClass()
    make_trainer(tmp_path, 1).fit(plain)
    with pytest.warns(UserWarning, match="statistics of clients, in which every class occurs"):
        make_trainer(tmp_path, 1, callback).fit(module)
    assert_same_weights(plain, module)
    assert callback.collected.counts.tolist() == [0, 20, 0]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("when", ["validation", "fit_end"])
def test_a_calibrator_is_fitted_to_the_new_head(tmp_path, order, when):
    calibration = PostHocCalibration(when=when)
    callbacks = [calibration, ClassifierHeadCalibration(20)][::order]
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    module = Imbalanced()
    make_trainer(tmp_path, 2, *callbacks, checkpoint, enable_checkpointing=True).fit(module)
    inputs, labels = module.val_dataloader().dataset.tensors
    expected = TemperatureScaling().fit(module(inputs).detach(), labels).temperature
    assert calibration.calibrator.temperature == pytest.approx(expected, rel=1e-5)
    if when == "validation":
        fresh = PostHocCalibration()
        make_trainer(tmp_path, 1, fresh).test(Imbalanced(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
        assert fresh.calibrator.temperature == pytest.approx(expected, rel=1e-5)


def test_behind_weight_averaging(tmp_path):
    averaging, callback = EMAWeightAveraging(decay=0.9), ClassifierHeadCalibration(20)
    with pytest.raises(MisconfigurationException, match="put ClassifierHeadCalibration behind it"):
        make_trainer(tmp_path, 1, callback, averaging).fit(TinyModule())
    module, plain = TinyModule(), TinyModule()
    make_trainer(tmp_path, 2, EMAWeightAveraging(decay=0.9)).fit(plain)
    make_trainer(tmp_path, 2, EMAWeightAveraging(decay=0.9), callback).fit(module)
    head = expected_head(module, weights(plain), samples_per_class=20)
    torch.testing.assert_close(module.net[2].weight, head.weight)


class Writes(pl.Callback):
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callback = next(c for c in trainer.callbacks if isinstance(c, ClassifierHeadCalibration))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "head" in name}
        state = callback.collected.state_dict(), weights(pl_module), metrics
        torch.save(state, f"{trainer.default_root_dir}/rank-{trainer.global_rank}.pt")


@pytest.mark.processes
def test_two_processes_collect_every_sample_once(tmp_path):
    trainer = make_trainer(
        tmp_path, 1, ClassifierHeadCalibration(20), Writes(), strategy="ddp_fork", devices=2, num_sanity_val_steps=0
    )
    trainer.fit(Imbalanced(n_val=33))
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same_weights(one[1], two[1])
    assert one[2] == two[2]
    module = Imbalanced(n_val=33)
    module.load_state_dict(one[1])
    expected = FeatureStatistics(3, 16).update(*collected(module)).state_dict()  # 63 samples, an odd number
    torch.testing.assert_close(one[0], expected, rtol=1e-6, atol=1e-5)
    inputs, labels = module.val_dataloader().dataset.tensors
    accuracy = (module(inputs).argmax(1) == labels).float().mean().item()
    assert one[2]["calibration/head_acc_after"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"samples_per_class": 0}, "samples_per_class must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"shrinkage": -0.1}, "shrinkage must lie in"),
        ({"power": 2.0}, "1 for the features as they are"),
        ({"statistics": "file"}, r"write \[statistics\]"),
        ({"use_training_data": False}, r"pass statistics=\[...\]"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        ClassifierHeadCalibration(**arguments)


def test_wrong_files_and_networks_are_refused_before_training(tmp_path):
    with pytest.raises(FileNotFoundError):
        make_trainer(tmp_path, 1, ClassifierHeadCalibration(statistics=[str(tmp_path / "absent")])).fit(TinyModule())
    other = FeatureStatistics(4, 16).update(torch.rand(8, 16), torch.arange(8) % 4)
    with pytest.raises(MisconfigurationException, match="collect them with the same network"):
        make_trainer(tmp_path, 1, ClassifierHeadCalibration(statistics=[other])).fit(TinyModule())


def test_the_toys_path(tmp_path: Path):
    """Without a logger, validation data or a second epoch."""
    make_trainer(tmp_path, 1, ClassifierHeadCalibration(5, num_epochs=1), limit_val_batches=0).fit(TinyModule())
