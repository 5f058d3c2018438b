"""Temperature scaling: one number that rescales all logits, found exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_plugins.calibration.calibrator import Calibrator, check_fit_data, row_tiles
from lightning_plugins.calibration.metrics import ece
from lightning_plugins.checks import check_types, warn_caller

__all__ = ["Loss", "TemperatureScaling", "fit_temperature", "fit_temperature_by_ece"]

Loss = Literal["nll", "brier"]
"""What a fit minimises: the mean negative log-likelihood, or the mean Brier score."""

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-3, 1e3
_MANY_ELEMENTS = 2**18


@check_types
def fit_temperature(logits: Tensor, labels: Tensor, *, loss: Loss = "nll") -> float:
    r"""Return the temperature ``T`` that minimises the mean negative log-likelihood of ``softmax(logits / T)``.

    That loss is convex in ``1 / T``. A safeguarded Newton iteration with the third and fourth derivatives finds its
    minimum to a relative 1e-8, with sums in float64 whatever the type of the logits. It starts
    from a solution on every fourth row where there are many rows, found in the same way; one pass over all of them is
    then mostly enough.

    The Brier score, which a few confident mistakes sway less, can have several minima: the best of a grid of 61
    temperatures is refined to where the slope is zero, in float64, at about eighty passes over the data.

    Args:
        logits: held-out logits ``(N, C)``, any floating type, finite.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        loss: ``"nll"`` or ``"brier"``.

    Returns:
        The temperature, in [1e-3, 1e3]; 1 if it makes no difference because every row is constant.

    Raises:
        TypeError: if ``logits`` are not floating-point or ``labels`` not integers.
        ValueError: for wrong shapes, no rows, a label outside ``[0, C)``, non-finite logits, or probabilities, or
            for an unknown loss.

    Warns:
        UserWarning: if the minimum is at a bound: no label is ever outscored (lower), or the logits predict no better
            than a uniform guess (upper).

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])  # three right, one wrong
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 1, 1])), 6)  # 4 / log(3)
        3.640957

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, eq. 9. Their
        code stops far from the minimum; see ``benchmarks/claims/temperature_scaling.py``.
    """
    _check_loss(loss)
    with torch.inference_mode(False), torch.no_grad():
        solution = _SOLVERS[loss](*check_fit_data(logits, labels))
    warn_at_bounds(solution)
    return solution.temperature


@check_types
def fit_temperature_by_ece(
    logits: Tensor, labels: Tensor, *, temperatures: Sequence[float] | None = None, num_bins: int = 15
) -> float:
    """Return the temperature of a grid with the smallest expected calibration error: a baseline, not a recommendation.

    Several papers report temperatures found like this. The error is a sum of absolute values over bins, so its smallest
    value fits the noise of the held-out set, and quoted on that set it flatters; :func:`fit_temperature` does neither.

    Args:
        logits: held-out logits ``(N, C)``, any floating type, finite.
        labels: true classes ``(N,)``, integers in ``[0, C)``.
        temperatures: the grid, positive; None for 0.1, 0.2, ..., 10. Of equal ones the first counts.
        num_bins: equal-width bins of the error, at least 1.

    Raises:
        TypeError: if ``logits`` are not floating-point or ``labels`` not integers.
        ValueError: as for :func:`fit_temperature`, or if a temperature is not positive or there is none.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])  # three right, one wrong
        >>> fit_temperature_by_ece(logits, torch.tensor([0, 0, 1, 1]))
        3.6
    """
    grid = [step / 10 for step in range(1, 101)] if temperatures is None else list(temperatures)
    if not grid or not all(0 < temperature < math.inf for temperature in grid):
        raise ValueError(f"temperatures must be at least one, positive and finite, got {grid}")
    with torch.inference_mode(False), torch.no_grad():
        logits, labels = check_fit_data(logits, labels)
        wide = logits.double()
        errors = [float(ece(wide / t, labels, num_bins=num_bins, input="logits")) for t in grid]
    return grid[errors.index(min(errors))]


class TemperatureScaling(Calibrator):
    """Divide all logits by one temperature, fitted on held-out data; the predicted class never changes.

    See :func:`fit_temperature` for the fit. ``fit_info`` also holds ``iterations`` (passes over all rows) and
    ``gradient`` (size of the loss's slope in ``log T`` that the last pass leaves, in nats for ``"nll"``).

    Args:
        loss: ``"nll"`` or ``"brier"``.
        smooth: whether to mix the result with the uniform distribution, which gets the weight ``1 / (N + 1)`` for ``N``
            held-out samples, as if one more sample had been uniformly random. That bounds the loss of a confident
            mistake, which counts where the held-out set holds none and the temperature comes out at its lower bound.

    Shape:
        - Input: logits ``(..., C)``.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for an unknown loss.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])
        >>> calibrator = TemperatureScaling().fit(logits, torch.tensor([0, 0, 1, 1]))
        >>> round(calibrator.temperature, 4), calibrator(logits).exp()[0].round(decimals=4)
        (3.641, tensor([0.7500, 0.2500]))

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """

    preserves_ranking = True
    log_temperature: Tensor
    uniform_weight: Tensor

    @check_types
    def __init__(self, *, loss: Loss = "nll", smooth: bool = False) -> None:
        super().__init__()
        _check_loss(loss)
        self.loss, self.smooth = loss, smooth
        self.register_buffer("log_temperature", torch.zeros((), dtype=torch.float64))
        if smooth:
            self.register_buffer("uniform_weight", torch.zeros((), dtype=torch.float64))

    @property
    def temperature(self) -> float:
        """The temperature: above 1 softens overconfident predictions, below 1 sharpens; 1 before a fit."""
        return math.exp(float(self.log_temperature))

    def quantities(self) -> dict[str, float]:
        """Return the temperature."""
        return {"temperature": self.temperature}

    def extra_repr(self) -> str:
        """Show the temperature."""
        return f"temperature={self.temperature:.4g}"

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        with torch.no_grad():
            solution = _SOLVERS[self.loss](logits, labels)
        warn_at_bounds(solution)
        self.log_temperature = torch.tensor(
            math.log(solution.temperature), dtype=self.log_temperature.dtype, device=self.log_temperature.device
        )
        if self.smooth:
            self.uniform_weight = torch.full_like(self.uniform_weight, 1 / (len(labels) + 1))
        return {
            "iterations": solution.iterations,
            "gradient": solution.gradient,
            "converged": solution.converged,
        }

    def _calibrate(self, logits: Tensor) -> Tensor:
        log_probs = (logits * (-self.log_temperature).exp().to(logits.dtype)).log_softmax(-1)
        if not self.smooth:
            return log_probs
        weight = self.uniform_weight.to(logits.dtype)
        return torch.logaddexp(log_probs + torch.log1p(-weight), (weight / logits.shape[-1]).log())


class Solution(NamedTuple):
    """What a fit of a temperature found."""

    temperature: float
    iterations: int  # passes over all rows
    gradient: float  # of the loss in log T, at most, estimated
    converged: bool
    why_bound: str = ""


def solve_temperature(
    logits: Tensor, labels: Tensor, *, weights: Tensor | None = None, tolerance: float = 1e-8
) -> Solution:
    """Minimise the negative log-likelihood of checked data, of samples with positive ``weights`` ``(N,)`` if given."""
    # b: 1 / T. d1 to d4: derivatives of the mean loss in b, which are the mean cumulants of each row's logits under its
    # softmax (the first less the label's logit).
    lowest, highest = _to_float32(1 / _MAX_TEMPERATURE), _to_float32(1 / _MIN_TEMPERATURE)
    b, low, high = 1.0, lowest, highest
    if logits.numel() >= _MANY_ELEMENTS and len(logits) >= 2**11:
        # Its own sampling error, a percent or so, makes a finer tolerance pointless.
        some = None if weights is None else weights[::4]
        start = solve_temperature(logits[::4], labels[::4], weights=some, tolerance=1e-3)
        if not start.why_bound:
            b = _to_float32(1 / start.temperature)
    low_is_open = high_is_open = True  # a bound that has not been evaluated
    for iteration in range(1, 101):
        margin, d1, d2, d3, d4 = _derivatives(logits, labels, b, weights)
        slope = abs(d1) * b
        if margin == 0 and d1 == 0 and bool((logits == logits[:, :1]).all()):
            return Solution(1.0, iteration, slope, True)
        if margin == 0:  # the loss falls for ever as T goes to 0
            return Solution(_MIN_TEMPERATURE, iteration, slope, True, "every label has the largest logit of its row")
        if d1 > 0 and b == lowest:
            why = "the logits predict these labels no better than a uniform guess"
            return Solution(_MAX_TEMPERATURE, iteration, slope, True, why)
        if d1 < 0 and b == highest:
            return Solution(_MIN_TEMPERATURE, iteration, slope, True, "the logits hardly differ from one another")
        if d1 > 0:
            high, high_is_open = b, False
        else:
            low, low_is_open = b, False

        newton = -d1 / d2 if d2 > 0 else math.copysign(math.inf, -d1)
        step, error = newton, abs(newton)
        if abs(newton) < b:
            # The root s of d1 + d2 s + d3 s^2 / 2 + d4 s^3 / 6, as a series in the Newton step.
            a3, a4 = d3 / (2 * d2), d4 / (6 * d2)
            second, third = -a3 * newton**2, (2 * a3**2 - a4) * newton**3
            if abs(third) < abs(second) / 2 < abs(newton) / 4:
                step = newton + second + third
                error = third**2 / abs(second)  # the size of the next term, were they geometric
        if error <= tolerance * b and low <= b + step <= high:
            return Solution(1 / (b + step), iteration, error * d2 * b, True)
        b = _to_float32(b + step)
        if b >= high:
            b = high if high_is_open else _to_float32(math.sqrt(low * high))
        elif b <= low:
            b = low if low_is_open else _to_float32(math.sqrt(low * high))
    return Solution(1 / b, iteration, slope, False)


def _to_float32(number: float) -> float:
    # Where the tiles are float32 the derivatives belong to the rounded b; so b itself is rounded before it is used.
    return torch.tensor(number, dtype=torch.float32).item()


def _derivatives(logits: Tensor, labels: Tensor, b: float, weights: Tensor | None) -> list[float]:
    """Return the mean margin of the labels (at most 0) and the loss's first four derivatives in ``b``."""
    # Over many elements the rounding of single float32 numbers averages out to less than 1e-8.
    narrow = logits.dtype != torch.float64 and logits.numel() >= _MANY_ELEMENTS
    dtype = torch.float32 if narrow else torch.float64
    tiles = row_tiles(logits, labels)
    # Fresh memory for each tile would cost more than the arithmetic.
    centred_memory, power_memory = torch.empty((2, *tiles[0][0].shape), dtype=dtype, device=logits.device)
    sums = torch.empty(
        (6, len(logits)), dtype=dtype, device=logits.device
    )  # of each row: softmax numerators times z^0 to z^4; the margin
    done = 0
    for rows, classes in tiles:
        here = slice(done, done + len(rows))
        centred = centred_memory[: len(rows)].copy_(rows)
        centred -= centred.amax(1, keepdim=True)
        power = torch.mul(centred, b, out=power_memory[: len(rows)]).exp_()
        torch.sum(power, 1, out=sums[0, here])
        for order in range(1, 5):
            torch.sum(power.mul_(centred), 1, out=sums[order, here])
        sums[5, here] = centred.gather(1, classes[:, None]).squeeze(1)
        done += len(rows)
    mass, s1, s2, s3, s4, margin = sums.double()
    m1, m2, m3, m4 = s1 / mass, s2 / mass, s3 / mass, s4 / mass
    k2 = m2 - m1 * m1
    k3 = m3 - m1 * (3 * k2 + m1 * m1)
    k4 = m4 - 4 * m3 * m1 - 3 * m2 * m2 + 12 * m2 * m1**2 - 6 * m1**4
    parts = margin, m1 - margin, k2, k3, k4
    if weights is None:
        means = [part.mean() for part in parts]
    else:
        means = [(part * weights).sum() / weights.sum() for part in parts]
    found: list[float] = torch.stack(means).tolist()
    return found


def _solve_brier(logits: Tensor, labels: Tensor) -> Solution:
    from scipy.optimize import brentq

    if bool((logits == logits[:, :1]).all()):
        return Solution(1.0, 0, 0.0, True)
    passes = 0

    def score_and_slope(log_temperature: float) -> tuple[float, float]:
        nonlocal passes
        passes += 1
        score, slope = _brier(logits, labels, math.exp(-log_temperature))
        return score, -slope

    bound = math.log(_MAX_TEMPERATURE)
    grid = [bound * step / 30 for step in range(-30, 31)]
    scores, slopes = zip(*(score_and_slope(log_temperature) for log_temperature in grid), strict=True)
    best = scores.index(min(scores))
    low, high = max(best - 1, 0), min(best + 1, len(grid) - 1)
    # The minimum is on the side that the slope says; only beyond a bound does the slope not turn.
    low, high = (low, best) if slopes[best] > 0 else (best, high)
    if slopes[low] >= 0 or slopes[high] <= 0:
        why = {0: "the Brier score still falls there", len(grid) - 1: "the Brier score still falls there"}.get(best, "")
        return Solution(math.exp(grid[best]), passes, abs(slopes[best]), True, why)
    found = brentq(lambda at: score_and_slope(at)[1], grid[low], grid[high], xtol=1e-10, rtol=1e-12)
    return Solution(math.exp(found), passes + 1, abs(score_and_slope(found)[1]), True)


def _brier(logits: Tensor, labels: Tensor, b: float) -> tuple[float, float]:
    """Return the mean Brier score of ``softmax(b * logits)`` and its derivative in ``log b``."""
    sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for rows, classes in row_tiles(logits, labels):
        scaled = rows.double()
        scaled = (scaled - scaled.amax(1, keepdim=True)) * b
        probs = scaled.softmax(1)
        change = probs * (scaled - (probs * scaled).sum(1, keepdim=True))
        probs[torch.arange(len(rows), device=rows.device), classes] -= 1
        sums += torch.stack([probs.square().sum(), 2 * (probs * change).sum()])
    score, slope = (sums / len(labels)).tolist()
    return score, slope


_SOLVERS: dict[str, Callable[[Tensor, Tensor], Solution]] = {"nll": solve_temperature, "brier": _solve_brier}


def _check_loss(loss: str) -> None:
    if loss not in _SOLVERS:
        raise ValueError(f"loss must be one of {', '.join(get_args(Loss))}, got {loss!r}")


def warn_at_bounds(solution: Solution) -> None:
    """Warn if a temperature is at a bound."""
    if not solution.why_bound:
        return
    if solution.temperature == _MIN_TEMPERATURE:
        meaning = "the fitted map makes every prediction all but certain"
    else:
        meaning = "the fitted map makes every prediction all but uniform"
    warn_caller(
        f"the temperature stopped at its bound {solution.temperature:g}, because {solution.why_bound}; {meaning}. "
        "Check that logits and labels belong together, and fit on more held-out data that was not trained on"
    )
