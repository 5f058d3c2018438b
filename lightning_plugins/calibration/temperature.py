"""Temperature scaling: one number that rescales all logits, found exactly."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.calibration.calibrator import Calibrator, check_fit_data, row_tiles

__all__ = ["TemperatureScaling", "fit_temperature"]

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-3, 1e3
_MANY_ELEMENTS = 2**18


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""Return the temperature ``T`` that minimises the mean negative log-likelihood of ``softmax(logits / T)``.

    The loss is convex in ``1 / T``. A safeguarded Newton iteration with the third and fourth derivatives finds its
    minimum to a relative 1e-8, with sums in float64 whatever the type of the logits. It starts
    from a solution on every fourth row where there are many rows, found in the same way; one pass over all of them is
    then mostly enough.

    Args:
        logits: held-out logits ``(N, C)``, any floating type, finite.
        labels: true classes ``(N,)``, integers in ``[0, C)``.

    Returns:
        The temperature, in [1e-3, 1e3]; 1 if it makes no difference because every row is constant.

    Raises:
        TypeError: if ``logits`` are not floating-point or ``labels`` not integers.
        ValueError: for wrong shapes, no rows, a label outside ``[0, C)``, non-finite logits, or probabilities.

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
    with torch.inference_mode(False), torch.no_grad():
        solution = _solve(*check_fit_data(logits, labels))
    _warn_at_bounds(solution)
    return solution.temperature


class TemperatureScaling(Calibrator):
    """Divide all logits by one temperature, fitted on held-out data; the predicted class never changes.

    See :func:`fit_temperature` for the fit. ``fit_info`` also holds ``iterations`` (passes over all rows) and
    ``gradient`` (size of the loss's slope in ``log T`` that the last pass leaves, in nats).

    Shape:
        - Input: logits ``(..., C)``.
        - Output: log-probabilities ``(..., C)``.

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

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_temperature", torch.zeros((), dtype=torch.float64))

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
            solution = _solve(logits, labels)
        _warn_at_bounds(solution)
        self.log_temperature = torch.tensor(
            math.log(solution.temperature), dtype=self.log_temperature.dtype, device=self.log_temperature.device
        )
        return {
            "iterations": solution.iterations,
            "gradient": solution.gradient,
            "converged": solution.converged,
        }

    def _calibrate(self, logits: Tensor) -> Tensor:
        return (logits * (-self.log_temperature).exp().to(logits.dtype)).log_softmax(-1)


class _Solution(NamedTuple):
    temperature: float
    iterations: int  # passes over all rows
    gradient: float  # of the loss in log T, at most, estimated
    converged: bool
    why_bound: str = ""


def _solve(logits: Tensor, labels: Tensor, *, tolerance: float = 1e-8) -> _Solution:
    # b: 1 / T. d1 to d4: derivatives of the mean loss in b, which are the mean cumulants of each row's logits under its
    # softmax (the first less the label's logit).
    lowest, highest = _to_float32(1 / _MAX_TEMPERATURE), _to_float32(1 / _MIN_TEMPERATURE)
    b, low, high = 1.0, lowest, highest
    if logits.numel() >= _MANY_ELEMENTS and len(logits) >= 2**11:
        # Its own sampling error, a percent or so, makes a finer tolerance pointless.
        start = _solve(logits[::4], labels[::4], tolerance=1e-3)
        if not start.why_bound:
            b = _to_float32(1 / start.temperature)
    low_is_open = high_is_open = True  # a bound that has not been evaluated
    for iteration in range(1, 101):
        margin, d1, d2, d3, d4 = _derivatives(logits, labels, b)
        slope = abs(d1) * b
        if margin == 0 and d1 == 0 and bool((logits == logits[:, :1]).all()):
            return _Solution(1.0, iteration, slope, True)
        if margin == 0:  # the loss falls for ever as T goes to 0
            return _Solution(_MIN_TEMPERATURE, iteration, slope, True, "every label has the largest logit of its row")
        if d1 > 0 and b == lowest:
            why = "the logits predict these labels no better than a uniform guess"
            return _Solution(_MAX_TEMPERATURE, iteration, slope, True, why)
        if d1 < 0 and b == highest:
            return _Solution(_MIN_TEMPERATURE, iteration, slope, True, "the logits hardly differ from one another")
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
            return _Solution(1 / (b + step), iteration, error * d2 * b, True)
        b = _to_float32(b + step)
        if b >= high:
            b = high if high_is_open else _to_float32(math.sqrt(low * high))
        elif b <= low:
            b = low if low_is_open else _to_float32(math.sqrt(low * high))
    return _Solution(1 / b, iteration, slope, False)


def _to_float32(number: float) -> float:
    # Where the tiles are float32 the derivatives belong to the rounded b; so b itself is rounded before it is used.
    return torch.tensor(number, dtype=torch.float32).item()


def _derivatives(logits: Tensor, labels: Tensor, b: float) -> list[float]:
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
    means: list[float] = torch.stack([part.mean() for part in (margin, m1 - margin, k2, k3, k4)]).tolist()
    return means


def _warn_at_bounds(solution: _Solution) -> None:
    if not solution.why_bound:
        return
    if solution.temperature == _MIN_TEMPERATURE:
        meaning = "the fitted map makes every prediction all but certain"
    else:
        meaning = "the fitted map makes every prediction all but uniform"
    warnings.warn(
        f"the temperature stopped at its bound {solution.temperature:g}, because {solution.why_bound}; {meaning}. "
        "Check that logits and labels belong together, and fit on more held-out data that was not trained on",
        stacklevel=3,
    )
