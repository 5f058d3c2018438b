"""Attacks: closed forms, what each must keep, and what it must refuse."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_plugins.gradients import grad_context
from lightning_plugins.robustness import (
    apgd,
    auto_attack,
    dlr_loss,
    fab,
    fgsm,
    fgsm_rs,
    kl_loss,
    margin_loss,
    pgd,
    square,
    targeted_dlr_loss,
)
from lightning_plugins.robustness.apgd import apgd_checkpoints
from lightning_plugins.robustness.fab import project_onto_hyperplane
from lightning_plugins.robustness.square import square_side
from toys import assert_same_weights, weights

Attack = Callable[..., Any]


def short_pgd(*args: Any, eps: Any, **kwargs: Any) -> Any:
    return pgd(*args, eps=eps, step_size=eps / 4, num_steps=3, **kwargs)


ATTACKS: dict[str, Attack] = {
    "fgsm": lambda *a, generator=None, **k: fgsm(*a, **k),
    "fgsm_rs": fgsm_rs,
    "pgd": short_pgd,
    "pgd, 2 restarts": partial(short_pgd, num_restarts=2),
    "pgd, 2 restarts at once": partial(short_pgd, num_restarts=2, batched_restarts=True),
    "pgd, kl": partial(short_pgd, loss="kl", start="gaussian"),
    "pgd, cw": partial(short_pgd, loss="cw"),
    "apgd-ce": partial(apgd, num_steps=8),
    "apgd-dlr": partial(apgd, num_steps=8, loss="dlr", num_restarts=2),
    "apgd-t": partial(apgd, num_steps=6, loss="dlr_targeted", num_targets=2),
    "fab-t": partial(fab, num_steps=4, num_targets=2, num_restarts=2),
    "fab": partial(fab, num_steps=4, num_targets=None),
    "square": partial(square, num_queries=15),
    "auto_attack": partial(auto_attack, num_steps=4, num_queries=10),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


class ToyNet(nn.Module):
    """A convolution with batch normalisation and dropout, half of it frozen, one part left in evaluation mode."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.frozen_norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6 * 36, classes)
        for parameter in self.parameters():
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
        self.norm.running_mean += 0.1
        self.conv.bias.requires_grad_(False)
        self.frozen_norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.frozen_norm(self.norm(self.conv(x)).relu()).flatten(1)))


def linear(features: int = 36, classes: int = 5, *, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(features, classes)).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 6
    return net


def images(number: int = 4, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, *(shape or (3, 6, 6)), generator=generator, dtype=torch.float64).to(dtype)


def predictions(net: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(inputs).argmax(1)


def length(change: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(change.double().flatten(1), torch.inf if norm == "linf" else 2, dim=1)


# What each attack must keep


@each_attack
@pytest.mark.filterwarnings("ignore:Square, which")
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.sampled_from([0.0, 1e-3, 0.05, 0.6]),
    number=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    channels_last=st.booleans(),
    luminance_only=st.booleans(),
)
def test_invariants(attack, norm, eps, number, dtype, channels_last, luminance_only):
    net = ToyNet().to(dtype)
    inputs = images(number, dtype=dtype)
    if channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    inputs[0, :, 0] = 0.0
    inputs[0, :, 1] = 1.0
    targets = predictions(net, inputs)
    targets[0] = (targets[0] + (number > 1)) % 5
    before, kept, random = weights(net), inputs.clone(), torch.get_rng_state()
    modes = [module.training for module in net.modules()]
    flags = [parameter.requires_grad for parameter in net.parameters()]

    result = attack(net, inputs, targets, eps=eps, norm=norm, luminance_only=luminance_only)

    adversarial = result.adversarial
    assert adversarial.dtype == dtype
    assert adversarial.shape == inputs.shape
    assert adversarial.stride() == inputs.stride() or number == 1
    assert adversarial.isfinite().all()
    assert not adversarial.requires_grad
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    change = adversarial.double() - inputs.double()
    assert (length(change, norm) <= eps + 1e-6).all()
    if luminance_only and dtype in (torch.float32, torch.float64):
        assert (change - change[:, :1]).abs().max() < 1e-6
    if dtype in (torch.float32, torch.float64):  # other batch sizes round differently
        with torch.no_grad():
            torch.testing.assert_close(
                result.logits, copy.deepcopy(net).eval()(adversarial), rtol=1e-4, atol=1e-4, check_dtype=False
            )
    assert torch.equal(result.success, result.logits.argmax(1) != targets)
    if eps == 0:
        assert torch.equal(adversarial, inputs)
        assert torch.equal(result.success, torch.arange(number) < (number > 1))

    assert torch.equal(inputs, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_weights(net, before)
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert all(parameter.grad is None for parameter in net.parameters())


@each_attack
def test_gradients_of_the_user_stay(attack):
    net, inputs = ToyNet(), images(2)
    F.cross_entropy(net(inputs), torch.tensor([0, 1])).backward()
    before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    attack(net, inputs, predictions(net, inputs), eps=0.01)
    for parameter, gradient in zip(net.parameters(), before, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


@each_attack
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_attacks_where_gradients_are_off(attack, context):
    net, inputs = ToyNet(), images(3)
    targets = predictions(net, inputs)
    expected = attack(net, inputs, targets, eps=0.02)
    with context():
        found = attack(net, inputs.clone(), targets.clone(), eps=0.02)
        assert not torch.is_grad_enabled()
    assert torch.equal(found.adversarial, expected.adversarial)
    assert not found.adversarial.is_inference()


@each_attack
def test_an_empty_batch_gives_an_empty_result(attack):
    result = attack(ToyNet(), images(0), torch.zeros(0, dtype=torch.int64), eps=0.1)
    assert result.adversarial.shape == (0, 3, 6, 6)
    assert result.success.shape == (0,)
    assert result.logits.shape == (0, 5)


@each_attack
def test_equal_calls_give_equal_results_and_generators_differ(attack):
    net, inputs = ToyNet(), images(3)
    targets = predictions(net, inputs)
    first, second = (attack(net, inputs, targets, eps=0.05) for _ in range(2))
    assert torch.equal(first.adversarial, second.adversarial)
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    third = attack(net, inputs, targets, eps=0.05, generator=generator)
    if attack not in (ATTACKS["fgsm"], ATTACKS["fab"]):  # these two draw nothing
        assert not torch.equal(generator.get_state(), state) or third.success.all()


@pytest.mark.parametrize("attack", [fgsm, partial(pgd, step_size=0.02, num_steps=5, random_start=False)])
def test_a_row_does_not_depend_on_its_batch(attack):
    net, inputs = ToyNet().double(), images(5, dtype=torch.float64)
    targets = predictions(net, inputs)
    together = attack(net, inputs, targets, eps=0.05).adversarial
    for row in range(5):
        alone = attack(net, inputs[row : row + 1], targets[row : row + 1], eps=0.05).adversarial
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-t", "fab-t"])
def test_the_first_row_does_not_depend_on_the_rows_after_it(name):
    net, inputs = ToyNet().double(), images(3, 3, 6, 6, dtype=torch.float64)
    targets = predictions(net, inputs)
    one_start = {"num_restarts": 1} if name == "fab-t" else {}
    eps = 1e-4  # nothing falls, so that the same numbers are drawn
    together = ATTACKS[name](net, inputs, targets, eps=eps, **one_start)
    alone = ATTACKS[name](net, inputs[:1], targets[:1], eps=eps, **one_start)
    torch.testing.assert_close(alone.logits[0], together.logits[0], rtol=1e-12, atol=1e-12)


# Closed forms


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_binary_linear_without_box(norm, loss):
    torch_generator = torch.Generator().manual_seed(3)
    w, b, eps = torch.randn(7, generator=torch_generator, dtype=torch.float64), 0.3, 0.2
    inputs = torch.randn(20, 7, generator=torch_generator, dtype=torch.float64)
    targets = (inputs @ w + b > 0).long()

    def logits_fn(x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x[:, 0]), x @ w + b], dim=1)

    dual = w.abs().sum() if norm == "linf" else w.norm()
    margin = (2 * targets - 1) * (inputs @ w + b) - eps * dual
    for result in (
        fgsm(logits_fn, inputs, targets, eps=eps, norm=norm, loss=loss, bounds=None),
        pgd(
            logits_fn,
            inputs,
            targets,
            eps=eps,
            step_size=eps / 5,
            num_steps=11,
            norm=norm,
            loss=loss,
            random_start=norm == "linf",  # from elsewhere, l2 only converges to the optimum
            bounds=None,
        ),
    ):
        found = -margin_loss(result.logits, targets)
        torch.testing.assert_close(found, margin, rtol=0, atol=4e-15)
        torch.testing.assert_close(
            F.cross_entropy(result.logits, targets, reduction="none"), F.softplus(-margin), rtol=1e-12, atol=1e-14
        )


def test_box_constrained_linear():
    w, inputs, eps = linear(classes=2), images(20, 36, dtype=torch.float64), 0.3
    targets = predictions(w, inputs)
    direction = (w[1].weight[1] - w[1].weight[0]).detach().sign()
    sign = (1 - 2 * targets).double().unsqueeze(1)
    expected = (inputs + sign * eps * direction).clamp(0, 1)
    for result in (
        fgsm(w, inputs, targets, eps=eps),
        pgd(w, inputs, targets, eps=eps, step_size=eps / 4, num_steps=9),
    ):
        torch.testing.assert_close(result.adversarial, expected, rtol=0, atol=1e-15)


def exactly_robust(net: nn.Module, inputs: Tensor, targets: Tensor, eps: float) -> Tensor:
    """Return which inputs of a linear net no point of the ball and the box misclassifies."""
    w, flat, logits = net[1].weight.detach(), inputs.flatten(1), net(inputs).detach()
    robust = torch.ones(len(inputs), dtype=torch.bool)
    for row, y in enumerate(targets.tolist()):
        for k in set(range(len(w))) - {y}:
            toward = w[k] - w[y]
            best = (flat[row] + eps * toward.sign()).clamp(0, 1) - flat[row]
            robust[row] &= bool(logits[row, y] - logits[row, k] - toward @ best > 0)
    return robust


def test_multiclass_linear_is_solved_exactly_by_the_targeted_attacks():
    net, inputs, eps = linear(), images(24, 1, 6, 6, dtype=torch.float64), 0.1
    targets = predictions(net, inputs)
    robust = exactly_robust(net, inputs, targets, eps)
    assert 4 < robust.sum() < 20

    found = torch.ones(24, dtype=torch.bool)
    for shift in range(1, 5):
        toward = (targets + shift) % 5
        attack = partial(pgd, net, inputs, targets, eps=eps, step_size=eps / 4, num_steps=9, target_classes=toward)
        result = attack(loss="cw")
        found &= ~result.success
        assert margin_loss(attack(loss="ce").logits, targets).isfinite().all()
    assert torch.equal(found, robust)
    for attack in (
        partial(apgd, loss="dlr_targeted", num_targets=4, num_steps=30),
        partial(apgd, loss="margin_targeted", num_targets=4, num_steps=20),
        partial(fab, num_targets=4, num_steps=15),
        partial(fab, num_targets=None, num_steps=15),
        partial(auto_attack, num_queries=10, num_steps=20),
    ):
        result = attack(net, inputs, targets, eps=eps)
        assert torch.equal(~result.success, robust)
        assert torch.equal(result.adversarial[robust], inputs[robust])  # the input where nothing was found
    by_cross_entropy = pgd(net, inputs, targets, eps=eps, step_size=eps / 4, num_steps=20)
    assert (~by_cross_entropy.success)[robust].all()  # never fewer


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("num_targets", [4, None])
def test_fab_finds_the_nearest_example_of_a_linear_net(norm, num_targets):
    net, inputs = linear(seed=4), images(12, 36, dtype=torch.float64)
    targets = predictions(net, inputs)
    w, logits = net[1].weight.detach(), net(inputs).detach()
    nearest = []
    for row, y in enumerate(targets.tolist()):
        normals = torch.stack([w[y] - w[k] for k in range(5) if k != y])
        gaps = torch.stack([logits[row, y] - logits[row, k] for k in range(5) if k != y])
        nearest.append((gaps / (normals.abs().sum(1) if norm == "linf" else normals.norm(dim=1))).min())
    expected = torch.stack(nearest)
    result = fab(net, inputs, targets, eps=10.0, norm=norm, num_targets=num_targets, num_steps=20, bounds=None)
    assert result.success.all()
    found = length(result.adversarial - inputs, norm)
    assert (found >= expected * (1 - 1e-9)).all()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)
    eps = float(expected.median()) * 1.02
    half = fab(net, inputs, targets, eps=eps, norm=norm, num_targets=num_targets, num_steps=20, bounds=None)
    assert torch.equal(half.success, found <= eps)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_onto_a_hyperplane_inside_the_box(norm):
    from scipy.optimize import brentq

    generator = torch.Generator().manual_seed(0)
    points, normals = (torch.rand(40, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    normals = normals - 0.5
    normals[:, 0] = 0.0
    gaps = torch.randn(40, generator=generator, dtype=torch.float64)
    gaps[0] = 0.0
    zeros, ones = torch.zeros_like(points), torch.ones_like(points)
    found = project_onto_hyperplane(points, normals, gaps, zeros, ones, norm)
    solved = 0
    for point, w, gap, change in zip(points, normals, gaps, found, strict=True):
        rate = w.sign() if norm == "linf" else w

        def moved(t: float, point: Tensor = point, rate: Tensor = rate, gap: Tensor = gap) -> Tensor:
            return (point + t * rate * gap.sign()).clamp(0, 1) - point

        most = float(w @ moved(1e6))
        if abs(most) <= abs(float(gap)):
            torch.testing.assert_close(change, moved(1e6), rtol=0, atol=1e-12)
            continue
        t = brentq(lambda t, w=w, gap=gap, moved=moved: float(w @ moved(t) - gap), 0, 1e6, xtol=1e-15)
        torch.testing.assert_close(change, moved(t), rtol=0, atol=1e-8)
        solved += 1
    assert 10 < solved < 40


# Losses


@settings(max_examples=30, deadline=None, derandomize=True)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_dlr_does_not_see_shift_and_scale(scale, shift, seed):
    logits = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    targets, toward = torch.arange(6), (torch.arange(6) + 1) % 7
    changed = scale * logits + shift
    torch.testing.assert_close(dlr_loss(changed, targets), dlr_loss(logits, targets), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        targeted_dlr_loss(changed, targets, toward), targeted_dlr_loss(logits, targets, toward), rtol=1e-6, atol=1e-6
    )
    wrong = logits.argmax(1) != targets
    assert torch.equal(dlr_loss(logits, targets) > 0, wrong)
    assert torch.equal(margin_loss(logits, targets) > 0, wrong)


def test_dlr_by_hand():
    logits = torch.tensor([[4.0, 1.0, 3.0, 0.0]])
    assert dlr_loss(logits, torch.tensor([0])).item() == pytest.approx(-1 / 3)
    assert dlr_loss(logits, torch.tensor([2])).item() == pytest.approx(1 / 3)
    assert targeted_dlr_loss(logits, torch.tensor([0]), torch.tensor([3])).item() == pytest.approx(-4 / 3.5)


def test_losses_refuse_too_few_classes():
    targets = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"at least 3 classes.*\(1, 2\)"):
        dlr_loss(torch.zeros(1, 2), targets)
    with pytest.raises(ValueError, match="at least 4 classes"):
        targeted_dlr_loss(torch.zeros(1, 3), targets, targets)
    with pytest.raises(ValueError, match="at least 2 classes"):
        margin_loss(torch.zeros(1, 1), targets)
    with pytest.raises(ValueError, match="at least 4 classes"):
        apgd(linear(classes=3), images(1, 36, dtype=torch.float64), targets, eps=0.1, loss="dlr_targeted")


def test_kl_loss_is_torchs_and_has_no_gradient_at_the_reference():
    logits, reference = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = F.kl_div(logits.log_softmax(1), reference.softmax(1), reduction="batchmean")
    torch.testing.assert_close(kl_loss(logits, reference).mean(), expected)
    same = reference.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl_loss(same, reference).sum(), same)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


# PGD


class Counter(nn.Module):
    """Counts forward passes and backward passes to the input, and fails on one to the weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards, self.inputs = net, 0, 0, []
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self.refuse)

    def refuse(self, gradient: Tensor) -> None:
        raise AssertionError("a gradient of the weights was computed")

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.inputs.append(x.detach().clone())
        if x.requires_grad:
            x.register_hook(self.count)
        return self.net(x)

    def count(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_costs_its_steps_and_one_forward(steps, loss):
    net = Counter(ToyNet())
    result = pgd(net, images(), torch.arange(4), eps=0.1, step_size=0.03, num_steps=steps, loss=loss)
    reference = loss == "kl"
    assert (net.forwards, net.backwards) == (steps + 1 + reference, steps)
    assert (result.num_forwards, result.num_gradients) == (steps + 1 + reference, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pgd_is_bitwise_the_plain_loop(dtype):
    net, inputs, targets, eps, alpha = ToyNet().to(dtype), images(8, dtype=dtype), torch.arange(8) % 5, 8 / 255, 2 / 255
    result = pgd(
        net, inputs, targets, eps=eps, step_size=alpha, num_steps=10, generator=torch.Generator().manual_seed(3)
    )
    net.eval()
    noise = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    lower, upper = (inputs - eps).clamp_min(0), (inputs + eps).clamp_max(1)
    x = (inputs + eps * (2 * noise - 1)).clamp(lower, upper)
    for _ in range(10):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), targets, reduction="sum"), x)
        x = (x.detach() + alpha * gradient.sign()).clamp(lower, upper)
    assert torch.equal(result.adversarial, x.detach())
    assert torch.equal(result.logits, net(x).detach())


def test_kl_reference_is_computed_once_and_equals_the_recomputing_loop():
    net, inputs, eps, alpha = ToyNet().double(), images(6, dtype=torch.float64), 0.05, 0.02
    attack = partial(
        pgd, net, inputs, torch.arange(6) % 5, eps=eps, step_size=alpha, num_steps=5, loss="kl", start="gaussian"
    )
    result = attack(generator=torch.Generator().manual_seed(1))
    net.eval()
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (inputs + 1e-3 * noise).clamp(0, 1)
    for _ in range(5):
        x = x.detach().requires_grad_()
        loss = F.kl_div(net(x).log_softmax(1), net(inputs).softmax(1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        x = torch.max(torch.min(x.detach() + alpha * gradient.sign(), inputs + eps), inputs - eps).clamp(0, 1)
    torch.testing.assert_close(result.adversarial, x.detach(), rtol=0, atol=1e-14)
    known = attack(reference_logits=net(inputs).detach(), generator=torch.Generator().manual_seed(1))
    assert torch.equal(known.adversarial, result.adversarial)
    assert known.num_forwards == 6
    with pytest.raises(ValueError, match="use random_start=True"):
        attack(random_start=False)


def test_restarts_keep_misclassified_examples_then_high_losses():
    net, inputs = ToyNet(), images(16)
    targets = predictions(net, inputs)
    attack = partial(pgd, net, inputs, targets, eps=0.03, step_size=0.02, num_steps=2)
    generator = torch.Generator().manual_seed(5)
    runs = [attack(generator=generator) for _ in range(3)]
    together = attack(num_restarts=3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(together.success, torch.stack([run.success for run in runs]).any(0))
    losses = torch.stack([F.cross_entropy(run.logits, targets, reduction="none") for run in runs])
    losses[~torch.stack([run.success for run in runs]) & together.success] = -torch.inf
    best = F.cross_entropy(together.logits, targets, reduction="none")
    torch.testing.assert_close(best, losses.amax(0))
    batched = attack(num_restarts=3, batched_restarts=True, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(batched.logits, together.logits, rtol=1e-4, atol=1e-4)
    assert (batched.num_forwards, together.num_forwards) == (3, 9)


def test_eps_and_step_size_for_each_image_and_each_channel():
    net, inputs, targets = ToyNet(), images(4), torch.arange(4)
    eps = torch.tensor([0.0, 0.01, 0.1, 0.2]).reshape(4, 1, 1, 1)
    result = pgd(net, inputs, targets, eps=eps, step_size=eps / 2, num_steps=4)
    found = length(result.adversarial - inputs, "linf")
    torch.testing.assert_close(found, eps.flatten().double(), rtol=0, atol=1e-6)
    lengths = torch.tensor([0.0, 0.1, 0.2]).reshape(1, 3, 1, 1)
    result = pgd(net, inputs, targets, eps=lengths, step_size=lengths / 2, num_steps=4)
    found = (result.adversarial - inputs).abs().amax((0, 2, 3))
    torch.testing.assert_close(found, lengths.flatten(), rtol=0, atol=1e-6)
    for attack in (apgd, square):
        few = {"num_steps": 5} if attack is apgd else {"num_queries": 5}
        change = attack(net, inputs, targets, eps=lengths, **few).adversarial - inputs
        assert (change.abs().amax((0, 2, 3)) <= lengths.flatten() + 1e-6).all()
    repeated = pgd(net, inputs, targets, eps=eps, step_size=eps / 2, num_steps=4, num_restarts=2, batched_restarts=True)
    assert (length(repeated.adversarial - inputs, "linf") <= eps.flatten() + 1e-6).all()
    torch.testing.assert_close(
        length(fgsm_rs(net, inputs, targets, eps=eps, norm="l2").adversarial - inputs, "l2") <= eps.flatten() + 1e-6,
        torch.ones(4, dtype=torch.bool),
    )


def test_normalised_inputs_have_bounds_of_their_own():
    mean, std = torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).reshape(1, 3, 1, 1)
    net, inputs, targets = ToyNet(), images(4), torch.arange(4)
    outside = pgd(
        net,
        (inputs - mean) / std,
        targets,
        eps=0.1 / std,
        step_size=0.04 / std,
        num_steps=5,
        random_start=False,
        bounds=((0 - mean) / std, (1 - mean) / std),
    )

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net((x - mean) / std)

    net.eval()
    inside = pgd(Inside(), inputs, targets, eps=0.1, step_size=0.04, num_steps=5, random_start=False)
    torch.testing.assert_close(outside.adversarial * std + mean, inside.adversarial, rtol=0, atol=1e-5)


def test_luminance_attack_leaves_the_colour():
    net, inputs, targets = ToyNet().double(), images(4, dtype=torch.float64), torch.arange(4)
    result = pgd(net, inputs, targets, eps=0.05, step_size=0.02, num_steps=5, luminance_only=True)
    # The matrix of ITU-R BT.601, full range: rows are Y, Cb and Cr.
    matrix = torch.tensor(
        [
            [0.299, 0.587, 0.114],
            [-0.299 / 1.772, -0.587 / 1.772, 0.5],
            [0.5, -0.587 / 1.402, -0.114 / 1.402],
        ],
        dtype=torch.float64,
    )
    before, after = (torch.einsum("kc,nchw->nkhw", matrix, x) for x in (inputs, result.adversarial))
    torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=0, atol=1e-12)
    assert (after[:, 0] - before[:, 0]).abs().max() == pytest.approx(0.05, abs=1e-9)
    grey = images(2, 1, 6, 6)
    with pytest.raises(ValueError, match=r"RGB inputs \(N, 3, H, W\), found shape \(2, 1, 6, 6\)"):
        fgsm(ToyNet(1), grey, torch.arange(2), eps=0.1, luminance_only=True)


def test_pgd_is_at_least_as_strong_as_fgsm_on_a_linear_net():
    net, inputs = linear(), images(20, 36, dtype=torch.float64)
    targets = predictions(net, inputs)
    one = fgsm(net, inputs, targets, eps=0.05)
    many = pgd(net, inputs, targets, eps=0.05, step_size=0.01, num_steps=20, random_start=False)
    first, second = (F.cross_entropy(result.logits, targets, reduction="none") for result in (one, many))
    assert (second >= first - 1e-9).all()


def test_tiny_gradients_still_have_a_direction():
    direction = torch.zeros(1, 36)
    direction[0, :2] = torch.tensor([3.0, 4.0])

    def logits_fn(x: Tensor) -> Tensor:
        ahead = 1e-30 * (x @ direction.T)
        return torch.cat([-ahead, ahead], dim=1)

    inputs = torch.full((1, 36), 0.5)
    change = fgsm(logits_fn, inputs, torch.tensor([0]), eps=0.1, norm="l2").adversarial - inputs
    torch.testing.assert_close(change, 0.1 * direction / 5, rtol=1e-5, atol=1e-7)


# Precision


def test_float16_keeps_gradients_by_scaling_the_loss():
    class Half(nn.Module):
        """Float16 arithmetic of a confident network: a gradient below 6e-8 becomes zero."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.flatten(1).half() * 8, torch.zeros(len(x), 1, dtype=torch.float16)], dim=1)

    inputs = torch.full((1, 2), 0.5)
    inputs[0, 0] = 1.0
    net = Half()
    logits = net(inputs).float()
    confident = lambda o, y: 1e-8 * F.cross_entropy(o, y, reduction="none")  # noqa: E731
    result = pgd(
        net, inputs, torch.tensor([0]), eps=0.1, step_size=0.1, num_steps=1, random_start=False, loss=confident
    )
    assert logits.argmax() == 0
    assert result.num_zero_gradients == 0
    torch.testing.assert_close(result.adversarial, torch.tensor([[0.9, 0.6]]))


def test_the_training_step_keeps_its_gradients_under_autocast():
    net, inputs, targets = ToyNet(), images(), torch.arange(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            net(inputs)  # leaves weights without a graph in autocast's cache
        result = pgd(net, inputs, targets, eps=0.1, step_size=0.05, num_steps=2, loss="kl")
        loss = F.cross_entropy(net(result.adversarial), targets)
    assert result.adversarial.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.requires_grad)


@each_attack
def test_autocast_inside_inference_mode(attack):
    net, inputs = ToyNet(), images()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        targets = net.eval()(inputs.clone()).argmax(1)  # leaves inference tensors in autocast's cache
        result = attack(net, inputs, targets, eps=0.1)
        assert torch.is_autocast_enabled("cpu")
    assert result.adversarial.dtype == torch.float32


def test_a_module_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        net = ToyNet()
    with pytest.raises(RuntimeError, match=r"Trainer\(inference_mode=False\)"):
        fgsm(net, images(1), torch.tensor([0]), eps=0.1)


def test_modes_come_back_after_an_error():
    net = ToyNet()
    modes = [module.training for module in net.modules()]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fgsm(net, images(1, 3, 4, 4), torch.tensor([0]), eps=0.1)
    assert [module.training for module in net.modules()] == modes


# APGD


def test_apgd_checkpoints_are_the_published_ones():
    assert apgd_checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert apgd_checkpoints(1) == (1,)
    assert apgd_checkpoints(10)[0] == 2


def slow_apgd(value: Callable[[float], float], slope: Callable[[float], float], x: float, start: float, eps: float):
    """Run the algorithm on one number, in plain Python; return all points and step sizes."""
    clip = lambda z: min(max(z, x - eps), x + eps)  # noqa: E731
    now = old = best = start
    g = best_g = slope(now)
    best_value = checked = value(now)
    history, points, steps = [best_value], [now], []
    step, length_, since, reduced = 2 * eps, 22, 0, True
    for i in range(100):
        steps.append(step)
        a = 0.75 if i else 1.0
        change, old = now - old, now
        z = clip(now + step * ((g > 0) - (g < 0)))
        now = clip(now + a * (z - now) + (1 - a) * change)
        g = slope(now)
        history.append(value(now))
        points.append(now)
        if history[-1] > best_value:
            best, best_g, best_value = now, g, history[-1]
        since += 1
        if since == length_:
            rises = sum(history[-k] > history[-k - 1] for k in range(1, length_ + 1))
            halve = rises <= 0.75 * length_ or (not reduced and checked >= best_value)
            reduced, checked = halve, best_value
            if halve:
                step, now, g = step / 2, best, best_g
            length_, since = max(length_ - 3, 6), 0
    return points, steps


def test_apgd_follows_the_published_algorithm_step_by_step():
    peak, x, eps = 0.512345, 0.5, 0.1
    seen: list[float] = []

    def logits_fn(z: Tensor) -> Tensor:
        seen.append(z.item())
        ahead = 5 + (z - peak).square()
        return torch.cat([ahead, torch.zeros_like(ahead)], dim=1)

    def value(z: float) -> float:
        return float(F.softplus(torch.tensor(-5 - (z - peak) ** 2, dtype=torch.float64)))

    inputs = torch.tensor([[x]], dtype=torch.float64)
    result = apgd(logits_fn, inputs, torch.tensor([0]), eps=eps)
    assert not result.success
    assert (result.num_gradients, result.num_forwards) == (101, 102)
    points = seen[1:]
    expected, steps = slow_apgd(value, lambda z: peak - z, x, points[0], eps)
    torch.testing.assert_close(torch.tensor(points), torch.tensor(expected), rtol=0, atol=1e-9)
    halved = [i for i in range(1, 100) if steps[i] < steps[i - 1]]
    assert halved[0] == 22
    assert len(halved) >= 6


def test_apgd_gives_a_run_that_rises_below_its_start_one_more_checkpoint():
    ahead = [1.0, *(5 - 0.01 * i for i in range(1, 101))]  # the loss falls at once, then rises without an end
    points: list[float] = []

    def logits_fn(z: Tensor) -> Tensor:
        points.append(z.item())
        change = ahead[max(len(points) - 2, 0)] - (z - z.detach())
        return torch.cat([change, torch.zeros_like(change)], dim=1)

    calls = iter(ahead)
    apgd(logits_fn, torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0]), eps=0.1)
    expected, steps = slow_apgd(lambda z: -next(calls), lambda z: 1.0, 0.5, points[1], 0.1)
    torch.testing.assert_close(torch.tensor(points[1:]), torch.tensor(expected), rtol=0, atol=1e-9)
    assert [i for i in range(1, 100) if steps[i] < steps[i - 1]][0] == 41


def test_apgd_averages_a_random_network():
    generator = torch.Generator().manual_seed(0)

    def logits_fn(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return torch.stack([flat.sum(1), 18 + 3 * torch.randn(len(x), generator=generator)], dim=1)

    inputs = torch.full((1, 36), 0.55)
    one = apgd(logits_fn, inputs, torch.tensor([0]), eps=0.0, num_steps=1, num_samples=50)
    assert not one.success  # 19.8 against 18 on average
    assert one.num_forwards == 50 * 3


# Square


def test_square_sides_follow_the_published_schedule():
    shares = {0: 0.8, 10: 0.8, 11: 0.4, 50: 0.4, 51: 0.2, 201: 0.1, 501: 0.05, 1001: 0.025, 2001: 0.0125, 4001: 0.00625}
    for query, share in shares.items():
        assert square_side(query, 32, 32) == max(round((share * 1024) ** 0.5), 1)
    assert square_side(0, 8, 100) == 8  # never larger than the image
    assert square_side(100_000, 8, 8) == 1


def test_square_starts_with_stripes_and_changes_one_window():
    seen: list[Tensor] = []
    inputs = torch.full((1, 3, 12, 12), 0.5, dtype=torch.float64)

    def logits_fn(x: Tensor) -> Tensor:
        seen.append(x.clone())
        # Every query is better than the one before, so each is kept.
        return torch.tensor([[100.0 - len(seen), 0.0]], dtype=torch.float64).expand(len(x), 2)

    result = square(logits_fn, inputs, torch.tensor([0]), eps=0.1, num_queries=60)
    assert not result.success
    assert result.num_forwards == len(seen) == 62
    stripes = seen[1] - inputs
    torch.testing.assert_close(stripes.abs(), torch.full_like(stripes, 0.1))
    assert torch.equal(stripes, stripes[:, :, :1].expand_as(stripes))
    assert not torch.equal(stripes[..., :1].expand_as(stripes), stripes)
    for query, (before, after) in enumerate(zip(seen[1:], seen[2:], strict=False)):
        side = square_side(query, 12, 12)
        changed = (before != after).any(1)[0].nonzero()
        if len(changed):
            spread = changed.amax(0) - changed.amin(0)
            assert (spread < side).all()
        torch.testing.assert_close((after - inputs).abs(), torch.full_like(inputs, 0.1))  # corners of the ball
    assert not torch.equal(seen[-1], seen[1])


def test_square_keeps_only_what_helps():
    net, inputs = ToyNet(), images(6)
    targets = predictions(net, inputs)
    few = square(net, inputs, targets, eps=0.004, num_queries=1)
    many = square(net, inputs, targets, eps=0.004, num_queries=300)
    assert (many.success >= few.success).all()
    assert square(net, inputs, targets, eps=0.3, num_queries=300).success.float().mean() > 0.5
    own = square(net, inputs, targets, eps=0.3, num_queries=300, shared_windows=False)
    assert own.success.float().mean() > 0.5
    assert own.num_gradients == 0


def test_square_in_l2_keeps_the_length():
    seen: list[Tensor] = []
    inputs = torch.full((1, 3, 12, 12), 0.5, dtype=torch.float64)

    def logits_fn(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.tensor([[100.0 - len(seen), 0.0]], dtype=torch.float64).expand(len(x), 2)

    square(logits_fn, inputs, torch.tensor([0]), eps=0.7, norm="l2", num_queries=60)
    for query in seen[1:]:
        assert length(query - inputs, "l2").item() == pytest.approx(0.7, abs=1e-9)
    with pytest.raises(ValueError, match="shared_windows=True"):
        square(logits_fn, inputs, torch.tensor([0]), eps=0.7, norm="l2", shared_windows=False)


# What is refused

BAD_CALLS = {
    "integer images": ({"inputs": torch.zeros(2, 3, 6, 6, dtype=torch.uint8)}, "divide 8-bit images by 255"),
    "NaN": ({"inputs": torch.full((2, 3, 6, 6), torch.nan)}, "must be finite"),
    "infinite": ({"inputs": torch.full((2, 3, 6, 6), torch.inf), "bounds": None}, "must be finite"),
    "outside": ({"inputs": torch.full((2, 3, 6, 6), 1.5)}, "found 1.5 to 1.5; clamp them"),
    "no batch": ({"inputs": torch.zeros(3)}, "batch dimension"),
    "label too large": ({"targets": torch.tensor([0, 5])}, r"must lie in \[0, 5\), found 0 to 5"),
    "label negative": ({"targets": torch.tensor([0, -1])}, r"must lie in \[0, 5\), found -1 to 0"),
    "labels too many": ({"targets": torch.tensor([0, 1, 2])}, r"int64 of shape \(2,\), found torch.int64 \(3,\)"),
    "labels of another type": ({"targets": torch.tensor([0.0, 1.0])}, r"use .long\(\)"),
    "negative eps": ({"eps": -0.1}, "eps must be a finite number of at least 0, got -0.1"),
    "eps not a number": ({"eps": float("nan")}, "eps.* must be a (finite )?number"),
    "eps of a wrong shape": ({"eps": torch.ones(2)}, r"\(N, 1, 1, 1\)"),
    "negative eps of one": ({"eps": torch.tensor([0.1, -0.1]).reshape(2, 1, 1, 1)}, "at least 0"),
    "norm": ({"norm": "l1"}, '"linf" or "l2", got \'l1\''),
    "bounds": ({"bounds": (1.0, 0.0)}, "lowest, highest"),
    "l2 by channel": ({"eps": torch.ones(1, 3, 1, 1), "norm": "l2"}, "one number per image"),
}


@pytest.mark.parametrize("name", ["fgsm", "apgd-ce", "fab-t", "square", "auto_attack"])
@pytest.mark.parametrize(("changes", "match"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_refuses(name, changes, match):
    arguments = {"inputs": images(2), "targets": torch.tensor([0, 1]), "eps": 0.1} | changes
    with pytest.raises(ValueError, match=match):
        ATTACKS[name](ToyNet(), arguments.pop("inputs"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize(
    ("attack", "arguments", "match"),
    [
        (pgd, {"step_size": -0.1, "num_steps": 1}, "step_size must be"),
        (pgd, {"step_size": 0.1, "num_steps": 0}, "num_steps must be at least 1"),
        (pgd, {"step_size": 0.1, "num_steps": 1, "num_restarts": 0}, "num_restarts"),
        (pgd, {"step_size": 0.1, "num_steps": 1, "num_restarts": 2, "random_start": False}, "random_start=True"),
        (pgd, {"step_size": 0.1, "num_steps": 1, "start": "zero"}, '"uniform" or "gaussian"'),
        (pgd, {"step_size": 0.1, "num_steps": 1, "loss": "mse"}, "got 'mse'"),
        (pgd, {"step_size": 0.1, "num_steps": 1, "loss": "kl", "target_classes": torch.tensor([1, 2])}, "target_cl"),
        (pgd, {"step_size": 0.1, "num_steps": 1, "target_classes": torch.tensor([1, 7])}, "target_classes must lie"),
        (apgd, {"num_steps": 0}, "num_steps"),
        (apgd, {"loss": "cw"}, "dlr_targeted"),
        (fab, {"num_targets": 0}, "num_targets"),
        (fab, {"eps": torch.full((1, 3, 1, 1), 0.1)}, r"one eps per image.*apgd\(\)"),
        (square, {"num_queries": 0}, "num_queries"),
        (square, {"initial_share": 0.0}, "initial_share"),
        (auto_attack, {"version": "fast"}, "version must be one of"),
        (auto_attack, {"num_steps": 0}, "num_steps and num_queries"),
    ],
)
def test_refuses_arguments(attack, arguments, match):
    with pytest.raises(ValueError, match=match):
        attack(ToyNet(), images(2), predictions(ToyNet(), images(2)), **({"eps": 0.1} | arguments))


def test_refuses_networks_that_no_attack_can_use():
    inputs, targets = images(2), torch.tensor([0, 1])
    net = ToyNet().eval()
    with pytest.raises(ValueError, match=r"use square\(\), which needs no gradients"):
        fgsm(lambda x: net(x.detach()).detach(), inputs, targets, eps=0.1)
    with pytest.raises(ValueError, match=r"must return logits \(2, C\), found \(5,\)"):
        fgsm(lambda x: net(x)[0], inputs, targets, eps=0.1)
    with pytest.raises(ValueError, match=r"found tuple; wrap the network"):
        fgsm(lambda x: (net(x),), inputs, targets, eps=0.1)
    with pytest.raises(ValueError, match="returned NaN"):
        fgsm(lambda x: net(x) * torch.nan, inputs, targets, eps=0.1)
    with pytest.raises(ValueError, match="Square needs images"):
        square(linear(), images(1, 36), torch.tensor([0]), eps=0.1)


def test_zero_gradients_are_counted_and_named():
    net = ToyNet().eval()
    scaled = lambda x: 1e4 * net(x)  # noqa: E731
    inputs = images(8)
    targets = predictions(net, inputs)
    with pytest.warns(UserWarning, match=r'8 of 8 input gradients were exactly zero.*loss="dlr"'):
        result = fgsm(scaled, inputs, targets, eps=0.05)
    assert result.num_zero_gradients == 8
    assert torch.equal(result.adversarial, inputs)  # kept, not moved at random
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fgsm(scaled, inputs, targets, eps=0.05, loss="dlr").num_zero_gradients == 0


@pytest.mark.parametrize("attack", ["pgd", "apgd"])
def test_images_that_are_wrong_already_do_not_count_as_zero_gradients(attack):
    """DLR is constant where the true class comes third: half of these images begin there."""
    net = ToyNet().eval()
    inputs = images(8)
    order = net(inputs).argsort(1, descending=True)
    targets = torch.cat([order[:4, 0], order[4:, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if attack == "pgd":
            result = pgd(net, inputs, targets, eps=0.01, step_size=0.005, num_steps=2, random_start=False, loss="dlr")
            assert result.success[4:].all()
        else:
            result = apgd(net, inputs, targets, eps=0.01, num_steps=5, loss="dlr")
    assert result.num_zero_gradients == 0


def test_grad_context_returns_to_the_callers_mode():
    with torch.inference_mode():
        with grad_context():
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
