"""RobustnessEvaluation: what it measures, where it works, what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_plugins.callbacks import RobustnessEvaluation
from lightning_plugins.data import DigitsDataModule, Imbalance
from lightning_plugins.modules import ImageClassifier
from lightning_plugins.robustness import AutoAttack, FGSMAttack, PGDAttack, RobustAccuracy, fgsm
from toys import TinyImages, make_trainer

ATTACK = PGDAttack(eps=0.1, num_steps=3)
NO_STEP = PGDAttack(eps=0.0, num_steps=1, random_start=False)


def test_without_a_radius_robust_is_clean(tmp_path):
    evaluation = RobustnessEvaluation(NO_STEP, {"none": NO_STEP}, eps_grid=[0.0])
    trainer = make_trainer(tmp_path, 1, evaluation)
    trainer.fit(module := TinyImages())
    assert trainer.callback_metrics["val/robust_acc"] == trainer.callback_metrics["val/clean_acc"]
    (metrics,) = trainer.test(module, verbose=False)
    assert metrics["test/robust_acc"] == metrics["test/clean_acc"] == metrics["test/robust_acc_none"]


def test_figures_are_those_of_a_loop(tmp_path):
    module = TinyImages().eval()
    evaluation = RobustnessEvaluation(False, {"fgsm": FGSMAttack(0.1)}, eps_grid=())
    (metrics,) = make_trainer(tmp_path, 1, evaluation).test(module, verbose=False)
    slow = RobustAccuracy(3, average="none")
    for images, labels in module.test_dataloader():
        result = fgsm(module, images, labels, eps=0.1)
        slow.update(module(images).argmax(1), result.logits.argmax(1), labels)
    per_class = slow.compute()
    assert metrics["test/robust_acc_balanced"] == pytest.approx(float(per_class.mean()))
    assert metrics["test/robust_acc_worst"] == pytest.approx(float(per_class.min()))
    assert metrics["test/robust_acc"] == pytest.approx(float((per_class * torch.tensor([16, 12, 4])).sum() / 32))
    assert metrics["test/robust_acc"] <= metrics["test/clean_acc"]


def test_robust_means_to_survive_every_attack(tmp_path):
    attacks = {"a": PGDAttack(0.2, num_steps=2), "b": PGDAttack(0.2, "l2", num_steps=5), "c": FGSMAttack(0.15)}
    evaluation = RobustnessEvaluation(False, attacks, eps_grid=())
    trainer = make_trainer(tmp_path, 1, evaluation)
    (metrics,) = trainer.test(TinyImages(), verbose=False)
    assert metrics["test/robust_acc"] <= min(metrics[f"test/robust_acc_{name}"] for name in attacks)


@pytest.mark.parametrize("entry", ["fit", "validate", "test"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_works_in_every_entry_point_with_inference_mode(tmp_path, entry, precision):
    module = TinyImages()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer(tmp_path, 1, RobustnessEvaluation(ATTACK, {"pgd": ATTACK}), precision=precision)
    getattr(trainer, entry)(module, **({} if entry == "fit" else {"verbose": False}))
    stage = "test" if entry == "test" else "val"
    assert 0 <= trainer.callback_metrics[f"{stage}/robust_acc"] <= trainer.callback_metrics[f"{stage}/clean_acc"]
    assert all(parameter.grad is None or entry == "fit" for parameter in module.parameters())
    if entry != "fit":
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_checkpoints_can_be_chosen_by_robust_accuracy(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/robust_acc", mode="max")
    evaluation = RobustnessEvaluation(ATTACK, {}, every_n_epochs=2)
    make_trainer(tmp_path, 3, evaluation, checkpoint, enable_checkpointing=True).fit(TinyImages())
    assert checkpoint.best_model_score is not None


def test_validation_attacks_a_fixed_part_alike_each_time(tmp_path):
    seen = []

    class Watch(RobustnessEvaluation):
        def _run(self, trainer, pl_module, attack, inputs, *args):
            result = super()._run(trainer, pl_module, attack, inputs, *args)
            seen.append((len(inputs), result.adversarial))
            return result

    class Still(TinyImages):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Still()
    module.net[1].momentum = 0.0
    make_trainer(tmp_path, 2, Watch(ATTACK, num_val_samples=12)).fit(module)
    assert [count for count, _ in seen] == [8, 4, 8, 4]
    assert torch.equal(seen[0][1], seen[2][1])


def test_tail_and_pictures(tmp_path):
    trainer = make_trainer(
        tmp_path, 1, RobustnessEvaluation(ATTACK, {"pgd": ATTACK}, counts=[16, 12, 4]), logger=CSVLogger(tmp_path)
    )
    trainer.fit(module := TinyImages())
    (metrics,) = trainer.test(module, verbose=False)
    assert "test/robust_acc_tail" in metrics
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    for picture in ("class_accuracy", "attacked_images", "accuracy_over_eps"):
        assert any(picture in name for name in names), (picture, names)


def test_a_bare_test_of_our_data_has_no_tail(tmp_path):
    data = DigitsDataModule(batch_size=32, transforms=[Imbalance("exp", 10)])
    module = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), num_classes=10)
    evaluation = RobustnessEvaluation(False, {"fgsm": FGSMAttack(0.1)}, eps_grid=())
    (metrics,) = make_trainer(tmp_path, 1, evaluation, limit_test_batches=1).test(module, data, verbose=False)
    assert "test/robust_acc" in metrics
    assert "test/robust_acc_tail" not in metrics


def test_auto_attack_in_test(tmp_path):
    attacks = {"aa": AutoAttack(0.1, version="quick", num_steps=5)}
    trainer = make_trainer(tmp_path, 1, RobustnessEvaluation(False, attacks, eps_grid=()), limit_test_batches=1)
    (metrics,) = trainer.test(TinyImages(), verbose=False)
    assert metrics["test/robust_acc_aa"] <= metrics["test/clean_acc"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RobustnessEvaluation("pgd"), TypeError, "must be an Attack"),
        (lambda: RobustnessEvaluation(test_attacks={"pgd": "pgd"}), TypeError, "must be an Attack"),
        (lambda: RobustnessEvaluation(num_val_samples=0), ValueError, "at least 1"),
        (lambda: RobustnessEvaluation(every_n_epochs=0), ValueError, "at least 1"),
        (lambda: RobustnessEvaluation(eps_grid=[-1.0]), ValueError, "at least 0"),
        (lambda: RobustnessEvaluation(mean=[0.5]), ValueError, "go together"),
    ],
)
def test_wrong_arguments_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_inputs_that_are_no_images_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="could not attack the batch"):
        make_trainer(tmp_path, 1, RobustnessEvaluation(ATTACK)).validate(TinyImages(normalized=True), verbose=False)
