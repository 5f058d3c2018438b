"""The discrepancy between two samples' empirical characteristic functions, and where to measure it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_plugins.checks import check_types
from lightning_plugins.distillation.generators import PrivateGenerator

__all__ = [
    "FrequencySampler",
    "SamplingNetwork",
    "characteristic_function_discrepancy",
    "characteristic_sums",
    "discrepancy_per_class",
    "unit_rows",
]

_TILE = 16  # rows of frequencies that share one output row of the sampling network
_EPS = 1e-12


@check_types
def characteristic_function_discrepancy(
    real: Tensor, synthetic: Tensor, frequencies: Tensor, *, alpha: float = 0.5, beta: float = 0.5
) -> Tensor:
    r"""Return the distance between the characteristic functions of two samples of features.

    The rows of both are scaled to length 1. With :math:`\Phi(t) = E[e^{i \langle t, F \rangle}]` of each sample,

    .. math:: \operatorname{mean}_t \sqrt{\alpha (|\Phi_r| - |\Phi_s|)^2
        + \beta (|\Phi_r - \Phi_s|^2 - (|\Phi_r| - |\Phi_s|)^2)}

    where the first term is of the amplitudes and the second of the phases. It is computed as
    ``beta |difference|^2 + (alpha - beta) amplitude term``, in which no large numbers cancel if ``alpha >= beta``.
    With equal weights it is ``sqrt(beta)`` times the mean distance of the complex numbers, and with standard normal
    frequencies the mean of its square is ``beta`` times the squared maximum mean discrepancy of the kernel
    ``exp(-|u - v|^2 / 2)``.

    Args:
        real: features of real images, with or without gradient.
        synthetic: features of synthetic images.
        frequencies: t, one per row.
        alpha: weight of the amplitude, at least 0.
        beta: weight of the phase, at least 0.

    Shape:
        - real: ``(N, D)``
        - synthetic: ``(M, D)``
        - frequencies: ``(K, D)``
        - output: ``()``

    Raises:
        ValueError: if shapes do not fit, or a weight is negative.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> real, t = torch.randn(50, 6), torch.randn(100, 6)
        >>> same, other = (characteristic_function_discrepancy(real, x, t) for x in (real, real.abs()))
        >>> bool(same < 1e-5), bool(other > 0.1)
        (True, True)

    Reference:
        S. Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective", CVPR 2025,
        equation 6. The released code multiplies by 300 and clamps a difference that has cancelled.
    """
    _check_weights(alpha, beta)
    if real.ndim != 2 or synthetic.ndim != 2 or frequencies.ndim != 2 or not len(real) or not len(synthetic):
        raise ValueError(
            f"real (N, D), synthetic (M, D) and frequencies (K, D) were expected, got {tuple(real.shape)}, "
            f"{tuple(synthetic.shape)} and {tuple(frequencies.shape)}"
        )
    if not real.shape[1] == synthetic.shape[1] == frequencies.shape[1]:
        raise ValueError(
            f"all three need the same last dimension, got {real.shape[1]}, {synthetic.shape[1]} and "
            f"{frequencies.shape[1]}"
        )
    sums_real = characteristic_sums(unit_rows(real)[None], frequencies)
    sums_synthetic = characteristic_sums(unit_rows(synthetic)[None], frequencies)
    return discrepancy_per_class(
        sums_real / len(real), sums_synthetic / len(synthetic), alpha=alpha, beta=beta
    ).squeeze(0)


@check_types
def discrepancy_per_class(real: Tensor, synthetic: Tensor, *, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """Return the discrepancy of each class from characteristic functions; see the function for samples.

    Args:
        real: real and imaginary parts of the characteristic functions of the classes.
        synthetic: likewise.
        alpha: weight of the amplitude, at least 0.
        beta: weight of the phase, at least 0.

    Shape:
        - real, synthetic: ``(2, C, K)``
        - output: ``(C,)``

    Raises:
        ValueError: for other shapes.

    Example:
        >>> discrepancy_per_class(torch.tensor([[[1.0]], [[0.0]]]), torch.tensor([[[0.0]], [[1.0]]]), alpha=1, beta=1)
        tensor([1.4142])
    """
    _check_weights(alpha, beta)
    if real.ndim != 3 or len(real) != 2 or real.shape != synthetic.shape:
        raise ValueError(
            f"real and synthetic must both be (2, C, K), got {tuple(real.shape)} and {tuple(synthetic.shape)}"
        )
    squared = (real - synthetic).square().sum(0)
    weighted = beta * squared
    if alpha != beta:
        # An empty spectrum has a modulus with infinite slope; the small number keeps it finite.
        moduli = [(part.square().sum(0) + _EPS**2).sqrt() for part in (real, synthetic)]
        weighted = weighted + (alpha - beta) * (moduli[0] - moduli[1]).square()
        if alpha < beta:
            weighted = weighted.clamp_min(0)
    return (weighted + _EPS).sqrt().mean(-1)


@check_types
def unit_rows(features: Tensor) -> Tensor:
    """Scale the rows ``(..., D)`` to length 1, in float32 or better; a row of zeros stays and has a finite gradient."""
    features = features if features.dtype == torch.float64 else features.float()
    return features * (features.square().sum(-1, keepdim=True) + _EPS).rsqrt()


@check_types
def characteristic_sums(features: Tensor, frequencies: Tensor) -> Tensor:
    """Return the sums of ``cos <t, F>`` and ``sin <t, F>`` over the rows of every class.

    All classes take one matrix product; under autocast it runs in the lower precision, all else in float32 or better.
    The backward pass reuses the cosines and sines. Differentiable once, in both arguments.

    Args:
        features: rows of each class.
        frequencies: t, one per row.

    Shape:
        - features: ``(C, m, D)``
        - frequencies: ``(K, D)``
        - output: ``(2, C, K)``

    Raises:
        ValueError: for other shapes, or features that are not floating-point.

    Example:
        >>> characteristic_sums(torch.zeros(3, 5, 2), torch.ones(4, 2)).tolist()[0][0]
        [5.0, 5.0, 5.0, 5.0]
    """
    if features.ndim != 3 or frequencies.ndim != 2 or features.shape[2] != frequencies.shape[1]:
        raise ValueError(
            "features must be (C, m, D) and frequencies (K, D), got "
            f"{tuple(features.shape)} and {tuple(frequencies.shape)}"
        )
    if not (features.is_floating_point() and features.numel()):
        raise ValueError(f"features must be floating-point and some, got {features.dtype} of {tuple(features.shape)}")
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    sums: Tensor = _CharacteristicSums.apply(features, frequencies, dtype)
    return sums


class _CharacteristicSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
        classes, count, dim = features.shape
        with torch.autocast(features.device.type, enabled=False):
            rows, columns = features.reshape(-1, dim).to(dtype), frequencies.to(dtype)
            projected = (rows @ columns.T).to(features.dtype)
            cos = projected.cos()
            sin = projected.sin_()
            shape = classes, count, len(frequencies)
            sums = features.new_empty(2, classes, len(frequencies))
            torch.sum(cos.view(shape), 1, out=sums[0])
            torch.sum(sin.view(shape), 1, out=sums[1])
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows, columns, cos, sin)
            ctx.shape, ctx.dtypes = shape, (features.dtype, frequencies.dtype)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, columns, cos, sin = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            projected = cos.view(ctx.shape) * gradient[1][:, None]
            projected.addcmul_(sin.view(ctx.shape), gradient[0][:, None], value=-1)
            projected = projected.view(len(rows), -1).to(rows.dtype)
            for_features = for_frequencies = None
            if ctx.needs_input_grad[0]:
                for_features = (projected @ columns).to(ctx.dtypes[0]).view(*ctx.shape[:2], -1)
            if ctx.needs_input_grad[1]:
                for_frequencies = (projected.T @ rows).to(ctx.dtypes[1])
        return for_features, for_frequencies, None


class SamplingNetwork(nn.Module):
    """Scales of frequencies, learned to make the discrepancy large: experimental.

    Noise rows pass through three linear layers, each with batch normalisation over the rows, and LeakyReLU 0.2 (tanh at
    the end).

    Args:
        dim: D, the size of the features.
        rank: width of the hidden layers; None for D, which at D = 2048 are 12.6 million weights.

    Shape:
        - input, output: ``(R, D)``, R at least 2

    Raises:
        ValueError: if a size is below 1.

    Example:
        >>> sum(p.numel() for p in SamplingNetwork(2048, rank=128).parameters())
        547584

    Reference:
        S. Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective", CVPR 2025,
        section 3; the layers are those of the released code, ``rank`` is ours.
    """

    @check_types
    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        super().__init__()
        hidden = dim if rank is None else rank
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and rank must be at least 1, got {dim!r} and {rank!r}")
        self.dim = dim
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, dim),
            nn.BatchNorm1d(dim),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Return scales ``(R, D)`` in (-1, 1)."""
        scales: Tensor = self.layers(noise)
        return scales


class FrequencySampler:
    """Draw the frequencies at which characteristic functions are compared.

    Without a network they are normal with mean 0. With one, each row of normal numbers is multiplied by one of the
    network's rows, which 16 of them share: a scale mixture of normals.

    Args:
        num_frequencies: K, at least 1; with a network a multiple of 16, from 32 on.
        scale: standard deviation, above 0. Features have length 1; at small scales their means alone are compared.
        network: see :class:`SamplingNetwork`; its owner trains it, upwards.
        seed: of the draws.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> FrequencySampler(64).draw(2048, "cpu").shape
        torch.Size([64, 2048])
    """

    @check_types
    def __init__(
        self,
        num_frequencies: int = 1024,
        *,
        scale: float = 1.0,
        network: SamplingNetwork | None = None,
        seed: int = 0,
    ) -> None:
        if num_frequencies < 1:
            raise ValueError(f"num_frequencies must be at least 1, got {num_frequencies!r}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be above 0 and finite, got {scale!r}")
        if network is not None and (num_frequencies % _TILE or num_frequencies < 2 * _TILE):
            raise ValueError(
                f"with a network num_frequencies must be a multiple of {_TILE}, from {2 * _TILE} on, got "
                f"{num_frequencies!r}"
            )
        self.num_frequencies = num_frequencies
        self.scale = scale
        self.network = network
        self._generator = PrivateGenerator(seed, "frequencies")

    @check_types
    def draw(self, dim: int, device: torch.device | str) -> Tensor:
        """Return frequencies ``(K, dim)`` float32, with gradient to the network if there is one.

        Raises:
            ValueError: if ``dim`` is below 1, or the network was made for another.
        """
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim!r}")
        generator = self._generator.on(device)
        normal = torch.randn(self.num_frequencies, dim, generator=generator, device=device)
        if self.scale != 1:
            normal *= self.scale
        if self.network is None:
            return normal
        if self.network.dim != dim:
            raise ValueError(f"the network makes frequencies of size {self.network.dim}, the features have size {dim}")
        noise = torch.randn(self.num_frequencies // _TILE, dim, generator=generator, device=device)
        scales: Tensor = self.network(noise)
        return normal * scales.float().repeat(_TILE, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the draws; the network is its owner's."""
        return {"generator": self._generator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the draws where ``state`` was taken."""
        self._generator.load_state_dict(state["generator"])


def _check_weights(alpha: float, beta: float) -> None:
    if not (alpha >= 0 and beta >= 0):
        raise ValueError(f"alpha and beta must be at least 0, got {alpha!r} and {beta!r}")
