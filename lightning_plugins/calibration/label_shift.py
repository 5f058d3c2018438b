"""Temperature scaling for data whose classes will be mixed in other proportions than in the held-out set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins.calibration._scores import check_num_classes, like
from lightning_plugins.calibration.calibrator import Calibrator, row_tiles
from lightning_plugins.calibration.temperature import solve_temperature, warn_at_bounds
from lightning_plugins.checks import check_types

__all__ = ["PriorCorrectedTemperature"]


class PriorCorrectedTemperature(Calibrator):
    r"""Move the logits from the class proportions of the held-out set to those to come, then scale by a temperature.

    ``softmax((z + log r) / T)`` with ``r`` the ratio of the proportions to come to those of the held-out labels, as for
    a net that was trained and held out on long-tailed data and will be used on balanced data. ``T`` minimises the
    negative log-likelihood of the held-out set with samples weighted by ``r`` of their label, that is, an estimate of
    the loss on the data to come; ``nll_before`` and ``nll_after`` are weighted in the same way. Assumes that within a
    class the data stay as they are. Held-out proportions are ``(n_c + 1) / (N + C)``, so that a class without samples
    leaves them finite. The predicted class can change.

    Args:
        target_prior: proportions or counts of the ``C`` classes to come, all positive; None for equal ones.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: if a proportion is not positive and finite, or their number is not that of the classes.

    Warns:
        UserWarning: if the temperature is at a bound, as for :func:`.fit_temperature`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 10)
        >>> labels = torch.tensor([0] * 8 + [1] * 2)
        >>> calibrator = PriorCorrectedTemperature().fit(logits, labels)
        >>> calibrator.log_ratio.exp()  # held out: 9/12 and 3/12 with one more of each
        tensor([0.6667, 2.0000], dtype=torch.float64)

    Reference:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori Probabilities",
        Neural Computation 14, 2002, for the ratio.
    """

    preserves_ranking = False
    log_ratio: Tensor
    log_temperature: Tensor
    _sized_by_fit = ("log_ratio",)

    @check_types
    def __init__(self, target_prior: Sequence[float] | None = None) -> None:
        super().__init__()
        self.target_prior = None if target_prior is None else tuple(target_prior)
        if self.target_prior is not None and not all(0 < share < math.inf for share in self.target_prior):
            raise ValueError(f"target_prior must be positive and finite for every class, got {list(self.target_prior)}")
        self.register_buffer("log_ratio", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("log_temperature", torch.zeros((), dtype=torch.float64))

    @property
    def temperature(self) -> float:
        """The temperature; 1 before a fit."""
        return math.exp(float(self.log_temperature))

    def quantities(self) -> dict[str, float]:
        """Return the temperature and the largest ratio of proportions, which says how far the shift goes."""
        if len(self.log_ratio) == 0:
            return {"temperature": self.temperature}
        return {"temperature": self.temperature, "prior_ratio_max": math.exp(float(self.log_ratio.max()))}

    def extra_repr(self) -> str:
        """Show the temperature."""
        return f"temperature={self.temperature:.4g}"

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        num_classes = logits.shape[1]
        target = torch.tensor(self.target_prior or [1.0] * num_classes, dtype=torch.float64, device=logits.device)
        if len(target) != num_classes:
            raise ValueError(
                f"target_prior has {len(target)} classes, the logits have {num_classes}; give one share a class"
            )
        source = labels.bincount(minlength=num_classes).double() + 1
        log_ratio = (target / target.sum()).log() - (source / source.sum()).log()
        with torch.no_grad():
            corrected = logits + log_ratio if logits.dtype == torch.float64 else logits.float() + log_ratio.float()
            solution = solve_temperature(corrected, labels, weights=log_ratio.exp()[labels])
        warn_at_bounds(solution)
        self.log_ratio = like(log_ratio, self.log_ratio)
        self.log_temperature = torch.full_like(self.log_temperature, math.log(solution.temperature))
        return {"iterations": solution.iterations, "gradient": solution.gradient, "converged": solution.converged}

    def _calibrate(self, logits: Tensor) -> Tensor:
        scale = (-self.log_temperature).exp().to(logits.dtype)
        if self.log_ratio.shape[0] == 0:
            return (logits * scale).log_softmax(-1)
        check_num_classes(logits, self.log_ratio.shape[0])
        return ((logits + self.log_ratio.to(logits.dtype)) * scale).log_softmax(-1)

    def _mean_nll(self, logits: Tensor, labels: Tensor) -> tuple[float, float]:
        # Without the weights a right correction looks like a loss, on the data that it corrects for.
        device, dtype = self.fitted.device, torch.float64
        weights = self.log_ratio.exp().to(logits.device, dtype)
        totals, total = torch.zeros(2, dtype=dtype, device=logits.device), weights[labels].sum()
        with torch.no_grad():
            for rows, classes in row_tiles(logits, labels):
                after = self(rows.to(device)).to(rows.device)
                for position, log_probs in enumerate((rows.to(after.dtype).log_softmax(1), after)):
                    totals[position] -= (log_probs.gather(1, classes[:, None]).squeeze(1) * weights[classes]).sum()
        before, after_total = (totals / total).tolist()
        return before, after_total
