"""One worker of a pipeline in a process of its own, and the test's side of it.

    with workers(train, size=2) as processes: ...   # runs train(place) in both

A case is a function at the top of a test file. It says what is wrong by raising.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from pipeline.group import connect
from tests.processes import Process

TIMEOUT_SECONDS = 40.0
"""Nothing waits that long: a worker that fails closes its connections."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a case runs."""

    rank: int
    size: int
    store: Store
    argument: str

    def connect(
        self, prefix: str = "pipeline", timeout_seconds: float = TIMEOUT_SECONDS
    ) -> dist.ProcessGroup:
        return connect(
            self.store,
            self.rank,
            self.size,
            backend="gloo",
            timeout_seconds=timeout_seconds,
            prefix=prefix,
            host="127.0.0.1",
        )


@contextlib.contextmanager
def workers(
    case: Callable[[Place], None], *, size: int, argument: str = ""
) -> Iterator[list[Process]]:
    """`size` processes that run `case`; gone afterwards."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    what = [str(store.port), str(size), case.__module__, case.__name__, argument]
    processes = [
        Process(f"worker {rank}", ["-m", "tests.pipeline.worker", str(rank), *what], {})
        for rank in range(size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.close()
            print(process.tail())  # noqa: T201 - pytest shows it with the failure


def run(case: Callable[[Place], None], *, size: int, argument: str = "") -> None:
    """Run `case` in `size` processes and see all of them succeed."""
    with workers(case, size=size, argument=argument) as processes:
        assert [process.wait() for process in processes] == [0] * size


def main() -> None:
    """Run a case at the place that the command line names."""
    rank, port, size, module, name, argument = sys.argv[1:]
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False)
    case: Callable[[Place], None] = getattr(importlib.import_module(module), name)
    case(Place(int(rank), int(size), store, argument))


if __name__ == "__main__":
    main()
