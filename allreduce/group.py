"""A process group of fixed members: what they gather, add up and broadcast."""

from __future__ import annotations

import contextlib
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.distributed import (  # type: ignore[attr-defined]  # it exports them without a list
    PrefixStore,
    Store,
    Work,
)

from allreduce.backends import Backend, Gloo, Place, nccl
from ps_core.errors import ShardlineError, in_short

_ROW = 64
"""Numbers of a row that fit into the first gather; longer ones take a second."""
_POLL_SECONDS = 0.0005


class PeerLostError(ShardlineError):
    """A member is gone, or has kept the others waiting for too long: the group is broken."""


@contextlib.contextmanager
def _noticing(doing: str) -> Iterator[None]:
    """torch says RuntimeError whenever a peer or the store is gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"while {doing}: {in_short(error)}") from error


class Pending:
    """A collective in progress, on tensors that belong to it until `wait` returns."""

    def __init__(
        self, work: Work | None, doing: str, timeout_seconds: float, *, on_device: bool
    ) -> None:
        """Without `work` it is done."""
        self._work = work
        self._doing = doing
        self._timeout_seconds = timeout_seconds
        self._on_device = on_device
        self._is_lost = False

    def is_done(self) -> bool:
        """Whether `wait` would not block. Raises PeerLostError."""
        self._check()
        if self._work is None:
            return True
        with _noticing(self._doing):
            return self._work.is_completed()

    def wait(self) -> None:
        """Block until the result is there. Raises PeerLostError."""
        self._check()
        if self._work is None:
            return
        with _noticing(self._doing):
            deadline = time.monotonic() + self._timeout_seconds
            # Gloo's wait has the group's timeout. NCCL's only makes the device's stream wait.
            while self._on_device and not self._work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"no answer for {self._timeout_seconds:g} s (allreduce.timeout_seconds)"
                    )
                time.sleep(_POLL_SECONDS)
            self._work.wait()
        self._work = None

    def give_up(self) -> None:
        """It will not be waited for. As long as torch's object is there, the group's connections
        stay open, and so members that are not next to the lost one would not notice anything.
        """
        self._is_lost = self._is_lost or self._work is not None
        self._work = None

    def _check(self) -> None:
        if self._is_lost:
            raise PeerLostError(f"while {self._doing}: the group is closed")


_DONE = Pending(None, "", 0, on_device=False)


class Gathering:
    """Rows of numbers on their way to everybody."""

    def __init__(self, group: Group, numbers: Sequence[float]) -> None:
        self._group = group
        self._numbers = numbers
        self._rows, self._pending = group.start_gather(numbers[:_ROW], _ROW)

    def is_done(self) -> bool:
        """Whether `wait` would not block, or not for long. Raises PeerLostError."""
        return self._pending.is_done()

    def wait(self) -> list[list[float]]:
        """Every member's numbers, by index. Raises PeerLostError."""
        self._pending.wait()
        longest = int(self._rows[:, 0].max())
        if longest > _ROW:
            self._rows, self._pending = self._group.start_gather(self._numbers, longest)
            self._pending.wait()
        rows: list[list[float]] = self._rows.tolist()
        return rows


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a group is made of."""

    store: Store
    """Of this group alone."""
    index: int
    """This member's."""
    size: int
    num_stages: int
    """Members i and j share their parameters if i and j are the same modulo this."""
    host: str
    """The address of this machine that the others reach."""
    uses_nccl: bool
    timeout_seconds: float


class Group:
    """All members gather rows; those that share their parameters share tensors. Calls must be made
    by all that take part in the same order.
    """

    def __init__(self, wiring: Wiring) -> None:
        """Connects to the other members. Raises PeerLostError."""
        stages = wiring.num_stages
        self.num_members = wiring.size
        self.index, self.size = wiring.index // stages, wiring.size // stages
        """Among those that share tensors."""
        self.sharing = range(wiring.index % stages, wiring.size, stages)
        """Who they are among all members."""
        self.is_split = stages > 1
        """The model is: other members have other parameters."""
        self.is_on_device = wiring.uses_nccl
        self._timeout_seconds = wiring.timeout_seconds
        self._started: weakref.WeakSet[Pending] = weakref.WeakSet()
        self._all: Backend | None = None
        self._host: Backend | None = None
        self._device: Backend | None = None
        with _noticing("connecting to the other workers"):
            self._connect(wiring)

    def _connect(self, wiring: Wiring) -> None:
        def place(name: str, index: int, size: int) -> Place:
            store = PrefixStore(name, wiring.store)
            return Place(store, index, size, wiring.timeout_seconds, wiring.host)

        stage = self.sharing.start
        if wiring.size > 1:
            self._all = self._host = Gloo(place("all", wiring.index, wiring.size))
        if self.is_split:
            own = place(f"stage {stage}", self.index, self.size)
            self._host = Gloo(own) if self.size > 1 else None
        if wiring.uses_nccl:
            self._device = nccl(place(f"device {stage}", self.index, self.size))

    def start_gather(self, numbers: Sequence[float], length: int) -> tuple[torch.Tensor, Pending]:
        """Everybody's numbers as rows of `length`, padded with zeros, once the second is waited
        for.
        """
        own = torch.zeros(length, dtype=torch.float64)
        own[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        everybody = self._all
        if everybody is None:
            return own[None], _DONE
        rows = torch.zeros(self.num_members, length, dtype=torch.float64)
        start = partial(everybody._allgather_base, rows.view(-1), own)
        return rows, self._start(start, "waiting for the other workers", own)

    def gather(self, numbers: Sequence[float]) -> Gathering:
        """Send numbers to everybody; the first says how many. Does not block."""
        return Gathering(self, numbers)

    def add_up(self, tensor: torch.Tensor) -> Pending:
        """Make `tensor` the sum of those of all that share it. Does not block."""
        group = self._for(tensor)
        if group is None:
            return _DONE
        return self._start(partial(group.allreduce, [tensor]), "adding up gradients", tensor)

    def add_up_on(self, tensor: torch.Tensor, index: int) -> Pending:
        """Make `tensor` of one of them the sum of all; it is undefined on the others."""
        group = self._for(tensor)
        if group is None:
            return _DONE
        return self._start(partial(group.reduce, tensor, index), "adding up gradients", tensor)

    def broadcast(self, tensor: torch.Tensor, index: int) -> Pending:
        """Make `tensor` that of one of them."""
        group = self._for(tensor)
        if group is None:
            return _DONE
        return self._start(partial(group.broadcast, tensor, index), "sharing tensors", tensor)

    def broadcast_everywhere(self, tensor: torch.Tensor, index: int) -> Pending:
        """Make `tensor`, on the host, that of one of all members."""
        if self._all is None:
            return _DONE
        return self._start(partial(self._all.broadcast, tensor, index), "sharing state", tensor)

    def add_up_everywhere(self, tensor: torch.Tensor) -> Pending:
        """Make `tensor`, on the host, the sum of those of all members."""
        if self._all is None:
            return _DONE
        return self._start(partial(self._all.allreduce, [tensor]), "adding up norms", tensor)

    def close(self) -> None:
        """Drop all connections, which the other members notice at once. Idempotent."""
        for pending in list(self._started):
            pending.give_up()
        groups = {id(each): each for each in (self._device, self._host, self._all) if each}
        self._all = self._host = self._device = None
        for group in groups.values():
            with contextlib.suppress(RuntimeError):
                group.abort()

    def _for(self, tensor: torch.Tensor) -> Backend | None:
        return self._host if tensor.is_cpu else self._device

    def _start(self, start: Callable[[], Work], doing: str, on: torch.Tensor) -> Pending:
        with _noticing(doing):
            work = start()
        pending = Pending(work, doing, self._timeout_seconds, on_device=not on.is_cpu)
        self._started.add(pending)
        return pending


def own_address(host: str, port: int) -> str:
    """The address of this machine by which it reaches `host`, and so others reach it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        name: str = probe.getsockname()[0]
        return name
