from __future__ import annotations

import math
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_plugins.callbacks import DistilledSetEvaluation
from lightning_plugins.data import DigitsDataModule
from lightning_plugins.distillation import (
    PROTOCOLS,
    ClassPool,
    NetAccuracies,
    Protocol,
    SyntheticSet,
    augmentation_robust_score,
    evaluate_set,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
    train_nets,
    untrained_net,
)
from lightning_plugins.distillation.evaluation import baseline_sets
from lightning_plugins.models import convnet3
from lightning_plugins.modules import DatasetDistillation
from toys import TinyModule, make_trainer

PLAIN = Protocol(steps=6, batch_size=4, operations=())


def factory() -> nn.Module:
    return convnet3(num_classes=3, in_channels=1, image_size=8, width=4)


def toy(n: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = 0.6 * torch.rand(n, 1, 8, 8, generator=generator)
    images[torch.arange(n), 0, 2 * labels] += 0.4
    return images, labels


def pool(n: int = 60, seed: int = 0) -> ClassPool:
    return ClassPool(*toy(n, seed))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_joint_training_equals_one_after_the_other(name):
    images, labels = toy()
    protocol = replace(PROTOCOLS[name].resized(steps=8), batch_size=5)

    def trained(seeds, joint):
        nets = train_nets(factory, images, labels, num_classes=3, protocol=protocol, seeds=seeds, joint=joint)
        return nets.logits(images)

    joint, alone = trained((1, 2, 3), True), trained((1, 2, 3), False)
    torch.testing.assert_close(joint, alone, rtol=1e-3, atol=1e-3)
    assert not torch.equal(joint[0], joint[1])
    assert torch.equal(alone[2], trained((3,), None)[0])


def test_the_house_protocol_against_a_plain_loop():
    images, labels = toy(4)
    protocol = Protocol(steps=5, batch_size=4, operations=())  # one batch: the order does not matter
    found = train_nets(factory, images, labels, num_classes=3, protocol=protocol, seeds=(5,))
    net = untrained_net(factory, seed=5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 5)) / 2
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(found.logits(images)[0], net(images).detach(), rtol=1e-4, atol=1e-5)


def test_milestones_make_the_optimizer_anew_and_lower_the_rate(monkeypatch):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append((self.param_groups[0]["lr"], len(self.state)))
            return super().step()

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    images, labels = toy(3)
    protocol = Protocol(**(vars(PROTOCOLS["vico"]) | {"epochs": 11, "milestones": (6 / 11,), "operations": ()}))
    train_nets(factory, images, labels, num_classes=3, protocol=protocol, seeds=(0,))
    assert [rate for rate, _ in rates] == pytest.approx([0.01] * 6 + [0.001] * 5)
    assert [count == 0 for _, count in rates] == [True] + 5 * [False] + [True] + 4 * [False]


def test_protocols_have_the_published_lengths():
    assert PROTOCOLS["vico"].num_steps(100) == 1001
    assert PROTOCOLS["idc"].num_steps(400) == 7000
    assert PROTOCOLS["ncfm"].num_steps(400) == 8000
    assert PROTOCOLS["house"].num_steps(10) == PROTOCOLS["house"].num_steps(50000) == 4000
    assert PROTOCOLS["house"].resized(epochs=3).num_steps(129) == 6


def test_the_same_compute_for_sets_of_the_same_memory(monkeypatch):
    steps = []
    step = torch.optim.SGD.step

    def count(self, *arguments):
        steps.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", count)
    protocol = Protocol(epochs=8, steps=None, batch_size=2, operations=(), same_compute=True)
    evaluate_set(
        SyntheticSet.initialised("mix", pool(), 2, rho=2), pool(), factory, protocol=protocol, num_nets=1, train=pool()
    )
    assert len(steps) == 3 * 24  # 8 epochs of 3 batches for random images, 2 of 12 for the set and for mosaics
    assert protocol.resized(steps=5).same_compute is False
    assert protocol.for_set(SyntheticSet.initialised("real", pool(), 2)).epochs == 8


def test_what_eight_bits_cost(tmp_path):
    # Two grey levels that 8 bits cannot tell apart are all that tells these classes apart.
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.0, 0.2])[torch.arange(40) % 2] / 255
    real = ClassPool(
        (levels.view(-1, 1, 1, 1) + 1e-6 * torch.rand(40, 1, 4, 4, generator=generator)),
        torch.arange(40) % 2,
        mean=[0.1 / 255],
        std=[0.1 / 255],
    )
    synthetic = SyntheticSet.initialised("real", real, 2)

    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))

    protocol = Protocol(steps=40, operations=(), learning_rate=0.1)
    found = evaluate_set(synthetic, real, linear, protocol=protocol, num_nets=2, png=True)
    assert found.distilled.mean == 1
    assert found.png.mean == found.to_dict()["png"]["mean"] == 1 - found.png_drop < 0.8
    plain = evaluate_set(synthetic, real, linear, protocol=protocol, num_nets=1)
    assert plain.png_drop is None
    assert "png" not in plain.to_dict()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_runs_with_its_augmentation_and_repeats(name):
    images, labels = toy()
    protocol = PROTOCOLS[name].resized(steps=6)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (
        train_nets(factory, images, labels, num_classes=3, protocol=protocol, seeds=(0, 1), joint=True)
        for _ in range(2)
    )
    assert torch.equal(first.logits(images), second.logits(images))
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_with_buffers_are_trained_alone():
    def normalised() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))

    images, labels = toy()
    nets = train_nets(normalised, images, labels, num_classes=3, protocol=PLAIN, seeds=(0, 1))
    assert not torch.equal(nets.state["1.running_mean"][0], nets.state["1.running_mean"][1])
    with pytest.raises(ValueError, match="set joint=False"):
        train_nets(normalised, images, labels, num_classes=3, protocol=PLAIN, joint=True)


def test_soft_labels_that_are_hard_change_nothing():
    images, labels = toy()
    hard, soft = (
        train_nets(factory, images, targets, num_classes=3, protocol=PLAIN, seeds=(0,)).logits(images)
        for targets in (labels, F.one_hot(labels, 3).float())
    )
    torch.testing.assert_close(hard, soft, rtol=1e-4, atol=1e-5)


def test_more_real_images_are_better_and_the_report_says_what_it_compares():
    train, test = pool(90, 1), pool(60, 2)
    protocol = Protocol(steps=60, batch_size=16, operations=(), learning_rate=0.05)
    means = []
    for count in (1, 20):
        synthetic = SyntheticSet.initialised("real", train, count)
        found = evaluate_set(synthetic, test, factory, protocol=protocol, num_nets=2)
        means.append(found.distilled.mean)
    assert means[0] < means[1]
    mosaic = SyntheticSet.initialised("mix", train, 2, rho=2)
    found = evaluate_set(
        mosaic, test, factory, protocol=PLAIN, num_nets=2, train=train, architectures={"wide": factory}
    ).to_dict()
    assert found["baselines"].keys() == {"random", "mix"}
    assert found["architectures"].keys() == {"wide"}
    assert found["facts"]["decoded_per_class"] == 8
    assert found["facts"]["selection"] == "last epoch"
    assert len(found["distilled"]["per_class"]) == 3


def test_baselines_take_the_memory_of_the_set():
    synthetic = SyntheticSet.initialised("noise", pool(), 2, rho=2)
    found = baseline_sets(synthetic, pool())
    assert {name: source.num_values for name, source in found.items()} == dict.fromkeys(
        ("random", "mix"), synthetic.num_values
    )


def test_accuracies_by_hand():
    found = NetAccuracies.of(torch.tensor([[2, 0, 0], [1, 1, 0], [2, 2, 0]]))
    assert found.accuracies == (0.5, 0.5)
    assert found.per_class[:2] == (0.75, 0.25)
    assert math.isnan(found.per_class[2])
    assert found.to_dict()["per_class"][2] is None
    spread = NetAccuracies((0.4, 0.6), (0.5,))
    assert (spread.mean, spread.std) == pytest.approx((0.5, math.sqrt(0.02)))


def test_the_scores_of_dd_ranking():
    hlr, ior = hard_label_recovery(0.9, 0.6), improvement_over_random(0.7, 0.5)
    assert (hlr, ior) == pytest.approx((0.3, 0.2))
    alpha = 0.5 * 0.2 - 0.5 * 0.3
    assert label_robust_score(ior, hlr) == pytest.approx((math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1)))
    assert augmentation_robust_score(1, 1) == pytest.approx(1)
    assert augmentation_robust_score(-1, -1) == pytest.approx(0)
    with pytest.raises(ValueError, match="divide percent by 100"):
        hard_label_recovery(90, 60)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Protocol(epochs=3), "either epochs or steps"),
        (lambda: Protocol(steps=0), "at least 1"),
        (lambda: Protocol(cutmix=2.0), "cutmix must lie"),
        (lambda: Protocol(same_compute=True), "give epochs, or leave it out"),
        (lambda: DistilledSetEvaluation("hous"), "one of house, vico"),
        (lambda: DistilledSetEvaluation(num_nets=0), "num_nets must be at least 1"),
        (lambda: DistilledSetEvaluation(architectures="resnet18"), "sequence of names"),
        (lambda: DistilledSetEvaluation(labels="both"), "'hard' or 'soft'"),
        (lambda: train_nets(factory, *toy(), num_classes=3, seeds=()), "one seed or more"),
        (lambda: evaluate_set(SyntheticSet(toy()[0].view(3, 4, 1, 8, 8)), pool(), factory, labels="soft"), "no soft"),
    ],
)
def test_wrong_use(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_divergence_is_said():
    images, labels = toy()
    with pytest.raises(RuntimeError, match="lower the protocol's learning_rate"):
        train_nets(factory, images * 1e30, labels, num_classes=3, protocol=Protocol(steps=9, operations=()), seeds=(0,))


# The callback


class Distillation(DatasetDistillation):
    """Three classes, with loaders of its own."""

    def val_dataloader(self):
        return DataLoader([(image, int(label)) for image, label in zip(*toy(30, 4), strict=True)], batch_size=8)

    def test_dataloader(self):
        return DataLoader([(image, int(label)) for image, label in zip(*toy(30, 5), strict=True)], batch_size=8)


def distillation(**arguments) -> Distillation:
    images, labels = toy(60)
    dataset = torch.utils.data.TensorDataset(images, labels)
    settings = {"batch_real": 6, "rho": 2, "initialisation": "mix"}
    return Distillation(
        "convnet3", preset="dm", settings=settings, model_args={"width": 4}, images_per_class=2,
        iterations_per_epoch=3, dataset=dataset, **arguments,
    )  # fmt: skip


def evaluation(**arguments) -> DistilledSetEvaluation:
    return DistilledSetEvaluation(**({"num_nets": 2, "steps": 5} | arguments))


def test_metrics_figures_and_state(tmp_path):
    callback, module = evaluation(architectures=("resnet20",), every_n_epochs=1, png=True), distillation()
    trainer = make_trainer(tmp_path, 2, callback, logger=CSVLogger(tmp_path))
    trainer.fit(module)
    names = "distilled_acc distilled_acc_std distilled_acc_worst random_acc mix_acc resnet20_acc gain_over_random"
    names += " png_acc png_drop"
    assert {f"val/{name}" for name in names.split()} <= set(trainer.callback_metrics)
    trainer.test(module, verbose=False)
    assert {f"test/{name}" for name in names.split()} <= set(trainer.callback_metrics)
    assert len(list(tmp_path.rglob("media/*/distilled*"))) == 6  # a table each, and a figure for each
    assert module.results.keys() == {"val", "test"}
    assert module.about()["results"]["test"]["protocol"]["steps"] == 5
    png = module.results["test"]["png"]
    assert png["drop"] == pytest.approx(module.results["test"]["distilled"]["mean"] - png["mean"])
    state = callback.state_dict()
    other = evaluation()
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert "lightning_plugins/DistilledSetEvaluation/protocol" in "".join(
        path.read_text() for path in tmp_path.rglob("hparams.yaml")
    )


def test_the_callback_agrees_with_the_function(tmp_path):
    module = distillation()
    trainer = make_trainer(tmp_path, 1, evaluation())
    trainer.fit(module)
    trainer.test(module, verbose=False)
    found = evaluate_set(
        module.synthetic, ClassPool(*toy(30, 5)), module.net_factory(), protocol=Protocol("house", steps=5), num_nets=2,
        train=module._pool,
    )  # fmt: skip
    for name, value in {"distilled": found.distilled, **found.baselines}.items():
        assert float(trainer.callback_metrics[f"test/{name}_acc"]) == pytest.approx(value.mean)


def test_it_leaves_the_run_alone(tmp_path):
    outcomes = []
    for callbacks in [], [evaluation(every_n_epochs=1)]:
        module = distillation()
        torch.manual_seed(7)
        make_trainer(tmp_path, 2, *callbacks).fit(module)
        assert torch.is_grad_enabled()
        assert module.synthetic.images.requires_grad
        outcomes.append((torch.rand(3), module.synthetic.images.detach(), module.training))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert outcomes[0][2] == outcomes[1][2]


def test_only_the_last_epoch_unless_asked(tmp_path):
    seen = []

    class Sees(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append("val/distilled_acc" in trainer.callback_metrics)

    make_trainer(tmp_path, 3, evaluation(), Sees()).fit(distillation())
    assert seen == [False, False, True]


def test_a_resumed_run_logs_the_same(tmp_path):
    one, two = evaluation(every_n_epochs=1), evaluation(every_n_epochs=1)
    make_trainer(tmp_path, 2, one).fit(distillation())
    first = make_trainer(tmp_path, 1, evaluation(every_n_epochs=1))
    first.fit(distillation())
    first.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(tmp_path, 2, two).fit(distillation(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert one.state_dict() == two.state_dict()


def test_a_checkpoint_is_tested_without_training(tmp_path):
    data = DigitsDataModule()
    arguments = {"preset": "dm", "images_per_class": 1, "model_args": {"width": 4}, "iterations_per_epoch": 2}
    arguments["settings"] = {"batch_real": 6}
    trainer = make_trainer(tmp_path, 1, limit_val_batches=0)
    trainer.fit(DatasetDistillation(**arguments), datamodule=data)
    trainer.save_checkpoint(tmp_path / "set.ckpt")
    trainer = make_trainer(tmp_path, 1, evaluation())
    path = tmp_path / "set.ckpt"
    trainer.test(DatasetDistillation(**arguments), DigitsDataModule(), ckpt_path=path, weights_only=True, verbose=False)
    assert "test/random_acc" in trainer.callback_metrics


def test_other_modules_and_missing_sets_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="use DistilledDataModule"):
        make_trainer(tmp_path, 1, evaluation()).fit(TinyModule())
    with pytest.raises(MisconfigurationException, match="run trainer.fit before"):
        make_trainer(tmp_path, 1, evaluation()).test(distillation(), verbose=False)


class WritesResults(pl.Callback):
    def on_fit_end(self, trainer, pl_module):
        results = {name: pl_module.results["val"][name] for name in ("distilled", "baselines")}
        torch.save(results, f"{trainer.default_root_dir}/rank-{trainer.global_rank}.pt")


@pytest.mark.processes
def test_two_processes_share_networks_and_images(tmp_path):
    protocol = Protocol(steps=40, operations=(), learning_rate=0.05)
    module = distillation()
    make_trainer(tmp_path, 1, evaluation(protocol=protocol, steps=None)).fit(module)
    trainer = make_trainer(
        tmp_path, 1, evaluation(protocol=protocol, steps=None), WritesResults(), strategy="ddp_fork", devices=2
    )
    trainer.fit(distillation())
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    for found, alone in zip(
        (first["distilled"], first["baselines"]["mix"]),
        (module.results["val"]["distilled"], module.results["val"]["baselines"]["mix"]),
        strict=True,
    ):
        assert len(set(found["per_class"])) > 1
        assert found["accuracies"] == pytest.approx(alone["accuracies"], abs=0.04)
        assert found["per_class"] == pytest.approx(alone["per_class"], abs=0.06)
