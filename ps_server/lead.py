"""What only shard 0 decides, as a state machine: no gRPC, no thread; time is an argument.

The rules, each with a scenario in tests/ps_server/scenarios:

1. The job starts when all of its workers have met for the first time; the wait is bounded.
2. The lowest rank gives the initial values. The lowest rank that has not left is the chosen worker:
   its buffers count.
3. A worker that goes idle is no member from then on: a new membership epoch says so to every shard.
4. A meeting ends when every worker that has not left has come for the same purpose. All who came
   are members of a new epoch, and go on at the highest step any of them had reached.
5. The clip factor of a step is known when every shard that holds parts has reported its squares.
6. The job is complete when every worker has left, and fails when one is lost or says that it
   failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ps_core.errors import MismatchError, UsageError
from ps_core.exchange import Purpose


@dataclass(frozen=True, slots=True)
class Membership:
    """To every shard: who is a member from now on."""

    epoch: int
    members: frozenset[int]


@dataclass(frozen=True, slots=True)
class Factor:
    """To every shard: the clip factor of a step."""

    step: int
    factor: float


@dataclass(frozen=True, slots=True)
class Met:
    """To one worker: everybody has come."""

    worker: int
    step: int
    epoch: int
    means: tuple[float, ...]
    chosen: bool


@dataclass(frozen=True, slots=True)
class Complete:
    """To every shard: all workers have finished."""


@dataclass(frozen=True, slots=True)
class Failed:
    """To every shard: the job cannot go on."""

    reason: str


Effect = Membership | Factor | Met | Complete | Failed


class State(Enum):
    """Where a worker is."""

    JOINED = "joined"
    MEMBER = "member"
    IDLE = "idle"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a worker brings to a meeting."""

    purpose: Purpose
    step: int
    values: tuple[float, ...] = ()
    weight: float = 1.0


@dataclass(slots=True)
class _Worker:
    incarnation: int
    state: State = State.JOINED
    arrival: Arrival | None = None


@dataclass(slots=True)
class Lead:
    """Membership, meetings and clip factors of one job."""

    num_workers: int
    shards_with_parts: frozenset[int]
    max_grad_norm: float | None
    deadline: float
    """When the last worker must have joined, on the caller's clock."""
    epoch: int = 0
    ended: bool = False
    _workers: dict[int, _Worker] = field(default_factory=dict)
    _squares: dict[int, float] = field(default_factory=dict)
    _next_clip: int = 0
    """Squares of steps before this one are repeats."""

    def join(self, worker: int, incarnation: int) -> bool:
        """Admit a worker; True: its initial values count. Joining again with the same incarnation
        changes nothing.
        """
        known = self._workers.get(worker)
        if known is None:
            self._workers[worker] = _Worker(incarnation)
        elif known.incarnation != incarnation:
            raise MismatchError(
                f"worker {worker} has joined already, as another process: give every worker a "
                "rank of its own"
            )
        return worker == 0

    def state(self, worker: int) -> str:
        """A word for people."""
        known = self._workers.get(worker)
        return known.state.value if known else ""

    def idle(self, worker: int) -> list[Effect]:
        """Stop waiting for a worker. Rule 3."""
        known = self._workers[worker]
        if known.state is not State.MEMBER:
            return []
        known.state = State.IDLE
        return [self._next_epoch()]

    def meet(self, worker: int, arrival: Arrival) -> list[Effect]:
        """A worker waits for all the others. Rules 1 and 4. Raises UsageError when it came for
        something else.
        """
        for rank, other in self._present():
            if other.arrival and rank != worker:
                _check_same(worker, arrival, rank, other.arrival)
        effects = self.idle(worker)
        self._workers[worker].arrival = arrival
        return effects + self._end_meeting()

    def leave(self, worker: int, failure: str) -> list[Effect]:
        """A worker's last word. Rule 6."""
        if failure:
            return self.fail(f"worker {worker} failed: {failure}")
        known = self._workers.get(worker)
        if known is None or known.state is State.LEFT or self.ended:
            return []
        effects = self.idle(worker)
        known.state, known.arrival = State.LEFT, None
        if not list(self._present()) and len(self._workers) == self.num_workers:
            self.ended = True
            return [*effects, Complete()]
        return effects + self._end_meeting()

    def fail(self, reason: str) -> list[Effect]:
        """End the job, once."""
        if self.ended:
            return []
        self.ended = True
        return [Failed(reason)]

    def squares(self, shard: int, step: int, total: float) -> list[Effect]:
        """A shard's share of the squared norm. Rule 5; the factor is that of
        torch.nn.utils.clip_grad_norm_.
        """
        assert self.max_grad_norm is not None
        if step < self._next_clip:
            return []
        self._squares[shard] = total
        if self._squares.keys() != self.shards_with_parts:
            return []
        norm = sum(self._squares[index] for index in sorted(self._squares)) ** 0.5
        self._squares.clear()
        self._next_clip = step + 1
        return [Factor(step, min(self.max_grad_norm / (norm + 1e-6), 1.0))]

    def tick(self, now: float) -> list[Effect]:
        """Let time pass. Rule 1."""
        missing = sorted(set(range(self.num_workers)) - self._workers.keys())
        if now < self.deadline or not missing:
            return []
        names = ", ".join(map(str, missing))
        return self.fail(f"{len(missing)} of {self.num_workers} workers never joined: {names}")

    def _present(self) -> Iterator[tuple[int, _Worker]]:
        """The workers that have not left, by rank."""
        return ((r, w) for r, w in sorted(self._workers.items()) if w.state is not State.LEFT)

    def _next_epoch(self) -> Membership:
        self.epoch += 1
        members = frozenset(r for r, w in self._workers.items() if w.state is State.MEMBER)
        return Membership(self.epoch, members)

    def _end_meeting(self) -> list[Effect]:
        present = list(self._present())
        arrivals = [w.arrival for _, w in present if w.arrival]
        if not present or len(arrivals) < len(present) or len(self._workers) < self.num_workers:
            return []
        for _, known in present:
            known.state, known.arrival = State.MEMBER, None
        membership = self._next_epoch()
        step = max(arrival.step for arrival in arrivals)
        means = _weighted_means(arrivals)
        chosen = present[0][0]
        mets = (Met(r, step, membership.epoch, means, r == chosen) for r, _ in present)
        return [membership, *mets]


def _check_same(worker: int, arrival: Arrival, rank: int, other: Arrival) -> None:
    mine, theirs = arrival.purpose.name.lower(), other.purpose.name.lower()
    if mine != theirs:
        raise UsageError(
            f"worker {worker} waits for all workers at '{mine}' and worker {rank} at '{theirs}': "
            "call session.epochs, "
            "session.mean and load_state_dict in the same order on every worker"
        )
    if len(arrival.values) != len(other.values):
        raise UsageError(
            f"worker {worker} averages {len(arrival.values)} numbers and worker {rank} "
            f"{len(other.values)}"
        )


def _weighted_means(arrivals: Sequence[Arrival]) -> tuple[float, ...]:
    total = sum(arrival.weight for arrival in arrivals)
    columns = zip(*(arrival.values for arrival in arrivals), strict=True)
    return tuple(
        sum(a.weight * v for a, v in zip(arrivals, column, strict=True) if a.weight) / total
        if total
        else math.nan
        for column in columns
    )
