"""The reliability diagram: accuracy against confidence, bin by bin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_plugins.calibration.metrics import ReliabilityBins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["reliability_diagram"]

# Blue and orange of the Okabe-Ito palette, apart for all common forms of colour blindness; the gap is hatched as well.
_ACCURACY, _GAP, _INK, _GRID = "#0072B2", "#E69F00", "#333333", "#E3E3E3"


def reliability_diagram(
    bins: ReliabilityBins,
    after: ReliabilityBins | None = None,
    *,
    title: str | None = None,
    labels: tuple[str, str] = ("Before calibration", "After calibration"),
) -> Figure:
    """Draw a reliability diagram, or two side by side: accuracy, its gap to confidence, and where the samples are.

    Bars reach up to the accuracy of a bin; the hatched part lies between accuracy and mean confidence, and below it is
    how many of the samples the bin holds. Calibrated confidence follows the diagonal.

    Args:
        bins: of :func:`.reliability_bins` or :meth:`.CalibrationError.bins`.
        after: a second set, drawn to the right.
        title: above the whole figure; none by default.
        labels: what the two sets are; one set alone is not labelled.

    Returns:
        A figure with its own canvas; nothing is registered with ``pyplot``. ``figure.savefig(path)`` writes it.

    Example:
        >>> from lightning_plugins.calibration import reliability_bins
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
        >>> figure = reliability_diagram(reliability_bins(probs, torch.tensor([0, 1, 1])))
        >>> [axes.get_title() for axes in figure.axes]
        ['ECE 26.7 %', '']

    Reference:
        M. H. DeGroot, S. E. Fienberg, "The Comparison and Evaluation of Forecasters", The Statistician 32, 1983; the
        form with confidences of C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, figure 1.
    """
    from matplotlib.figure import Figure

    panels = [bins] if after is None else [bins, after]
    figure = Figure(figsize=(3.6 * len(panels) + 0.3, 4.6), dpi=150, layout="constrained")
    grid = figure.subplots(
        2, len(panels), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": [3.4, 1]}
    )
    for column, panel in enumerate(panels):
        upper, lower = grid[0, column], grid[1, column]
        _draw_accuracy(upper, panel)
        _draw_counts(lower, panel)
        error = f"ECE {100 * panel.ece:.1f} %"
        upper.set_title(error if after is None else f"{labels[column]}\n{error}", fontsize=11, color=_INK)
        lower.set_xlabel("Confidence")
    grid[0, 0].set_ylabel("Accuracy")
    grid[1, 0].set_ylabel("Samples")
    grid[0, 0].legend(loc="upper left", fontsize=8.5, frameon=False, handlelength=1.4)
    if title is not None:
        figure.suptitle(title, fontsize=12, color=_INK)
    return figure


def _draw_accuracy(axes: Axes, bins: ReliabilityBins) -> None:
    filled = bins.count > 0
    left = bins.edges[:-1][filled].numpy()
    width = (bins.edges[1:] - bins.edges[:-1])[filled].numpy()
    accuracy, confidence = bins.accuracy[filled], bins.confidence[filled]
    bottom = torch.minimum(accuracy, confidence).numpy()
    height = (accuracy - confidence).abs().numpy()
    axes.bar(left, accuracy.numpy(), width, align="edge", color=_ACCURACY, edgecolor="white", lw=0.6, label="Accuracy")
    axes.bar(
        left,
        height,
        width,
        bottom,
        align="edge",
        color=(*_rgb(_GAP), 0.35),
        edgecolor=_GAP,
        hatch="////",
        lw=0.9,
        label="Gap to confidence",
    )
    axes.plot([0, 1], [0, 1], color=_INK, lw=1.1, ls=(0, (4, 3)), label="Perfect calibration")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    _clean(axes)


def _draw_counts(axes: Axes, bins: ReliabilityBins) -> None:
    share = (bins.count / bins.count.sum().clamp_min(1)).numpy()
    width = (bins.edges[1:] - bins.edges[:-1]).numpy()
    axes.bar(bins.edges[:-1].numpy(), share, width, align="edge", color="#8A8A8A", edgecolor="white", lw=0.6)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    _clean(axes)


def _clean(axes: Axes) -> None:
    axes.grid(color=_GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, color=_GRID, labelcolor=_INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color("#999999")


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
