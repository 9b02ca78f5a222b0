"""What a script hands over as a result or a number: numbers of Python, NumPy and torch, paths, and
containers of them. Whatever cannot be kept is refused at the call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from numbers import Number
from typing import Any, Final

import torch

from ps_core.errors import UsageError
from shardline.records import Kept, jsonable

_PLAIN: Final = (bool, int, float, str)


def kept(name: str, value: object) -> Kept:
    """What `session.report(name=value)` keeps: tensors and arrays of one element as numbers, others
    as lists, paths as text, containers with all that is in them. Raises UsageError.
    """
    try:
        result = _kept(value)
        json.dumps(jsonable(result), allow_nan=False)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise UsageError(
            f"session.report({name}=…) cannot keep {_described(value)}: give it numbers, text, "
            f"paths, or lists and dicts of them ({error})"
        ) from error
    return result


def _kept(value: object) -> Kept:
    if value is None:
        return None
    for kind in _PLAIN:
        if isinstance(value, kind):
            return kind(value)  # of a subclass, too, such as numpy.float64
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        return {_key(key): _kept(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_kept(each) for each in value]
    if hasattr(value, "tolist"):
        return _kept(_elements(value))
    if isinstance(value, Number) and hasattr(value, "__float__"):
        return float(value)  # a fraction, or a decimal
    raise TypeError(f"{type(value).__name__} is neither")


def _key(key: object) -> str:
    if isinstance(key, str | int | float):
        return str(_kept(key))
    raise TypeError(f"a key is {_described(key)}")


def _elements(value: Any) -> object:  # noqa: ANN401 - a tensor, an array, or a number of NumPy
    """The only element, or all in nested lists."""
    size = value.numel() if isinstance(value, torch.Tensor) else getattr(value, "size", 1)
    return value.item() if size == 1 else value.tolist()


def number(call: str, value: object) -> float:
    """The one number that `call` is given. Raises UsageError."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text is not a number")
        return float(_elements(value) if hasattr(value, "tolist") else value)  # type: ignore[arg-type]  # that is found out here
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(
            f"{call} takes one number, and was given {_described(value)}: {_advice(value)}"
        ) from error


def _advice(value: object) -> str:
    if value is None:
        return "leave it out where there is no value"
    if isinstance(value, Mapping):
        return "give each of its values a name of its own, as **values does"
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        return "give its mean, or each element by itself"
    return "give a float"


def _described(value: object) -> str:
    """`a Tensor of shape [2, 3]`, `a dict`, `None`."""
    if value is None:
        return "None"
    kind = type(value).__name__
    shape = f" of shape {list(shape)}" if (shape := getattr(value, "shape", None)) else ""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}{shape}"
