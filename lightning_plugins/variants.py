"""Tables and pictures of one network in several states: at 8, 6, 4 and 2 bits, and a plain one beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures_by_variant", "variants_figure"]

_COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377")


def figures_by_variant(
    metrics: Mapping[str, float], names: Sequence[str], quantities: Sequence[str], *, stage: str = "test"
) -> dict[str, dict[str, float]]:
    """Gather what was measured in each state of a network.

    Args:
        metrics: figures by ``<stage>/<quantity>_<state>``, such as ``test/ece_after_4bit``; others are left alone.
        names: of the states.
        quantities: names without stage and state.
        stage: what the names begin with.

    Returns:
        For each state its figures by quantity, those that there are.

    Example:
        >>> figures_by_variant({"test/acc_4bit": 0.9, "test/acc_8bit": 1.0}, ["8bit", "4bit"], ["acc", "ece"])
        {'8bit': {'acc': 1.0}, '4bit': {'acc': 0.9}}
    """
    return {
        name: {q: float(metrics[key]) for q in quantities if (key := f"{stage}/{q}_{name}") in metrics}
        for name in names
    }


def variants_figure(
    figures: Mapping[str, Mapping[str, float]], sizes: Mapping[str, float], *, apart: Sequence[str] = ()
) -> Figure:
    """Draw what was measured in each state, ordered by the size of its file, one panel for each kind of quantity.

    Quantities whose names differ in ``_before`` and ``_after`` alone share a panel, and so do all accuracies.

    Args:
        figures: by state, and by quantity; accuracies as fractions in [0, 1].
        sizes: of the states, in kB.
        apart: states that are other networks: their points are not joined with the rest.

    Raises:
        ValueError: if there is nothing to draw.

    Example:
        >>> figures = {"8bit": {"acc": 0.98}, "2bit": {"acc": 0.95}, "fp32": {"acc": 0.99}}
        >>> figure = variants_figure(figures, {"8bit": 20.0, "2bit": 7.0, "fp32": 77.0}, apart=["fp32"])
        >>> len(figure.axes)
        1
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for quantity in dict.fromkeys(q for each in figures.values() for q in each):
        panels.setdefault(_panel(quantity), []).append(quantity)
    if not panels:
        raise ValueError(f"no quantity was measured in any of the states {list(figures)}")
    drawn = sorted((name for name in figures if name in sizes), key=lambda name: sizes[name])
    positions = {name: position for position, name in enumerate(drawn)}
    joined = [name for name in drawn if name not in apart]
    figure = Figure(figsize=(3.9 * len(panels) + 0.3, 3.9), layout="constrained")
    for place, (title, quantities) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        share = title.startswith("accuracy")
        for color, quantity in zip(_COLORS * len(quantities), quantities, strict=False):
            line = [(positions[name], figures[name][quantity]) for name in joined if quantity in figures[name]]
            scale = 100 if share else 1
            axes.plot([x for x, _ in line], [scale * y for _, y in line], "o-", color=color, label=_words(quantity))
            for name in drawn:
                if name in apart and quantity in figures[name]:
                    value = scale * figures[name][quantity]
                    axes.plot(positions[name], value, "D", color=color, markerfacecolor="white", markersize=7)
        axes.set_xticks(range(len(drawn)), [f"{name}\n{sizes[name]:.3g}" for name in drawn], fontsize=9)
        axes.margins(x=0.12)
        axes.set_ylim(bottom=0, top=100 if share else None)
        axes.set_xlabel("size of the file (kB)")
        axes.set_ylabel(title)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def _panel(quantity: str) -> str:
    words = quantity.split("_")
    if "acc" in words:
        return "accuracy (%)"
    return " ".join(word for word in words if word not in ("before", "after")).upper()


def _words(quantity: str) -> str:
    words = {"acc": "accuracy", "ece": "ECE", "nll": "NLL", "before": "before calibration", "after": "calibrated"}
    return " ".join(words.get(word, word) for word in quantity.split("_"))
