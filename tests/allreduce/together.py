"""Several workers in threads of one process: one Group or Rendezvous each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from torch.distributed import HashStore  # type: ignore[attr-defined]  # it exports it without a list

from allreduce.group import Group, Wiring

T = TypeVar("T")
PATIENCE_SECONDS: Final = 60.0
"""Bounds every wait; nothing takes that long, not even on a busy machine."""


class Worker(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)  # a test that fails does not wait for it
        self._call = call
        self._outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._call()
        except BaseException as error:  # noqa: BLE001 - told to the test, which decides
            self._outcome = error

    def outcome(self) -> object:
        """What the call has returned or raised."""
        self.join(PATIENCE_SECONDS)
        assert not self.is_alive(), f"{self._call} does not return"
        return self._outcome


def outcomes(*calls: Callable[[], object]) -> list[object]:
    """What each has returned or raised, when all are made at once."""
    return [worker.outcome() for worker in [Worker(call) for call in calls]]


def together(*calls: Callable[[], T]) -> list[T]:
    """What each returns, when all are made at once. Raises what the first of them raises."""
    results: list[T] = []
    for outcome in outcomes(*calls):
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)  # type: ignore[arg-type]  # what a call of its type has returned
    return results


@contextmanager
def groups(
    size: int, num_stages: int = 1, timeout_seconds: float = PATIENCE_SECONDS / 2
) -> Iterator[list[Group]]:
    """A connected Group for each member, to be used by one thread each."""
    store = HashStore()
    wirings = [
        Wiring(
            store,
            index,
            size,
            num_stages,
            "127.0.0.1",
            uses_nccl=False,
            timeout_seconds=timeout_seconds,
        )
        for index in range(size)
    ]
    with ExitStack() as stack:
        members = together(*(partial(Group, wiring) for wiring in wirings))
        for member in members:
            stack.callback(member.close)
        yield members


def in_group(size: int, act: Callable[[Group], T], num_stages: int = 1) -> list[T]:
    """What each member of a group returns, by index."""
    with groups(size, num_stages) as members:
        return together(*(partial(act, member) for member in members))


def num_threads_and_sockets() -> tuple[int, int]:
    """Of this process."""
    sockets = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            sockets += entry.readlink().name.startswith("socket:")
        except OSError:  # the descriptor of this very listing
            continue
    return len(list(Path("/proc/self/task").iterdir())), sockets


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """For what nobody tells: only looking shows it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
