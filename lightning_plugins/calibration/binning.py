"""Binning calibrators: the score of a class becomes what was seen among the held-out samples with similar scores."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_plugins.calibration._scores import (
    check_num_classes,
    like,
    log_denominators,
    log_normalized,
    log_scores,
    replace_confidence,
)
from lightning_plugins.calibration.calibrator import Calibrator, row_tiles
from lightning_plugins.calibration.linear import VectorScaling
from lightning_plugins.calibration.temperature import TemperatureScaling
from lightning_plugins.checks import check_types

__all__ = ["BayesianBinning", "Binning", "HistogramBinning", "PlattBinning", "Scaling", "TopLabelHistogramBinning"]

Binning = Literal["width", "mass"]
"""Bins of equal width, or bins that hold equally many held-out samples."""

Scaling = Literal["temperature", "vector"]
"""What is fitted before the binning."""


class _ClassBins(Calibrator):
    """A step function of the score for every class, bins ``(lo, hi]``, then rows normalised to sum 1."""

    _looks_up = True
    preserves_ranking = False
    edges: Tensor  # (C, B - 1), ascending; classes with fewer bins end with infinities
    values: Tensor  # (C, B)
    _sized_by_fit = ("edges", "values")

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.zeros((0, 0), dtype=torch.float64))
        self.register_buffer("values", torch.zeros((0, 0), dtype=torch.float64))

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        with torch.no_grad():
            before = self._before_bins(logits, labels)
            scaled = before(logits) if before is not None else logits
            # One class at a time: all scores in float64 at once could take several times the memory of the logits.
            denominators = log_denominators(scaled)
            bins = [
                self._fit_class((scaled[:, k].double() - denominators).exp(), (labels == k).double())
                for k in range(logits.shape[1])
            ]
        width = max(len(values) for _, values in bins)
        edges = torch.full((len(bins), width - 1), torch.inf, dtype=torch.float64)
        levels = torch.zeros((len(bins), width), dtype=torch.float64)
        for k, (inner, values) in enumerate(bins):
            edges[k, : len(inner)] = inner
            levels[k, : len(values)] = values
        self.edges, self.values = like(edges, self.edges), like(levels, self.values)
        return {"converged": True, "bins_max": width}

    def _before_bins(self, logits: Tensor, labels: Tensor) -> Calibrator | None:
        return None

    def _scale(self, logits: Tensor) -> Tensor:
        return logits

    @abstractmethod
    def _fit_class(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inner edges, ascending, and the values of the bins of one class, from its ``(N,)`` scores."""

    def _levels(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values ``(..., C)`` that the bins give, before the rows are normalised, and log-scores."""
        check_num_classes(logits, self.values.shape[0])
        log_probs = log_scores(self._scale(logits).to(self.values.dtype))
        columns = log_probs.exp().reshape(-1, logits.shape[-1]).mT.contiguous()
        levels = self.values.gather(1, torch.searchsorted(self.edges, columns))
        return levels.mT.reshape(logits.shape), log_probs

    def _calibrate(self, logits: Tensor) -> Tensor:
        if self.values.shape[0] == 0:
            return logits.log_softmax(-1)
        return log_normalized(*self._levels(logits)).to(logits.dtype)


class HistogramBinning(_ClassBins):
    """Replace every class's score by the share of held-out samples of that class among those with similar scores.

    Each class against the rest, in bins ``(lo, hi]``; an empty bin gives its midpoint. Rows are normalised to sum 1, a
    row of zeros keeps its probabilities, and single zeros become 1e-38. The predicted class can change, and many
    samples share a prediction: with many classes, bins of equal mass need to be many, or the highest one takes in
    scores from the certain to the unlikely.

    Args:
        num_bins: bins for each class, at least 1.
        binning: ``"width"`` for equal widths, ``"mass"`` for equally many held-out samples, where equal scores stay
            together.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for a wrong argument, or logits of another number of classes than the fit's.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.1, 0.0], [0.0, 4.0], [4.2, 0.0]])
        >>> calibrator = HistogramBinning(num_bins=2).fit(logits, torch.tensor([0, 0, 1, 1]))
        >>> calibrator(logits)[0].exp()
        tensor([0.6667, 0.3333])

    Reference:
        B. Zadrozny, C. Elkan, "Obtaining calibrated probability estimates from decision trees and naive Bayesian
        classifiers", ICML 2001; for several classes C. Guo et al., ICML 2017, section 4.2.
    """

    @check_types
    def __init__(self, num_bins: int = 15, *, binning: Binning = "width") -> None:
        super().__init__()
        _check_at_least_one("num_bins", num_bins)
        if binning not in get_args(Binning):
            raise ValueError(f"binning must be one of {', '.join(get_args(Binning))}, got {binning!r}")
        self.num_bins = num_bins
        self.binning: Binning = binning

    def _fit_class(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        if self.binning == "width":
            inner = torch.arange(1, self.num_bins, dtype=torch.float64, device=scores.device) / self.num_bins
        else:
            inner = _equal_mass_edges(scores, self.num_bins)
        index = torch.searchsorted(inner, scores)
        count = index.bincount(minlength=len(inner) + 1)
        outer = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
        middle = (outer[1:] + outer[:-1]) / 2
        mean = index.bincount(hits, minlength=len(inner) + 1) / count.clamp_min(1)
        return inner, torch.where(count > 0, mean, middle)


class PlattBinning(_ClassBins):
    """Scale first, then replace every scaled score by the mean of those in its bin, of equally many samples.

    The bins hold means of scores, not of labels, which makes them as steady as the scaling, and because the map takes
    few values its calibration error can be measured. Rows are normalised to sum 1. The predicted class can change.

    Args:
        num_bins: bins for each class, at least 1; equal scores stay together.
        scaling: what is fitted first, ``"temperature"`` (:class:`.TemperatureScaling`) or ``"vector"``
            (:class:`.VectorScaling`).

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for a wrong argument, or logits of another number of classes than the fit's.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])
        >>> calibrator = PlattBinning(num_bins=4).fit(logits, torch.tensor([0, 0, 1, 1]))
        >>> calibrator(logits).exp()[0].round(decimals=4)  # two scores in bins of their own: the temperature alone
        tensor([0.7500, 0.2500])

    Reference:
        A. Kumar, P. Liang, T. Ma, "Verified Uncertainty Calibration", NeurIPS 2019, section 4.1. They scale and bin on
        different halves of the held-out set; here both use all of it.
    """

    @check_types
    def __init__(self, num_bins: int = 15, *, scaling: Scaling = "temperature") -> None:
        super().__init__()
        _check_at_least_one("num_bins", num_bins)
        if scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}")
        self.num_bins = num_bins
        self.scaler: Calibrator = TemperatureScaling() if scaling == "temperature" else VectorScaling()

    def quantities(self) -> dict[str, float]:
        """Return those of the scaling."""
        return self.scaler.quantities()

    def _before_bins(self, logits: Tensor, labels: Tensor) -> Calibrator:
        return self.scaler.fit(logits, labels)

    def _scale(self, logits: Tensor) -> Tensor:
        log_probs: Tensor = self.scaler(logits.to(self.values.dtype))
        return log_probs

    def _fit_class(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        inner = _equal_mass_edges(scores, self.num_bins)
        index = torch.searchsorted(inner, scores)
        return inner, index.bincount(scores) / index.bincount()


class BayesianBinning(_ClassBins):
    r"""Average histogram binnings with many numbers of bins, each weighted by how well it explains the labels (BBQ).

    For every class against the rest, binnings of equal mass with :math:`N^{1/3}/10` to :math:`10 N^{1/3}` bins for
    ``N`` samples are scored by the marginal likelihood of their labels under Beta priors: bin ``b`` of ``B``, with
    midpoint ``m``, has the prior ``Beta(s m / B, s (1 - m) / B)``. The output is the weighted mean of the bins'
    posterior means, which is a step function again; rows are normalised to sum 1. The predicted class can change.

    Args:
        strength: ``s``, how many samples the priors of all bins of a binning count together, positive.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for a wrong argument, or logits of another number of classes than the fit's.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = torch.randn(2000, 2, generator=generator)
        >>> labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        >>> calibrator = BayesianBinning().fit(4 * logits, labels)
        >>> error_after = (calibrator(4 * logits).exp() - logits.softmax(1)).abs().mean()
        >>> bool(error_after < 0.5 * ((4 * logits).softmax(1) - logits.softmax(1)).abs().mean())
        True

    Reference:
        M. P. Naeini, G. F. Cooper, M. Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning",
        AAAI 2015.
    """

    @check_types
    def __init__(self, *, strength: float = 2.0) -> None:
        super().__init__()
        if not 0 < strength < float("inf"):
            raise ValueError(f"strength must be positive and finite, got {strength!r}")
        self.strength = strength

    def _fit_class(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        n, device = len(scores), scores.device
        scores, order = scores.sort()
        positives = torch.cat([scores.new_zeros(1), hits[order].cumsum(0)])
        # A cut at position i is between samples i - 1 and i. Equal scores stay together, in the bin below; a cut after
        # the last sample closes an empty bin, which says nothing.
        end_of_ties = torch.searchsorted(scores, scores, right=True)
        edge_at = torch.cat([scores.new_zeros(1), (scores[1:] + scores[:-1]) / 2, scores.new_ones(1)])

        root = n ** (1 / 3)
        numbers = torch.arange(max(1, int(root / 10)), min(n, int(10 * root)) + 1, device=device)
        model = numbers.repeat_interleave(numbers)  # one entry for each bin of each binning
        bin_in_model = torch.arange(len(model), device=device) - (numbers.cumsum(0) - numbers).repeat_interleave(
            numbers
        )
        upper = end_of_ties[(bin_in_model + 1) * n // model - 1]
        first = bin_in_model == 0
        lower = upper.roll(1).masked_fill(first, 0)

        total = (upper - lower).double()
        successes = positives[upper] - positives[lower]
        strength = self.strength / model
        # A bin between equal scores has no width, and no samples either.
        alpha = strength * ((edge_at[upper] + edge_at[lower]) / 2).clamp(1e-12, 1 - 1e-12)
        beta = strength - alpha
        likelihood = strength.lgamma() - (total + strength).lgamma()
        likelihood += (successes + alpha).lgamma() - alpha.lgamma()
        likelihood += (total - successes + beta).lgamma() - beta.lgamma()
        index = torch.arange(len(numbers), device=device).repeat_interleave(numbers)
        weights = scores.new_zeros(len(numbers)).index_add(0, index, likelihood).softmax(0)

        # The mean of step functions is the sum of all their steps.
        means = (successes + alpha) / (total + strength) * weights[index]
        means, lower = means[total > 0], lower[total > 0]
        steps = scores.new_zeros(n).index_add_(0, lower, means - torch.where(lower == 0, 0.0, means.roll(1)))
        # Binnings of no weight would only make the state longer.
        kept = steps.abs() > 1e-9
        kept[0] = False
        return edge_at[:-1][kept], steps.cumsum(0)[torch.cat([kept.new_ones(1), kept[1:]])]


class TopLabelHistogramBinning(Calibrator):
    """Replace the confidence in the predicted class by the accuracy seen for that class at similar confidence.

    Held-out samples are grouped by their predicted class, and each group is cut into bins of about ``points_per_bin``.
    The other classes share what is left in the proportions they had. The predicted class stays and the classes keep
    their order: where one would overtake, the shares of the others are evened out, and an accuracy below ``1 / C``,
    which no predicted class can have as its probability, becomes ``1 / C``. Classes that were never predicted in the
    held-out set keep their confidence. A bin without a mistake leaves 1e-38 to the others, which is dear where the
    negative log-likelihood counts. ``fit_info["guarded"]`` is the share of held-out samples where that was needed.

    Args:
        points_per_bin: held-out samples in a bin, about, at least 1; smaller groups have one bin.

    Shape:
        - Input: logits ``(..., C)``, ``C`` classes.
        - Output: log-probabilities ``(..., C)``.

    Raises:
        ValueError: for a wrong argument, or logits of another number of classes than the fit's.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.1, 0.0], [0.0, 4.0], [4.2, 0.0]])
        >>> calibrator = TopLabelHistogramBinning().fit(logits, torch.tensor([0, 0, 1, 1]))
        >>> calibrator(logits)[0].exp()
        tensor([0.6667, 0.3333])

    Reference:
        C. Gupta, A. Ramdas, "Top-label calibration and multiclass-to-binary reductions", ICLR 2022, algorithm 2.
    """

    preserves_ranking = True
    edges: Tensor  # (C, B - 1), ascending; classes with fewer bins end with infinities
    values: Tensor  # (C, B); NaN for classes without bins
    _sized_by_fit = ("edges", "values")

    @check_types
    def __init__(self, points_per_bin: int = 50) -> None:
        super().__init__()
        _check_at_least_one("points_per_bin", points_per_bin)
        self.points_per_bin = points_per_bin
        self.register_buffer("edges", torch.zeros((0, 0), dtype=torch.float64))
        self.register_buffer("values", torch.zeros((0, 0), dtype=torch.float64))

    def _fit(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | bool]:
        num_classes = logits.shape[1]
        with torch.no_grad():
            tops = [log_scores(rows.double()).max(1) for rows, _ in row_tiles(logits, labels)]
            confidence = torch.cat([top.values for top in tops]).exp()
            predicted = torch.cat([top.indices for top in tops])
            right = (predicted == labels).double()
            bins: list[tuple[Tensor, Tensor]] = []
            for k in range(num_classes):
                scores, hits = confidence[predicted == k], right[predicted == k]
                inner = _equal_mass_edges(scores, max(1, len(scores) // self.points_per_bin))
                index = torch.searchsorted(inner, scores)
                # 0 / 0 marks a class that was never predicted.
                bins.append((inner, index.bincount(hits, minlength=1) / index.bincount(minlength=1)))
        width = max(len(values) for _, values in bins)
        edges = torch.full((num_classes, width - 1), torch.inf, dtype=torch.float64)
        levels = torch.full((num_classes, width), torch.nan, dtype=torch.float64)
        for k, (inner, values) in enumerate(bins):
            edges[k, : len(inner)] = inner
            levels[k, : len(values)] = values
        self.edges, self.values = like(edges, self.edges), like(levels, self.values)
        guarded = 0
        with torch.no_grad():
            for rows, _ in row_tiles(logits, labels):
                guarded += int(self._replaced(rows.double().to(self.values.device))[1].sum())
        return {"converged": True, "bins_max": width, "guarded": guarded / len(labels)}

    def _replaced(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = log_scores(logits.to(self.values.dtype))
        top = log_probs.max(1)
        confidence = top.values.exp()
        index = (self.edges[top.indices] < confidence[:, None]).sum(1, keepdim=True)
        level = self.values[top.indices].gather(1, index).squeeze(1)
        return replace_confidence(log_probs, torch.where(level.isnan(), confidence, level))

    def _calibrate(self, logits: Tensor) -> Tensor:
        if self.values.shape[0] == 0:
            return logits.log_softmax(-1)
        check_num_classes(logits, self.values.shape[0])
        return self._replaced(logits.reshape(-1, logits.shape[-1]))[0].reshape(logits.shape).to(logits.dtype)


def _check_at_least_one(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number!r}")


def _equal_mass_edges(scores: Tensor, num_bins: int) -> Tensor:
    """Return inner edges of bins with equally many of the scores, as nearly as equal scores in one bin allow."""
    scores = scores.sort().values
    n = len(scores)
    if n == 0:
        return scores
    # The bins that tensor_split would make; each is closed by the last of the scores that equal its last one.
    sizes = torch.full((num_bins,), n // num_bins, device=scores.device)
    sizes[: n % num_bins] += 1
    last = (sizes.cumsum(0) - 1).clamp_min(0)
    cuts = torch.unique(torch.searchsorted(scores, scores[last], right=True))
    cuts = cuts[cuts < n]
    return (scores[cuts - 1] + scores[cuts]) / 2
