"""How much each layer loses at each precision: what scores produce and allocators read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerSensitivity", "SensitivityTable"]


@check_types
@dataclass(frozen=True)
class LayerSensitivity:
    """What a score says of one layer.

    Attributes:
        importance: the score itself, larger for layers that should keep more bits; infinite for one that must.
        losses: predicted increase of the loss by bits, with all other layers as they are. Allocators minimise its sum.
        num_weights: of the layer, without biases.
        macs: multiply-adds per image; None if they were not counted.
        error: standard error of ``importance``; None where there is none.
    """

    importance: float
    losses: Mapping[int, float]
    num_weights: int
    macs: int | None = None
    error: float | None = None


@check_types
@dataclass(frozen=True)
class SensitivityTable:
    """The score of every layer of a network: read-only, plain JSON on disk, printed as a table, drawn as bars.

    Attributes:
        method: name of the score.
        layers: by path in the module, in the order of their registration.
        details: how the score was computed, as plain JSON values.

    Raises:
        ValueError: without layers, or if a layer has no candidate bits or a loss that is not a number.

    Example:
        >>> table = SensitivityTable("by hand", {
        ...     "conv1": LayerSensitivity(0.5, {8: 0.0, 4: 0.2}, num_weights=100),
        ...     "conv2": LayerSensitivity(0.1, {8: 0.0, 4: 0.1}, num_weights=900),
        ... })
        >>> table.order()
        ['conv2', 'conv1']
        >>> print(table)
        layer  importance  weights  loss at 8  loss at 4
        conv1         0.5      100          0        0.2
        conv2         0.1      900          0        0.1
    """

    method: str
    layers: Mapping[str, LayerSensitivity]
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a sensitivity table needs at least one layer")
        for name, layer in self.layers.items():
            if not layer.losses:
                raise ValueError(f"layer {name!r} has no losses; give it one for each candidate precision")
            for value in (layer.importance, *layer.losses.values()):
                if math.isnan(value):
                    raise ValueError(f"layer {name!r} has a score that is not a number; was the loss finite?")

    @property
    def bits(self) -> tuple[int, ...]:
        """The candidate precisions of any layer, highest first."""
        return tuple(sorted({b for layer in self.layers.values() for b in layer.losses}, reverse=True))

    def order(self) -> list[str]:
        """Return the layers, the least important first; those of equal importance in the order of the table."""
        return sorted(self.layers, key=lambda name: self.layers[name].importance)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON."""
        content = {"method": self.method, "details": dict(self.details)}
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        return write_atomically(path, (json.dumps(content | {"layers": layers}, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityTable:
        """Read a table.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = {
                name: LayerSensitivity(
                    **{**layer, "losses": {int(b): float(loss) for b, loss in layer["losses"].items()}}
                )
                for name, layer in content["layers"].items()
            }
            return cls(content["method"], layers, content["details"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a sensitivity table ({error}); save() writes one") from error

    def __str__(self) -> str:
        bits = self.bits
        rows = [["layer", "importance", "weights", *(f"loss at {b}" for b in bits)]]
        for name, layer in self.layers.items():
            losses = [f"{layer.losses[b]:.3g}" if b in layer.losses else "-" for b in bits]
            rows.append([name, f"{layer.importance:.3g}", f"{layer.num_weights:,}", *losses])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )

    def figure(self, highlight: Sequence[str] = ()) -> Figure:
        """Draw a bar for each layer's importance, with its standard error; some may be highlighted."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(5.0, 0.32 * len(self.layers) + 1.5), 3.6), layout="constrained")
        axes = figure.add_subplot()
        finite = [layer.importance for layer in self.layers.values() if math.isfinite(layer.importance)]
        ceiling = max(finite, default=1.0)
        heights = [min(layer.importance, ceiling) for layer in self.layers.values()]
        errors = [layer.error or 0.0 for layer in self.layers.values()]
        colors = ["#cc6677" if name in highlight else "#4477aa" for name in self.layers]
        axes.bar(range(len(heights)), heights, yerr=errors if any(errors) else None, color=colors, width=0.7)
        axes.set_xticks(range(len(heights)), list(self.layers), rotation=90, fontsize=7)
        axes.set_ylabel(f"importance ({self.method})")
        axes.spines[["top", "right"]].set_visible(False)
        return figure
