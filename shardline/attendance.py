"""When a worker is waited for: it goes idle when it breaks out of its data, and is a member again
once all have met.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from ps_core.errors import ShardlineError
from ps_core.exchange import Arrival, Grant, Meeting, Peers, Purpose
from ps_core.point import BEGINNING, Point


class Stepping(Protocol):
    """Whoever knows the worker's next step."""

    next_step: int

    def flush(self) -> None:
        """Exchange what steps have left for later."""
        ...


def _nothing() -> None:
    pass


class Attendance:
    """One worker's attendance.

    A pass over the data ends with a meeting of all workers (`EPOCH`), after which all hold the
    same, newest parameters. A worker that breaks out of its pass goes idle at once, and owes that
    meeting: it comes before whatever the worker does next that needs the others. Until it is bound
    to a job nothing happens.
    """

    def __init__(self) -> None:
        self._peers: Peers | None = None
        self._optimizer: Stepping | None = None
        self._is_idle = False
        self._owes_meeting = False
        self._met = False
        """All have met in this body of `session.epochs`, and no step has followed."""
        self._give_back: Callable[[], None] = _nothing
        """To be called before the meeting that is owed."""
        self.point = BEGINNING
        """The body of `session.epochs` that the script is in."""
        self._there = BEGINNING
        self._num_reads: Counter[int] = Counter()
        """Loader → how often the script has read it in this body."""
        self._num_meetings = 0
        """In this body, those that the script calls for between passes."""
        self._is_reading = False
        """The script is in a pass."""
        self.is_chosen = False
        """As of the last meeting: this worker's buffers count, and it writes the model."""
        self.num_ends = 0
        """How often a pass has ended: leases that were granted before are void."""

    def bind(self, peers: Peers, optimizer: Stepping | None = None) -> None:
        """The worker has joined a job; without `optimizer` it takes no steps yet."""
        self._peers, self._optimizer = peers, optimizer

    def release(self) -> None:
        """The worker has left."""
        self._peers = None

    def break_off(self) -> None:
        """The script has broken out of a pass over the data. What goes wrong is told by the next
        call that needs the others: here a script may be on its way out because of an error.
        """
        self._is_reading = False
        if self._peers is None:
            return
        with contextlib.suppress(ShardlineError):
            self._flush()
            self._peers.idle()
        self._is_idle = self._owes_meeting = True
        self._met = False
        self.num_ends += 1

    def put_off(self, give_back: Callable[[], None]) -> None:
        """A pass has ended, and the script may take a last step with what it has accumulated: the
        meeting comes after that, and first `give_back`.
        """
        self._owes_meeting = True
        self._is_reading = self._met = False
        self._give_back = give_back

    def ensure_member(self) -> None:
        """Before a step: make up for the meeting of a pass that was broken off."""
        if self._is_idle:
            self.end_epoch()

    def ensure_met(self) -> None:
        """Before a pass or a meeting: make up for the meeting of the pass before."""
        if self._owes_meeting:
            self.end_epoch()

    def step_taken(self) -> None:
        """A step is done."""
        self._met = False

    def end_epoch(self, *, takes_leases: bool = False) -> Grant | None:
        """Meet the others at the end of the data. With `takes_leases` the answer may be more of it:
        samples that another worker has left behind.
        """
        give_back, self._give_back = self._give_back, _nothing
        give_back()
        meeting = self.meet(Purpose.EPOCH, takes_leases=takes_leases)
        if meeting.grant is None:
            self._is_idle = self._owes_meeting = self._is_reading = False
            self._met = True
            self.num_ends += 1
        return meeting.grant

    def others_are_at(self, point: Point) -> None:
        """This worker has joined a running job: where that is."""
        self._there = point

    def begin_loop(self, count: int, start: int = 0) -> range:
        """Another `session.epochs` begins: what is left of its epochs from `start` to `count`."""
        loop, there = self.point.loop + 1, self._there
        self._enter(Point(loop))
        if loop == there.loop:
            return range(there.data_epoch, count)
        return range(count if loop < there.loop else start, count)

    def end_loop(self, count: int) -> None:
        """The `session.epochs` of `count` epochs has ended, or the script has broken out of it."""
        self._enter(Point(self.point.loop, count))

    def begin_loop_body(self, epoch: int) -> None:
        """The body of `session.epochs` begins."""
        self._enter(Point(self.point.loop, epoch))
        self._met = False

    def _enter(self, point: Point) -> None:
        self.point = point
        self._num_reads.clear()
        self._num_meetings = 0

    def begin_pass(self, loader: int) -> Point:
        """The script begins to read a loader: which call this is."""
        self._is_reading = True
        self._num_reads[loader] += 1
        return replace(self.point, count=self._num_reads[loader])

    def pass_over(self) -> None:
        """The others ended this pass before this worker joined: there is nothing to meet for."""
        self._is_reading = False
        self._met = True

    def end_loop_body(self) -> None:
        """It has ended: meet, unless a loader has done so already. A worker that had no data in it
        meets the others all the same.
        """
        if not self._met:
            self.end_epoch()

    def meet(
        self,
        purpose: Purpose,
        values: Sequence[float] = (),
        weight: float = 1.0,
        *,
        takes_leases: bool = False,
    ) -> Meeting:
        """Wait for all workers and take over the step that they go on with."""
        if purpose is not Purpose.EPOCH:
            self.ensure_met()
        if self._peers is None:
            return Meeting(0, tuple(values), chosen=True)
        self._flush()
        step = self._optimizer.next_step if self._optimizer else 0
        meeting = self._peers.meet(
            Arrival(purpose, step, tuple(values), weight, takes_leases, self._next_point(purpose))
        )
        self.is_chosen = meeting.chosen
        if self._optimizer:
            self._optimizer.next_step = meeting.step
        return meeting

    def _next_point(self, purpose: Purpose) -> Point:
        """Which call this is. How many there are within a pass depends on how many batches a worker
        gets, and at the end of the job on who writes the model: they have no name.
        """
        if purpose in (Purpose.EPOCH, Purpose.CLOSE) or self._is_reading:
            return self.point
        self._num_meetings += 1
        return replace(self.point, count=self._num_meetings)

    def _flush(self) -> None:
        if self._optimizer:
            self._optimizer.flush()
