"""The workers that one shard knows: who they are, their streams and their byte counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ps_core.errors import JobFailedError, MismatchError, ShardlineError
from ps_core.v1 import shard_pb2
from ps_server.liveness import Liveness
from ps_server.outbox import Outbox

_SMOOTHING_SECONDS = 3.0


@dataclass(slots=True)
class Rate:
    """Growth of a counter per second, smoothed over a few seconds."""

    per_second: float = 0.0
    _last: float = 0.0

    def update(self, value: float, elapsed_seconds: float) -> None:
        """Take the counter's value, `elapsed_seconds` > 0 after the one before."""
        weight = min(1.0, elapsed_seconds / _SMOOTHING_SECONDS)
        self.per_second += weight * ((value - self._last) / elapsed_seconds - self.per_second)
        self._last = value


@dataclass(slots=True)
class Peer:
    """A worker that has joined."""

    incarnation: int
    pid: int
    host: str
    outbox: Outbox | None = None
    opened: bool = False
    """It has had a stream."""
    left: bool = False
    received_bytes: int = 0
    sent_bytes: int = 0
    rate: Rate = field(default_factory=Rate)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


class Roster:
    """Peers by rank. Only touched on the event loop."""

    def __init__(self, grace_seconds: float) -> None:
        """`grace_seconds`: how long a peer may be without a stream before it is lost."""
        self._peers: dict[int, Peer] = {}
        self._liveness = Liveness(grace_seconds)

    def __getitem__(self, rank: int) -> Peer:
        return self._peers[rank]

    def __iter__(self) -> Iterator[tuple[int, Peer]]:
        return iter(sorted(self._peers.items()))

    def admit(self, worker: shard_pb2.WorkerId, pid: int, host: str, deadline: float) -> Peer:
        """Note a worker, which is lost unless it opens its stream soon after `deadline`. The same
        process may come again. Raises MismatchError when the rank is taken.
        """
        peer = self._peers.get(worker.rank)
        if peer is None:
            peer = self._peers[worker.rank] = Peer(worker.incarnation, pid, host)
            self._liveness.closed(worker.rank, deadline)
        if peer.incarnation != worker.incarnation:
            raise MismatchError(
                f"worker {worker.rank} has joined already ({peer}): give every worker its own rank"
            )
        return peer

    def identify(self, worker: shard_pb2.WorkerId) -> int:
        """The rank of a worker that was admitted. Raises MismatchError for a stranger."""
        peer = self._peers.get(worker.rank)
        if peer is None or peer.incarnation != worker.incarnation:
            raise MismatchError(f"worker {worker.rank} has not joined this shard")
        return worker.rank

    def open(self, worker: shard_pb2.WorkerId) -> tuple[int, Outbox]:
        """An admitted worker opens its stream; the one it had before is ended."""
        rank = self.identify(worker)
        peer = self._peers[rank]
        if peer.outbox is not None:
            peer.outbox.fail(JobFailedError(f"worker {rank} opened another stream"))
        peer.outbox, peer.opened = Outbox(), True
        self._liveness.opened(rank)
        return rank, peer.outbox

    def close(self, rank: int, outbox: Outbox, now: float) -> None:
        """A stream has ended; its worker is lost unless it opens another in time or has left."""
        peer = self._peers[rank]
        if peer.outbox is outbox:
            peer.outbox = None
            if not peer.left:
                self._liveness.closed(rank, now)

    def leave(self, rank: int) -> None:
        """A worker says goodbye."""
        self._peers[rank].left = True
        self._liveness.forget(rank)

    def lost(self, now: float) -> list[int]:
        """Workers whose stream has been closed for too long, each once."""
        return self._liveness.lost(now)

    def end_streams(self, failure: ShardlineError) -> None:
        """End every open stream with an error."""
        for peer in self._peers.values():
            if peer.outbox is not None:
                peer.outbox.fail(failure)

    def update_rates(self, elapsed_seconds: float) -> None:
        """Take the byte counts, `elapsed_seconds` after the last call."""
        for peer in self._peers.values():
            peer.rate.update(peer.received_bytes, elapsed_seconds)
