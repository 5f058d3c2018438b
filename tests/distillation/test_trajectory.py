"""Trajectory matching against full unrolling, and its experts."""

from __future__ import annotations

import weakref

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from lightning_plugins.distillation import (
    ClassPool,
    ExpertTrajectories,
    FlipUnion,
    SiameseAugmentation,
    TrajectoryMatching,
    match_trajectory,
    train_expert_,
    untrained_net,
)
from lightning_plugins.models import convnet3
from lightning_plugins.modules import DatasetDistillation
from toys import make_trainer


def factory() -> nn.Module:
    return convnet3(num_classes=3, in_channels=1, image_size=8, width=4)


def images(number: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(number) % 3
    found = 0.5 * torch.rand(number, 1, 8, 8, generator=generator)
    found[torch.arange(number), 0, labels] += 0.5
    return found, labels


def two_layers(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A tanh network of 5 inputs, 4 hidden units and 3 classes."""
    first, second = weights[:20].view(4, 5), weights[20:].view(3, 4)
    return F.cross_entropy(torch.tanh(x @ first.T) @ second.T, y)


def problem(steps: int) -> tuple:
    generator = torch.Generator().manual_seed(steps)
    start, target = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    x = [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(steps)]
    y = [torch.randint(3, (6,), generator=generator) for _ in range(steps)]
    return start, target, x, y


def unrolled(start, target, x, y, step_size: float, *, exact: bool):
    """One graph through all steps; without ``exact`` the gradients do not see what earlier steps did to the weights."""
    x = [part.clone().requires_grad_() for part in x]
    rate = torch.tensor(step_size, dtype=torch.float64, requires_grad=True)
    weights = start.clone().requires_grad_()
    for part, label in zip(x, y, strict=True):
        here = weights if exact else weights.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(two_layers(here, part, label), here, create_graph=True)
        weights = weights - rate * gradient
    value = (weights - target).square().sum() / (start - target).square().sum()
    return value.detach(), *torch.autograd.grad(value, [rate, *x])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_gradient_is_that_of_the_unrolled_graph(steps, exact):
    start, target, x, y = problem(steps)
    value, rate, *gradients = unrolled(start, target, x, y, 0.3, exact=exact)
    found = match_trajectory(two_layers, start, target, x, y, 0.3, exact=exact)
    torch.testing.assert_close(found.value, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.step_size, rate, rtol=1e-9, atol=1e-12)
    for one, other in zip(found.inputs, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_two_forms_differ_from_two_steps_on():
    for steps in (1, 3):
        start, target, x, y = problem(steps)
        exact, released = (
            match_trajectory(two_layers, start, target, x, y, 0.3, exact=exact) for exact in (True, False)
        )
        assert torch.equal(exact.inputs[-1], released.inputs[-1])
        assert torch.equal(exact.inputs[0], released.inputs[0]) == (steps == 1)


def test_the_released_form_is_that_of_its_formula():
    # eta^2 g_i g_i + 2 eta g_i (eta (G - g_i) - theta_0 + theta*), with G the sum of all gradients, held fixed
    start, target, x, y = problem(4)
    found = match_trajectory(two_layers, start, target, x, y, 0.3, exact=False)
    norm = (start - target).square().sum()
    weights, path, total = start, [], torch.zeros(32, dtype=torch.float64)
    for part, label in zip(x, y, strict=True):
        path.append(weights.clone().requires_grad_())
        (gradient,) = torch.autograd.grad(two_layers(path[-1], part, label), path[-1])
        weights, total = weights - 0.3 * gradient, total + gradient
    for index, (part, label) in enumerate(zip(x, y, strict=True)):
        part = part.clone().requires_grad_()
        (g,) = torch.autograd.grad(two_layers(path[index], part, label), path[index], create_graph=True)
        rest = 0.3 * (total - g.detach()) - start + target
        value = (0.09 * g @ g + 2 * 0.3 * g @ rest) / norm
        torch.testing.assert_close(found.inputs[index], torch.autograd.grad(value, part)[0], rtol=1e-9, atol=1e-12)


def test_the_graphs_of_many_steps_are_never_in_memory_together():
    class Kept:
        def __init__(self, value):
            self.value = value

    def peak(steps: int) -> int:
        alive, most = weakref.WeakSet(), 0

        def pack(value):
            nonlocal most
            kept = Kept(value)
            alive.add(kept)
            most = max(most, len(alive))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.value):
            start, target, x, y = problem(steps)
            match_trajectory(two_layers, start, target, x, y, 0.3)
        return most

    assert peak(12) == peak(3)


def objective_and_reference(**arguments):
    found, labels = images()
    pool = ClassPool(found.double(), labels)
    experts = ExpertTrajectories.record(lambda: factory().double(), pool, num_experts=1, epochs=2, learning_rate=0.1)
    objective = TrajectoryMatching(experts, num_steps=3, ahead=2, max_start=1, step_size=0.2, **arguments)
    return objective, experts, pool


def test_the_objective_in_one_graph():
    objective, experts, pool = objective_and_reference(step_size_learning_rate=0.0)
    net = factory().double()
    synthetic = torch.rand(3, 2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    found = objective.loss(net, pool.draw(1), synthetic, details=True)
    (gradient,) = torch.autograd.grad(found.total, synthetic)
    start, target = experts.weights[0, 0], experts.weights[0, 2]
    names, sizes = zip(*((name, value.shape) for name, value in net.named_parameters()), strict=True)
    weights = start.clone().requires_grad_()
    for _ in range(3):  # all images are one batch, whose order does not matter
        parts = weights.split([size.numel() for size in sizes])
        named = {name: part.view(size) for name, size, part in zip(names, sizes, parts, strict=True)}
        logits = functional_call(net, named, (synthetic.flatten(0, 1),))
        loss = F.cross_entropy(logits, torch.arange(3).repeat_interleave(2))
        weights = weights - 0.2 * torch.autograd.grad(loss, weights, create_graph=True)[0]
    value = (weights - target).square().sum() / (start - target).square().sum()
    torch.testing.assert_close(found.total.detach(), value.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(value, synthetic)[0], rtol=1e-8, atol=1e-12)
    assert found.per_class.shape == (3,)
    assert found.quantities["step_size"] == 0.2
    assert all(value.grad is None for value in net.parameters())


def test_the_step_size_is_learned_by_descent_and_stays_positive():
    objective, _, pool = objective_and_reference(step_size_learning_rate=1e-3)
    synthetic = torch.rand(3, 1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    before = objective.step_size
    objective.loss(factory().double(), pool.draw(1), synthetic.detach())
    assert objective.step_size == before  # nothing is learned where nothing is differentiated
    value = objective.loss(factory().double(), pool.draw(1), synthetic).total
    after = objective.step_size
    objective.step_size, objective._momentum = before + 1e-5, 0.0
    higher = objective.loss(factory().double(), pool.draw(1), synthetic.detach()).total
    assert after == pytest.approx(before - 1e-3 * (higher - value).item() / 1e-5, rel=1e-3)
    objective._learn_step_size(1e9)
    assert objective.step_size == 1e-6


def test_the_flip_union_halves_the_batch():
    plain, united = (objective_and_reference(flip=flip, batch_size=4)[0] for flip in (None, FlipUnion("synthetic")))
    rows = torch.rand(6, 1, 8, 8)
    for objective in (plain, united):
        batches = objective._batches(rows, torch.arange(6) // 2, torch.Generator().manual_seed(0))
        assert [len(x) for x, _ in batches] == [len(y) for _, y in batches] == [4] * 3
    x, y = batches[0]
    assert torch.equal(x[2:], x[:2].flip(-1))
    assert torch.equal(y[2:], y[:2])


def test_experts_are_the_networks_that_train(tmp_path):
    pool = ClassPool(*images())
    experts = ExpertTrajectories.record(factory, pool, num_experts=2, epochs=3, learning_rate=0.05, batch_size=10)
    torch.testing.assert_close(experts.weights[0, 0], flat(untrained(pool, 0)))
    torch.testing.assert_close(experts.weights[0, 3], flat(untrained(pool, 3)))
    torch.testing.assert_close(experts.weights[0, 1], flat(untrained(pool, 1)))
    assert not torch.equal(experts.weights[0, 0], experts.weights[1, 0])
    loaded = ExpertTrajectories.load(experts.save(tmp_path / "experts.safetensors"))
    assert torch.equal(loaded.weights, experts.weights)
    start, target = experts.draw(torch.Generator().manual_seed(0), max_start=2, ahead=1)
    assert any(
        torch.equal(start, row[epoch]) and torch.equal(target, row[epoch + 1])
        for row in experts.weights
        for epoch in (0, 1)
    )


def untrained(pool: ClassPool, epochs: int) -> nn.Module:
    from lightning_plugins.distillation.generators import PrivateGenerator

    weights_seed, order_seed = torch.randint(
        2**31, (2,), generator=PrivateGenerator(0, "trajectories").on("cpu")
    ).tolist()
    net = untrained_net(factory, seed=weights_seed)
    train_expert_(
        net,
        pool,
        epochs=epochs,
        learning_rate=0.05,
        momentum=0,
        weight_decay=0,
        batch_size=10,
        lower_learning_rate=False,
        seed=order_seed,
    )
    return net


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in net.parameters()])


def matching(**arguments) -> TrajectoryMatching:
    defaults = {"num_experts": 1, "expert_epochs": 3, "num_steps": 2, "ahead": 1, "max_start": 2, "batch_size": 4}
    return TrajectoryMatching(**(defaults | {"step_size_learning_rate": 1e-4} | arguments))


def distillation(objective: TrajectoryMatching, **settings) -> DatasetDistillation:
    return DatasetDistillation(
        model_args={"width": 4},
        preset="dsa",
        images_per_class=2,
        settings={"batch_real": 2, **settings},
        objective=objective,
        iterations_per_epoch=3,
        classes_per_group=1,
        dataset=TensorDataset(*images()),
    )


def test_a_distillation_records_resumes_and_needs_all_classes(tmp_path):
    def make() -> DatasetDistillation:
        augmentation = SiameseAugmentation(("crop", "scale"), variant="vico")
        return distillation(matching(augmentation=augmentation, flip=FlipUnion("synthetic")))

    straight = make()
    make_trainer(tmp_path, 2, logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(straight)
    names = {path.name.split("-step")[0] for path in tmp_path.rglob("media/distillation/*.png")}
    assert names == {"images", "images_change"}  # no loss of each class, which would be the same for all
    assert straight.classes_per_group == 3
    assert straight.objective.experts.weights.shape[:2] == (1, 4)
    assert not torch.equal(straight.synthetic.images, straight._start)
    first = make_trainer(tmp_path, 1)
    first.fit(make())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    make_trainer(tmp_path, 2).fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(resumed.synthetic.images, straight.synthetic.images)
    assert resumed.objective.step_size == straight.objective.step_size != 0.01
    other = distillation(matching(seed=1))
    with pytest.raises(ValueError, match="record them with the same seed"):
        make_trainer(tmp_path, 2).fit(other, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    with pytest.raises(MisconfigurationException, match="set class_stepping to 'joint'"):
        make_trainer(tmp_path, 1).fit(distillation(matching(), class_stepping="sequential"))


def test_errors(tmp_path):
    start, target, x, y = problem(1)
    with pytest.raises(ValueError, match="one step or more"):
        match_trajectory(two_layers, start, target, [], [], 0.1)
    with pytest.raises(ValueError, match="the expert must have moved"):
        match_trajectory(two_layers, start, start, x, y, 0.1)
    for arguments, message in (
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"step_size": 0.0}, "step_size must be above 0"),
        ({"max_start": 4, "ahead": 1}, "lower max_start or ahead"),
    ):
        with pytest.raises(ValueError, match=message):
            matching(**arguments)
    pool = ClassPool(*images())
    with pytest.raises(RuntimeError, match="call prepare"):
        matching().loss(factory(), pool.draw(1), torch.rand(3, 1, 1, 8, 8))
    with pytest.raises(ValueError, match="experts, epochs"):
        ExpertTrajectories(torch.rand(3, 4))
    with pytest.raises(ValueError, match="num_experts and epochs"):
        ExpertTrajectories.record(factory, pool, num_experts=0)
    with pytest.raises(ValueError, match="use another norm"):
        ExpertTrajectories.record(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3)), pool)
    objective = matching()
    objective.prepare(factory, pool)
    with pytest.raises(ValueError, match="use one architecture"):
        objective.loss(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), pool.draw(1), torch.rand(3, 1, 1, 8, 8))
    path = objective.experts.save(tmp_path / "experts.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="fingerprint differs"):
        ExpertTrajectories.load(path)
    path.write_bytes(content[:20])
    with pytest.raises(ValueError, match="damaged one"):
        ExpertTrajectories.load(path)
    path.write_bytes(safetensors.torch.save({"weights": torch.ones(1)}))
    with pytest.raises(ValueError, match="none that ExpertTrajectories.save wrote"):
        ExpertTrajectories.load(path)
