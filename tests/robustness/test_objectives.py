"""Objectives against slow references, reductions to one another, and refusals."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_plugins.features import PenultimateFeatures
from lightning_plugins.robustness import (
    CDT,
    LDAM,
    MART,
    PGDAT,
    REAT,
    SRAT,
    TAET,
    TRADES,
    BalancedSoftmax,
    ClassBalanced,
    CosineClassifier,
    LogitAdjustment,
    RoBal,
    class_budgets,
    separation_loss,
)

COUNTS = [50, 20, 5]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    clean = torch.rand(12, 6, dtype=torch.float64)
    return clean, clean + 0.1 * torch.randn_like(clean), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 0])


def loss_of(objective, net, batch):
    return float(objective(net, *batch))


def test_pgd_at_is_cross_entropy_on_attacked_inputs(net, batch):
    clean, attacked, targets = batch
    assert loss_of(PGDAT(), net, batch) == pytest.approx(float(F.cross_entropy(net(attacked), targets)), abs=1e-6)


def test_trades_is_cross_entropy_and_divergence(net, batch):
    clean, attacked, targets = batch
    p, q = net(clean).softmax(1), net(attacked).softmax(1)
    slow = sum(-math.log(p[i, y]) for i, y in enumerate(targets.tolist())) / 12
    slow += 6.0 * sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(12)) / 12
    assert loss_of(TRADES(6.0), net, batch) == pytest.approx(slow, abs=1e-5)
    assert loss_of(TRADES(0.0), net, batch) == pytest.approx(float(F.cross_entropy(net(clean), targets)), abs=1e-6)


def test_trades_gradient_flows_through_both_predictions_unless_detached(net, batch):
    clean, attacked, targets = batch

    def gradient(detach):
        asked = clean.clone().requires_grad_()
        objective = TRADES(6.0, detach_target=detach)
        kl_alone = objective(net, asked, attacked, targets) - F.cross_entropy(net(asked).float(), targets)
        return torch.autograd.grad(kl_alone, asked)[0]

    assert gradient(False).abs().max() > 1e-4
    assert gradient(True).abs().max() < 1e-6


@pytest.mark.parametrize("size", [12, 1])
def test_mart_equals_a_loop(net, batch, size):
    clean, attacked, targets = (part[:size] for part in batch)
    p, q = net(clean).softmax(1), net(attacked).softmax(1)
    slow = 0.0
    for i, y in enumerate(targets.tolist()):
        other = max(float(q[i, k]) for k in range(3) if k != y)
        slow += -math.log(q[i, y]) - math.log(1.0001 - other + 1e-12)
        kl = sum(float(p[i, k]) * (math.log(p[i, k]) - math.log(q[i, k] + 1e-12)) for k in range(3))
        slow += 5.0 * kl * (1.0000001 - float(p[i, y]))
    assert loss_of(MART(), net, (clean, attacked, targets)) == pytest.approx(slow / size, abs=1e-5)


def slow_separation(z, targets, temperature):
    z, total, anchors = F.normalize(z, dim=1), 0.0, 0
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and targets[p] == targets[i]]
        if not positives:
            continue
        anchors += 1
        log_all = math.log(sum(math.exp(float(z[i] @ z[a]) / temperature) for a in range(len(z)) if a != i))
        total += -sum(float(z[i] @ z[p]) / temperature - log_all for p in positives) / len(positives)
    return total / anchors


def test_separation_equals_a_double_loop_and_skips_lonely_samples():
    torch.manual_seed(0)
    z, targets = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3])
    assert float(separation_loss(z, targets)) == pytest.approx(slow_separation(z, targets, 0.1), abs=1e-12)
    shuffled = torch.randperm(9)
    assert float(separation_loss(z[shuffled], targets[shuffled])) == pytest.approx(float(separation_loss(z, targets)))
    scaled = z * torch.rand(9, 1, dtype=torch.float64).add(0.1)
    assert float(separation_loss(scaled, targets)) == pytest.approx(float(separation_loss(z, targets)))


def test_separation_of_a_simplex_is_the_closed_form():
    classes, m, temperature = 4, 3, 0.5
    simplex = F.normalize(torch.eye(classes, dtype=torch.float64) - 1 / classes, dim=1)
    targets = torch.arange(classes).repeat_interleave(m)
    near, far = math.exp(1 / temperature), math.exp(-1 / ((classes - 1) * temperature))
    closed = -math.log(near / ((m - 1) * near + m * (classes - 1) * far))
    loss = separation_loss(simplex[targets], targets, temperature=temperature)
    assert float(loss) == pytest.approx(closed, abs=1e-12)


def test_separation_without_pairs_is_zero_with_a_gradient():
    z = torch.randn(3, 2, requires_grad=True)
    loss = separation_loss(z, torch.tensor([0, 1, 2]))
    loss.backward()
    assert float(loss) == 0
    assert not z.grad.any()


def test_separation_of_half_precision_features_is_finite():
    z = torch.full((4, 3), 3e4, dtype=torch.float16)
    assert separation_loss(z, torch.tensor([0, 0, 1, 1])).isfinite()


@pytest.mark.parametrize("base", ["ce", "focal", "ldam"])
def test_srat_reduces_to_its_base(net, batch, base):
    objective = SRAT(base, separation=0.0, counts=COUNTS, start=0.5)
    plain = {
        "ce": ClassBalanced(counts=COUNTS, start=0.5),
        "focal": ClassBalanced(focal_gamma=1.0, counts=COUNTS, start=0.5),
        "ldam": LDAM(counts=COUNTS, start=0.5),
    }[base]
    for progress in (0.0, 0.7):
        objective.set_progress(progress)
        plain.set_progress(progress)
        assert loss_of(objective, net, batch) == pytest.approx(loss_of(plain, net, batch), abs=1e-7)
    if base == "ce":
        objective.set_progress(0.0)
        assert loss_of(objective, net, batch) == pytest.approx(loss_of(PGDAT(), net, batch), abs=1e-6)


def test_srat_adds_the_term_of_the_penultimate_features_growing_over_the_ramp(net, batch):
    _, attacked, targets = batch
    term = float(separation_loss(net[:2](attacked), targets))
    objective = SRAT(separation=0.3, ramp=0.2, start=1.0, counts=COUNTS)
    bare = loss_of(PGDAT(), net, batch)
    for progress, share in {0.0: 0.0, 0.1: 0.5, 0.9: 1.0}.items():
        objective.set_progress(progress)
        assert loss_of(objective, net, batch) == pytest.approx(bare + share * 0.3 * term, abs=1e-5)
    objective = SRAT(separation=0.3, ramp=0.0, start=1.0, features_from="0", counts=COUNTS)
    term = float(separation_loss(net[0](attacked), targets))
    assert loss_of(objective, net, batch) == pytest.approx(bare + 0.3 * term, abs=1e-5)


def test_srat_says_when_the_features_have_collapsed(batch):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, x):
            return self.head(torch.ones(len(x), 2) + 0.0 * x[:, :1].float())

    objective, model = SRAT(counts=COUNTS), Constant()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(19):
            objective(model, *batch)
    with pytest.warns(UserWarning, match="smaller separation"):
        objective(model, *batch)


def test_features_need_a_module(batch):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        SRAT(counts=COUNTS)(lambda x: x[:, :3], *batch)


class InAList(nn.Module):
    """Calls a compiled copy of its net that is not among its submodules."""

    def __init__(self, net):
        super().__init__()
        self.net, self.compiled = net, [torch.compile(net, backend="eager")]

    def forward(self, inputs):
        return self.compiled[0](inputs)


def in_place(net):
    net.compile(backend="eager")
    return net


COMPILED = {
    "whole": lambda net: torch.compile(net, backend="eager"),
    "in place": in_place,
    "head": lambda net: nn.Sequential(net[:2], torch.compile(net[2], backend="eager")),
    "in a list": InAList,
}


@pytest.mark.parametrize("name", COMPILED)
def test_features_of_compiled_nets_are_those_of_the_net(net, batch, name):
    # As in training under attack: the net has been called, and so compiled, before anybody asks for its features.
    objective = SRAT(counts=COUNTS, ramp=0.0)
    expected = objective(net, *batch)
    (gradient,) = torch.autograd.grad(expected, [net[0].weight])
    torch.compiler.reset()
    compiled = COMPILED[name](net)
    compiled(batch[0])
    for _ in range(2):
        loss = objective(compiled, *batch)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, [net[0].weight])[0], gradient)
    torch.testing.assert_close(compiled(batch[0]), net(batch[0]))
    torch.compiler.reset()


def test_a_layer_of_a_compiled_net_keeps_its_name(net, batch):
    owner = nn.ModuleDict({"net": torch.compile(net, backend="eager")})
    with PenultimateFeatures(owner, output_of="net.0") as seen:
        owner["net"](batch[0])
    torch.testing.assert_close(seen.last, net[0](batch[0]))


def test_an_objective_inside_of_a_compiled_step(net, batch):
    objective = SRAT(counts=COUNTS, ramp=0.0)
    torch.compiler.reset()
    step = torch.compile(lambda *rows: objective(net, *rows), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(step(*batch), objective(net, *batch))
    torch.compiler.reset()


def test_balanced_softmax_is_logit_adjustment_and_cdt_without_gamma_is_plain(net, batch):
    bsl = loss_of(BalancedSoftmax(counts=COUNTS), net, batch)
    assert bsl == pytest.approx(loss_of(LogitAdjustment(1.0, counts=COUNTS), net, batch), abs=1e-6)
    assert bsl != pytest.approx(loss_of(PGDAT(), net, batch), abs=1e-3)
    assert loss_of(CDT(0.0, counts=COUNTS), net, batch) == pytest.approx(loss_of(PGDAT(), net, batch), abs=1e-6)
    assert loss_of(LogitAdjustment(0.0, counts=COUNTS), net, batch) == pytest.approx(
        loss_of(PGDAT(), net, batch), abs=1e-6
    )


def test_weights_set_in_when_they_should(net, batch):
    objective = ClassBalanced(counts=COUNTS, start=0.8)
    objective.set_progress(0.79)
    assert objective.weights(batch[0]).tolist() == [1, 1, 1]
    objective.set_progress(0.8)
    weights = objective.weights(batch[0])
    assert weights.mean() == pytest.approx(1)
    assert weights[0] < weights[1] < weights[2]


def test_reat_pairwise_equals_a_double_loop(net, batch):
    _, attacked, targets = batch
    z = net[:2](attacked).float()
    p = z.softmax(1)
    rarity = [math.sqrt(75 / n) for n in COUNTS]
    pairs = []
    for i, y in enumerate(targets.tolist()):
        if y != 2:  # a third of three classes: the rarest
            continue
        for j, other in enumerate(targets.tolist()):
            kl = float((p[i] * (p[i] / p[j]).log()).sum())
            pairs.append(kl * (-1 if other == y else 1) * (rarity[y] + rarity[other]))
    slow = loss_of(BalancedSoftmax(counts=COUNTS), net, batch) + sum(pairs) / len(pairs)
    assert loss_of(REAT("pairwise", counts=COUNTS), net, batch) == pytest.approx(slow, abs=1e-5)
    assert loss_of(REAT(weight=0.0, counts=COUNTS), net, batch) == loss_of(BalancedSoftmax(counts=COUNTS), net, batch)
    assert loss_of(REAT("official", counts=COUNTS), net, batch) != pytest.approx(slow, abs=1e-4)


def test_taet_second_stage_equals_a_loop(net, batch):
    clean, attacked, targets = batch
    objective = TAET(0.4)
    objective.set_progress(0.39)
    assert loss_of(objective, net, batch) == pytest.approx(float(F.cross_entropy(net(clean), targets)), abs=1e-6)
    objective.set_progress(0.4)
    losses = F.cross_entropy(net(attacked), targets, reduction="none")
    per_class = [float(losses[targets == c].mean()) for c in range(3)]
    mean, total = sum(per_class) / 3, sum(per_class)
    slow = (
        0.1 * mean + 0.1 * sum((c - mean) ** 2 for c in per_class) / 3 + 0.1 * sum((c / total) ** 2 for c in per_class)
    )
    assert loss_of(objective, net, batch) == pytest.approx(slow, abs=1e-6)
    only_one = (clean[:3], attacked[:3], targets[:3])
    objective.present_only = True
    present = loss_of(objective, net, only_one)
    objective.present_only = False
    assert present > loss_of(objective, net, only_one) - 0.1
    assert present == pytest.approx(0.1 * float(losses[:3].mean()) + 0.1, abs=1e-6)


def test_robal_without_its_parts_is_scaled_cross_entropy(batch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), CosineClassifier(4, 3)).double()
    _, attacked, targets = batch
    bare = RoBal(10.0, margin=0.0, prior_tau=0.0, kl_weight=0.0, posthoc_tau=0.0, counts=COUNTS)
    assert loss_of(bare, net, batch) == pytest.approx(float(F.cross_entropy(10 * net(attacked), targets)), abs=1e-5)
    prior = RoBal(10.0, margin=0.0, prior_tau=1.0, kl_weight=0.0, counts=COUNTS)
    shifted = 10 * net(attacked) + torch.tensor(COUNTS).div(75).log()
    assert loss_of(prior, net, batch) == pytest.approx(float(F.cross_entropy(shifted, targets)), abs=1e-5)
    logits = net(attacked)
    before = logits.clone()
    prior.attack_logits(logits)
    assert torch.equal(logits, before)
    assert net(attacked).abs().max() < 1


@pytest.mark.parametrize("objective", [ClassBalanced(), LDAM(), BalancedSoftmax(), CDT(), SRAT(), REAT(), RoBal()])
def test_missing_counts_are_asked_for(net, batch, objective):
    with pytest.raises(ValueError, match=r"counts=\[\.\.\.\]"):
        objective(net, *batch)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TRADES(-1), "beta must be at least 0"),
        (lambda: SRAT("hinge"), "base must be"),
        (lambda: SRAT(temperature=0), "temperature must be above 0"),
        (lambda: REAT("both"), "variant must be"),
        (lambda: TAET(1.5), r"switch must lie in \[0, 1\]"),
        (lambda: BalancedSoftmax(counts=[3, 0]), "numbers above 0"),
        (lambda: ClassBalanced(start=2), r"start must lie in \[0, 1\]"),
        (lambda: class_budgets([1, 2], alpha=2), r"alpha must lie in \[0, 1\]"),
    ],
)
def test_wrong_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_class_budgets_keep_the_mean_radius():
    counts = torch.tensor([3000.0, 387, 30])
    for alpha in (0.0, 0.3, 1.0):
        factors = class_budgets(counts, alpha=alpha)
        assert float((counts / counts.sum() * factors).sum()) == pytest.approx(1.0, abs=1e-6)
    assert class_budgets([5, 5]).tolist() == [1, 1]


def test_all_compute_in_float32_under_autocast(batch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    single = tuple(part.float() if part.is_floating_point() else part for part in batch)
    for objective in (TRADES(), MART(), SRAT(counts=COUNTS), REAT(counts=COUNTS), TAET(0.0)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(net, *single)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
