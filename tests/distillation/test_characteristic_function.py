"""The discrepancy of characteristic functions against closed forms and the published formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.distillation import (
    FrequencySampler,
    SamplingNetwork,
    characteristic_function_discrepancy,
    characteristic_sums,
    discrepancy_per_class,
    unit_rows,
)

GENERATOR = torch.Generator().manual_seed(0)
REAL = torch.rand(60, 6, generator=GENERATOR, dtype=torch.float64)
SYNTHETIC = torch.rand(20, 6, generator=GENERATOR, dtype=torch.float64) + torch.tensor([0.5, 0, 0, 0, 0, 0])
T = torch.randn(40, 6, generator=GENERATOR, dtype=torch.float64)


def published(real: Tensor, synthetic: Tensor, t: Tensor, alpha: float, beta: float) -> Tensor:
    """The formula as the paper's code writes it."""
    parts = []
    for features in (real, synthetic):
        projected = t @ F.normalize(features).T
        parts.append((projected.cos().mean(1), projected.sin().mean(1)))
    (a_r, b_r), (a_s, b_s) = parts
    norm_r, norm_s = (a_r**2 + b_r**2).sqrt(), (a_s**2 + b_s**2).sqrt()
    amplitude = (norm_r - norm_s) ** 2
    phase = (2 * (norm_r * norm_s - a_r * a_s - b_r * b_s)).clamp_min(1e-12)
    return (alpha * amplitude + beta * phase).sqrt().mean()


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.1, 0.9), (0.9, 0.1), (1.0, 0.0), (0.0, 1.0)])
def test_it_is_the_published_formula(alpha, beta):
    ours = characteristic_function_discrepancy(REAL, SYNTHETIC, T, alpha=alpha, beta=beta)
    torch.testing.assert_close(ours, published(REAL, SYNTHETIC, T, alpha, beta), rtol=1e-5, atol=1e-6)


def test_equal_weights_are_the_distance_of_complex_numbers():
    phi = [torch.exp(1j * (F.normalize(features) @ T.T)).mean(0) for features in (REAL, SYNTHETIC)]
    expected = math.sqrt(0.5) * (phi[0] - phi[1]).abs().mean()
    torch.testing.assert_close(characteristic_function_discrepancy(REAL, SYNTHETIC, T), expected, rtol=1e-7, atol=0)


def test_the_mean_square_over_normal_frequencies_is_a_maximum_mean_discrepancy():
    t = torch.randn(200_000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, v = unit_rows(REAL), unit_rows(SYNTHETIC)
    phi = [characteristic_sums(rows[None], t) / len(rows) for rows in (u, v)]
    squared = (phi[0] - phi[1]).square().sum(0)

    def kernel(x, y):
        return torch.exp(-torch.cdist(x, y).square() / 2).mean()

    mmd = kernel(u, u) + kernel(v, v) - 2 * kernel(u, v)
    error = squared.std() / math.sqrt(len(t))
    assert abs(squared.mean() - mmd) < 4 * error
    assert error < 0.01 * mmd


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.9, 0.1), (0.2, 0.8)])
def test_gradients(alpha, beta):
    real, synthetic, t = (x[:8].clone().requires_grad_() for x in (REAL, SYNTHETIC, T))
    assert torch.autograd.gradcheck(
        lambda *x: characteristic_function_discrepancy(*x, alpha=alpha, beta=beta), (real, synthetic, t)
    )


def test_order_does_not_matter():
    order = [torch.randperm(len(x), generator=GENERATOR) for x in (REAL, SYNTHETIC, T)]
    shuffled = [x[index] for x, index in zip((REAL, SYNTHETIC, T), order, strict=True)]
    torch.testing.assert_close(
        characteristic_function_discrepancy(*shuffled), characteristic_function_discrepancy(REAL, SYNTHETIC, T)
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.9, 0.1), (0.1, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_samples_have_no_discrepancy_and_a_finite_gradient(alpha, beta, dtype):
    synthetic = REAL.to(dtype).requires_grad_()
    loss = characteristic_function_discrepancy(REAL.to(dtype), synthetic, T.to(dtype), alpha=alpha, beta=beta)
    assert 0 <= loss < 1e-5
    loss.backward()
    assert torch.isfinite(synthetic.grad).all()


def test_features_of_zero_have_a_finite_gradient():
    synthetic = torch.zeros(3, 6, requires_grad=True)
    characteristic_function_discrepancy(REAL.float(), synthetic, T.float(), alpha=0.9, beta=0.1).backward()
    assert torch.isfinite(synthetic.grad).all()


def test_small_differences_keep_their_digits_in_float32():
    near = (REAL * (1 + 1e-4 * torch.rand(REAL.shape, generator=GENERATOR, dtype=torch.float64))).detach()
    exact = characteristic_function_discrepancy(REAL, near, T)
    single = characteristic_function_discrepancy(REAL.float(), near.float(), T.float())
    assert exact < 1e-4
    assert single.item() == pytest.approx(exact.item(), rel=0.05)


def test_bfloat16_products_change_little():
    generator = torch.Generator().manual_seed(3)
    real, synthetic = torch.rand(256, 512, generator=generator), torch.rand(40, 512, generator=generator) ** 2
    t = torch.randn(256, 512, generator=generator)
    exact = characteristic_function_discrepancy(real, synthetic, t)
    synthetic.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = characteristic_function_discrepancy(real, synthetic, t)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=1e-3)
    rough.backward()
    assert torch.isfinite(synthetic.grad).all()


def test_classes_in_one_product_are_classes_one_by_one():
    real, synthetic = REAL.view(3, 20, 6), SYNTHETIC.view(4, 5, 6)[:3]
    sums = [characteristic_sums(unit_rows(x), T) / x.shape[1] for x in (real, synthetic)]
    for label, value in enumerate(discrepancy_per_class(*sums, alpha=0.7, beta=0.3)):
        expected = characteristic_function_discrepancy(real[label], synthetic[label], T, alpha=0.7, beta=0.3)
        torch.testing.assert_close(value, expected)


def test_frequencies_have_their_scale_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    sampler = FrequencySampler(500, scale=2.0)
    t = sampler.draw(64, "cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert t.std().item() == pytest.approx(2, rel=0.02)
    state = sampler.state_dict()
    following = sampler.draw(64, "cpu")
    again = FrequencySampler(500, scale=2.0)
    again.load_state_dict(state)
    assert torch.equal(again.draw(64, "cpu"), following)


def test_the_sampling_network_shares_each_scale_among_sixteen_rows():
    torch.manual_seed(0)
    network = SamplingNetwork(6, rank=4)
    t = FrequencySampler(32, network=network, seed=1).draw(6, "cpu")
    normal = FrequencySampler(32, seed=1).draw(6, "cpu")
    scales = (t / normal).view(16, 2, 6)
    torch.testing.assert_close(scales, scales[:1].expand_as(scales), rtol=1e-3, atol=1e-4)
    assert scales.abs().max() < 1
    assert t.requires_grad


def test_ascent_on_the_sampling_network_raises_the_discrepancy():
    torch.manual_seed(0)
    network = SamplingNetwork(6, rank=16)
    sampler = FrequencySampler(64, network=network)
    optimizer = torch.optim.SGD(network.parameters(), lr=5.0, momentum=0.5, maximize=True)
    values = []
    for _ in range(100):
        t = sampler.draw(6, "cpu")
        loss = characteristic_function_discrepancy(REAL.float(), SYNTHETIC.float(), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-10:]) > 1.2 * sum(values[:10])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: characteristic_function_discrepancy(REAL, SYNTHETIC, T, alpha=-1), "alpha and beta must be at least"),
        (lambda: characteristic_function_discrepancy(REAL[:, :3], SYNTHETIC, T), "same last dimension, got 3, 6 and 6"),
        (lambda: characteristic_function_discrepancy(REAL[0], SYNTHETIC, T), r"real \(N, D\)"),
        (lambda: FrequencySampler(0), "num_frequencies must be at least 1"),
        (lambda: FrequencySampler(8, scale=0.0), "scale must be above 0"),
        (lambda: FrequencySampler(40, network=SamplingNetwork(6)), "multiple of 16, from 32 on, got 40"),
        (lambda: FrequencySampler(32, network=SamplingNetwork(6)).draw(7, "cpu"), "size 6, the features have size 7"),
        (lambda: SamplingNetwork(0), "dim and rank must be at least 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
