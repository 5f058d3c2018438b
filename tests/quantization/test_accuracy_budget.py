"""Plans within an accuracy, by bisection over an order."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_plugins.callbacks import PostTrainingQuantization
from lightning_plugins.quantization import (
    active_plan,
    convert_,
    plan_within_accuracy,
    quantized_layers,
    score_layers,
    switch_,
)
from lightning_plugins.quantization.scale_calibration import calibrate_scales_
from toys import TinyModule, make_trainer


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    return convert_(plain, (8, 4, 2, 32), first_last_bits=2)


@pytest.fixture
def batches(net):
    inputs = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) * 4 - 2
    with torch.no_grad():
        return [(inputs, switch_(net, 32)(inputs).argmax(1))]


def accuracy(net, plan, batches):
    calibrate_scales_(net, batches, plan)
    with torch.no_grad():
        return float((switch_(net, plan)(batches[0][0]).argmax(1) == batches[0][1]).double().mean())


@pytest.mark.parametrize("ratio", [0.99, 0.9, 0.6])
def test_the_plan_reaches_the_target_and_one_layer_more_does_not(net, batches, ratio):
    table = score_layers(net, "loss-increase", batches)
    result = plan_within_accuracy(net, table, batches, ratio=ratio)
    assert result.metric == pytest.approx(accuracy(net, result.plan, batches))
    assert result.metric >= ratio  # the baseline is 1: the labels are the net's own
    tried = {tuple(e.plan.values()): e.metric for e in result.history}
    assert all(metric < ratio for plan, metric in tried.items() if sum(plan) < sum(result.plan.values()))


def test_stricter_targets_take_no_fewer_bits(net, batches):
    table = score_layers(net, "loss-increase", batches)
    sums = [sum(plan_within_accuracy(net, table, batches, ratio=r).plan.values()) for r in (0.5, 0.9, 0.999)]
    assert sums == sorted(sums)
    assert sums[0] < sums[-1]


def test_bits_and_weights_stay(net, batches):
    switch_(net, 4)
    before = {name: layer.weight.clone() for name, layer in quantized_layers(net).items()}
    plan_within_accuracy(net, score_layers(net, "zd"), batches, ratio=0.9)
    assert set(active_plan(net).values()) == {4}
    assert all(torch.equal(layer.weight, before[name]) for name, layer in quantized_layers(net).items())


def test_layers_stay_in_full_precision_where_the_highest_bits_cost_too_much(batches):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    net = convert_(plain, (3, 2, 32), first_last_bits=2)
    table = score_layers(net, "zd")
    with pytest.raises(ValueError, match="standard errors above the target"):
        plan_within_accuracy(net, table, batches, ratio=0.98, confidence=0.9)
    result = plan_within_accuracy(net, table, batches, ratio=0.98, bits=(32, 3), confidence=0.9)
    assert set(result.plan.values()) == {32, 3}
    assert result.metric == pytest.approx(accuracy(net, result.plan, batches))


def test_wrong_arguments_are_refused(net, batches):
    table = score_layers(net, "zd")
    with pytest.raises(ValueError, match="bits must be among the model's precisions"):
        plan_within_accuracy(net, table, batches, ratio=0.9, bits=(8, 3))
    with pytest.raises(ValueError, match="accuracy_confidence must lie"):
        PostTrainingQuantization(accuracy_confidence=0.9)
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\]"):
        plan_within_accuracy(net, table, batches, ratio=0.0)
    other = convert_(nn.Sequential(nn.Linear(6, 3)), (8, 4, 32), first_last_bits=4)
    with pytest.raises(ValueError, match="one of the model's quantized layers"):
        plan_within_accuracy(net, score_layers(other, "zd"), batches, ratio=0.9)
    with pytest.raises(ValueError, match="one of them"):
        PostTrainingQuantization(budget=5, accuracy_ratio=0.9)
    with pytest.raises(ValueError, match="at least two bits"):
        PostTrainingQuantization(bits=(4,), accuracy_ratio=0.9)


def test_the_callback_chooses_by_validation_data(tmp_path):
    quantize = PostTrainingQuantization(
        bits=(8, 4, 2), accuracy_ratio=0.9, first_last_bits=2, num_samples=32, num_steps=4, batch_size=8
    )
    trainer = make_trainer(tmp_path, 3, quantize, logger=CSVLogger(tmp_path))
    module = TinyModule()
    trainer.fit(module)
    assert quantize.report is not None
    assert set(quantize.report.plan) == {"net.0", "net.2"}
    assert list(tmp_path.rglob("*bisection*"))
    (metrics,) = trainer.test(module, verbose=False)
    assert metrics["test/acc_quantized"] >= 0.8 * metrics["test/acc_fp32"]
