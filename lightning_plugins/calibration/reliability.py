"""The reliability diagram: accuracy against confidence, bin by bin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_plugins.calibration.metrics import ReliabilityBins
from lightning_plugins.checks import check_types

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["reliability_diagram"]

# Blue and orange of the Okabe-Ito palette, apart for all common forms of colour blindness; the gap is hatched as well.
_ACCURACY, _GAP, _INK, _GRID = "#0072B2", "#E69F00", "#333333", "#E3E3E3"


@check_types
def reliability_diagram(
    bins: ReliabilityBins,
    after: ReliabilityBins | None = None,
    *,
    title: str | None = None,
    labels: tuple[str, str] = ("Before calibration", "After calibration"),
) -> Figure:
    """Draw a reliability diagram, or two side by side: accuracy, its gap to confidence, and where the samples are.

    The hatched part of a bar lies between the accuracy and the mean confidence of its bin: orange where confidence is
    too high, blue where it is too low. Below is the share of the samples in each bin.

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
        ['ECE 40.0 %', '']

    Reference:
        M. H. DeGroot, S. E. Fienberg, "The Comparison and Evaluation of Forecasters", The Statistician 32, 1983; the
        form with confidences of C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, figure 1.
    """
    from matplotlib.figure import Figure

    panels = [bins] if after is None else [bins, after]
    figure = Figure(figsize=(3.5 * len(panels) + 0.4, 5.2), dpi=150, layout="constrained")
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
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=2 * len(panels), fontsize=8.5, frameon=False, handlelength=1.6
    )
    if title is not None:
        figure.suptitle(title, fontsize=12, color=_INK)
    return figure


def _draw_accuracy(axes: Axes, bins: ReliabilityBins) -> None:
    filled = bins.count > 0
    left = bins.edges[:-1][filled]
    width = (bins.edges[1:] - bins.edges[:-1])[filled]
    accuracy, confidence = bins.accuracy[filled], bins.confidence[filled]
    # Both bars of a bin end at its accuracy and its confidence; the one on top says by its look which is larger.
    axes.bar(left, torch.minimum(accuracy, confidence).numpy(), width, align="edge", color=_ACCURACY, label="Accuracy")
    gap = confidence - accuracy
    for name, sign, face, edge in (("Overconfident", 1, "#FBE6BC", _GAP), ("Underconfident", -1, "#BFDDF0", _ACCURACY)):
        chosen = sign * gap > 0
        axes.bar(
            left[chosen],
            gap[chosen].abs().numpy(),
            width[chosen],
            torch.minimum(accuracy, confidence)[chosen].numpy(),
            align="edge",
            label=name,
            facecolor=face,
            edgecolor=edge,
            hatch="////" if sign > 0 else r"\\\\",
            lw=0,
        )
    axes.bar(
        left, torch.maximum(accuracy, confidence).numpy(), width, align="edge", fill=False, edgecolor="white", lw=0.8
    )
    axes.plot([0, 1], [0, 1], color=_INK, lw=1.1, ls=(0, (4, 3)), label="Perfect calibration")
    axes.set(xlim=(0, 1), ylim=(0, 1))
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
