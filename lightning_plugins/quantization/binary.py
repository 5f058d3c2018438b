"""Weights and activations of one bit: periodic binarization (BiPer) and the sign that it is compared with."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins.checks import check_types
from lightning_plugins.quantization.quantizers import _in_float

__all__ = [
    "binary_activation",
    "normalize_samples",
    "periodic_binary",
    "periodic_regularizer",
    "quantization_error",
    "sign_ste",
]

Stage = Literal[1, 2]


@check_types
def periodic_binary(weight: Tensor, frequency: float, *, stage: Stage = 2) -> Tensor:
    r"""Binarize a weight by a square wave, with the gradient of the sine of the same period.

    Stage 1 returns :math:`\sin(\omega W)`. Stage 2 returns :math:`\mathrm{sign}(\sin(\omega W))`, where the sign of 0
    is +1. The gradient of both is :math:`G\,\omega\cos(\omega W)`. Computed in float32 at least, whatever the dtype,
    and whether or not autocast is on.

    Args:
        weight: any shape.
        frequency: :math:`\omega` in radians per unit of weight, above 0; the paper has 20.
        stage: 1 or 2.

    Returns:
        The same shape and dtype. In stage 2 each value is exactly -1 or +1, or NaN where the weight is not finite.

    Raises:
        ValueError: for another frequency or stage.

    Example:
        >>> periodic_binary(torch.tensor([-0.1, 0.0, 0.1, 0.2]), 20.0)
        tensor([-1.,  1.,  1., -1.])

    Reference:
        Vargas et al., *BiPer: Binary Neural Networks using a Periodic Function*, 2024.
    """
    wave = torch.sin(check_frequency(frequency) * _in_float(weight))
    if check_stage(stage) == 2:
        wave = _sign(wave.detach()) + (wave - wave.detach())  # the difference is exactly 0
    return wave.to(weight.dtype)


@check_types
def sign_ste(weight: Tensor) -> Tensor:
    """Return the sign of a weight, +1 for 0, with the straight-through gradient: G where ``|weight| <= 1``, else 0.

    The baseline that periodic binarization is compared with.

    Example:
        >>> sign_ste(torch.tensor([-0.1, 0.0, 3.0]))
        tensor([-1.,  1.,  1.])

    Reference:
        Hubara et al., *Binarized Neural Networks*, 2016.
    """
    inside = clip(weight)
    return _sign(weight.detach()) + (inside - inside.detach())


@check_types
def binary_activation(inputs: Tensor) -> Tensor:
    """Return the sign of activations, +1 for 0, with the gradient ``G max(0, 2 - 2 |inputs|)``.

    That is the derivative of a piecewise polynomial that goes from -1 to 1 between -1 and 1.

    Args:
        inputs: any shape; :func:`normalize_samples` brings them to the range in which the gradient is not 0.

    Returns:
        -1 and +1 in the same shape and dtype; NaN stays NaN.

    Example:
        >>> binary_activation(torch.tensor([-0.3, 0.0, 2.0]))
        tensor([-1.,  1.,  1.])

    Reference:
        Liu et al., *Bi-Real Net*, 2018.
    """
    output: Tensor = _BinaryActivation.apply(inputs)
    return output


@check_types
def normalize_samples(inputs: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Divide each sample by its standard deviation, without centring: ``a / sqrt(Var(a) + eps)``.

    The variance is the population's, over all dimensions but the first. Computed, and returned, in float32 at least.

    Args:
        inputs: ``(N, ...)``.
        eps: added to the variance, at least 0; with 0 a constant sample gives NaN.

    Raises:
        ValueError: for a negative ``eps``.

    Example:
        >>> normalize_samples(torch.tensor([[3.0, -3.0], [0.0, 0.0]]))
        tensor([[ 1.0000, -1.0000],
                [ 0.0000,  0.0000]])
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps!r}")
    values = inputs if inputs.dtype == torch.float64 else inputs.float()
    variance = values.var(tuple(range(1, values.ndim)), correction=0, keepdim=True)
    return values / torch.sqrt(variance + eps)


@check_types
def periodic_regularizer(weight: Tensor, frequency: float, *, sign: Literal[1, -1] = 1) -> Tensor:
    r"""Return :math:`\pm\,\mathrm{mean}(\tfrac12 - \tfrac12\cos 2\omega W) = \pm\,\mathrm{mean}\sin^2(\omega W)`.

    Args:
        weight: any shape.
        frequency: :math:`\omega`, above 0.
        sign: +1, as in the released code, is least where the sine is 0; -1 is least where it is -1 or +1, which is
            where the quantization error is 0.

    Returns:
        One value in [0, 1] or [-1, 0]; its gradient is :math:`\pm\,\omega\sin(2\omega W)/n` for n weights.

    Raises:
        ValueError: for another frequency or sign.

    Example:
        >>> periodic_regularizer(torch.tensor([0.0, torch.pi / 2]), 1.0)
        tensor(0.5000)
    """
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 (as released) or -1, got {sign!r}")
    phase = 2 * check_frequency(frequency) * _in_float(weight)
    return sign * (0.5 - 0.5 * torch.cos(phase)).mean()


@check_types
def quantization_error(weight: Tensor, frequency: float) -> Tensor:
    r"""Return how far the sine is from the square wave: :math:`1 - \mathrm{mean}|\sin(\omega W)|`, in [0, 1].

    For Laplace weights of scale :math:`\beta` it is :math:`1 - s\coth(\pi s/2)/(1+s^2)` with
    :math:`s = 1/(\omega\beta)`: it falls with the frequency, down to :math:`1 - 2/\pi = 0.363`.

    Args:
        weight: any shape.
        frequency: :math:`\omega`, above 0.

    Raises:
        ValueError: for another frequency.

    Example:
        >>> quantization_error(torch.tensor([0.0, torch.pi / 2]), 1.0)
        tensor(0.5000)
    """
    return 1 - torch.sin(check_frequency(frequency) * _in_float(weight)).abs().mean()


def check_frequency(frequency: float) -> float:
    """Return the frequency.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if isinstance(frequency, bool) or not 0 < frequency < math.inf:
        raise ValueError(f"frequency must be positive and finite, got {frequency!r}; the paper has 20.0")
    return float(frequency)


def check_stage(stage: int) -> int:
    if stage not in (1, 2) or isinstance(stage, bool):
        raise ValueError(f"stage must be 1 (real weights, the sine) or 2 (binary weights), got {stage!r}")
    return stage


def _sign(values: Tensor) -> Tensor:
    """-1 or +1, +1 for 0; NaN passes, as a net that has diverged must not look sound."""
    return torch.where(values < 0, -1.0, torch.where(values >= 0, 1.0, values))


def clip(weight: Tensor) -> Tensor:
    """Clip to [-1, 1] with a gradient on the limits, which clamp's depends on the version of torch."""
    return torch.where(weight.abs() <= 1, weight, weight.detach().clamp(-1, 1))


class _BinaryActivation(Function):
    """Keeps its input and nothing else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return _sign(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        slope: Tensor = (2 - 2 * inputs.abs()).clamp_min(0)
        return grad * slope
