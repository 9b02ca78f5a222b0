"""When a push counts, when an update is complete, when a worker may go on: pure functions.

Every way to synchronise is two integers. `quorum`: how many distinct workers one update waits for
(None: all members). `bound`: how many steps a worker may run ahead of the slowest (None: any
number). sync = (None, 0) · b backup workers = (N - b, 0) · bounded staleness = (1, k >= 1) · async
= (1, None).
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Consistency:
    """How pushes become updates."""

    quorum: int | None
    bound: int | None

    @property
    def lockstep(self) -> bool:
        """A push must be tagged with the version that it updates."""
        return self.bound == 0


SYNC = Consistency(quorum=None, bound=0)


class Verdict(enum.Enum):
    """What to do with a push."""

    ACCEPT = "accept"
    DUPLICATE = "duplicate"
    """Already used: answer it, do not apply it again."""
    LATE = "late"
    """Its version is gone and it was not used: refuse it, its worker takes the new parameters."""
    EARLY = "early"
    """It skips a step: no correct worker sends this."""


def judge(consistency: Consistency, step: int, last_step: int, version: int) -> Verdict:
    """Judge a push of `step` for a part at `version`.

    `last_step`: the ledger's entry, the last step of this worker that the part has used; -1 for
    none.
    """
    if step <= last_step:
        return Verdict.DUPLICATE
    expected = version if consistency.lockstep else last_step + 1
    if step > expected:
        return Verdict.EARLY
    return Verdict.LATE if step < expected else Verdict.ACCEPT


def is_complete(consistency: Consistency, acted: Collection[int], members: Collection[int]) -> bool:
    """Whether an update has what it waits for.

    `acted`: distinct workers that have contributed to it or abstained from it. A quorum above the
    number of members waits for all members, so that a shrinking fleet goes on.
    """
    if not acted:
        return False
    if set(members) <= set(acted):
        return True
    return consistency.quorum is not None and len(set(acted)) >= consistency.quorum


def may_continue(consistency: Consistency, clock: int, live_clocks: Collection[int]) -> bool:
    """Whether a worker at `clock` may read parameters and run its next step (the gate of SSP, Ho et
    al. 2013).

    `live_clocks`: the clocks of all members, this worker's among them; the dead, idle and finished
    do not count.
    """
    if consistency.bound is None or not live_clocks:
        return True
    return min(live_clocks) >= clock - consistency.bound
