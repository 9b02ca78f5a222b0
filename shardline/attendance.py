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
        self._num_reads: Counter[int] = Counter()
        """Loader → how often the script has read it in this body."""
        self._num_meetings = 0
        """In this body, those that the script calls for."""
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
        self._met = False
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
            self._is_idle = self._owes_meeting = False
            self._met = True
            self.num_ends += 1
        return meeting.grant

    def begin_loop(self) -> int:
        """Another `session.epochs` begins: its number, from 1."""
        self._enter(Point(self.point.loop + 1))
        return self.point.loop

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
        self._num_reads[loader] += 1
        return replace(self.point, count=self._num_reads[loader])

    def pass_over(self) -> None:
        """The others ended this pass before this worker joined: there is nothing to meet for."""
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
        self._num_meetings += purpose is not Purpose.EPOCH
        point = replace(self.point, count=self._num_meetings)
        meeting = self._peers.meet(
            Arrival(purpose, step, tuple(values), weight, takes_leases, point)
        )
        if self._optimizer:
            self._optimizer.next_step = meeting.step
        return meeting

    def _flush(self) -> None:
        if self._optimizer:
            self._optimizer.flush()
