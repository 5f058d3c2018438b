from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

from lightning_plugins.hessian import (
    Estimate,
    hessian_trace,
    hessian_vector_product,
    hessian_vector_products,
    leading_eigenvalues,
    top_eigenvalue,
)
from toys import toy_data

Batches = list[tuple[Tensor, Tensor]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Return the model in float64 with weights that do not depend on the global random state."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.double().parameters():
        fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
        parameter.data = scale * fan**-0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def conv_net(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """A net with everything that is piecewise linear, on 2 x 6 x 6 images and 3 classes."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 0.5, 1.5])
    layers = [nn.Conv2d(2, 4, 3), norm, activation(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), activation(), nn.Dropout()]
    return seeded(nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, 3)), 2.0)


def images(n: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    return draw(n, 2, 6, 6, seed=seed), torch.arange(n) % 3


def linear_regression() -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Batches, Tensor]:
    """Return a model of one layer, its loss ``|X W^T - Y|^2 / (2 N)``, the data and ``X^T X / N``."""
    inputs, targets = draw(40, 6), draw(40, 3, seed=1)
    model = seeded(nn.Sequential(nn.Linear(6, 3)))
    return model, halved_squares, [(inputs, targets)], inputs.T @ inputs / 40


def halved_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1).mean() / 2


def blocks(model: nn.Module, loss_fn: Any, batches: Batches, names: tuple[str, ...]) -> dict[tuple[str, str], Tensor]:
    """The Hessian by brute force: its blocks as matrices."""
    model = copy.deepcopy(model).eval()
    state = dict(model.named_parameters())
    weights = tuple(state[f"{name}.weight"].detach() for name in names)
    total = sum(len(targets) for _, targets in batches)

    def loss(*values: Tensor) -> Tensor:
        replaced = state | {f"{name}.weight": value for name, value in zip(names, values, strict=True)}
        outputs = [torch.func.functional_call(model, replaced, (inputs,)) for inputs, _ in batches]
        parts = [loss_fn(o, t) * len(t) / total for o, (_, t) in zip(outputs, batches, strict=True)]
        return torch.stack(parts).sum()

    rows: Any = torch.autograd.functional.hessian(loss, weights)
    return {
        (first, second): rows[i][j].reshape(weights[i].numel(), weights[j].numel())
        for i, first in enumerate(names)
        for j, second in enumerate(names)
    }


def assert_within(estimate: Estimate, truth: Tensor | float, errors: float = 4.0) -> None:
    value = truth.item() if isinstance(truth, Tensor) else truth
    assert abs(estimate.value - value) <= errors * estimate.error + 1e-10 * abs(value), (estimate, value)


# Closed forms


@pytest.mark.parametrize("curvature", ["auto", "gauss_newton", "hessian"])
def test_the_trace_of_linear_regression(curvature: Any):
    model, loss_fn, batches, covariance = linear_regression()
    (estimate,) = hessian_trace(model, loss_fn, batches, curvature=curvature, num_probes=400, tolerance=0.01).values()
    assert_within(estimate, 3 * covariance.trace())
    assert estimate.error < 0.02 * estimate.value
    assert estimate.num_samples == 40
    assert estimate.curvature == ("hessian" if curvature == "hessian" else "gauss_newton")


@pytest.mark.parametrize("curvature", ["auto", "hessian"])
def test_the_top_eigenvalue_of_linear_regression(curvature: Any):
    model, loss_fn, batches, covariance = linear_regression()
    top = top_eigenvalue(model, loss_fn, batches, curvature=curvature, num_iterations=1000, tolerance=1e-15)["0"]
    assert top.value == pytest.approx(float(torch.linalg.eigvalsh(covariance)[-1]), rel=1e-10)
    assert top.error < 1e-5 * top.value


@pytest.mark.parametrize("curvature", ["auto", "hessian"])
def test_the_leading_eigenvalues_of_linear_regression(curvature: Any):
    model, loss_fn, batches, covariance = linear_regression()
    found = leading_eigenvalues(model, loss_fn, batches, 5, curvature=curvature, tolerance=0)["0"]
    expected = torch.linalg.eigvalsh(covariance).flip(0)[:2].repeat_interleave(3)[:5]  # one for each output
    assert [estimate.value for estimate in found] == pytest.approx(expected.tolist(), rel=1e-8)
    assert all(estimate.error < 1e-7 for estimate in found)


def test_a_negative_eigenvalue_of_largest_magnitude_is_found():
    model = seeded(nn.Sequential(nn.Linear(2, 1, bias=False)))
    inputs = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def saddle(outputs: Tensor, targets: Tensor) -> Tensor:
        return (targets * outputs.square()).mean() / 2

    batches = [(inputs, torch.tensor([[-1.0], [1.0]], dtype=torch.float64))]
    top = top_eigenvalue(model, saddle, batches, num_iterations=1000, tolerance=1e-14)["0"]
    assert top.value == pytest.approx(-4.5, rel=1e-6)
    assert top.curvature == "hessian"  # not convex in the outputs
    assert_within(hessian_trace(model, saddle, batches)["0"], -4.0)
    assert leading_eigenvalues(model, saddle, batches, 1)["0"][0].value == pytest.approx(-4.5, rel=1e-3)


# Against the Hessian by brute force


def test_where_the_net_is_piecewise_linear_gauss_newton_is_the_hessian():
    model, batches = conv_net(), [images()]
    truth = blocks(model, F.cross_entropy, batches, ("0", "4", "8"))
    for estimate, name in zip(hessian_trace(model, F.cross_entropy, batches).values(), "048", strict=True):
        assert estimate.curvature == "gauss_newton"
        assert_within(estimate, truth[name, name].trace())
    # Products decide to the last digits, which probes cannot.
    for curvature in ("gauss_newton", "hessian"):
        found = leading_eigenvalues(model, F.cross_entropy, batches, 3, curvature=curvature, tolerance=0)
        for name, estimates in found.items():
            expected = torch.linalg.eigvalsh(truth[name, name]).flip(0)[:3]
            assert [e.value for e in estimates] == pytest.approx(expected.tolist(), rel=1e-10), (curvature, name)


def test_what_bends_is_done_by_second_derivatives_and_only_that():
    model, batches = conv_net(nn.SiLU), [images()]
    truth = blocks(model, F.cross_entropy, batches, ("0", "4", "8"))
    estimates = hessian_trace(model, F.cross_entropy, batches, num_probes=200, tolerance=0.1)
    assert [e.curvature for e in estimates.values()] == ["hessian", "hessian", "gauss_newton"]
    for name, estimate in estimates.items():
        assert_within(estimate, truth[name, name].trace())
    forced = leading_eigenvalues(model, F.cross_entropy, batches, 1, curvature="gauss_newton", layers=["0"])["0"][0]
    assert forced.value != pytest.approx(float(torch.linalg.eigvalsh(truth["0", "0"])[-1]), rel=1e-3)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(8, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu()
        return self.last(self.shared(self.shared(hidden).relu()).relu())


def blobs(n: int = 24) -> tuple[Tensor, Tensor]:
    inputs, targets = toy_data(n).tensors
    return inputs.double(), targets


def test_a_weight_that_is_used_twice_is_noticed():
    model, batches = seeded(Twice(), 2.0), [blobs()]
    estimates = hessian_trace(model, F.cross_entropy, batches, num_probes=100)
    assert {name: e.curvature for name, e in estimates.items()} == {
        "first": "gauss_newton",
        "shared": "hessian",
        "last": "gauss_newton",
    }
    truth = blocks(model, F.cross_entropy, batches, ("first", "shared", "last"))
    for name, estimate in estimates.items():
        assert_within(estimate, truth[name, name].trace())


def test_attention_has_second_derivatives():
    model = seeded(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    batches = [(draw(4, 3, 8), draw(4, 3, 8, seed=1))]
    found = top_eigenvalue(model, nn.MSELoss(), batches, layers=["linear1", "linear2"], num_iterations=2)
    assert {e.curvature for e in found.values()} == {"hessian"}  # behind both is a layer normalisation


# Products


def test_products_equal_differences_of_gradients():
    model, batches = conv_net(nn.SiLU), [images(6), images(2, seed=3)]
    vector = {"0": draw(4, 2, 3, 3, seed=4), "8": draw(3, 3, seed=5)}
    products = hessian_vector_product(model, F.cross_entropy, batches, vector, layers=["0", "4", "8"])

    def gradient(step: float) -> list[Tensor]:
        moved = copy.deepcopy(model).eval()
        for name, part in vector.items():
            moved.get_submodule(name).weight.data += step * part
        losses = [F.cross_entropy(moved(x), y) * len(y) / 8 for x, y in batches]
        return list(torch.autograd.grad(sum(losses), [moved[i].weight for i in (0, 4, 8)]))

    for product, up, down in zip(products.values(), gradient(1e-5), gradient(-1e-5), strict=True):
        torch.testing.assert_close(product, (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_products_are_the_rows_of_the_whole_hessian():
    model, batches = conv_net(), [images()]
    truth = blocks(model, F.cross_entropy, batches, ("0", "4", "8"))
    vectors = [{"0": draw(4, 2, 3, 3)}, {"4": draw(3, 4, 2, 2)}, {}]
    found = hessian_vector_products(model, F.cross_entropy, batches, vectors, ["0", "4", "8"])
    for name in "048":
        torch.testing.assert_close(found[0][name].flatten(), truth[name, "0"] @ vectors[0]["0"].flatten())
        torch.testing.assert_close(found[1][name].flatten(), truth[name, "4"] @ vectors[1]["4"].flatten())
        assert not found[2][name].any()
    assert not found[0]["0"].requires_grad


def test_one_batch_equals_several_of_unequal_sizes():
    model, (inputs, targets) = conv_net(), images(9)
    whole, parts = [(inputs, targets)], [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    vector = {"0": draw(4, 2, 3, 3)}
    first, second = (hessian_vector_product(model, F.cross_entropy, b, vector)["0"] for b in (whole, parts))
    torch.testing.assert_close(first, second)
    for curvature in ("gauss_newton", "hessian"):
        first, second = (top_eigenvalue(model, F.cross_entropy, b, curvature=curvature) for b in (whole, parts))
        for name in first:
            assert first[name].value == pytest.approx(second[name].value, rel=1e-9)
        truth = blocks(model, F.cross_entropy, whole, ("0", "4", "8"))
        traces = hessian_trace(model, F.cross_entropy, parts, curvature=curvature, num_probes=60, chunk_size=3)
        for name, estimate in traces.items():
            assert_within(estimate, truth[name, name].trace())


# Losses


SOFT = F.softmax(draw(24, 3, seed=5), 1)
LOSSES: dict[str, tuple[Any, Tensor | None]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), None),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), None),
    "soft targets": (F.cross_entropy, SOFT),
    "unnormalised targets": (F.cross_entropy, 3 * SOFT * torch.arange(24)[:, None] / 24),
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double()), None),
    "ignored": (nn.CrossEntropyLoss(ignore_index=2), None),
    "likelihood": (lambda o, t: F.nll_loss(o.log_softmax(1), t), None),
    "temperature": (lambda o, t: F.cross_entropy(o / 2, t), None),
    "squares": (nn.MSELoss(), SOFT),
    "weighted squares": (lambda o, t: ((o - t).square() * torch.tensor([1.0, 2.0, 0.0])).mean(), SOFT),
    "binary": (F.binary_cross_entropy_with_logits, SOFT),
    "absolute": (F.l1_loss, SOFT),
    "norm": (lambda o, t: (1 + (o - t).square().sum(1)).sqrt().mean(), SOFT),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_convex_loss_has_gauss_newton_probes(name: str):
    loss_fn, targets = LOSSES[name]
    inputs, labels = blobs()
    model = seeded(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), 2.0)
    batches = [(inputs, labels if targets is None else targets)]
    truth = blocks(model, loss_fn, batches, ("0", "2"))
    estimates = hessian_trace(model, loss_fn, batches, num_probes=60, tolerance=0.02)
    for layer, estimate in estimates.items():
        assert estimate.curvature == "gauss_newton"
        assert_within(estimate, truth[layer, layer].trace())
        assert estimate.error <= 0.2 * estimate.value
        expected = torch.linalg.eigvalsh(truth[layer, layer])[-1]
        (top,) = leading_eigenvalues(model, loss_fn, batches, 1, layers=[layer], tolerance=1e-9)[layer]
        assert top.value == pytest.approx(expected.item(), rel=1e-6, abs=1e-12)


def test_a_loss_on_every_pixel():
    model = seeded(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)), 2.0)
    targets = torch.randint(4, (4, 4, 4), generator=torch.Generator().manual_seed(0))
    loss_fn, batches = nn.CrossEntropyLoss(ignore_index=3), [(images(4)[0], targets)]
    truth = blocks(model, loss_fn, batches, ("0", "2"))
    for name, estimate in hessian_trace(model, loss_fn, batches).items():
        assert estimate.curvature == "gauss_newton"
        assert_within(estimate, truth[name, name].trace())


def test_a_loss_that_is_no_mean_is_taken_batch_by_batch():
    model, (inputs, labels) = seeded(nn.Sequential(nn.Linear(8, 3))), blobs()
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double())
    batches = [(inputs[:9], labels[:9]), (inputs[9:], torch.zeros(15, dtype=torch.long))]
    truth = blocks(model, loss_fn, batches, ("0",))["0", "0"].trace()
    for curvature in ("gauss_newton", "hessian"):
        estimates = hessian_trace(model, loss_fn, batches, curvature=curvature, chunk_size=2, num_probes=300)
        assert_within(estimates["0"], truth)


class BatchMeans(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(0)


def test_a_net_that_couples_samples_is_not_cut():
    model, batches = seeded(nn.Sequential(nn.Linear(8, 3), BatchMeans())), [blobs()]
    truth = blocks(model, F.cross_entropy, batches, ("0",))["0", "0"].trace()
    for curvature in ("gauss_newton", "hessian"):
        estimate = hessian_trace(model, F.cross_entropy, batches, curvature=curvature, chunk_size=3)["0"]
        assert_within(estimate, truth)


def test_a_saturated_softmax_in_single_precision_has_a_small_trace():
    model = seeded(nn.Sequential(nn.Linear(8, 3)), 100.0).float()
    inputs = blobs()[0].float()
    targets = model(inputs).argmax(1)
    estimate = hessian_trace(model, F.cross_entropy, [(inputs, targets)])["0"]
    expected = blocks(model.double(), F.cross_entropy, [(inputs.double(), targets)], ("0",))["0", "0"].trace()
    assert_within(estimate, expected)


def test_scale_and_constant_of_the_loss():
    model, batches = conv_net(nn.SiLU), [images()]
    changes = (F.cross_entropy, lambda o, t: F.cross_entropy(o, t) + 5, lambda o, t: 3 * F.cross_entropy(o, t))
    plain, shifted, scaled = (hessian_trace(model, loss_fn, batches, num_probes=10) for loss_fn in changes)
    for name, estimate in plain.items():
        assert shifted[name].value == pytest.approx(estimate.value)
        assert scaled[name].value == pytest.approx(3 * estimate.value)
        assert scaled[name].error == pytest.approx(3 * estimate.error)


# How many probes


def test_smaller_pieces_leave_less_noise():
    model = seeded(nn.Sequential(nn.Linear(8, 3)))
    batches = [(1 + 0.1 * draw(32, 8), draw(32, 3))]  # like inputs: a probe of all is dominated by their common part
    whole, cut = (
        hessian_trace(model, halved_squares, batches, num_probes=50, tolerance=0, chunk_size=size)["0"]
        for size in (32, 2)
    )
    assert cut.error < 0.4 * whole.error


def test_probing_stops_layer_by_layer_once_accurate():
    model, batches = conv_net(), [images(16)]
    estimates = hessian_trace(model, F.cross_entropy, batches, tolerance=0.1, num_probes=1000, chunk_size=16)
    counts = {name: estimate.num_probes for name, estimate in estimates.items()}
    assert min(counts.values()) >= 10
    assert len(set(counts.values())) > 1
    assert all(e.error <= 0.1 * e.value for e in estimates.values())


def test_the_standard_error_is_that_of_repeated_runs():
    model, batches = conv_net(), [images(16)]
    runs = [
        hessian_trace(model, F.cross_entropy, batches, num_probes=20, tolerance=0, seed=seed, layers=["4"])["4"]
        for seed in range(25)
    ]
    spread = float(np.std([run.value for run in runs], ddof=1))
    assert float(np.mean([run.error for run in runs])) == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("num_probes", [2, 7])
def test_few_probes_are_all_used(num_probes: int):
    estimates = hessian_trace(conv_net(), F.cross_entropy, [images()], num_probes=num_probes)
    assert {estimate.num_probes for estimate in estimates.values()} == {num_probes}


def test_a_seed_repeats_everything_and_another_does_not():
    model, batches = conv_net(nn.SiLU), [images()]

    def run(seed: int) -> list[Any]:
        return [
            hessian_trace(model, F.cross_entropy, batches, num_probes=10, seed=seed),
            top_eigenvalue(model, F.cross_entropy, batches, num_iterations=2, seed=seed),
            leading_eigenvalues(model, F.cross_entropy, batches, 1, layers=["8"], seed=seed),
        ]

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert run(0) == first
    assert all(a != b for a, b in zip(run(1), first, strict=True))


def test_a_shuffling_loader_repeats_its_order_and_leaves_the_callers():
    data = torch.utils.data.TensorDataset(*blobs(20))
    loader = DataLoader(data, batch_size=6, shuffle=True)
    model = seeded(nn.Sequential(nn.Linear(8, 3)))
    first, second = (hessian_trace(model, F.cross_entropy, loader, num_probes=10) for _ in range(2))
    assert first == second
    assert first["0"].num_samples == 20


# What is borrowed


def everything(model: nn.Module) -> list[Any]:
    parameters = [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    return [parameters, [b.clone() for b in model.buffers()], [m.training for m in model.modules()]]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool):
    model = conv_net(nn.SiLU)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[8].weight.grad = torch.full_like(model[8].weight, 7.0)
    before = everything(model)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        assert not model.training
        random.random(), np.random.rand(), torch.rand(1)
        if fails and outputs.requires_grad:
            raise KeyError("mine")
        return F.cross_entropy(outputs, targets)

    for function, arguments in (
        (hessian_trace, {"num_probes": 2}),
        (top_eigenvalue, {"num_iterations": 2}),
        (leading_eigenvalues, {"num_eigenvalues": 1}),
        (hessian_vector_product, {"vector": {"0": draw(4, 2, 3, 3)}}),
    ):
        if fails:
            with pytest.raises(KeyError, match="mine"):
                function(model, loss_fn, [images()], **arguments)
        else:
            function(model, loss_fn, [images()], **arguments)
        after = everything(model)
        assert str(after) == str(before)
        assert torch.equal(torch.get_rng_state(), generators[0])
        assert random.getstate() == generators[1]
        assert np.array_equal(np.random.get_state()[1], generators[2])


class CountsCalls(nn.Module):
    """A third party's layer that writes to a buffer even in evaluation."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return inputs


def test_buffers_stay_even_if_the_model_writes_them():
    model = nn.Sequential(seeded(nn.Linear(8, 3)), CountsCalls())
    hessian_trace(model, F.cross_entropy, [blobs()])
    assert model[1].calls == 0


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_frozen_weights_without_gradients_around(surroundings: Any):
    model, batches = conv_net(), [images()]
    expected = hessian_trace(model, F.cross_entropy, batches, num_probes=10)
    model.requires_grad_(False)
    with surroundings():
        batches = [(inputs.clone(), targets) for inputs, targets in batches]
        assert hessian_trace(model, F.cross_entropy, batches, num_probes=10) == expected


def test_autocast_is_off_inside():
    model, batches = conv_net(nn.SiLU).float(), [images()]
    expected = hessian_trace(model, F.cross_entropy, batches, num_probes=10)
    with torch.autocast("cpu", torch.bfloat16):
        assert hessian_trace(model, F.cross_entropy, batches, num_probes=10) == expected
    assert expected["0"].value == pytest.approx(
        hessian_trace(model.double(), F.cross_entropy, batches, num_probes=10)["0"].value, rel=1e-3
    )


# Which layers


def test_layers_by_name_and_by_parameter():
    model, batches = conv_net(), [images()]
    assert list(hessian_trace(model, F.cross_entropy, batches, num_probes=2)) == ["0", "4", "8"]
    assert list(hessian_trace(model, F.cross_entropy, batches, layers=("8", "0"), num_probes=2)) == ["8", "0"]
    named = hessian_trace(model, F.cross_entropy, batches, layers={"bias": model[8].bias})["bias"]
    inputs, _ = batches[0]
    probs = model.eval()(inputs).softmax(1)
    assert_within(named, (probs * (1 - probs)).sum(1).mean())


def test_a_layer_that_is_not_used_has_no_curvature():
    model = Twice().double()
    model.idle = nn.Linear(2, 2).double()
    for curvature in ("auto", "hessian", "gauss_newton"):
        estimates = hessian_trace(model, F.cross_entropy, [blobs()], layers=["idle", "last"], curvature=curvature)
        assert (estimates["idle"].value, estimates["idle"].error) == (0, 0)
        assert estimates["last"].value > 0
        arguments: Any = {"layers": ["idle"], "curvature": curvature}
        assert top_eigenvalue(model, F.cross_entropy, [blobs()], **arguments)["idle"].value == 0
        found = leading_eigenvalues(model, F.cross_entropy, [blobs()], 2, **arguments)["idle"]
        assert [estimate.value for estimate in found] == [0, 0]


def test_outputs_that_are_no_tensor_take_second_derivatives():
    class Dictionary(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return {"logits": super().forward(inputs)}

    model = seeded(nn.Sequential(Dictionary(8, 3)))

    def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], targets)

    plain = nn.Sequential(nn.Linear(8, 3).double())
    plain.load_state_dict(model.state_dict())
    truth = blocks(plain, F.cross_entropy, [blobs()], ("0",))["0", "0"].trace()
    estimate = hessian_trace(model, loss_fn, [blobs()], layers=["0"])["0"]
    assert estimate.curvature == "hessian"
    assert_within(estimate, truth)
    with pytest.raises(ValueError, match="returns one tensor, got a dict; wrap the model"):
        hessian_trace(model, loss_fn, [blobs()], layers=["0"], curvature="gauss_newton")


# Refusals


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cube(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return Cubed.apply(inputs)


def test_an_operation_without_second_derivative():
    model, batches = seeded(nn.Sequential(nn.Linear(8, 4), Cube(), nn.Linear(4, 3))), [blobs()]
    with pytest.warns(UserWarning, match="Gauss-Newton matrix stands in"):
        stood_in = hessian_trace(model, F.cross_entropy, batches, num_probes=10)
    assert {estimate.curvature for estimate in stood_in.values()} == {"gauss_newton"}
    with pytest.raises(RuntimeError, match="no second derivative .* use curvature='gauss_newton'"):
        hessian_trace(model, F.cross_entropy, batches, curvature="hessian")
    with pytest.raises(RuntimeError, match="no second derivative"):
        hessian_vector_product(model, F.cross_entropy, batches, {"0": draw(4, 8)})
    for curvature in ("gauss_newton", "hessian"):
        with pytest.raises(RuntimeError, match="no second derivative"):
            top_eigenvalue(model, F.cross_entropy, batches, curvature=curvature)
    assert hessian_trace(model, F.cross_entropy, batches, curvature="gauss_newton")["0"].value > 0


def test_losses_that_gauss_newton_cannot_take():
    model, batches = seeded(nn.Sequential(nn.Linear(8, 3))), [blobs()]

    def concave(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.softmax(1).square().sum(1).mean()

    def coupled(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs @ outputs.T).square().mean()

    for loss_fn, message in ((concave, "convex in the outputs"), (coupled, "couple the samples")):
        with pytest.raises(ValueError, match=f"{message}.*use curvature='hessian'"):
            hessian_trace(model, loss_fn, batches, curvature="gauss_newton")
        estimate = hessian_trace(model, loss_fn, batches, num_probes=300)["0"]
        assert estimate.curvature == "hessian"
        assert_within(estimate, blocks(model, loss_fn, batches, ("0",))["0", "0"].trace())


def test_a_summed_or_infinite_loss_is_refused():
    model = seeded(nn.Sequential(nn.Linear(8, 3)))
    with pytest.raises(ValueError, match="returned the sum; use reduction='mean'"):
        hessian_trace(model, nn.CrossEntropyLoss(reduction="sum"), [blobs()])
    with pytest.raises(ValueError, match="must return one number.*use reduction='mean'"):
        hessian_trace(model, nn.CrossEntropyLoss(reduction="none"), [blobs()])
    with pytest.raises(ValueError, match="loss of the first batch is nan"):
        hessian_trace(model, lambda o, t: F.cross_entropy(o, t) * torch.nan, [blobs()])
    inputs, targets = blobs()
    with pytest.raises(ValueError, match="curvature is not finite; are the weights, the data and the loss finite"):
        hessian_trace(model, F.cross_entropy, [(inputs, targets), (inputs * torch.inf, targets)])


def one_shot() -> Iterator[Any]:
    yield blobs()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (one_shot(), "only once.*pass a list or a DataLoader"),
        ([], "pass at least one"),
        (blobs(), r"pass \[\(inputs, targets\)\]"),
        ([{"image": 1}], r"must yield \(inputs, targets, ...\), got a dict"),
        ([(torch.zeros(2, 8).double(), None)], "must be a tensor with one row for each sample, got a NoneType"),
    ],
)
def test_wrong_batches(batches: Any, message: str):
    with pytest.raises(TypeError, match=message):
        hessian_trace(nn.Sequential(nn.Linear(8, 3)).double(), F.cross_entropy, batches)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": "0"}, TypeError, r"pass \['0'\]"),
        ({"layers": ["fc"]}, ValueError, r"no layers \['fc'\]; it has \['0', '1'\]"),
        ({"layers": ["1"]}, ValueError, "layer '1' must have a parameter 'weight', and it is missing"),
        ({"layers": []}, ValueError, "no layer to look at"),
        ({"layers": {"0": nn.Parameter(torch.zeros(1))}}, ValueError, "not a parameter of the model"),
        ({"curvature": "fisher"}, ValueError, "must be 'auto', 'gauss_newton' or 'hessian', got 'fisher'"),
        ({"num_probes": 1}, ValueError, "num_probes must be at least 2"),
        ({"tolerance": -0.1}, ValueError, "tolerance .*must be (at least 0|a number)"),
        ({"tolerance": float("nan")}, ValueError, "tolerance .*must be (at least 0|a number)"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        hessian_trace(nn.Sequential(nn.Linear(8, 3), nn.ReLU()).double(), F.cross_entropy, [blobs()], **arguments)


def test_wrong_arguments_of_the_others():
    model, batches = nn.Sequential(nn.Linear(8, 3)).double(), [blobs()]
    with pytest.raises(ValueError, match="num_iterations must be at least 1"):
        top_eigenvalue(model, F.cross_entropy, batches, num_iterations=0)
    with pytest.raises(ValueError, match="less than the 24 weights of layer '0', got 24; ask for fewer"):
        leading_eigenvalues(model, F.cross_entropy, batches, 24)
    with pytest.raises(ValueError, match="which is not among layers"):
        hessian_vector_product(model, F.cross_entropy, batches, {"x": draw(3, 8)}, layers=["0"])
    with pytest.raises(ValueError, match=r"must have the weight's shape \(3, 8\), got \(8, 3\)"):
        hessian_vector_product(model, F.cross_entropy, batches, {"0": draw(8, 3)})


def test_weights_that_are_computed_or_short_are_refused():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 3))).double()
    with pytest.raises(ValueError, match="'0' must have a parameter 'weight', and it is parametrized"):
        hessian_trace(model, F.cross_entropy, [blobs()])
    underneath = {"directions": model[0].parametrizations.weight.original1}
    estimate = hessian_trace(model, F.cross_entropy, [blobs()], layers=underneath)["directions"]
    assert estimate.curvature == "hessian"  # the norm bends
    with pytest.raises(TypeError, match=r"float32 or all float64, found \['torch.bfloat16'\].*deepcopy\(model\).float"):
        hessian_trace(nn.Sequential(nn.Linear(8, 3)).bfloat16(), F.cross_entropy, [blobs()])


# Progress, processes


def test_the_bar_shows_only_when_asked_or_after_seconds(capsys: Any):
    model, batches = conv_net(), [images()]
    for progress in (None, False):
        hessian_trace(model, F.cross_entropy, batches, num_probes=2, progress=progress)
    assert capsys.readouterr().err == ""
    hessian_trace(model, F.cross_entropy, batches, num_probes=2, progress=True)
    assert "gauss-newton, 3 layers" in capsys.readouterr().err


def probe_in_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    inputs, targets = images(9)
    share = [(inputs[:6], targets[:6])] if rank == 0 else [(inputs[6:8], targets[6:8]), (inputs[8:], targets[8:])]
    model = conv_net(nn.SiLU)
    results = {
        "traces": hessian_trace(model, F.cross_entropy, share, num_probes=100),
        "top": top_eigenvalue(model, F.cross_entropy, share),
        "leading": leading_eigenvalues(model, F.cross_entropy, share, 2),
        "product": hessian_vector_product(model, F.cross_entropy, share, {"0": draw(4, 2, 3, 3)}),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.processes
def test_two_processes_see_the_union_of_their_data(tmp_path):
    arguments: dict[str, Any] = {"args": (str(tmp_path),), "nprocs": 2, "start_method": "fork"}
    torch.multiprocessing.start_processes(probe_in_two_processes, **arguments)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert torch.equal(first.pop("product")["0"], (product := second.pop("product"))["0"])
    assert first == second
    model, batches = conv_net(nn.SiLU), [images(9)]
    expected = hessian_vector_product(model, F.cross_entropy, batches, {"0": draw(4, 2, 3, 3)})
    torch.testing.assert_close(product, expected)
    for name, estimate in top_eigenvalue(model, F.cross_entropy, batches).items():
        assert first["top"][name].value == pytest.approx(estimate.value, rel=1e-8)
        assert first["leading"][name][0].value == pytest.approx(estimate.value, rel=1e-2)
    truth = blocks(model, F.cross_entropy, batches, ("0", "4", "8"))
    for name, estimate in first["traces"].items():
        assert estimate.num_samples == 9
        assert_within(estimate, truth[name, name].trace())
