"""ObjectiveComparison: each copy is what a run of its own gives."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_plugins.data import DigitsDataModule, Imbalance
from lightning_plugins.modules import ObjectiveComparison
from lightning_plugins.robustness import PGDAT, TRADES, BalancedSoftmax, PGDAttack
from toys import make_trainer

ATTACK = PGDAttack(eps=0.1, num_steps=2)


def data():
    return DigitsDataModule(batch_size=64, transforms=[Imbalance("exp", 10)])


def module(objectives, **arguments):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    optimizer = arguments.pop("optimizer", None)
    return ObjectiveComparison(net, objectives, attack=ATTACK, num_classes=10, optimizer=optimizer, **arguments)


def run(folder, objectives, **arguments):
    trained = module(objectives, **arguments)
    limits = {"limit_train_batches": 4, "limit_val_batches": 1, "limit_test_batches": 2}
    trainer = make_trainer(folder, 2, logger=CSVLogger(folder), **limits)
    datamodule = data()
    trainer.fit(trained, datamodule)
    trainer.test(trained, datamodule, verbose=False)
    return trained, trainer


def test_copies_train_as_if_alone(tmp_path):
    together, trainer = run(tmp_path, {"plain": PGDAT(), "bsl": BalancedSoftmax(), "trades": TRADES(1.0)})
    for name, objective in {"plain": PGDAT(), "bsl": BalancedSoftmax(), "trades": TRADES(1.0)}.items():
        alone, _ = run(tmp_path, {"alone": objective})
        expected = alone.networks["alone"].state_dict()
        for key, value in together.networks[name].state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    logged = trainer.callback_metrics
    for name in ("plain", "bsl", "trades"):
        assert logged[f"test/{name}/robust_acc_worst"] <= logged[f"test/{name}/robust_acc_balanced"]
        assert logged[f"test/{name}/robust_acc"] <= logged[f"test/{name}/clean_acc"] + 0.2
        assert f"test/{name}/robust_acc_tail" in logged
    assert any("comparison" in str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))


def test_forward_gives_the_logits_of_all_copies():
    comparison = module({"a": PGDAT(), "b": PGDAT()}, mean=[0.5], std=[0.25]).eval()
    images = torch.rand(3, 1, 8, 8)
    logits = comparison(images)
    assert logits.shape == (2, 3, 10)
    torch.testing.assert_close(logits[0], comparison.networks["a"]((images - 0.5) / 0.25))
    assert torch.equal(logits[0], logits[1])  # the same start


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="must name at least one objective"):
        module({})
    with pytest.raises(ValueError, match="no dot and no slash"):
        module({"a/b": PGDAT()})
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        ObjectiveComparison("convnet3", {"a": PGDAT()})
    loader = torch.utils.data.DataLoader([(torch.rand(1, 8, 8), 1)] * 8, batch_size=4)
    trainer, comparison = make_trainer(tmp_path, 1), module({"bsl": BalancedSoftmax()})
    with pytest.raises(MisconfigurationException, match="bsl needs the number of training samples"):
        trainer.fit(comparison, loader)
