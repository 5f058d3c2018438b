"""Attribution and simplicity bias: which features a network uses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from lightning_plugins.robustness.feature_attribution import (
    BlockDataset,
    diff_roar,
    fit_classifier,
    gradient_leakage,
    input_gradients,
    unmask,
)
from lightning_plugins.robustness.simplicity import (
    concat_pair,
    extreme_simplicity,
    group_classes,
    lms_dataset,
    slab_dataset,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gradients_of_logits_and_losses():
    g = generator()
    weight = torch.randn(3, 6, generator=g, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 3, bias=False)).double()
    net[2].weight.data = weight
    targets = torch.tensor([0, 1, 2, 0, 1])
    with torch.inference_mode():
        inputs = torch.randn(5, 2, 3, generator=g, dtype=torch.float64)
        predicted = input_gradients(net, inputs)
        chosen = input_gradients(net, inputs, targets)
        loss = input_gradients(net, inputs, targets, of="loss")
    logits = inputs.flatten(1) @ weight.T
    torch.testing.assert_close(predicted.flatten(1), weight[logits.argmax(1)])
    torch.testing.assert_close(chosen.flatten(1), weight[targets])
    torch.testing.assert_close(loss.flatten(1), (logits.softmax(1) - F.one_hot(targets, 3)) @ weight)
    assert net.training
    assert net[2].weight.grad is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_top_share_and_bottom_rest_are_complements_even_with_ties(share):
    ranking = torch.randint(3, (6, 1, 4, 5), generator=generator()).float()
    inputs = torch.ones(6, 2, 4, 5)
    top, bottom = unmask(inputs, ranking, share), unmask(inputs, ranking, 1 - share, keep="bottom")
    assert torch.equal(top + bottom, inputs)
    assert torch.equal(top[:, 0], top[:, 1]), "pixels were ranked, not channels"
    assert (top[:, 0].flatten(1).sum(1) == round(share * 20)).all()
    kept, left = (ranking.where(part, fill).flatten(1) for part, fill in ((top[:, :1] == 1, 9), (top[:, :1] == 0, -9)))
    assert (kept.amin(1) >= left.amax(1)).all()


def test_ties_are_broken_by_the_generator_and_not_by_place():
    flat = torch.zeros(4000, 10)
    kept = unmask(torch.ones(4000, 10), flat, 0.3, generator=generator(1)).mean(0)
    assert ((kept - 0.3).abs() < 4 * (0.21 / 4000) ** 0.5).all()


def test_fill_with_the_mean_image():
    inputs = torch.rand(5, 3, generator=generator())
    mean = inputs.mean(0)
    assert torch.equal(unmask(inputs, inputs, 0.0, fill=mean), mean.expand(5, 3))


def one_coordinate_data(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(n, 10, generator=generator(seed))
    return inputs, (inputs[:, :2].sum(1) > 0).long()


def test_diff_roar_of_right_inverted_and_random_rankings():
    train, test = one_coordinate_data(600, 0), one_coordinate_data(600, 1)
    right = torch.tensor([1.0] * 2 + [0.0] * 8)

    def small():
        return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))

    def fit(model, inputs, targets):
        fit_classifier(model, inputs, targets, num_epochs=10, learning_rate=1e-2)

    def differences(attribution, shares):
        return diff_roar(train, test, attribution, shares=shares, make_model=small, fit=fit, num_repeats=2).difference

    g = generator(2)
    right_way = differences(right.expand_as, [0.2, 1.0])
    assert right_way[0] > 0.3
    assert right_way[1] == 0
    assert differences((1 - right).expand_as, [0.2]) < -0.3
    assert differences(lambda x: torch.rand(x.shape, generator=g), [0.2]).abs() < 0.1


def test_diff_roar_leaves_the_global_generator_alone_and_repeats_itself():
    data = one_coordinate_data(100, 0)
    state, fitted = torch.random.get_rng_state(), []

    def fit(model, inputs, targets):
        fitted.append((model[1].weight.detach().clone(), inputs))

    with torch.inference_mode():
        first = diff_roar(data, data, torch.abs, shares=[0.3, 0.6], fit=fit, num_repeats=3)
    second = diff_roar(data, data, torch.abs, shares=[0.3, 0.6], fit=fit, num_repeats=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.top.shape == first.bottom.shape == (2, 3)
    assert torch.equal(first.top, second.top)
    weights = [weight for weight, _ in fitted]
    assert torch.equal(weights[0], weights[3])
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(fitted[0][1], unmask(data[0], data[0], 0.3))
    assert torch.equal(fitted[3][1], unmask(data[0], data[0], 0.3, keep="bottom"))


def test_blocks_hold_the_image_and_the_null_where_the_mask_says():
    images = 2 + torch.rand(40, 3, 28, 28, generator=generator())
    for position, shares in (("random", (0.25, 0.75)), ("top", (1, 1)), ("bottom", (0, 0))):
        blocks = BlockDataset(TensorDataset(images, torch.arange(40)), position=position)
        assert shares[0] <= blocks.on_top.float().mean() <= shares[1]
        stacked = torch.stack([blocks[i][0] for i in range(len(blocks))])
        mask = blocks.null_mask()
        assert mask.shape == (40, 1, 56, 28)
        assert torch.equal(mask.expand_as(stacked), stacked <= 1)
        assert torch.equal(stacked[~mask.expand_as(stacked)].view_as(images), images)
        assert torch.equal(blocks.null_mask([3, 1]), mask[[3, 1]])
        assert [blocks[i][1] for i in range(40)] == list(range(40))
    assert torch.equal(BlockDataset(blocks.base).on_top, BlockDataset(blocks.base).on_top)
    box = blocks.null[0]
    assert box.sum() == 14**2 - 10**2
    assert torch.equal(box, box.T)
    assert torch.equal(box, box.flip(0))
    own = BlockDataset(blocks.base, null=images[0], position="top")
    assert torch.equal(own[5][0][:, 28:], images[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positions_do_not_follow_labels_of_the_same_seed(dtype):
    labels = torch.rand(2000, generator=generator(), dtype=dtype) < 0.5
    blocks = BlockDataset(TensorDataset(torch.zeros(2000, 1, 1, 1), labels))
    assert abs((blocks.on_top == labels).float().mean() - 0.5) < 4 * (0.25 / 2000) ** 0.5


def test_leakage_of_known_gradients():
    base = TensorDataset(torch.zeros(6, 1, 8, 8), torch.zeros(6))
    mask = BlockDataset(base).null_mask()
    assert (gradient_leakage(mask.float() * 1e-30, mask, share=0.5) == 1).all()
    assert (gradient_leakage((~mask).float(), mask, share=0.5) == 0).all()
    torch.testing.assert_close(gradient_leakage(torch.ones(6, 1, 16, 8), mask, share=1.0), torch.full((6,), 0.5))
    assert gradient_leakage(torch.zeros(6, 1, 16, 8), mask).isnan().all()


def test_linear_models_leak_when_the_signal_moves_and_only_then():
    # The class is the sign of the signal block; nothing else varies.
    g = generator()
    labels = torch.randint(2, (800,), generator=g)
    signal = (2.0 * labels - 1)[:, None, None, None] * (0.5 + torch.rand(800, 1, 4, 4, generator=g))
    leakage = {}
    for position in ("random", "top"):
        blocks = BlockDataset(TensorDataset(signal, labels), null=torch.zeros(1, 4, 4), position=position)
        inputs = torch.stack([blocks[i][0] for i in range(800)])
        net = nn.Sequential(nn.Flatten(), nn.Linear(32, 2))
        net[1].weight.data.zero_()
        fit_classifier(net, inputs, labels, num_epochs=3)
        leakage[position] = gradient_leakage(input_gradients(net, inputs), blocks.null_mask(), share=0.5).mean()
    assert leakage["top"] < 0.01, leakage
    assert 0.3 < leakage["random"] < 0.7, leakage


IMAGE = torch.zeros(1, 4, 4)
PAIR = (torch.zeros(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: input_gradients(lambda x: x, torch.ones(1, 2), of="sum"), "'logit' or 'loss'"),
        (lambda: input_gradients(lambda x: x, torch.ones(1, 2).long()), "floating-point"),
        (lambda: input_gradients(lambda x: x, torch.ones(1, 2), torch.tensor([2])), "targets must lie"),
        (lambda: input_gradients(lambda x: x.detach(), torch.ones(1, 2)), "remove detach"),
        (lambda: unmask(PAIR[0], PAIR[0], 10), "keeps ten percent"),
        (lambda: unmask(PAIR[0], PAIR[0], 0.1, keep="best"), "'top' or 'bottom'"),
        (lambda: unmask(PAIR[0], PAIR[0][:1], 0.1), "ranking must be"),
        (lambda: unmask(PAIR[0], PAIR[0] / 0, 0.1), "NaN"),
        (lambda: unmask(PAIR[0], PAIR[0], 0.1, fill=torch.zeros(4)), "fill must broadcast"),
        (lambda: unmask(PAIR[0], PAIR[0], 0.1, fill=torch.zeros(1, 1, 1, 3)), "fill must broadcast"),
        (lambda: diff_roar(PAIR, (torch.zeros(2, 4), PAIR[1]), torch.abs), "inputs differ"),
        (lambda: diff_roar((PAIR[0].long(), PAIR[1]), PAIR, torch.abs), "train inputs must be"),
        (lambda: diff_roar(PAIR, (PAIR[0], PAIR[0]), torch.abs), "test classes must be"),
        (lambda: diff_roar(PAIR, PAIR, torch.abs, shares=[2.0]), "share must lie"),
        (lambda: diff_roar(PAIR, PAIR, torch.abs, num_repeats=0), "num_repeats"),
        (lambda: fit_classifier(nn.Linear(3, 2), *PAIR, num_epochs=0), "num_epochs"),
        (lambda: BlockDataset(TensorDataset(IMAGE[None]), position="left"), "position must be"),
        (lambda: BlockDataset(TensorDataset(IMAGE[None]), null="circle"), "null must be 'box' or an image"),
        (lambda: BlockDataset(TensorDataset(IMAGE[None]), null=IMAGE[0]), "images' shape"),
        (lambda: BlockDataset(TensorDataset(IMAGE[None][:0])), "at least one"),
        (lambda: gradient_leakage(PAIR[0], PAIR[0]), "null_mask must be booleans"),
        (lambda: gradient_leakage(PAIR[0], PAIR[0] > 0, share=0.0), "at least one of 3"),
        (lambda: gradient_leakage(PAIR[0].long(), PAIR[0] > 0), "floating-point"),
    ],
)
def test_attribution_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_blocks_refuse_images_that_are_no_tensors():
    with pytest.raises(TypeError, match="add a transform such as ToTensor"):
        BlockDataset([("picture", 0)])


@pytest.mark.parametrize(("k", "intervals"), [
    (3, [(0.0, 1.6 / 6, 0, 1.0), (1.6 / 6 + 0.2, 1.0, 1, 1.0)]),
    (5, [(0.0, 0.12, 0, 0.75), (0.32, 0.56, 1, 1.0), (0.76, 1.0, 0, 0.25)]),
    (7, [(0.0, 0.8 / 14, 0, 0.5), (0.8 / 14 + 0.2, 2.4 / 14 + 0.2, 1, 0.875),
         (2.4 / 14 + 0.4, 4 / 14 + 0.4, 0, 0.5), (4 / 14 + 0.6, 1.0, 1, 0.125)]),
])  # fmt: skip
def test_slabs_lie_where_the_paper_puts_them(k, intervals):
    n = 40_000
    data = slab_dataset([k], n)
    magnitude, positive = data.inputs[:, 0].abs(), (data.inputs[:, 0] > 0).float().mean()
    assert abs(positive - 0.5) < 4 * (0.25 / n) ** 0.5
    covered = torch.zeros(n, dtype=torch.bool)
    for begin, end, label, probability in intervals:
        inside = (magnitude >= begin - 1e-6) & (magnitude <= end + 1e-6)
        covered |= inside
        assert (data.targets[inside] == label).all()
        of_class = inside[data.targets == label].float().mean()
        assert abs(of_class - probability) <= 4 * (0.25 / (n / 2)) ** 0.5 * (probability < 1)
        mean, length = magnitude[inside].mean(), end - begin
        assert abs(mean - (begin + end) / 2) < 4 * length / 12**0.5 / inside.sum() ** 0.5
    assert covered.all()


def test_coordinates_are_independent_given_the_class_and_noise_flips_them():
    data = lms_dataset(5, 20_000, dim=4, noise=(0.0, 0.1, 0.0, 0.0))
    linear = data.inputs[:, 0]
    assert ((linear > 0) == (data.targets == 1)).all()
    assert linear.abs().min() >= 0.1
    assert linear.abs().max() <= 1
    for k in (0, 1):
        correlation = torch.corrcoef(data.inputs[data.targets == k].T)
        assert (correlation - torch.eye(4)).abs().max() < 0.05
    magnitude = data.inputs[:, 1:].abs()
    looks_positive = (magnitude > 0.2) & (magnitude < 0.66)
    wrong = (looks_positive != (data.targets == 1)[:, None]).float().mean(0)
    assert abs(wrong[0] - 0.1) < 0.01
    assert (wrong[1:] == 0).all()


def test_rotation_is_orthogonal_and_can_be_taken_back():
    plain, turned = (lms_dataset(3, 500, dim=6, rotate=rotate, generator=generator(1)) for rotate in (False, True))
    torch.testing.assert_close(turned.rotation @ turned.rotation.T, torch.eye(6))
    assert not torch.allclose(turned.inputs, plain.inputs)
    torch.testing.assert_close(turned.inputs @ turned.rotation, plain.inputs, atol=1e-5, rtol=0)
    assert torch.equal(plain.rotation, torch.eye(6))


@pytest.mark.parametrize("rotate", [False, True])
def test_a_classifier_of_one_coordinate_is_found_out(rotate):
    data = lms_dataset(5, 4000, dim=6, rotate=rotate)

    def logits_fn(x):
        linear = (x @ data.rotation)[:, 0]
        return 100 * torch.stack([-linear, linear], 1)

    use = extreme_simplicity(
        logits_fn, data.inputs, data.targets, [0], rotation=data.rotation if rotate else None, batch_size=999
    )
    assert use.intact.accuracy == use.intact.auc == use.complement.accuracy == use.complement.auc == 1
    tolerance = 4 * (0.25 / 4000) ** 0.5
    assert abs(use.randomized.accuracy - 0.5) < tolerance
    assert abs(use.randomized.auc - 0.5) < tolerance
    assert use.intact.logit_change == 0
    assert use.complement.logit_change < 1e-3 < use.randomized.logit_change


def test_the_others_are_shuffled_together():
    # A product of two coordinates outlives a common permutation as a whole, though not its tie to the class.
    inputs = torch.randn(1000, 3, generator=generator())
    inputs[:, 2] = inputs[:, 1]
    seen = []

    def logits_fn(x):
        seen.append(x.clone())
        return x[:, :2]

    extreme_simplicity(logits_fn, inputs, torch.zeros(1000).long(), torch.tensor([True, False, False]), batch_size=1000)
    intact, randomized, complement = seen
    assert torch.equal(intact, inputs)
    assert torch.equal(randomized[:, 1:], inputs[:, 1:])
    assert not torch.equal(randomized[:, 0], inputs[:, 0])
    assert torch.equal(complement[:, 0], inputs[:, 0])
    assert torch.equal(complement[:, 1], complement[:, 2])
    assert torch.equal(complement[:, 1].sort().values, inputs[:, 1].sort().values)


def test_auc_over_three_classes_against_scikit_learn_and_for_one_class():
    from sklearn.metrics import roc_auc_score

    g = generator()
    logits, targets = torch.randn(200, 3, generator=g), torch.randint(3, (200,), generator=g)
    use = extreme_simplicity(lambda x: x, logits, targets, [0])
    expected = roc_auc_score(targets.numpy(), logits.double().softmax(1).numpy(), multi_class="ovr")
    assert use.intact.auc == pytest.approx(expected, abs=1e-6)
    assert math.isnan(extreme_simplicity(lambda x: x, logits, 0 * targets, [0]).intact.auc)


def test_pairs_are_of_one_class_and_use_each_image_once():
    g = generator()
    digits, clothes = torch.rand(30, 1, 28, 28, generator=g), torch.rand(50, 3, 32, 32, generator=g)
    first, second = torch.arange(30) % 3, torch.arange(50) % 3
    pair = concat_pair((digits, first), (clothes, second))
    assert pair.images.shape == (30, 3, 64, 32)
    assert pair.simple.shape == (3, 64, 32)
    assert pair.simple[:, :32].all()
    assert not pair.simple[:, 32:].any()
    assert torch.equal(pair.targets.bincount(), torch.tensor([10, 10, 10]))
    used = set()
    for image, target in zip(pair.images, pair.targets, strict=True):
        top, bottom = image[:, 2:30, 2:30], image[:, 32:]
        upper = next(i for i in range(30) if torch.equal(digits[i].expand(3, -1, -1), top))
        lower = next(i for i in range(50) if torch.equal(clothes[i], bottom))
        assert first[upper] == second[lower] == target
        used |= {("upper", upper), ("lower", lower)}
    assert len(used) == 60
    assert pair.images[:, :, :2].abs().sum() == 0
    assert not torch.equal(pair.targets, pair.targets.sort().values)


def test_groups_rename_and_join():
    images, targets = torch.arange(6.0), torch.tensor([3, 1, 4, 1, 5, 9])
    kept, classes = group_classes(images, targets, groups=((1, 9), (5,)))
    assert kept.tolist() == [1, 3, 4, 5]
    assert classes.tolist() == [0, 0, 1, 0]


GREY = (torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: slab_dataset([]), "1, 3, 5 or 7"),
        (lambda: slab_dataset([2]), "1, 3, 5 or 7"),
        (lambda: slab_dataset([7], margin=0.2), "below 0.1667"),
        (lambda: slab_dataset([3], 0), "num_samples"),
        (lambda: slab_dataset([3], width=0.0), "width"),
        (lambda: slab_dataset([3], noise=(0.1, 0.1)), "one number or 1"),
        (lambda: lms_dataset(1), "3, 5 or 7"),
        (lambda: lms_dataset(3, dim=1), "dim must be at least 2"),
        (lambda: group_classes(*GREY, ((0,), (0, 1))), "one group only"),
        (lambda: group_classes(GREY[0], GREY[1][:1], ((0,),)), r"integers \(2,\)"),
        (lambda: concat_pair(GREY, (GREY[0], torch.tensor([0, 2]))), "choose them by group_classes"),
        (lambda: concat_pair((GREY[0][0], GREY[1]), GREY), "base_simple images must be"),
        (lambda: concat_pair((GREY[0].expand(-1, 2, -1, -1), GREY[1]), (torch.zeros(2, 3, 4, 4), GREY[1])), "channels"),
        (lambda: extreme_simplicity(lambda x: x, *PAIR, [3]), r"places in \[0, 3\)"),
        (lambda: extreme_simplicity(lambda x: x, *PAIR, torch.tensor([True])), "booleans"),
        (lambda: extreme_simplicity(lambda x: x, *PAIR, [0], rotation=torch.eye(2)), "rotation must be"),
        (lambda: extreme_simplicity(lambda x: x, *PAIR, [0], batch_size=0), "batch_size"),
        (lambda: extreme_simplicity(lambda x: x, PAIR[0][:1], PAIR[1][:1], [0]), "at least 2"),
    ],
)
def test_simplicity_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()
