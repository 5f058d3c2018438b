"""Pictures of what an attack does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_over_eps_figure", "attacked_images_figure", "class_accuracy_figure", "comparison_figure"]


def class_accuracy_figure(clean: Tensor, robust: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Draw clean and robust accuracy of each class as bars.

    Args:
        clean: ``(C,)`` in [0, 1], NaN for a class without samples.
        robust: likewise.
        names: of the classes; default their numbers.
    """
    from matplotlib.figure import Figure

    count = len(clean)
    figure = Figure(figsize=(max(5.0, 0.55 * count + 1.5), 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = torch.arange(count)
    axes.bar((places - 0.2).tolist(), (100 * clean).nan_to_num(0).tolist(), 0.4, color="#bbbbbb", label="clean")
    axes.bar((places + 0.2).tolist(), (100 * robust).nan_to_num(0).tolist(), 0.4, color="#4477aa", label="attacked")
    labels = [str(place) for place in places.tolist()] if names is None else list(names)
    longest = max(map(len, labels))
    axes.set_xticks(places.tolist(), labels, rotation=45 if longest > 4 else 0, ha="right" if longest > 4 else "center")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=2)
    return figure


def attacked_images_figure(
    clean: Tensor, attacked: Tensor, titles: Sequence[str] | None = None, *, eps: float | None = None
) -> Figure:
    """Draw images, what the attack made of them, and the difference, centred at grey.

    Args:
        clean: images ``(N, 1 or 3, H, W)`` in [0, 1].
        attacked: likewise.
        titles: over each attacked image, such as what it is taken for.
        eps: change that is drawn as black or white; default the largest one.
    """
    from matplotlib.figure import Figure

    clean, attacked = clean.float().cpu(), attacked.float().cpu()
    difference = attacked - clean
    scale = eps or float(difference.abs().max()) or 1.0
    rows = {"clean": clean, "attacked": attacked, "difference": (0.5 + difference / (2 * scale)).clamp(0, 1)}
    figure = Figure(figsize=(1.15 * len(clean) + 0.6, 3.9), layout="constrained")
    axes = figure.subplots(3, len(clean), squeeze=False)
    for place, (name, images) in enumerate(rows.items()):
        for column, image in enumerate(images):
            cell = axes[place][column]
            picture = image.permute(1, 2, 0)
            cell.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.spines[:].set_visible(False)
            if column == 0:
                cell.set_ylabel(name, fontsize=9)
            if titles is not None and place == 1:
                cell.set_title(titles[column], fontsize=8, pad=2)
    return figure


def accuracy_over_eps_figure(accuracies: Mapping[float, float]) -> Figure:
    """Draw robust accuracy over the radius of the attack.

    Args:
        accuracies: fraction in [0, 1] by radius on the pixel scale.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    radii = sorted(accuracies)
    axes.plot(radii, [100 * accuracies[eps] for eps in radii], "o-", color="#4477aa")
    axes.set_xlabel("radius (pixel scale)")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 104)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def comparison_figure(values: Mapping[str, Sequence[float]], labels: Sequence[str]) -> Figure:
    """Draw the accuracies of several nets as groups of bars.

    Args:
        values: for each net its accuracies in [0, 1].
        labels: what the accuracies are of, one for each.
    """
    from matplotlib.figure import Figure

    colors = ("#bbbbbb", "#4477aa", "#ee6677", "#228833")
    figure = Figure(figsize=(max(5.0, 0.9 * len(values) + 1.5), 3.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        places = [place + (number - (len(labels) - 1) / 2) * width for place in range(len(values))]
        heights = [100 * each[number] for each in values.values()]
        bars = axes.bar(places, heights, width, color=colors[number % len(colors)], label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(values)), list(values), rotation=30 if len(values) > 4 else 0)
    axes.set_ylabel("accuracy under attack (%)")
    axes.set_ylim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=len(labels))
    return figure
