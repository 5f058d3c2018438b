"""The calibration metrics: batches, merging, processes, bounded state, and refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_plugins.calibration.binned import ClasswiseCalibrationError, classwise_ece
from lightning_plugins.calibration.groups import GroupCalibrationError, group_ece
from lightning_plugins.calibration.metrics import CalibrationError, ece
from lightning_plugins.calibration.ranked import aurc, debiased_ece, eaurc, equal_mass_ece, ks_error, sweep_ece
from lightning_plugins.calibration.ranked_metrics import (
    AURC,
    DebiasedCalibrationError,
    EqualMassCalibrationError,
    KDECalibrationError,
    KSError,
    SmoothCalibrationError,
    SweepCalibrationError,
)
from lightning_plugins.calibration.scoring import BrierScore, NegativeLogLikelihood, brier, nll
from lightning_plugins.calibration.smooth import kde_ece, smooth_ece

PAIRS = {
    "ece": (lambda **k: CalibrationError(**k), ece),
    "classwise": (lambda **k: ClasswiseCalibrationError(3, **k), classwise_ece),
    "thresholded": (
        lambda **k: ClasswiseCalibrationError(3, threshold=1 / 3, reduction="sum", **k),
        lambda p, y, **k: classwise_ece(p, y, threshold=1 / 3, reduction="sum", **k),
    ),
    "brier": (lambda **k: BrierScore(**k), brier),
    "nll": (lambda **k: NegativeLogLikelihood(**k), nll),
    "equal_mass": (lambda **k: EqualMassCalibrationError(**k), equal_mass_ece),
    "debiased": (lambda **k: DebiasedCalibrationError(**k), debiased_ece),
    "sweep": (lambda **k: SweepCalibrationError(**k), sweep_ece),
    "ks": (lambda **k: KSError(**k), ks_error),
    "smooth": (lambda **k: SmoothCalibrationError(**k), smooth_ece),
    "kde": (lambda **k: KDECalibrationError(**k), kde_ece),
    "aurc": (lambda **k: AURC(**k), aurc),
    "eaurc": (lambda **k: AURC(excess=True, **k), eaurc),
}


def data(n: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(n, 3, generator=generator)).softmax(1)
    return probs, torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("name", PAIRS)
def test_equals_its_function_over_batches_merges_and_copies(name):
    make, function = PAIRS[name]
    probs, labels = data()
    expected = function(probs, labels).item()
    metric, other = make(), make()
    for part in torch.arange(70).split(9):
        metric.update(probs[part], labels[part])
    metric = pickle.loads(pickle.dumps(copy.deepcopy(metric)))
    other.update(probs[70:], labels[70:])
    metric.merge_state(other)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
    metric.reset()
    batch = [metric(probs[part], labels[part]) for part in torch.arange(120).split(40)]
    assert batch[0].item() == pytest.approx(function(probs[:40], labels[:40]).item(), abs=1e-6)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
    metric = make(input="logits")
    metric.update(probs.log(), labels)
    assert metric.compute().item() == pytest.approx(function(probs.log(), labels, input="logits").item(), abs=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_refuses_wrong_input_and_is_nan_without_samples(name):
    make, _ = PAIRS[name]
    metric = make()
    with pytest.raises(ValueError, match='pass input="logits"'):
        metric.update(torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="drop the rows of ignored"):
        metric.update(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([3]))
    with pytest.raises(ValueError, match="input must be one of"):
        make(input="auto")
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert make().compute().isnan()
    metric = make()
    metric.update(*data())
    metric.problems = torch.tensor([2, 0])
    with pytest.raises(ValueError, match="found in 2 of the updates"):
        metric.compute()


def gather_two(metrics):
    """What torchmetrics' gathering gives on each of two processes."""
    pending = iter([])

    def gather(tensor, group=None):
        nonlocal pending
        other = next(pending)
        assert other.dtype == tensor.dtype
        return [tensor, other]

    states = []
    for name in metrics[1]._reductions:
        state = getattr(metrics[1], name)
        if isinstance(state, list):
            state = torch.cat(state) if state else torch.tensor([])
        states.append(state)
    pending = iter(states)
    return gather


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("cut", [50, 120])
def test_two_processes_give_the_value_of_the_union(name, cut):
    make, function = PAIRS[name]
    probs, labels = data()
    metrics = make(), make()
    metrics[0].update(probs[:cut].double(), labels[:cut])
    if cut < 120:
        metrics[1].update(probs[cut:], labels[cut:])
    metrics[0].distributed_available_fn = lambda: True
    metrics[0].dist_sync_fn = gather_two(metrics)
    assert metrics[0].compute().item() == pytest.approx(function(probs, labels).item(), abs=1e-5)
    metrics[0].update(probs[:cut].double(), labels[:cut])
    state = metrics[0].metric_state
    if "confidence" in state and isinstance(state["confidence"], list):
        assert sum(map(len, state["confidence"])) == 2 * cut


def test_groups_over_batches():
    probs, labels = data()
    groups = torch.arange(120) % 4
    for reduction in ("max", "mean", "none"):
        metric = GroupCalibrationError(4, reduction=reduction)
        for part in torch.arange(120).split(50):
            metric.update(probs[part], labels[part], groups[part])
        assert torch.allclose(metric.compute(), group_ece(probs, labels, groups, reduction=reduction))
    with pytest.raises(ValueError, match="groups must lie in"):
        metric.update(probs, labels, groups + 1)
    with pytest.raises(ValueError, match="one for each row"):
        metric.update(probs, labels, groups[:5])


def test_waiting_samples_are_few_and_never_lost():
    probs, labels = data(700)
    metric = CalibrationError()
    for row in range(700):
        metric.update(probs[row : row + 1], labels[row : row + 1])
        assert len(metric._waiting) < 16
    metric.update(probs.double(), labels)  # another type, and too many to wait
    assert not metric._waiting
    assert metric.count.sum() == 1400
    metric.update(probs[:5], labels[:5])
    metric.reset()
    assert metric.count.sum() == 0
    metric.update(probs[:5], labels[:5])
    metric.count = torch.zeros(15, dtype=torch.float64)
    assert metric.confidence.sum() > 0
    assert metric.count.sum() == 0


def test_a_collection_shares_the_samples():
    probs, labels = data()
    collection = MetricCollection({"ks": KSError(), "smooth": SmoothCalibrationError(), "aurc": AURC()})
    for part in torch.arange(120).split(40):
        collection.update(probs[part], labels[part])
    assert len(collection.compute_groups) == 1
    values = collection.compute()
    assert values["ks"].item() == pytest.approx(ks_error(probs, labels).item(), abs=1e-6)
    assert values["aurc"].item() == pytest.approx(aurc(probs, labels).item(), abs=1e-6)


def test_states_of_sums_do_not_grow():
    for metric in (ClasswiseCalibrationError(3), BrierScore(), NegativeLogLikelihood(), CalibrationError()):
        sizes = []
        for seed in range(3):
            metric.update(*data(seed=seed))
            sizes.append(sum(state.numel() for state in metric.metric_state.values()))
        assert len(set(sizes)) == 1


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="num_classes=3 columns"):
        ClasswiseCalibrationError(3).update(torch.eye(2), torch.arange(2))
    with pytest.raises(ValueError, match="1 / C is customary"):
        ClasswiseCalibrationError(3, threshold=1.5)
    with pytest.raises(ValueError, match="power must be above 0"):
        KDECalibrationError(0)
    with pytest.raises(ValueError, match="num_bins must be at least 1"):
        EqualMassCalibrationError(0)
