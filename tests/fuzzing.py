"""Calls of the public functions with one or two wrong arguments, and the judge of what came of them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import random
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fuzz_table import Row, rows, thing_named
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

REFUSALS = (ValueError, TypeError, MisconfigurationException, OSError)
SECONDS = 20
"""A call that takes longer hangs."""

Edit = Callable[[Any], Any]


class Hang(BaseException):
    """A call took too long."""


@dataclass(frozen=True)
class Change:
    """One argument of a valid call, edited.

    Attributes:
        argument: its name.
        later: it belongs to what is done with the result.
        edit: name of the edit, or the value that takes the argument's place.
        value: ``edit`` is a value.
    """

    argument: str
    later: bool
    edit: Any
    value: bool = False

    def __str__(self) -> str:
        return f"{self.argument}{'=' if self.value else ' <- '}{self.edit!r}"


@dataclass(frozen=True)
class Outcome:
    """What came of a call: an answer, a refusal, or a defect with a sentence that says which."""

    kind: str
    text: str = ""


# Edits: what is done to a valid argument. A name is stable, so that a finding can be replayed.


def _first(tensor: Tensor, value: float) -> Tensor:
    edited = tensor.detach().clone()
    if edited.numel():
        edited.view(-1)[0] = value
    return edited


def _strided(tensor: Tensor) -> Tensor:
    """Same values, not contiguous."""
    wide = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else _strided(tensor)


WRONG_TYPES: dict[str, Edit] = {
    "None": lambda _: None,
    "a string": lambda _: "text",
    "an object": lambda _: object(),
    "an empty list": lambda _: [],
    "a number": lambda _: 3,
}
SHAPES: dict[str, Edit] = {
    "no rows": lambda x: x[:0] if x.ndim else x,
    "one row": lambda x: x[:1] if x.ndim else x,
    "fewer rows": lambda x: x[: max(1, len(x) - 1)] if x.ndim else x,
    "one more dimension": lambda x: x.unsqueeze(0),
    "a dimension at the end": lambda x: x.unsqueeze(-1),
    "flat": lambda x: x.flatten(),
    "a scalar": lambda x: x.flatten()[0].clone() if x.numel() else x,
    "no columns": lambda x: x[..., :0] if x.ndim > 1 else x[:0],
    "one column": lambda x: x[..., :1] if x.ndim > 1 else x[:1],
    "one column more": lambda x: torch.cat([x, x[..., :1]], -1) if x.ndim else x,
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
}
SAME_VALUES: dict[str, Edit] = {"not contiguous": _strided, "channels last": _channels_last}
FLOATS: dict[str, Edit] = {
    "float64": lambda x: x.double(),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "complex": lambda x: x.to(torch.complex64),
    "integers": lambda x: x.long(),
    "booleans": lambda x: x > 0,
    "NaN": lambda x: _first(x, float("nan")),
    "inf": lambda x: _first(x, float("inf")),
    "-inf": lambda x: _first(x, -float("inf")),
    "all NaN": lambda x: torch.full_like(x, float("nan")),
    "zeros": lambda x: torch.zeros_like(x),
    "ones": lambda x: torch.ones_like(x),
    "negative": lambda x: -x - 1,
    "huge": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-30,
}
INTEGERS: dict[str, Edit] = {
    "int32": lambda x: x.int(),
    "one class": lambda x: torch.zeros_like(x),
    "too high": lambda x: _first(x, 99),
    "negative": lambda x: _first(x, -1),
    "ignored": lambda x: _first(x.long(), -100),
    "floats": lambda x: x.float(),
    "halves": lambda x: x.float() + 0.5,
    "booleans": lambda x: x > 0,
    "uint8": lambda x: x.to(torch.uint8),
    "int8": lambda x: x.to(torch.int8),
    "complex": lambda x: x.to(torch.complex64),
}
NUMBERS: tuple[Any, ...] = (float("nan"), float("inf"), -float("inf"), 0, -1, 1, 2, 0.5, -0.5, 1e30, 1e-30, True, 7)
NUMBER_TYPES: dict[str, Edit] = {
    "None": lambda _: None,
    "a string": lambda x: str(x),
    "a list of it": lambda x: [x],
    "an object": lambda _: object(),
    "a complex number": lambda x: complex(x, 1),
    "a tensor of two": lambda x: torch.tensor([float(x), float(x)]),
}
STRINGS: dict[str, Edit] = {
    "another string": lambda _: "nonsense",
    "an empty string": lambda _: "",
    "None": lambda _: None,
    "a number": lambda _: 3,
    "a list": lambda _: [],
    "upper case": lambda x: x.upper(),
}
SEQUENCES: dict[str, Edit] = {
    "empty": lambda x: type(x)(),
    "one": lambda x: x[:1],
    "reversed": lambda x: x[::-1],
    "the first twice": lambda x: type(x)([*x[:1], *x]),
    "None in it": lambda x: type(x)([*x, None]),
    "a string in it": lambda x: type(x)([*x, "text"]),
    "NaN in it": lambda x: type(x)([*x[:-1], float("nan")]),
    "-1 in it": lambda x: type(x)([*x[:-1], -1]),
    "0 in it": lambda x: type(x)([*x[:-1], 0]),
    "99 in it": lambda x: type(x)([*x[:-1], 99]),
    "0.5 in it": lambda x: type(x)([*x[:-1], 0.5]),
    "all 0": lambda x: type(x)([0 for _ in x]),
    "None": lambda _: None,
    "a number": lambda _: 3,
    "a string": lambda _: "text",
}
MAPPINGS: dict[str, Edit] = {
    "empty": lambda x: {},
    "an unknown key": lambda x: {**x, "unknown": next(iter(x.values()), 1)},
    "a number as key": lambda x: {**x, 7: next(iter(x.values()), 1)},
    "None in it": lambda x: dict.fromkeys(x),
    "NaN in it": lambda x: dict.fromkeys(x, float("nan")),
    "-1 in it": lambda x: dict.fromkeys(x, -1),
    "a string in it": lambda x: dict.fromkeys(x, "text"),
    "None": lambda _: None,
    "a list": lambda _: [1],
    "a string": lambda _: "text",
}
_BY_KIND = {
    "float tensor": SAME_VALUES | FLOATS | SHAPES | WRONG_TYPES,
    "integer tensor": SAME_VALUES | INTEGERS | SHAPES | WRONG_TYPES,
    "number": NUMBER_TYPES,
    "string": STRINGS,
    "sequence": SEQUENCES,
    "mapping": MAPPINGS,
    "module": {"an empty module": lambda _: nn.Sequential(), **WRONG_TYPES},
    "other": WRONG_TYPES,
}
_SAME_RESULT = {"not contiguous", "channels last", "float64", "requires grad", "int32", "uint8", "int8"}
_SAME_SHAPE = _SAME_RESULT | {"half", "bfloat16", "NaN", "inf", "-inf", "all NaN", "huge", "tiny"}
_NOT_FINITE = {"NaN", "inf", "-inf", "all NaN", "NaN in it", "huge", "tiny"}
_NO_NUMBERS = {"no rows", "no columns", "an empty list", "empty"}


def kind_of(value: Any) -> str:
    """Which edits a value takes."""
    if isinstance(value, Tensor):
        return "float tensor" if value.is_floating_point() else "integer tensor"
    if isinstance(value, int | float):  # a bool is one
        return "number"
    kinds = {str: "string", list: "sequence", tuple: "sequence", dict: "mapping"}
    return kinds.get(type(value), "module" if isinstance(value, nn.Module) else "other")


def annotation_of(thing: Any, argument: str) -> str:
    try:
        parameter = inspect.signature(thing).parameters.get(argument)
    except (TypeError, ValueError):
        return ""
    return "" if parameter is None else str(parameter.annotation)


def changes_of(full: str) -> list[Change]:
    """All single changes of a row's valid call, in a fixed order."""
    row, thing = rows()[full], thing_named(full)
    found = []
    for later, arguments in ((False, row.make()), (True, row.also())):
        for name, value in arguments.items():
            if name in row.leave or name in row.unused:
                continue
            kind = kind_of(value)
            optional = value is None or (not later and "None" in annotation_of(thing, name))
            for edit in _BY_KIND[kind]:
                if edit == "None" and optional:
                    continue
                found.append(Change(name, later, edit))
            if kind == "number":
                found += [Change(name, later, number, value=True) for number in NUMBERS]
    return found


@st.composite
def calls(draw: st.DrawFn, names: Sequence[str]) -> tuple[str, tuple[Change, ...]]:
    """A public name, and one or two changes of its valid call: named edits, or numbers that hypothesis finds."""
    full = draw(st.sampled_from(names))
    known = changes_of(full)
    if not known:
        return full, ()
    changes = {}
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        change = draw(st.sampled_from(known))
        if change.value and draw(st.booleans()):
            number = draw(st.one_of(st.integers(-2, 12), st.floats(), st.floats(-2, 2)))
            change = dataclasses.replace(change, edit=number)
        changes[change.argument] = change
    return full, tuple(changes.values())


def _edited(arguments: dict[str, Any], changes: Sequence[Change], later: bool) -> dict[str, Any]:
    for change in changes:
        if change.later == later:
            value = arguments[change.argument]
            edit = _BY_KIND[kind_of(value)].get(change.edit) if not change.value else None
            arguments[change.argument] = change.edit if change.value else edit(value)
    return arguments


# Judging


def _numbers(result: Any, depth: int = 0) -> Iterator[Tensor]:
    """All numbers of a result, in order."""
    if isinstance(result, Tensor):
        yield result.detach()
    elif isinstance(result, bool | int | float | np.ndarray | np.generic):
        array = np.asarray(result)
        if array.dtype != object:
            yield torch.as_tensor(array)
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _numbers(value, depth + 1)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from _numbers(value, depth + 1)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type) and depth < 3:
        for field in dataclasses.fields(result):
            yield from _numbers(getattr(result, field.name), depth + 1)


def _has_nan(tensors: Sequence[Tensor]) -> bool:
    return any(bool(t.isnan().any()) for t in tensors if t.is_floating_point() or t.is_complex())


def _snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(), value.requires_grad, value.grad is None
    if isinstance(value, nn.Module):
        state = {
            name: tensor.detach().clone() for name, tensor in value.state_dict().items() if isinstance(tensor, Tensor)
        }
        flags = [p.requires_grad for p in value.parameters()], [p.grad is None for p in value.parameters()]
        return state, [m.training for m in value.modules()], flags
    if isinstance(value, Mapping):
        return {key: _snapshot(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_snapshot(part) for part in value]
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _random_state() -> Any:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state(), torch.as_tensor(keys.astype(np.int64)), list(rest), list(random.getstate()[1])


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _raised_by_a_layer(error: BaseException) -> bool:
    """Whether a layer of torch refused its input: that is for the network of the user, and its sentence, to say."""
    files = [frame.f_code.co_filename.replace(os.sep, "/") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "/torch/nn/modules/" in files[-1] or any(file.endswith("/torch/nn/modules/container.py") for file in files)


_SAYS_IT = re.compile(
    r"not implemented for|does not support bool|bool tensor|not supported for|could not infer output dtype"
    r"|mixed dtype|same dtype|Expected one of cpu|Found no NVIDIA driver|Device string|manual_seed expected a long"
)


def _torch_says_what(error: BaseException) -> bool:
    """Whether torch refused a type, a device or a seed in a sentence that names it."""
    return isinstance(error, RuntimeError) and _SAYS_IT.search(str(error)) is not None


def _run(full: str, row: Row, make: dict[str, Any], also: dict[str, Any]) -> Any:
    result = thing_named(full)(**make)
    return result if row.then is None else row.then(result, **also)


_VALID: dict[str, list[Tensor]] = {}


def valid_numbers(full: str) -> list[Tensor]:
    """The numbers of the valid call's result."""
    if full not in _VALID:
        row = rows()[full]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make, also = row.make(), row.also()
            torch.manual_seed(0)
            _VALID[full] = [number.clone() for number in _numbers(_run(full, row, make, also))]
    return _VALID[full]


def judge(full: str, changes: Sequence[Change] = ()) -> Outcome:
    """Make a call and say what came of it."""
    row = rows()[full]
    valid = valid_numbers(full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make, also = _edited(row.make(), changes, False), _edited(row.also(), changes, True)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return Outcome("skipped", f"the edit cannot be made: {error}")
        given = {name: value for name, value in (make | also).items() if name not in row.in_place}
        before = _snapshot(given)
        torch.manual_seed(0)
        states = _random_state()
        try:
            with _limited():
                result = _run(full, row, make, also)
                numbers = list(_numbers(result))
            outcome = _judge_answer(full, row, changes, valid, numbers)
        except REFUSALS as error:
            text = str(error)
            outcome = Outcome("refused", f"{type(error).__name__}: {text}")
        except Hang:
            outcome = Outcome("defect", f"no answer after {SECONDS} s")
        except Exception as error:
            documented = isinstance(error, row.also_raises)
            kind = "refused" if documented or _raised_by_a_layer(error) or _torch_says_what(error) else "defect"
            outcome = Outcome(kind, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        if outcome.kind != "defect" and not _same(before, _snapshot(given)):
            changed = [name for name in given if not _same(before[name], _snapshot(given)[name])]
            outcome = Outcome("defect", f"changed its argument {', '.join(changed)}")
        if outcome.kind != "defect" and not row.draws and not _same(states, _random_state()):
            outcome = Outcome("defect", "drew from a global generator")
    return outcome


def _judge_answer(
    full: str, row: Row, changes: Sequence[Change], valid: Sequence[Tensor], numbers: Sequence[Tensor]
) -> Outcome:
    edits = {change.edit for change in changes if not change.value}
    values = [change.edit for change in changes if change.value]
    not_finite = edits & _NOT_FINITE or any(not np.isfinite(value) or abs(value) > 1e6 for value in values)
    shapes = [tuple(number.shape) for number in numbers]
    if edits and not values and edits <= _SAME_SHAPE and shapes != [tuple(number.shape) for number in valid]:
        return Outcome("defect", f"numbers of the shapes {shapes} in place of {[tuple(v.shape) for v in valid]}")
    if _has_nan(numbers) and not not_finite and not _has_nan(valid) and not edits & _NO_NUMBERS and not row.gives_nan:
        return Outcome("defect", "NaN from finite input")
    alone = edits and not edits - {"huge", "tiny"} and not values
    if _has_nan(numbers) and alone and not _has_nan(valid) and not row.gives_nan:
        return Outcome("defect", "NaN from a huge or tiny input")
    if edits and not values and edits <= _SAME_RESULT:
        for number, expected in zip(numbers, valid, strict=True):
            close = torch.allclose(number.double(), expected.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
            if not close:
                return Outcome("defect", f"another result for the same values: {number} in place of {expected}")
    nan_edits = edits & {"NaN", "all NaN", "NaN in it"}
    nan_value = any(value != value for value in values)
    took_nan = len(changes) == 1 and (nan_edits or nan_value) and not _has_nan(numbers)
    if took_nan and changes[0].argument not in row.skips_nan:
        return Outcome("defect", "took NaN and gave a number")
    if len(changes) == 1 and "a string" in edits and _takes_numbers(full, changes[0]):
        return Outcome("defect", "took a string for a number")
    return Outcome("answered")


def _takes_numbers(full: str, change: Change) -> bool:
    row = rows()[full]
    value = (row.also() if change.later else row.make())[change.argument]
    return kind_of(value) in ("number", "float tensor", "integer tensor") and not isinstance(value, bool)
