"""torch's process groups, as objects that are not registered with torch.distributed: a script's own
groups are left alone, and one that has lost a member is dropped as a whole.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle
from typing import Protocol, cast

import torch
from torch.distributed import (  # type: ignore[attr-defined]  # it exports them without a list
    PrefixStore,
    ProcessGroupGloo,
    Store,
    Work,
)

_LANES = 2
"""Operations of one Gloo group that are under way at the same time."""


class Backend(Protocol):
    """What torch's process groups have in common and is used here. Torch's errors: RuntimeError."""

    def allreduce(self, tensors: list[torch.Tensor], /) -> Work: ...
    def reduce(self, tensor: torch.Tensor, root: int, /) -> Work: ...
    def broadcast(self, tensor: torch.Tensor, root: int, /) -> Work: ...
    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, /) -> Work: ...
    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """One member of a group, and what it needs to meet the others."""

    store: Store
    """Of this group alone."""
    index: int
    size: int
    timeout_seconds: float
    host: str
    """The address of this machine that the others reach."""


class Gloo:
    """Several groups of the same members, which take operations in turn, each with one thread.

    Not one group with as many threads: when a member dies while two of them are at work, a survivor
    that drops the group is sometimes stuck in torch 2.13 until the timeout.
    """

    def __init__(self, place: Place) -> None:
        """Connects to the other members."""
        self._lanes = [_gloo(place, f"lane {number}") for number in range(_LANES)]
        self._turns = cycle(self._lanes)

    def allreduce(self, tensors: list[torch.Tensor], /) -> Work:
        """See Backend."""
        return next(self._turns).allreduce(tensors)

    def reduce(self, tensor: torch.Tensor, root: int, /) -> Work:
        """See Backend."""
        return next(self._turns).reduce(tensor, root)

    def broadcast(self, tensor: torch.Tensor, root: int, /) -> Work:
        """See Backend."""
        return next(self._turns).broadcast(tensor, root)

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, /) -> Work:
        return next(self._turns)._allgather_base(output, input)

    def abort(self) -> None:
        """Drop all connections."""
        for lane in self._lanes:
            with contextlib.suppress(RuntimeError):
                lane.abort()


def _gloo(place: Place, name: str) -> Backend:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # its stubs lack it
    options._devices = [ProcessGroupGloo.create_device(hostname=place.host)]
    options._timeout = timedelta(seconds=place.timeout_seconds)
    options._threads = 1
    store = PrefixStore(name, place.store)
    return cast(Backend, ProcessGroupGloo(store, place.index, place.size, options))


def nccl(place: Place) -> Backend:
    """Of the current device."""
    from torch.distributed import ProcessGroupNCCL  # only builds for CUDA have it

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=place.timeout_seconds)
    return cast(Backend, ProcessGroupNCCL(place.store, place.index, place.size, options))
