"""Where a module keeps its tensors, and how to put others there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn


def replace_tensors(
    module: nn.Module, make: Callable[[Sequence[Tensor]], Sequence[Tensor]]
) -> dict[nn.Parameter, nn.Parameter]:
    """Put new parameters, buffers and meta tensors in plain attributes into `module`, in place.

    `make` gets each of the tensors once and returns the data of their successors, which take over
    class, attributes and `requires_grad`. What was shared stays shared. Returns the successor of
    each parameter, by which an optimizer's groups can be rewritten.
    """
    places = list(_places(module))
    old = list(dict.fromkeys(tensor for _, _, tensor in places))
    new = dict(zip(old, map(_like, old, make(old)), strict=True))
    for owner, name, tensor in places:
        _put(owner, name, new[tensor])
    return {
        before: after
        for before, after in new.items()
        if isinstance(before, nn.Parameter) and isinstance(after, nn.Parameter)
    }


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        for name, registered in (*owner._parameters.items(), *owner._buffers.items()):
            if registered is not None:
                yield owner, name, registered
        for name, value in vars(owner).items():
            if isinstance(value, Tensor) and value.is_meta:
                yield owner, name, value


def _put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    if name in vars(owner):
        vars(owner)[name] = tensor  # not registered, and stays so
    else:
        setattr(owner, name, tensor)  # recurrent layers keep a second list up to date here


def _like(old: Tensor, data: Tensor) -> Tensor:
    new = Tensor._make_subclass(type(old), data, old.requires_grad)
    vars(new).update(vars(old))
    return new
