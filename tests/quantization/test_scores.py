"""Scores of layers: against closed forms, brute force, and on networks that are not ours."""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import islice
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader
from torchvision.models import mobilenet_v3_small, resnet18
from torchvision.models.vision_transformer import VisionTransformer

from lightning_plugins.models import resnet20
from lightning_plugins.quantization import active_plan, convert_, cost, load_packed, quantized_layers, save_packed
from lightning_plugins.quantization import switch_ as switch_to
from lightning_plugins.quantization.layer_order import find_blocks, keeps_shape, lim_score, zd_score
from lightning_plugins.quantization.scores import Method, evaluate_plan, inverted, score_layers
from lightning_plugins.quantization.sensitivity import LayerSensitivity, SensitivityTable
from toys import DictImages, TorchvisionModule, assert_same_weights, image_and_label, toy_data, weights

METHODS = get_args(Method)
HAWQ = ("hawq-v1", "hawq-v2", "hawq-v3")
EVERYTHING = {"first_last_bits": 2, "per_channel": False}


def images(n: int = 8, size: int = 8, *, batch: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, size, size, generator=generator)
    return list(zip(x.split(batch), (torch.arange(n) % 3).split(batch), strict=True))


class Block(nn.Module):
    def __init__(self, channels: int, out_channels: int, *, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x)).relu()
        return x + out if out.shape == x.shape else out


class Net(nn.Module):
    """Two residual blocks, one of them depthwise, and one block that changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 4, groups=4), Block(4, 6))
        self.hidden = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.blocks(self.stem(x)).mean((2, 3))).relu())


LAYERS = {"blocks.0.conv": (8, 4, 2), "blocks.1.conv": (8,), "blocks.2.conv": (8, 4, 2), "hidden": (8, 4, 2)}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


class Joint(nn.Module):
    """Its output is the vector of all its weights, so that a quadratic loss has the Hessian that one chooses."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(1, size, bias=False) for size in sizes)
        for part in self.parts:
            part.weight.data = torch.randn(part.weight.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


ONES = [
    (torch.ones(2, 1, dtype=torch.float64), torch.zeros(2)),
    (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1)),
]


def quadratic(matrix: Tensor):
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * torch.einsum("ni,ij,nj->n", outputs, matrix, outputs).mean() + outputs.mean()

    return loss


def deltas(net: nn.Module, bits: int = 4) -> list[Tensor]:
    """What quantization adds to the weights of a Joint net."""
    converted = switch_to(convert_(deepcopy(net), (8, 4), **EVERYTHING), bits)
    return [
        (layer.quantized_weight() - layer.weight).detach().flatten() for layer in quantized_layers(converted).values()
    ]


def coupled(net: nn.Module, diagonal: list[float], couplings: dict[tuple[int, int], float]) -> Tensor:
    """The Hessian with multiples of the identity on its diagonal and the given interactions of 4-bit perturbations.

    An interaction of 9 makes the loss non-convex: there are no Gauss-Newton probes then, and Hutchinson's have no noise
    where the blocks on the diagonal are diagonal.
    """
    d = deltas(net)
    blocks = [[torch.zeros(len(a), len(b), dtype=torch.float64) for b in d] for a in d]
    for index, value in enumerate(diagonal):
        blocks[index][index] = value * torch.eye(len(d[index]), dtype=torch.float64)
    for (a, b), value in couplings.items():
        blocks[a][b] = value * torch.outer(d[a], d[b]) / (d[a].square().sum() * d[b].square().sum())
        blocks[b][a] = blocks[a][b].T
    return torch.cat([torch.cat(row, 1) for row in blocks])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fills_a_table_and_leaves_the_model_alone(net, method, tmp_path):
    net.blocks.train()
    net.stem.eval()
    net.stem.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before, modes = weights(net), [module.training for module in net.modules()]
    torch.manual_seed(5)
    table = score_layers(net, method, DataLoader(toy_images(), 4, shuffle=True), bits=(8, 4, 2), num_probes=10)
    drawn = torch.rand(1)

    assert {name: tuple(layer.losses) for name, layer in table.layers.items()} == LAYERS
    converted = convert_(deepcopy(net), (8, 4, 2))
    assert list(table.layers) == list(quantized_layers(converted))
    assert {name: layer.macs for name, layer in table.layers.items()} == {
        layer.name: layer.macs for layer in cost(converted, example_input=images()[0][0]).quantized
    }
    for name, layer in table.layers.items():
        assert layer.num_weights == net.get_submodule(name).weight.numel()
        losses = list(layer.losses.values())
        assert all(math.isfinite(loss) and loss >= 0 for loss in losses)
        if method != "loss-increase":  # what is measured may do as it likes
            assert losses == sorted(losses)
    assert table.details["num_samples"] == 8
    assert set(table.details["sensitive"]) < set(LAYERS)
    table.save(tmp_path / "table.json")
    assert SensitivityTable.load(tmp_path / "table.json").layers == table.layers

    assert_same_weights(net, before)
    assert [module.training for module in net.modules()] == modes
    assert {p.requires_grad for p in net.stem.parameters()} == {False}
    assert {p.requires_grad for p in net.blocks.parameters()} == {True}
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["head.weight"]
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def toy_images() -> torch.utils.data.Dataset:
    return torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*images(), strict=True)))


@pytest.mark.parametrize("method", ["hawq-v2", "pairwise", "random"])
def test_a_seed_repeats_and_another_differs(net, method):
    def score(seed: int) -> dict:
        return {
            k: v.importance for k, v in score_layers(net, method, images(), seed=seed, num_probes=10).layers.items()
        }

    assert score(0) == score(0) != score(1)


def test_hawq_is_curvature_times_perturbation():
    net = Joint(5, 3, 4).double()
    matrix = coupled(net, [1.0, 7.0, 2.0], {(0, 1): 9.0})
    tables = {m: score_layers(net, m, ONES, loss_fn=quadratic(matrix), **EVERYTHING) for m in HAWQ}
    for index, (name, n, curvature) in enumerate(
        zip(tables["hawq-v1"].layers, (5, 3, 4), (1.0, 7.0, 2.0), strict=True)
    ):
        norms = {bits: float(deltas(net, bits)[index].square().sum()) for bits in (8, 4)}
        first, second = (tables[m].layers[name] for m in HAWQ[:2])
        assert first.importance == pytest.approx(curvature / n)
        assert first.losses == pytest.approx({b: curvature * norm for b, norm in norms.items()})
        assert second.importance == pytest.approx(curvature)  # trace / n
        assert second.losses == pytest.approx({b: curvature * norm for b, norm in norms.items()})
    assert tables["hawq-v3"].layers == tables["hawq-v2"].layers
    assert tables["hawq-v2"].order() == ["parts.0", "parts.2", "parts.1"]
    assert tables["hawq-v2"].details["sensitive"] == ["parts.1"]  # at least the mean, 10 / 3


def test_hawq_scales_with_the_loss_and_ignores_a_constant(net):
    def score(scale: float, constant: float) -> dict:
        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return scale * F.cross_entropy(outputs, targets) + constant

        table = score_layers(net, "hawq-v2", images(), loss_fn=loss, num_probes=10)
        return {name: layer.importance for name, layer in table.layers.items()}

    plain = score(1, 0)
    assert score(1, 5) == pytest.approx(plain, rel=1e-4)
    assert score(3, 0) == pytest.approx({name: 3 * value for name, value in plain.items()}, rel=1e-4)


def test_negative_curvature_is_taken_as_zero():
    net = Joint(5, 3, 4).double()
    matrix = coupled(net, [1.0, -7.0, 2.0], {})
    for method in ("hawq-v1", "hawq-v2", "pairwise"):
        with pytest.warns(UserWarning, match=r"negative.*1 of 3 layers.*'parts.1'.*taken as 0; more samples"):
            table = score_layers(net, method, ONES, loss_fn=quadratic(matrix), **EVERYTHING)
        assert table.layers["parts.1"].importance == 0
        assert table.layers["parts.1"].losses == {8: 0, 4: 0}


@pytest.mark.parametrize("estimator", ["hvp", "measured"])
def test_interactions_are_exact_where_the_loss_is_quadratic(estimator):
    net = Joint(5, 3, 4).double()
    wanted = {(0, 1): 9.0, (0, 2): -0.7, (1, 2): 0.2}
    table = score_layers(
        net,
        "pairwise",
        ONES,
        loss_fn=quadratic(coupled(net, [1.0, 7.0, 2.0], wanted)),
        estimator=estimator,
        kappa=2.0,
        **EVERYTHING,
    )
    matrix = table.details["interactions"]
    for (a, b), value in wanted.items():
        assert matrix[a][b] == pytest.approx(value, rel=1e-6)
        assert matrix[b][a] == pytest.approx(value, rel=1e-6)
    coupling = (9.0, 9.2, 0.2)  # the negative one counts as 0
    for index, (layer, curvature) in enumerate(zip(table.layers.values(), (1.0, 7.0, 2.0), strict=True)):
        norms = {bits: float(deltas(net, bits)[index].square().sum()) for bits in (8, 4)}
        assert layer.importance == layer.losses[4]
        for bits, norm in norms.items():
            second = coupling[index] * math.sqrt(norm / norms[4])  # kappa / 2 = 1
            assert layer.losses[bits] == pytest.approx(curvature * norm / 2 + second, rel=1e-6)


def test_losses_of_pairwise_sum_to_what_the_quadratic_part_of_the_loss_does():
    net = Joint(5, 3, 4).double()
    matrix = coupled(net, [1.0, 7.0, 2.0], {(0, 1): 9.0, (0, 2): 0.7})
    table = score_layers(net, "pairwise", ONES, loss_fn=quadratic(matrix), **EVERYTHING)
    d = torch.cat(deltas(net))
    assert sum(layer.losses[4] for layer in table.layers.values()) == pytest.approx(float(d @ matrix @ d / 2))


@pytest.mark.parametrize(("couplings", "kappa"), [({}, 1.0), ({(0, 1): 1.5, (1, 2): 3.0}, 0.0)])
def test_without_interactions_pairwise_is_half_of_hawq(couplings, kappa):
    net = Joint(5, 3, 4).double()
    loss = quadratic(coupled(net, [1.0, 7.0, 2.0], couplings))
    hawq = score_layers(net, "hawq-v2", ONES, loss_fn=loss, **EVERYTHING)
    table = score_layers(net, "pairwise", ONES, loss_fn=loss, kappa=kappa, **EVERYTHING)
    for name, layer in table.layers.items():
        assert layer.losses == pytest.approx({b: value / 2 for b, value in hawq.layers[name].losses.items()})


def test_a_strongly_coupled_pair_changes_the_order():
    net = Joint(5, 5, 5).double()
    norms = [float(d.square().sum()) for d in deltas(net)]
    # Alone, quantizing the first two layers costs less than the third; together it costs more.
    matrix = coupled(net, [2 / norms[0], 4 / norms[1], 6 / norms[2]], {(0, 1): 20.0})
    loss = quadratic(matrix)
    hawq = score_layers(net, "hawq-v2", ONES, loss_fn=loss, **EVERYTHING)
    table = score_layers(net, "pairwise", ONES, loss_fn=loss, **EVERYTHING)
    alone = sorted(hawq.layers, key=lambda name: hawq.layers[name].losses[4])
    assert alone == ["parts.0", "parts.1", "parts.2"]
    assert table.order() == ["parts.2", "parts.0", "parts.1"]


def test_loss_increase_is_what_switching_one_layer_does(net):
    table = score_layers(net, "loss-increase", images(), bits=(8, 4, 2))
    converted = convert_(deepcopy(net), (8, 4, 2), batch_norm="shared").eval()
    for layer in quantized_layers(converted).values():
        layer.input_quantizer.train()
    for b in (8, 4, 2):
        switch_to(converted, b)(images()[0][0])  # sets the scales of the inputs
    converted.eval()

    def loss(plan: dict[str, int]) -> float:
        switch_to(converted, plan)
        with torch.no_grad():
            return float(sum(F.cross_entropy(converted(x), y) for x, y in images())) / 2

    start = loss(dict.fromkeys(LAYERS, 8))
    assert table.details["loss at highest bits"] == pytest.approx(start)
    raw = {}
    for name, bits in LAYERS.items():
        for b in bits[1:]:
            raw[name, b] = loss(dict.fromkeys(LAYERS, 8) | {name: b}) - start
            assert table.layers[name].losses[b] == pytest.approx(max(raw[name, b], 1e-6), abs=1e-6)
        assert table.layers[name].losses[8] == 0
        assert table.layers[name].importance == table.layers[name].losses[bits[-1]]
    assert min(raw.values()) < 0 < max(raw.values())  # else the clamp was not tested


def test_loss_increase_can_be_a_drop_of_accuracy(net):
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(30):
        sum(F.cross_entropy(net(x), y) for x, y in images(16, batch=16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    table = score_layers(net, "loss-increase", images(16), bits=(8, 2), measure="accuracy")
    drops = [layer.losses[2] for layer in table.layers.values() if 2 in layer.losses]
    assert all(drop == 1e-6 or round(drop * 16, 6) == round(drop * 16) for drop in drops)
    assert max(drops) > 1e-6
    with pytest.raises(ValueError, match="accuracy needs integer classes"):
        score_layers(net, "loss-increase", [(x, F.one_hot(y, 3).float()) for x, y in images()], measure="accuracy")


def test_lim_of_known_blocks():
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lim_score(x, x), -torch.ones(5))
    assert torch.allclose(lim_score(x, -x), torch.ones(5))
    other = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    scale = (x * other).flatten(1).sum(1) / x.flatten(1).square().sum(1)
    orthogonal = other - scale.view(-1, 1, 1, 1) * x
    assert torch.allclose(lim_score(x, orthogonal), torch.zeros(5), atol=1e-6)
    assert torch.allclose(lim_score(100 * x, 0.01 * other), lim_score(x, other))
    with pytest.raises(ValueError, match="one shape"):
        lim_score(x, x[:, :2])


def test_centring_undoes_an_offset():
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    y = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    offset = torch.arange(4.0).view(4, 1, 1) + 50
    assert (lim_score(x + offset, y + offset) < -0.9).all()
    moved = lim_score(x + offset, y - offset, channel_dim=1)
    assert torch.allclose(moved, lim_score(x, y, channel_dim=1), atol=1e-4)
    assert (moved.abs() < 0.5).all()


def test_lim_of_a_network(net):
    for parameter in net.blocks[0].norm.parameters():
        nn.init.zeros_(parameter)  # the first block hands its input on
    table = score_layers(net, "lim", images())
    importance = {name: layer.importance for name, layer in table.layers.items()}
    assert importance["blocks.0.conv"] == pytest.approx(-1)
    assert -1 < importance["blocks.1.conv"] < 1
    assert importance["blocks.2.conv"] == importance["hidden"] == math.inf
    assert table.order()[-2:] == ["blocks.2.conv", "hidden"]
    assert table.layers["blocks.0.conv"].losses[4] == pytest.approx(0, abs=1e-6)
    others = sum(layer.losses[min(layer.losses)] for layer in table.layers.values() if layer.importance < math.inf)
    assert table.layers["hidden"].losses[4] == pytest.approx(2 * others)
    assert table.layers["hidden"].losses[8] < 0.1 * table.layers["hidden"].losses[4]

    with torch.no_grad():
        x = net.eval().blocks[0](net.stem(torch.cat([x for x, _ in images()])))
        by_hand = -F.cosine_similarity(x.flatten(1), net.blocks[1](x).flatten(1))
    assert importance["blocks.1.conv"] == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert table.layers["blocks.1.conv"].error == pytest.approx(float(by_hand.std()) / math.sqrt(8), rel=1e-4)


def test_an_activation_in_place_does_not_change_the_input_that_lim_sees():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.relu_(x))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), InPlace(), InPlace(), nn.Linear(8, 3))
    x, y = toy_data(16).tensors
    table = score_layers(net, "lim", [(x, y)])
    with torch.no_grad():
        entering = net[0](x)
        by_hand = lim_score(entering, net[1].linear(entering.relu())).mean()
    assert table.layers["1.linear"].importance == pytest.approx(float(by_hand), abs=1e-6)


def test_zd_of_gaussian_weights():
    weight = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    assert zd_score(weight) == pytest.approx(0.3173, abs=3 / math.sqrt(weight.numel()))
    assert zd_score(3 * weight + 5, two_sided=False) == pytest.approx(0.1587, abs=3 / math.sqrt(weight.numel()))
    assert zd_score(weight**3) < zd_score(weight)  # heavy tails
    assert zd_score(torch.full((3, 3), 0.1)) == -math.inf
    with pytest.raises(ValueError, match="finite"):
        zd_score(torch.tensor([1.0, math.nan]))


def test_zd_of_a_network(net):
    table = score_layers(net, "zd")  # no data, hence no blocks
    for name, layer in table.layers.items():
        assert layer.importance == pytest.approx(1 - zd_score(net.get_submodule(name).weight))
        assert layer.macs is None
    one_sided = score_layers(net, "zd", two_sided=False)
    assert one_sided.layers["hidden"].importance > table.layers["hidden"].importance
    whole = score_layers(net, "zd", blocks=["blocks"])
    shares = [zd_score(block.conv.weight) for block in net.blocks]
    assert whole.layers["blocks.1.conv"].importance == pytest.approx(1 - sum(shares) / 3)
    assert whole.layers["hidden"].importance == table.layers["hidden"].importance


def test_constant_weights_are_lowered_last(net):
    nn.init.constant_(net.hidden.weight, 0.25)
    table = score_layers(net, "zd")
    assert table.layers["hidden"].importance == math.inf
    assert table.order()[-1] == "hidden"
    assert all(math.isfinite(loss) for loss in table.layers["hidden"].losses.values())
    assert "hidden" in table.details["sensitive"]


def blocks_of(net: nn.Module, size: int = 32) -> dict[str, str]:
    layers = quantized_layers(convert_(deepcopy(net), (8, 4)))
    return find_blocks(net, layers, keeps_shape(net.eval(), torch.rand(1, 3, size, size)))


def test_blocks_of_networks_that_are_not_ours():
    found = blocks_of(resnet18(num_classes=3))
    assert found["layer1.0.conv2"] == "layer1.0"
    assert found["layer2.0.downsample.0"] == "layer2.0"
    found = blocks_of(mobilenet_v3_small(num_classes=3))
    assert found["features.1.block.1.fc1"] == "features.1"
    assert found["features.5.block.1.0"] == "features.5"
    assert found["classifier.0"] == "classifier.0"
    found = blocks_of(VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3))
    assert found["encoder.layers.encoder_layer_1.mlp.3"] == "encoder.layers.encoder_layer_1"
    assert set(blocks_of(resnet20(width=4)).values()) == {f"stages.{s}.{b}" for s in range(3) for b in range(3)}


def test_blocks_can_be_named(net):
    keeps = keeps_shape(net, torch.rand(1, 3, 8, 8))
    assert find_blocks(net, LAYERS, keeps, patterns=["blocks.?"])["blocks.2.conv"] == "blocks.2"
    assert set(find_blocks(net, LAYERS, keeps, patterns=()).values()) == set(LAYERS)
    with pytest.raises(ValueError, match=r"no module matches 'stages.\*'"):
        score_layers(net, "lim", images(), blocks=["stages.*"])
    single = nn.Sequential(nn.Conv2d(3, 4, 1), Block(4, 4), nn.Conv2d(4, 2, 1))  # a class that is there once
    assert find_blocks(single, ["1.conv"], keeps_shape(single, torch.rand(1, 3, 8, 8))) == {"1.conv": "1"}


@pytest.mark.parametrize("make", [resnet18, mobilenet_v3_small])
def test_networks_that_are_not_ours(make):
    torch.manual_seed(0)
    net = make(num_classes=3)
    names = list(quantized_layers(convert_(deepcopy(net), (8, 4))))
    for method in ("lim", "zd"):
        table = score_layers(net, method, images(2, 32))
        assert list(table.layers) == names
        assert all(math.isfinite(loss) for layer in table.layers.values() for loss in layer.losses.values())
    if make is mobilenet_v3_small:
        assert table.layers["features.5.block.1.0"].losses.keys() == {8}  # depthwise


def test_lim_warns_where_it_has_little_to_compare():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match="1 of 1 layers .* different shapes; .* another score"):
        table = score_layers(net, "lim", [toy_data(8).tensors])
    assert table.layers["2"].importance == math.inf
    assert table.layers["2"].losses[4] == 1  # there is no other layer whose losses it could be measured by


def test_a_users_module_with_dictionaries_and_an_iterator():
    torch.manual_seed(0)
    module = TorchvisionModule()
    loader = DataLoader(DictImages(), batch_size=2)
    table = score_layers(
        module,
        "loss-increase",
        islice(iter(loader), 2),
        batch_fn=image_and_label,
        include=["backbone.features.1.*"],
    )
    assert table.details["num_samples"] == 4
    assert all(name.startswith("backbone.features.1.") for name in table.layers)
    with pytest.raises(TypeError, match="pass batch_fn"):
        score_layers(module, "lim", loader)


def test_a_converted_network_keeps_its_layers_and_bits(net):
    converted = convert_(deepcopy(net), (8, 6, 4), exclude=["hidden"])
    switch_to(converted, 6)
    before = weights(converted)
    table = score_layers(converted, "hawq-v2", images(), num_probes=10)
    assert {name: tuple(layer.losses) for name, layer in table.layers.items()} == {
        "blocks.0.conv": (8, 6, 4),
        "blocks.1.conv": (8,),
        "blocks.2.conv": (8, 6, 4),
    }
    plain = score_layers(net, "hawq-v2", images(), bits=(8, 6, 4), exclude=["hidden"], num_probes=10)
    for name, layer in table.layers.items():
        assert layer.losses == pytest.approx(plain.layers[name].losses)
    assert_same_weights(converted, before)
    assert set(active_plan(converted).values()) == {8, 6}
    some = score_layers(converted, "loss-increase", images(), bits=(6, 4))
    assert [tuple(layer.losses) for layer in some.layers.values()] == [(6, 4), (8,), (6, 4)]
    with pytest.raises(ValueError, match=r"among the model's precisions \[8, 6, 4\], got \[2\]"):
        score_layers(converted, "random", bits=(8, 2))
    with pytest.raises(ValueError, match="converted already, so include cannot apply"):
        score_layers(converted, "random", include=["hidden"])


def test_a_packed_network_has_no_weights_to_score(net, tmp_path):
    converted = convert_(deepcopy(net), (8, 4))
    for b in (8, 4):
        switch_to(converted.train(), b)(images()[0][0])
    path = tmp_path / "net.safetensors"
    save_packed(converted, path)
    with pytest.raises(ValueError, match="no fp32 weights; score the one it was made from"):
        score_layers(load_packed(path, net), "random")


def test_pruned_and_parametrized_weights_are_scored_as_they_are_used(net):
    prune.l1_unstructured(net.hidden, "weight", 0.5)
    parametrizations.weight_norm(net.blocks[0].conv)
    table = score_layers(net, "hawq-v2", images(), num_probes=10)
    torch.manual_seed(0)
    baked = Net()  # the same weights as net's
    prune.l1_unstructured(baked.hidden, "weight", 0.5)
    prune.remove(baked.hidden, "weight")
    parametrizations.weight_norm(baked.blocks[0].conv)
    torch.nn.utils.parametrize.remove_parametrizations(baked.blocks[0].conv, "weight")
    wanted = score_layers(baked, "hawq-v2", images(), num_probes=10)
    for name, layer in wanted.layers.items():
        assert table.layers[name].losses == pytest.approx(layer.losses)
    assert prune.is_pruned(net.hidden)
    assert torch.nn.utils.parametrize.is_parametrized(net.blocks[0].conv)


def test_inverted_exchanges_first_and_last():
    table = SensitivityTable(
        "by hand",
        {
            "a": LayerSensitivity(math.inf, {8: 1.0, 4: 4.0}, num_weights=1),
            "b": LayerSensitivity(2.0, {8: 0.0, 4: 3.0}, num_weights=1),
            "c": LayerSensitivity(-1.0, {8: 0.0, 4: 0.0}, num_weights=1),
        },
    )
    wrong = inverted(table)
    assert wrong.method == "inverted by hand"
    assert wrong.order() == ["a", "b", "c"]
    assert [layer.losses for layer in wrong.layers.values()] == [{8: 0.0, 4: 0.0}, {8: 0.0, 4: 3.0}, {8: 0.0, 4: 0.0}]


def test_evaluate_plan_gives_loss_and_accuracy_and_the_bits_back(net):
    converted = convert_(net, (8, 4)).train()
    plan = {name: 8 if 4 not in bits or name == "hidden" else 4 for name, bits in LAYERS.items()}
    with torch.no_grad():
        outputs = [switch_to(converted.eval(), plan)(x) for x, _ in images(7)]
        switch_to(converted.train(), 8)
    losses = [float(F.cross_entropy(o, y, reduction="sum")) for o, (_, y) in zip(outputs, images(7), strict=True)]
    right = [int((o.argmax(1) == y).sum()) for o, (_, y) in zip(outputs, images(7), strict=True)]
    loss, accuracy = evaluate_plan(converted, plan, iter(images(7)))
    assert loss == pytest.approx(sum(losses) / 7)  # batches of 4 and of 3
    assert accuracy == sum(right) / 7
    assert set(active_plan(converted).values()) == {8}
    assert converted.training
    _, unknown = evaluate_plan(converted, 4, [(x, torch.rand(4, 3)) for x, _ in images()], nn.MSELoss())
    assert math.isnan(unknown)
    with pytest.raises(ValueError, match="batches is empty"):
        evaluate_plan(converted, 4, iter(()))
    with pytest.raises(ValueError, match="convert_ it first"):
        evaluate_plan(Net(), 4, images())


def test_wrong_use_says_what_to_do(net):
    with pytest.raises(ValueError, match="method must be one of 'hawq-v1', .*'random', got 'hawq'"):
        score_layers(net, "hawq")
    for method in set(METHODS) - {"zd", "random"}:
        with pytest.raises(ValueError, match=f"'{method}' needs batches"):
            score_layers(net, method)
    with pytest.raises(ValueError, match="batches is empty; an iterator that was read before"):
        score_layers(net, "lim", iter(()))
    with pytest.raises(ValueError, match="leave out 32"):
        score_layers(net, "random", bits=(32, 8))
    with pytest.raises(ValueError, match="different precisions of 2 to 8"):
        score_layers(net, "random", bits=(9, 4))
    with pytest.raises(ValueError, match="kappa must be at least 0"):
        score_layers(net, "pairwise", images(), kappa=-1.0)
    with pytest.raises(ValueError, match="estimator must be one of 'hvp', 'measured'"):
        score_layers(net, "pairwise", images(), estimator="exact")
    with pytest.raises(TypeError, match=r"include must be a list of patterns.*\['hidden'\]"):
        score_layers(net, "random", include="hidden")


@pytest.mark.parametrize("method", [*HAWQ, "loss-increase", "pairwise", "lim"])
def test_a_loss_that_is_no_number_is_refused(net, method):
    nn.init.constant_(net.stem.bias, math.nan)
    with pytest.raises(ValueError, match="loss|not a number|must be a number"):
        score_layers(net, method, images())
