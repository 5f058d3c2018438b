"""All calibrators beside each other: which there are, how their fits went, what they are worth, and a picture of it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plugins._progress import progress_bar
from lightning_plugins.calibration.binning import (
    BayesianBinning,
    HistogramBinning,
    PlattBinning,
    TopLabelHistogramBinning,
)
from lightning_plugins.calibration.bootstrap import Estimate, calibration_report
from lightning_plugins.calibration.calibrator import Calibrator, check_fit_data
from lightning_plugins.calibration.ensemble_temperature import EnsembleTemperatureScaling
from lightning_plugins.calibration.h_calibration import HCalibration
from lightning_plugins.calibration.intra_order_preserving import IntraOrderPreserving
from lightning_plugins.calibration.isotonic import IsotonicCalibration
from lightning_plugins.calibration.label_shift import PriorCorrectedTemperature
from lightning_plugins.calibration.linear import DirichletCalibration, MatrixScaling, VectorScaling
from lightning_plugins.calibration.metrics import ReliabilityBins, reliability_bins
from lightning_plugins.calibration.predictions import Predictions
from lightning_plugins.calibration.reliability import _clean, _draw_accuracy
from lightning_plugins.calibration.spline import SplineCalibration
from lightning_plugins.calibration.temperature import TemperatureScaling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "REPORTED",
    "UNCALIBRATED",
    "Contestant",
    "all_calibrators",
    "comparison_figure",
    "evaluate",
    "fit_all",
    "named",
    "ranked",
    "table_of",
]

UNCALIBRATED = "uncalibrated"
REPORTED = ("nll", "brier", "accuracy", "ece", "classwise_ece", "ks_error", "smooth_ece")
_LOGITS: Predictions = "logits"
_LOG_PROBS: Predictions = "log_probs"
_PERCENT = {"accuracy", "ece", "equal_mass_ece", "ks_error", "smooth_ece", "debiased_ece"}
_TITLES = {
    "nll": "NLL, nats",
    "brier": "Brier score",
    "accuracy": "accuracy, %",
    "ece": "ECE, %",
    "equal_mass_ece": "equal-mass ECE, %",
    "classwise_ece": "class-wise ECE, 1e-4",
    "ks_error": "KS error, %",
    "smooth_ece": "smooth ECE, %",
    "debiased_ece": "debiased ECE, %",
}


def all_calibrators() -> dict[str, Calibrator]:
    """Return one of each calibrator, with variants that differ in kind, by name.

    Left out is what needs a choice: a penalty found by cross-validation (a grid of fits; the penalty is fixed here).

    Example:
        >>> list(all_calibrators())[:2]
        ['TemperatureScaling', 'EnsembleTemperatureScaling']
    """
    return {
        "TemperatureScaling": TemperatureScaling(),
        "EnsembleTemperatureScaling": EnsembleTemperatureScaling(),
        "PriorCorrectedTemperature": PriorCorrectedTemperature(),
        "VectorScaling": VectorScaling(),
        "MatrixScaling": MatrixScaling(),
        "DirichletCalibration": DirichletCalibration(cross_validate=False),
        "IsotonicCalibration": IsotonicCalibration(),
        "IsotonicCalibration_multiclass": IsotonicCalibration("multiclass"),
        "HistogramBinning": HistogramBinning(),
        "TopLabelHistogramBinning": TopLabelHistogramBinning(),
        "PlattBinning": PlattBinning(),
        "BayesianBinning": BayesianBinning(),
        "SplineCalibration": SplineCalibration(),
        "IntraOrderPreserving_diagonal": IntraOrderPreserving("diagonal"),
        "IntraOrderPreserving_order_invariant": IntraOrderPreserving("order_invariant"),
        "IntraOrderPreserving_order_preserving": IntraOrderPreserving("order_preserving"),
        "HCalibration": HCalibration(max_epochs=300),
    }


def named(calibrators: Mapping[str, Calibrator] | Sequence[Calibrator] | None) -> dict[str, Calibrator]:
    """Return calibrators by name: those of a mapping, of a list by class, or all of them.

    Raises:
        TypeError: if one is no :class:`.Calibrator`.
        ValueError: if there is none, or one takes the name ``uncalibrated``.

    Example:
        >>> list(named([TemperatureScaling(), TemperatureScaling(smooth=True)]))
        ['TemperatureScaling', 'TemperatureScaling_2']
    """
    if calibrators is None:
        return all_calibrators()
    if isinstance(calibrators, Mapping):
        by_name = dict(calibrators)
    else:
        by_name, seen = {}, dict[str, int]()
        for calibrator in calibrators:
            name = type(calibrator).__name__
            seen[name] = seen.get(name, 0) + 1
            by_name[name if seen[name] == 1 else f"{name}_{seen[name]}"] = calibrator
    for name, calibrator in by_name.items():
        if not isinstance(calibrator, Calibrator):
            raise TypeError(
                f"calibrators must be Calibrator objects such as TemperatureScaling(), got {type(calibrator).__name__} "
                f"for {name!r}"
            )
    if not by_name:
        raise ValueError("calibrators must hold at least one, or be None for all of them")
    if UNCALIBRATED in by_name:
        raise ValueError(f"the name {UNCALIBRATED!r} is taken by the logits as they are; choose another one")
    return by_name


@dataclass
class Contestant:
    """One calibrator: how its fit went, and what its log-probabilities of the test data are worth.

    Attributes:
        name: of the calibrator.
        calibrator: fitted; None for the logits as they are.
        seconds: of the fit.
        failure: why there is no fit; None if there is one.
        remarks: what the fit warned of.
        estimates: by metric, with intervals.
        bins: of the reliability diagram.
        kept: share of the test samples whose predicted class is the network's own.
    """

    name: str
    calibrator: Calibrator | None = None
    seconds: float = 0.0
    failure: str | None = None
    remarks: tuple[str, ...] = ()
    estimates: dict[str, Estimate] = field(default_factory=dict)
    bins: ReliabilityBins | None = None
    kept: float = 1.0

    def plain(self) -> dict[str, Any]:
        """Return numbers and words for JSON; what is infinite or no number becomes None."""
        measured = {
            name: {part: _finite(value) for part, value in estimate._asdict().items()}
            for name, estimate in self.estimates.items()
        }
        report: dict[str, Any] = {"metrics": measured, "predictions_kept": self.kept if measured else None}
        if self.calibrator is not None:
            report |= {
                "class": type(self.calibrator).__name__,
                "preserves_ranking": bool(self.calibrator.preserves_ranking),
                "fit_seconds": round(self.seconds, 3),
                "fit_info": {name: _finite(value) for name, value in self.calibrator.fit_info.items()},
                "quantities": {name: _finite(value) for name, value in self.calibrator.quantities().items()},
                "failure": self.failure,
                "warnings": list(self.remarks),
            }
        return report


def fit_all(calibrators: Mapping[str, Calibrator], logits: Tensor, labels: Tensor) -> list[Contestant]:
    """Fit calibrators one after the other; one that cannot be fitted is kept, with the reason.

    Args:
        calibrators: by name; each is fitted in place.
        logits: ``(N, C)``.
        labels: ``(N,)``.

    Returns:
        The logits as they are, then the calibrators in their order.

    Raises:
        TypeError: if the data are unfit for any calibrator.
        ValueError: likewise.

    Example:
        >>> logits, labels = torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
        >>> [contestant.name for contestant in fit_all({"T": TemperatureScaling()}, logits, labels)]
        ['uncalibrated', 'T']
    """
    logits, labels = check_fit_data(logits, labels)
    contestants = [Contestant(UNCALIBRATED)]
    for name, calibrator in progress_bar(calibrators.items(), title="fitting calibrators", delay=0.5):
        contestant = Contestant(name, calibrator)
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                calibrator.cpu().fit(logits, labels)
            except (ValueError, RuntimeError, ArithmeticError) as error:
                contestant.failure = " ".join(str(error).split())
        contestant.seconds = time.perf_counter() - start
        contestant.remarks = tuple(dict.fromkeys(str(warning.message) for warning in caught))
        contestants.append(contestant)
    return contestants


def evaluate(
    contestants: Sequence[Contestant],
    logits: Tensor,
    labels: Tensor,
    metrics: Sequence[str] = REPORTED,
    *,
    num_bins: int = 15,
    num_bootstrap: int | None = None,
    seed: int = 0,
) -> None:
    """Measure fitted contestants on data that none of them was fitted on; fills in their measurements.

    Args:
        contestants: of :func:`fit_all`.
        logits: ``(N, C)``.
        labels: ``(N,)``.
        metrics: names of :func:`.calibration_report`.
        num_bins: of the binned errors and of the diagrams.
        num_bootstrap: see :func:`.calibration_report`.
        seed: of the resamples.

    Example:
        >>> logits, labels = torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
        >>> contestants = fit_all({"T": TemperatureScaling()}, logits, labels)
        >>> evaluate(contestants, logits, labels)
        >>> [round(contestant.estimates["ece"].value, 2) for contestant in contestants]
        [0.23, 0.0]
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    predicted = wide.argmax(1)
    for contestant in progress_bar(contestants, title="measuring calibrators", delay=0.5):
        if contestant.failure is not None:
            continue
        scores, input = wide, _LOGITS
        if contestant.calibrator is not None:
            with torch.no_grad():
                scores, input = contestant.calibrator(wide), _LOG_PROBS
        report = calibration_report(
            scores, labels, num_bins=num_bins, num_bootstrap=num_bootstrap, seed=seed, input=input
        )
        contestant.estimates = {name: report[name] for name in metrics}
        contestant.bins = reliability_bins(scores, labels, num_bins=num_bins, input=input)
        contestant.kept = (scores.argmax(1) == predicted).double().mean().item()


def table_of(contestants: Sequence[Contestant], metrics: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows: values with their intervals, the time of the fit, and why there is none.

    Example:
        >>> contestant = Contestant("uncalibrated", estimates={"ece": Estimate(0.05, 0.04, 0.07)})
        >>> columns, rows = table_of([contestant], ["ece"])
        >>> columns[:4], rows[0][:4]
        (['calibrator', 'ece', 'ece_low', 'ece_high'], ['uncalibrated', 0.05, 0.04, 0.07])
    """
    columns = ["calibrator"]
    for name in metrics:
        columns += [name, f"{name}_low", f"{name}_high"]
    columns += ["predictions_kept", "fit_seconds", "remark"]
    rows: list[list[Any]] = []
    for contestant in contestants:
        row: list[Any] = [contestant.name]
        for name in metrics:
            row += list(contestant.estimates.get(name, (None, None, None)))
        failed = contestant.failure is not None
        remark = f"not fitted: {contestant.failure}" if failed else "; ".join(contestant.remarks)
        rows.append([*row, None if failed else contestant.kept, round(contestant.seconds, 3), remark])
    return columns, rows


def comparison_figure(contestants: Sequence[Contestant], metrics: Sequence[str], *, num_diagrams: int = 4) -> Figure:
    """Draw a bar for each calibrator and metric, and the reliability diagrams of the logits and of the best few.

    The best are those with the lowest first metric on these very data: a description, no selection.

    Args:
        contestants: evaluated.
        metrics: names, one column of bars each.
        num_diagrams: small reliability diagrams, at least 1, the first one of the logits as they are.

    Example:
        >>> logits, labels = torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
        >>> contestants = fit_all({"T": TemperatureScaling()}, logits, labels)
        >>> evaluate(contestants, logits, labels)
        >>> len(comparison_figure(contestants, ["nll", "ece"]).axes)
        4
    """
    from matplotlib.figure import Figure

    shown = [contestant for contestant in contestants if contestant.estimates]
    best = ranked(shown, metrics[0])
    drawn = [shown[0], *(contestant for contestant in best if contestant is not shown[0])][:num_diagrams]
    height = 0.27 * len(shown) + 1.1
    figure = Figure(figsize=(2.6 + 1.9 * max(len(metrics), 4), height + 3.2), dpi=150, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(height, 3.2))
    above, below = parts
    bars = above.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, name in zip(bars, metrics, strict=True):
        _draw_bars(axes, shown, name)
    bars[0].invert_yaxis()  # shared by all
    bars[0].set_yticks(range(len(shown)), [contestant.name.replace("_", " ") for contestant in shown])
    diagrams = below.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, contestant in zip(diagrams, drawn, strict=True):
        if contestant.bins is None:  # what has estimates has bins
            continue
        _draw_accuracy(axes, contestant.bins)
        axes.set_title(f"{contestant.name.replace('_', ' ')}\nECE {100 * contestant.bins.ece:.1f} %", fontsize=8)
        axes.set_xlabel("Confidence", fontsize=8)
        axes.set_aspect("equal")
    diagrams[0].set_ylabel("Accuracy", fontsize=8)
    return figure


def ranked(contestants: Sequence[Contestant], metric: str) -> list[Contestant]:
    """Return evaluated contestants from the best to the worst by a metric; those without a value are left out."""
    sign = -1 if metric == "accuracy" else 1
    having = [contestant for contestant in contestants if _finite(_value(contestant, metric)) is not None]
    return sorted(having, key=lambda contestant: sign * _value(contestant, metric))


def _value(contestant: Contestant, metric: str) -> float:
    return contestant.estimates[metric].value if metric in contestant.estimates else math.nan


def _draw_bars(axes: Any, contestants: Sequence[Contestant], metric: str) -> None:
    scale = 1e4 if metric == "classwise_ece" else 100 if metric in _PERCENT else 1
    values = [scale * _value(contestant, metric) for contestant in contestants]
    best = ranked(contestants, metric)
    # One calibrator far off would press all others into a line.
    reference = max(values[0], sorted(values)[len(values) // 2])
    limit = 100 if metric == "accuracy" else min(max(values), 2.0 * reference) * 1.25 or 1.0
    for place, (contestant, value) in enumerate(zip(contestants, values, strict=True)):
        first = bool(best) and contestant is best[0]
        axes.barh(
            place, min(value, limit), height=0.7, color="#E69F00" if first else "#8A8A8A" if not place else "#0072B2"
        )
        estimate = contestant.estimates[metric]
        if estimate.low is not None and estimate.high is not None and scale * estimate.low < limit:
            ends = [scale * estimate.low, min(scale * estimate.high, limit)]
            axes.plot(ends, [place, place], color="#333333", lw=1)
        text = f"{value:.3f}" if scale == 1 else f"{value:.2f}"
        axes.annotate(text, (0, place), (2, 0), textcoords="offset points", va="center", fontsize=6, color="white")
    low = min(values) if metric == "accuracy" else 0.0
    axes.set_xlim(max(0.0, low - 5) if metric == "accuracy" else 0.0, limit)
    axes.set_title(_TITLES[metric], fontsize=9)
    _clean(axes)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
