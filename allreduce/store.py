"""The store through which workers find each other: its keys, and who keeps it."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping

from torch.distributed import (  # type: ignore[attr-defined]  # it exports them without a list
    PrefixStore,
    TCPStore,
)

from ps_core.listening import listen
from ps_core.settings import Config

_POLL_SECONDS = 0.1


def gone_key(rank: int, pid: int) -> str:
    """Set once a worker's process has ended, by whoever has seen that."""
    return f"gone/{rank}/{pid}"


def beat_key(token: str) -> str:
    """What a process writes as long as it lives: a count, and the version that it has."""
    return f"beat/{token}"


def store_prefix(attempt: int) -> str:
    """Of all keys of a job that was started again so many times."""
    return f"shardline/{attempt}"


def wait_for_listener(host: str, port: int, seconds: float) -> None:
    """Until a process listens there: torch's store logs pages about one that does not. Raises
    OSError.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(seconds, 1.0)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


def kept_here(config: Config) -> Keeper | None:
    """The rendezvous of workers that need one, if it is this one that keeps it. Raises
    ConfigError.
    """
    cluster = config.cluster
    is_needed = config.strategy == "allreduce" or config.pipeline.stages > 1
    if is_needed and cluster.serve_rendezvous and cluster.rank == 0:
        return Keeper(listen(cluster.rendezvous))
    return None


class Keeper:
    """Keeps a rendezvous in this process, for as long as it is referenced."""

    def __init__(self, listener: socket.socket) -> None:
        """Takes over a socket that listens: torch would listen at all addresses of this machine."""
        host, self.port = listener.getsockname()[:2]
        descriptor = listener.detach()
        self._root = TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
        )
        self._store = PrefixStore(store_prefix(0), self._root)

    def publish(self, settings: Mapping[str, str]) -> None:
        """The variables with which another worker can join."""
        lines = (f"{name}={value}" for name, value in settings.items())
        self._store.set("settings", "\n".join(lines))

    def interrupt(self) -> None:
        """The run ends: no worker need wait for another to come."""
        self._store.compare_set("failed", "", "the run was interrupted")

    @property
    def has_failed(self) -> bool:
        """A worker has said that the job has failed for everybody."""
        return bool(self._store.check(["failed"]))

    def ended(self, rank: int, pid: int) -> None:
        """A worker's process has ended: nobody need wait for it."""
        self._store.set(gone_key(rank, pid), "1")
