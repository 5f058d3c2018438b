"""Adaptive learning-rate scaling: how far the quantization scales move at each precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_plugins.checks import check_types
from lightning_plugins.quantization.layers import FULL_PRECISION

__all__ = ["AdaptiveLearningRateScaling", "ScalingRule"]

ScalingRule = Literal["eta", "released", "paper", "relative", "none", "frozen"]


class AdaptiveLearningRateScaling:
    """The learning rate of the scales at a precision, from that of the weights.

    With lr the learning rate of the weights, ``d = h - b``, and ``eta_b = 10^(-d/2)`` for even d,
    ``5 * 10^(-(d+1)/2)`` for odd d:

    ============ ================================================== ===================================================
    rule         learning rate of the scales                        origin
    ============ ================================================== ===================================================
    ``eta``      ``eta_b * lr``                                     what the paper's equation 6 is after
    ``released`` ``0.1^rank * lr``, rank 0 the highest precision    the released code, which moves BN and biases so too
    ``paper``    ``max(0, eta_b * (lr - g))``                       equation 6 to the letter, floored: it falls below 0
    ``relative`` ``eta_b * lr * (1 - g)``                           equation 6 made dimensionless
    ``none``     ``lr``                                             control
    ``frozen``   ``0``                                              control
    ============ ================================================== ===================================================

    where g is the mean over layers of the largest magnitude in the gradient of the layer's scales at this precision,
    clipped to norm 1: in [0, 1].

    Args:
        rule: one of the above.
        bits: all precisions that are trained.

    Raises:
        ValueError: for another rule.

    Example:
        >>> scaling = AdaptiveLearningRateScaling("eta", bits=(8, 6, 4, 3))
        >>> [scaling.learning_rate(1.0, b) for b in (8, 6, 4, 3)]
        [1.0, 0.1, 0.01, 0.005]

    Reference:
        Huang et al., *Nearly Lossless Adaptive Bit Switching*, 2025, equations 6 and 7. At the paper's own settings its
        equation 6 is negative in nearly every step, and the released code has no gradient term; hence the variants.
    """

    @check_types
    def __init__(self, rule: ScalingRule = "eta", *, bits: Sequence[int]) -> None:
        if rule not in get_args(ScalingRule):
            raise ValueError(f"the scaling rule must be one of {', '.join(get_args(ScalingRule))}, got {rule!r}")
        self.rule = rule
        if not bits or not all(1 <= b <= FULL_PRECISION for b in bits):
            raise ValueError(f"bits must hold at least one precision of up to 32, such as (8, 4), got {tuple(bits)!r}")
        # At full precision there are no scales.
        self.bits = tuple(sorted((b for b in bits if b != FULL_PRECISION), reverse=True))

    @property
    def needs_gradients(self) -> bool:
        """Whether the learning rate depends on the scales' gradients at the precision."""
        return self.rule in ("paper", "relative")

    @property
    def scales_batch_norm(self) -> bool:
        """Whether BN parameters and biases move at the scales' learning rate too, as in the released code."""
        return self.rule == "released"

    @check_types
    def factor(self, bits: int) -> float:
        """Return the part of the rule that does not depend on gradients: what multiplies lr."""
        if not 1 <= bits <= FULL_PRECISION:
            raise ValueError(f"bits must be a precision of up to 32, got {bits!r}")
        if self.rule in ("none", "frozen"):
            return float(self.rule == "none")
        if self.rule == "released":
            return 0.1 ** self.bits.index(bits)
        halves, odd = divmod(self.bits[0] - bits, 2)
        return float(5 * 10.0 ** -(halves + 1) if odd else 10.0**-halves)

    @check_types
    def learning_rate(self, lr: float, bits: int, gradients: Iterable[Tensor] = ()) -> float:
        """Return the learning rate of the scales at a precision.

        Args:
            lr: current learning rate of the weights.
            bits: the precision.
            gradients: one tensor for each layer, the gradient of its scales; needed by ``paper`` and ``relative``.
        """
        factor = self.factor(bits)
        if not self.needs_gradients:
            return factor * lr
        largest = [g.abs().max() / g.norm().clamp_min(1.0) for g in gradients]
        mean = float(torch.stack(largest).clamp_max(1.0).mean()) if largest else 0.0
        return factor * (max(0.0, lr - mean) if self.rule == "paper" else lr * (1 - mean))
