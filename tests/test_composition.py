"""Callbacks beside each other: every pair in both orders, some threes, and what others than we have written."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_plugins.calibration import HistogramBinning, TemperatureScaling
from lightning_plugins.callbacks import (
    AdversarialTraining,
    AdversarialWeightPerturbation,
    BinaryQAT,
    CalibratorComparison,
    CatastrophicOverfittingGuard,
    ClassifierHeadCalibration,
    DeferredReweighting,
    FreeAdversarialTraining,
    MixedSampleAugmentation,
    MultiPrecisionQAT,
    PostHocCalibration,
    PostTrainingQuantization,
    RobustnessEvaluation,
)
from lightning_plugins.quantization import quantized_layers, switch_
from lightning_plugins.robustness import SRAT, TRADES, PGDAttack
from pairs import PAIRS, class_name, run_pair, run_together
from test_callbacks import ATTACK, CALLBACKS, PIXELS
from toys import ThreeLayers, TinyModule, TorchvisionModule, image_and_label, make_trainer, toy_data, weights

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "benchmarks" / "results" / "composition.json").read_text())
PAGE = ROOT / "docs" / "results" / "composition.md"


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs_in_both_orders(tmp_path, first, second):
    message = run_pair(first, second, tmp_path)
    assert message == CELLS[first][second], "run benchmarks/reliability/composition.py; the table is of another day"


def test_a_refusal_says_what_to_do():
    for first, row in CELLS.items():
        for second, message in row.items():
            names = class_name(first), class_name(second)
            assert not message or all(name in message for name in names)
            assert not message or "out" in message or f": callbacks=[{names[1]}(...), {names[0]}(...)]" in message
            if ": callbacks=" in message:  # the order that it recommends works
                assert CELLS[second][first] == ""


def test_the_table_has_every_callback():
    assert set(CELLS) == set(CALLBACKS)
    assert {(one, two) for one in CELLS for two in CELLS[one]} == set(PAIRS)
    rows = re.findall(r"^\| \d+ (.+?) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(CALLBACKS)
    for name, cells in rows:
        for other, cell in zip(CALLBACKS, cells.split("|"), strict=True):
            shown = {"✓": True, "": None}.get(cell.strip(), False)
            assert shown == (None if class_name(name) == class_name(other) else not CELLS[name][other])


# Three at once


def qat(**arguments):
    return MultiPrecisionQAT((8, 4, 2), first_last_bits=2, **arguments)


def attacking(objective=None):
    return AdversarialTraining(ATTACK, objective, **PIXELS, counts=[40, 20, 4])


THREES = {
    "quantized, attacked, calibrated": lambda: [qat(), attacking(), PostHocCalibration()],
    "SRAT, perturbed weights, calibrated": lambda: [
        AdversarialWeightPerturbation(),
        attacking(SRAT()),
        PostHocCalibration(),
    ],
    "mixed, quantized, calibrated": lambda: [MixedSampleAugmentation(), qat(), PostHocCalibration()],
    "quantized, free, mixed": lambda: [
        qat(stepping="sequential"),
        FreeAdversarialTraining(0.02, num_replays=2, **PIXELS),
        MixedSampleAugmentation(),
    ],
    "quantized in one step, free, mixed": lambda: [
        qat(stepping="accumulate"),
        FreeAdversarialTraining(0.02, num_replays=2, **PIXELS),
        MixedSampleAugmentation(),
    ],
    "quantized, perturbed weights, attacked": lambda: [qat(), AdversarialWeightPerturbation(), attacking(TRADES())],
    "mixed, reweighted, head retrained, calibrated": lambda: [
        MixedSampleAugmentation(),
        DeferredReweighting(counts=[40, 20, 4], start=0.0),
        ClassifierHeadCalibration(20, num_epochs=2),
        PostHocCalibration(),
    ],
    "mixed, quantized, averaged": lambda: [MixedSampleAugmentation(), qat(), EMAWeightAveraging(decay=0.5)],
    "quantized, averaged, calibrated": lambda: [qat(), EMAWeightAveraging(decay=0.5), PostHocCalibration()],
    "averaged, calibrated, quantized afterwards": lambda: [
        EMAWeightAveraging(decay=0.5),
        PostHocCalibration(),
        PostTrainingQuantization(num_samples=16, num_steps=2, batch_size=8),
    ],
}


@pytest.mark.parametrize("name", THREES)
def test_threes(tmp_path, name):
    assert run_together(THREES[name], tmp_path).refusal == ""


# Averaging and pruning, which are Lightning's own


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: [FreeAdversarialTraining(**PIXELS), MixedSampleAugmentation(), qat()],
            "MultiPrecisionQAT would backpropagate several times",
        ),
        (lambda: [EMAWeightAveraging(), qat()], "MultiPrecisionQAT must stand before it"),
        (lambda: [PostHocCalibration(), EMAWeightAveraging()], "put PostHocCalibration behind it"),
        (lambda: [PostTrainingQuantization(), EMAWeightAveraging()], "put PostTrainingQuantization behind it"),
        (lambda: [CalibratorComparison(), EMAWeightAveraging()], "put CalibratorComparison behind it"),
        (lambda: [CatastrophicOverfittingGuard(), EMAWeightAveraging()], "use action='warn'"),
        (lambda: [EMAWeightAveraging(), CatastrophicOverfittingGuard()], "use action='warn'"),
        (lambda: [ClassifierHeadCalibration(), CatastrophicOverfittingGuard()], "put ClassifierHeadCalibration behind"),
    ],
)
def test_orders_that_would_use_other_weights_than_the_last_are_refused(tmp_path, make, words):
    assert words in run_together(make, tmp_path).refusal


def test_pruned_layers_stay_pruned_at_every_precision(tmp_path):
    module = ThreeLayers()
    pruning = ModelPruning("l1_unstructured", amount=lambda epoch: 0.5 * (epoch == 0), parameter_names=["weight"])
    trainer = make_trainer(tmp_path, 2, qat(), pruning, limit_train_batches=2)
    trainer.fit(module)
    layers = quantized_layers(module)
    assert len(layers) == 3
    for layer in layers.values():
        zero = layer.weight == 0
        assert zero.float().mean() > 0.3
        for bits in (8, 4, 2):
            switch_(module, bits)
            assert (layer.quantized_weight()[zero] == 0).all()
    words = run_together(lambda: [ModelPruning("l1_unstructured"), qat()], tmp_path).refusal
    assert "MultiPrecisionQAT must stand before it" in words


# What callbacks must not see, or not use


def test_bins_over_the_logits_do_not_hide_a_net_from_an_attack(tmp_path):
    robust = []
    for calibrate in (False, True):
        module = TinyModule()
        evaluation = RobustnessEvaluation(ATTACK, {"pgd": PGDAttack(eps=0.1, num_steps=5)}, eps_grid=[], **PIXELS)
        more = [PostHocCalibration(HistogramBinning(3))] if calibrate else []
        trainer = make_trainer(tmp_path, 2, evaluation, *more)
        trainer.fit(module)
        (metrics,) = trainer.test(module, verbose=False)
        robust.append(metrics["test/robust_acc"])
    assert robust[0] == robust[1] < metrics["test/clean_acc"]


def test_logits_of_an_attack_are_not_those_of_a_step_without_forward(tmp_path):
    trained = []
    for reverse in (False, True):
        arguments = {"batch_fn": image_and_label}
        callbacks = [
            AdversarialTraining(PGDAttack(eps=0.02, num_steps=1), **arguments),
            DeferredReweighting(counts=[4, 2, 2], start=0.0, **arguments),
        ]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = TorchvisionModule()
            trainer = make_trainer(tmp_path, 1, *(callbacks[::-1] if reverse else callbacks), limit_train_batches=1)
            trainer.fit(module)
        trained.append(all(value.isfinite().all() for value in weights(module).values()))
    assert trained == [True, True]


def test_an_attack_that_reads_mixed_labels_does_not_speak_for_the_loss(tmp_path):
    class PicksItsClass(TinyModule):
        def training_step(self, batch, batch_idx):
            inputs, labels = batch
            return -self(inputs).log_softmax(1).gather(1, labels[:, None]).mean()

    attacked = AdversarialTraining(ATTACK, **PIXELS)
    for callbacks in [MixedSampleAugmentation()], [MixedSampleAugmentation(), attacked]:
        with pytest.raises(MisconfigurationException, match="did not read the mixed labels"):
            make_trainer(tmp_path, 1, *callbacks).fit(PicksItsClass())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("convert", [qat, lambda: BinaryQAT(keep_real=())], ids=["quantized", "binary"])
def test_a_converted_head_is_not_retrained(tmp_path, convert, first):
    head = ClassifierHeadCalibration(20, num_epochs=2)
    callbacks = [head, convert()] if first else [convert(), head]
    with pytest.raises(MisconfigurationException, match="leave the last layer in full precision"):
        make_trainer(tmp_path, 1, *callbacks).fit(TinyModule())


def test_weights_that_are_put_back_get_a_calibrator_of_their_own(tmp_path):
    class Collapses(TinyModule):
        def on_train_batch_end(self, *args):
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.net[2].weight.mul_(-3)

    module, calibration = Collapses(), PostHocCalibration()
    guard = CatastrophicOverfittingGuard(PGDAttack(eps=0.001, num_steps=1), drop=0.2, **PIXELS)
    trainer = make_trainer(tmp_path, 3, calibration, guard)
    trainer.fit(module)
    assert trainer.current_epoch == 2
    inputs, labels = toy_data(module.n_val, seed=1)[:]
    with torch.no_grad():
        expected = TemperatureScaling().fit(module.eval()(inputs), labels)
    torch.testing.assert_close(calibration.calibrator.state_dict(), expected.state_dict())


def test_remembered_predictions_and_mixed_samples_do_not_go_together(tmp_path):
    distilled = partial(qat, self_distillation=0.5, sample_ids_fn=lambda batch: torch.arange(len(batch[1])))
    mixed, free = MixedSampleAugmentation(), FreeAdversarialTraining(**PIXELS)
    for callbacks in [distilled(), mixed], [mixed, distilled()]:
        assert "leave one of them out" in run_together(lambda callbacks=callbacks: callbacks, tmp_path).refusal
    assert "must stand before MultiPrecisionQAT" in run_together(lambda: [distilled(), free], tmp_path).refusal


def test_every_precision_can_be_calibrated_and_attacked(tmp_path):
    module = ThreeLayers()
    make_trainer(tmp_path, 2, qat()).fit(module)
    inputs, labels = toy_data(32, seed=1)[:]
    seen = {}
    for bits in (8, 4, 2):
        switch_(module, bits)
        evaluation = RobustnessEvaluation(PGDAttack(eps=0.1, num_steps=3), {}, **PIXELS)
        (metrics,) = make_trainer(tmp_path, 1, evaluation).validate(module, verbose=False)
        with torch.no_grad():
            logits = module.eval()(inputs)
        calibrator = TemperatureScaling().fit(logits, labels)
        assert F.nll_loss(calibrator(logits), labels) <= F.cross_entropy(logits, labels)
        assert metrics["val/robust_acc"] < metrics["val/clean_acc"] == (logits.argmax(1) == labels).float().mean()
        seen[bits] = logits
    assert not torch.equal(seen[8], seen[2])
