"""Setting an attribute of a module that is not ours, and giving it back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()
_blinds: list[None] = []  # one for each unobserved() that is open


def borrow_attribute(module: nn.Module, name: str, value: object) -> Callable[[], None]:
    """Set ``module.name`` on the instance and return the function that puts things back as they were.

    A compiled or otherwise patched module already holds the attribute on its instance; that one comes back. If somebody
    else has replaced ours in the meantime, theirs is left alone.
    """
    previous = vars(module).get(name, _ABSENT)
    setattr(module, name, value)

    def restore() -> None:
        if vars(module).get(name, _ABSENT) is not value:
            return
        if previous is _ABSENT:
            delattr(module, name)
        else:
            setattr(module, name, previous)

    return restore


def tap_forward(module: nn.Module, see: Callable[[Any], Any]) -> Callable[[], None]:
    """Let ``module(...)`` return what ``see`` makes of its output; return the function that puts things back."""
    forward = module.forward

    @functools.wraps(forward)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return output if _blinds else see(output)

    return borrow_attribute(module, "forward", tapped)


@contextmanager
def unobserved() -> Iterator[None]:
    """Keep forward passes from :func:`tap_forward`: those of an attack are none of the step that it prepares."""
    _blinds.append(None)
    try:
        yield
    finally:
        _blinds.pop()
