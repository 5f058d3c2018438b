"""Training at a plan: given or found, all layers at once or in HAWQ's order, restored by checkpoints."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_plugins.callbacks import MultiPrecisionQAT
from lightning_plugins.callbacks.quantization.bit_plan_qat import BitPlanQAT
from lightning_plugins.quantization import BitPlan, active_plan, load_packed, switch_
from lightning_plugins.quantization.allocation import allocate_bits
from lightning_plugins.quantization.sensitivity import SensitivityTable
from toys import NUM_CLASSES, TinyModule, assert_same_weights, make_trainer, toy_data, weights

PLAN = {"net.0": 8, "net.3": 4, "net.6": 8}


class Deep(TinyModule):
    """Three layers with normalisations between them."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, NUM_CLASSES),
        )  # fmt: skip


class Watch(pl.Callback):
    """Writes down the bits in use, in training and in validation."""

    def __init__(self) -> None:
        self.training: list[dict[str, int]] = []
        self.validation: list[dict[str, int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.training.append(dict(active_plan(pl_module)))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.validation.append(dict(active_plan(pl_module)))


def planned(plan: Any = None, **options: Any) -> BitPlanQAT:
    return BitPlanQAT(plan, **({"first_last_bits": 2, "num_probes": 10} | options))


@pytest.mark.parametrize("alrs", ["eta", "none", "frozen", "released"])
def test_at_uniform_bits_it_is_multi_precision_qat_at_one_precision(tmp_path, alrs):
    one, other = Deep(), Deep()
    callback = planned(dict.fromkeys(PLAN, 4), bits=(4,), alrs=alrs)
    make_trainer(tmp_path, 3, callback).fit(one)
    reference = MultiPrecisionQAT((4,), first_last_bits=2, batch_norm="shared", alrs=alrs)
    make_trainer(tmp_path, 3, reference).fit(other)
    names = [name for name in weights(other) if "load_converted" not in name]
    assert_same_weights({name: weights(one)[name] for name in names}, {name: weights(other)[name] for name in names})
    inputs = toy_data(8).tensors[0]
    assert torch.equal(one.eval()(inputs), other.eval()(inputs))


def test_training_by_hand(tmp_path):
    """One optimizer step a batch at the plan; each scale at the learning rate of its layer's bits."""
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    from lightning_plugins.quantization import clamp_scales_, convert_

    module = Deep()
    make_trainer(tmp_path, 1, planned(PLAN, bits=(8, 4)), precision="64-true").fit(module)
    reference = convert_(Deep(), (32, 8, 4), first_last_bits=2, batch_norm="shared").double().train()
    switch_(reference, PLAN)
    slow = [reference.net[3].weight_scale, reference.net[3].input_quantizer.scales["4"]]
    others = [p for p in reference.parameters() if all(p is not q for q in slow)]
    optimizer = torch.optim.SGD([{"params": others}, {"params": slow, "lr": 0.1 * 0.01}], lr=0.1, momentum=0.9)
    for inputs, labels in DataLoader(toy_data(64), batch_size=16):
        optimizer.zero_grad()
        F.cross_entropy(reference(inputs.double()), labels).backward()
        optimizer.step()
        clamp_scales_(reference)
    assert_same_weights(module.net, reference.net, rtol=1e-10, atol=1e-12)


def test_a_plan_is_found_under_the_budget(tmp_path):
    callback, watch, module = planned(bits=(8, 4, 2), budget=5), Watch(), Deep()
    make_trainer(tmp_path, 2, callback, watch).fit(module)
    table, plan = callback.sensitivities, callback.bit_plan
    assert table is not None
    assert plan == allocate_bits(table, budget=5)
    sizes = {"net.0": 128, "net.3": 256, "net.6": 48}
    assert sum(plan[name] * size for name, size in sizes.items()) / sum(sizes.values()) <= 5
    assert len(set(plan.values())) > 1
    assert all(seen == dict(plan) for seen in watch.training + watch.validation)
    assert dict(active_plan(module)) == dict(plan)


def test_the_default_budget_is_half_way():
    assert planned(bits=(8, 4)).budget == 6
    assert planned(PLAN).budget is None


@pytest.mark.parametrize("score", ["hawq-v1", "loss-increase", "zd", "random"])
def test_other_scores(tmp_path, score):
    callback = planned(score=score, allocator="order", budget=7)
    make_trainer(tmp_path, 1, callback).fit(Deep())
    assert callback.sensitivities.method == score
    assert set(callback.bit_plan.values()) == {8, 4}


def test_hawqs_order_quantizes_by_falling_loss(tmp_path):
    callback, watch = planned(bits=(8, 4), budget=5, order="hawq", unlock_epochs=3), Watch()
    make_trainer(tmp_path, 5, callback, watch).fit(Deep())
    plan, table = callback.bit_plan, callback.sensitivities
    order = sorted(plan, key=lambda name: -table.layers[name].losses[plan[name]])
    for epoch in range(5):
        expected = {name: plan[name] if rank <= epoch else 32 for rank, name in enumerate(order)}
        assert watch.training[4 * epoch : 4 * epoch + 4] == [expected] * 4
        assert watch.validation[2 * epoch] == expected


def test_the_order_takes_half_of_the_training_by_default(tmp_path):
    callback, watch = planned(PLAN, order="hawq"), Watch()
    make_trainer(tmp_path, 8, callback, watch).fit(Deep())
    quantized = [sum(b != 32 for b in plan.values()) for plan in watch.training[::4]]
    assert quantized[0] == 1
    assert quantized[3:] == [3] * 5
    assert quantized == sorted(quantized)
    with pytest.raises(MisconfigurationException, match="give unlock_epochs"):
        make_trainer(tmp_path, 1, planned(PLAN, order="hawq"), max_epochs=-1, max_steps=2).fit(Deep())


def test_shortcuts_go_with_their_block(tmp_path):
    from lightning_plugins.data import DigitsDataModule
    from lightning_plugins.models import resnet20
    from lightning_plugins.modules import ImageClassifier

    module = ImageClassifier(resnet20(in_channels=1, width=4), num_classes=10)
    callback = BitPlanQAT(score="random", order="hawq", unlock_epochs=4, num_samples=8)
    make_trainer(tmp_path, 1, callback, limit_train_batches=1, limit_val_batches=0).fit(
        module, DigitsDataModule(batch_size=8)
    )
    for stage in (1, 2):
        shortcut, leader = f"model.stages.{stage}.0.shortcut.0", f"model.stages.{stage}.0.conv1"
        assert callback.bit_plan[shortcut] == callback.bit_plan[leader]
        assert callback._turns[shortcut] == callback._turns[leader]


def test_a_plan_from_a_file(tmp_path):
    path = str(BitPlan(PLAN).save(tmp_path / "plan.json"))
    module = Deep()
    make_trainer(tmp_path, 1, planned(path)).fit(module)
    assert dict(active_plan(module)) == PLAN


def test_bits_of_the_plan_alone_become_structure(tmp_path):
    module = Deep()
    make_trainer(tmp_path, 1, planned(PLAN | {"net.3": 3})).fit(module)
    assert module.net[3].bits == (32, 8, 4, 3)


@pytest.mark.parametrize("order", ["together", "hawq"])
def test_resumed_it_is_the_straight_run(tmp_path, order):
    def run(epochs: int, **fit: Any) -> tuple[Deep, pl.Trainer, BitPlanQAT]:
        module, callback = Deep(), planned(budget=5, order=order, unlock_epochs=3)
        trainer = make_trainer(tmp_path, epochs, callback)
        trainer.fit(module, **fit)
        return module, trainer, callback

    straight, _, callback = run(4)
    _, trainer, _ = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, other = run(4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same_weights(straight, resumed)
    assert callback.state_dict() == other.state_dict()


def test_a_checkpoint_brings_its_plan(tmp_path):
    module, callback = Deep(), planned(budget=5, order="hawq", unlock_epochs=4)
    checkpoint = ModelCheckpoint(tmp_path, filename="model")
    trainer = make_trainer(tmp_path, 2, callback, checkpoint, enable_checkpointing=True)
    trainer.fit(module)
    (expected,) = trainer.test(module, verbose=False)
    fresh, other = Deep(), planned(budget=7)
    (found,) = make_trainer(tmp_path, 1, other).test(
        fresh, ckpt_path=checkpoint.best_model_path, weights_only=True, verbose=False
    )
    assert found == expected
    assert dict(active_plan(fresh)) == dict(active_plan(module))
    assert set(active_plan(fresh).values()) >= {32}  # saved while one layer was waiting
    assert other.bit_plan == callback.bit_plan
    wrong = planned({name: 4 if b == 8 else 8 for name, b in callback.bit_plan.items()})
    with pytest.raises(MisconfigurationException, match="differs from the given one in 3 layers.*leave out plan"):
        make_trainer(tmp_path, 1, wrong).test(Deep(), ckpt_path=checkpoint.best_model_path, weights_only=True)


def test_a_fresh_module_gets_a_plan_of_its_own(tmp_path):
    callback = planned(score="random", seed=0)
    make_trainer(tmp_path, 1, callback).fit(Deep())
    first, callback.seed = callback.bit_plan, 3
    callback.budget = 4.5
    make_trainer(tmp_path, 1, callback).fit(Deep())
    assert callback.bit_plan != first


def test_accuracy_at_the_plan_and_in_full_precision(tmp_path):
    module = Deep()
    trainer = make_trainer(tmp_path, 3, planned(PLAN))
    trainer.fit(module)
    (metrics,) = trainer.test(module, verbose=False)
    inputs, labels = toy_data(32, seed=2).tensors
    module.eval()
    for key, bits in {"test/acc_32bit": 32, "test/acc_plan": PLAN}.items():
        accuracy = (switch_(module, bits)(inputs).argmax(1) == labels).float().mean()
        assert metrics[key] == pytest.approx(accuracy.item())
    assert metrics["test_loss"] == pytest.approx(nn.functional.cross_entropy(module(inputs), labels).item(), rel=1e-5)


def test_what_is_logged_and_exported(tmp_path):
    module, callback = Deep(), planned(budget=5, order="hawq", unlock_epochs=2)
    trainer = make_trainer(tmp_path, 2, callback, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(module)
    media = {path.name.split("-step")[0] for path in tmp_path.rglob("media/**/*.*")}
    assert media == {"plan", "sensitivity", "frontier", "layers"}
    text = "".join(path.read_text() for path in tmp_path.rglob("metrics.csv"))
    assert "quantization/avg_bits" in text
    assert "val/acc_plan" in text
    paths = {path.name: path for path in callback.export(tmp_path / "exports")}
    assert list(paths) == ["plan.json", "sensitivity.json", "packed.safetensors", "cost.txt"]
    assert BitPlan.load(paths["plan.json"]) == callback.bit_plan
    assert SensitivityTable.load(paths["sensitivity.json"]).layers == callback.sensitivities.layers
    inputs = toy_data(8).tensors[0]
    loaded = load_packed(paths["packed.safetensors"], Deep())
    assert torch.equal(loaded(inputs), module.eval()(inputs))
    assert float(trainer.callback_metrics["quantization/avg_bits"]) <= 5


def test_average_bits_by_hand(tmp_path):
    trainer = make_trainer(tmp_path, 1, planned(PLAN))
    trainer.fit(Deep())
    expected = (128 * 8 + 256 * 4 + 48 * 8) / (128 + 256 + 48)
    assert float(trainer.callback_metrics["quantization/avg_bits"]) == pytest.approx(expected)


def test_a_module_that_leads_to_what_cannot_be_copied(tmp_path):
    module = Deep()
    module.optimizer = (number for number in ())  # the command line's modules hold the Trainer and its loaders
    callback = planned(budget=5)
    make_trainer(tmp_path, 1, callback).fit(module)
    assert callback.bit_plan is not None
    assert "__deepcopy__" not in vars(module)
    plain = planned(budget=5)
    make_trainer(tmp_path, 1, plain).fit(Deep())
    assert plain.state_dict() == callback.state_dict()


def test_half_precision_is_scored_in_single(tmp_path):
    callback = planned(budget=5)
    make_trainer(tmp_path, 1, callback, precision="bf16-true").fit(module := Deep())
    assert callback.bit_plan is not None
    assert module.net[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": {"a": 9}}, "must be 2 to 8"),
        ({"plan": PLAN, "budget": 5}, "nothing to allocate"),
        ({"unit": "bytes"}, "no budget by default"),
        ({"score": "taste"}, "score must be one of 'hawq-v1'"),
        ({"allocator": "taste"}, "allocator must be one of 'pareto'"),
        ({"order": "random"}, "order must be one of 'together', 'hawq'"),
        ({"unlock_epochs": -1}, "unlock_epochs must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"alrs": "paper"}, "use 'eta'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BitPlanQAT(**arguments)


def test_wrong_combinations(tmp_path):
    def refuses(message: str, callback: BitPlanQAT) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(tmp_path, 1, callback).fit(Deep())

    refuses("does not fit the module.*missing: ..net.3", planned({"net.0": 8, "net.6": 8}))
    refuses("no plan fits a budget of 1", planned(budget=1.0))
    for run in ("test", "validate"):
        with pytest.raises(MisconfigurationException, match="no plan yet; fit first"):
            getattr(make_trainer(tmp_path, 1, planned()), run)(Deep(), verbose=False)
