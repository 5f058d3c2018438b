from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.data import (
    ClassOverlap,
    Imbalance,
    LabelNoise,
    class_overlap,
    make_imbalanced,
    stratified_split,
    symmetric_label_noise,
)

BALANCED = torch.arange(10).repeat(3000)[torch.randperm(30_000, generator=torch.Generator().manual_seed(5))]


def counts(kept: torch.Tensor, targets: torch.Tensor = BALANCED) -> list[int]:
    return torch.bincount(targets[kept], minlength=10).tolist()


# --- imbalance


def test_exponential_counts_are_the_published_ones():
    expected = [3000, 1798, 1078, 646, 387, 232, 139, 83, 50, 30]
    assert counts(make_imbalanced(BALANCED, "exp", 100)) == expected
    # CIFAR-100-LT as the LDAM code counts it: int(max * (1 / ratio) ** (class / 99))
    targets = torch.arange(100).repeat(500)
    expected = [int(500 * 0.01 ** (label / 99)) for label in range(100)]
    assert torch.bincount(targets[make_imbalanced(targets, "exp", 100)]).tolist() == expected


@pytest.mark.parametrize(("ratio", "rare"), [(10, 300), (100, 30), (1, 3000)])
def test_step_counts(ratio, rare):
    assert counts(make_imbalanced(BALANCED, "step", ratio)) == [3000] * 5 + [rare] * 5


def test_step_with_an_odd_number_of_classes_puts_the_middle_one_among_the_rare():
    targets = torch.arange(5).repeat(20)
    assert torch.bincount(targets[make_imbalanced(targets, "step", 4)]).tolist() == [20, 20, 5, 5, 5]


def test_a_rare_class_of_one_sample_survives_rounding():
    # 49 * (1 / 49) is 0.999... in floating point
    targets = torch.arange(2).repeat(49)
    assert torch.bincount(targets[make_imbalanced(targets, "step", 49)]).tolist() == [49, 1]


def test_class_order_and_largest_class():
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    kept = make_imbalanced(BALANCED, "exp", 100, max_per_class=1000, class_order=order)
    assert counts(kept) == [int(1000 / 100 ** (rank / 9)) for rank in reversed(range(10))]


def test_unequal_classes_give_as_many_as_every_class_can_serve():
    targets = torch.cat([torch.zeros(90), torch.ones(30), torch.full((5,), 2)]).long()
    kept = make_imbalanced(targets, "exp", 4)  # ranks take n, n / 2, n / 4: class 2 allows 20, class 1 allows 60
    assert torch.bincount(targets[kept]).tolist() == [20, 10, 5]


def test_subsets_are_sorted_seeded_and_nested():
    weak, strong = make_imbalanced(BALANCED, "exp", 10), make_imbalanced(BALANCED, "exp", 100)
    assert torch.equal(weak, weak.unique())
    assert set(strong.tolist()) < set(weak.tolist())
    assert torch.equal(strong, make_imbalanced(BALANCED, "exp", 100))
    assert not torch.equal(strong, make_imbalanced(BALANCED, "exp", 100, seed=1))


@given(ratio=st.floats(1, 50), kind=st.sampled_from(["exp", "step"]), classes=st.integers(2, 7))
@settings(max_examples=40, deadline=None)
def test_counts_fall_with_the_rank_and_keep_the_ratio(ratio, kind, classes):
    targets = torch.arange(classes).repeat(200)
    kept = torch.bincount(targets[make_imbalanced(targets, kind, ratio)]).tolist()
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 200
    assert kept[-1] == int(200 / ratio)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "linear"}, "'exp' or 'step', got 'linear'"),
        ({"ratio": 0.5}, "at least 1, got 0.5"),
        ({"ratio": float("nan")}, "finite and at least 1|must be a number, got nan"),
        ({"ratio": float("inf")}, "finite and at least 1"),
        ({"max_per_class": 0}, "max_per_class must be at least 1"),
        ({"class_order": [0, 0, 1]}, "name each class 0, 1, ... once"),
    ],
)
def test_wrong_imbalance_fails_as_function_and_in_the_constructor(arguments, message):
    arguments = {"kind": "exp", "ratio": 10.0, **arguments}
    with pytest.raises(ValueError, match=message):
        Imbalance(**arguments)
    with pytest.raises(ValueError, match=message):
        make_imbalanced(BALANCED, arguments.pop("kind"), arguments.pop("ratio"), **arguments)


def test_imbalance_that_the_data_cannot_serve():
    with pytest.raises(ValueError, match="asks for 4000 samples of class 0, which has 3000; use a smaller"):
        make_imbalanced(BALANCED, "exp", 10, max_per_class=4000)
    with pytest.raises(ValueError, match="leaves class 9 without samples .* use a smaller ratio"):
        make_imbalanced(BALANCED, "exp", 5000)
    with pytest.raises(ValueError, match="without samples"):
        make_imbalanced(torch.tensor([0, 0, 2, 2]), "step", 2)
    with pytest.raises(ValueError, match="all 10 classes of the data set once"):
        Imbalance("exp", 2, class_order=(0, 1)).apply(BALANCED, num_classes=10, seed=0)


# --- noise


def test_noise_rate_is_the_share_of_wrong_labels_and_spreads_evenly():
    noisy = symmetric_label_noise(BALANCED, 0.4, num_classes=10, seed=3)
    wrong = noisy != BALANCED
    # four standard deviations of a binomial share over 30,000 samples
    assert abs(wrong.float().mean().item() - 0.4) < 4 * (0.4 * 0.6 / 30_000) ** 0.5
    shifts = torch.bincount((noisy - BALANCED)[wrong] % 10, minlength=10)
    assert shifts[0] == 0
    share = shifts[1:] / shifts.sum()
    assert (share - 1 / 9).abs().max() < 4 * (1 / 9 * 8 / 9 / int(wrong.sum())) ** 0.5


def test_noise_at_its_ends_and_its_nesting():
    assert torch.equal(symmetric_label_noise(BALANCED, 0.0, num_classes=10), BALANCED)
    assert (symmetric_label_noise(BALANCED, 1.0, num_classes=10) != BALANCED).all()
    weak, strong = (symmetric_label_noise(BALANCED, rate, num_classes=10) for rate in (0.1, 0.3))
    flipped = weak != BALANCED
    assert torch.equal(strong[flipped], weak[flipped])
    assert not torch.equal(weak, symmetric_label_noise(BALANCED, 0.1, num_classes=10, seed=1))
    assert symmetric_label_noise(BALANCED.to(torch.uint8), 0.5, num_classes=10).dtype == torch.uint8


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_wrong_rate(rate):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]"):
        LabelNoise(rate)
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]|must be a number, got nan"):
        symmetric_label_noise(BALANCED, rate, num_classes=10)


def test_wrong_labels():
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 8, found labels from 0 to 9"):
        symmetric_label_noise(BALANCED, 0.1, num_classes=9)
    with pytest.raises(ValueError, match="labels must be at least 0, found labels from -1"):
        class_overlap(torch.tensor([-1, 1]), [(0, 1)])
    with pytest.raises(ValueError, match="pass class indices"):
        stratified_split(torch.eye(3), 0.5)
    with pytest.raises(ValueError, match="pass class indices"):
        symmetric_label_noise(torch.tensor([0.5]), 0.1, num_classes=2)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        symmetric_label_noise(torch.tensor([0]), 0.1, num_classes=1)


# --- overlap


def test_overlap_mixes_the_pairs_half_and_half_and_nothing_else():
    mixed = class_overlap(BALANCED, [(1, 3), (7, 9)], seed=2)
    for label in range(10):
        kept = (mixed[label == BALANCED] == label).float().mean().item()
        if label in (1, 3, 7, 9):
            assert abs(kept - 0.5) < 4 * (0.25 / 3000) ** 0.5
        else:
            assert kept == 1
    assert set(mixed[BALANCED == 7].tolist()) == {7, 9}
    assert not torch.equal(mixed, class_overlap(BALANCED, [(1, 3), (7, 9)], seed=4))


def test_overlap_at_its_ends():
    assert torch.equal(class_overlap(BALANCED, [(1, 3)], probability=0.0), BALANCED)
    assert torch.equal(class_overlap(torch.tensor([0, 4]), [(4, 6)], probability=1.0), torch.tensor([0, 6]))


def test_noise_and_overlap_of_one_seed_choose_independently():
    swapped = class_overlap(BALANCED % 2, [(0, 1)], probability=0.5, seed=0) != BALANCED % 2
    flipped = symmetric_label_noise(BALANCED % 2, 0.5, num_classes=2, seed=0) != BALANCED % 2
    assert abs((swapped & flipped).float().mean().item() - 0.25) < 0.02


@pytest.mark.parametrize("pairs", [[(1, 1)], [(1, 2), (2, 3)], [(-1, 2)]])
def test_wrong_pairs(pairs):
    with pytest.raises(ValueError, match="each of them once in all"):
        ClassOverlap(pairs)
    with pytest.raises(ValueError, match="each of them once in all"):
        class_overlap(BALANCED, pairs)


@pytest.mark.parametrize("pairs", [[], [(1, 2, 3)]])
def test_no_pairs(pairs):
    with pytest.raises(ValueError, match="at least one pair of classes"):
        ClassOverlap(pairs)


def test_wrong_overlap_beyond_the_pairs():
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got 2"):
        ClassOverlap([(0, 1)], probability=2)
    with pytest.raises(ValueError, match="pairs name class 12, and the data set has 10"):
        ClassOverlap([(0, 12)]).apply(BALANCED, num_classes=10, seed=0)


@pytest.mark.parametrize("build", [lambda s: Imbalance("exp", 2, seed=s), lambda s: LabelNoise(0.1, seed=s)])
def test_wrong_seed(build):
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        build(-1)


def test_a_seed_of_its_own_wins():
    own = LabelNoise(0.3, seed=8).apply(BALANCED, num_classes=10, seed=0)[1]
    assert torch.equal(own, LabelNoise(0.3).apply(BALANCED, num_classes=10, seed=8)[1])


# --- split


def test_split_is_a_stratified_partition():
    targets = torch.tensor([0] * 40 + [1] * 20 + [3] * 4)
    rest, part = stratified_split(targets, 0.25)
    assert torch.equal(torch.cat([rest, part]).sort().values, torch.arange(64))
    assert torch.bincount(targets[part]).tolist() == [10, 5, 0, 1]
    assert not torch.equal(part, stratified_split(targets, 0.25, seed=1)[1])


def test_split_that_empties_a_side():
    with pytest.raises(ValueError, match="puts 0 of the 4 samples of class 1 .* nearer to 0.5"):
        stratified_split(torch.tensor([0] * 40 + [1] * 4), 0.1)
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\)"):
        stratified_split(BALANCED, 1.0)


def test_nothing_touches_the_global_random_state():
    before = torch.get_rng_state()
    make_imbalanced(BALANCED, "exp", 10)
    symmetric_label_noise(BALANCED, 0.5, num_classes=10)
    class_overlap(BALANCED, [(0, 1)])
    stratified_split(BALANCED, 0.5)
    assert torch.equal(torch.get_rng_state(), before)
