"""FreeAdversarialTraining against a plain loop, CatastrophicOverfittingGuard on a net that collapses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_plugins.callbacks import AdversarialTraining, CatastrophicOverfittingGuard, FreeAdversarialTraining
from lightning_plugins.robustness import PGDAttack
from toys import TinyImages, assert_same_weights, make_trainer, weights

EPS = 0.1


def fit(folder, module, *callbacks, epochs=2, **arguments):
    trainer = make_trainer(folder, epochs, *callbacks, limit_val_batches=0, **arguments)
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("replays", [1, 2])
def test_free_training_equals_a_loop(tmp_path, replays):
    module = TinyImages()
    callback = FreeAdversarialTraining(EPS, num_replays=replays)
    fit(tmp_path, module, callback)
    twin = TinyImages()
    optimizer = twin.configure_optimizers()
    delta = None
    for _ in range(2):
        for index, (images, labels) in enumerate(twin.train_dataloader()):
            if index % replays == 0:
                kept = images, labels
            images, labels = kept
            delta = torch.zeros_like(images) if delta is None else delta
            moved = images + delta[: len(images)]
            attacked = moved.clamp(0, 1).requires_grad_()
            optimizer.zero_grad()
            F.cross_entropy(twin(attacked), labels).backward()
            inside = (moved >= 0) & (moved <= 1)
            delta[: len(images)] = (delta[: len(images)] + EPS * inside * attacked.grad.sign()).clamp(-EPS, EPS)
            optimizer.step()
    assert_same_weights(module, weights(twin))
    (saved,) = callback.state_dict()["perturbations"]
    assert torch.equal(saved, delta)  # it is carried from batch to batch and from epoch to epoch
    assert saved.abs().max() == pytest.approx(EPS)


def test_free_training_at_radius_zero_and_without_replays_is_ordinary_training(tmp_path):
    module, plain = TinyImages(), TinyImages()
    fit(tmp_path, module, FreeAdversarialTraining(0.0, num_replays=1))
    fit(tmp_path, plain)
    assert_same_weights(module, weights(plain))


def test_free_training_has_as_many_updates_and_logs_the_size(tmp_path):
    trainer = fit(tmp_path, TinyImages(), FreeAdversarialTraining(EPS, num_replays=4))
    assert trainer.global_step == 2 * trainer.num_training_batches
    assert 0 < trainer.callback_metrics["robustness/perturbation"] <= 1


def test_free_training_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(MisconfigurationException, match="set accumulate_grad_batches=1, found 2"):
        fit(tmp_path, TinyImages(accumulate=2), FreeAdversarialTraining(EPS), accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException, match="leave one of them out"):
        fit(tmp_path, TinyImages(), FreeAdversarialTraining(EPS), AdversarialTraining(PGDAttack(EPS)))
    with pytest.raises(ValueError, match="num_replays must be at least 1"):
        FreeAdversarialTraining(EPS, num_replays=0)
    with pytest.raises(ValueError, match="eps must be at least 0"):
        FreeAdversarialTraining(float("nan"))


class Ruin(Callback):
    """Make the net useless during its third epoch."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and trainer.is_last_batch:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.neg_()


@pytest.mark.parametrize("action", ["stop", "warn"])
def test_the_guard_goes_back_to_the_epoch_before(tmp_path, action):
    ruin, module = Ruin(), TinyImages()
    guard = CatastrophicOverfittingGuard(PGDAttack(0.001, num_steps=2), action=action)
    # Three epochs of four: what the toys learn by then survives so small a radius.
    with pytest.warns(UserWarning, match="catastrophic overfitting: robust accuracy under 2 steps fell from"):
        trainer = fit(tmp_path, module, guard, ruin, epochs=12 if action == "stop" else 3)
    if action == "stop":
        assert trainer.current_epoch == 3
        assert_same_weights(module, ruin.before)
    assert "robustness/guard_acc" in trainer.callback_metrics


def test_the_guard_leaves_good_training_alone(tmp_path):
    module, plain = TinyImages(), TinyImages()
    fit(tmp_path, module, CatastrophicOverfittingGuard(PGDAttack(0.001, num_steps=2)))
    fit(tmp_path, plain)
    assert_same_weights(module, weights(plain))
    with pytest.raises(ValueError, match="drop must lie in"):
        CatastrophicOverfittingGuard(drop=0.0)
    with pytest.raises(ValueError, match="action must be 'stop' or 'warn'"):
        CatastrophicOverfittingGuard(action="pause")
