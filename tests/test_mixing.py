"""Mixed samples and labels: identities, slow references, and labels that pass for integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_plugins.losses import FocalLoss, focal_loss
from lightning_plugins.mixing import (
    CutMix,
    FMix,
    ForegroundRecombine,
    MixedLabels,
    Mixup,
    cutmix,
    fmix,
    fmix_mask,
    mixed_accuracy,
    mixup,
    takes_mixed_labels,
)

N, C = 12, 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    shape = shape or (3, 6, 5)
    return torch.rand(N, *shape, generator=seeded(), dtype=dtype), torch.randint(C, (N,), generator=seeded(1))


def logits() -> torch.Tensor:
    return torch.randn(N, C, generator=seeded(2), dtype=torch.float64).requires_grad_()


def parts(**arguments) -> MixedLabels:
    """Mixed labels of a batch whose labels are its positions, so that its components are the permutations."""
    return mixup(torch.zeros(N, 1), torch.arange(N), num_classes=None, generator=seeded(3), **arguments)[1]


# --- mixup --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [2, 3, 5])
@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_is_the_weighted_mean(points, per_sample):
    inputs, targets = batch()
    arguments = {"num_points": points, "per_sample": per_sample}
    mixed, soft = mixup(inputs, targets, num_classes=C, generator=seeded(3), **arguments)
    labels = parts(**arguments)
    orders, shares = labels.components, labels.shares.expand(N, points).T if not per_sample else labels.shares
    for i in range(N):
        expected = sum(shares[k, i] * inputs[orders[k, i]] for k in range(points))
        torch.testing.assert_close(mixed[i], expected)
        expected = sum(shares[k, i] * F.one_hot(targets[orders[k, i]], C) for k in range(points))
        torch.testing.assert_close(soft[i], expected)
    assert torch.equal(orders[0], torch.arange(N))
    assert all(torch.equal(order.sort().values, torch.arange(N)) for order in orders)
    torch.testing.assert_close(soft.sum(1), torch.ones(N))


def test_two_points_are_mixup_in_its_usual_form():
    inputs, targets = batch()
    mixed, soft = mixup(inputs, targets, num_classes=C, generator=seeded(3))
    labels = parts()
    lam, order = labels.shares[0], labels.components[1]
    torch.testing.assert_close(mixed, lam * inputs + (1 - lam) * inputs[order])
    values = logits()
    two_terms = lam * F.cross_entropy(values, targets) + (1 - lam) * F.cross_entropy(values, targets[order])
    torch.testing.assert_close(F.cross_entropy(values, soft.double()), two_terms, rtol=1e-6, atol=1e-6)


def test_a_share_of_one_is_the_identity(monkeypatch):
    inputs, targets = batch()
    monkeypatch.setattr("lightning_plugins.mixing._dirichlet", lambda *_: torch.tensor([1.0, 0.0]))
    mixed, soft = mixup(inputs, targets, num_classes=C, generator=seeded())
    assert torch.equal(mixed, inputs)
    assert torch.equal(soft, F.one_hot(targets, C).float())
    mixed, soft = cutmix(inputs, targets, num_classes=C, generator=seeded())
    assert torch.equal(mixed, inputs)
    assert torch.equal(soft, F.one_hot(targets, C).float())


def test_shares_follow_the_beta_distribution():
    torch.manual_seed(0)
    labels = mixup(torch.zeros(4000, 1), torch.zeros(4000).long(), num_classes=None, alpha=0.5, per_sample=True)[1]
    lam = labels.shares[0]
    assert lam.mean().item() == pytest.approx(0.5, abs=0.02)
    assert lam.var().item() == pytest.approx(0.125, abs=0.008)  # 1 / (4 (2 alpha + 1))


@pytest.mark.parametrize("label_lambda", ["independent", 0.8, 0.3])
@pytest.mark.parametrize("per_sample", [False, True])
def test_labels_have_the_larger_share_where_their_input_has_it(label_lambda, per_sample):
    for seed in range(20):
        arguments = {"per_sample": per_sample, "generator": seeded(seed)}
        inputs, soft = torch.eye(6), torch.arange(6)
        mixed, soft = mixup(inputs, soft, num_classes=6, label_lambda=label_lambda, **arguments)
        assert torch.equal(mixed.argmax(1), soft.argmax(1))
        if not isinstance(label_lambda, str):
            larger = max(label_lambda, 1 - label_lambda)
            assert all(value == pytest.approx(larger) or value == 1 for value in soft.amax(1).tolist())


def test_without_the_guard_sides_differ():
    sides = set()
    for seed in range(20):
        mixed, soft = mixup(
            torch.eye(2), torch.arange(2), num_classes=2, label_lambda="independent", same_side=False,
            generator=seeded(seed),
        )  # fmt: skip
        sides.add(bool((mixed.argmax(1) == soft.argmax(1)).all()))
    assert sides == {True, False}


def test_soft_labels_can_be_mixed_again():
    inputs, targets = batch()
    soft = F.one_hot(targets, C).float()
    for arguments in ({}, {"per_sample": True}):
        hard = mixup(inputs, targets, num_classes=C, generator=seeded(), **arguments)
        again = mixup(inputs, soft, num_classes=C, generator=seeded(), **arguments)
        torch.testing.assert_close(hard, again)


# --- CutMix and FMix ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [cutmix, fmix])
@pytest.mark.parametrize("shape", [(3, 16), (1, 7, 9), (2, 4, 5, 6)])
def test_masks_take_each_place_from_one_of_two(function, shape):
    images = torch.arange(float(N)).view(-1, *[1] * len(shape)).expand(N, *shape)
    for seed in range(5):
        mixed, labels = function(images, torch.arange(N), num_classes=None, generator=seeded(seed))
        first, second = (labels.components[k].view(-1, *[1] * len(shape)) for k in (0, 1))
        own = mixed == first
        assert (own | (mixed == second)).all()
        assert torch.equal(own.any(1), own.all(1))  # channels share the mask
        other = first.flatten() != second.flatten()
        size = math.prod(shape[1:])
        assert (own[other].float().flatten(1).mean(1) - labels.shares[0]).abs().max() < (1.001 / size)


def test_a_cutmix_box_has_the_asked_volume_away_from_the_border(monkeypatch):
    monkeypatch.setattr("lightning_plugins.mixing._dirichlet", lambda *_: torch.tensor([0.75, 0.25]))

    class Middle:
        def random(self, n):
            return np.full(n, 0.5)

    monkeypatch.setattr("lightning_plugins.mixing._rng", lambda generator: Middle())
    _, labels = cutmix(torch.rand(4, 1, 8, 8), torch.arange(4), num_classes=None, generator=seeded())
    assert labels.shares.tolist() == [0.75, 0.25]


@settings(deadline=None, max_examples=60)
@given(
    lam=st.floats(0, 1),
    size=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    decay=st.floats(0, 5),
    seed=st.integers(0, 9),
)
def test_fmix_mask_is_binary_with_the_asked_mean(lam, size, decay, seed):
    mask = fmix_mask(size, lam, decay=decay, generator=seeded(seed))
    assert mask.shape == tuple(size)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert abs(mask.mean().item() - lam) <= 1 / mask.numel() + 1e-5
    assert torch.equal(mask, fmix_mask(size, lam, decay=decay, generator=seeded(seed)))


def test_fmix_mask_against_a_slow_reference():
    size, decay, lam = (5, 8), 3.0, 0.4
    mask = fmix_mask(size, lam, decay=decay, generator=seeded(7))
    noise = torch.randn(5, 5, dtype=torch.complex64, generator=seeded(7)).numpy()
    spectrum = np.zeros((5, 5), dtype=complex)
    for i, fy in enumerate(np.fft.fftfreq(5)):
        for j in range(5):
            spectrum[i, j] = noise[i, j] / max(math.hypot(fy, j / 8), 1 / 8) ** decay
    grey = np.fft.irfft2(spectrum, s=size)
    assert mask.sum() == 16  # 0.4 * 40, with nothing to round
    assert np.array_equal(mask.numpy() == 1, grey >= np.sort(grey.ravel())[-16])


def test_fmix_rounds_up_and_down():
    counts = {int(fmix_mask(10, 0.25, generator=seeded(seed)).sum()) for seed in range(20)}
    assert counts == {2, 3}


def test_fmix_masks_of_higher_decay_are_smoother():
    def low_frequency_share(decay):
        total = 0.0
        for seed in range(10):
            energy = torch.fft.fft2(fmix_mask((28, 28), 0.5, decay=decay, generator=seeded(seed)) - 0.5).abs().square()
            low = torch.fft.fftfreq(28).abs() < 0.1
            total += (energy[low][:, low].sum() / energy.sum()).item()
        return total / 10

    shares = [low_frequency_share(decay) for decay in (0.0, 1.0, 2.0, 3.0)]
    assert shares == sorted(shares)
    assert shares[-1] > 0.8
    assert shares[0] < 0.2


def test_fmix_soft_edge():
    mask = fmix_mask((20, 20), 0.5, max_soft=0.1, generator=seeded())
    edge = (mask > 0) & (mask < 1)
    assert 70 < edge.sum() <= 80
    assert mask.mean().item() == pytest.approx(0.5, abs=0.005)
    images, targets = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 9, 9), torch.arange(2)
    mixed, soft = fmix(images, targets, num_classes=2, max_soft=0.4, generator=seeded(1))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), soft[:, 1])


def test_fmix_at_the_ends_returns_one_of_the_two():
    assert fmix_mask((6, 7), 0.0, generator=seeded()).sum() == 0
    assert fmix_mask((6, 7), 1.0, generator=seeded()).sum() == 42


def test_fmix_loss_of_a_constant_predictor():
    inputs, targets = batch()
    _, labels = fmix(inputs, targets, num_classes=None, generator=seeded())
    constant = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(N, C)
    torch.testing.assert_close(
        F.cross_entropy(constant, labels), -(labels.soft(C) * constant).sum(1).mean(), rtol=1e-6, atol=1e-6
    )


def test_fmix_draws_a_mask_for_each_sample():
    images = torch.arange(float(N)).view(N, 1, 1, 1).expand(N, 1, 9, 9)
    mixed, labels = fmix(images, torch.arange(N), num_classes=None, per_sample=True, generator=seeded())
    assert labels.shares.shape == (2, N)
    other = labels.components[0] != labels.components[1]
    own = (mixed[:, 0] == images[:, 0])[other]
    assert len(own.flatten(1).unique(dim=0)) == len(own)


@pytest.mark.parametrize("function", [mixup, cutmix, fmix])
def test_seeds_decide_and_the_global_generator_is_left_alone(function):
    inputs, targets = batch()
    state = torch.get_rng_state()
    first, again, other = (function(inputs, targets, num_classes=C, generator=seeded(s)) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(4)
    one = function(inputs, targets, num_classes=C)
    torch.manual_seed(4)
    two = function(inputs, targets, num_classes=C)
    assert torch.equal(one[0], two[0])


@pytest.mark.parametrize("function", [mixup, cutmix, fmix])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_inputs_keep_their_type(function, dtype):
    inputs, targets = batch(dtype=torch.float32)
    mixed, soft = function(inputs.to(dtype), targets, num_classes=C, generator=seeded())
    assert mixed.dtype == dtype
    assert soft.dtype == torch.float32
    assert mixed.isfinite().all()


@pytest.mark.parametrize("module", [Mixup(C, alpha=0.3, num_points=3), CutMix(C, alpha=0.3), FMix(C, decay=2.0)])
def test_modules_do_what_the_functions_do(module):
    inputs, targets = batch()
    function = {Mixup: mixup, CutMix: cutmix, FMix: fmix}[type(module)]
    arguments = {Mixup: {"alpha": 0.3, "num_points": 3}, CutMix: {"alpha": 0.3}, FMix: {"decay": 2.0}}[type(module)]
    torch.manual_seed(1)
    expected = function(inputs, targets, num_classes=C, **arguments)
    torch.manual_seed(1)
    torch.testing.assert_close(module(inputs, targets), expected)


# --- Foregrounds --------------------------------------------------------------------------------------------------


def objects_on_grounds():
    """Each image: a bright square of its class's brightness on a ground of its own."""
    targets = torch.arange(8) % 3
    grounds = torch.linspace(0.0, 0.4, 8)
    images = grounds.view(8, 1, 1, 1).expand(8, 1, 8, 8).clone()
    images[:, :, 2:5, 2:5] = 0.6 + 0.1 * targets.view(8, 1, 1, 1)
    return images, targets, grounds


def bright(images):
    return (images > 0.5).float()


def test_foregrounds_get_the_ground_of_another_class():
    images, targets, grounds = objects_on_grounds()
    recombine = ForegroundRecombine(bright, p=1.0, degrees=0.0, scale=0.0, translate=0.0, generator=seeded())
    mixed, labels = recombine(images, targets)
    assert torch.equal(labels, targets)
    assert torch.equal(mixed[:, :, 2:5, 2:5], images[:, :, 2:5, 2:5])
    outside = mixed.masked_fill(bright(images) > 0, torch.nan)
    for i in range(8):
        value = outside[i].nanmean()
        donor = (grounds - value).abs().argmin()
        assert (grounds[donor] - value).abs() < 1e-6
        assert targets[donor] != targets[i]
        assert outside[i].nan_to_num(value.item()).max() == pytest.approx(value.item())  # no second object


def test_recombination_leaves_what_it_cannot_or_may_not_change():
    images, targets, _ = objects_on_grounds()
    assert torch.equal(ForegroundRecombine(bright, p=0.0)(images, targets)[0], images)
    same = torch.zeros(8, dtype=torch.long)
    assert torch.equal(ForegroundRecombine(bright, p=1.0)(images, same)[0], images)


def test_recombination_moves_the_foreground():
    images, targets, _ = objects_on_grounds()
    mixed, soft = ForegroundRecombine(bright, p=1.0, num_classes=3, generator=seeded())(images, targets)
    assert mixed.isfinite().all()
    assert not torch.equal(bright(mixed), bright(images))
    assert torch.equal(soft, F.one_hot(targets, 3).float())


# --- Labels that pass for integers --------------------------------------------------------------------------------


def mixed_labels(per_sample: bool = False) -> MixedLabels:
    targets = torch.randint(C, (N,), generator=seeded(1))
    inputs = torch.zeros(N, 1)
    return mixup(inputs, targets, num_classes=None, num_points=3, per_sample=per_sample, generator=seeded(5))[1]


LOSSES = {
    "cross-entropy": F.cross_entropy,
    "module": lambda o, y: nn.CrossEntropyLoss()(o, y),
    "positional": lambda o, y: F.cross_entropy(o, y, torch.tensor([1.0, 2.0, 3.0, 4.0]).double()),
    "keyword": lambda o, y: F.cross_entropy(input=o, target=y),
    "weighted": lambda o, y: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]).double())(o, y),
    "smoothed": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "summed": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "each": lambda o, y: F.cross_entropy(o, y, reduction="none"),
    "nll": lambda o, y: nn.NLLLoss()(o.log_softmax(1), y),
    "margin": lambda o, y: nn.MultiMarginLoss()(o, y),
    "focal": lambda o, y: FocalLoss(2.0)(o, y),
    "focal by keyword": lambda o, y: focal_loss(logits=o, target=y),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_losses_are_weighted_sums_over_the_labels(loss):
    values, labels = logits(), mixed_labels()
    expected = sum(share * loss(values, part) for share, part in zip(labels.shares, labels.components, strict=True))
    assert not labels.used
    found = loss(values, labels)
    assert labels.used
    assert not isinstance(found, MixedLabels)
    torch.testing.assert_close(found, expected, check_dtype=False)
    gradients = [torch.autograd.grad(value.sum(), values)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0, 4.0]).double()])
def test_shares_of_each_sample(reduction, weight):
    values, labels = logits(), mixed_labels(per_sample=True)
    each = [F.cross_entropy(values, part, weight, reduction="none") for part in labels.components]
    losses = (labels.shares * torch.stack(each)).sum(0)
    total = N if weight is None else (labels.shares * weight[labels.components]).sum()
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / total}[reduction]
    torch.testing.assert_close(F.cross_entropy(values, labels, weight, reduction=reduction), expected)
    if weight is None and reduction == "mean":
        torch.testing.assert_close(F.cross_entropy(values, labels.soft(C).double()), expected, rtol=1e-6, atol=1e-6)


def test_shares_follow_through_what_a_step_does_to_labels():
    values, labels = logits(), mixed_labels(per_sample=True)
    each = F.cross_entropy(values, labels, reduction="none")
    for same in (labels.long(), labels.to(torch.int64), labels.view(-1), labels.squeeze(), labels.detach().clone()):
        torch.testing.assert_close(F.cross_entropy(values, same, reduction="none"), each)
    chosen = torch.arange(N) % 2 == 0
    torch.testing.assert_close(F.cross_entropy(values[chosen], labels[chosen], reduction="none"), each[chosen])
    torch.testing.assert_close(F.cross_entropy(values[:5], labels[:5], reduction="none"), each[:5])
    uniform = mixed_labels()
    torch.testing.assert_close(
        F.cross_entropy(values[:5], uniform[:5], reduction="none"),
        F.cross_entropy(values, uniform, reduction="none")[:5],
    )
    fresh = mixed_labels()
    F.cross_entropy(values, fresh.long())
    assert fresh.used


def test_everything_else_sees_the_class_with_the_largest_share():
    components = torch.tensor([[0, 1, 2], [1, 1, 3], [1, 0, 2]])
    labels = MixedLabels(components, torch.tensor([0.4, 0.3, 0.3]))
    assert labels.tolist() == [1, 1, 2]  # shares of one class add up
    assert type(labels + 0) is torch.Tensor
    assert labels.dtype == torch.int64
    assert (labels == torch.tensor([1, 1, 2])).all()
    assert torch.eye(4)[labels].argmax(1).tolist() == [1, 1, 2]
    assert torch.cat([labels, labels]).tolist() == [1, 1, 2, 1, 1, 2]
    assert repr(labels) == "tensor([1, 1, 2])"
    metric = MulticlassAccuracy(4, average="micro")
    metric.update(F.one_hot(torch.tensor([1, 1, 3]), 4).float(), labels)
    assert metric.compute() == pytest.approx(2 / 3)
    assert not labels.used


def test_one_hot_is_soft():
    labels = mixed_labels(per_sample=True)
    soft = F.one_hot(labels, C)
    torch.testing.assert_close(soft.sum(1), torch.ones(N))
    expected = sum(s[:, None] * F.one_hot(c, C) for s, c in zip(labels.shares, labels.components, strict=True))
    torch.testing.assert_close(soft, expected)
    assert F.one_hot(labels).shape == (N, int(labels.components.max()) + 1)
    assert labels.used


def test_mixed_accuracy_counts_each_label_by_its_share():
    values, labels = logits().detach(), mixed_labels()
    predicted = values.argmax(1)
    accuracies = [(predicted == part).float().mean() for part in labels.components]
    expected = sum(share * accuracy for share, accuracy in zip(labels.shares, accuracies, strict=True))
    torch.testing.assert_close(mixed_accuracy(values, labels), expected)
    torch.testing.assert_close(mixed_accuracy(values, labels.soft(C)), expected)
    torch.testing.assert_close(mixed_accuracy(values, labels.components[0]), accuracies[0])


def test_a_loss_of_ones_own_joins_by_a_decorator():
    @takes_mixed_labels
    def own(logits, target, reduction="mean"):
        losses = 1 - logits.softmax(1).gather(1, target[:, None])[:, 0]
        return losses.mean() if reduction == "mean" else losses

    values, labels = logits(), mixed_labels(per_sample=True)
    expected = torch.stack([own(values, part, reduction="none") for part in labels.components])
    torch.testing.assert_close(own(values, labels), (labels.shares * expected).sum(0).mean())


def test_labels_cannot_be_changed_in_place():
    with pytest.raises(TypeError, match="work on a copy"):
        mixed_labels()[0] = 1
    with pytest.raises(TypeError, match="work on a copy"):
        mixed_labels().add_(1)


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"alpha": math.nan}, "alpha .*must be (above 0|a number)"),
        ({"num_points": 1}, "num_points must be an integer of at least 2"),
        ({"label_lambda": "other"}, "'same', 'independent' or a number"),
        ({"label_lambda": 1.5}, r"lie in \[0, 1\]"),
        ({"label_lambda": 0.7, "num_points": 3}, "take 'independent'"),
    ],
)
def test_mixup_refuses(arguments, words):
    inputs, targets = batch()
    with pytest.raises(ValueError, match=words):
        mixup(inputs, targets, num_classes=C, **arguments)
    with pytest.raises(ValueError, match=words):
        Mixup(C, **arguments)


def test_batches_that_cannot_be_mixed():
    inputs, targets = batch()
    with pytest.raises(TypeError, match="convert them"):
        mixup(inputs.long(), targets, num_classes=C)
    with pytest.raises(ValueError, match="one to three spatial dimensions"):
        fmix(inputs.flatten(1), targets, num_classes=C)
    with pytest.raises(ValueError, match="one to three spatial dimensions"):
        cutmix(inputs.flatten(1), targets, num_classes=C)
    with pytest.raises(ValueError, match=r"soft labels \(N, C\)"):
        mixup(inputs, targets[:-1], num_classes=C)
    with pytest.raises(ValueError, match="mixed already"):
        mixup(inputs, mixed_labels(), num_classes=C)
    with pytest.raises(ValueError, match="correct the data or num_classes"):
        mixup(inputs, targets + C, num_classes=C)
    with pytest.raises(ValueError, match="pass num_classes=C"):
        Mixup()(inputs, targets)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        FMix(1)
    with pytest.raises(ValueError, match="components must be integer labels"):
        MixedLabels(torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": (1, 2, 3, 4)}, "one to three lengths"),
        ({"size": 0}, "one to three lengths"),
        ({"lam": 1.1}, "lam must lie"),
        ({"decay": -1.0}, "decay must be at least 0"),
        ({"max_soft": 0.6}, "max_soft must lie"),
    ],
)
def test_fmix_mask_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        fmix_mask(**{"size": 4, "lam": 0.5, **arguments})


def test_recombination_refuses():
    images, targets, _ = objects_on_grounds()
    with pytest.raises(TypeError, match="mask_fn must be a function"):
        ForegroundRecombine(0.5)
    with pytest.raises(ValueError, match="p must lie"):
        ForegroundRecombine(bright, p=2.0)
    with pytest.raises(ValueError, match="scale in"):
        ForegroundRecombine(bright, scale=1.0)
    with pytest.raises(ValueError, match="mask_fn must return masks"):
        ForegroundRecombine(lambda x: x[0])(images, targets)
    with pytest.raises(ValueError, match="images .N, channels, H, W."):
        ForegroundRecombine(bright)(images[:, 0], targets)
