"""Boundary tilting and level sets: what a network's boundary looks like from the data."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from lightning_plugins.robustness.boundary_tilting import (
    BoundaryTilting,
    adversarial_strength,
    deviation_angle,
    input_jacobian,
    tilting_type,
)
from lightning_plugins.robustness.level_sets import level_set_traversal, triangle_confidences


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_net(num_inputs: int = 6, num_classes: int = 3, seed: int = 0) -> nn.Module:
    g = generator(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, 16), nn.Tanh(), nn.Linear(16, num_classes)).double()
    for parameter in net.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    return net


def test_strength_of_a_boundary_half_way_is_one_over_the_cosine():
    g = generator()
    weight, positive, negative = torch.randn(3, 10, 7, generator=g, dtype=torch.float64)
    weight = weight * (weight * (positive - negative)).sum(1, keepdim=True).sign()
    bias = -(weight * (positive + negative)).sum(1) / 2
    strength = adversarial_strength(weight, bias, positive, negative)
    expected = 1 / deviation_angle(weight, positive, negative).deg2rad().cos()
    torch.testing.assert_close(strength, expected[:, None].expand(-1, 2))


def test_strength_with_an_offset_is_measured():
    # Means at 1 and -1, boundary at 0.5: the bisector is 1 away from both, the boundary 0.5 and 1.5.
    one = torch.tensor([1.0])
    torch.testing.assert_close(adversarial_strength(2 * one, -1.0, one, -one), torch.tensor([2.0, 2 / 3]).double())
    assert adversarial_strength(one, -2.0, one, -one)[0] == -1  # the positive mean is misclassified
    assert adversarial_strength(one, -1.0, one, -one)[0] == math.inf


def test_angles_that_the_arc_cosine_would_round():
    z = torch.tensor([1.0, 0.0], dtype=torch.float64)
    tiny = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    torch.testing.assert_close(
        deviation_angle(tiny, z, -z), torch.tensor(math.degrees(1e-9)).double(), rtol=1e-6, atol=0
    )
    assert deviation_angle(-z, z, -z) == 180
    assert deviation_angle(0 * z, z, -z).isnan()


def test_regularisation_turns_logistic_regression_toward_the_means():
    g = generator()
    labels = torch.arange(200) % 2
    spread = torch.tensor([1.0, 0.05, 0.05], dtype=torch.float64)
    difference = torch.tensor([1.0, 0.03, -0.02], dtype=torch.float64)
    inputs = torch.randn(200, 3, generator=g, dtype=torch.float64) * spread + (labels[:, None] - 0.5) * difference
    means = inputs[labels == 1].mean(0), inputs[labels == 0].mean(0)
    angles, types = [], []
    for c in (1e4, 1.0, 1e-1, 1e-2, 1e-3, 1e-6):
        model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(inputs.numpy(), labels.numpy())
        angles.append(float(deviation_angle(torch.from_numpy(model.coef_[0]), *means)))
        types.append(int(tilting_type(torch.tensor(angles[-1]), torch.tensor(0.1))))
    assert all(a > b for a, b in zip(angles[:-1], angles[1:], strict=True)), angles
    assert angles[0] > 75, angles
    assert angles[-1] < 0.01, angles
    assert types[0] == 2
    assert types[-1] == 0
    assert 1 in types


def test_tilting_of_linear_classifiers_equals_the_closed_form():
    g = generator()
    weight, bias = torch.randn(4, 6, generator=g, dtype=torch.float64), torch.randn(4, generator=g, dtype=torch.float64)
    target = torch.arange(41) % 4  # unequal counts
    inputs = torch.randn(41, 6, generator=g, dtype=torch.float64) + 2 * F.one_hot(target, 6)

    def logits_fn(x):
        return x.flatten(1) @ weight.T + bias

    matrices, mean = BoundaryTilting(4, 6, reduction="none"), BoundaryTilting(4, 6)
    for rows in torch.arange(41).split(13):
        batch = inputs[rows].view(-1, 2, 3)
        for metric in (matrices, mean):
            metric.update(batch, *input_jacobian(logits_fn, batch), target[rows])
    result = matrices.compute()
    assert all(value.diagonal().isnan().all() for value in result.values())
    logits, near, far = logits_fn(inputs), 0.0, 0.0
    for a in range(4):
        for b in set(range(4)) - {a}:
            w, o = weight[a] - weight[b], bias[a] - bias[b]
            means = [inputs[target == k].mean(0) for k in (a, b)]
            torch.testing.assert_close(result["angle"][a, b], deviation_angle(w, *means).float())
            strength = adversarial_strength(w, o, *means)[0]
            torch.testing.assert_close(result["strength"][a, b], strength.float())
            wrong = (logits[target == a, a] <= logits[target == a, b]).float().mean()
            torch.testing.assert_close(result["error"][a, b], wrong)
            half = (means[0] - means[1]).norm() / 2
            near, far = near + half / strength, far + half
    torch.testing.assert_close(mean.compute()["strength"], (far / near).float())
    torch.testing.assert_close(mean.compute()["angle"], result["angle"].nanmean())
    kinds = matrices.types()
    expected = tilting_type(result["angle"], (result["error"] + result["error"].T) / 2)
    assert torch.equal(kinds, expected)
    assert (kinds.diagonal() == -1).all()


def test_tilting_of_a_network_equals_a_loop():
    net, g = a_net(), generator(1)
    inputs, target = torch.randn(12, 6, generator=g, dtype=torch.float64), torch.arange(12) % 3
    logits, jacobian = input_jacobian(net, inputs)
    metric = BoundaryTilting(3, 6, reduction="none")
    metric.update(inputs, logits, jacobian, target)
    angle = metric.compute()["angle"]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        sides = []
        for k in (a, b):
            x = inputs[target == k].requires_grad_()
            (gradient,) = torch.autograd.grad((net(x)[:, a] - net(x)[:, b]).sum(), x)
            sides.append(gradient.mean(0))
        means = inputs[target == a].mean(0), inputs[target == b].mean(0)
        torch.testing.assert_close(angle[a, b], deviation_angle(sides[0] + sides[1], *means).float())
        assert angle[a, b] == angle[b, a]


def test_tilting_merges_and_leaves_out_missing_classes():
    net, g = a_net(), generator(1)
    inputs, target = torch.randn(12, 6, generator=g, dtype=torch.float64), torch.arange(12) % 2
    whole, parts = BoundaryTilting(3, 6), [BoundaryTilting(3, 6) for _ in range(2)]
    whole.update(inputs, *input_jacobian(net, inputs), target)
    for part, rows in zip(parts, (slice(0, 5), slice(5, 12)), strict=True):
        part.update(inputs[rows], *input_jacobian(net, inputs[rows]), target[rows])
    parts[0].merge_state(parts[1])
    for metric in (whole, parts[0]):
        with pytest.warns(UserWarning, match=r"classes without samples: \[2\]"):
            values = metric.compute()
        assert all(value.isfinite() for value in values.values())
    torch.testing.assert_close(whole.compute(), parts[0].compute())
    logits = net(inputs)
    others = torch.where(target == 0, logits[:, 1], logits[:, 0])
    error = (others >= logits.gather(1, target[:, None])[:, 0]).float().mean()
    torch.testing.assert_close(whole.compute()["error"], error)


def test_pairs_that_the_network_does_not_tell_apart_are_left_out_of_the_mean():
    weight = torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.0, 0.0]])
    target, g = torch.arange(30) % 3, generator()
    inputs = torch.randn(30, 2, generator=g) + torch.tensor([[4.0, 0.0], [-4.0, 1.0], [-4.0, -1.0]])[target]
    values = {}
    for reduction in ("mean", "none"):
        metric = BoundaryTilting(3, 2, reduction=reduction)
        metric.update(inputs, *input_jacobian(lambda x: x @ weight.T, inputs), target)
        values[reduction] = metric.compute()
    angle, strength = values["none"]["angle"], values["none"]["strength"]
    assert angle[1, 2].isnan()
    assert strength[1, 2].isnan()
    means = torch.stack([inputs[target == k].mean(0) for k in range(3)])
    bisectors = (means[:, None] - means).norm(dim=2) / 2
    boundaries = (bisectors / strength)[strength.isfinite()]
    expected = bisectors[strength.isfinite()].sum() / boundaries.sum()
    torch.testing.assert_close(values["mean"]["strength"], expected)
    torch.testing.assert_close(values["mean"]["angle"], angle[0, 1:].mean())
    assert metric.types()[1, 2] == -1


def test_types_by_angle_and_error():
    angles = torch.tensor([29.0, 30.0, 74.0, 75.0, 90.0, 75.0, 29.0, 50.0, math.nan])
    errors = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.25, 0.26, 0.9, 0.9, 0.0])
    assert tilting_type(angles, errors).tolist() == [0, 1, 1, 2, 2, -1, 0, 1, -1]


def test_jacobian_equals_functional_jacobian_in_inference_mode():
    net = a_net().train()
    with torch.inference_mode():
        inputs = torch.randn(3, 2, 3, generator=generator(), dtype=torch.float64)
        logits, jacobian = input_jacobian(net, inputs)
    reference = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(inputs.clone())
    torch.testing.assert_close(jacobian, reference)
    torch.testing.assert_close(logits, net(inputs.clone()))
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: BoundaryTilting(1, 3), "num_classes must be at least 2"),
        (lambda: BoundaryTilting(2, 0), "num_features must be at least 1"),
        (lambda: BoundaryTilting(2, 3, reduction="sum"), "'mean' or 'none'"),
        (lambda: an_update(target=torch.tensor([0, 2])), r"\[0, 2\); leave out"),
        (lambda: an_update(target=torch.tensor([0.0, 1.0])), "integer classes"),
        (lambda: an_update(inputs=torch.zeros(2, 4)), r"inputs must be floating-point \(2, 3\)"),
        (lambda: an_update(jacobian=torch.zeros(2, 3, 3)), "jacobian must be"),
        (lambda: an_update(logits=torch.full((2, 2), math.nan)), "look at the model"),
        (lambda: tilting_type(torch.zeros(2), torch.zeros(3)), "one shape"),
        (lambda: tilting_type(torch.zeros(2), torch.zeros(2), weak=80.0), "weak <= strong"),
        (lambda: tilting_type(torch.zeros(2), torch.zeros(2), max_error=2.0), "max_error"),
        (lambda: deviation_angle(torch.ones(2), torch.ones(3), torch.ones(3)), "positive_mean must be"),
        (lambda: input_jacobian(lambda x: x.detach(), torch.ones(1, 2)), "remove detach"),
        (lambda: input_jacobian(lambda x: x, torch.ones(1, 2).long()), "floating-point"),
    ],
)
def test_tilting_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def an_update(**changes):
    arguments = {"inputs": torch.ones(2, 3), "logits": torch.zeros(2, 2), "jacobian": torch.zeros(2, 2, 3)}
    BoundaryTilting(2, 3).update(**(arguments | {"target": torch.tensor([0, 1])} | changes))


def walk_by_the_paper(net, source, target, classes, num_steps, step_size, threshold, s, start):
    """Walk one image after the other, with two passes per step and the gradient of the cross-entropy itself."""
    ends, confidences, accepted = [], [], []
    for x_s, x_t, c, x in zip(source, target, classes, start, strict=True):
        p0 = net(x_s[None]).softmax(1)[0, c]
        kept, count, a = [p0.item()], 0, torch.zeros_like(x)
        for _ in range(num_steps):
            leaf = x.clone().requires_grad_()
            (j,) = torch.autograd.grad(F.cross_entropy(net(leaf[None]), c[None]), leaf)
            v = x_t - x
            v_perp = v - (j * v).sum() / (j * j).sum() * j
            a = (a + s / 2 * j).clamp(-s, s)
            moved = (x + step_size * v_perp - a).clamp(0, 1)
            if p0 - net(moved[None]).softmax(1)[0, c] < threshold:
                x, count = moved, count + 1
            kept.append(net(x[None]).softmax(1)[0, c].item())
        ends.append(x)
        confidences.append(kept)
        accepted.append(count)
    return torch.stack(ends), torch.tensor(confidences).double().T, torch.tensor(accepted)


def test_walk_equals_a_loop_over_images():
    net, g = a_net(), generator(2)
    source, target = torch.rand(2, 5, 2, 3, generator=g, dtype=torch.float64)
    classes = net(source).argmax(1)
    path = level_set_traversal(net, source, target, num_steps=30, step_size=0.5, threshold=0.003, jitter=0.0)
    ends, confidences, accepted = walk_by_the_paper(net, source, target, classes, 30, 0.5, 0.003, 1 / 255, source)
    torch.testing.assert_close(path.images, ends)
    torch.testing.assert_close(path.confidences, confidences, atol=1e-6, rtol=0)
    assert torch.equal(path.num_accepted, accepted)
    assert torch.equal(path.classes, classes)
    assert accepted.sum() > 0, "the test should see steps taken"
    assert (accepted < 30).any(), "and refused"
    torch.testing.assert_close(path.l2, (path.images - target).flatten(1).norm(dim=1))
    torch.testing.assert_close(path.linf, (path.images - target).flatten(1).abs().amax(1))


def test_walk_of_a_linear_softmax_keeps_the_margin_and_closes_the_rest_at_a_known_rate():
    g = generator()
    weight = torch.randn(2, 8, generator=g, dtype=torch.float64)
    source, target = torch.randn(2, 4, 8, generator=g, dtype=torch.float64)
    calls = []

    def logits_fn(x):
        calls.append(len(x))
        return x @ weight.T

    path = level_set_traversal(
        logits_fn, source, target, num_steps=20, step_size=0.1, counter_step=0.0, jitter=0.0, bounds=None
    )
    normal = F.normalize(weight[0] - weight[1], dim=0)
    torch.testing.assert_close(path.images @ normal, source @ normal)
    flat = torch.eye(8).double() - normal[:, None] * normal
    torch.testing.assert_close((path.images - target) @ flat, 0.9**20 * (source - target) @ flat)
    torch.testing.assert_close(path.confidences, path.confidences[:1].expand(21, -1))
    assert len(calls) == 22  # the class, the source, and each step


def test_walk_of_a_constant_network_reaches_the_target():
    source, target = torch.zeros(3, 4), torch.ones(1, 4)
    path = level_set_traversal(lambda x: 0 * x[:, :2], source, target, num_steps=10, jitter=0.0)
    torch.testing.assert_close(path.images, torch.full((3, 4), 1 - 0.95**10))


def test_walk_keeps_its_promises():
    net, g = a_net().float(), generator(3)
    source, target = torch.rand(2, 20, 6, generator=g)
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        path = level_set_traversal(net, source, target, threshold=0.1, num_steps=50)
    assert (path.confidences[0] - path.confidences < 0.1).all()
    assert (path.images >= 0).all()
    assert (path.images <= 1).all()
    confidence = net(path.images.clone()).softmax(1).gather(1, path.classes.clone()[:, None])[:, 0]
    torch.testing.assert_close(path.confidences[-1].clone(), confidence)
    assert torch.equal(state, torch.random.get_rng_state())
    other = level_set_traversal(net, source, target, threshold=0.1, num_steps=50, generator=generator(9))
    assert not torch.equal(other.images, path.images)
    plain = level_set_traversal(net, source, target, threshold=0.1, num_steps=50, jitter=0.0, counter_step=0.0)
    assert (plain.l2 <= (source - target).norm(dim=1)).all()


def test_walk_sees_the_direction_of_a_saturated_network():
    # The softmax is 1 to the last bit: the gradient of the cross-entropy is 0, that of the log-odds is not.
    def logits_fn(x):
        return 200 * torch.stack([x[:, 0], 0 * x[:, 0]], 1)

    source, target = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    path = level_set_traversal(logits_fn, source, target, num_steps=100, counter_step=0.0, jitter=0.0)
    torch.testing.assert_close(path.images, torch.tensor([[1.0, 1 - 0.95**100]]))


def test_the_counter_step_holds_against_curvature():
    # The level sets are circles: straight steps leave them outward, and are refused in the end.
    def logits_fn(x):
        return torch.stack([2 - 2 * x.square().sum(1), 0 * x[:, 0]], 1)

    source, target = torch.tensor([[0.8, 0.0]]), torch.tensor([[0.0, 0.8]])
    straight, held = (
        level_set_traversal(
            logits_fn, source, target, step_size=0.1, threshold=0.02, counter_step=step, jitter=0.0, bounds=None
        )
        for step in (0.0, 0.001)
    )
    assert straight.num_accepted < 20
    assert held.num_accepted == 100
    assert held.l2 < straight.l2 / 2


def test_triangle_of_a_known_confidence():
    g = generator()
    corners = torch.rand(3, 4, 5, generator=g, dtype=torch.float64)

    def logits_fn(x):
        return torch.stack([x[:, 0] / (1 - x[:, 0]), torch.ones_like(x[:, 0])], 1).log()  # confidence x_0

    classes = torch.zeros(4, dtype=torch.long)
    triangle = triangle_confidences(logits_fn, *corners, classes=classes)
    assert triangle.weights.shape == (66, 3)
    assert triangle.edges.shape == (4, 3, 11)
    torch.testing.assert_close(triangle.weights.sum(1), torch.ones(66).double())
    assert triangle.weights[[0, 1, -1]].tolist() == [[1, 0, 0], [0.9, 0.1, 0], [0, 0, 1]]
    torch.testing.assert_close(triangle.confidences, (triangle.weights @ corners[:, :, 0]).T)
    torch.testing.assert_close(triangle.mean, corners[:, :, 0].mean(0))  # a linear function's mean is the centre's
    shares = torch.linspace(0, 1, 11).double()
    for edge, (i, j) in enumerate(((0, 1), (0, 2), (1, 2))):
        expected = torch.lerp(corners[i, :, :1], corners[j, :, :1], shares)
        torch.testing.assert_close(triangle.edges[:, edge], expected)
    loss = 0.1
    expected = (triangle.confidences >= corners[0, :, :1] - loss).float().mean(1)
    torch.testing.assert_close(triangle.share_within(loss), expected)
    flat = triangle_confidences(lambda x: 0 * x[:, :2], *corners, classes=classes)
    assert (flat.share_within(0.0) == 1).all()
    assert (flat.confidences == 0.5).all()


ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: level_set_traversal(lambda x: x, ZEROS, torch.zeros(2, 4)), "target must be"),
        (lambda: level_set_traversal(lambda x: x, ZEROS.long(), ZEROS), "source must be floating-point"),
        (lambda: level_set_traversal(lambda x: x, ZEROS, ZEROS, num_steps=0), "num_steps"),
        (lambda: level_set_traversal(lambda x: x, ZEROS, ZEROS, step_size=0.0), r"\(0, 1\]"),
        (lambda: level_set_traversal(lambda x: x, ZEROS, ZEROS, threshold=0.0), "above 0"),
        (lambda: level_set_traversal(lambda x: x, ZEROS, ZEROS, jitter=-1.0), "at least 0"),
        (lambda: level_set_traversal(lambda x: x, ZEROS, ZEROS, bounds=(1.0, 0.0)), "lower < upper"),
        (lambda: level_set_traversal(lambda x: x, ZEROS, ZEROS, classes=torch.tensor([0, 3])), "classes must lie"),
        (lambda: level_set_traversal(lambda x: x.detach(), ZEROS, ZEROS), "remove detach"),
        (lambda: level_set_traversal(lambda x: x[:, :1], ZEROS, ZEROS), r"function of \(o, 0\)"),
        (lambda: triangle_confidences(lambda x: x, ZEROS, ZEROS, torch.zeros(1, 3)), "second must be"),
        (lambda: triangle_confidences(lambda x: x, ZEROS, ZEROS, ZEROS, num_points=1), "num_points"),
    ],
)
def test_level_sets_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()
