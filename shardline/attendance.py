"""When a worker is waited for: it goes idle at the end of its data and is a member again once all
have met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ps_core.exchange import Meeting, Peers, Purpose


class Stepping(Protocol):
    """Whoever knows the worker's next step."""

    next_step: int


class Attendance:
    """One worker's attendance.

    A pass over the data ends with a meeting of all workers (`EPOCH`), after which all hold the
    same, newest parameters. A worker that breaks out of its pass goes idle at once and meets the
    others before whatever it does next that needs them. Until it is bound to a job nothing happens.
    """

    def __init__(self) -> None:
        self._peers: Peers | None = None
        self._optimizer: Stepping | None = None
        self._interrupted = False
        self._met = False
        """All have met in this body of `session.epochs`, and no step has followed."""

    def bind(self, peers: Peers, optimizer: Stepping) -> None:
        """The worker has joined a job."""
        self._peers, self._optimizer = peers, optimizer

    def release(self) -> None:
        """The worker has left."""
        self._peers = None

    def enter_pass(self) -> None:
        """The script begins a pass over the data."""
        self.ensure_member()

    def leave_pass(self, *, finished: bool) -> None:
        """The pass has ended, or the script has broken out of it."""
        if self._peers is None or self._optimizer is None:
            return
        if finished:
            self.end_epoch()
        else:
            self._peers.idle(self._optimizer.next_step)
            self._interrupted = True
            self._met = False

    def ensure_member(self) -> None:
        """Before a step or a pass: make up for the meeting of a pass that was broken off."""
        if self._interrupted:
            self.end_epoch()

    def step_taken(self) -> None:
        """A step is done."""
        self._met = False

    def end_epoch(self) -> None:
        """Meet the others at the end of the data."""
        self._interrupted, self._met = False, True
        self.meet(Purpose.EPOCH)

    def begin_loop_body(self) -> None:
        """The body of `session.epochs` begins."""
        self._met = False

    def end_loop_body(self) -> None:
        """It has ended: meet, unless a loader has done so already. A worker that had no data in it
        meets the others all the same.
        """
        if not self._met:
            self.end_epoch()

    def meet(self, purpose: Purpose, values: Sequence[float] = (), weight: float = 1.0) -> Meeting:
        """Wait for all workers and take over the step that they go on with."""
        if purpose is not Purpose.EPOCH:
            self.ensure_member()
        if self._peers is None or self._optimizer is None:
            return Meeting(0, tuple(values), chosen=True)
        meeting = self._peers.meet(purpose, self._optimizer.next_step, values, weight)
        self._optimizer.next_step = meeting.step
        return meeting
