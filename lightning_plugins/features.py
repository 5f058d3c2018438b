"""What goes into a classifier's last layer: penultimate features, read by a hook."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.checks import check_types

__all__ = ["PenultimateFeatures", "classifier_layer"]


@check_types
def classifier_layer(model: nn.Module) -> nn.Linear:
    """Return the last linear layer of a model, in the order of registration.

    Raises:
        ValueError: if there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear whose input could be its features")
    return layers[-1]


class PenultimateFeatures:
    """Remember what goes into a model's classifier while the ``with`` block runs.

    Compiled code passes hooks by, so what ``torch.compile`` made runs eagerly inside of the block.

    Args:
        model: any module.
        output_of: name of the module whose output are the features; default: what goes into the last linear layer.

    Raises:
        ValueError: if there is no linear layer, or no module of that name.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with PenultimateFeatures(model) as features:
        ...     logits = model(torch.zeros(5, 3))
        >>> features.last.shape
        torch.Size([5, 4])
    """

    @check_types
    def __init__(self, model: nn.Module, *, output_of: str | None = None) -> None:
        if output_of is None:
            self.layer: nn.Module = classifier_layer(model)
        else:
            # torch.compile keeps a module under this name; the user knows the layer without it.
            named = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules() if name}
            # Inside a wrapper the name has the wrapper's prefix.
            found = [module for name, module in named.items() if f".{name}".endswith(f".{output_of}")]
            if not found:
                raise ValueError(f"{type(model).__name__} has no module {output_of!r}; it has {', '.join(named)}")
            self.layer = found[0]
        self.output_of = output_of
        self._last: Tensor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> PenultimateFeatures:
        if not torch.compiler.is_compiling():  # inside of compiled code a stance is refused, and hooks are traced
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        if self.output_of is None:
            handle = self.layer.register_forward_pre_hook(self._see_input)
        else:
            handle = self.layer.register_forward_hook(self._see_output)
        self._stack.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _see_input(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._last = args[0]

    def _see_output(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._last = output

    @property
    def last(self) -> Tensor:
        """The features of the last forward pass, ``(N, D)``, part of its graph.

        Raises:
            RuntimeError: if the classifier has not been called.
        """
        if self._last is None:
            raise RuntimeError(
                "the layer of the features was not called, so there are no features; call the model inside the block, "
                "or name another layer"
            )
        return self._last
