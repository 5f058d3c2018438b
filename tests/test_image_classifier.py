from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, recall_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.modules import ImageClassifier
from toys import assert_same_weights, make_trainer


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def images_and_labels(n: int = 23) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 1, 4, 4, generator=generator)
    return TensorDataset(images, (3 * images.mean((1, 2, 3)) + 0.8 * torch.rand(n, generator=generator)).long() % 3)


def loader(data: TensorDataset, batch_size: int = 8) -> DataLoader:
    return DataLoader(data, batch_size=batch_size)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_are_those_of_the_whole_set_in_unequal_batches(tmp_path, stage):
    data = images_and_labels()
    images, labels = data.tensors
    module = ImageClassifier(net(), num_classes=3)
    logged = getattr(make_trainer(tmp_path), stage)(module, loader(data), verbose=False)[0]
    with torch.no_grad():
        logits = module(images)
    prefix = {"validate": "val", "test": "test"}[stage]
    assert logged.keys() == {f"{prefix}/{name}" for name in ("acc", "balanced_acc", "worst_acc", "nll")}
    assert logged[f"{prefix}/nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert logged[f"{prefix}/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert logged[f"{prefix}/balanced_acc"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    assert logged[f"{prefix}/worst_acc"] == pytest.approx(
        recall_score(labels, logits.argmax(1), average=None, labels=labels.unique().tolist()).min()
    )


def test_training_loss_is_that_of_this_epoch_and_of_the_latest_steps(tmp_path):
    seen = []

    class Criterion(nn.CrossEntropyLoss):
        def forward(self, logits, targets):
            loss = super().forward(logits, targets)
            seen.append((loss.item() * len(targets), len(targets)))
            return loss

    def mean(batches):
        return sum(total for total, _ in batches) / sum(size for _, size in batches)

    module = ImageClassifier(
        net(), num_classes=3, criterion=Criterion(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5)
    )
    trainer = make_trainer(tmp_path, 3, log_every_n_steps=2)
    trainer.fit(module, loader(images_and_labels()), loader(images_and_labels(11)))
    assert len(seen) == 9
    assert trainer.callback_metrics["train/loss_epoch"].item() == pytest.approx(mean(seen[6:]), rel=1e-5)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(mean(seen[6:8]), rel=1e-5)  # logged at step 8


def test_normalisation_is_inside():
    plain = ImageClassifier(net(), num_classes=3)
    normalised = ImageClassifier(plain.model, num_classes=3, mean=(0.25,), std=(0.5,))
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(normalised(images), plain((images - 0.25) / 0.5))
    assert torch.equal(normalised.predict_step(images, 0), normalised.predict_step((images, None), 0))


def nan_image() -> TensorDataset:
    images, labels = images_and_labels().tensors
    images[5, 0, 0, 0] = torch.nan
    return TensorDataset(images, labels)


def with_label(label: int) -> TensorDataset:
    images, labels = images_and_labels().tensors
    labels[3] = label
    return TensorDataset(images, labels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_label(3), r"labels must lie in \[0, 3\), got 3; correct"),
        (with_label(-1), r"labels must lie in \[0, 3\), got -1; correct"),
        (nan_image(), r"not finite \(at index 5, maybe others\); clean the data"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_faulty_batches_stop_the_run_before_any_weight_changes(tmp_path, data, message, stage):
    module = ImageClassifier(net(), num_classes=3)
    before = {name: value.clone() for name, value in module.state_dict().items() if name.startswith("model")}
    with pytest.raises(ValueError, match=message):
        getattr(make_trainer(tmp_path), stage)(module, loader(data))
    assert_same_weights(before, {name: module.state_dict()[name] for name in before})


@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, log_every_n_steps):
    class Broken(nn.Module):
        def forward(self, logits, targets):
            return F.cross_entropy(logits, targets) * torch.nan

    module = ImageClassifier(net(), num_classes=3, criterion=Broken())
    trainer = make_trainer(tmp_path, log_every_n_steps=log_every_n_steps)
    with pytest.raises(ValueError, match="training loss is not finite any more .*lower the learning rate"):
        trainer.fit(module, loader(images_and_labels()))
    assert trainer.current_epoch == 0


def test_soft_targets_reach_the_criterion_unchanged(tmp_path):
    seen = []

    class Criterion(nn.CrossEntropyLoss):
        def forward(self, logits, targets):
            seen.append(targets)
            return super().forward(logits, targets)

    images, labels = images_and_labels(8).tensors
    soft = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(
        ImageClassifier(net(), num_classes=3, criterion=Criterion()), loader(TensorDataset(images, soft), batch_size=8)
    )
    assert torch.equal(seen[0], soft)
    assert 0 <= trainer.callback_metrics["train/acc"] <= 1


@pytest.mark.parametrize(("interval", "steps"), [("epoch", 2), ("step", 6)])
def test_scheduler_interval(tmp_path, interval, steps):
    module = ImageClassifier(
        net(),
        num_classes=3,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        lr_scheduler_interval=interval,
    )
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(module, loader(images_and_labels()))
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**steps)


def is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def test_a_named_model_loads_from_its_checkpoint_alone(tmp_path):
    module = ImageClassifier(
        "resnet20",
        num_classes=3,
        in_channels=1,
        model_args={"width": 2},
        mean=[0.3],
        std=[0.4],
        optimizer=torch.optim.SGD,
    )
    assert is_plain(dict(module.hparams))
    trainer = make_trainer(tmp_path, 1)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert_same_weights(module, loaded)


def test_an_own_module_loads_with_model(tmp_path):
    module = ImageClassifier(net(), num_classes=3, criterion=nn.CrossEntropyLoss(label_smoothing=0.1))
    assert is_plain(dict(module.hparams))
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(module, loader(images_and_labels(8)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, model=net())
    assert_same_weights(module, loaded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_classes must be at least 2, got None"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": 3, "mean": [0.5]}, "both mean and std or neither"),
        ({"num_classes": 3, "mean": [0.5], "std": [0.0]}, "std must be positive"),
        ({"num_classes": 3, "lr_scheduler_interval": "batch"}, "must be 'epoch' or 'step', got 'batch'"),
        ({"num_classes": 3, "model_args": {"width": 3}}, "needs a model name; Sequential is built already"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(net(), **arguments)
