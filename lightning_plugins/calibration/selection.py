"""Choosing between calibrators by cross-validation on the calibration split."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from lightning_plugins.calibration._criteria import criterion_of
from lightning_plugins.calibration.calibrator import Calibrator
from lightning_plugins.checks import check_types

__all__ = ["CalibratorSelection", "Criterion"]

Criterion = Literal["nll", "brier", "ece", "debiased_ece", "classwise_ece"]
"""What a calibrator is chosen by, on rows that it was not fitted on; lower is better."""


class CalibratorSelection(Calibrator):
    """Fit several calibrators, keep the one that does best on rows that it was not fitted on.

    The rows are dealt into folds, class by class. Each candidate is fitted ``num_folds`` times, each time without one
    of the folds, and gives log-probabilities for that one; the criterion is taken once, on all of these rows
    together. The winner is then fitted to everything. Only the data given to ``fit`` is used, so that a test set stays
    one, and the criterion of the winner is not its error on the data that it was fitted on.

    ``fit_info`` holds ``chosen`` (position of the winner), ``cv_<criterion>_<name>`` for every candidate and for
    ``uncalibrated``, and the winner's own numbers; :attr:`chosen` is its name. Names are those of the classes, with
    ``_2`` and so on where there are several of one.

    Args:
        calibrators: two or more candidates; earlier ones win ties.
        num_folds: at least 2.
        criterion: see :data:`Criterion`. The NLL is the steadiest; the errors are noisy below 10,000 rows.
        seed: of the private generator that deals the rows.

    Shape:
        - Input: logits ``(..., C)``.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        TypeError: if a candidate is not a :class:`.Calibrator`.
        ValueError: for a wrong argument, or a fit to fewer rows than folds.

    Example:
        >>> from lightning_plugins.calibration import TemperatureScaling
        >>> from lightning_plugins.calibration.h_calibration import HCalibration
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = torch.randn(300, 4, generator=generator)
        >>> labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        >>> flexible = HCalibration(max_epochs=200, patience=20)
        >>> CalibratorSelection([flexible, TemperatureScaling()]).fit(3 * logits, labels).chosen
        'TemperatureScaling'
    """

    winner: Tensor

    @check_types
    def __init__(
        self,
        calibrators: Sequence[Calibrator],
        *,
        num_folds: int = 5,
        criterion: Criterion = "nll",
        seed: int = 0,
    ) -> None:
        super().__init__()
        candidates = tuple(calibrators)
        if len(candidates) < 2:
            raise ValueError(f"calibrators must be at least 2 to choose from, got {len(candidates)}; use one as it is")
        for candidate in candidates:
            if not isinstance(candidate, Calibrator):
                raise TypeError(
                    "calibrators must be Calibrator objects such as TemperatureScaling(), got "
                    f"{type(candidate).__name__}"
                )
        if len({id(candidate) for candidate in candidates}) < len(candidates):
            raise ValueError("calibrators must be different objects, found one twice; make one for each place")
        if num_folds < 2:
            raise ValueError(f"num_folds must be at least 2, got {num_folds!r}")
        if criterion not in get_args(Criterion):
            raise ValueError(f"criterion must be one of {', '.join(get_args(Criterion))}, got {criterion!r}")
        self.calibrators = nn.ModuleList(candidates)
        self.num_folds, self.criterion, self.seed = num_folds, criterion, seed
        self.register_buffer("winner", torch.tensor(0))
        # A number of Python's own, since an exported graph cannot branch on a buffer.
        self._index = 0
        seen: dict[str, int] = {}
        self.names: tuple[str, ...] = ()
        for candidate in candidates:
            name = type(candidate).__name__
            seen[name] = seen.get(name, 0) + 1
            self.names += (name if seen[name] == 1 else f"{name}_{seen[name]}",)

    @property
    def chosen(self) -> str:
        """Name of the winner; of the first candidate before a fit."""
        return self.names[self._index]

    @property
    def best(self) -> Calibrator:
        """The winner itself, fitted to everything."""
        return cast(Calibrator, self.calibrators[self._index])

    @property
    def preserves_ranking(self) -> bool:  # type: ignore[override]
        """Whether the classes of a sample keep their order under the winner."""
        return self.best.preserves_ranking

    def quantities(self) -> dict[str, float]:
        """Return the position of the winner, the criterion of each candidate, and what the winner has to say."""
        scores = {name: float(value) for name, value in self.fit_info.items() if name.startswith("cv_")}
        return {"chosen": float(self._index)} | scores | self.best.quantities()

    def scores(self) -> dict[str, float]:
        """Return the criterion of each candidate and of ``uncalibrated``; empty before a fit."""
        prefix = f"cv_{self.criterion}_"
        return {name.removeprefix(prefix): float(v) for name, v in self.fit_info.items() if name.startswith(prefix)}

    def extra_repr(self) -> str:
        """Show the winner."""
        return f"criterion={self.criterion!r}, chosen={self.chosen!r}" if self.is_fitted else ""

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        if len(labels) < self.num_folds:
            raise ValueError(
                f"{self.num_folds} folds need at least as many rows, got {len(labels)}; lower num_folds or pass more"
            )
        fold_of = self._deal(labels)
        dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
        scores = {"uncalibrated": criterion_of(logits.to(dtype).log_softmax(1), labels, self.criterion)}
        for name, candidate in zip(self.names, self.calibrators, strict=True):
            held_out = logits.new_empty(logits.shape, dtype=dtype)
            for fold in range(self.num_folds):
                rest, this = fold_of != fold, fold_of == fold
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # the fit that counts is the last one, and may warn
                    fitted = cast(Calibrator, copy.deepcopy(candidate)).to(logits.device)
                    fitted.fit(logits[rest], labels[rest])
                with torch.no_grad():
                    held_out[this] = fitted(logits[this])
            scores[name] = criterion_of(held_out, labels, self.criterion)
        values = [scores[name] for name in self.names]
        # NaN is never the least.
        index = min(range(len(values)), key=lambda i: values[i] if values[i] == values[i] else float("inf"))
        cast(Calibrator, self.calibrators[index]).fit(logits, labels)
        self.winner = torch.tensor(index, device=self.winner.device)
        self._index = index
        info = self.best.fit_info
        kept = {name: value for name, value in info.items() if not name.startswith("nll_")}
        return kept | {"chosen": index} | {f"cv_{self.criterion}_{name}": value for name, value in scores.items()}

    def _deal(self, labels: Tensor) -> Tensor:
        """Return the fold of each row, with each class spread evenly over the folds."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        order = order[labels[order].sort(stable=True).indices]
        folds = torch.empty_like(labels)
        folds[order] = torch.arange(len(labels), device=labels.device) % self.num_folds
        return folds

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._index = int(self.winner)

    def _calibrate(self, logits: Tensor) -> Tensor:
        log_probs: Tensor = self.calibrators[self._index](logits)
        return log_probs
