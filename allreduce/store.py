"""The store through which workers find each other: its keys, and who keeps it."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping

from torch.distributed import (  # type: ignore[attr-defined]  # it exports them without a list
    PrefixStore,
    TCPStore,
)

from ps_core.errors import ConfigError, in_short

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


class Keeper:
    """Keeps a rendezvous in this process, for as long as it is referenced."""

    def __init__(self, host: str, port: int) -> None:
        """Listens. Raises ConfigError when that is not possible."""
        try:
            self._root = TCPStore(host, port, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            reason = in_short(error)
            raise ConfigError(f"no rendezvous can be kept at {host}:{port}: {reason}") from error
        self.port: int = self._root.port
        self._store = PrefixStore(store_prefix(0), self._root)

    def publish(self, settings: Mapping[str, str]) -> None:
        """The variables with which another worker can join."""
        lines = (f"{name}={value}" for name, value in settings.items())
        self._store.set("settings", "\n".join(lines))

    @property
    def has_failed(self) -> bool:
        """A worker has said that the job has failed for everybody."""
        return bool(self._store.check(["failed"]))

    def ended(self, rank: int, pid: int) -> None:
        """A worker's process has ended: nobody need wait for it."""
        self._store.set(gone_key(rank, pid), "1")
