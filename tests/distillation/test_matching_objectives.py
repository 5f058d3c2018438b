"""The objectives against class-by-class loops, in tiles and in groups of classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_plugins.distillation import (
    CalibrationTerm,
    CharacteristicFunction,
    ClassPool,
    DistributionMatching,
    ExtractorBank,
    FlipUnion,
    FrequencySampler,
    GradientMatching,
    RealBatch,
    SamplingNetwork,
    SiameseAugmentation,
    SyntheticSet,
    characteristic_function_discrepancy,
    images_per_tile,
    objectives,
    untrained_net,
    vectorised_constants,
)
from lightning_plugins.models import convnet3

CLASSES = 3


def make_net() -> nn.Module:
    net = untrained_net(lambda: convnet3(num_classes=CLASSES, in_channels=3, image_size=8, width=8), seed=0)
    return net.double().requires_grad_(False)


def data(synthetic_per_class: int = 4) -> tuple[RealBatch, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(CLASSES, 10, 3, 8, 8, generator=generator, dtype=torch.float64)
    synthetic = torch.randn(CLASSES, synthetic_per_class, 3, 8, 8, generator=generator, dtype=torch.float64)
    return RealBatch.of(real), synthetic.requires_grad_()


OBJECTIVES = {
    "cf": lambda **a: CharacteristicFunction(FrequencySampler(32), alpha=0.7, beta=0.3, **a),
    "dm": lambda **a: DistributionMatching(**a),
    "cosine": lambda **a: GradientMatching(**a),
    "vmap": lambda **a: GradientMatching(vectorised=True, **a),
    "l1": lambda **a: GradientMatching("l1", **a),
    "mse": lambda **a: GradientMatching("mse", vectorised=True, **a),
}


def expected(name: str, net: nn.Module, real: Tensor, synthetic: Tensor, label: int, t: Tensor | None) -> Tensor:
    """One class as the papers' code has it."""
    if name == "cf":
        return 300 * characteristic_function_discrepancy(
            net.features(real), net.features(synthetic), t, alpha=0.7, beta=0.3
        )
    if name == "dm":
        return (net.features(real).mean(0) - net.features(synthetic).mean(0)).square().sum()
    net.requires_grad_(True)
    sides = []
    for images in (real, synthetic):
        loss = F.cross_entropy(net(images), torch.full((len(images),), label))
        sides.append(torch.autograd.grad(loss, list(net.parameters()), create_graph=True))
    net.requires_grad_(False)
    total = 0
    for target, found in zip(*sides, strict=True):
        if name == "l1":
            total = total + (target - found).abs().sum() * (target.ndim == 4)
        elif name == "mse":
            total = total + (target - found).square().sum() * (target.ndim == 4)
        elif target.ndim > 1:
            rows = F.cosine_similarity(target.flatten(1).detach(), found.flatten(1))
            total = total + (1 - rows).sum()
    return total


@pytest.mark.parametrize("tile_size", [3, 10, 25, None])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_the_loop_over_the_classes(name, tile_size):
    net = make_net()
    real, synthetic = data()
    objective = OBJECTIVES[name](tile_size=tile_size)
    draw = objective.draw(net, CLASSES)
    if draw.frequencies is not None:
        draw = replace(draw, frequencies=draw.frequencies.double())
    result = objective.loss(net, real, synthetic, draw=draw)
    (gradient,) = torch.autograd.grad(result.total, synthetic)
    images = real.images()
    wanted = torch.stack([expected(name, net, images[c], synthetic[c], c, draw.frequencies) for c in range(CLASSES)])
    # 1e-6 in the denominator of the cosine, where the gradients are small
    tolerance = {"rtol": 2e-3, "atol": 1e-2} if name in ("cosine", "vmap") else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(result.per_class, wanted, check_dtype=False, **tolerance)
    (slow,) = torch.autograd.grad(wanted.sum(), synthetic)
    assert F.cosine_similarity(gradient.flatten(), slow.flatten(), dim=0) > 0.999
    if name not in ("cosine", "vmap"):
        torch.testing.assert_close(gradient, slow, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_groups_of_classes_with_one_draw_are_all_classes(name):
    net = make_net().float()
    real, synthetic = data()
    real, synthetic = RealBatch.of(real.images().float()), synthetic.detach().float().requires_grad_()
    objective = OBJECTIVES[name](
        augmentation=SiameseAugmentation(("color", "crop", "flip"), scope="class"), flip=FlipUnion("both")
    )
    draw = objective.draw(net, CLASSES)
    together = objective.loss(net, real, synthetic, draw=draw).per_class
    parts = [
        objective.loss(net, real.select(start, stop), synthetic[start:stop], draw=draw).per_class
        for start, stop in ((0, 1), (1, 3))
    ]
    torch.testing.assert_close(torch.cat(parts), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_images_have_no_loss_and_a_finite_gradient(name):
    net = make_net().float()
    images = torch.randn(CLASSES, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    synthetic = images.clone().requires_grad_()
    objective = OBJECTIVES[name](augmentation=SiameseAugmentation(), flip=FlipUnion("both"))
    result = objective.loss(net, RealBatch.of(images), synthetic)
    result.total.backward()
    assert torch.isfinite(synthetic.grad).all()
    assert result.total < (0.2 if name in ("cosine", "vmap") else 1e-2)


@pytest.mark.parametrize("name", ["cf", "dm", "cosine"])
def test_the_union_of_the_synthetic_side_is_a_doubled_batch(name):
    net = make_net().float()
    real, synthetic = data()
    real, synthetic = RealBatch.of(real.images().float()), synthetic.detach().float()
    united = torch.cat([synthetic, synthetic.flip(-1)], 1)
    plain, flipping = OBJECTIVES[name](), OBJECTIVES[name](flip=FlipUnion("synthetic"))
    draw = plain.draw(net, CLASSES)
    torch.testing.assert_close(
        flipping.loss(net, real, synthetic, draw=draw).per_class, plain.loss(net, real, united, draw=draw).per_class
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_network_in_training_is_left_alone(name):
    net = make_net().float().requires_grad_(True)
    real, synthetic = data()
    synthetic = synthetic.detach().float().requires_grad_()
    OBJECTIVES[name]().loss(net, RealBatch.of(real.images().float()), synthetic, details=True).total.backward()
    assert all(value.grad is None and value.requires_grad for value in net.parameters())
    assert synthetic.grad.abs().sum() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_the_images_lowers_the_loss(name):
    net = make_net().float()
    real, synthetic = data()
    real, synthetic = RealBatch.of(real.images().float()), synthetic.detach().float().requires_grad_()
    objective = OBJECTIVES[name]()
    draw = objective.draw(net, CLASSES)
    optimizer = torch.optim.Adam([synthetic], lr=0.02)
    values = []
    for _ in range(8):
        loss = objective.loss(net, real, synthetic, draw=draw).total
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.97 * values[0]


def test_the_sampling_network_gets_the_gradient_of_both_sides():
    torch.manual_seed(0)
    net = make_net().float()
    real, synthetic = data()
    real, synthetic = RealBatch.of(real.images().float()), synthetic.detach().float()
    network = SamplingNetwork(8, rank=4)
    objective = CharacteristicFunction(FrequencySampler(32, network=network), tile_size=4)
    draw = objective.draw(net, CLASSES)
    objective.loss(net, real, synthetic, draw=draw).total.backward(retain_graph=True)
    found = [value.grad.clone() for value in network.parameters()]
    network.zero_grad()
    images = real.images()
    sum(
        300 * characteristic_function_discrepancy(net.features(images[c]), net.features(synthetic[c]), draw.frequencies)
        for c in range(CLASSES)
    ).backward()
    for gradient, value in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, value.grad, rtol=1e-3, atol=1e-3)


def test_quantities_for_the_log():
    net = make_net().float()
    real, synthetic = data()
    real = RealBatch.of(real.images().float())
    for name, make in OBJECTIVES.items():
        result = make().loss(net, real, synthetic.float(), details=True)
        assert result.quantities, name
        assert all(value.ndim == 0 and not value.requires_grad for value in result.quantities.values())
    share = OBJECTIVES["cf"]().loss(net, real, synthetic.float(), details=True).quantities["amplitude_share"]
    assert 0 <= share <= 1


def test_the_calibration_term_is_the_cross_entropy_of_each_class():
    net = make_net()
    synthetic = data()[1]
    result = CalibrationTerm(2.0).loss(net, synthetic)
    wanted = [2 * F.cross_entropy(net(images), torch.full((4,), label)) for label, images in enumerate(synthetic)]
    torch.testing.assert_close(result.per_class, torch.stack(wanted))
    part = CalibrationTerm(2.0, flip=FlipUnion("off")).loss(net, synthetic[1:], classes=range(1, 3))
    torch.testing.assert_close(part.per_class, result.per_class[1:])


def test_draws_resume():
    net = make_net()
    first = CharacteristicFunction(FrequencySampler(8), augmentation=SiameseAugmentation(seed=4))
    first.draw(net, CLASSES)
    state = first.state_dict()
    following = first.draw(net, CLASSES)
    second = CharacteristicFunction(FrequencySampler(8), augmentation=SiameseAugmentation())
    second.load_state_dict(state)
    again = second.draw(net, CLASSES)
    assert torch.equal(again.frequencies, following.frequencies)
    assert again.augmentation == following.augmentation


def test_the_largest_output_decides_the_tile():
    net = convnet3(num_classes=10, in_channels=1)
    modes = [module.training for module in net.modules()]
    assert images_per_tile(net, (1, 28, 28), "cpu") == 64
    assert images_per_tile(convnet3(width=32), (3, 32, 32), "cpu") == 256
    assert modes == [module.training for module in net.modules()]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_more_real_images_than_a_tile_are_in_the_network(name):
    net, seen = make_net(), []
    net.features[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    real, synthetic = data(synthetic_per_class=1)
    OBJECTIVES[name](tile_size=4).loss(net, real, synthetic)
    assert max(seen) <= 4


@pytest.mark.parametrize("tile_size", [3, 10])
def test_projections_of_a_few_rows_at_a_time_are_those_of_all(monkeypatch, tile_size):
    net = make_net()
    real, synthetic = data()
    objective = OBJECTIVES["cf"](tile_size=tile_size)
    draw = objective.draw(net, CLASSES)
    wanted = objective.loss(net, real, synthetic, draw=draw).per_class
    rows = []
    monkeypatch.setattr(objectives, "tile_bytes", lambda device: 8 * 4 * 32)
    original = objectives.characteristic_sums

    def watched(features: Tensor, frequencies: Tensor) -> Tensor:
        rows.append(features[..., 0].numel())
        return original(features, frequencies)

    monkeypatch.setattr(objectives, "characteristic_sums", watched)
    found = objective.loss(net, real, synthetic, draw=draw).per_class
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert max(rows[:-1]) <= max(8, tile_size)
    assert sum(rows[:-1]) == 30
    assert len(rows) >= 4


class Operations(TorchDispatchMode):
    """Counts what is more than a view."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_an_iteration_takes_few_operations_however_many_classes():
    counts = []
    for classes in (10, 20):
        labels = torch.arange(classes).repeat(6)
        reals = ClassPool(torch.rand(len(labels), 3, 8, 8), labels)
        distilled = SyntheticSet.initialised("mix", reals, 1, rho=2)

        def factory(classes=classes):
            return convnet3(num_classes=classes, image_size=8, width=4)

        bank = ExtractorBank.train(factory, reals, num_pairs=2, epochs=0)
        objective = CharacteristicFunction(FrequencySampler(16), augmentation=SiameseAugmentation())
        term = CalibrationTerm(augmentation=SiameseAugmentation())
        optimizer = torch.optim.AdamW(
            distilled.parameters(), **vectorised_constants("adamw", classes, learning_rate=1e-3)
        )
        for _ in range(2):  # the first measures the tile and fills the optimizer's state
            with Operations() as operations:
                distilled.clamp_()
                bank.sample_()
                optimizer.zero_grad()
                synthetic = distilled.normalise(distilled.decode())
                objective.loss(bank.net, reals.draw(4), synthetic).total.backward()
                optimizer.step()
                bank.load_trained_()
                optimizer.zero_grad()
                term.loss(bank.net, distilled.normalise(distilled.decode())).total.backward()
                optimizer.step()
        counts.append(operations.count)
    assert counts[0] <= 300
    assert counts[1] <= counts[0] + 12  # which operation was drawn


REAL, SYNTHETIC = RealBatch.of(torch.rand(2, 3, 3, 8, 8)), torch.rand(3, 1, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DistributionMatching(tile_size=0), "tile_size must be at least 1"),
        (lambda: DistributionMatching().loss(make_net(), REAL, SYNTHETIC), "one row for each class"),
        (lambda: GradientMatching("cos"), "'cosine', 'l1' or 'mse', got 'cos'"),
        (lambda: GradientMatching("l1").loss(nn.Linear(2, 2), REAL, SYNTHETIC[:2]), "has no weights .*try 'cosine'"),
        (lambda: CharacteristicFunction(factor=0.0), "factor above 0"),
        (
            lambda: CharacteristicFunction().loss(
                make_net(), REAL, SYNTHETIC[:2], draw=DistributionMatching().draw(make_net(), 2)
            ),
            "take it from this objective's draw",
        ),
        (lambda: CalibrationTerm(-1.0), "weight must be at least 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
