"""The callback: the module as without it, and a quantized net beside it."""

from __future__ import annotations

from copy import deepcopy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_plugins.callbacks.quantization.post_training_quantization import PostTrainingQuantization, _samples
from lightning_plugins.data.loading import ImageDataset
from lightning_plugins.quantization import BitPlan, convert_, load_packed, quantized_layers, switch_
from lightning_plugins.quantization.post_training import post_training_quantize
from toys import TinyModule, assert_same_weights, make_trainer, toy_data, weights


class Normed(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.net[0], nn.BatchNorm1d(16), *self.net[1:])


def small(**arguments):
    defaults = {"bits": (8, 3), "first_last_bits": 3, "num_samples": 48, "num_steps": 4, "batch_size": 16}
    return PostTrainingQuantization(**(defaults | arguments))


def test_training_checkpoints_and_random_state_are_those_of_a_run_without_it(tmp_path):
    outcomes = []
    for callbacks in [], [small()]:
        module = Normed()
        torch.manual_seed(3)
        checkpoint = ModelCheckpoint(tmp_path / str(len(callbacks)), filename="model")
        trainer = make_trainer(tmp_path, 2, *callbacks, checkpoint, enable_checkpointing=True)
        trainer.fit(module)
        trainer.test(module, verbose=False)
        state = torch.load(checkpoint.best_model_path, weights_only=True)
        outcomes.append((weights(module), state["state_dict"], torch.rand(3), trainer.callback_metrics["test_loss"]))
    for plain, treated in zip(*outcomes, strict=True):
        torch.testing.assert_close(plain, treated, rtol=0, atol=0)


def test_it_does_what_the_function_does(tmp_path):
    callback, module = small(), Normed()
    make_trainer(tmp_path, 1, callback).fit(module)
    net = convert_(deepcopy(module).eval(), (8, 3, 32), first_last_bits=3, batch_norm="shared")
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:48]
    inputs, labels = (tensor[rows] for tensor in toy_data(64).tensors)
    held_out = [toy_data(32, seed=1).tensors]
    report = post_training_quantize(
        net, [(inputs, labels)], 3, num_steps=4, batch_size=16, evaluation=[(x, y) for x, y in held_out]
    )
    made = callback.quantized_module()
    assert_same_weights(net, made)
    inputs = torch.rand(5, 8)
    assert torch.equal(made(inputs), net.eval()(inputs))
    for name, stage in report.stages.items():  # other rows of the same validation set, in another order
        assert callback.report.stages[name].loss == pytest.approx(stage.loss, rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_accuracies_beside_each_other(tmp_path, precision):
    callback, module = small(), Normed()
    trainer = make_trainer(tmp_path, 2, callback, precision=precision)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    inputs, labels = toy_data(32, seed=2).tensors
    made = callback.quantized_module()
    logits = made(inputs.to(next(made.parameters()).dtype))
    accuracy = (logits.argmax(1) == labels).float().mean()
    assert trainer.callback_metrics["test/acc_quantized"] == accuracy
    assert 0.5 < trainer.callback_metrics["test/acc_fp32"] <= 1
    trainer.validate(module, verbose=False)
    assert {"val/acc_quantized", "val/acc_fp32"} <= trainer.callback_metrics.keys()


def test_a_plan_from_a_file_and_its_export(tmp_path):
    plan = BitPlan({"net.0": 8, "net.3": 4})
    plan.save(tmp_path / "plan.json")
    callback, module = small(plan=str(tmp_path / "plan.json")), Normed()
    assert callback.export(tmp_path) == []
    make_trainer(tmp_path, 1, callback).fit(module)
    files = callback.export(tmp_path / "exports")
    assert [path.name for path in files] == ["packed.safetensors", "plan.json", "cost.txt", "stages.txt"]
    assert BitPlan.load(files[1]) == plan
    loaded = load_packed(files[0], Normed())
    inputs = torch.rand(7, 8)
    assert torch.equal(loaded(inputs), callback.quantized_module()(inputs))
    assert not quantized_layers(module)


def test_a_budget(tmp_path):
    callback = small(budget=6.0, pipeline="light")
    make_trainer(tmp_path, 1, callback).fit(Normed())
    assert callback.report.average_bits <= 6
    assert callback.report.table is not None


def test_the_saved_net_comes_back_and_other_weights_are_quantized_anew(tmp_path):
    callback, module = small(), Normed()
    trainer = make_trainer(
        tmp_path, 2, callback, ModelCheckpoint(tmp_path, filename="early"), enable_checkpointing=True
    )
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    again, fresh = small(seed=9), Normed()  # another seed would give another net
    tester = make_trainer(tmp_path, 1, again)
    tester.test(fresh, ckpt_path=tmp_path / "final.ckpt", weights_only=True, verbose=False)
    assert_same_weights(callback.quantized_module(), again.quantized_module())
    assert again.report.plan == callback.report.plan
    with torch.no_grad():
        fresh.net[0].weight.mul_(0.5)
    tester.test(fresh, verbose=False)
    assert not torch.equal(again.quantized_module().net[0].weight, callback.quantized_module().net[0].weight)


def test_a_trained_module_is_quantized_when_it_is_tested(tmp_path):
    module = Normed()
    make_trainer(tmp_path, 1).fit(module)
    before, callback = weights(module), small()
    make_trainer(tmp_path, 1, callback).test(module, verbose=False)
    assert_same_weights(before, module)
    assert callback.report.plan == BitPlan({"net.0": 3, "net.3": 3})

    class NoData(Normed):
        train_dataloader = pl.LightningModule.train_dataloader

    with pytest.raises(MisconfigurationException, match="give the module a train_dataloader"):
        make_trainer(tmp_path, 1, small()).test(NoData(), verbose=False)


def test_a_pruned_and_a_converted_module(tmp_path):
    module = Normed()
    nn.utils.prune.l1_unstructured(module.net[0], "weight", 0.5)
    callback = small()
    make_trainer(tmp_path, 1, callback).fit(module)
    assert nn.utils.prune.is_pruned(module)
    zeros = module.net[0].weight == 0
    assert zeros.any()
    assert (callback.quantized_module().net[0].weight[zeros] == 0).all()

    converted = convert_(Normed(), (8, 4), first_last_bits=4)
    switch_(converted, 8)
    make_trainer(tmp_path, 1, callback := small()).test(converted, verbose=False)
    assert callback.report.plan == BitPlan({"net.0": 3, "net.3": 3})
    assert set(quantized_layers(converted)["net.0"].bits) == {8, 4}


def test_what_is_logged(tmp_path):
    callback = small()
    trainer = make_trainer(tmp_path, 1, callback, logger=CSVLogger(tmp_path, name="", version=""))
    trainer.fit(Normed())
    text = (tmp_path / "metrics.csv").read_text()
    assert "quantization/avg_bits" in text
    assert all(f"quantization/acc_{stage}" in text for stage in ("full_precision", "naive", "adaquant", "biases"))
    media = {path.name.partition("-")[0] for path in tmp_path.glob("media/quantization/*")}
    assert media == {"stages", "plan", "layers"}


@pytest.mark.parametrize("loaders", [None, []])
def test_without_validation_data_stages_are_measured_on_the_calibration_data(tmp_path, loaders):
    class NoValidation(Normed):
        def val_dataloader(self):
            return super().val_dataloader() if loaders is None else loaders

    callback, module = small(num_samples=64, pipeline="light"), NoValidation()
    make_trainer(tmp_path, 1, callback, limit_val_batches=1.0 if loaders is not None else 0).fit(module)
    inputs, labels = toy_data(64).tensors
    accuracy = (module.eval()(inputs).argmax(1) == labels).float().mean().item()
    assert callback.report.stages["full precision"].accuracy == pytest.approx(accuracy)


def test_samples_come_without_augmentation_and_leave_the_loader_alone():
    images = torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    data = ImageDataset(images, torch.arange(10), image_size=2, augment=torch.zeros_like)
    batch = next(iter(_samples(DataLoader(data, batch_size=3), 4, seed=1)))
    chosen = torch.randperm(10, generator=torch.Generator().manual_seed(1))[:4]
    assert torch.equal(batch[0], images[chosen])
    assert data.augment is torch.zeros_like

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(5))

    loader = DataLoader(Stream())
    assert _samples(loader, 3, seed=0) is loader


@pytest.mark.processes
def test_two_processes_hold_one_net(tmp_path):
    class Writes(pl.Callback):
        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            state = trainer.callbacks[0].state_dict()
            torch.save(state, f"{trainer.default_root_dir}/rank-{trainer.global_rank}.pt")

    trainer = make_trainer(tmp_path, 1, small(), Writes(), strategy="ddp_fork", devices=2)
    trainer.fit(Normed())
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["module"]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_wrong_use(tmp_path):
    for arguments, message in [
        ({"bits": (8, 32)}, "bits must be 2 to 8"),
        ({"plan": {"net.0": 4}, "budget": 3.0}, "plan, budget or accuracy_ratio, one of them"),
        ({"budget": 0.0}, "budget must be positive"),
        ({"pipeline": "heavy"}, "pipeline must be one of full, light"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(**arguments)
    with pytest.raises(FileNotFoundError):
        small(plan=str(tmp_path / "absent.json"))
    with pytest.raises(RuntimeError, match="run trainer.fit"):
        small().quantized_module()
    with pytest.raises(MisconfigurationException, match="first_last_bits=8"):
        make_trainer(tmp_path, 1, small(first_last_bits=32)).fit(TinyModule())
    with pytest.raises(MisconfigurationException, match="not in the model"):
        make_trainer(tmp_path, 1, small(plan={"nowhere": 4})).fit(TinyModule())
