"""How long the lead waits: for the first workers, for more of them, and for a late step. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ps_server.crew import Crew
from ps_server.policy import Consistency, may_continue
from ps_server.terms import Terms

Step = tuple[int, int, int]
"""Rank, incarnation and number of a step."""


class Patience:
    """Remembers since when something is waited for, to the accuracy of its calls."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._paused_since: float | None = None
        self._late_since: dict[Step, float] = {}

    def missed(self, here: Collection[int], now: float) -> str:
        """Before the start: why the job fails, since not enough workers are `here`; or nothing."""
        count, absent = self._terms.num_workers, set(range(self._terms.num_workers)) - set(here)
        missing = sorted(absent)[: max(count - len(here), int(0 in absent))]
        if now < self._terms.deadline or not missing:
            return ""
        return (
            f"{len(missing)} of {count} workers never joined: {', '.join(map(str, missing))} "
            "(membership.join_timeout_seconds): look into their logs"
        )

    def paused(self, num_workers: int, now: float) -> str:
        """The job is paused: why it fails, since that lasts too long; or nothing."""
        self._late_since.clear()
        self._paused_since = now if self._paused_since is None else self._paused_since
        if now - self._paused_since < self._terms.pause_seconds:
            return ""
        return (
            f"paused for {self._terms.pause_seconds:g} s with {num_workers} workers, and at least "
            f"{self._terms.min_workers} are wanted: start more, or lower membership.min_workers "
            "or raise membership.pause_timeout_seconds"
        )

    def late(self, steps: Iterable[Step], now: float) -> list[tuple[Step, float]]:
        """Those of the steps that others wait for now, and have waited for too long: for how many
        seconds. The job is not paused.
        """
        self._paused_since = None
        self._late_since = {step: self._late_since.get(step, now) for step in steps}
        limit = self._terms.step_seconds
        waited = ((step, now - since) for step, since in self._late_since.items())
        return [(step, seconds) for step, seconds in waited if 0 < limit < seconds]


def awaited(crew: Crew, policy: Consistency, turn: int) -> list[Step]:
    """The steps without which somebody cannot go on. With backup workers nobody waits for a worker
    whose step is made already; without a bound nobody waits at all.
    """
    training = [(rank, crew[rank]) for rank in sorted(crew.training)]
    fastest = max((each.clock for _, each in training), default=0)
    return [
        (rank, each.incarnation, each.clock)
        for rank, each in training
        if not may_continue(policy, fastest, [each.clock])
        and not (policy.sealed and each.clock < turn)
    ]
