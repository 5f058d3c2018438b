"""AdversarialTraining, AdversarialWeightPerturbation, DeferredReweighting: against plain loops, and without traces."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import TensorDataset

from lightning_plugins.callbacks import (
    AdversarialTraining,
    AdversarialWeightPerturbation,
    DeferredReweighting,
)
from lightning_plugins.robustness import (
    PGDAT,
    SRAT,
    TRADES,
    BalancedSoftmax,
    FGSMAttack,
    PGDAttack,
    balanced_softmax_loss,
    pgd,
)
from toys import TinyImages, assert_same_weights, make_trainer, weights

ATTACK = PGDAttack(eps=0.1, num_steps=3)


def fit(folder, module, *callbacks, epochs=2, **arguments):
    trainer = make_trainer(folder, epochs, *callbacks, **arguments)
    trainer.fit(module)
    return trainer


def test_plain_training_on_attacked_batches_equals_a_loop(tmp_path):
    callback = AdversarialTraining(ATTACK, seed=3)
    module = TinyImages()
    fit(tmp_path, module, callback, limit_val_batches=0)
    twin = TinyImages()
    optimizer = twin.configure_optimizers()
    step = 0
    for _ in range(2):
        for images, labels in twin.train_dataloader():
            generator = torch.Generator().manual_seed(3 + 1_000_003 * 8 * step)
            twin.eval()
            with_step = {"eps": 0.1, "step_size": 0.025, "num_steps": 3}
            attacked = pgd(twin, images, labels, **with_step, generator=generator).adversarial
            twin.train()
            optimizer.zero_grad()
            F.cross_entropy(twin(attacked), labels).backward()
            optimizer.step()
            step += 1
    assert_same_weights(module, weights(twin))


def test_an_objective_replaces_the_loss_and_the_step_still_logs(tmp_path):
    trained = {}
    for objective in (None, PGDAT()):
        module = TinyImages()
        trainer = fit(tmp_path, module, AdversarialTraining(ATTACK, objective))
        trained[objective] = weights(module)
        assert "train_loss" in trainer.callback_metrics
        assert 0 <= trainer.callback_metrics["robustness/train_robust_acc"] <= 1
        assert trainer.callback_metrics["robustness/eps"] == pytest.approx(0.1)
    for a, b in zip(trained[None].values(), trained[next(k for k in trained if k)].values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)  # the module's own loss is cross-entropy too


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_the_attack_stay_out_of_the_weights(tmp_path, accumulate):
    # An attack that leaves the images as they are must leave the training as it is.
    module = TinyImages(accumulate=accumulate)
    fit(tmp_path, module, AdversarialTraining(PGDAttack(eps=0.0)), accumulate_grad_batches=accumulate)
    plain = TinyImages(accumulate=accumulate)
    fit(tmp_path, plain, accumulate_grad_batches=accumulate)
    assert_same_weights(module, weights(plain))


def test_modes_and_statistics_are_as_promised(tmp_path):
    def buffers_after(mode):
        module = TinyImages(dropout=0.5)
        torch.manual_seed(0)
        module.net[1].eval()  # frozen by the user
        seen = []
        module.net[3].register_forward_hook(lambda m, args, out: seen.append(m.training))
        trainer = make_trainer(tmp_path, 1, AdversarialTraining(ATTACK, attack_mode=mode), limit_train_batches=1)
        trainer.fit(module)
        return module, seen

    module, seen = buffers_after("eval")
    assert seen[:4] == [False] * 4
    assert seen[4] is True
    module, seen = buffers_after("train_frozen_stats")
    assert seen[:4] == [True] * 4
    counts = {}
    for mode in ("eval", "train_frozen_stats", "train"):
        module = TinyImages()
        fit(tmp_path, module, AdversarialTraining(ATTACK, attack_mode=mode), epochs=1, limit_val_batches=0)
        counts[mode] = int(module.net[1].num_batches_tracked)
    assert counts == {"eval": 4, "train_frozen_stats": 4, "train": 4 * 5}


def test_normalized_data_are_attacked_on_the_pixel_scale(tmp_path):
    class Watch(TinyImages):
        def training_step(self, batch, batch_idx):
            clean = self.dataset().tensors[0][batch_idx * 8 : batch_idx * 8 + 8]
            self.largest = max(getattr(self, "largest", 0.0), float((batch[0] - clean).abs().max()))
            assert batch[0].min() >= -2 - 1e-5
            assert batch[0].max() <= 2 + 1e-5
            return super().training_step(batch, batch_idx)

    module = Watch(normalized=True)
    fit(tmp_path, module, AdversarialTraining(ATTACK, mean=[0.5], std=[0.25]), epochs=1)
    assert module.largest == pytest.approx(0.1 / 0.25, abs=1e-5)
    with pytest.raises(MisconfigurationException, match="could not attack the batch"):
        fit(tmp_path, TinyImages(normalized=True), AdversarialTraining(ATTACK))


def test_the_radius_warms_up(tmp_path):
    class Watch(AdversarialTraining):
        radii: list[float] = []

        def around_training_step(self, *args):
            output = super().around_training_step(*args)
            self.radii.append(self._eps)
            return output

    fit(tmp_path, TinyImages(), Watch(ATTACK, warmup_epochs=1.5))
    expected = [0.1 * min((k + 1) / 4 / 1.5, 1.0) for k in range(8)]
    assert Watch.radii == pytest.approx(expected)


def test_counts_come_from_the_training_set(tmp_path):
    objective = BalancedSoftmax()
    fit(tmp_path, TinyImages(), AdversarialTraining(ATTACK, objective))
    assert objective.counts.tolist() == [16, 12, 4]

    class NoTargets(TinyImages):
        def dataset(self):
            return TensorDataset(*super().dataset().tensors)

    with pytest.raises(MisconfigurationException, match=r"pass counts=\[\.\.\.\]"):
        fit(tmp_path, NoTargets(), AdversarialTraining(ATTACK, BalancedSoftmax()))
    fit(tmp_path, NoTargets(), AdversarialTraining(ATTACK, SRAT(counts=[16, 12, 4])))


def test_rare_classes_get_a_larger_radius(tmp_path):
    class Watch(TinyImages):
        def training_step(self, batch, batch_idx):
            clean = self.dataset().tensors[0][:8]
            if batch_idx == 0:
                self.moved = (batch[0] - clean).abs().flatten(1).amax(1)
            return super().training_step(batch, batch_idx)

    module = Watch()
    fit(tmp_path, module, AdversarialTraining(ATTACK, class_budget_alpha=0.5), epochs=1)
    assert module.moved[7] > module.moved[4] > module.moved[0]


def test_trades_attacks_the_divergence(tmp_path):
    module = TinyImages()
    trainer = fit(tmp_path, module, AdversarialTraining(ATTACK, TRADES(beta=1.0)))
    assert torch.isfinite(trainer.callback_metrics["robustness/train_robust_acc"])


# Adversarial weight perturbation


def test_no_perturbation_is_no_change(tmp_path):
    module, plain = TinyImages(), TinyImages()
    fit(tmp_path, module, AdversarialWeightPerturbation(gamma=0.0), AdversarialTraining(ATTACK))
    fit(tmp_path, plain, AdversarialTraining(ATTACK))
    assert_same_weights(module, weights(plain))


@pytest.mark.parametrize("objective", [None, TRADES()])
def test_weights_move_by_gamma_and_come_back_before_the_step(tmp_path, objective):
    class Watch(pl.Callback):
        attacks: list[int] = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = weights(pl_module)

        def on_before_backward(self, trainer, pl_module, loss):
            for name, parameter in pl_module.named_parameters():
                moved = (parameter - self.before[name]).norm()
                expected = 0.01 * self.before[name].norm() if parameter.ndim > 1 else torch.tensor(0.0)
                assert moved.item() == pytest.approx(expected.item(), rel=1e-4), name

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, parameter in pl_module.named_parameters():
                assert torch.equal(parameter, self.before[name]), name

    module = TinyImages()
    training = AdversarialTraining(ATTACK, objective)
    calls = []
    attack = training._run_attack
    training._run_attack = lambda *args: calls.append(1) or attack(*args)
    fit(tmp_path, module, AdversarialWeightPerturbation(), training, Watch(), epochs=1, limit_val_batches=0)
    assert len(calls) == 4  # the second run reuses the attacked images
    tracked = int(module.net[1].num_batches_tracked)
    assert tracked == (4 if objective is None else 8)  # the first run leaves no statistics behind


def test_perturbation_after_the_attack_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="must stand before it"):
        fit(tmp_path, TinyImages(), AdversarialTraining(ATTACK), AdversarialWeightPerturbation())


def test_weights_come_back_after_an_exception(tmp_path):
    class Broken(TinyImages):
        def on_before_backward(self, loss):
            raise RuntimeError("broken")

    module = Broken()
    before = weights(module)
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, module, AdversarialWeightPerturbation(), AdversarialTraining(ATTACK))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])


# Deferred reweighting


def test_deferred_reweighting_equals_a_loop(tmp_path):
    module, twin = TinyImages(), TinyImages()
    fit(tmp_path, module, DeferredReweighting("balanced_softmax", weights=None), limit_val_batches=0)
    optimizer = twin.configure_optimizers()
    for _ in range(2):
        for images, labels in twin.train_dataloader():
            optimizer.zero_grad()
            balanced_softmax_loss(twin(images), labels, torch.tensor([16, 12, 4])).backward()
            optimizer.step()
    assert_same_weights(module, weights(twin))


def test_weights_set_in_at_their_epoch(tmp_path):
    def after(epochs, start):
        module = TinyImages()
        trainer = make_trainer(tmp_path, 4, DeferredReweighting(start=start), limit_val_batches=0)
        stop = epochs

        class Stop(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch + 1 == stop:
                    trainer.should_stop = True

        trainer.callbacks.append(Stop())
        trainer.fit(module)
        return weights(module)

    early, late = after(2, 0.5), after(2, 1.0)
    assert all(torch.equal(early[name], late[name]) for name in early)
    early, late = after(3, 0.5), after(3, 1.0)
    assert any(not torch.equal(early[name], late[name]) for name in early)


def test_reweighting_beside_an_objective_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="leave one of them out"):
        fit(tmp_path, TinyImages(), AdversarialTraining(ATTACK, TRADES()), DeferredReweighting())
    module = TinyImages()
    fit(tmp_path, module, AdversarialTraining(ATTACK), DeferredReweighting("ldam"), epochs=1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: AdversarialTraining("pgd"), TypeError, "must be an Attack"),
        (lambda: AdversarialTraining(objective="trades"), TypeError, "must be an Objective"),
        (lambda: AdversarialTraining(attack_mode="test"), ValueError, "attack_mode must be"),
        (lambda: AdversarialTraining(warmup_epochs=-1), ValueError, "at least 0"),
        (lambda: AdversarialTraining(mean=[0.5]), ValueError, "go together"),
        (lambda: AdversarialTraining(FGSMAttack(), class_budget_alpha=0.3), ValueError, "needs a PGDAttack"),
        (lambda: PGDAttack(eps=-1), ValueError, "eps must be at least 0"),
        (lambda: PGDAttack(num_steps=0), ValueError, "at least 1"),
        (lambda: AdversarialWeightPerturbation(-0.1), ValueError, "gamma must be at least 0"),
        (lambda: DeferredReweighting("hinge"), ValueError, "loss must be"),
        (lambda: DeferredReweighting(start=2), ValueError, r"start must lie in \[0, 1\]"),
    ],
)
def test_wrong_arguments_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


class CompiledLate(TinyImages):
    """Compiles its net where Lightning asks it to."""

    def configure_model(self):
        if not hasattr(self.net, "_orig_mod"):
            self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize("kind", ["late", "whole"])
def test_objectives_that_read_features_train_compiled_modules_the_same(tmp_path, kind):
    make = {
        "plain": TinyImages,
        "late": CompiledLate,
        "whole": lambda: torch.compile(TinyImages(), backend="eager"),
    }
    trained = {}
    for name in ("plain", kind):
        torch.compiler.reset()
        callback = AdversarialTraining(ATTACK, SRAT(counts=[9, 3, 2], ramp=0.0))
        trainer = fit(tmp_path, make[name](), callback, epochs=1, limit_val_batches=0)
        trained[name] = list(trainer.lightning_module.parameters())
    torch.compiler.reset()
    torch.testing.assert_close(trained[kind], trained["plain"])
