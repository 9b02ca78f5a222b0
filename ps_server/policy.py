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

from ps_core.optim_spec import Hyperparameters
from ps_core.settings import ConsistencyConfig


@dataclass(frozen=True, slots=True)
class Consistency:
    """How pushes become updates."""

    quorum: int | None
    bound: int | None
    backups: int = 0
    """With quorum None: how many of the members an update does not wait for."""

    @property
    def lockstep(self) -> bool:
        """A push must be tagged with the version that it updates."""
        return self.bound == 0

    @property
    def sealed(self) -> bool:
        """Which pushes count must be decided once for all shards, before any of them is used."""
        return self.backups > 0

    def needed(self, num_members: int) -> int:
        """How many distinct workers an update waits for, at least one."""
        return max(1, num_members - self.backups if self.quorum is None else self.quorum)


SYNC = Consistency(quorum=None, bound=0)


def consistency_of(config: ConsistencyConfig) -> Consistency:
    """The two integers behind a mode."""
    match config.mode:
        case "bounded":
            return Consistency(quorum=1, bound=config.bound)
        case "async":
            return Consistency(quorum=1, bound=None)
    return Consistency(quorum=None, bound=0, backups=config.backup_workers)


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


def scaled(group: Hyperparameters, staleness: int) -> Hyperparameters:
    """With lr / (1 + staleness), the simple answer to gradients that did not know of as many
    updates.
    """
    lr = group["lr"]
    assert not isinstance(lr, tuple), "every optimizer's learning rate is one number"
    return {**group, "lr": lr / (1 + staleness)}
