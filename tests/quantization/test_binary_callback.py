from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_plugins.callbacks.quantization.binary_qat import BinaryQAT
from lightning_plugins.quantization.binary import periodic_regularizer, quantization_error
from lightning_plugins.quantization.binary_deploy import load_binary, to_deploy_binary
from lightning_plugins.quantization.binary_layers import (
    binary_layers,
    convert_binary_,
    load_binary_checkpoint,
    restore_binary_,
)
from toys import NUM_CLASSES, TinyModule, TorchvisionModule, assert_same_weights, image_and_label, make_trainer


class HardtanhModule(TinyModule):
    """The tiny module as binary nets are built."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        generator = torch.Generator().manual_seed(1)
        layers = [nn.Linear(8, 16), nn.Hardtanh(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Hardtanh()]
        self.net = nn.Sequential(*layers, nn.Linear(16, NUM_CLASSES))
        for parameter in self.net.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    @property
    def layer(self):
        return self.net[2]


class Watch(pl.Callback):
    """Stage, frequency and what the optimizer uses, by epoch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []
        self.groups: list[tuple[float, float]] = []
        self.outside: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append((pl_module.layer.stage, pl_module.layer.frequency))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.groups.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))

    def on_train_batch_end(self, trainer, *args):
        self.outside.append((trainer.optimizers[0].param_groups[0]["lr"],))


@pytest.mark.parametrize(
    ("split", "stages"),
    [(2, [1, 1, 2, 2]), (0.5, [1, 1, 2, 2]), (0, [2, 2, 2, 2]), (1.0, [1, 1, 1, 1]), (0.6, [1, 1, 2, 2]), (9, [1] * 4)],
)
def test_stages_by_epochs_or_share(tmp_path, split, stages):
    watch = Watch()
    make_trainer(tmp_path, 4, BinaryQAT(stage_split=split), watch).fit(HardtanhModule())
    assert [stage for stage, _ in watch.seen] == stages


def test_the_frequency_rises_through_stage_1(tmp_path):
    watch = Watch()
    callback = BinaryQAT(20.0, stage_split=2, frequency_start=10.0)
    make_trainer(tmp_path, 4, callback, watch).fit(HardtanhModule())
    assert watch.seen == [(1, 10.0), (1, 15.0), (2, 20.0), (2, 20.0)]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_regularizer_joins_the_loss(tmp_path, stage):
    """One step of SGD, beside the same step by hand."""
    by_callback, by_hand = HardtanhModule(), HardtanhModule()
    callback = BinaryQAT(
        7.0, stage_split=2 - stage, regularizer=0.3, stage2_regularizer=0.4, regularizer_sign=-1, stage2_lr_factor=0.5
    )
    make_trainer(tmp_path, 1, callback, max_steps=1).fit(by_callback)

    convert_binary_(by_hand, frequency=7.0, stage=stage)
    inputs, labels = next(iter(by_hand.train_dataloader()))
    loss = F.cross_entropy(by_hand(inputs), labels)
    loss = loss + {1: 0.3, 2: 0.4}[stage] * periodic_regularizer(by_hand.layer.weight, 7.0, sign=-1)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr={1: 0.1, 2: 0.05}[stage], momentum=0.9)
    loss.backward()
    optimizer.step()
    assert_same_weights(by_callback, by_hand, rtol=1e-6, atol=1e-7)


def test_without_regularizer_the_loss_is_the_steps_own(tmp_path):
    weights = []
    for arguments in ({"regularizer": 0.0, "stage2_regularizer": 0.0}, {"regularizer": 1.0, "stage2_regularizer": 1.0}):
        module = HardtanhModule()
        make_trainer(tmp_path, 2, BinaryQAT(stage_split=1, **arguments)).fit(module)
        weights.append(module.layer.weight.detach())
    assert not torch.equal(*weights)


class Decaying(HardtanhModule):
    def configure_optimizers(self):
        parameters = list(self.net.parameters())
        first, rest = parameters[:2], parameters[2:]
        optimizer = torch.optim.SGD(
            [{"params": first, "weight_decay": 0.01}, {"params": rest}],
            lr=0.1,
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_learning_rate_and_weight_decay_of_stage_2_leave_the_schedule_alone(tmp_path):
    plain, watch = Watch(), Watch()
    make_trainer(tmp_path, 4, BinaryQAT(stage_split=2), plain).fit(Decaying())
    callback = BinaryQAT(stage_split=2, stage2_lr_factor=0.1, stage2_weight_decay=0.5)
    module = Decaying()
    trainer = make_trainer(tmp_path, 4, callback, watch)
    trainer.fit(module)
    assert watch.outside == plain.outside
    for step, ((lr, decay), (found_lr, found_decay)) in enumerate(zip(plain.groups, watch.groups, strict=True)):
        second = step >= 8
        assert math.isclose(found_lr, lr * (0.1 if second else 1.0))
        assert (decay, found_decay) == (0.01, 0.5 if second else 0.01)
    groups = trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_an_exception_inside_a_step_gives_the_optimizer_back(tmp_path):
    class Failing(Decaying):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    module = Failing()
    trainer = make_trainer(tmp_path, 2, BinaryQAT(stage_split=0, stage2_lr_factor=1e-3, stage2_weight_decay=0.5))
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module)
    optimizer = trainer.optimizers[0]
    assert optimizer.param_groups[0]["lr"] > 0.01
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    assert not optimizer._optimizer_step_pre_hooks
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_resume_across_the_stage_switch_equals_a_straight_run(tmp_path, first):
    def callback() -> BinaryQAT:
        return BinaryQAT(20.0, stage_split=2, frequency_start=10.0, stage2_lr_factor=0.3, stage2_weight_decay=0.02)

    straight, resumed = Decaying(), Decaying()
    make_trainer(tmp_path, 4, callback()).fit(straight)
    trainer = make_trainer(tmp_path, first, callback())
    trainer.fit(Decaying())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(tmp_path, 4, callback()).fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same_weights(straight, resumed)
    assert (resumed.layer.stage, resumed.layer.frequency) == (2, 20.0)


def test_a_checkpoint_brings_its_stage_and_frequency_to_a_test(tmp_path):
    module = HardtanhModule()
    trainer = make_trainer(tmp_path, 2, BinaryQAT(11.0, stage_split=1))
    trainer.fit(module)
    (expected,) = trainer.test(module, verbose=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = HardtanhModule()
    other = make_trainer(tmp_path, 1, BinaryQAT())
    (found,) = other.test(fresh, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert found == expected
    assert (fresh.layer.stage, fresh.layer.frequency) == (2, 11.0)
    with pytest.raises(RuntimeError, match="load_binary_checkpoint.*BinaryQAT"):
        make_trainer(tmp_path).test(HardtanhModule(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert_same_weights(load_binary_checkpoint(HardtanhModule(), tmp_path / "last.ckpt"), module)


def test_two_runs_one_for_each_stage(tmp_path):
    first = make_trainer(tmp_path, 1, BinaryQAT(stage_split=1.0))
    first.fit(HardtanhModule())
    first.save_checkpoint(tmp_path / "first.ckpt")
    module = HardtanhModule()
    starts = {}

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            starts.setdefault("weight", pl_module.layer.weight.detach().clone())
            starts.setdefault("stage", pl_module.layer.stage)

    callback = BinaryQAT(stage_split=0, start_from=str(tmp_path / "first.ckpt"))
    make_trainer(tmp_path, 1, callback, Start()).fit(module)
    assert starts["stage"] == 2
    assert torch.equal(starts["weight"], first.lightning_module.layer.weight)
    for path, match in (
        (tmp_path / "absent.ckpt", "no such checkpoint"),
        (tmp_path / "other.ckpt", "this very module"),
    ):
        torch.save({"state_dict": TinyModule().state_dict()}, tmp_path / "other.ckpt")
        with pytest.raises(MisconfigurationException, match=match):
            make_trainer(tmp_path, 1, BinaryQAT(start_from=str(path))).fit(HardtanhModule())


def test_removal_leaves_no_trace(tmp_path):
    module, plain = HardtanhModule(), HardtanhModule()
    make_trainer(tmp_path, 1).fit(plain)
    make_trainer(tmp_path, 2, BinaryQAT(stage_split=1, stage2_lr_factor=0.5)).fit(module)
    make_trainer(tmp_path, 1).fit(module)
    restore_binary_(module)
    assert set(vars(module)) == set(vars(plain))
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert [set(vars(part)) for part in module.modules()] == [set(vars(part)) for part in plain.modules()]
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_what_is_logged_and_exported(tmp_path):
    module = HardtanhModule()
    callback = BinaryQAT(9.0, stage_split=1)
    trainer = make_trainer(tmp_path, 2, callback, logger=CSVLogger(tmp_path))
    trainer.fit(module)
    metrics = trainer.callback_metrics
    weight = module.layer.weight.detach()
    torch.testing.assert_close(metrics["quantization/binary_error"], quantization_error(weight, 9.0))
    torch.testing.assert_close(metrics["quantization/binary_regularizer"], periodic_regularizer(weight, 9.0))
    assert metrics["quantization/binary_stage"] == 2
    assert metrics["quantization/binary_frequency"] == 9
    torch.testing.assert_close(metrics["quantization/binary_alpha"], module.layer.alpha.detach().abs().mean())
    (table,) = tmp_path.rglob("binary_layers-*.csv")
    assert table.read_text().splitlines()[0].startswith("layer,weights,weight_std,quantization_error")
    assert "net.2" in table.read_text()
    assert list(tmp_path.rglob("binary_weights-*.png"))
    (path,) = callback.export(tmp_path / "exports")
    inputs = torch.rand(4, 8)
    assert torch.equal(load_binary(path, HardtanhModule())(inputs), to_deploy_binary(module)(inputs))


def test_a_net_in_stage_1_is_not_exported(tmp_path):
    callback = BinaryQAT(stage_split=1.0)
    assert callback.export(tmp_path) == []
    make_trainer(tmp_path, 1, callback).fit(HardtanhModule())
    assert callback.export(tmp_path) == []


def test_the_sign_estimator_trains_without_a_wave(tmp_path):
    module = HardtanhModule()
    trainer = make_trainer(tmp_path, 2, BinaryQAT(estimator="sign", stage_split=1), logger=CSVLogger(tmp_path))
    trainer.fit(module)
    assert "quantization/binary_error" not in trainer.callback_metrics
    assert module.layer.binary_weight().unique().tolist() == [-1, 1]
    with pytest.raises(MisconfigurationException, match="restore_binary_"):
        make_trainer(tmp_path, 1, BinaryQAT()).fit(module)


def test_layers_behind_a_relu_are_named_in_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="1 of 1 binary layers, first 'net.2'.*nn.Hardtanh"):
        make_trainer(tmp_path, 1, BinaryQAT(keep_real=("first",))).fit(TinyModule())


def test_no_warning_where_inputs_have_both_signs(tmp_path, recwarn):
    make_trainer(tmp_path, 1, BinaryQAT()).fit(HardtanhModule())
    assert not [warning for warning in recwarn if "Hardtanh" in str(warning.message)]


def test_a_third_party_net_with_dictionary_batches(tmp_path):
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    module = TorchvisionModule()
    module.backbone = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=NUM_CLASSES)
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU):
                setattr(part, name, nn.Hardtanh())
    trainer = make_trainer(tmp_path, 2, BinaryQAT(stage_split=1, batch_fn=image_and_label))
    trainer.fit(module)
    trainer.test(module, verbose=False)
    assert len(binary_layers(module)) == 8
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_a_step_may_skip_or_return_a_dictionary(tmp_path):
    class Skipping(HardtanhModule):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2:
                return None
            return {"loss": super().training_step(batch, batch_idx), "other": 1}

    trainer = make_trainer(tmp_path, 1, BinaryQAT())
    trainer.fit(Skipping())
    assert trainer.current_epoch == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"frequency": 0.0}, "frequency must be positive"),
        ({"frequency_start": -1.0}, "frequency must be positive"),
        ({"stage_split": 1.5}, "stage_split must be a whole number of epochs or"),
        ({"stage_split": -1}, "stage_split must be"),
        ({"stage_split": True}, "stage_split must be"),
        ({"stage_split": math.nan}, "stage_split must be"),
        ({"regularizer": -0.1}, "regularizer must be at least 0.*regularizer_sign=-1"),
        ({"stage2_regularizer": math.nan}, "stage2_regularizer must be at least 0"),
        ({"regularizer_sign": 0}, "regularizer_sign must be 1"),
        ({"stage2_lr_factor": 0.0}, "stage2_lr_factor must be positive"),
        ({"stage2_weight_decay": -1.0}, "stage2_weight_decay must be at least 0, or None"),
        ({"estimator": "soft"}, "estimator must be 'periodic' or 'sign'"),
        ({"estimator": "sign", "regularizer": 0.1}, "estimator='sign' has no wave"),
        ({"estimator": "sign", "frequency_start": 1.0}, "estimator='sign' has no wave"),
        ({"keep_real": ("middle",)}, "keep_real must be among"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        BinaryQAT(**arguments)


def test_wrong_trainers_and_modules(tmp_path):
    with pytest.raises(MisconfigurationException, match="max_epochs=-1; set max_epochs, or give"):
        make_trainer(tmp_path, -1, BinaryQAT(), max_steps=2).fit(HardtanhModule())
    make_trainer(tmp_path, -1, BinaryQAT(stage_split=1), max_steps=2).fit(HardtanhModule())
    with pytest.raises(MisconfigurationException, match="BinaryQAT: nothing is left to make binary"):
        make_trainer(tmp_path, 1, BinaryQAT()).fit(TinyModule())
