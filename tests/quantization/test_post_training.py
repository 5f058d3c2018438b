"""CalibTIP: each step against a slow reference or a closed form, and the whole on real digits."""

from __future__ import annotations

import itertools
import warnings
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_plugins.data import DigitsDataModule
from lightning_plugins.quantization import (
    BitPlan,
    convert_,
    load_packed,
    quantized_layers,
    save_packed,
    switch_,
    to_deploy,
)
from lightning_plugins.quantization.adaquant import LearningRates, _tails, adaquant_
from lightning_plugins.quantization.post_training import PostTrainingReport, post_training_quantize
from lightning_plugins.quantization.retuning import reestimate_batch_norms_, tune_biases_
from lightning_plugins.quantization.scale_calibration import calibrate_scales_
from toys import assert_same_weights, weights

pytestmark = pytest.mark.filterwarnings("ignore:AdaQuant may overfit")


@pytest.fixture(autouse=True)
def few_bias_steps(monkeypatch):
    """The pipeline's 600 steps would be most of the time here."""
    monkeypatch.setitem(tune_biases_.__kwdefaults__, "num_steps", 40)


class Digits(nn.Module):
    """A convolution with its norm, a depthwise one, a grouped sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 4, 10)

    def forward(self, images):
        hidden = self.depthwise(self.stem(images))
        hidden = F.relu(self.norm(self.point(hidden)))
        return self.fc(F.avg_pool2d(hidden, 4).flatten(1))


@pytest.fixture(scope="module")
def digits():
    """Trained weights, calibration batches and test data of real digits."""
    data = DigitsDataModule(val_fraction=0.0)
    data.setup()
    images = torch.stack([data.train_set[i][0] for i in range(len(data.train_set))])
    labels = torch.tensor([data.train_set[i][1] for i in range(len(data.train_set))])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Digits()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(4):
            for rows in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(images[rows]), labels[rows]).backward()
                optimizer.step()
    test = [(images[1000:], labels[1000:])]
    return net.eval(), list(zip(images[:320].split(64), labels[:320].split(64), strict=True)), test


def converted(net, bits=(8, 4, 2, 32), **arguments):
    return convert_(deepcopy(net), bits, **{"first_last_bits": 2, "depthwise_bits": 2} | arguments)


def linear(*, bias=True, n=60):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=bias))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net, [torch.randn(n // 2, 6, generator=generator) for _ in range(2)]


# Scales


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_weight_scales_have_the_least_error_among_many(digits, bits):
    net = calibrate_scales_(converted(digits[0], (bits, 32)), digits[1], bits)
    layer = net.point
    found = (layer.quantized_weight() - layer.weight).square().flatten(1).sum(1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest = torch.maximum(layer.weight.flatten(1).amax(1) / high, layer.weight.flatten(1).amin(1) / low)
    for fraction in torch.linspace(0.1, 1.0, 91):  # the candidates themselves: the error is ragged in between
        step = (fraction * widest)[:, None, None, None]
        other = ((layer.weight / step).round().clamp(low, high) * step - layer.weight).square().flatten(1).sum(1)
        assert (found <= other * 1.001 + 1e-9).all()


def test_input_scales_cover_what_goes_in_and_know_its_sign(digits):
    net = calibrate_scales_(converted(digits[0]), digits[1], 4)
    assert not net.point.input_quantizer.is_ready(8)  # only the plan's precision is set
    assert net.depthwise.input_quantizer._signed is False  # behind a ReLU
    assert net.point.input_quantizer._signed is True  # behind a convolution
    inputs = digits[1][0][0]
    seen = []
    handle = net.fc.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    switch_(net, 32)(inputs)
    handle.remove()
    quantizer = net.fc.input_quantizer
    error = (quantizer(seen[0], 4) - seen[0]).square().mean()
    assert error < 0.02 * seen[0].square().mean()


def test_zero_is_exact_after_everything(digits):
    net = converted(digits[0])
    post_training_quantize(net, digits[1], 4, num_steps=5)
    for layer in quantized_layers(net).values():
        assert (layer.input_quantizer(torch.zeros(3), 4) == 0).all()


def test_quantizers_of_residual_sums_are_set_too():
    from lightning_plugins.models import resnet20

    net = convert_(resnet20(in_channels=1, width=2).eval(), (4, 32), quantize_residual=True)
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate_scales_(net, [images], 4)
    assert all(
        module.residual_quantizer.is_ready(8) for module in net.modules() if "residual_quantizer" in module._modules
    )


# AdaQuant


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("bits", [4, 2])
def test_no_layer_gets_worse_and_most_get_better(digits, mode, bits):
    net = calibrate_scales_(converted(digits[0]), digits[1], bits)
    errors = adaquant_(net, digits[1], bits, mode=mode, num_steps=60)
    assert list(errors) == ["stem.0", "depthwise", "point", "fc"]
    assert all(after <= before for before, after in errors.values())
    assert sum(after for _, after in errors.values()) < 0.9 * sum(before for before, _ in errors.values())


def test_the_error_is_that_of_held_out_rows_behind_norm_and_relu(digits):
    """Repeated by hand: quantized and full-precision layer, batch norm and ReLU, the last fifth of the images."""
    net, batches, _ = digits
    quantized = calibrate_scales_(converted(net), batches, 4)
    start, _ = adaquant_(deepcopy(quantized), batches, 4, num_steps=0)["point"]
    images = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        hidden = net.depthwise(net.stem(images))
        wanted, got = (F.relu(net.norm(layer(hidden))) for layer in (net.point, quantized.point))
    held = len(images) // 5
    by_hand = (got - wanted)[-held:].square().mean() / wanted[:-held].square().mean()
    assert start == pytest.approx(by_hand.item(), rel=1e-4)


def test_it_finds_tails_that_torch_writes_as_modules_functions_and_methods():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))
            self.relu = nn.ReLU()

        def forward(self, x):
            x = F.relu(self.b(self.relu(self.a(x))))
            x = self.c(x).relu()
            return F.gelu(self.d(x))

    tails = _tails(convert_(Net(), (8, 32), first_last_bits=8))
    assert {name: tail(torch.tensor([-1.0])).item() for name, tail in tails.items()} == {
        "a": 0,
        "b": 0,
        "c": 0,
        "d": -1,
    }


def test_weights_on_the_grid_stay_there():
    net, _ = linear()
    layer = net[0]
    codes = torch.randint(-8, 8, layer.weight.shape, generator=torch.Generator().manual_seed(1)).float()
    codes[:, 0] = 7
    layer.weight.data = codes * 0.25
    convert_(net, (4, 32), first_last_bits=4, quantize_inputs=False)
    layer.weight_scale.data.fill_(0.25)
    inputs = [torch.randn(50, 6, generator=torch.Generator().manual_seed(2))]
    before = weights(net)
    calibrate_scales_(net, inputs, 4)
    assert adaquant_(net, inputs, 4, num_steps=50) == {"0": (0.0, 0.0)}
    assert_same_weights(before, net)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), (160, 4, 7)),
        (nn.Conv2d(4, 4, 3, groups=4), (160, 4, 6, 6)),
        (nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="reflect"), (160, 4, 6, 6)),
        (nn.Linear(4, 6), (160, 3, 4)),
    ],
    ids=["conv1d", "depthwise", "grouped", "tokens"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_layer(layer, shape, dtype):
    layer = deepcopy(layer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer.reset_parameters()
    net = convert_(nn.Sequential(layer).to(dtype), (3, 32), first_last_bits=3, depthwise_bits=3)
    # Values of one sample are alike, as they are in images; on white noise there is nothing to gain.
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
    inputs = (alike + 0.3 * torch.randn(shape, generator=generator)).to(dtype)
    calibrate_scales_(net, [inputs], 3)
    ((before, after),) = adaquant_(net, [inputs], 3, num_steps=60, learning_rates=LearningRates(weight=0.01)).values()
    assert after < 0.98 * before
    assert net[0].weight.dtype == dtype


def test_a_weight_may_move_by_more_than_a_step():
    net, inputs = linear(bias=False)
    convert_(net, (8, 32), first_last_bits=8, quantize_inputs=False)
    layer = net[0]
    calibrate_scales_(net, inputs, 8)
    reference = deepcopy(net)
    layer.weight.data += 5 * layer.weight_scale.data[:, None]
    start = layer.weight_codes()
    adaquant_(net, inputs, 8, num_steps=200, learning_rates=LearningRates(weight=0.1), reference=switch_(reference, 32))
    assert (layer.weight_codes().int() - start.int()).abs().max() > 1


def test_pruned_weights_stay_zero_and_shared_ones_stay():
    net, inputs = linear()
    net[0].weight.data[:, ::2] = 0
    convert_(net, (3, 32), first_last_bits=3)
    calibrate_scales_(net, inputs, 3)
    adaquant_(net, inputs, 3, num_steps=30, learning_rates=LearningRates(weight=0.01))
    assert (net[0].weight[:, ::2] == 0).all()

    shared = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    shared[1].weight = shared[0].weight
    convert_(shared, (3, 32), first_last_bits=3)
    before = shared[0].weight.detach().clone()
    adaquant_(shared, [torch.rand(40, 5)], 3, num_steps=30)
    assert torch.equal(shared[0].weight, before)


def test_modes_and_seeds(digits):
    def run(**arguments):
        net = converted(digits[0])
        adaquant_(net, digits[1], 2, num_steps=10, **arguments)
        return weights(net)

    first = run(mode="parallel", seed=3)
    assert_same_weights(first, run(mode="parallel", seed=3))
    for other in run(mode="parallel", seed=4), run(mode="sequential", seed=3):
        assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_it_leaves_what_it_borrows(digits):
    net = converted(digits[0])
    net.norm.train()
    net.fc.weight.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    post_training_quantize(net, digits[1], 4, num_steps=3)
    assert torch.equal(torch.rand(3), expected)
    assert modes == [module.training for module in net.modules()]
    assert flags == {name: p.requires_grad for name, p in net.named_parameters()}
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_memory_limit_trims_or_refuses(digits):
    net = converted(digits[0])
    row = 4 * (1 * 64 + 8 * 64)  # the first layer's input and output
    with pytest.warns(UserWarning, match="raise memory_limit"):
        adaquant_(net, digits[1], 4, num_steps=1, memory_limit=200 * row)
    with pytest.raises(ValueError, match="memory_limit=1,000 must be raised"):
        adaquant_(net, digits[1], 4, num_steps=1, memory_limit=1000)


def test_few_samples_are_warned_of_once(digits):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adaquant_(converted(digits[0]), [digits[1][0]], 4, num_steps=0)
    (warning,) = [str(w.message) for w in caught if "overfit" in str(w.message)]
    assert "1 of 4 layers" in warning  # 64 images; only the linear layer has more than 32 weights to an output


# Batch normalisations


def test_statistics_are_means_over_batches_of_the_precision_in_use_alone(digits):
    net = switch_(converted(digits[0]), 4)
    calibrate_scales_(net, digits[1], 4)
    before = weights(net)
    reestimate_batch_norms_(net, digits[1])
    after = weights(net)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"{norm}.norms.4.{key}"
        for norm in ("stem.1", "norm")
        for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    outputs = [net.stem[0](x).detach() for x, _ in digits[1]]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(after["stem.1.norms.4.running_mean"], mean)
    torch.testing.assert_close(after["stem.1.norms.4.running_var"], var)
    assert net.norm.norms["4"].momentum == 0.1


def test_plain_norms_are_reestimated_too_and_bad_data_change_nothing(digits):
    net = deepcopy(digits[0])
    before = weights(net)
    with pytest.raises(ValueError, match="not finite"):
        reestimate_batch_norms_(net, [torch.full((4, 1, 8, 8), torch.nan)])
    assert_same_weights(before, net)
    reestimate_batch_norms_(net, digits[1])
    assert not torch.equal(net.norm.running_mean, before["norm.running_mean"])


# Biases


def test_biases_move_towards_the_wanted_predictions(digits):
    net = calibrate_scales_(converted(digits[0]), digits[1], 2)
    wanted = torch.cat([digits[0](x) for x, _ in digits[1]]).detach()
    before = weights(net)
    first, last = tune_biases_(net, digits[1], wanted, num_steps=60)
    assert last < first
    images = torch.cat([x for x, _ in digits[1]])[-64:]
    p, q = wanted[-64:].log_softmax(1), net(images).log_softmax(1)
    assert last == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-3)
    changed = {name for name, value in weights(net).items() if not torch.equal(before[name], value)}
    assert changed == {"stem.1.norms.2.bias", "depthwise.bias", "norm.norms.2.bias", "fc.bias", "fc.weight"}


def test_too_large_a_rate_keeps_the_start(digits):
    net = calibrate_scales_(converted(digits[0]), digits[1], 4)
    wanted = torch.cat([digits[0](x) for x, _ in digits[1]]).detach()
    before = weights(net)
    first, last = tune_biases_(net, digits[1], wanted, num_steps=5, learning_rate=1e4)
    assert first == last
    assert_same_weights(before, net)


# All of it


def test_the_pipeline_recovers_two_bits_on_digits(digits):
    net, batches, test = digits
    quantized = converted(net)
    report = post_training_quantize(quantized, batches, 2, num_steps=100, evaluation=test)
    assert list(report.stages) == ["full precision", "naive", "adaquant", "batch norms", "biases"]
    full, naive, final = (report.stages[name] for name in ("full precision", "naive", "biases"))
    assert full.accuracy > 0.9
    assert final.loss < 0.7 * naive.loss
    assert final.accuracy > naive.accuracy
    images, labels = test[0]
    assert final.accuracy == pytest.approx((quantized(images).argmax(1) == labels).float().mean().item())
    assert final.loss == pytest.approx(F.cross_entropy(quantized(images), labels).item(), rel=1e-5)
    assert "naive" in str(report)
    assert len(report.figure().axes[0].patches) == 5


def test_a_mixed_plan_packs_and_deploys(digits, tmp_path):
    net = converted(digits[0])
    plan = BitPlan({"stem.0": 8, "depthwise": 8, "point": 2, "fc": 4})
    report = post_training_quantize(net, digits[1], plan, num_steps=5)
    assert report.plan == plan
    path = save_packed(net, tmp_path / "net.safetensors", plan=plan)
    images = digits[2][0][0][:50]
    expected = net.eval()(images)
    assert torch.equal(load_packed(path, Digits())(images), expected)
    torch.testing.assert_close(to_deploy(net, plan)(images), expected, rtol=1e-4, atol=1e-4)


def test_layers_at_32_bits_are_left_alone(digits):
    net = converted(digits[0])
    before = net.fc.weight.detach().clone()
    plan = BitPlan({"stem.0": 8, "depthwise": 8, "point": 4, "fc": 32})
    assert list(adaquant_(net, digits[1], plan, num_steps=3)) == ["stem.0", "depthwise", "point"]
    assert torch.equal(net.fc.weight, before)


@pytest.mark.parametrize("pipeline", ["light", "full"])
def test_the_integer_programme_is_the_best_of_all_plans(digits, pipeline):
    net = converted(digits[0], (8, 2, 32))
    report = post_training_quantize(net, digits[1], budget=5.0, pipeline=pipeline, num_steps=20)
    table = report.table
    assert table.method == "calibtip"
    sizes = {name: layer.num_weights for name, layer in table.layers.items()}
    best = min(
        sum(table.layers[name].losses[b] for name, b in zip(sizes, plan, strict=True))
        for plan in itertools.product((8, 2), repeat=4)
        if sum(n * b for n, b in zip(sizes.values(), plan, strict=True)) <= 5.0 * sum(sizes.values())
    )
    assert report.predicted_increase == pytest.approx(best)
    assert report.average_bits <= 5.0
    assert all(layer.losses[8] == 0 and layer.losses[2] >= 1e-6 for layer in table.layers.values())
    assert table.layers["point"].macs == 8 * 16 * 64
    assert "predicted" in str(report)
    assert list(report.stages)[:2] == ["full precision", "naive at 2 bits"]


def test_the_table_is_the_loss_of_one_layer_alone(digits):
    """With the light pipeline a layer at 2 bits is a layer whose scales were set for 2 bits."""
    net = converted(digits[0], (8, 2, 32), batch_norm="shared")
    report = post_training_quantize(net, digits[1], budget=8.0, pipeline="light")
    high, low = (calibrate_scales_(converted(digits[0], (8, 2, 32), batch_norm="shared"), digits[1], b) for b in (8, 2))
    images, labels = torch.cat([x for x, _ in digits[1]]), torch.cat([y for _, y in digits[1]])
    base = F.cross_entropy(high(images), labels).item()
    high.fc.load_state_dict(low.fc.state_dict())
    high.fc.input_quantizer.load_state_dict(low.fc.input_quantizer.state_dict())
    high.fc.num_bits = 2
    increase = F.cross_entropy(high(images), labels).item() - base
    assert report.table.layers["fc"].losses[2] == pytest.approx(increase, rel=1e-3)


def test_a_torchvision_net_goes_through_the_light_pipeline():
    from torchvision.models import mobilenet_v3_small

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = mobilenet_v3_small(num_classes=3).eval()
    convert_(net, (8, 4, 32), first_last_bits=8)
    batches = [(torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)]
    report = post_training_quantize(net, batches, 4, pipeline="light")
    assert list(report.stages) == ["full precision", "naive", "batch norms"]
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_arguments_are_checked(digits):
    net, batches, _ = digits
    fine = converted(net)
    for arguments in {}, {"plan": 4, "budget": 4.0}:
        with pytest.raises(ValueError, match="either plan or budget"):
            post_training_quantize(fine, batches, **arguments)
    with pytest.raises(ValueError, match="convert_ it first"):
        post_training_quantize(deepcopy(net), batches, 4)
    with pytest.raises(ValueError, match=r"convert it with 32 among them"):
        adaquant_(converted(net, (8, 4)), batches, 4)
    with pytest.raises(ValueError, match="mode must be"):
        adaquant_(fine, batches, 4, mode="both")
    with pytest.raises(ValueError, match="no calibration batches"):
        calibrate_scales_(fine, [], 4)
    with pytest.raises(ValueError, match="at least 2 samples"):
        adaquant_(fine, [batches[0][0][:1]], 4)
    with pytest.raises(ValueError, match="one target for each row"):
        post_training_quantize(fine, [batches[0][0]], 4)
    with pytest.raises(ValueError, match="one row for each of the 320"):
        tune_biases_(fine, batches, torch.zeros(3, 10))
    with pytest.raises(ValueError, match="learning rate of bias"):
        LearningRates(bias=-1.0)
    with pytest.raises(ValueError, match="pipeline must be"):
        post_training_quantize(fine, batches, 4, pipeline="heavy")
    nn.utils.prune.l1_unstructured(fine.fc, "weight", 0.5)
    with pytest.raises(ValueError, match="make it permanent"):
        adaquant_(fine, batches, 4)


def test_a_report_prints_without_a_table():
    assert "average bits" in str(PostTrainingReport(BitPlan({"a": 4}), 4.0, {}))
