"""How far the workers' scripts have come: where one begins that joins now, and what it has missed.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ps_core.exchange import Arrival, Position, Purpose
from ps_core.point import BEGINNING, Point

_REPEATABLE = (Purpose.MEAN, Purpose.LOAD)
_MAX_MEETINGS = 2**16


class Whereabouts:
    """What the workers have said of where they are.

    A worker that joins runs the script from its beginning. What the others met for there, or before
    in the body of `session.epochs` that they are in, it is told at once.
    """

    def __init__(self) -> None:
        self.position = Position(BEGINNING)
        self.meetings: dict[Point, tuple[float, ...]] = {}
        """What the meetings that the script calls for have come to."""

    def begun(self, position: Position) -> None:
        """A worker has begun a step."""
        self._enter(position.point)
        latest = self.position.schedules_point, self.position.schedules_step
        if (position.schedules_point, position.schedules_step) >= latest:
            self.position = replace(position, point=self.position.point)

    def arrived(self, arrival: Arrival) -> None:
        """A worker has come to a meeting."""
        self._enter(replace(arrival.point, count=0))

    def _enter(self, body: Point) -> None:
        before = self.position.point
        if body > before:
            self.position = replace(self.position, point=body)
            # Who has just joined may still run the body before, but no earlier one.
            self.meetings = {p: m for p, m in self.meetings.items() if not p.loop or p > before}

    def met(self, arrivals: Iterable[Arrival], means: tuple[float, ...]) -> None:
        """A meeting is over."""
        for arrival in arrivals:
            is_named = arrival.purpose in _REPEATABLE and arrival.point.count
            if is_named and len(self.meetings) < _MAX_MEETINGS:
                self.meetings[arrival.point] = means

    def past(self, arrival: Arrival) -> tuple[float, ...] | None:
        """What a meeting came to that was over when this worker came to it; None: it was not."""
        if arrival.purpose not in _REPEATABLE:
            return None
        return self.meetings.get(arrival.point)
