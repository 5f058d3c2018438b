"""Pictures of a network at several precisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_plugins.quantization.binary import quantization_error
from lightning_plugins.quantization.binary_layers import binary_layers
from lightning_plugins.quantization.convert import quantized_layers
from lightning_plugins.quantization.quantizers import _in_float, code_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_figure", "binary_figure", "code_histograms"]


def accuracy_figure(accuracies: Mapping[int, float]) -> Figure:
    """Draw accuracy over precision.

    Args:
        accuracies: fraction in [0, 1] by bits.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    bits = sorted(accuracies)
    values = [100 * accuracies[b] for b in bits]
    axes.plot(range(len(bits)), values, "o-", color="#4477aa")
    for position, value in enumerate(values):
        axes.annotate(f"{value:.1f}", (position, value), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(bits)), [str(b) for b in bits])
    axes.set_xlabel("bits of weights and activations")
    axes.set_ylabel("accuracy (%)")
    axes.margins(0.08, 0.18)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def code_histograms(model: nn.Module, bits: Sequence[int]) -> Figure:
    """Draw how often a converted model's weights, all layers together, take each integer code at each precision.

    Args:
        model: converted by :func:`.convert_`.
        bits: the precisions to draw, each below 32; a layer counts where it has the precision.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(bits), 2.8), layout="constrained")
    layers = quantized_layers(model).values()
    for position, b in enumerate(bits):
        axes = figure.add_subplot(1, len(bits), position + 1)
        low, high = code_range(b)
        counts = torch.zeros(high - low + 1, dtype=torch.int64)
        for layer in layers:
            if b in layer.bits:
                codes = layer.weight_codes(b).flatten().long().cpu()
                counts += torch.bincount(codes - low, minlength=len(counts))
        shares = 100 * counts / counts.sum().clamp_min(1)
        axes.bar(range(low, high + 1), shares.tolist(), width=0.9, color="#4477aa")
        axes.set_title(f"{b} bits", fontsize=10)
        axes.set_xlabel("code")
        axes.spines[["top", "right"]].set_visible(False)
        if position == 0:
            axes.set_ylabel("weights (%)")
    return figure


def binary_figure(model: nn.Module) -> Figure:
    """Draw where the weights of a binary model stand on the wave, and the quantization error of each layer.

    Args:
        model: converted by :func:`convert_binary_` with the periodic estimator.
    """
    from matplotlib.figure import Figure

    layers = binary_layers(model)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    waves, errors = figure.subplots(1, 2, width_ratios=(3, 4))
    with torch.no_grad():
        values = torch.cat([torch.sin(each.frequency * _in_float(each.weight)).flatten() for each in layers.values()])
        heights = [float(quantization_error(each.weight, each.frequency)) for each in layers.values()]
    counts = torch.histc(values.cpu(), bins=41, min=-1, max=1)
    width = 2 / len(counts)
    centres = [-1 + (i + 0.5) * width for i in range(len(counts))]
    waves.bar(centres, (100 * counts / counts.sum()).tolist(), width=0.9 * width, color="#4477aa")
    waves.set_xlabel("sine of frequency times weight")
    waves.set_ylabel("weights (%)")
    errors.bar(range(len(heights)), heights, width=0.8, color="#4477aa")
    errors.axhline(1 - 2 / math.pi, color="#aa3377", linestyle="--", linewidth=1)
    errors.annotate(
        "uniform phase: 1 - 2/π", (0.99, 1 - 2 / math.pi), (0, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", color="#aa3377", fontsize=9,
    )  # fmt: skip
    errors.set_xticks(range(len(heights)), [str(i + 1) for i in range(len(heights))], fontsize=8)
    errors.set_xlabel("binary layer")
    errors.set_ylabel("quantization error")
    for axes in (waves, errors):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
