"""Drawing bits, transitional batch normalisations, and the search for plans."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from scipy import stats
from torch import nn

from lightning_plugins.models import resnet20
from lightning_plugins.quantization import (
    BitPlan,
    MultiPrecisionBatchNorm,
    active_plan,
    convert_,
    load_converted,
    load_packed,
    quantized_layers,
    restore_,
    save_packed,
    switch_,
    to_deploy,
)
from lightning_plugins.quantization.convert import describe, idle_parameters, shortcut_layers
from lightning_plugins.quantization.scores import evaluate_plan
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable
from lightning_plugins.quantization.supernet import (
    EvaluatedPlan,
    PlanSearch,
    draw_bits,
    roulette,
    roulette_probabilities,
    search_plans,
    sensitive_layers,
    switching_probability,
    tied_layers,
    weigh_perturbations,
)

BITS = (8, 6, 4, 2)
IMAGES = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("bits", "sensitive", "expected"),
    [((8, 6, 4, 2), True, 6), ((8, 6, 4, 2), False, 5), ((4, 3, 2), True, 29 / 9), ((4, 3, 2), False, 3)],
)
def test_expected_bits(bits, sensitive, expected):
    probabilities = roulette_probabilities(bits, sensitive=sensitive)
    assert math.fsum(probabilities.values()) == pytest.approx(1)
    assert sum(b * p for b, p in probabilities.items()) == pytest.approx(expected)


@pytest.mark.parametrize("bits", [BITS, (4, 3, 2), (8, 3)])
@pytest.mark.parametrize("sensitive", [True, False])
def test_the_roulette_draws_what_it_says(bits, sensitive):
    layers = {f"layer {i}": bits for i in range(100_000)}
    generator = torch.Generator().manual_seed(1)
    chosen = layers if sensitive else ()
    drawn = list(draw_bits(layers, bits[0], sigma=1.0, sensitive=chosen, generator=generator).values())
    probabilities = roulette_probabilities(bits, sensitive=sensitive)
    expected = [100_000 * probabilities[b] for b in bits]
    assert stats.chisquare([drawn.count(b) for b in bits], expected).pvalue > 1e-3


@pytest.mark.parametrize("sensitive", [True, False])
@pytest.mark.parametrize("bits", [BITS, (4, 3, 2), (2,)])
def test_both_ends_of_the_wheel_are_valid(bits, sensitive):
    assert roulette(1e-300, bits, sensitive=sensitive) == bits[0]
    assert roulette(1.0, bits, sensitive=sensitive) == bits[-1]
    for r in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="take 1 - u"):
            roulette(r, bits, sensitive=sensitive)


def test_the_wheel_by_hand():
    stops = [roulette(r, (4, 3, 2), sensitive=True) for r in (4 / 9, 4 / 9 + 1e-9, 7 / 9, 7 / 9 + 1e-9)]
    assert stops == [4, 3, 3, 2]
    assert roulette_probabilities((32, 8, 4), sensitive=False) == {8: 0.5, 4: 0.5}


def test_the_schedule():
    sigmas = [switching_probability(epoch, 90) for epoch in range(90)]
    assert sigmas[:10] == [0.0] * 10
    assert sigmas[10:] == pytest.approx([0.5 * (epoch + 1) / 90 for epoch in range(10, 90)])
    assert switching_probability(100, 90) == 0.5
    assert switching_probability(0, 2, sigma=1.0, warmup_epochs=0) == 0.5


def test_sensitive_layers_are_those_of_mean_importance():
    assert sensitive_layers({"a": 1.0, "b": 3.0, "c": 2.0}) == ("b", "c")
    assert sensitive_layers({"a": math.inf, "b": 3.0, "c": 1.0}) == ("a", "b")
    assert len(sensitive_layers(dict.fromkeys("abc", 0.1))) == 3  # the rounded mean of 0.1 is above 0.1


def test_draws():
    layers = {name: BITS for name in "abcdef"} | {"wide": (8, 6)}
    generator = torch.Generator()

    def draw(seed: int, sigma: float, **options) -> dict[str, int]:
        return draw_bits(layers, 4, sigma=sigma, sensitive=("a",), generator=generator.manual_seed(seed), **options)

    assert draw(0, 0.0) == {name: 4 for name in "abcdef"} | {"wide": 6}  # least bits of its own
    assert draw(0, 1.0) == draw(0, 1.0) != draw(1, 1.0)
    assert {draw(seed, 1.0)["wide"] for seed in range(20)} == {8, 6}
    for seed in range(10):
        tied = draw(seed, 0.7, ties={"b": "a", "c": "absent"})
        assert tied["b"] == tied["a"]
        assert {name: tied[name] for name in "acdef"} == {name: draw(seed, 0.7)[name] for name in "acdef"}
    # The generator moves on by the same amount whatever happens.
    states = []
    for sigma in (0.0, 1.0):
        draw(3, sigma)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_a_layer_leaves_the_pass_as_often_as_sigma_says():
    layers = {f"layer {i}": (8, 2) for i in range(20_000)}
    generator = torch.Generator().manual_seed(0)
    drawn = draw_bits(layers, 8, sigma=0.4, sensitive=(), generator=generator)
    share = sum(b == 2 for b in drawn.values()) / len(drawn)
    assert share == pytest.approx(0.4 * 0.5, abs=4 * math.sqrt(0.2 * 0.8 / 20_000))


# Shortcuts and what comes before what


def test_shortcuts_of_our_and_of_torchvisions_nets():
    from torchvision.models import mobilenet_v2, resnet50

    expected = {f"stages.{i}.0.shortcut.0": f"stages.{i}.0.conv1" for i in (1, 2)}
    assert shortcut_layers(resnet20(width=4)) == expected
    # A bottleneck's first convolution is 1x1 too and reads the same input.
    assert shortcut_layers(resnet50()) == {f"layer{i}.0.downsample.0": f"layer{i}.0.conv1" for i in range(1, 5)}
    assert shortcut_layers(mobilenet_v2()) == {}  # its 1x1 convolutions are no shortcuts
    net = convert_(resnet20(width=4), (8, 4), batch_norm="transitional")
    assert shortcut_layers(net) == expected
    assert tied_layers(net) == [(leader, name) for name, leader in expected.items()]


def supernet(**options) -> nn.Module:
    torch.manual_seed(0)
    options = {"bits": BITS, "batch_norm": "transitional"} | options
    net = convert_(resnet20(width=4), **options)
    net.train()
    for b in (b for b in net_bits(net) if b != 32):
        switch_(net, b)(IMAGES)
    for seed in range(4):  # so that pairs differ
        switch_(net, random_plan(net, seed))(IMAGES + seed)
    return switch_(net, net_bits(net)[0])


def net_bits(net: nn.Module) -> tuple[int, ...]:
    return tuple(describe(net)["bits"])


def random_plan(net: nn.Module, seed: int) -> BitPlan:
    layers = {name: layer.bits for name, layer in quantized_layers(net).items()}
    generator = torch.Generator().manual_seed(seed)
    return BitPlan(draw_bits(layers, layers["stages.0.0.conv1"][-1], sigma=1.0, sensitive=(), generator=generator))


def test_one_normalisation_for_each_pair():
    net = supernet()
    spec = describe(net)
    before = spec["transitions"]
    assert "stem.1" not in before
    assert "stages.0.0.bn1" not in before  # nothing quantized comes before the first quantized layer
    assert before["stages.0.0.bn2"] == "stages.0.0.conv1"
    assert before["stages.1.0.bn1"] == before["stages.1.0.shortcut.1"] == "stages.0.2.conv2"
    assert before["stages.1.1.bn1"] == "stages.1.0.conv2"  # the shortcut between them does not count
    norms = dict(net.named_modules())
    assert len(norms["stages.0.0.bn1"].norms) == 4
    assert len(norms["stages.0.0.bn2"].norms) == 16
    plan = random_plan(net, 7)
    switch_(net, plan)
    for name, previous in before.items():
        norm = norms[name]
        assert norm.active is norm.norms[f"{plan[previous]}_{plan[norm.follows]}"]
    switch_(net, 4)
    assert {norms[name].key(norms[name].num_bits, norms[name].previous_bits) for name in before} == {"4_4"}


def test_only_the_active_pairs_statistics_move():
    net = supernet()
    for bits in (4, random_plan(net, 5)):
        switch_(net, bits).train()
        active = {id(m.active) for m in net.modules() if isinstance(m, MultiPrecisionBatchNorm)}
        norms = {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
        before = {name: module.running_mean.clone() for name, module in norms.items()}
        net(IMAGES)
        moved = {name for name, module in norms.items() if not torch.equal(module.running_mean, before[name])}
        assert moved == {name for name, module in norms.items() if id(module) in active}


def test_idle_parameters_are_those_without_a_gradient():
    net = supernet(bits=(32, *BITS), first_last_bits=2)
    for bits in (8, 32, random_plan(net, 5)):
        net.zero_grad()
        switch_(net, bits)(IMAGES).square().mean().backward()
        idle = {id(parameter) for parameter in idle_parameters(net)}
        for name, parameter in net.named_parameters():
            assert (parameter.grad is None) == (id(parameter) in idle), name


@pytest.mark.parametrize("seed", range(3))
def test_deployed_and_packed_nets_equal_the_supernet_under_any_plan(tmp_path, seed):
    net = supernet(first_last_bits=8).eval()
    plan = random_plan(net, 10 + seed)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    expected = switch_(net, plan)(IMAGES)
    torch.testing.assert_close(to_deploy(net, plan)(IMAGES), expected, rtol=1e-4, atol=1e-5)
    switch_(net, 6)
    alone = load_packed(save_packed(net, tmp_path / "alone.safetensors", plan=plan), resnet20(width=4))
    assert torch.equal(alone(IMAGES), expected)
    every = load_packed(save_packed(net, tmp_path / "all.safetensors"), resnet20(width=4))
    assert torch.equal(switch_(every, plan)(IMAGES), expected)
    for b in BITS:
        assert torch.equal(switch_(every, b)(IMAGES), switch_(net, b)(IMAGES))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_saving_leaves_the_pairs_in_use(tmp_path):
    net = switch_(supernet().eval(), plan := random_plan(supernet(), 3))
    expected = net(IMAGES)
    save_packed(net, tmp_path / "net.safetensors", plan=2)
    assert dict(active_plan(net)) == dict(plan)
    assert torch.equal(net(IMAGES), expected)


def test_full_precision_among_the_pairs(tmp_path):
    net = supernet(bits=(32, 8, 4), first_last_bits=8).eval()
    mixed = {name: layer.bits[-1] for name, layer in quantized_layers(net).items()} | {"stages.0.0.conv2": 32}
    switch_(net, mixed)
    assert net.stages[0][0].bn2.active is net.stages[0][0].bn2.norms["4_32"]
    assert net.stages[0][1].bn1.active is net.stages[0][1].bn1.norms["32_4"]
    loaded = load_packed(save_packed(net, tmp_path / "net.safetensors"), resnet20(width=4))
    assert torch.equal(switch_(loaded, 4)(IMAGES), switch_(net, 4)(IMAGES))
    assert len(loaded.stages[0][0].bn2.norms) == 4  # the pairs with 32 need fp32 weights


def test_checkpoints_of_every_kind_load_into_a_supernet():
    plain = resnet20(width=4)
    plain.train()(IMAGES)
    net = convert_(resnet20(width=4), (8, 4), batch_norm="transitional")
    net.load_state_dict(plain.state_dict())
    norm = plain.stages[0][0].bn2
    for pair in net.stages[0][0].bn2.norms.values():
        assert torch.equal(pair.running_mean, norm.running_mean)
    several = convert_(deepcopy(plain), (8, 4))
    for b in (8, 4):
        switch_(several, b)(IMAGES)
    net.load_state_dict(several.state_dict())
    for key, pair in net.stages[0][0].bn2.norms.items():
        assert torch.equal(pair.running_mean, several.stages[0][0].bn2.norms[key[-1]].running_mean)
    again = load_converted(resnet20(width=4), net.state_dict())
    assert describe(again) == describe(net)
    assert torch.equal(switch_(again.eval(), 4)(IMAGES), switch_(net.eval(), 4)(IMAGES))
    assert restore_(net).state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(RuntimeError, match="bn2"):
        convert_(resnet20(width=4), (8, 4)).load_state_dict(several.state_dict() | again.state_dict())


# Search


def table_of(net: nn.Module) -> SensitivityTable:
    names = list(quantized_layers(net))
    return weigh_perturbations(net, {name: 1.0 / (1 + i) for i, name in enumerate(names)})


def test_perturbations_weighed_by_hand():
    net = supernet()
    table = table_of(net)
    layer = quantized_layers(net)["stages.0.0.conv2"]
    for b in BITS:
        layer.num_bits = b
        expected = 0.5 * (layer.quantized_weight() - layer.weight).square().sum().item()
        assert table.layers["stages.0.0.conv2"].losses[b] == pytest.approx(expected, rel=1e-5)
    layer.num_bits = 8
    with pytest.raises(ValueError, match="lack the layers.*conv1"):
        weigh_perturbations(net, {})
    with pytest.raises(ValueError, match="clamp it"):
        weigh_perturbations(net, dict.fromkeys(quantized_layers(net), -1.0))


def plan_at(cost: float, accuracy: float, loss: float = 0.0) -> EvaluatedPlan:
    return EvaluatedPlan(BitPlan({"a": 4}), cost, loss, accuracy, 0.0)


def test_the_frontier_by_hand():
    plans = [plan_at(3, 0.5), plan_at(3, 0.6), plan_at(4, 0.6, 0.5), plan_at(5, 0.9, 0.3), plan_at(5, 0.9, 0.2)]
    search = PlanSearch((*plans, plan_at(6, 0.8)))
    assert search.frontier == (plans[1], plans[4])
    assert search.best(4.9) is plans[1]
    assert search.best(5) is plans[4]
    with pytest.raises(ValueError, match="the cheapest costs 3"):
        search.best(2.9)
    by_loss = PlanSearch((plan_at(3, math.nan, 2.0), plan_at(4, math.nan, 3.0), plan_at(5, math.nan, 1.0)))
    assert [plan.cost for plan in by_loss.frontier] == [3, 5]
    assert search.figure().axes
    assert by_loss.figure().axes[0].get_ylabel() == "loss"


def test_search_evaluates_plans_within_the_budgets_and_leaves_the_net_alone():
    net = supernet().eval()
    batches = [(IMAGES, torch.arange(8) % 10)]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    search = search_plans(net, table_of(net), batches, budgets=(3, 5), num_candidates=4)
    assert 2 <= len(search.plans) <= 8
    sizes = {name: layer.weight.numel() for name, layer in quantized_layers(net).items()}
    for found in search.plans:
        average = sum(found.plan[name] * size for name, size in sizes.items()) / sum(sizes.values())
        assert found.cost == pytest.approx(average)
        assert average <= 5 + 1e-9
        assert (found.loss, found.accuracy) == evaluate_plan(net, found.plan, batches)
        for leader, shortcut in tied_layers(net):
            assert found.plan[leader] == found.plan[shortcut]
    assert search.best(3).cost <= 3 < search.best(5).cost
    one = search_plans(net, table_of(net), batches, budgets=(4,), num_candidates=1)
    assert len(one.plans) == 1
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert set(active_plan(net).values()) == {8}
    for wrong in ({"budgets": ()}, {"budgets": (4,), "num_candidates": 0}):
        with pytest.raises(ValueError, match="one budget or more"):
            search_plans(net, table_of(net), batches, **wrong)


def test_reestimated_statistics_are_those_of_the_batches():
    net = supernet(batch_norm="shared").eval()
    batches = [(IMAGES, torch.arange(8) % 10), (IMAGES + 1, torch.arange(8) % 10)]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    table = table_of(net)
    (found,) = search_plans(net, table, batches, budgets=(4,), num_candidates=1, reestimate_on=batches).plans
    reference = switch_(deepcopy(net), found.plan)
    norms = [module for module in reference.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for inputs, _ in batches:
            reference(inputs)
    assert found.loss == pytest.approx(evaluate_plan(reference.eval(), found.plan, batches)[0], rel=1e-6)
    assert found.loss != pytest.approx(evaluate_plan(net, found.plan, batches)[0], rel=1e-3)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert not any(module.training for module in net.modules())


def test_the_most_sensitive_layer_never_gets_fewer_bits():
    """The paper prints the release's objective as a minimum; maximised, importance is worth bits."""
    from lightning_plugins.quantization.allocation import allocate_bits

    rows = {name: LayerSensitivity(value, {8: 0.0, 2: value}, 100) for name, value in {"a": 0.1, "b": 0.9}.items()}
    for method in ("pareto", "dr-release"):
        plan = allocate_bits(SensitivityTable("by hand", rows), budget=5, method=method)
        assert plan["b"] > plan["a"]
