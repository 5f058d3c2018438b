"""Maps of log-probabilities that keep the order of the classes in every row, whatever their parameters are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.checks import check_types

__all__ = ["IntegralMap", "MonotoneMap", "PiecewiseLinearMap", "TemperatureEnsemble", "piecewise_linear"]

_STOP = 100.0  # nats; beyond it the last slope goes on


@check_types
def piecewise_linear(inputs: Tensor, slopes: Tensor, *, stop: float = _STOP) -> Tensor:
    r"""Return the integral from 0 of a step function: continuous, increasing, exact at every knot.

    On :math:`[0, \mathrm{stop}]` there are ``S`` segments of equal width :math:`w`, and in segment ``k`` the result is
    :math:`\sum_{j<k} s_j w + s_k (u - k w)`. (The code published with h-calibration measures the position within a
    segment from the mapped value instead; it jumps at the knots as soon as slopes differ from 1.)

    Args:
        inputs: any shape, at least 0; above ``stop`` the last slope goes on.
        slopes: ``(S,)``, at least 0.
        stop: right end of the last segment, positive.

    Returns:
        A tensor like ``inputs``, differentiable in both arguments.

    Raises:
        ValueError: for another shape of the slopes, or ``stop`` not above 0.

    Example:
        >>> piecewise_linear(torch.tensor([0.5, 1.5, 4.0]), torch.tensor([1.0, 3.0]), stop=2.0)
        tensor([ 0.5000,  2.5000, 10.0000])
    """
    if slopes.ndim != 1 or not len(slopes) or not stop > 0:
        raise ValueError(
            f"slopes must be (S,) with at least one, and stop above 0, got {tuple(slopes.shape)} and {stop!r}"
        )
    width = stop / len(slopes)
    index = (inputs / width).nan_to_num(0.0).floor().clamp(0, len(slopes) - 1)  # NaN stays in the position
    position = (inputs - index * width).clamp_min(0)
    index = index.long()
    if torch.is_grad_enabled() and slopes.requires_grad:
        mapped: Tensor = _Segments.apply(slopes, index, position, width)  # type: ignore[no-untyped-call, unused-ignore]
        return mapped
    knots = F.pad(slopes.cumsum(0) * width, (1, 0), value=0.0)
    mapped = knots[index] + slopes[index] * position
    # Rounding must not carry a value past the one at the next knot.
    ends = torch.cat([knots[1:-1], knots.new_full((1,), math.inf)])
    return torch.minimum(mapped, ends[index])


class _Segments(torch.autograd.Function):
    """The values in their segments; sums per segment instead of autograd's scattered writes make it quick."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, slopes: Tensor, index: Tensor, position: Tensor, width: float
    ) -> Tensor:
        ctx.save_for_backward(slopes, index, position)
        ctx.width = width  # type: ignore[attr-defined]
        starts = (slopes.cumsum(0) - slopes) * width
        return starts[index] + slopes[index] * position

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        slopes, index, position = ctx.saved_tensors  # type: ignore[attr-defined]
        flat, segments = index.flatten(), len(slopes)
        within = torch.bincount(flat, (gradient * position).flatten(), segments)
        here = torch.bincount(flat, gradient.flatten(), segments)
        above = here.flip(0).cumsum(0).flip(0) - here
        to_slopes = (within + above * ctx.width).to(slopes.dtype)  # type: ignore[attr-defined]
        return to_slopes, None, gradient * slopes[index], None


class MonotoneMap(nn.Module, ABC):
    """A family of maps from log-probabilities to log-probabilities that keep the order of every row.

    The map in use is in buffers; a fit asks :meth:`start` for leaves to optimise, :meth:`evaluate` for what they give,
    and puts the best of them into the buffers by :meth:`store`.

    Shape:
        - Input: log-probabilities ``(..., C)``.
        - Output: log-probabilities ``(..., C)``.
    """

    @abstractmethod
    def start(self, log_probs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the values from which a fit to these log-probabilities starts."""

    @abstractmethod
    def evaluate(self, leaves: Mapping[str, Tensor], log_probs: Tensor) -> Tensor:
        """Return the mapped log-probabilities, differentiable in the leaves."""

    @abstractmethod
    def store(self, leaves: Mapping[str, Tensor]) -> None:
        """Make these leaves the map in use."""

    @abstractmethod
    def reset(self) -> None:
        """Make the identity the map in use."""

    def _set(self, name: str, value: Tensor) -> None:
        old = self.get_buffer(name)
        setattr(self, name, value.detach().to(device=old.device, dtype=old.dtype).clone())


class TemperatureEnsemble(MonotoneMap):
    r"""A mixture of softmaxes at several temperatures: :math:`P = \sum_m w_m\,\mathrm{softmax}(a_m x)`.

    With :math:`a_m, w_m \ge 0` and :math:`\sum_m w_m = 1`; the "linear" map of h-calibration.

    Args:
        num_members: number of temperatures, at least 1.

    Example:
        >>> log_probs = torch.tensor([[0.7, 0.3]]).log()
        >>> TemperatureEnsemble(2)(log_probs).exp()
        tensor([[0.7000, 0.3000]])
    """

    inverse_temperatures: Tensor
    weights: Tensor

    @check_types
    def __init__(self, num_members: int = 32) -> None:
        super().__init__()
        if num_members < 1:
            raise ValueError(f"num_members must be at least 1, got {num_members!r}")
        self.num_members = num_members
        self.register_buffer("inverse_temperatures", torch.ones(num_members, dtype=torch.float64))
        self.register_buffer("weights", torch.full((num_members,), 1 / num_members, dtype=torch.float64))

    @check_types
    def forward(self, log_probs: Tensor) -> Tensor:
        """Map log-probabilities."""
        if not log_probs.ndim:
            raise ValueError("log_probs must be (..., C), got a tensor without dimensions")
        return self._mix(log_probs, self.inverse_temperatures.to(log_probs.dtype), self.weights.to(log_probs.dtype))

    def start(self, log_probs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw as a linear layer would: the first output is nearly uniform."""
        bound = 1 / math.sqrt(self.num_members)
        drawn = (2 * torch.rand(2, self.num_members, generator=generator, dtype=torch.float64) - 1) * bound
        factors, shares = drawn.to(log_probs)
        return {"factors": factors.clone(), "shares": shares.clone()}

    def evaluate(self, leaves: Mapping[str, Tensor], log_probs: Tensor) -> Tensor:
        """Mix softmaxes of ``|factors|`` with the shares of ``|shares|``."""
        return self._mix(log_probs, leaves["factors"].abs(), self._shares(leaves))

    def store(self, leaves: Mapping[str, Tensor]) -> None:
        """Keep absolute factors and normalised shares."""
        self._set("inverse_temperatures", leaves["factors"].abs())
        self._set("weights", self._shares(leaves))

    def reset(self) -> None:
        """Give every member temperature 1."""
        self._set("inverse_temperatures", torch.ones(self.num_members))
        self._set("weights", torch.full((self.num_members,), 1 / self.num_members, dtype=torch.float64))

    @staticmethod
    def _shares(leaves: Mapping[str, Tensor]) -> Tensor:
        sizes = leaves["shares"].abs()
        return sizes / sizes.sum()

    @staticmethod
    def _mix(log_probs: Tensor, factors: Tensor, shares: Tensor) -> Tensor:
        members = (log_probs.unsqueeze(-2) * factors[:, None]).log_softmax(-1)
        return (members + shares.log()[:, None]).logsumexp(-2)


class PiecewiseLinearMap(MonotoneMap):
    r"""Minus log-probabilities through :func:`piecewise_linear`, then a softmax; the "pwlinear" map of h-calibration.

    Args:
        num_segments: segments of equal width on [0, 100] nats, at least 1; 1 is temperature scaling.

    Example:
        >>> log_probs = torch.tensor([[0.7, 0.3]]).log()
        >>> PiecewiseLinearMap(10)(log_probs).exp()
        tensor([[0.7000, 0.3000]])
    """

    slopes: Tensor

    @check_types
    def __init__(self, num_segments: int = 100) -> None:
        super().__init__()
        if num_segments < 1:
            raise ValueError(f"num_segments must be at least 1, got {num_segments!r}")
        self.num_segments = num_segments
        self.register_buffer("slopes", torch.ones(num_segments, dtype=torch.float64))

    @check_types
    def forward(self, log_probs: Tensor) -> Tensor:
        """Map log-probabilities."""
        return (-piecewise_linear(-log_probs, self.slopes.to(log_probs.dtype))).log_softmax(-1)

    def start(self, log_probs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Start at the identity."""
        return {"slopes": log_probs.new_ones(self.num_segments)}

    def evaluate(self, leaves: Mapping[str, Tensor], log_probs: Tensor) -> Tensor:
        """Use the absolute values of the leaves as slopes."""
        return (-piecewise_linear(-log_probs, self._slopes(leaves))).log_softmax(-1)

    def store(self, leaves: Mapping[str, Tensor]) -> None:
        """Keep the slopes."""
        with torch.no_grad():
            self._set("slopes", self._slopes(leaves))

    def reset(self) -> None:
        """Give every segment slope 1."""
        self._set("slopes", torch.ones(self.num_segments))

    def _slopes(self, leaves: Mapping[str, Tensor]) -> Tensor:
        return leaves["slopes"].abs()


class IntegralMap(PiecewiseLinearMap):
    r"""The integral of a small positive network, :math:`f(u) = \int_0^u (1 + \mathrm{ELU}(g(t)))\,dt`.

    The "nonlinear" map of h-calibration and the diagonal one of intra-order-preserving nets. The integrand is
    evaluated at the midpoints of a fine grid, so the map in use is a :class:`PiecewiseLinearMap` and increasing
    exactly, where a quadrature with its own nodes for every input is so only up to its error.

    Args:
        hidden: width of both hidden layers, at least 1.
        num_segments: cells of the grid on [0, 100] nats.

    Example:
        >>> IntegralMap(10).slopes.shape
        torch.Size([500])
    """

    @check_types
    def __init__(self, hidden: int = 10, num_segments: int = 500) -> None:
        super().__init__(num_segments)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden!r}")
        self.hidden = hidden

    def start(self, log_probs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Start at the identity, with inner layers drawn as linear layers are."""
        sizes = (1, self.hidden, self.hidden)
        leaves = {"scale": torch.stack([-log_probs.mean(), log_probs.std().clamp_min(1e-6)])}
        for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            bound = 1 / math.sqrt(fan_in)
            drawn = (2 * torch.rand(fan_out, fan_in + 1, generator=generator, dtype=torch.float64) - 1) * bound
            drawn = drawn.to(log_probs)
            leaves |= {f"weight{layer}": drawn[:, :-1].clone(), f"bias{layer}": drawn[:, -1].clone()}
        # A last layer of zeros has slope 1 everywhere.
        return leaves | {"weight2": log_probs.new_zeros(1, self.hidden), "bias2": log_probs.new_zeros(1)}

    def _slopes(self, leaves: Mapping[str, Tensor]) -> Tensor:
        middle, spread = leaves["scale"].detach()  # standardises the input; not learned
        grid = (torch.arange(self.num_segments, device=middle.device, dtype=middle.dtype) + 0.5) * (
            _STOP / self.num_segments
        )
        hidden = ((grid - middle) / spread)[:, None]
        for layer in range(2):
            hidden = F.linear(hidden, leaves[f"weight{layer}"], leaves[f"bias{layer}"]).relu()
        return 1 + F.elu(F.linear(hidden, leaves["weight2"], leaves["bias2"]).squeeze(1))
