"""Whether a worker that has failed is started again, and how soon. No processes and no clock here.

- 75, preempted: its machine was wanted back. Another process takes its place, which never counts.
- Any other failure: the worker is started again if there were fewer than `max_restarts` restarts
  within the last `window_seconds`, of all workers together. The workers of a replica of a split
  model die as one, and count as one.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

PREEMPTED: Final = 75

QUICK_SECONDS: Final = 30.0
"""A worker that ends sooner than this makes the next one wait twice as long."""
_FIRST_DELAY_SECONDS: Final = 0.5
_MAX_DOUBLINGS: Final = 3
REPLICA_SECONDS: Final = 20.0
"""Within this time the workers of a replica notice that one of them is gone."""
_PREEMPTED_DELAY_SECONDS: Final = 1.0  # at least; a script may end with 75 whatever happens


@dataclass(frozen=True, slots=True)
class Again:
    """A worker is to be started again after `delay_seconds`; `why` is for people."""

    delay_seconds: float
    why: str


@dataclass(slots=True)
class Restarts:
    """The restarts of one run; times are seconds of one monotonic clock."""

    max_restarts: int
    window_seconds: float
    num_stages: int = 1
    """Workers of a replica, whose ranks follow one another."""
    _counted: deque[float] = field(default_factory=deque)
    _failed: dict[int, tuple[float, set[int]]] = field(default_factory=dict)
    """Replica → when its last failure that counted was, and the ranks that have gone since."""
    _started: dict[int, float] = field(default_factory=dict)  # by rank, since the first restart
    _num_quick: dict[int, int] = field(default_factory=dict)  # by rank, in a row

    def num_recent(self, now: float) -> int:
        """How many restarts the window holds."""
        while self._counted and now - self._counted[0] >= self.window_seconds:
            self._counted.popleft()
        return len(self._counted)

    def started(self, rank: int, now: float) -> None:
        """The worker runs again."""
        self._started[rank] = now

    def ended(self, rank: int, code: int, now: float) -> Again | None:
        """Its process has failed with `code`; None: it is not started again."""
        if code == PREEMPTED:
            delay = max(self._delay_seconds(rank, now), _PREEMPTED_DELAY_SECONDS)
            return Again(delay, "this does not count as a failure")
        if self._goes_along(rank, now):
            return Again(self._delay_seconds(rank, now), "with the rest of its replica")
        num_recent = self.num_recent(now)
        if num_recent >= self.max_restarts:
            return None
        self._counted.append(now)
        self._failed[rank // self.num_stages] = now, {rank}
        why = f"{num_recent + 1} of {self.max_restarts} restarts in {self.window_seconds:g} s"
        return Again(self._delay_seconds(rank, now), why)

    def _goes_along(self, rank: int, now: float) -> bool:
        """Its replica has failed already, and this rank has not gone since."""
        failed_at, gone = self._failed.get(rank // self.num_stages, (-REPLICA_SECONDS, set()))
        if rank in gone or now - failed_at >= REPLICA_SECONDS:
            return False
        gone.add(rank)
        return True

    def _delay_seconds(self, rank: int, now: float) -> float:
        was_quick = rank in self._started and now - self._started[rank] < QUICK_SECONDS
        num_quick = self._num_quick[rank] = self._num_quick.get(rank, 0) + 1 if was_quick else 0
        return _FIRST_DELAY_SECONDS * 2.0 ** min(num_quick, _MAX_DOUBLINGS)
