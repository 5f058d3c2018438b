"""The learning rate of the scales, by every rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.quantization import AdaptiveLearningRateScaling


@pytest.mark.parametrize(
    ("rule", "bits", "factors"),
    [
        ("eta", (8, 6, 4, 2), [1, 0.1, 0.01, 0.001]),
        ("eta", (8, 7, 5, 3), [1, 0.5, 0.05, 0.005]),
        ("eta", (4, 3, 2), [1, 0.5, 0.1]),
        ("eta", (32, 8, 4), [1, 0.01]),
        ("released", (8, 6, 4, 2), [1, 0.1, 0.01, 0.001]),
        ("released", (4, 3, 2), [1, 0.1, 0.01]),
        ("none", (8, 2), [1, 1]),
        ("frozen", (8, 2), [0, 0]),
    ],
)
def test_factors(rule, bits, factors):
    scaling = AdaptiveLearningRateScaling(rule, bits=bits)
    found = [scaling.learning_rate(0.5, b) for b in bits if b != 32]
    assert found == pytest.approx([0.5 * factor for factor in factors])


def reference(rule: str, lr: float, eta: float, gradients: list[torch.Tensor]) -> float:
    """Equation 6, a layer at a time."""
    total = 0.0
    for gradient in gradients:
        norm = float((gradient.double() ** 2).sum()) ** 0.5
        clipped = gradient.double() / norm if norm > 1 else gradient.double()
        total += min(float(clipped.abs().max()), 1.0)
    mean = total / len(gradients)
    return max(0.0, eta * (lr - mean)) if rule == "paper" else eta * lr * (1 - mean)


@pytest.mark.parametrize("rule", ["paper", "relative"])
@given(lr=st.floats(1e-4, 1.0), magnitude=st.sampled_from([0.0, 1e-3, 0.1, 10.0]), seed=st.integers(0, 50))
def test_rules_that_look_at_gradients(rule, lr, magnitude, seed):
    scaling = AdaptiveLearningRateScaling(rule, bits=(8, 6, 4, 2))
    generator = torch.Generator().manual_seed(seed)
    gradients = [magnitude * torch.randn(shape, generator=generator) for shape in [(4,), (), (1,)]]
    found = scaling.learning_rate(lr, 4, gradients)
    assert found == pytest.approx(reference(rule, lr, 0.01, gradients), rel=1e-5, abs=1e-9)
    assert 0 <= found <= 0.01 * lr * (1 + 1e-6)


def test_equation_6_to_the_letter_would_go_below_zero():
    # The paper's learning rate with the gradients that its appendix plots.
    scaling = AdaptiveLearningRateScaling("paper", bits=(8, 2))
    assert scaling.learning_rate(5e-4, 2, [torch.full((16,), 0.02)]) == 0.0


def test_unknown_rule():
    with pytest.raises(ValueError, match="one of eta, released, paper"):
        AdaptiveLearningRateScaling("linear", bits=(8, 4))
