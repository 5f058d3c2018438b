"""Ensemble temperature scaling: tempered, plain and uniform probabilities, mixed."""

from __future__ import annotations

import itertools
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_plugins.calibration._scores import like
from lightning_plugins.calibration.calibrator import Calibrator, row_tiles
from lightning_plugins.calibration.temperature import Loss, TemperatureScaling
from lightning_plugins.checks import check_types

__all__ = ["EnsembleTemperatureScaling"]


class EnsembleTemperatureScaling(Calibrator):
    r"""Mix three probabilities: ``w1 softmax(z / T) + w2 softmax(z) + w3 / C``, weights that sum to 1.

    Three numbers more flexible than a temperature, and the classes of a sample keep their order all the same. ``T`` is
    fitted first, exactly (:func:`.fit_temperature`); then the weights. The Brier score is quadratic in them, and its
    minimum on the simplex exact. The negative log-likelihood, which is convex in them, takes a few Newton steps on the
    simplex to within 1e-9 of its minimum, to which the EM iteration would come in thousands. The authors' code fits
    temperature and weights by the Brier score.

    Args:
        loss: ``"nll"`` or ``"brier"``.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for an unknown loss.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 3 * torch.randn(2000, 5, generator=generator)
        >>> probs = 0.8 * (logits / 2).softmax(1) + 0.2 / 5  # one label in five is random
        >>> labels = torch.multinomial(probs, 1, generator=generator)[:, 0]
        >>> calibrator = EnsembleTemperatureScaling().fit(logits, labels)
        >>> bool(abs(calibrator(logits).exp() - probs).mean() < 0.015)
        True

    Reference:
        J. Zhang, B. Kailkhura, T. Y.-J. Han, "Mix-n-Match: Ensemble and Compositional Methods for Uncertainty
        Calibration in Deep Learning", ICML 2020, section 3.2.
    """

    preserves_ranking = True
    weights: Tensor

    @check_types
    def __init__(self, *, loss: Loss = "nll") -> None:
        super().__init__()
        if loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {', '.join(get_args(Loss))}, got {loss!r}")
        self.loss: Literal["nll", "brier"] = loss
        self.scaling = TemperatureScaling(loss=loss)
        self.register_buffer("weights", torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))

    @property
    def temperature(self) -> float:
        """The temperature of the first part; 1 before a fit."""
        return self.scaling.temperature

    def quantities(self) -> dict[str, float]:
        """Return the temperature and the weights of the tempered, plain and uniform parts."""
        names = "weight_tempered", "weight_plain", "weight_uniform"
        return {"temperature": self.temperature, **dict(zip(names, self.weights.tolist(), strict=True))}

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        with torch.no_grad():
            self.scaling.fit(logits, labels)
            if self.loss == "nll":
                weights, steps, gap = _likelihood_weights(self._label_probabilities(logits, labels))
            else:
                weights, steps, gap = _simplex_minimum(*self._brier_statistics(logits, labels)), 0, 0.0
            self.weights = like(weights, self.weights)
        return {
            "iterations": steps,
            "converged": gap <= _GAP and bool(self.scaling.fit_info["converged"]),
            "gap": gap,
        }

    def _calibrate(self, logits: Tensor) -> Tensor:
        parts = self._log_parts(logits)
        return (parts + self.weights.to(logits.dtype).log()).logsumexp(-1)

    def _log_parts(self, logits: Tensor) -> Tensor:
        uniform = logits.new_full((), -math.log(logits.shape[-1])).expand_as(logits)
        return torch.stack([self.scaling(logits), logits.log_softmax(-1), uniform], -1)

    def _label_probabilities(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the probability ``(N, 3)`` that each part gives to the labels."""
        scale = torch.exp(-self.scaling.log_temperature).to(logits.device)
        found = []
        for rows, classes in row_tiles(logits, labels):
            wide, index = rows.double(), classes[:, None]
            tempered = (wide * scale).log_softmax(1).gather(1, index)
            plain = wide.log_softmax(1).gather(1, index)
            found.append(torch.cat([tempered, plain, torch.full_like(plain, -math.log(logits.shape[1]))], 1))
        return torch.cat(found).exp()

    def _brier_statistics(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``b`` of the mean Brier score ``w^T A w - 2 b^T w + 1``."""
        scale = torch.exp(-self.scaling.log_temperature).to(logits.device)
        products = logits.new_zeros((3, 3), dtype=torch.float64)
        for rows, _ in row_tiles(logits, labels):
            wide = rows.double()
            tempered, plain = (wide * scale).softmax(1), wide.softmax(1)
            parts = torch.stack([tempered, plain, torch.full_like(plain, 1 / plain.shape[1])]).flatten(1)
            products += parts @ parts.T
        return products / len(labels), self._label_probabilities(logits, labels).mean(0)


_GAP = 1e-9


def _likelihood_weights(probs: Tensor) -> tuple[Tensor, int, float]:
    """Return the weights that maximise the mean log of ``probs @ weights``, the steps and the gap that is left."""
    # One step of the EM iteration puts every weight where it can grow.
    weights = probs.new_tensor([0.98, 0.01, 0.01])
    weights = weights * (probs / (probs @ weights)[:, None]).mean(0)
    mixed = probs @ weights
    for step in range(1, 101):
        ratios = probs / mixed[:, None]
        growth = ratios.mean(0)
        # By concavity no weights gain more than the log of the largest growth.
        gap = math.log(max(1.0, float(growth.max())))
        if gap <= _GAP:
            return weights, step, gap
        curvature = ratios.T @ ratios / len(ratios)
        target = _simplex_minimum(curvature, curvature @ weights + growth).to(weights.device)
        length = 1.0
        while length > 1e-9:
            tried = weights + length * (target - weights)
            gained = (probs @ tried).log().mean() - mixed.log().mean()
            if gained >= 0.1 * length * growth @ (target - weights):
                break
            length /= 2
        weights = tried / tried.sum()
        mixed = probs @ weights
    return weights, step, gap


def _simplex_minimum(products: Tensor, hits: Tensor) -> Tensor:
    """Minimise ``w^T A w - 2 b^T w`` on the simplex, by the stationary point of each of its seven faces."""
    products, hits = products.cpu(), hits.cpu()
    best, least = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), math.inf
    for size in (1, 2, 3):  # of equal ones the smallest face counts
        for face in itertools.combinations(range(3), size):
            index = list(face)
            system = torch.zeros((size + 1, size + 1), dtype=torch.float64)
            system[:size, :size] = products[index][:, index]
            system[size, :size] = system[:size, size] = 1
            right = torch.cat([hits[index], hits.new_ones(1)])
            solution = torch.linalg.lstsq(system, right, driver="gelsd").solution[:size]
            if bool((solution < 0).any()):
                continue
            weights = torch.zeros(3, dtype=torch.float64)
            weights[index] = solution / solution.sum()
            value = float(weights @ products @ weights - 2 * hits @ weights)
            if value < least - 1e-14:
                best, least = weights, value
    return best
