"""Batches depend on the seed and the epoch alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchvision.transforms import v2

from lightning_plugins.data import DigitsDataModule, SeededSampler


def digits(**arguments) -> DigitsDataModule:
    # 537 training images, and an augmentation that draws.
    defaults = {"batch_size": 160, "val_fraction": 0.6, "augmentation": v2.RandomCrop(8, padding=2)}
    data = DigitsDataModule(**{**defaults, **arguments})
    data.setup()
    return data


def epoch_of(loader, epoch: int) -> list[torch.Tensor]:
    loader.sampler.set_epoch(epoch)
    return [images for images, _ in loader]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_an_epoch_repeats_and_differs_from_others_and_other_seeds():
    loader = digits().train_dataloader()
    first = epoch_of(loader, 0)
    torch.manual_seed(99)
    assert same(first, epoch_of(digits().train_dataloader(), 0))
    assert not same(first, epoch_of(loader, 1))
    assert same(first, epoch_of(loader, 0))
    assert not same(first, epoch_of(digits(seed=1).train_dataloader(), 0))


def test_augmentation_itself_changes_with_the_epoch():
    loader = digits(batch_size=600).train_dataloader()
    loader.sampler.shuffle = False
    (first,), (second,) = epoch_of(loader, 0), epoch_of(loader, 1)
    changed = (first != second).flatten(1).any(1).float().mean()
    assert changed > 0.9  # of 25 crops a sample draws the same one in 4 %


def test_workers_do_not_matter():
    alone, workers = digits().train_dataloader(), digits(num_workers=2).train_dataloader()
    for epoch in (0, 3, 1):  # the workers persist, their copies of the data set with them
        assert same(epoch_of(alone, epoch), epoch_of(workers, epoch))


def test_the_global_random_state_stays():
    data = digits()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    data.train_set[5]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_index_is_deterministic_too():
    dataset = digits().train_set
    assert torch.equal(dataset[5][0], dataset[5][0])


def test_two_replicas_share_an_epoch_out_evenly():
    data = digits(val_fraction=0)  # 1,346 images, 673 for each
    whole = dict(iter(data.train_dataloader().sampler))
    shares = []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(
            world_size=2, global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        shares.append(dict(iter(data.train_dataloader().sampler)))
    assert [len(share) for share in shares] == [673, 673]
    assert {**shares[0], **shares[1]} == whole  # also: a sample's augmentation is the same on any rank


def test_sampler_seeds_depend_on_seed_and_epoch():
    def seeds(seed: int, epoch: int) -> dict[int, int]:
        sampler = SeededSampler(range(100), num_replicas=1, rank=0, seed=seed)
        sampler.set_epoch(epoch)
        return dict(iter(sampler))

    assert seeds(0, 0) == seeds(0, 0)
    assert len({*seeds(0, 0).values(), *seeds(0, 1).values(), *seeds(1, 0).values()}) > 295


def fingerprint(images: torch.Tensor) -> float:
    weights = torch.arange(1, images.numel() + 1, dtype=torch.float64).reshape(images.shape)
    return (weights * images).sum().item()


class Recorder(pl.LightningModule):
    """A linear model that keeps a fingerprint of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.seen: list[tuple[int, int, float]] = []

    def training_step(self, batch, batch_idx):
        images, targets = batch
        self.seen.append((self.current_epoch, len(targets), fingerprint(images)))
        return nn.functional.cross_entropy(self.layer(images.flatten(1)), targets)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, epochs: int, *callbacks: pl.Callback, **arguments) -> pl.Trainer:
    options = {
        "default_root_dir": folder,
        "max_epochs": epochs,
        "callbacks": list(callbacks),
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": bool(callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**options, **arguments})


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> list[tuple[int, int, float]]:
    model = Recorder()
    trainer(tmp_path_factory.mktemp("straight"), 3).fit(model, datamodule=digits())
    return model.seen


def test_trainer_epochs_are_those_of_a_plain_loop(straight):
    loader = digits().train_dataloader()
    assert [entry[:2] for entry in straight[:4]] == [(0, 160), (0, 160), (0, 160), (0, 57)]
    assert len({fingerprint for *_, fingerprint in straight}) == 12
    for epoch in range(3):
        assert [fingerprint(images) for images in epoch_of(loader, epoch)] == [
            entry[2] for entry in straight if entry[0] == epoch
        ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_the_same_batches(tmp_path, straight, num_workers):
    # Written at the end of validation, before Lightning counts the epoch as done: its usual ModelCheckpoint.
    usual = ModelCheckpoint(tmp_path, "usual-{epoch}", save_top_k=-1)
    each_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    half = trainer(tmp_path, 2, usual, each_step)
    half.fit(Recorder(), datamodule=digits(num_workers=num_workers))
    half.save_checkpoint(tmp_path / "after.ckpt")
    for name, done in (("after", 8), ("usual-epoch=1", 8), ("usual-epoch=0", 4), ("step=6", 6), ("step=8", 8)):
        resumed = Recorder()
        data = digits(num_workers=num_workers)
        trainer(tmp_path, 3).fit(resumed, datamodule=data, ckpt_path=tmp_path / f"{name}.ckpt")
        assert resumed.seen == straight[done:], name


def test_resume_after_a_limited_epoch_starts_the_next_at_its_first_batch(tmp_path, straight):
    limited = [entry for start in (0, 4, 8) for entry in straight[start : start + 2]]
    each_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, 2, each_step, limit_train_batches=2).fit(Recorder(), datamodule=digits())
    for done in (3, 4):
        resumed = Recorder()
        checkpoint = tmp_path / f"step={done}.ckpt"
        trainer(tmp_path, 3, limit_train_batches=2).fit(resumed, datamodule=digits(), ckpt_path=checkpoint)
        assert resumed.seen == limited[done:]


def test_trainer_entry_points(tmp_path):
    model, data = Recorder(), digits()
    runner = trainer(tmp_path, 1, overfit_batches=2)
    runner.fit(model, datamodule=data)
    assert len(model.seen) == 2
    assert trainer(tmp_path, 1).validate(model, datamodule=DigitsDataModule())
    assert trainer(tmp_path, 1).test(model, datamodule=DigitsDataModule())
    without = Recorder()
    trainer(tmp_path, 1).fit(without, datamodule=DigitsDataModule(val_fraction=0))
    assert len(without.seen) == 11


class WriteSeen(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sampler = trainer.train_dataloader.sampler
        lines = [f"{type(sampler).__name__} {sampler.num_replicas} {sampler.rank}", *map(str, pl_module.seen)]
        (self.folder / f"rank{trainer.global_rank}").write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(120)
def test_lightning_keeps_the_sampler_under_ddp(tmp_path):
    runner = trainer(tmp_path, 2, WriteSeen(tmp_path), devices=2, strategy="ddp_fork", enable_checkpointing=False)
    runner.fit(Recorder(), datamodule=digits(val_fraction=0, batch_size=400))
    ranks = [(tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1)]
    assert [lines[0] for lines in ranks] == ["SeededSampler 2 0", "SeededSampler 2 1"]
    assert not set(ranks[0][1:]) & set(ranks[1][1:])
    assert [len(lines) for lines in ranks] == [5, 5]


def test_training_batches_can_name_their_samples():
    data = DigitsDataModule(batch_size=50, with_index=True)
    data.setup()
    images, targets, indices = next(iter(data.train_dataloader()))
    assert indices.dtype == torch.int64
    assert torch.equal(targets, data.train_set.targets[indices])
    torch.testing.assert_close(images[0], data.train_set[int(indices[0])][0])
    assert len(next(iter(data.val_dataloader()))) == len(next(iter(data.test_dataloader()))) == 2
