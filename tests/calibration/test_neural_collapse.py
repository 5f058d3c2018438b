"""Neural collapse: exact collapse, a slow reference, and features that solve the mixup problem."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_plugins.calibration import (
    SimplexETFClassifier,
    collapse_curves,
    mixed_collapse,
    neural_collapse,
    simplex_etf,
    unconstrained_mixup_feature,
)
from lightning_plugins.callbacks import NeuralCollapseMonitor
from toys import TinyImages, TinyModule, make_trainer, toy_data


@pytest.mark.parametrize(("num_classes", "num_features"), [(2, 1), (3, 2), (4, 4), (10, 64)])
def test_the_simplex(num_classes, num_features):
    rows = simplex_etf(num_classes, num_features, seed=3)
    expected = (num_classes * torch.eye(num_classes) - 1) / (num_classes - 1)
    torch.testing.assert_close(rows @ rows.T, expected.double())
    assert rows.sum(0).abs().max() < 1e-12


def test_full_collapse_is_zero_everywhere():
    weight, labels = simplex_etf(5, 8), torch.arange(20) % 5
    result = neural_collapse(3 * weight[labels] + 7, labels, 2 * weight, torch.zeros(5))  # means may be shifted
    for name in ("nc1", "nc1_trace", "nc2_norm", "nc2_angle", "nc2_norm_head", "nc2_angle_head", "nc3"):
        assert abs(getattr(result, name)) < 1e-12, name
    assert neural_collapse(3 * weight[labels], labels, 2 * weight).nc4 == 0


def test_against_the_definitions():
    generator = torch.Generator().manual_seed(0)
    num_classes, width = 4, 6
    labels = torch.randint(num_classes, (200,), generator=generator)
    centres = 2 * torch.randn(num_classes, width, generator=generator, dtype=torch.float64)
    features = centres[labels] + torch.randn(200, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_classes, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    means = torch.stack([features[labels == k].mean(0) for k in range(num_classes)])
    m = means - means.mean(0)
    residual = features - means[labels]
    within, between = residual.T @ residual / 200, m.T @ m / num_classes
    result = neural_collapse(features, labels, weight, bias)
    assert result.nc1 == pytest.approx(
        (within @ torch.linalg.pinv(between, rtol=1e-6)).trace().item() / num_classes, rel=1e-9
    )
    assert result.nc1_trace == pytest.approx((within.trace() / between.trace()).item(), rel=1e-12)
    lengths = m.norm(dim=1)
    assert result.nc2_norm == pytest.approx((lengths.std(correction=0) / lengths.mean()).item())
    cosines = [
        abs(F.cosine_similarity(m[k], m[other], dim=0).item() + 1 / 3)
        for k in range(4)
        for other in range(4)
        if k != other
    ]
    assert result.nc2_angle == pytest.approx(sum(cosines) / 12)
    w = weight - weight.mean(0)
    assert result.nc3 == pytest.approx((w / w.norm() - m / m.norm()).square().sum().item())
    wrong = [
        (weight @ h + bias).argmax() != torch.stack([(h - mean).norm() for mean in means]).argmin() for h in features
    ]
    assert result.nc4 == pytest.approx(sum(map(bool, wrong)) / 200)
    # A rotation and a scale of everything change nothing.
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    turned = neural_collapse(features @ rotation, labels, weight @ rotation, bias)
    assert turned.nc1 == pytest.approx(result.nc1)
    assert turned.nc3 == pytest.approx(result.nc3)


def test_classes_without_samples_are_left_out():
    weight, labels = simplex_etf(3, 4), torch.tensor([0, 0, 2, 2])
    result = neural_collapse(weight[labels], labels, weight)
    assert result.nc1 < 1e-20
    assert result.nc4 == 0


@pytest.mark.parametrize("decay", [1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_the_unconstrained_solution_is_stationary_and_as_the_theory_says(decay, num_classes):
    weight = 2 * simplex_etf(num_classes, 12)
    for share in (0.0, 0.1, 0.5, 0.8, 1.0):
        h = unconstrained_mixup_feature(weight, 0, 1, share, decay=decay)
        target = torch.zeros(num_classes, dtype=torch.float64)
        target[:2] = torch.tensor([share, 1 - share], dtype=torch.float64)
        probs = (weight @ h).softmax(0)
        residual = decay * h - weight.T @ (target - probs)
        assert residual.abs().max() < 1e-10
        mirrored = unconstrained_mixup_feature(weight, 1, 0, 1 - share, decay=decay)
        torch.testing.assert_close(mirrored, h, rtol=0, atol=1e-8)
        if num_classes > 2:  # the two scalars, with what is left shared equally among the others
            rest = probs[2:].mean()
            predicted = (share - probs[0] + rest) * weight[0] + (1 - share - probs[1] + rest) * weight[1]
            torch.testing.assert_close(h, predicted / decay, rtol=0, atol=1e-8)
    half = weight @ unconstrained_mixup_feature(weight, 0, 1, 0.5, decay=decay)
    assert abs(half[0] - half[1]) < 1e-9
    own = [unconstrained_mixup_feature(weight, 2 % num_classes, 2 % num_classes, s, decay=decay) for s in (0.1, 0.7)]
    torch.testing.assert_close(own[0], own[1])
    assert F.cosine_similarity(own[0], weight[2 % num_classes], dim=0).item() == pytest.approx(1)


def mixtures(weight, decay=0.01):
    shares = torch.arange(5) / 4
    pairs = torch.cartesian_prod(torch.arange(len(weight)), torch.arange(len(weight)))
    rows = [
        unconstrained_mixup_feature(weight, int(i), int(j), float(s), decay=decay) for i, j in pairs for s in shares
    ]
    return torch.stack(rows).view(len(pairs), 5, -1), *pairs.T, shares


@pytest.mark.parametrize("num_classes", [2, 4])
def test_mixed_measures_of_the_unconstrained_solution(num_classes):
    weight = simplex_etf(num_classes, 6)
    features, first, second, shares = mixtures(weight)
    shifted = weight + torch.arange(6)  # changes no prediction
    result = mixed_collapse(features, first, second, shares, shifted)
    assert result.alignment == pytest.approx(1)
    assert result.plane == pytest.approx(0, abs=1e-9)
    assert result.margin == pytest.approx(0, abs=1e-8)
    assert result.gap > 0.01  # no convex combinations


def test_mixed_measures_of_convex_combinations_and_of_noise():
    weight = simplex_etf(3, 6)
    _, first, second, shares = mixtures(weight)
    share = shares[None, :, None].double()
    line = share * weight[first][:, None] + (1 - share) * weight[second][:, None]
    result = mixed_collapse(line, first, second, shares, weight)
    assert result.gap == pytest.approx(0, abs=1e-9)
    noise = torch.randn(line.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert mixed_collapse(line + noise, first, second, shares, weight).plane > 0.1
    two = (
        torch.cat([line, line + 1]),
        first.repeat(2),
        second.repeat(2),
    )  # several pairs of the same classes are averaged
    averaged = mixed_collapse(*two, shares, weight)
    assert averaged.gap == pytest.approx(mixed_collapse(line + 0.5, first, second, shares, weight).gap)


def test_the_fixed_head():
    state = torch.get_rng_state()
    head = SimplexETFClassifier(6, 3, scale=4.0)
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(head, nn.Linear)
    assert not head.weight.requires_grad
    assert head.bias is None
    torch.testing.assert_close(head.weight.norm(dim=1), torch.full((3,), 4.0))
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), head)
    before = head.weight.clone()
    F.cross_entropy(net(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0])).backward()
    torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.1).step()
    assert torch.equal(before, head.weight)
    other = SimplexETFClassifier(6, 3, seed=5)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: simplex_etf(5, 3), "widen the layer before it"),
        (lambda: SimplexETFClassifier(6, 3, scale=0), "scale must be above 0"),
        (lambda: neural_collapse(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(2, 4)), "features must have shape"),
        (lambda: neural_collapse(torch.ones(2, 3), torch.tensor([0, 2]), torch.ones(2, 3)), "the rows of weight"),
        (lambda: neural_collapse(torch.ones(2, 3), torch.tensor([1, 1]), torch.ones(2, 3)), "pass more samples"),
        (lambda: neural_collapse(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(2, 3)), "means are equal"),
        (lambda: neural_collapse(torch.full((2, 3), torch.nan), torch.tensor([0, 1]), torch.ones(2, 3)), "finite"),
        (lambda: unconstrained_mixup_feature(torch.ones(3, 4), 0, 1, 0.5), "use simplex_etf"),
        (lambda: unconstrained_mixup_feature(simplex_etf(3, 4), 0, 1, 1.5), "share must lie in"),
        (lambda: unconstrained_mixup_feature(simplex_etf(3, 4), 0, 1, 0.5, decay=0), "decay must be above 0"),
        (
            lambda: mixed_collapse(torch.ones(1, 1, 4), *torch.tensor([[0], [1]]), torch.ones(1), simplex_etf(3, 4)),
            "both needed",
        ),
        (lambda: NeuralCollapseMonitor(0), "every_n_epochs must be at least 1"),
    ],
)
def test_wrong_use(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_monitor_measures_the_weights_of_the_epoch_on_clean_samples(tmp_path):
    module, monitor = TinyModule(), NeuralCollapseMonitor(2, num_samples=64, mixed=True)
    trainer = make_trainer(tmp_path, 4, monitor, logger=CSVLogger(tmp_path))
    trainer.fit(module)
    assert monitor.epochs == [2, 4]
    inputs, labels = toy_data(64).tensors
    with torch.no_grad():
        features = module.net[:2](inputs)
    expected = neural_collapse(features, labels, module.net[2].weight, module.net[2].bias)
    assert monitor.history["nc1"][-1] == pytest.approx(expected.nc1, rel=1e-5)
    assert monitor.history["nc4"][-1] == expected.nc4
    assert float(trainer.callback_metrics["calibration/nc3"]) == pytest.approx(expected.nc3, rel=1e-5)
    assert {"mixed_alignment", "mixed_plane", "mixed_gap", "mixed_margin"} < monitor.history.keys()
    assert list(tmp_path.rglob("calibration/neural_collapse*.png"))


def test_a_named_head_in_a_net_with_batch_norm(tmp_path):
    module, monitor = TinyImages(dropout=0.5), NeuralCollapseMonitor(head="net.5", mixed=True)
    make_trainer(tmp_path, 1, monitor).fit(module)
    module.eval()
    images, labels = module.dataset().tensors
    with torch.no_grad():
        features = module.net[:5](images)
    expected = neural_collapse(features, labels, module.net[5].weight, module.net[5].bias)
    assert monitor.history["nc1"] == [pytest.approx(expected.nc1, rel=1e-4)]


def test_modules_without_a_linear_head_are_refused(tmp_path):
    class NoHead(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 3, 1), nn.Flatten())

    with pytest.raises(MisconfigurationException, match="pass head= the name"):
        make_trainer(tmp_path, 1, NeuralCollapseMonitor()).fit(NoHead())
    with pytest.raises(MisconfigurationException, match="found ReLU; pass the name"):
        make_trainer(tmp_path, 1, NeuralCollapseMonitor(head="net.1")).fit(TinyModule())
    with pytest.raises(MisconfigurationException, match="pass head= the name"):  # not what gives the logits
        make_trainer(tmp_path, 1, NeuralCollapseMonitor(head="net.0")).fit(TinyModule())


class Writes(pl.Callback):
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        monitor = next(callback for callback in trainer.callbacks if isinstance(callback, NeuralCollapseMonitor))
        torch.save(
            (monitor.history, pl_module.state_dict()), f"{trainer.default_root_dir}/rank-{trainer.global_rank}.pt"
        )


@pytest.mark.processes
def test_two_processes_measure_all_samples(tmp_path):
    trainer = make_trainer(tmp_path, 1, NeuralCollapseMonitor(num_samples=63), Writes(), strategy="ddp_fork", devices=2)
    trainer.fit(TinyModule(batch_size=8))
    history, state = torch.load(tmp_path / "rank-1.pt", weights_only=True)
    module = TinyModule()
    module.load_state_dict(state)
    chosen = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:63]
    inputs, labels = (part[chosen] for part in toy_data(64).tensors)
    with torch.no_grad():
        features = module.net[:2](inputs)
    expected = neural_collapse(features, labels, module.net[2].weight, module.net[2].bias)
    assert history["nc1"] == [pytest.approx(expected.nc1, rel=1e-5)]


def test_the_figure():
    figure = collapse_curves([1, 2, 3], {name: [3.0, 2.0, 1.0] for name in "abcde"})
    assert len(figure.axes) == 5
