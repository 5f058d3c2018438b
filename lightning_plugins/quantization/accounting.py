"""What a converted network costs at given bits: bytes on disk, and bit operations per image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_types
from lightning_plugins.quantization.convert import check_converted, quantized_layers
from lightning_plugins.quantization.layers import FULL_PRECISION, _QuantLayer
from lightning_plugins.quantization.packed import (
    borrowed,
    encode,
    file_spec,
    tensor_entries,
    weight_shape,
    weight_shapes,
)

__all__ = ["Cost", "FileSize", "LayerCost", "cost"]


@dataclass(frozen=True)
class LayerCost:
    """What one convolution or linear layer costs.

    Attributes:
        name: path in the model.
        num_weights: without biases; pruned weights count, as they are stored.
        weight_bits: of each weight.
        activation_bits: of each value that goes in.
        macs: multiply-adds per image; None if they were not counted.
        quantized: False for layers that were left as they are, which count with 32 x 32 bits.
    """

    name: str
    num_weights: int
    weight_bits: int
    activation_bits: int
    macs: int | None
    quantized: bool

    @property
    def bops(self) -> int | None:
        """Bit operations per image: multiply-adds x bits of weights x bits of inputs."""
        return None if self.macs is None else self.macs * self.weight_bits * self.activation_bits


@dataclass(frozen=True)
class FileSize:
    """The bytes of a packed file.

    Attributes:
        weights: codes of the quantized layers.
        scales: of their weights and inputs.
        batch_norms: of all precisions in the file.
        biases: of the quantized layers.
        unquantized: everything else that is stored as it is, such as first and last layer.
        header: names, shapes and how the model was converted.
    """

    weights: int
    scales: int
    batch_norms: int
    biases: int
    unquantized: int
    header: int

    @property
    def total(self) -> int:
        """The whole file."""
        return self.weights + self.scales + self.batch_norms + self.biases + self.unquantized + self.header


@dataclass(frozen=True)
class Cost:
    """What a network costs at given bits; ``print`` shows it as a table.

    Attributes:
        layers: convolutions and linear layers, in the order of their registration.
        packed: the file that :func:`.save_packed` writes for all precisions; it does not depend on the bits.
        packed_alone: the file that it writes for these bits alone; None where a quantized layer is at 32 bits.
    """

    layers: tuple[LayerCost, ...]
    packed: FileSize
    packed_alone: FileSize | None

    @property
    def quantized(self) -> tuple[LayerCost, ...]:
        """The layers that are quantized."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def weight_bits(self) -> int:
        """Bits of all weights of the quantized layers, sum of ``n_l b_l``."""
        return sum(layer.num_weights * layer.weight_bits for layer in self.quantized)

    @property
    def average_bits(self) -> float:
        """Bits per weight over the quantized layers, ``sum(n_l b_l) / sum(n_l)``."""
        return self.weight_bits / sum(layer.num_weights for layer in self.quantized)

    @property
    def average_bits_per_layer(self) -> float:
        """Bits per quantized layer, small and large ones alike: the average of the Double Rounding paper."""
        return sum(layer.weight_bits for layer in self.quantized) / len(self.quantized)

    @property
    def macs(self) -> int | None:
        """Multiply-adds per image of all layers, unquantized ones included."""
        return _sum([layer.macs for layer in self.layers])

    @property
    def bops(self) -> int | None:
        """Bit operations per image of all layers, unquantized ones included."""
        return _sum([layer.bops for layer in self.layers])

    @property
    def packed_bytes(self) -> int:
        """Size of the packed file with all precisions."""
        return self.packed.total

    @property
    def packed_alone_bytes(self) -> int | None:
        """Size of the packed file for these bits alone."""
        return None if self.packed_alone is None else self.packed_alone.total

    def __str__(self) -> str:
        counted = self.macs is not None
        rows = [["layer", "weights", "bits", "input bits", *(["MACs", "BOPs"] if counted else [])]]
        for layer in self.layers:
            name = layer.name if layer.quantized else f"{layer.name} (unquantized)"
            numbers = [layer.num_weights, layer.weight_bits, layer.activation_bits]
            rows.append([name, *(f"{number:,}" for number in numbers)])
            if counted:
                rows[-1] += [f"{layer.macs:,}", f"{layer.bops:,}"]
        if counted:
            rows.append(["all", "", "", "", f"{self.macs:,}", f"{self.bops:,}"])
        sizes = {"all precisions": self.packed, "these bits alone": self.packed_alone}
        table = [["bytes of the packed file", *(name for name, size in sizes.items() if size is not None)]]
        for part in ("weights", "scales", "batch_norms", "biases", "unquantized", "header", "total"):
            values = [getattr(size, part) for size in sizes.values() if size is not None]
            table.append([part.replace("_", " "), *(f"{value:,}" for value in values)])
        averages = (
            f"quantized weights: {self.weight_bits:,} bits, on average {self.average_bits:.2f} per weight "
            f"({self.average_bits_per_layer:.2f} per layer)"
        )
        return "\n\n".join([_align(rows), averages, _align(table)])


@check_types
def cost(model: nn.Module, bits: int | Mapping[str, int] | None = None, *, example_input: Any = None) -> Cost:
    """Count what a converted model costs at given bits.

    Rows are all ``Conv1d``, ``Conv2d`` and ``Linear`` layers, those that are not quantized with 32 bits for weights and
    inputs; both enter ``macs`` and ``bops``, while the average bits are over the quantized layers. Other operations
    (attention products, transposed convolutions, normalisations, sums) have no row. An input that a layer takes as it
    comes has the 8 bits of the residual quantizer that it passed, or else 32.

    Args:
        model: converted by :func:`.convert_`, or read by :func:`.load_packed`. It is left as it was, its modes and bits
            included.
        bits: one of its precisions, or a plan; default those in use.
        example_input: a batch on the model's device, or a tuple of arguments of which the first is one: it is run once
            in evaluation to count multiply-adds, and what is counted is divided by its length. Without it they are not
            counted.

    Raises:
        ValueError: if the model is not converted, the bits do not fit it, or the example is empty.

    Example:
        >>> from lightning_plugins.models import resnet20
        >>> from lightning_plugins.quantization import convert_
        >>> net = convert_(resnet20(width=4), bits=(8, 4))
        >>> at_4 = cost(net, 4, example_input=torch.rand(1, 3, 28, 28))
        >>> at_4.layers[1].macs, at_4.layers[1].bops
        (112896, 1806336)
        >>> at_4.average_bits, at_4.packed.weights, at_4.packed_alone.weights
        (4.0, 16864, 8432)
    """
    check_converted(model)
    with borrowed(model, bits):
        macs = None if example_input is None else _count_macs(model, example_input)
        quantized = quantized_layers(model)
        sums_quantized = any(layer.num_bits != FULL_PRECISION for layer in quantized.values())
        layers = []
        for name, module in _rows(model):
            weights = prod(weight_shape(module))
            count = None if macs is None else macs[name]
            if isinstance(module, _QuantLayer):
                inputs = _activation_bits(module, sums_quantized=sums_quantized)
                layers.append(LayerCost(name, weights, module.num_bits, inputs, count, True))
            else:
                layers.append(LayerCost(name, weights, FULL_PRECISION, FULL_PRECISION, count, False))
        alone = None
        if all(layer.num_bits != FULL_PRECISION for layer in quantized.values()):
            plan = bits if bits is not None else {name: layer.num_bits for name, layer in quantized.items()}
            alone = _file_size(model, plan)
        return Cost(tuple(layers), _file_size(model, None), alone)


def _rows(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def _activation_bits(layer: _QuantLayer, *, sums_quantized: bool) -> int:
    if layer.quantizes_input():
        return layer.num_bits
    return layer.shared_input_bits if layer.shared_input_bits and sums_quantized else FULL_PRECISION


def _count_macs(model: nn.Module, example_input: Any) -> dict[str, int]:
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    if not arguments or not isinstance(arguments[0], Tensor) or not arguments[0].numel():
        raise ValueError("example_input must be a batch of one sample at least, or a tuple that starts with one")
    counts = {name: 0 for name, _ in _rows(model)}
    with _hooks(model, counts):
        model(*arguments)
    return {name: round(count / len(arguments[0])) for name, count in counts.items()}


@contextmanager
def _hooks(model: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    def count(name: str) -> Any:
        def hook(layer: Any, args: Any, output: Tensor) -> None:
            # Each output value is a sum over the weights of one output channel.
            counts[name] += output.numel() * prod(weight_shape(layer)[1:])

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in _rows(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _file_size(model: nn.Module, plan: int | Mapping[str, int] | None) -> FileSize:
    entries = tensor_entries(model, alone=plan is not None)
    parts = dict.fromkeys(("weights", "scales", "batch_norms", "biases", "unquantized"), 0)
    for entry in entries.values():
        parts[entry.kind] += entry.num_bytes
    # The same file without its content: only the header's length counts.
    empty = {name: torch.empty(entry.shape, dtype=entry.dtype, device="cpu") for name, entry in entries.items()}
    header = len(encode(empty, file_spec(model, plan), weight_shapes(model), 64 * "0")) - sum(parts.values())
    return FileSize(**parts, header=header)


def _sum(values: list[int | None]) -> int | None:
    counted = [value for value in values if value is not None]
    return sum(counted) if len(counted) == len(values) else None


def _align(rows: list[list[str]]) -> str:
    """Columns of equal width, the first to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *numbers in rows:
        cells = [first.ljust(widths[0]), *(n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
