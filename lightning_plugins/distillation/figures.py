"""Pictures of synthetic images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_plugins.checks import check_types

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["class_bars", "image_grid"]

_COLORS = ("#4477aa", "#bbbbbb", "#ee6677", "#228833")


@check_types
def image_grid(images: Tensor, *, enlarge: int | None = None, columns: int = 20) -> Tensor:
    """Lay images out, on a fixed range of values, enlarged without smoothing.

    One row for each class; where classes are more than the images of each, and fit, one column for each class.

    Args:
        images: on the [0, 1] scale; values outside are cut off. Of other than 1 or 3 channels the mean is shown.
        enlarge: factor, at least 1; None takes 4, or what makes small images about 64 pixels wide.
        columns: most images side by side.

    Shape:
        - images: ``(C, n, channels, H, W)``
        - output: ``(1 or 3, rows * (H * enlarge + 1) + 1, columns * (W * enlarge + 1) + 1)``

    Raises:
        ValueError: for other images, or numbers below 1.

    Example:
        >>> image_grid(torch.rand(10, 3, 1, 8, 8), enlarge=2).shape
        torch.Size([1, 52, 171])
    """
    if images.ndim != 5 or (enlarge is not None and enlarge < 1) or columns < 1:
        raise ValueError(
            "images must be (C, n, channels, H, W), enlarge and columns at least 1, got "
            f"{tuple(images.shape)}, {enlarge!r} and {columns!r}"
        )
    enlarge = max(4, 64 // max(1, images.shape[-1])) if enlarge is None else enlarge
    shown = images.detach()[:, :columns].float().clamp(0, 1).cpu()
    if shown.shape[1] < len(shown) <= columns:
        shown = shown.transpose(0, 1)
    if shown.shape[2] not in (1, 3):
        shown = shown.mean(2, keepdim=True)
    shown = shown.repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    shown = torch.nn.functional.pad(shown, (1, 0, 1, 0), value=0.5)
    rows, count, channels, height, width = shown.shape
    grid = shown.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, count * width)
    return torch.nn.functional.pad(grid, (0, 1, 0, 1), value=0.5)


@check_types
def class_bars(
    values: Mapping[str, Sequence[float]], class_names: Sequence[str], *, label: str, percent: bool = False
) -> Figure:
    """Draw grouped bars, one group for each class.

    Example:
        >>> class_bars({"distilled": [0.9, 0.8]}, ["a", "b"], label="accuracy", percent=True).axes[0].get_ylabel()
        'accuracy (%)'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 0.5 * len(class_names) + 2), 3), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(len(values), 1)
    for number, (name, heights) in enumerate(values.items()):
        places = [place + (number - (len(values) - 1) / 2) * width for place in range(len(class_names))]
        color = _COLORS[number % len(_COLORS)]
        axes.bar(places, [100 * value if percent else value for value in heights], width, label=name, color=color)
    long = max(map(len, class_names)) > 4
    axes.set_xticks(range(len(class_names)), class_names, rotation=45 if long else 0, ha="right" if long else "center")
    axes.set_ylabel(f"{label} (%)" if percent else label)
    axes.spines[["top", "right"]].set_visible(False)
    if len(values) > 1:
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=len(values))
    return figure
