"""Where a network's tensors come from: what has to be known to fold normalisations and to quantize residual sums."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["ResidualSums", "normalized_layers", "residual_sums"]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_TRANSPARENT = (nn.Identity, nn.Dropout)


def normalized_layers(model: nn.Module) -> dict[str, str]:
    """Return, for each batch normalisation that does nothing but normalise one layer's output, that layer's name.

    Those are the ones that can be folded into the layer. What ``torch.fx`` cannot trace is left out.
    """
    found = {}
    for prefix, graph in _graphs(model):
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            if not _calls(model, prefix, node, (_BatchNorm,)) or not node.args:
                continue
            source = node.args[0]
            if (
                isinstance(source, fx.Node)
                and _calls(model, prefix, source, _LAYERS)
                and len(source.users) == calls[source.target] == calls[node.target] == 1
            ):
                found[f"{prefix}{node.target}"] = f"{prefix}{source.target}"
    return found


@dataclass(frozen=True)
class ResidualSums:
    """What enters the residual sums of a network.

    Attributes:
        inputs: blocks whose input is added, or read by several layers, each with the layers that read it.
        outputs: modules whose output is added.
    """

    inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


def residual_sums(model: nn.Module) -> ResidualSums:
    """Find the residual sums of a network.

    Raises:
        ValueError: if there are none that ``torch.fx`` can see, or a summand comes from where no quantizer can sit.
    """
    owners = dict.fromkeys(
        f"{prefix}{_owner(node)}".rstrip(".") for prefix, graph in _graphs(model) for node in graph.nodes if _adds(node)
    )
    inputs: dict[str, tuple[str, ...]] = {}
    outputs: dict[str, None] = {}
    for owner in owners:
        block, prefix = model.get_submodule(owner), f"{owner}." if owner else ""
        graph = _trace(block)
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        first = next(node for node in graph.nodes if node.op == "placeholder")
        readers = tuple(f"{prefix}{user.target}" for user in first.users if _calls(model, prefix, user, _LAYERS))
        sums = [node for node in graph.nodes if _adds(node) and not _owner(node)]
        # A constant such as a position embedding is no residual.
        sums = [node for node in sums if all(summand.op != "get_attr" for summand in node.args[:2])]
        for node in sums:
            for summand in node.args[:2]:
                source = summand
                while _is_transparent(model, prefix, source):
                    source = source.args[0]
                if source is first and owner:
                    inputs[owner] = readers
                elif source.op == "call_module" and calls[source.target] == 1:
                    outputs[f"{prefix}{source.target}"] = None
                elif not _adds(source):  # a sum of sums adds integers already
                    raise ValueError(
                        f"quantize_residual=True: a summand in {owner or type(model).__name__!r} comes from "
                        f"{source.target!r}, not from the block's input or from one module called once, so there is no "
                        "place for its quantizer; make it a module of its own, or leave quantize_residual=False"
                    )
        if owner and sums and len(readers) > 1:
            # A block that changes shapes: two layers read its input, and with one quantizer for both of them the sum
            # that made it stays in integers.
            inputs[owner] = readers
    if not inputs and not outputs:
        raise ValueError(
            f"quantize_residual=True: no residual sum was found in {type(model).__name__} (torch.fx sees sums written "
            "as a + b or torch.add); leave quantize_residual=False"
        )
    return ResidualSums(inputs, tuple(outputs))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("lightning_plugins.quantization") or super().is_leaf_module(
            m, module_qualified_name
        )


def _trace(module: nn.Module) -> fx.Graph:
    return _Tracer().trace(module)


def _graphs(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, fx.Graph]]:
    """Trace the module; where that fails, its parts."""
    try:
        graph = _trace(module)
    except Exception:  # whatever a user's forward raises when it is given a placeholder
        for name, child in module.named_children():
            yield from _graphs(child, f"{prefix}{name}.")
    else:
        yield prefix, graph


def _calls(model: nn.Module, prefix: str, node: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and isinstance(model.get_submodule(f"{prefix}{node.target}"), kinds)
    )


def _is_transparent(model: nn.Module, prefix: str, node: fx.Node) -> bool:
    """Whether a node hands its first argument on unchanged, in evaluation at least."""
    by_name = node.op == "call_function" and getattr(node.target, "__name__", "") in ("dropout", "stochastic_depth")
    return by_name or _calls(model, prefix, node, _TRANSPARENT)


def _adds(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and (
            (node.op == "call_function" and node.target in _ADDITIONS)
            or (node.op == "call_method" and node.target in ("add", "add_"))
        )
        and len(node.args) >= 2
        and all(isinstance(argument, fx.Node) for argument in node.args[:2])
    )


def _owner(node: fx.Node) -> str:
    """The path of the module in whose forward a node was made."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""
