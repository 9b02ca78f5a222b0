"""Where reader threads leave what they received, and the training thread waits for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from ps_core.errors import JobFailedError, Preempted, ShardlineError, ShardUnreachableError
from ps_core.v1 import shard_pb2

_POLL_SECONDS = 0.1
"""How soon a wait notices that this process was told to end."""


class Inbox:
    """Parts that are still expected, answers of the lead, or the failure of a stream. Safe for
    threads.

    Every part carries a mark, which says how new it is: its version, or where every push is an
    update of its own the worker's clock. An older one than expected is a repeat and is dropped.

    The waits have no timeout of their own: a peer may compute for hours. They end when a stream
    breaks for good, and the shards end every stream when the job fails.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._expected: dict[int, int] = {}
        self._minimum = 0
        self._meets = False
        self._marks: dict[int, int] = {}
        self._met: shard_pb2.Met | None = None
        self._leases: deque[shard_pb2.Leases] = deque()
        self._refused: shard_pb2.Refused | None = None
        self._failure: ShardlineError | None = None
        self._symptoms: dict[int, ShardlineError] = {}
        """Of streams that are broken and may come back, by shard."""
        self.is_preempted: Callable[[], bool] = lambda: False
        """Whether this process was told to end; asked where it may leave."""

    # -- Reader threads ----------------------------------------------------------------------------

    def wants(self, part: int, mark: int) -> bool:
        """Whether the part is expected, and this is not an older one. In a meeting, also when it is
        newer than one that has come: that may have been a repeat.
        """
        with self._changed:
            if part in self._expected:
                return mark >= self._expected[part]
            return self._meets and mark > self._marks.get(part, mark)

    def arrived(self, part: int, mark: int) -> None:
        """A part's parameters are in place, though a meeting may expect newer ones by now."""
        with self._changed:
            self._marks[part] = mark
            if mark >= self._expected.get(part, mark):
                self._expected.pop(part, None)
            if not self._expected:
                self._changed.notify_all()

    def met(self, met: shard_pb2.Met) -> None:
        """A meeting is over. What it says decides which parts are still expected."""
        with self._changed:
            self._met, self._meets = met, False
            if not met.refreshed:
                self._expected.clear()
            else:
                parts = self._expected.keys() | self._marks.keys()
                late = (part for part in parts if self._marks.get(part, -1) < met.step)
                self._expected = dict.fromkeys(late, met.step)
            self._changed.notify_all()

    def granted(self, leases: shard_pb2.Leases) -> None:
        """A request for a lease is answered."""
        with self._changed:
            self._leases.append(leases)
            self._changed.notify_all()

    def refused(self, refused: shard_pb2.Refused) -> None:
        """The gradients of a step came too late; parts of a later version follow. Of an earlier
        step than the present one: a repeat, which is dropped.
        """
        with self._changed:
            if refused.next_step >= self._minimum:
                self._refused = refused

    def fail(self, shard: int, failure: ShardlineError, *, final: bool = True) -> None:
        """A shard's stream has broken; the first reason is kept.

        Not `final`: this is the symptom, and whoever reads the stream is finding out the reason.
        When another shard says meanwhile that the job has failed, that is the reason, but the error
        is of the symptom's kind: what this worker saw first does not depend on who is faster.
        """
        with self._changed:
            if not final:
                self._symptoms.setdefault(shard, failure)
                return
            symptom = next(iter(self._symptoms.values()), None)
            if symptom is not None and isinstance(failure, JobFailedError):
                failure = type(symptom)(f"{symptom}: {failure}")
            self._failure = self._failure or failure
            self._changed.notify_all()

    def recovered(self, shard: int) -> None:
        """The shard's stream is open again: there was no reason."""
        with self._changed:
            self._symptoms.pop(shard, None)

    # -- The training thread -----------------------------------------------------------------------

    def expect(self, parts: Collection[int], minimum: int, *, meets: bool = False) -> None:
        """Wait for these parts from now on, each with a mark of at least `minimum`; or, if `meets`,
        for what the end of a meeting says of them.
        """
        with self._changed:
            self._meets = meets
            self._marks.clear()
            self._minimum, self._refused = minimum, None
            self._expected = dict.fromkeys(parts, minimum)

    @property
    def expected(self) -> frozenset[int]:
        """The parts that have not come yet; in a meeting, of which nobody knows yet what its end
        says, all of them.
        """
        with self._changed:
            known = self._marks if self._meets else ()
            return frozenset(self._expected).union(known)

    def wait_for_parts(self) -> int:
        """Return once every expected part has arrived: the lowest of their marks. Raises the
        failure.
        """
        self._wait(lambda: not self._expected, can_leave=False)
        return min(self._marks.values(), default=0)

    def take_refusal(self) -> shard_pb2.Refused | None:
        """What the lead has said about the step, once its parts have arrived."""
        with self._changed:
            refused, self._refused = self._refused, None
            return refused

    def wait_for_meeting(self) -> shard_pb2.Met:
        """Return once the meeting is over. Raises the failure, or Preempted."""
        self._wait(lambda: self._met is not None, can_leave=True)
        met, self._met = self._met, None
        assert met is not None
        return met

    def meeting_ends(self, within_seconds: float) -> bool:
        """Whether `wait_for_meeting` would soon return or raise."""
        with self._changed:
            is_over = self._changed.wait_for(
                lambda: self._met is not None or self._failure is not None, within_seconds
            )
        return is_over or self.is_preempted()

    def wait_for_leases(self) -> shard_pb2.Leases:
        """The answer to the oldest request. Raises the failure, or Preempted."""
        self._wait(lambda: bool(self._leases), can_leave=True)
        return self._leases.popleft()

    @contextmanager
    def explaining(self, patience_seconds: float) -> Iterator[None]:
        """Around a call that is not on a stream. Shards that end the job refuse calls at once; why
        they do so is what they say on the streams, which is raised instead.
        """
        try:
            yield
        except ShardUnreachableError as error:
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None, patience_seconds)
                raise (self._failure or error) from error

    def _wait(self, done: Callable[[], bool], *, can_leave: bool) -> None:
        with self._changed:
            while not self._changed.wait_for(
                lambda: done() or self._failure is not None, _POLL_SECONDS
            ):
                if can_leave and self.is_preempted():
                    raise Preempted
            if not done() and self._failure is not None:
                raise self._failure
