from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import TensorDataset

from lightning_plugins.data import DigitsDataModule, DistilledDataModule, DistilledDataset
from lightning_plugins.distillation import (
    CharacteristicFunction,
    DistillationSettings,
    DistributionMatching,
    ExtractorBank,
    FrequencySampler,
    SyntheticSet,
    decode,
    image_grid,
    preset_settings,
)
from lightning_plugins.distillation.presets import PRESETS, merged
from lightning_plugins.modules import DatasetDistillation, ImageClassifier
from toys import make_trainer

SMALL = {
    "batch_real": 6,
    "num_frequencies": 32,
    "num_pairs": 2,
    "pretrain_epochs": 1,
    "net_epochs": 1,
    "net_images": 20,
}


def real_images(num_classes: int = 3, side: int = 8) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(num_classes).repeat(10)
    images = 0.5 * torch.rand(len(labels), 1, side, side, generator=generator)
    images[torch.arange(len(labels)), 0, labels] += 0.5
    return TensorDataset(images, labels)


def distillation(preset: str = "dm", **arguments) -> DatasetDistillation:
    settings = SMALL | arguments.pop("settings", {})
    defaults = {"model_args": {"width": 4}, "images_per_class": 1, "iterations_per_epoch": 5, "dataset": real_images()}
    return DatasetDistillation("convnet3", preset=preset, settings=settings, **(defaults | arguments))


def images_after(folder, module: DatasetDistillation, epochs: int = 1, **arguments) -> torch.Tensor:
    make_trainer(folder, epochs, **arguments).fit(module)
    return module.synthetic.images.detach().clone()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_changes_the_images_and_counts_its_iterations(tmp_path, preset):
    trainer = make_trainer(tmp_path, 2, log_every_n_steps=2)
    module = distillation(preset, iterations_per_epoch=2)
    trainer.fit(module)
    images = module.synthetic.images.detach()
    assert trainer.global_step == 4
    assert not torch.equal(images.cpu(), module._start)
    assert images.isfinite().all()
    assert torch.isfinite(trainer.callback_metrics["distillation/loss"])
    assert (module.sampling_network is not None) == (preset == "ncfm-paper")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_every_setting(preset):
    assert None not in vars(preset_settings(preset)).values()


def test_settings_win_over_the_preset_and_are_kept(tmp_path):
    module = distillation("dm", settings={"batch_real": 7, "rho": 2, "initialisation": "mix"})
    images_after(tmp_path, module)
    assert (module.config["batch_real"], module.config["rho"], module.config["momentum"]) == (7, 2, 0.5)
    assert module.synthetic.decoded_per_class == 4
    assert module.hparams.settings["rho"] == 2
    typed = merged(preset_settings("dm"), DistillationSettings(batch_real=7))
    assert typed["batch_real"] == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batchreal": 3}, "near names are batch_real"),
        ({"rho": 0}, "rho must be at least 1"),
        ({"optimizer": "lion"}, "adamw, sgd"),
        ({"batch_synthetic": -1}, "batch_synthetic must be at least 0"),
        ({"pretrain_cutmix": 2.0}, "pretrain_cutmix must lie in"),
        ({"calibration_weight": 1.0}, "set calibration_weight to 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        distillation("dm", settings=settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_class": 0}, "images_per_class must be an integer of at least 1"),
        ({"preset": "ncmf"}, "preset must be one of house"),
        ({"iterations_per_epoch": 0}, "iterations_per_epoch"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DatasetDistillation(**arguments)


def test_without_real_images_and_in_another_precision(tmp_path):
    with pytest.raises(MisconfigurationException, match="dataset=..."):
        make_trainer(tmp_path, 1).fit(distillation(dataset=None))
    with pytest.raises(MisconfigurationException, match="must stay in float32"):
        make_trainer(tmp_path, 1, precision="64-true").fit(distillation())


def test_the_loss_falls(tmp_path):
    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, *rest):
            losses.append(float(trainer.callback_metrics["distillation/loss"]))

    module = distillation("dm", iterations_per_epoch=60, settings={"augmentation": "", "learning_rate": 0.5})
    make_trainer(tmp_path, 1, Losses(), log_every_n_steps=1).fit(module)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("preset", ["ncfm-paper", "ncfm-released", "dsa", "idc"])
def test_a_resumed_run_is_bit_equal(tmp_path, preset):
    settings = {}
    if preset in ("dsa", "idc"):  # networks that are kept for 4 iterations are in the middle of their life after 10
        settings = {"net_refresh": 4, "net_training": "synthetic" if preset == "dsa" else "real"}

    def make() -> DatasetDistillation:
        return distillation(preset, settings=settings, images_per_class=2)

    straight = make()
    images = images_after(tmp_path, straight, 4)
    first = make_trainer(tmp_path, 2)
    first.fit(make())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    trainer = make_trainer(tmp_path, 4)
    trainer.fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 20
    assert torch.equal(resumed.synthetic.images, images)
    if straight.sampling_network is not None:
        for name, value in straight.sampling_network.state_dict().items():
            assert torch.equal(value, resumed.sampling_network.state_dict()[name])


def test_a_checkpoint_loads_without_data(tmp_path):
    module = distillation("ncfm-paper", settings={"rho": 2})
    checkpoint = ModelCheckpoint(tmp_path, filename="set")
    make_trainer(tmp_path, 1, checkpoint, enable_checkpointing=True).fit(module)
    loaded = DatasetDistillation.load_from_checkpoint(checkpoint.best_model_path, weights_only=True)
    assert torch.equal(loaded.synthetic.images, module.synthetic.images)
    assert loaded.synthetic.rho == 2
    assert loaded.config == module.config
    assert loaded.net_factory()().fc.out_features == 3


def test_groups_of_classes_change_nothing(tmp_path):
    images = [
        images_after(tmp_path, distillation("ncfm-paper", classes_per_group=size, settings={"rho": 2}))
        for size in (1, 2, 3)
    ]
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=1e-4)
    torch.testing.assert_close(images[1], images[2], rtol=0, atol=1e-4)


def test_vectorised_steps_go_about_as_far_as_sequential_ones(tmp_path):
    start = None
    found = {}
    for stepping in ("sequential", "vectorised", "joint"):
        module = distillation(
            "ncfm-paper",
            iterations_per_epoch=30,
            settings={"class_stepping": stepping, "sampling_network": False, "augmentation": "", "plateau_patience": 0},
        )
        found[stepping] = images_after(tmp_path, module)
        start = module._start
    travel = (found["sequential"] - start).abs().mean()
    near = (found["vectorised"] - found["sequential"]).abs().mean()
    far = (found["joint"] - found["sequential"]).abs().mean()
    assert near < 0.5 * travel
    assert near < far


def test_the_users_random_state_and_the_data_modules_loader_are_left_alone(tmp_path):
    data = DigitsDataModule(batch_size=32)
    module = distillation("house", dataset=None, iterations_per_epoch=2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make_trainer(tmp_path, 1, limit_val_batches=0).fit(module, datamodule=data)
    assert torch.equal(torch.rand(3), expected)
    assert "train_dataloader" not in vars(data)
    assert len(module._pool) == 1210
    assert module.synthetic.class_names == tuple("0123456789")


def test_a_data_module_serves_other_modules_after_an_exception(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, *arguments):
            raise KeyError("stop")

    data = DigitsDataModule(batch_size=600)
    with pytest.raises(KeyError):
        make_trainer(tmp_path, 1, Fails()).fit(distillation(dataset=None), datamodule=data)
    other = ImageClassifier("convnet3", num_classes=10, in_channels=1, image_size=8, model_args={"width": 2})
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(other, datamodule=data)
    assert trainer.global_step == 3


def test_augmentation_of_the_data_module_does_not_reach_the_pool(tmp_path):
    data = DigitsDataModule(augmentation=torch.zeros_like)
    module = distillation(dataset=None)
    make_trainer(tmp_path, 1, limit_val_batches=0, max_steps=1).fit(module, datamodule=data)
    assert module._pool.images.max() > 0


@pytest.mark.parametrize(("preset", "cutmix"), [("ncfm-paper", 0.5), ("house", 0.0)])
def test_experts_are_trained_with_cutmix_in_place_of_cutout(tmp_path, monkeypatch, preset, cutmix):
    given = {}
    train = ExtractorBank.train.__func__

    def watched(cls, *arguments, **keywords):
        given.update(keywords)
        return train(cls, *arguments, **keywords)

    monkeypatch.setattr(ExtractorBank, "train", classmethod(watched))
    images_after(tmp_path, distillation(preset))
    assert given["cutmix"] == cutmix
    assert ("cutout" in given["augmentation"].operations) == (not cutmix)
    assert {"color", "crop"} <= set(given["augmentation"].operations)


def test_a_step_sees_a_part_of_the_synthetic_images_and_a_resumed_run_the_same(tmp_path):
    assert preset_settings("idc").batch_synthetic == 128

    def make() -> DatasetDistillation:
        settings = {"batch_synthetic": 3, "rho": 2, "momentum": 0.0, "augmentation": ""}
        return distillation("idc", settings=settings, images_per_class=3, iterations_per_epoch=1)

    module, seen = make(), []

    class Sees(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            loss = pl_module.objective.loss

            def watched(net, real, synthetic, **arguments):
                seen.append(synthetic.detach())
                return loss(net, real, synthetic, **arguments)

            pl_module.objective.loss = watched

    make_trainer(tmp_path, 3, Sees()).fit(module)
    assert [tuple(part.shape[:2]) for part in seen] == [(3, 3)] * 3
    decoded = module.synthetic.normalise(decode(module._start, 2))
    found = [
        [int((row - rows).flatten(1).norm(dim=1).argmin()) for row in part]
        for part, rows in zip(seen[0], decoded, strict=True)
    ]
    assert all(len(set(rows)) == 3 for rows in found)
    assert len({tuple(rows) for rows in found}) > 1  # each class has a draw of its own
    first = make_trainer(tmp_path, 1)
    first.fit(make())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    make_trainer(tmp_path, 3).fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(resumed.synthetic.images, module.synthetic.images)


def test_a_module_as_model_gets_fresh_weights(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3))
    before = net[0].weight.detach().clone()
    module = DatasetDistillation(
        net, preset="dsa", images_per_class=1, iterations_per_epoch=2, dataset=real_images(), settings=SMALL
    )
    images_after(tmp_path, module)
    assert torch.equal(net[0].weight, before)
    assert not torch.equal(module._extractors.net[0].weight, before)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    bare = nn.Sequential(nn.Flatten(), Bare(), nn.Linear(64, 3))
    module = DatasetDistillation(bare, preset="dm", dataset=real_images(), settings=SMALL)
    with pytest.raises(MisconfigurationException, match="reset_parameters"):
        images_after(tmp_path, module)


def test_an_objective_of_ones_own(tmp_path):
    module = distillation("dm", objective=CharacteristicFunction(FrequencySampler(16)))
    images_after(tmp_path, module)
    assert module.about()["objective"] == "CharacteristicFunction"
    assert isinstance(distillation("dm", objective=DistributionMatching()).objective, DistributionMatching)


def test_bfloat16(tmp_path):
    for preset in ("house", "dsa"):
        plain, half = distillation(preset), distillation(preset)
        images_after(tmp_path, plain)
        images_after(tmp_path, half, precision="bf16-mixed")
        assert half.synthetic.images.dtype == torch.float32
        change = (plain.synthetic.images.detach() - plain._start).abs().mean()
        assert (half.synthetic.images - plain.synthetic.images).detach().abs().mean() < change


def test_the_trained_networks_are_kept_in_a_file(tmp_path):
    path = str(tmp_path / "nets.safetensors")
    first, second = (distillation("house", extractors_path=path) for _ in range(2))
    one = images_after(tmp_path, first)
    assert torch.equal(images_after(tmp_path, second), one)
    assert first._extractors.fingerprint == second._extractors.fingerprint


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_plugins.modules.dataset_distillation.free_bytes", lambda device: 1000)
    module = distillation("dm")
    with pytest.warns(UserWarning, match="lower classes_per_group"):
        images_after(tmp_path, module)
    assert module.classes_per_group == 1


class WritesImages(pl.Callback):
    def on_fit_end(self, trainer, pl_module):
        state = pl_module.synthetic.images.detach(), dict(trainer.callback_metrics)
        torch.save(state, f"{trainer.default_root_dir}/rank-{trainer.global_rank}.pt")


@pytest.mark.processes
@pytest.mark.parametrize("preset", ["ncfm-paper", "ncfm-released"])
def test_two_processes_share_the_classes(tmp_path, preset):
    settings = {"augmentation_scope": "batch"}
    arguments = {"log_every_n_steps": 5}
    alone = images_after(tmp_path, distillation(preset, settings=settings))
    trainer = make_trainer(tmp_path, 1, WritesImages(), strategy="ddp_fork", devices=2, **arguments)
    trainer.fit(distillation(preset, settings=settings))
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], alone, rtol=0, atol=1e-4)
    assert torch.equal(first[1]["distillation/loss"], second[1]["distillation/loss"])


def test_pictures_and_scalars(tmp_path):
    module = distillation("house", iterations_per_epoch=2)
    trainer = make_trainer(tmp_path, 1, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(module)
    names = {path.name.split("-step")[0] for path in tmp_path.rglob("media/distillation/*.png")}
    assert names == {"images", "images_decoded", "images_change", "loss_per_class"}
    evaluated = tmp_path / "evaluated"
    make_trainer(evaluated, 0, logger=CSVLogger(evaluated)).fit(distillation("dm"))
    assert [path.name.split("-step")[0] for path in evaluated.rglob("media/**/*.*")] == ["images"]
    assert image_grid(torch.rand(2, 1, 1, 8, 8)).shape == (1, 66, 131)
    assert image_grid(torch.rand(2, 1, 3, 32, 32)).shape == (3, 130, 259)
    expected = ["calibration_loss", "squared_difference", "modulus_real", "pixel_min", "lr", "gradient_norm_images"]
    assert {f"distillation/{name}" for name in expected} <= set(trainer.callback_metrics)
    assert "distillation/batch_real: 6" in "".join(path.read_text() for path in tmp_path.rglob("hparams.yaml"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    module = distillation("house", dataset=None, images_per_class=2, iterations_per_epoch=2)
    trainer = make_trainer(folder, 1, limit_val_batches=0)
    trainer.fit(module, datamodule=DigitsDataModule())
    callback = next(part for part in trainer.callbacks if hasattr(part, "export"))
    return folder / "exports", callback.export(folder / "exports"), module


def test_export(exported):
    folder, paths, module = exported
    assert [path.name for path in paths] == ["set.safetensors", "meta.json", "png"]
    loaded = SyntheticSet.load(folder)
    assert torch.equal(loaded.images, module.synthetic.images)
    assert len(list((folder / "png").rglob("*.png"))) == 20
    about = json.loads((folder / "meta.json").read_text())["about"]
    assert about["data"] == {"name": "DigitsDataModule", "image_size": 8, "val_fraction": 0.1, "seed": 0}
    assert about["settings"]["batch_real"] == 6


def test_a_saved_set_can_be_the_start(tmp_path, exported):
    folder, _, module = exported
    further = distillation("dm", dataset=None, start_from=str(folder))
    make_trainer(tmp_path, 0).fit(further, datamodule=DigitsDataModule())
    assert torch.equal(further.synthetic.images, module.synthetic.images)
    with pytest.raises(ValueError, match="they must agree"):
        make_trainer(tmp_path, 1).fit(distillation("dm", start_from=str(folder)))


def test_an_image_classifier_trains_on_the_saved_set(tmp_path, exported):
    folder, _, module = exported
    data = DistilledDataModule(folder, batch_size=16, repeats=2)
    data.setup()
    digits = DigitsDataModule()
    digits.setup()
    assert len(data.train_set) == 2 * 10 * module.synthetic.decoded_per_class
    assert (len(data.val_set), len(data.test_set)) == (136, 451)
    assert torch.equal(data.val_set[5][0], digits.val_set[5][0])
    assert data.mean == pytest.approx(digits.mean)
    net = ImageClassifier("convnet3", num_classes=10, in_channels=1, image_size=8, model_args={"width": 2})
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(net, datamodule=data)
    trainer.test(net, datamodule=data, verbose=False)
    images = torch.stack([item[0] for item in DistilledDataset(folder)])
    assert images.min() >= 0
    assert images.max() <= 1


def test_a_saved_set_without_known_data(tmp_path):
    SyntheticSet(torch.rand(10, 1, 1, 8, 8)).save(tmp_path, about={"data": {"name": "os.system"}})
    with pytest.raises(ValueError, match="pass the real data as real"):
        DistilledDataModule(tmp_path)
    assert DistilledDataModule(tmp_path, real=DigitsDataModule()).num_classes == 10
    with pytest.raises(ValueError, match="distilled from as real"):
        DistilledDataModule(tmp_path, real=DigitsDataModule(image_size=16))
    with pytest.raises(FileNotFoundError, match="exports of a distillation"):
        DistilledDataset(tmp_path / "absent")
