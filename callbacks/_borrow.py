"""Setting an attribute or the mode of a module that is not ours, and giving it back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()


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
        return see(forward(*args, **kwargs))

    return borrow_attribute(module, "forward", tapped)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Let a module evaluate, and give every part back in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
