"""Pictures of a network at several precisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_plugins.quantization.convert import quantized_layers
from lightning_plugins.quantization.quantizers import code_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_figure", "code_histograms"]


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
