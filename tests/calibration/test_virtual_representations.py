"""Feature statistics against torch.cov, virtual features, and the retrained head against linear discriminants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_plugins.calibration import FeatureStatistics, calibrate_head_, sample_virtual_features

C, D = 4, 5


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, D, generator=generator, dtype=torch.float64)
    features = features @ torch.randn(D, D, generator=generator, dtype=torch.float64) + 3
    return features, torch.randint(C, (n,), generator=generator)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 8))
def test_pooled_clients_equal_the_concatenated_data(seed, n, num_clients):
    features, labels = rows(n, seed)
    labels[labels == 3] = 0  # a class that nobody has
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(num_clients, (n,), generator=generator)  # some hold one sample, some none
    clients = [FeatureStatistics(C, D).update(features[owner == k], labels[owner == k]) for k in range(num_clients)]
    pooled = FeatureStatistics(C, D).merge(*(clients[k] for k in torch.randperm(num_clients, generator=generator)))
    assert pooled.counts.tolist() == torch.bincount(labels, minlength=C).tolist()
    for label in range(C):
        own = features[labels == label]
        mean, covariance = pooled.mean()[label], pooled.covariance()[label]
        if len(own):
            torch.testing.assert_close(mean, own.mean(0), rtol=0, atol=1e-10)
        else:
            assert mean.isnan().all()
        if len(own) > 1:
            torch.testing.assert_close(covariance, torch.cov(own.T), rtol=0, atol=1e-10)
        else:
            assert covariance.isnan().all()


def test_order_of_samples_and_clients_does_not_count():
    features, labels = rows(200, 1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    one = FeatureStatistics(C, D).update(features, labels)
    two = FeatureStatistics(C, D)
    for part in order.split(7):
        two.update(features[part].float().double(), labels[part])
    one = FeatureStatistics(C, D).update(features.float(), labels)
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=1e-12, atol=1e-12)


def test_statistics_through_a_file(tmp_path):
    statistics = FeatureStatistics(C, D, power=0.5).update(*(part.abs() for part in rows(30, 2)))
    loaded = FeatureStatistics.load(statistics.save(tmp_path / "client.safetensors"))
    torch.testing.assert_close(loaded.state_dict(), statistics.state_dict(), rtol=0, atol=0)
    assert loaded.power == 0.5
    loaded.update(*(part.abs() for part in rows(5, 3)))
    assert statistics.counts.sum() == 30  # nothing is shared
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"holds no feature statistics.*write it by .save"):
        FeatureStatistics.load(tmp_path / "broken")
    with pytest.raises(ValueError, match="the state is damaged"):
        FeatureStatistics.from_state_dict({**statistics.state_dict(), "counts": torch.zeros(2)})


def test_virtual_features_have_the_moments_of_the_real_ones():
    features, labels = rows(400, 4)
    statistics = FeatureStatistics(C, D).update(features, labels)
    virtual, classes = sample_virtual_features(statistics, 100_000)
    assert torch.bincount(classes).tolist() == [100_000] * C
    for label in range(C):
        own = virtual[classes == label].double()
        spread = statistics.covariance()[label].diagonal().max()
        assert (own.mean(0) - statistics.mean()[label]).abs().max() < 5 * (spread / 1e5) ** 0.5
        torch.testing.assert_close(torch.cov(own.T), statistics.covariance()[label], rtol=0, atol=0.03 * spread.item())


def test_few_samples_are_shrunk_and_one_sample_borrows_the_covariance_of_the_others():
    features, _ = rows(13, 5)
    labels = torch.tensor([0] * 9 + [1] * 3 + [2])
    statistics = FeatureStatistics(3, D).update(features, labels)
    virtual, classes = sample_virtual_features(statistics, 200_000, shrinkage=0.3)
    covariance = statistics.covariance()
    shrunk = 0.7 * covariance[1] + 0.3 * covariance[1].trace() / D * torch.eye(D, dtype=torch.float64)
    scale = covariance[1].diagonal().max().item()
    torch.testing.assert_close(torch.cov(virtual[classes == 1].double().T), shrunk, rtol=0, atol=0.03 * scale)
    shared = (8 * covariance[0] + 2 * covariance[1]) / 10
    shared = 0.7 * shared + 0.3 * shared.trace() / D * torch.eye(D, dtype=torch.float64)
    scale = shared.diagonal().max().item()
    torch.testing.assert_close(torch.cov(virtual[classes == 2].double().T), shared, rtol=0, atol=0.03 * scale)


def test_a_class_of_equal_samples_is_drawn_as_its_mean():
    statistics = FeatureStatistics(1, D).update(torch.full((9, D), 2.0), torch.zeros(9, dtype=torch.int64))
    assert torch.equal(sample_virtual_features(statistics, 3)[0], torch.full((3, D), 2.0))


def test_seed_power_and_sign():
    features, labels = rows(400, 6)
    statistics = FeatureStatistics(C, D, power=0.5).update(features.square(), labels)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    virtual, _ = sample_virtual_features(statistics, 50, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(virtual, sample_virtual_features(statistics, 50, seed=1)[0])
    assert not torch.equal(virtual, sample_virtual_features(statistics, 50, seed=2)[0])
    assert virtual.min() >= 0  # the square of what was clamped
    only, _ = sample_virtual_features(statistics, [0, 0, 50, 0], seed=1)
    assert torch.equal(only, virtual[100:150])  # whatever the other classes do
    plain = FeatureStatistics(C, D).update(features, labels)
    assert sample_virtual_features(plain, 50)[0].min() < 0
    assert sample_virtual_features(plain, 50, non_negative=True)[0].min() == 0


def test_the_head_becomes_the_linear_discriminant():
    generator = torch.Generator().manual_seed(0)
    centres = 0.7 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    mixing = torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(6, 6, generator=generator, dtype=torch.float64)

    def draw(counts: list[int]) -> tuple[Tensor, Tensor]:
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        return centres[labels] + torch.randn(len(labels), 6, generator=generator, dtype=torch.float64) @ mixing, labels

    statistics = FeatureStatistics(3, 6).update(*draw([6000, 2000, 600]))  # imbalanced
    features, labels = draw([10_000] * 3)
    precision = (mixing.T @ mixing).inverse()
    scores = features @ precision @ centres.T - (centres @ precision * centres).sum(1) / 2
    best = (scores.argmax(1) == labels).double().mean()
    head = nn.Linear(6, 3)
    info = calibrate_head_(head, statistics, samples_per_class=2000, learning_rate=0.05)
    accuracy = (head(features.float()).argmax(1) == labels).double().mean()
    assert 0.75 < best < 0.99
    assert abs(accuracy - best) < 0.01
    assert info.loss_after < info.loss_before
    assert info.num_samples == 6000


def test_only_the_head_changes_and_nothing_is_left_behind():
    features, labels = rows(100, 7)
    statistics = FeatureStatistics(C, D).update(features, labels)
    for head in nn.Linear(D, C), nn.Linear(D, C, bias=False), nn.Linear(D, C).bfloat16():
        before = head.weight.detach().clone()
        state = torch.get_rng_state()
        with torch.inference_mode():
            info = calibrate_head_(head, statistics)
        assert torch.equal(state, torch.get_rng_state())
        assert head.weight.requires_grad
        assert head.weight.grad is None
        assert head.weight.dtype == before.dtype
        assert not torch.equal(head.weight, before)
        assert info.acc_after >= info.acc_before


def test_balance():
    features, labels = rows(200, 8)
    labels = (labels == 0).long()  # a quarter of class 1
    statistics = FeatureStatistics(2, D).update(features, labels)
    heads = [nn.Linear(D, 2) for _ in range(2)]
    for head in heads:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    calibrate_head_(heads[0], statistics)
    info = calibrate_head_(heads[1], statistics, balance=False)
    assert info.num_samples == 400
    rare = [head(features.float()).softmax(1)[:, 1].mean().item() for head in heads]
    assert rare[0] > rare[1] + 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: FeatureStatistics(0, 2), "num_classes must be at least 1"),
        (lambda s: FeatureStatistics(2, 2, power=0), "1 for the features as they are"),
        (lambda s: FeatureStatistics(2, D, power=0.5).update(-torch.ones(1, D), torch.zeros(1).long()), "use power=1"),
        (lambda s: s.update(torch.ones(2, D + 1), torch.zeros(2).long()), "one feature vector and one class"),
        (lambda s: s.update(torch.ones(1, D), torch.tensor([2])), "labels must lie in .0, 2., found 2"),
        (lambda s: s.update(torch.full((1, D), torch.nan), torch.tensor([0])), "look for faulty inputs"),
        (lambda s: s.merge(FeatureStatistics(3, D)), "let all clients use one network"),
        (lambda s: sample_virtual_features(s, 0), "samples_per_class must be a positive"),
        (lambda s: sample_virtual_features(s, [1, 1]), "ask for 0 of them"),
        (lambda s: sample_virtual_features(s, 5, shrinkage=2), "shrinkage must lie in"),
        (
            lambda s: sample_virtual_features(FeatureStatistics(2, D).update(torch.ones(1, D), torch.tensor([0])), 1),
            "two samples",
        ),
        (lambda s: calibrate_head_(nn.Linear(D, 3), s), "collect what goes into this layer"),
        (lambda s: calibrate_head_(nn.Linear(D, 2), s), "merge statistics in which every class occurs"),
        (lambda s: calibrate_head_(nn.Linear(D, 2), s, learning_rate=0), "learning_rate must be above 0"),
        (lambda s: calibrate_head_(nn.Linear(D, 2), s, num_epochs=0), "num_epochs must be at least 1"),
    ],
)
def test_wrong_use(call, words):
    statistics = FeatureStatistics(2, D).update(rows(20, 0)[0], torch.zeros(20, dtype=torch.int64))
    with pytest.raises(ValueError, match=words):
        call(statistics)


def test_divergence_leaves_the_head_alone():
    features, labels = rows(100, 9)
    statistics = FeatureStatistics(C, D).update(1e20 * features, labels)
    head = nn.Linear(D, C)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match="lower it"):
        calibrate_head_(head, statistics, learning_rate=1e10)
    assert torch.equal(head.weight, before)
