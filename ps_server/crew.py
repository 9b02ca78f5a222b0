"""The workers of a job as the lead knows them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from ps_core.exchange import Arrival, Grant
from ps_core.leases import PassSpec
from ps_server.terms import Member


class State(Enum):
    """Where a worker is."""

    JOINED = "joined"
    MEMBER = "member"
    IDLE = "idle"
    LEFT = "left"
    GONE = "evicted"


_PRESENT = (State.MEMBER, State.IDLE)
_AWAY = (State.LEFT, State.GONE)


@dataclass(slots=True)
class Worker:
    """One rank."""

    incarnation: int
    """Of the process that holds, or held, the rank."""
    state: State = State.JOINED
    arrival: Arrival | None = None
    first_step: int = 0
    enters: Literal["", "joins", "returns", "late"] = ""
    """It enters at the next turn, and why."""
    clock: int = 0
    """Steps that the lead's shard has in full."""
    grant: Grant | None = None
    reads: tuple[int, PassSpec] | None = None
    """What it asked leases for last."""

    @property
    def is_away(self) -> bool:
        """It has finished, or was evicted."""
        return self.state in _AWAY

    @property
    def is_training(self) -> bool:
        """It will take a step without being told anything."""
        return self.state is State.MEMBER and not self.enters

    @property
    def awaits_samples(self) -> bool:
        """It has come to the end of its pass, and would go on with it."""
        return self.arrival is not None and self.arrival.takes_leases and not self.enters

    def become_member(self, step: int) -> None:
        """Updates wait for it from this step on."""
        self.state, self.arrival, self.enters, self.grant = State.MEMBER, None, "", None
        self.first_step = self.clock = step

    def depart(self, state: State) -> None:
        """It takes no part any more."""
        self.state, self.arrival, self.enters, self.grant = state, None, "", None


class Crew(dict[int, Worker]):
    """Workers by rank."""

    def incarnation(self, rank: int) -> int:
        """Of the process that holds the rank now; 0: none."""
        known = self.get(rank)
        return known.incarnation if known and not known.is_away else 0

    @property
    def members(self) -> frozenset[int]:
        """The ranks that updates wait for."""
        return frozenset(rank for rank, each in self.items() if each.state is State.MEMBER)

    def terms(self, entering: Collection[int]) -> dict[int, Member]:
        """On which terms each rank is a member."""
        return {
            rank: Member(each.incarnation, each.first_step, rank in entering)
            for rank, each in self.items()
            if each.state is State.MEMBER
        }

    def present(self) -> Iterator[tuple[int, Worker]]:
        """The workers that take part, members or not, by rank."""
        return ((rank, each) for rank, each in sorted(self.items()) if each.state in _PRESENT)

    def reading(self, *, members_only: bool) -> frozenset[int]:
        """The ranks that take part in the pass: not those that broke out of it."""
        return frozenset(
            rank
            for rank, each in self.present()
            if each.state is State.MEMBER
            or (not members_only and each.arrival is not None and each.arrival.takes_leases)
        )

    def entering(self, why: str) -> dict[int, Worker]:
        """Those that wait to enter for this reason."""
        return {rank: each for rank, each in sorted(self.items()) if each.enters == why}

    @property
    def training(self) -> frozenset[int]:
        """The ranks that will take a step without being told anything."""
        return frozenset(rank for rank, each in self.items() if each.is_training)

    def met(self) -> dict[int, Arrival]:
        """What each has brought to the meeting, once all that are present have come; or nothing."""
        present = dict(self.present())
        arrivals = {r: each.arrival for r, each in present.items() if each.arrival}
        is_over = len(arrivals) == len(present) and not any(w.enters for w in present.values())
        return arrivals if is_over else {}

    @property
    def has_finished(self) -> bool:
        """Somebody has."""
        return any(each.state is State.LEFT for each in self.values())
