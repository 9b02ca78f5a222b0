"""The workers that one shard knows: who they are, their streams and their byte counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ps_core.errors import (
    EvictedError,
    MismatchError,
    ProtocolError,
    ShardlineError,
    ShardUnreachableError,
)
from ps_core.v1 import shard_pb2
from ps_server.liveness import Liveness
from ps_server.outbox import Outbox

_SMOOTHING_SECONDS = 3.0

_NUM_ANSWERS = 64
"""A worker asks for a few leases ahead, and for nothing else before it is answered."""


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
    """It has said goodbye, or is fenced."""
    lost: bool = False
    """Its stream has been closed for too long."""
    last_number: int = 0
    """Of the requests to the lead that it has sent."""
    answers: dict[int, shard_pb2.ExchangeResponse] = field(default_factory=dict)
    """The latest answers to them, by number."""
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
        self._fenced: dict[tuple[int, int], str] = {}
        self._liveness = Liveness(grace_seconds)

    def __getitem__(self, rank: int) -> Peer:
        return self._peers[rank]

    def __iter__(self) -> Iterator[tuple[int, Peer]]:
        return iter(sorted(self._peers.items()))

    def admit(self, worker: shard_pb2.WorkerId, pid: int, host: str, deadline: float) -> Peer:
        """Note a worker, which is lost unless it opens its stream soon after `deadline`. The same
        process may come again. Another one takes the place of one that is gone. Raises EvictedError
        for a fenced process, ShardUnreachableError for one that comes before the lead's word about
        the one before it.
        """
        self.check_fence(worker)
        peer = self._peers.get(worker.rank)
        if peer is not None and peer.incarnation != worker.incarnation:
            if not (peer.left or peer.lost):
                raise ShardUnreachableError(
                    f"worker {worker.rank} is still another process ({peer}) here"
                )
            self.fence(worker.rank, peer.incarnation, "another process has taken its rank")
            peer = None
        if peer is None:
            peer = self._peers[worker.rank] = Peer(worker.incarnation, pid, host)
            self._liveness.closed(worker.rank, deadline)
        return peer

    def fence(self, rank: int, incarnation: int, reason: str) -> None:
        """Hear this process no more: its stream ends, and it is told why."""
        self._fenced[rank, incarnation] = reason
        peer = self._peers.get(rank)
        if peer is None or peer.incarnation != incarnation:
            return
        self.leave(rank)
        if peer.outbox is not None:
            peer.outbox.fail(self._evicted(rank, reason))
            peer.outbox = None

    def is_fenced(self, rank: int) -> bool:
        """The process that had the rank last is fenced."""
        return (rank, self._peers[rank].incarnation) in self._fenced

    def check_fence(self, worker: shard_pb2.WorkerId) -> None:
        """Raises EvictedError for a fenced process."""
        reason = self._fenced.get((worker.rank, worker.incarnation))
        if reason is not None:
            raise self._evicted(worker.rank, reason)

    @staticmethod
    def _evicted(rank: int, reason: str) -> EvictedError:
        return EvictedError(f"worker {rank} was evicted ({reason}): it may come back as a new one")

    def is_alive(self, rank: int) -> bool:
        """The rank's process has an open stream."""
        peer = self._peers.get(rank)
        return peer is not None and peer.outbox is not None

    def check_stream(self, rank: int, outbox: Outbox) -> None:
        """Raises why an older stream than the rank's present one was ended: what it still brings
        must not count.
        """
        if self._peers[rank].outbox is not outbox:
            raise outbox.failure or self._evicted(rank, "its stream was closed")

    def identify(self, worker: shard_pb2.WorkerId) -> int:
        """The rank of a worker that was admitted. Raises MismatchError for a stranger, EvictedError
        for a fenced process.
        """
        self.check_fence(worker)
        peer = self._peers.get(worker.rank)
        if peer is None or peer.incarnation != worker.incarnation:
            raise MismatchError(f"worker {worker.rank} has not joined this shard")
        return worker.rank

    def open(self, worker: shard_pb2.WorkerId) -> tuple[int, Outbox]:
        """An admitted worker opens its stream; the one it had before is ended.

        If that was the newer one after all, because a broken connection brought its last words
        late, the worker opens a third.
        """
        rank = self.identify(worker)
        peer = self._peers[rank]
        if peer.outbox is not None:
            peer.outbox.fail(ShardUnreachableError(f"worker {rank} opened another stream"))
        peer.outbox, peer.opened, peer.lost = Outbox(), True, False
        self._liveness.opened(rank)
        return rank, peer.outbox

    def close(self, rank: int, outbox: Outbox, now: float) -> None:
        """A stream has ended; its worker is lost unless it opens another in time or has left."""
        peer = self._peers[rank]
        if peer.outbox is outbox:
            peer.outbox = None
            if not peer.left:
                self._liveness.closed(rank, now)

    def is_repeat(self, rank: int, number: int) -> bool:
        """Count a worker's request to the lead. True: it came before, on a stream that broke; its
        answer, if it has one already, is sent again. Raises ProtocolError for a number out of turn.
        """
        peer = self._peers[rank]
        if number == peer.last_number + 1:
            peer.last_number = number
            return False
        if not 0 < number <= peer.last_number:
            raise ProtocolError(
                f"worker {rank} sends request {number} after request {peer.last_number}"
            )
        if number in peer.answers and peer.outbox is not None:
            peer.outbox.put(peer.answers[number])
        return True

    def answer(self, rank: int, answer: shard_pb2.ExchangeResponse) -> None:
        """Answer the worker's latest request to the lead, and keep the answer: its stream may break
        before it is there.
        """
        peer = self._peers[rank]
        answer.number = peer.last_number
        peer.answers[answer.number] = answer
        while len(peer.answers) > _NUM_ANSWERS:
            del peer.answers[min(peer.answers)]
        if peer.outbox is not None:
            peer.outbox.put(answer)

    def tell(self, rank: int, message: shard_pb2.ExchangeResponse) -> None:
        """Send a worker what is no answer, if it has a stream."""
        outbox = self._peers[rank].outbox
        if outbox is not None:
            outbox.put(message)

    def leave(self, rank: int) -> None:
        """A worker says goodbye."""
        self._peers[rank].left = True
        self._liveness.forget(rank)

    def lost(self, now: float) -> list[int]:
        """Workers whose stream has been closed for too long, each once."""
        lost = self._liveness.lost(now)
        for rank in lost:
            self._peers[rank].lost = True
        return lost

    def end_streams(self, failure: ShardlineError | None) -> None:
        """End every open stream, with an error if the job has failed."""
        for peer in self._peers.values():
            if peer.outbox is not None and failure is not None:
                peer.outbox.fail(failure)
            elif peer.outbox is not None:
                peer.outbox.finish()

    def update_rates(self, elapsed_seconds: float) -> None:
        """Take the byte counts, `elapsed_seconds` after the last call."""
        for peer in self._peers.values():
            peer.rate.update(peer.received_bytes, elapsed_seconds)
