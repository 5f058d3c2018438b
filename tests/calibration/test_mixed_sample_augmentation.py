"""MixedSampleAugmentation and CalibrationRegularizer: against plain loops, with users' modules, and other callbacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_plugins.calibration import FocalLoss, mmce
from lightning_plugins.callbacks import (
    AdversarialTraining,
    AdversarialWeightPerturbation,
    CalibrationRegularizer,
    DeferredReweighting,
    MixedSampleAugmentation,
    MultiPrecisionQAT,
    TrainingStepCallback,
)
from lightning_plugins.mixing import CutMix, ForegroundRecombine, MixedLabels, Mixup, fmix, mixup
from lightning_plugins.modules import ImageClassifier
from lightning_plugins.robustness import MART, PGDAT, SRAT, TRADES, PGDAttack
from toys import TinyImages, TinyModule, assert_same_weights, make_trainer, weights

ATTACK = PGDAttack(eps=0.1, num_steps=2)


def fit(folder, module, *callbacks, epochs=2, **arguments):
    trainer = make_trainer(folder, epochs, *callbacks, **{"limit_val_batches": 0, **arguments})
    trainer.fit(module)
    return trainer


def generator_of(seed: int, step: int, batch_idx: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, step, batch_idx, 0]).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    torch.rand((), generator=generator, dtype=torch.float64)  # decides whether the batch is mixed
    return generator


class Recorder(TrainingStepCallback):
    """Stands behind the mixing and writes down what reaches the step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def around_training_step(self, trainer, pl_module, step, batch, batch_idx):
        self.seen.append(self.batch_fn(batch))
        return step(batch, batch_idx)


# --- What it trains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("arguments", "function"),
    [
        ({"alpha": 0.7}, lambda x, y, g: mixup(x, y, num_classes=3, alpha=0.7, generator=g)),
        ({"num_points": 3}, lambda x, y, g: mixup(x, y, num_classes=3, num_points=3, generator=g)),
        ({"per_sample": True}, lambda x, y, g: mixup(x, y, num_classes=3, per_sample=True, generator=g)),
        (
            {"label_lambda": "independent"},
            lambda x, y, g: mixup(x, y, num_classes=3, label_lambda="independent", generator=g),
        ),
        ({"policy": "fmix", "decay": 2.0}, lambda x, y, g: fmix(x, y, num_classes=3, decay=2.0, generator=g)),
    ],
)
def test_training_equals_a_loop_over_mixed_batches_with_soft_labels(tmp_path, arguments, function, soft):
    module, twin = TinyImages(), TinyImages()
    fit(tmp_path, module, MixedSampleAugmentation(seed=3, soft_targets=soft, num_classes=3, **arguments))
    optimizer = twin.configure_optimizers()
    step = 0
    for _ in range(2):
        for batch_idx, (images, labels) in enumerate(twin.train_dataloader()):
            mixed, targets = function(images, labels, generator_of(3, step, batch_idx))
            optimizer.zero_grad()
            F.cross_entropy(twin(mixed), targets).backward()
            optimizer.step()
            step += 1
    assert_same_weights(module, twin, rtol=1e-5, atol=1e-6)


def test_without_mixing_the_training_is_a_plain_one(tmp_path):
    plain, never, stopped = TinyImages(), TinyImages(), TinyImages()
    fit(tmp_path, plain)
    fit(tmp_path, never, MixedSampleAugmentation(prob=0.0))
    fit(tmp_path, stopped, MixedSampleAugmentation(stop_epoch=0))
    assert_same_weights(plain, never)
    assert_same_weights(plain, stopped)


@pytest.mark.parametrize(("stop", "mixed"), [(1, 4), (2.5, 10), (0.5, 8), (1.0, 4), (None, 16), (9, 16)])
def test_mixing_stops_at_an_epoch_or_a_share_of_the_training(tmp_path, stop, mixed):
    recorder = Recorder()
    fit(tmp_path, TinyImages(), MixedSampleAugmentation(stop_epoch=stop), recorder, epochs=4)
    kinds = [isinstance(targets, MixedLabels) for _, targets in recorder.seen]
    assert kinds == [True] * mixed + [False] * (16 - mixed)


def test_mixing_by_chance(tmp_path):
    recorder = Recorder()
    fit(tmp_path, TinyImages(), MixedSampleAugmentation(prob=0.5), recorder, epochs=10)
    kinds = [isinstance(targets, MixedLabels) for _, targets in recorder.seen]
    assert 10 <= sum(kinds) <= 30


def test_micro_batches_are_mixed_differently(tmp_path):
    recorder = Recorder()
    fit(tmp_path, TinyImages(), MixedSampleAugmentation(), recorder, epochs=1, accumulate_grad_batches=4)
    assert len({targets.shares[0].item() for _, targets in recorder.seen}) == 4


def test_validation_is_not_mixed(tmp_path):
    class Watches(TinyImages):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert type(batch[1]) is torch.Tensor
            super().validation_step(batch, batch_idx)

    fit(tmp_path, Watches(), MixedSampleAugmentation(), limit_val_batches=1.0)


@pytest.mark.parametrize("stop", [None, 0.75])
def test_resume_equals_a_straight_run(tmp_path, stop):
    def callback() -> MixedSampleAugmentation:
        return MixedSampleAugmentation("fmix", stop_epoch=stop, prob=0.7, per_sample=True)

    one, two = TinyImages(), TinyImages()
    fit(tmp_path, one, callback(), epochs=4)
    half = make_trainer(tmp_path, 4, callback(), limit_val_batches=0, max_steps=8)
    half.fit(TinyImages())
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer = make_trainer(tmp_path, 4, callback(), limit_val_batches=0)
    trainer.fit(two, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same_weights(one, two)


# --- Users' modules -----------------------------------------------------------------------------------------------


class WithMetrics(TinyImages):
    """Feeds its targets into a loss for integers and into torchmetrics."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss = loss
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("train_acc", self.accuracy, on_epoch=True)
        self.log("share", (logits.argmax(1) == labels).float().mean(), on_epoch=True, on_step=False)
        losses = {
            "cross-entropy": lambda: nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels),
            "nll": lambda: nn.NLLLoss()(logits.log_softmax(1), labels.long()),
            "one-hot": lambda: -(F.one_hot(labels, 3).float() * logits.log_softmax(1)).sum(1).mean(),
            "focal": lambda: FocalLoss()(logits, labels),
            "gather": lambda: -logits.log_softmax(1).gather(1, labels[:, None]).mean(),
        }
        return {"loss": losses[self.loss]()}


def test_losses_for_integers_and_training_metrics_survive(tmp_path):
    trained = {}
    for loss in ("cross-entropy", "nll", "one-hot", "focal"):
        module = WithMetrics(loss)
        trainer = fit(tmp_path, module, MixedSampleAugmentation())
        assert 0 <= trainer.callback_metrics["train_acc_epoch"] <= 1
        assert 0 <= trainer.callback_metrics["calibration/train_mixed_acc"] <= 1
        trained[loss] = weights(module.net)
    assert_same_weights(trained["nll"], trained["one-hot"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(trained["nll"]["5.weight"], trained["focal"]["5.weight"])


def test_a_loss_that_would_ignore_the_mixture_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="soft_targets=True"):
        fit(tmp_path, WithMetrics("gather"), MixedSampleAugmentation())
    fit(tmp_path, WithMetrics("gather"), MixedSampleAugmentation(prob=0.0))


@pytest.mark.parametrize("criterion", [None, FocalLoss()])
def test_image_classifier(tmp_path, criterion):
    module = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), num_classes=3, criterion=criterion)
    loader = TinyImages().train_dataloader()
    trainer = make_trainer(tmp_path, 2, MixedSampleAugmentation("cutmix"))
    trainer.fit(module, loader, loader)
    assert 0 <= trainer.callback_metrics["train/acc"] <= 1
    soft = make_trainer(tmp_path, 2, MixedSampleAugmentation("cutmix", soft_targets=True))
    if criterion is None:
        soft.fit(module, loader, loader)  # takes the number of classes from the module


def test_foreground_recombination_keeps_integer_labels(tmp_path):
    policy = ForegroundRecombine(lambda images: (images > 0.5).float(), p=1.0)
    recorder = Recorder()
    fit(tmp_path, TinyImages(), MixedSampleAugmentation(policy), recorder)
    loader = TinyImages().train_dataloader()
    for (images, targets), (plain, labels) in zip(recorder.seen, [*loader, *loader], strict=True):
        assert torch.equal(targets, labels)
        assert not torch.equal(images, plain)


# --- With other callbacks -----------------------------------------------------------------------------------------


class SeesAttacked(AdversarialTraining):
    def _attacked(self, trainer, pl_module, inputs, targets, batch_idx):
        adversarial = super()._attacked(trainer, pl_module, inputs, targets, batch_idx)
        self.distance = (adversarial - inputs).abs().max()
        self.inputs = inputs
        return adversarial


def test_mixed_images_are_attacked(tmp_path):
    attack = SeesAttacked(ATTACK)
    mixing, attacked = Recorder(), Recorder()
    fit(tmp_path, TinyImages(), MixedSampleAugmentation("fmix"), mixing, attack, epochs=1)
    assert attack.inputs is mixing.seen[-1][0]
    assert 0 < attack.distance <= 0.1001
    fit(tmp_path, TinyImages(), SeesAttacked(ATTACK), MixedSampleAugmentation(), attacked, epochs=1)
    assert isinstance(attacked.seen[-1][1], MixedLabels)


@pytest.mark.parametrize("objective", [PGDAT, TRADES, MART, SRAT], ids=lambda kind: kind.__name__)
def test_objectives_work_on_mixed_batches(tmp_path, objective):
    arguments = {"counts": [16, 12, 4]} if objective is SRAT else {}
    module = TinyImages()
    fit(tmp_path, module, MixedSampleAugmentation(), AdversarialTraining(ATTACK, objective(**arguments)))
    assert all(value.isfinite().all() for value in module.state_dict().values())
    with pytest.raises(MisconfigurationException, match="must stand behind MixedSampleAugmentation"):
        fit(tmp_path, module, AdversarialTraining(ATTACK, objective(**arguments)), MixedSampleAugmentation())


def test_trades_loss_is_mixed(tmp_path):
    losses = []

    class Sees(TRADES):
        def forward(self, model, clean, adversarial, targets):
            logits = []
            loss = super().forward(lambda x: logits.append(model(x)) or logits[-1], clean, adversarial, targets)
            shares, parts = targets.shares, targets.components
            expected = sum(s * F.cross_entropy(logits[0], part) for s, part in zip(shares, parts, strict=True))
            losses.append((loss.detach(), expected.detach()))
            return loss

    fit(tmp_path, TinyImages(), MixedSampleAugmentation(), AdversarialTraining(ATTACK, Sees(beta=0.0)), epochs=1)
    for found, expected in losses:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("other", [DeferredReweighting(counts=[16, 12, 4]), CalibrationRegularizer()])
def test_losses_from_unmixed_targets_are_refused(tmp_path, other):
    with pytest.raises(MisconfigurationException, match="callbacks=.MixedSampleAugmentation"):
        fit(tmp_path, TinyImages(), other, MixedSampleAugmentation())
    fit(tmp_path, TinyImages(), MixedSampleAugmentation(), other)


def test_repeated_steps_see_one_mixture(tmp_path):
    recorder = Recorder()
    fit(
        tmp_path, TinyImages(), AdversarialWeightPerturbation(), MixedSampleAugmentation(), recorder, epochs=1
    )  # fmt: skip
    first, second = recorder.seen[-2:]
    assert first[0] is second[0]
    recorder = Recorder()
    qat = MultiPrecisionQAT((8, 4), first_last_bits=8, stepping="accumulate")
    fit(tmp_path, TinyImages(), qat, MixedSampleAugmentation(), recorder, epochs=1)
    assert recorder.seen[-1][0] is recorder.seen[-2][0]


# --- Regularizer --------------------------------------------------------------------------------------------------


def test_the_regularizer_adds_its_term(tmp_path):
    module, twin = TinyModule(), TinyModule()
    trainer = fit(tmp_path, module, CalibrationRegularizer("mmce", strength=0.5))
    optimizer = twin.configure_optimizers()
    terms = []
    for epoch in range(2):
        for inputs, labels in twin.train_dataloader():
            logits = twin(inputs)
            term = mmce(logits, labels)
            optimizer.zero_grad()
            (F.cross_entropy(logits, labels) + 0.5 * term).backward()
            optimizer.step()
            if epoch == 1:
                terms.append(term.item())
    assert_same_weights(module, twin, rtol=1e-5, atol=1e-6)
    assert trainer.callback_metrics["calibration/train_mmce"].item() == pytest.approx(np.mean(terms), rel=1e-4)


@pytest.mark.parametrize("term", ["mmce", "weighted_mmce", "soft_ece", "h_loss"])
@pytest.mark.parametrize("soft", [False, True])
def test_terms_work_on_mixed_batches_and_dictionaries(tmp_path, term, soft):
    module = WithMetrics("cross-entropy")
    mixing = MixedSampleAugmentation(prob=0.5, soft_targets=False, num_classes=3)
    if soft:
        module = TinyImages()
        mixing = MixedSampleAugmentation(soft_targets=True, num_classes=3)
    trainer = fit(tmp_path, module, mixing, CalibrationRegularizer(term))
    assert trainer.callback_metrics[f"calibration/train_{term}"].isfinite()
    assert CalibrationRegularizer(term).strength == (2.0 if "mmce" in term else 1.0)


def test_the_regularizer_refuses_to_be_ignored(tmp_path):
    for other in (AdversarialTraining(ATTACK, TRADES()), DeferredReweighting(counts=[16, 12, 4])):
        with pytest.raises(MisconfigurationException, match="must stand before it"):
            fit(tmp_path, TinyImages(), other, CalibrationRegularizer())
        if isinstance(other, AdversarialTraining):
            fit(tmp_path, TinyImages(), CalibrationRegularizer(), other)


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "other"}, "'mixup', 'cutmix', 'fmix' or a BatchMixing"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"prob": 1.5}, "prob must lie"),
        ({"stop_epoch": -1}, "stop_epoch must be at least 0"),
        ({"seed": -1}, "seed must be"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"policy": "cutmix", "num_points": 3}, "cutmix knows no num_points"),
        ({"policy": "mixup", "decay": 2.0}, "mixup knows no decay"),
        ({"policy": CutMix(), "alpha": 0.5}, "CutMix knows no alpha"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        MixedSampleAugmentation(**arguments)


def test_wrong_combinations(tmp_path):
    with pytest.raises(MisconfigurationException, match="pass num_classes=C"):
        fit(tmp_path, TinyImages(), MixedSampleAugmentation(soft_targets=True))
    with pytest.raises(MisconfigurationException, match="neither max_epochs nor max_steps"):
        fit(tmp_path, TinyImages(), MixedSampleAugmentation(stop_epoch=0.5), epochs=-1)
    with pytest.raises(MisconfigurationException, match="could not mix the batch: .*spatial"):
        fit(tmp_path, TinyModule(), MixedSampleAugmentation("fmix"))
    with pytest.raises(MisconfigurationException, match="mixed already"):
        fit(tmp_path, TinyModule(), MixedSampleAugmentation(), MixedSampleAugmentation(Mixup()))
    with pytest.raises(ValueError, match="term must be one of"):
        CalibrationRegularizer("other")
    with pytest.raises(ValueError, match="strength must be at least 0"):
        CalibrationRegularizer(strength=-1.0)
