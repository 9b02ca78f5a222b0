"""Every tensor that a model holds, and where: registered or not, in lists and dicts, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_Put = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of a model, and how to put another one there."""

    name: str
    tensor: Tensor
    is_registered: bool
    put: _Put | None
    """None: the place is in a tuple or a set."""


def places_of(model: nn.Module) -> list[Place]:
    """Every place of the model with a tensor; parameters and buffers before plain attributes."""
    return sorted(_in_module(model, "", set()), key=lambda place: not place.is_registered)


def _in_module(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[Place]:
    seen.add(id(module))
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            # Recurrent layers keep a second list up to date when an attribute is set.
            yield Place(prefix + name, tensor, True, partial(setattr, module, name))
    for name, child in module._modules.items():
        if child is not None and id(child) not in seen:
            yield from _in_module(child, f"{prefix}{name}.", seen)
    attributes = vars(module)
    for name in attributes.keys() - _REGISTRIES:
        put = partial(attributes.__setitem__, name)
        yield from _in_value(attributes[name], prefix + name, put, seen)


def _in_value(value: object, name: str, put: _Put | None, seen: set[int]) -> Iterator[Place]:
    if isinstance(value, Tensor):
        yield Place(name, value, False, put)
    elif id(value) in seen:
        return
    elif isinstance(value, nn.Module):
        yield from _in_module(value, f"{name}.", seen)
    elif isinstance(value, dict | list | tuple | set | frozenset):
        seen.add(id(value))
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            inner = partial(value.__setitem__, key) if isinstance(value, dict | list) else None
            yield from _in_value(each, f"{name}[{key!r}]", inner, seen)
