"""Which layer computes at how many bits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_plugins.checks import check_types
from lightning_plugins.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BitPlan"]


class BitPlan(Mapping[str, int]):
    """The bits of each layer by its path in the module: read-only, and plain JSON on disk.

    Args:
        bits: layer name to bits, 2 to 8, or 32 for full precision.

    Raises:
        ValueError: for bits out of range.

    Example:
        >>> plan = BitPlan({"stages.0.conv1": 8, "stages.0.conv2": 4})
        >>> print(plan.edit({"*.conv2": 2}))
        layer           bits
        stages.0.conv1     8
        stages.0.conv2     2
        >>> plan.diff(plan.edit({"*.conv2": 2}))
        {'stages.0.conv2': (4, 2)}
    """

    @check_types
    def __init__(self, bits: Mapping[str, int]) -> None:
        for name, value in bits.items():
            if isinstance(value, bool) or not isinstance(value, int) or not (2 <= value <= 8 or value == 32):
                raise ValueError(f"the bits of layer {name!r} must be 2 to 8, or 32 for full precision, got {value!r}")
        self._bits = dict(bits)

    def __getitem__(self, name: str) -> int:
        return self._bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __repr__(self) -> str:
        return f"BitPlan({self._bits!r})"

    def __str__(self) -> str:
        width = max(map(len, ["layer", *self]))
        lines = [f"{'layer':<{width}}  bits", *(f"{name:<{width}}  {bits:>4}" for name, bits in self.items())]
        return "\n".join(lines)

    @check_types
    def edit(self, bits: Mapping[str, int]) -> BitPlan:
        """Return a plan in which the layers that match a name or pattern have other bits; later patterns win.

        Raises:
            ValueError: if a pattern matches no layer.
        """
        edited = dict(self)
        for pattern, value in bits.items():
            names = [name for name in self if fnmatchcase(name, pattern)]
            if not names:
                raise ValueError(f"no layer of the plan matches {pattern!r}; it has {', '.join(self)}")
            edited |= dict.fromkeys(names, value)
        return BitPlan(edited)

    @check_types
    def diff(self, other: Mapping[str, int]) -> dict[str, tuple[int | None, int | None]]:
        """Return the layers on which two plans differ, with both values; None where a plan lacks the layer."""
        names = dict.fromkeys([*self, *other])
        return {name: (self.get(name), other.get(name)) for name in names if self.get(name) != other.get(name)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as one JSON object, a layer to a line."""
        return write_atomically(path, (json.dumps(self._bits, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BitPlan:
        """Read a plan.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not one JSON object of layer names and bits.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not JSON ({error}); a plan maps layer names to bits") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{os.fspath(path)!r} holds a {type(content).__name__}; a plan is a JSON object of layer names and bits"
            )
        try:
            return cls(content)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is no plan: {error}") from error

    def figure(self) -> Figure:
        """Draw the plan: a bar for each layer, in the order of the plan."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(5.0, 0.32 * len(self) + 1.5), 3.6), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.bar(range(len(self)), list(self.values()), color="#4477aa", width=0.7)
        axes.bar_label(bars, fontsize=8)
        axes.set_xticks(range(len(self)), list(self), rotation=90, fontsize=7)
        axes.set_ylabel("bits")
        axes.set_ylim(0, max(self.values(), default=8) * 1.15)
        axes.spines[["top", "right"]].set_visible(False)
        return figure
