"""Arguments of the wrong type are refused where they come in, by the annotations of what is called."""

from __future__ import annotations

import inspect
import math
import numbers
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from functools import wraps
from itertools import chain
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

__all__ = ["check_generator", "check_types", "warn_caller"]

T = TypeVar("T", bound=Callable[..., Any])
Check = Callable[[Any], bool]

_MOST_ELEMENTS = 1000
_NAMES: dict[Any, str] = {
    Tensor: "a tensor of real numbers",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    bytes: "bytes",
    type(None): "None",
    nn.Module: "a module",
    torch.Generator: "a torch.Generator",
}


def check_types(thing: T) -> T:
    """Let a function, or the constructor of a class, refuse arguments that its annotations rule out.

    Only types are looked at, those of the elements of short sequences and mappings among them, and never a value of a
    tensor: no device waits. Whole numbers pass as numbers, tensors without dimensions as either, what has a length and
    elements as a sequence; NaN is no number, and a complex tensor none of real numbers. An annotation that says
    something else rules nothing out. What a constructor itself says of a wrong argument goes first. A compiled graph
    has no check.

    Args:
        thing: a function, or a class with a constructor of its own; above any other decorator.

    Returns:
        The function, checked; or the same class.

    Raises:
        TypeError: when called with an argument of another type; a ValueError for NaN in place of a number.

    Example:
        >>> @check_types
        ... def double(x: Tensor, times: int = 1) -> Tensor:
        ...     return 2 * times * x
        >>> double([1.0])
        Traceback (most recent call last):
        TypeError: x of double must be a tensor of real numbers, got a list; use torch.as_tensor
    """
    if inspect.isclass(thing):
        init = cast(Any, thing).__init__
        cast(Any, thing).__init__ = _checked(init, thing.__name__)
        return thing
    return cast(T, _checked(thing, thing.__name__))


def check_generator(generator: torch.Generator | None) -> None:
    """Refuse what is neither a generator nor None, for functions that other functions of ours call.

    Args:
        generator: of random numbers.

    Raises:
        TypeError: for anything else.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got a {type(generator).__name__}")


def warn_caller(message: str) -> None:
    """Warn about something that whoever called into this package can change, naming their line and not one of ours.

    Args:
        message: what was found, and what to do.
    """
    ours = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, str(torch.__file__)))
    frame, level = sys._getframe(1), 2  # in the way warnings counts, 2 is who called this function
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    if name == "__init__":
        name = function.__qualname__.split(".")[-2]
    order = list(inspect.signature(function).parameters)
    checks: dict[str, tuple[Check, str]] = {}
    known = False

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal known
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not known:  # now all names in the annotations are there
            checks.update(_checks_of(function))
            known = True
        for parameter, value in chain(zip(order, args, strict=False), kwargs.items()):
            if parameter in checks and not checks[parameter][0](value):
                refusal = _refusal(name, parameter, checks[parameter][1], value)
                if function.__name__ != "__init__":
                    raise refusal
                break
        else:
            return function(*args, **kwargs)
        try:  # a constructor is quick, and what it says itself of the argument is better
            function(*args, **kwargs)
        except (ValueError, TypeError, OSError, MisconfigurationException):
            raise
        except Exception as error:
            raise refusal from error
        raise refusal

    cast(Any, checked).__kwdefaults__ = function.__kwdefaults__
    return checked


def _refusal(name: str, parameter: str, expected: str, value: Any) -> Exception:
    kind = type(value).__name__
    found = "None" if value is None else f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
    if isinstance(value, Tensor):
        found = f"a tensor {tuple(value.shape)} of {value.dtype}"
    elif isinstance(value, str | int | float | complex | list | tuple | dict) and not expected.startswith("a tensor"):
        found = repr(value) if len(repr(value)) <= 60 else found
    remedy = ""
    if expected.startswith("a tensor") and hasattr(value, "__len__") and not isinstance(value, str | Tensor):
        remedy = "; use torch.as_tensor"
    error = ValueError if isinstance(value, float) and math.isnan(value) else TypeError
    return error(f"{parameter} of {name} must be {expected}, got {found}{remedy}")


def _checks_of(function: Callable[..., Any]) -> dict[str, tuple[Check, str]]:
    annotations = inspect.get_annotations(inspect.unwrap(function))
    scope = vars(typing) | vars(sys.modules[function.__module__])
    found = {}
    for parameter, given in inspect.signature(function).parameters.items():
        if parameter not in annotations or given.kind in (given.VAR_POSITIONAL, given.VAR_KEYWORD):
            continue
        annotation = annotations[parameter]
        try:
            hint = eval(annotation, scope) if isinstance(annotation, str) else annotation
        except (NameError, AttributeError, TypeError):  # a name for type checkers only
            continue
        check = _check_of(hint)
        if check is not None:
            found[parameter] = check, _name_of(hint)
    return found


def _check_of(hint: Any) -> Check | None:
    """Return the check of one annotation, or None where it rules nothing out."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, TypeVar):
        return None if hint.__bound__ is None else _check_of(hint.__bound__)
    if hint is None or hint is type(None):
        return lambda value: value is None
    if origin in (Union, types.UnionType):
        checks = [_check_of(part) for part in arguments]
        if None in checks:
            return None
        return lambda value: any(check(value) for check in checks if check is not None)
    if origin is Literal:
        kinds = tuple({type(choice) for choice in arguments})
        return lambda value: isinstance(value, kinds)
    if hint is bool:
        return lambda value: isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")
    if hint is int:
        return lambda value: isinstance(value, numbers.Integral) or _is_number(value, whole=True)
    if hint is float:
        return lambda value: value == value if isinstance(value, numbers.Real) else _is_number(value)
    kind = origin or hint
    if kind in (list, tuple, Sequence):
        element = (
            _check_of(arguments[0])
            if arguments and (kind is not tuple or len(set(arguments)) == 1 or ... in arguments)
            else None
        )
        if get_args(hint)[:1] == (str,):  # a string is a sequence of strings
            return lambda value: isinstance(value, str) or (_is_sequence(value) and _all(element, value))
        return lambda value: _is_sequence(value) and _all(element, value)
    if kind in (dict, Mapping):
        element = _check_of(arguments[1]) if arguments else None
        return lambda value: isinstance(value, Mapping) and _all(element, value.values())
    if kind is Iterable:
        return lambda value: hasattr(value, "__iter__") and not isinstance(value, str)
    if kind is Callable:
        return callable
    if kind is os.PathLike:
        return lambda value: isinstance(value, os.PathLike)
    if kind is Tensor:
        return lambda value: not value.is_complex() if isinstance(value, Tensor) else isinstance(value, torch.fx.Proxy)
    if inspect.isclass(kind) and (kind in (str, bytes, torch.Generator) or kind.__module__.startswith(_OURS)):
        return None if getattr(kind, "_is_protocol", False) else lambda value: isinstance(value, kind)
    return None


_OURS = ("lightning_plugins", "torch.nn", "pathlib")


def _is_number(value: Any, whole: bool = False) -> bool:
    """Whether it is a tensor without dimensions of the right kind."""
    return (
        isinstance(value, Tensor)
        and value.ndim == 0
        and not (value.is_complex() or (whole and value.is_floating_point()))
    )


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | bytes | Mapping)


def _all(check: Check | None, values: Any) -> bool:
    # Other sequences may make their elements only when asked, such as images from files.
    if check is None or not isinstance(values, list | tuple | ValuesView) or len(values) > _MOST_ELEMENTS:
        return True
    return all(check(value) for value in values)


def _name_of(hint: Any) -> str:
    """Say in words what an annotation asks for."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, TypeVar):
        return _name_of(hint.__bound__)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_name_of(part) for part in arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if hint in _NAMES:
        return _NAMES[hint]
    kind = origin or hint
    if kind in (list, tuple, Sequence):
        elements = [part for part in arguments if part is not ...]
        return f"a sequence, each {_name_of(elements[0])}" if len(set(elements)) == 1 else "a sequence"
    if kind in (dict, Mapping):
        return f"a mapping, each value {_name_of(arguments[1])}" if arguments else "a mapping"
    if kind is Iterable:
        return "an iterable"
    if kind is Callable:
        return "callable"
    if kind is os.PathLike:
        return "a path"
    if hint is None:
        return "None"
    name: str = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
