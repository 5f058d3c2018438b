"""Copies of networks, also of those that are being trained."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["copy_network"]

Model = TypeVar("Model", bound=nn.Module)


def copy_network(model: Model) -> Model:
    """Copy a module's layers, also in the middle of a run.

    What a module holds beside its layers, such as a callable that makes its optimizer, may lead to a Trainer and its
    running data loaders, which cannot be copied: it is shared.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a weight that pruning made, which deepcopy refuses
                memo[id(value)] = value.detach().clone()
    plain = vars(nn.Module())
    for name, value in vars(model).items():
        if name not in plain and not isinstance(value, Tensor):
            memo[id(value)] = value
    return deepcopy(model, memo)
