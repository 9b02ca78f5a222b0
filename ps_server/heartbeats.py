"""Who has been silent for too long: pure, time is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

_SAFETY: Final = 2.0
"""A worker is given this many times the gap that TCP would wait for."""


@dataclass(slots=True)
class _Pulse:
    """The heartbeats of one worker."""

    last: float
    mean_seconds: float | None = None
    """Smoothed gap between two heartbeats."""
    deviation_seconds: float = 0.0
    """Smoothed distance of a gap from the mean."""
    reported: bool = False

    def beat(self, at: float) -> None:
        """Take in a heartbeat: Jacobson's estimator, with the weights and the start of RFC 6298."""
        gap = max(0.0, at - self.last)
        self.last, self.reported = max(at, self.last), False
        if self.mean_seconds is None:
            self.mean_seconds, self.deviation_seconds = gap, gap / 2
            return
        error = gap - self.mean_seconds
        self.deviation_seconds += (abs(error) - self.deviation_seconds) / 4
        self.mean_seconds += error / 8

    @property
    def patience_seconds(self) -> float:
        """How long the next heartbeat may take."""
        return _SAFETY * ((self.mean_seconds or 0.0) + 4 * self.deviation_seconds)


@dataclass(slots=True)
class Heartbeats:
    """Workers by rank, and the time that each may be silent.

    The time adapts to a worker's own heartbeats, as a TCP sender's timeout adapts to its round
    trips (Jacobson 1988, "Congestion Avoidance and Control"; RFC 6298): mean gap + 4 × mean
    deviation, times a safety factor of 2. A crowded machine or a slow network makes it longer.

    The observer may sleep too: its process is stopped, starved, or its machine suspended. It reads
    nothing in that time, and when it wakes, everybody seems to have been silent, while their
    heartbeats wait in its sockets. So of the time between two calls of `beat` or `silent` at most
    half of the shortest deadline counts as silence: whoever beat shortly before is safe. Call
    `silent` more often than that, or silent workers are found later than they should be.
    """

    floor_seconds: float
    """The adapted time is never shorter."""
    fixed_seconds: float
    """The time for every worker; 0: it adapts."""
    _pulses: dict[int, _Pulse] = field(default_factory=dict)
    _called_at: float = math.inf
    """The latest call; infinite before the first, which cannot be late."""
    _asleep_seconds: float = 0.0

    def beat(self, worker: int, now: float) -> None:
        """A worker lives. The first time, it is watched from now on."""
        at = self._wake(now)
        pulse = self._pulses.get(worker)
        if pulse is None:
            self._pulses[worker] = _Pulse(at)
        else:
            pulse.beat(at)

    def forget(self, worker: int) -> None:
        """Watch a worker no more: it has said goodbye or was evicted."""
        self._pulses.pop(worker, None)

    def deadline_seconds(self, worker: int) -> float:
        """The silence after which a worker is reported."""
        if self.fixed_seconds > 0:
            return self.fixed_seconds
        pulse = self._pulses.get(worker)
        return max(self.floor_seconds, pulse.patience_seconds if pulse else 0.0)

    def silent(self, now: float) -> list[int]:
        """The workers that have been silent for too long, each once until it beats again."""
        at = self._wake(now)
        found = [
            worker
            for worker, pulse in sorted(self._pulses.items())
            if not pulse.reported and at - pulse.last >= self.deadline_seconds(worker)
        ]
        for worker in found:
            self._pulses[worker].reported = True
        return found

    def silence(self, worker: int, now: float) -> float | None:
        """Seconds since a worker's last heartbeat, without those that the observer slept; None for
        one that is not watched.
        """
        pulse = self._pulses.get(worker)
        return None if pulse is None else max(0.0, self._awake(now) - pulse.last)

    def reason(self, worker: int, now: float) -> str:
        """Why the worker is evicted that is silent."""
        kind = "deadline" if self.fixed_seconds > 0 else "floor"
        silence, limit = self.silence(worker, now) or 0.0, self.deadline_seconds(worker)
        return (
            f"it gave no sign of life for {silence:.1f} s, and {limit:.3g} s are allowed: raise "
            f"membership.heartbeat_{kind}_seconds if it was only busy, as in a call that holds "
            "Python's interpreter lock"
        )

    def _awake(self, now: float) -> float:
        """`now` on a clock that stands still while the observer sleeps."""
        return now - self._asleep_seconds - self._overslept(now)

    def _overslept(self, now: float) -> float:
        """How much of the time since the latest call does not count."""
        shortest = self.fixed_seconds if self.fixed_seconds > 0 else self.floor_seconds
        return max(0.0, now - self._called_at - shortest / 2)

    def _wake(self, now: float) -> float:
        """Note a call; returns its time on that clock."""
        self._asleep_seconds += self._overslept(now)
        self._called_at = now if math.isinf(self._called_at) else max(now, self._called_at)
        return now - self._asleep_seconds
