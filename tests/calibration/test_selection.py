"""Choosing a calibrator by cross-validation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.calibration import (
    CalibratedModule,
    Calibrator,
    CalibratorSelection,
    IntraOrderPreserving,
    TemperatureScaling,
)


class Shift(Calibrator):
    """Adds the logs of the class shares, a map with as many numbers as there are classes."""

    preserves_ranking = False

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength
        self.register_buffer("shift", torch.zeros(3))

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        counts = torch.bincount(labels, minlength=logits.shape[1]) + 1
        self.shift = self.strength * (counts / counts.sum()).log()
        return {"rows": len(labels)}

    def _calibrate(self, logits: Tensor) -> Tensor:
        return (logits + self.shift.to(logits.dtype)).log_softmax(-1)

    def quantities(self) -> dict[str, float]:
        return {"largest_shift": self.shift.max().item()}


class Memory(Calibrator):
    """Certain of every row that it was fitted on, hopeless elsewhere."""

    preserves_ranking = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0))
        self.register_buffer("classes", torch.zeros(0, dtype=torch.long))

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        self.rows, self.classes = logits.clone(), labels.clone()
        return {}

    def _calibrate(self, logits: Tensor) -> Tensor:
        if not len(self.rows):
            return logits.log_softmax(-1)
        same = (logits[:, None] == self.rows).all(2)
        known = F.one_hot(self.classes[same.float().argmax(1)], logits.shape[1])
        wrong = logits.softmax(1).argmin(1)
        return (20.0 * torch.where(same.any(1)[:, None], known, F.one_hot(wrong, logits.shape[1]))).log_softmax(-1)


def sample(n: int = 400, *, factor: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 3, generator=generator)
    return factor * logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_the_winner_is_the_one_that_wins_on_rows_it_has_not_seen():
    logits, labels = sample()
    selection = CalibratorSelection([Memory(), Shift(), TemperatureScaling()]).fit(logits, labels)
    assert selection.chosen == "TemperatureScaling"
    assert Memory().fit(logits, labels).fit_info["nll_after"] < selection.fit_info["nll_after"]  # and would win there
    expected = TemperatureScaling().fit(logits, labels)
    torch.testing.assert_close(selection(logits), expected(logits))
    assert selection.quantities()["temperature"] == pytest.approx(expected.temperature)
    assert selection.quantities()["chosen"] == 2
    assert selection.preserves_ranking is True
    assert set(selection.scores()) == {"uncalibrated", "Memory", "Shift", "TemperatureScaling"}
    assert selection.scores()["uncalibrated"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert selection.fit_info["nll_after"] == pytest.approx(F.nll_loss(expected(logits), labels).item(), rel=1e-5)


def test_scores_are_those_of_a_plain_loop():
    logits, labels = sample(100)
    selection = CalibratorSelection([TemperatureScaling(), Shift()], num_folds=4).fit(logits, labels)
    folds = selection._deal(labels)
    held_out = torch.empty_like(logits)
    for fold in range(4):
        held_out[folds == fold] = TemperatureScaling().fit(logits[folds != fold], labels[folds != fold])(
            logits[folds == fold]
        )
    assert selection.scores()["TemperatureScaling"] == pytest.approx(F.nll_loss(held_out, labels).item(), rel=1e-6)
    for c in range(3):  # every class is spread over the folds
        counts = torch.bincount(folds[labels == c], minlength=4)
        assert counts.max() - counts.min() <= 1


def test_the_winner_alone_is_fitted_to_everything_and_the_others_stay_as_they_were():
    logits, labels = sample(factor=1.0)
    candidates = [TemperatureScaling(), Shift(), Shift(0.0)]
    selection = CalibratorSelection(candidates).fit(logits, labels)
    assert [candidate.is_fitted for candidate in candidates].count(True) == 1
    assert selection.best.is_fitted
    assert selection.names == ("TemperatureScaling", "Shift", "Shift_2")


@pytest.mark.parametrize("criterion", ["nll", "brier", "ece", "debiased_ece", "classwise_ece"])
def test_every_criterion_prefers_a_temperature_to_nothing(criterion):
    logits, labels = sample()
    selection = CalibratorSelection([Shift(0.0), TemperatureScaling()], criterion=criterion).fit(logits, labels)
    scores = selection.scores()
    assert selection.chosen == "TemperatureScaling"
    assert scores["TemperatureScaling"] < scores["uncalibrated"] == pytest.approx(scores["Shift"], rel=1e-4)


def test_the_seed_deals_the_rows_and_no_global_random_number_is_drawn():
    logits, labels = sample(100)
    state = torch.random.get_rng_state()
    scores = [
        CalibratorSelection([TemperatureScaling(), Shift()], seed=seed).fit(logits, labels).scores()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert scores[0] == scores[1] != scores[2]


def test_state_copies_and_export_keep_the_winner():
    logits, labels = sample()
    selection = CalibratorSelection([Shift(), TemperatureScaling()]).fit(logits, labels)
    fresh = CalibratorSelection([Shift(), TemperatureScaling()])
    torch.testing.assert_close(fresh(logits), logits.log_softmax(1))
    fresh.load_state_dict(selection.state_dict())
    for other in fresh, copy.deepcopy(selection):
        assert other.chosen == "TemperatureScaling"
        torch.testing.assert_close(other(logits), selection(logits))
    module, inputs = CalibratedModule(nn.Linear(5, 3), fresh), torch.randn(4, 5)
    torch.testing.assert_close(torch.export.export(module, (inputs,)).module()(inputs), module(inputs))


def test_candidates_whose_state_a_fit_sizes_load_too():
    logits, labels = sample()
    candidates = [Shift(0.0), IntraOrderPreserving("order_invariant", hidden=4, max_epochs=20)]
    selection = CalibratorSelection(candidates, num_folds=2).fit(logits, labels)
    assert selection.chosen == "IntraOrderPreserving"
    fresh = CalibratorSelection([Shift(), IntraOrderPreserving("order_invariant", hidden=4)])
    fresh.load_state_dict(selection.state_dict())
    torch.testing.assert_close(fresh(logits), selection(logits))


def test_wrong_use():
    one = TemperatureScaling()
    for arguments, error, remedy in (
        (([one],), ValueError, "use one as it is"),
        (([one, one],), ValueError, "found one twice"),
        (([one, "vector"],), TypeError, r"such as TemperatureScaling\(\)"),
    ):
        with pytest.raises(error, match=remedy):
            CalibratorSelection(*arguments)
    with pytest.raises(ValueError, match="num_folds must be at least 2"):
        CalibratorSelection([one, Shift()], num_folds=1)
    with pytest.raises(ValueError, match="criterion must be one of"):
        CalibratorSelection([one, Shift()], criterion="accuracy")
    with pytest.raises(ValueError, match="lower num_folds or pass more"):
        CalibratorSelection([one, Shift()]).fit(*sample(4))
