"""What only shard 0 decides, as a state machine: no gRPC, no thread; time is an argument.

The rules, each with a scenario in tests/ps_server/scenarios:

1.  The job starts when as many workers as it starts with have met for the first time; the wait is
    bounded.
2.  Rank 0 gives the initial values. The lowest rank that is present is the chosen worker: its
    buffers count.
3.  A worker that goes idle is no member from then on: a new membership epoch says so to every
    shard.
4.  A meeting ends when every worker that is present has come for the same purpose. All who came are
    members of a new epoch, and go on at the highest step that anybody has begun or reached. Who
    has joined since the others met is told what that came to.
5.  The clip factor of a step is known when every shard that holds parts has reported its squares.
6.  The job is complete when a worker has finished and none is present, and fails when a worker says
    that any other would fail as well.
7.  A worker that is lost or fails is fenced by a new epoch. What became of its last step is settled
    by the shards' word; until then its rank cannot enter again, and no pass ends.
8.  A worker that joins a running job enters at the next turn: when the lead's shard completes a
    step, and at once when nobody else is present. It delays nobody before. Its first step is the
    next version in lockstep, otherwise the slowest member's.
9.  At the end of a pass workers wait until every sample is accounted for. When samples come back, a
    waiting worker is given them, and enters again at the next turn, or at once when nobody trains.
10. With backup workers a step is sealed as soon as enough members are ready on every shard. Who was
    too late enters again at the next turn; its samples go back.
11. With fewer workers than wanted the job pauses at the next turn; the pause is bounded.
12. With a step deadline, a member that others have to wait for too long is evicted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ps_core.entries import Event, WorkerEvent
from ps_core.errors import MismatchError
from ps_core.exchange import Arrival, Grant, Position, Purpose
from ps_core.leases import PassSpec
from ps_core.meeting import check_same, weighted_means
from ps_core.whereabouts import Whereabouts
from ps_server.clip import Clip
from ps_server.crew import Crew, State, Worker
from ps_server.effects import Remains
from ps_server.ledger import Ledger
from ps_server.orders import Complete, Effect, Factor, Failed, Membership, Met, Readmitted, Seal
from ps_server.patience import Patience, awaited
from ps_server.policy import Consistency
from ps_server.seals import Seals
from ps_server.terms import Begin, Cause, Terms


class Lead:
    """Membership, meetings, samples, seals and clip factors of one job."""

    def __init__(
        self,
        terms: Terms,
        policy: Consistency,
        holders: frozenset[int],
        max_grad_norm: float | None = None,
    ) -> None:
        """`holders`: the shards that hold parts."""
        self.epoch = 0
        self.turn = 0
        """In lockstep: the version that the lead's shard has, the step that members take now.
        Otherwise: the highest clock.
        """
        self.started = False
        self.ended = False
        self.is_paused = False
        """There are fewer workers than wanted, and not because some have finished."""
        self.crew = Crew()
        self.ledger = Ledger(holders, striped=policy.lockstep and not policy.sealed)
        self._terms = terms
        self._policy = policy
        self._seals = Seals(policy, holders)
        self._clip = Clip(max_grad_norm, holders)
        self._whereabouts = Whereabouts()
        self._patience = Patience(terms)
        self._holds_turn = False
        """It is a turn, which waits for the end of a pause."""
        self._is_torn = False
        """In lockstep: some part may be updated by the step in progress without who enters now."""

    # -- Who is there ------------------------------------------------------------------------------

    @property
    def members(self) -> frozenset[int]:
        """The ranks that updates wait for."""
        return self.crew.members

    @property
    def present(self) -> tuple[int, ...]:
        """The ranks that take part, members or not, in order."""
        return tuple(rank for rank, _ in self.crew.present())

    # -- Workers come and go -----------------------------------------------------------------------

    def join(self, worker: int, incarnation: int) -> bool:
        """Admit a process; True: its initial values count. Joining again changes nothing. Raises
        MismatchError when another process holds the rank: evict that first.
        """
        if self.crew.incarnation(worker) not in (0, incarnation):
            raise MismatchError(
                f"worker {worker} has joined already, as another process: give every worker a "
                "rank of its own"
            )
        if self.crew.incarnation(worker) == 0:
            self.crew[worker] = Worker(incarnation)
            self._tell(worker, "joined")
        return worker == 0 and not self.started

    def leave(self, worker: int, farewell: Literal["finished", "preempted"]) -> list[Effect]:
        """A worker's last word, between its steps. Rule 6."""
        known = self.crew[worker]
        if known.is_away or self.ended:
            return []
        self.ledger.release(worker)
        effects = self._rest(worker)
        known.depart(State.LEFT if farewell == "finished" else State.GONE)
        self._tell(worker, farewell)
        return effects + self._look_around()

    def evict(self, worker: int, incarnation: int, cause: Cause, reason: str) -> list[Effect]:
        """Fence a process, whatever it is doing. Rule 7."""
        if self.ended or not incarnation or self.crew.incarnation(worker) != incarnation:
            return []
        known = self.crew[worker]
        # With backup workers what it has contributed is dropped, unless the step is sealed.
        self._is_torn |= known.state is State.MEMBER and not self._policy.sealed
        known.depart(State.GONE)
        self._tell(worker, "failed" if cause == "failed" else "evicted", reason)
        self.ledger.investigate(worker, incarnation)
        self._seals.forget(worker)
        membership = replace(self._next_epoch({worker: incarnation}), reason=reason)
        return [membership, *self._look_around()]

    def remains(self, shard: int, remains: Remains) -> list[Effect]:
        """A shard's word about a fenced process. Rule 7."""
        return self._look_around() if self.ledger.remains(shard, remains) else []

    def fail(self, reason: str) -> list[Effect]:
        """End the job, once."""
        if self.ended:
            return []
        self.ended, self.is_paused = True, False
        return [Failed(reason)]

    def _tell(self, worker: int, event: Event, reason: str = "") -> None:
        known = self.crew[worker]
        self.ledger.note(WorkerEvent(worker, known.incarnation, event, known.clock, reason))

    # -- Steps -------------------------------------------------------------------------------------

    def begin(self, worker: int, begin: Begin, position: Position) -> list[Effect]:
        """A worker opens a step on the lead's shard, or repeats one that was refused meanwhile.
        Rule 10. Raises ProtocolError for leases of others.
        """
        known = self.crew[worker]
        if known.enters:
            return []
        if begin.step < known.first_step:
            return [Readmitted(worker, known.first_step)]
        work = begin.samples, begin.leases, begin.given_weight
        self.ledger.begin(worker, known.incarnation, begin.step, *work)
        self._whereabouts.begun(position)
        return []

    def arrived(self, worker: int, step: int, version: int) -> list[Effect]:
        """The lead's shard has all of a worker's step: a turn, unless in lockstep. Rule 8."""
        self.ledger.arrived(worker, step, version)
        self.crew[worker].clock = step + 1
        if self._policy.lockstep:
            return []
        self.turn, self._holds_turn = max(self.turn, step + 1), True
        return self._admit()

    def late(self, worker: int) -> list[Effect]:
        """A member's step was sealed without it. Rule 10."""
        known = self.crew[worker]
        if not known.is_training:
            return []
        known.enters = "late"
        self.ledger.refuse(worker)
        return self._look_around()

    def ready(self, shard: int, worker: int, step: int) -> list[Effect]:
        """A shard has all of a worker's step. Rule 10."""
        known = self.crew.get(worker)
        if known is None or not known.is_training:
            return []  # it was evicted meanwhile, or is late
        self._seals.ready(shard, worker, step)
        return self._seal()

    def take_turn(self, version: int) -> list[Effect]:
        """The lead's shard is about to send out this version for the first time. Rules 8 to 11."""
        if version <= self.turn:
            return []  # nobody has taken the step: whoever has entered meanwhile begins after it
        self.turn, self._holds_turn, self._is_torn = version, True, False
        return self._admit()

    def squares(self, shard: int, step: int, total: float) -> list[Effect]:
        """A shard's share of the squared norm. Rule 5. Raises ProtocolError."""
        factor = self._clip.factor(shard, step, total)
        return [Factor(step, factor)] if factor is not None else []

    def _seal(self) -> list[Effect]:
        contributors = self._seals.decide(self.turn, self.crew.training, len(self.members))
        self._is_torn |= bool(contributors)
        return [Seal(self.turn, contributors)] if contributors else []

    # -- Data --------------------------------------------------------------------------------------

    def request(
        self, worker: int, loader: int, spec: PassSpec, speeds: Mapping[int, float]
    ) -> Grant:
        """A lease for a worker, if there is one. Raises UsageError when workers disagree."""
        known = self.crew[worker]
        if known.is_away:  # it left before this was read
            return Grant(0, ())
        known.reads = loader, spec
        sharing = self.crew.reading(members_only=bool(spec.global_batch_size)) | {worker}
        return self.ledger.request(worker, loader, spec, sorted(sharing), speeds)

    def give_back(self, worker: int, leases: Sequence[int], *, declined: bool) -> list[Effect]:
        """Leases that no step will use. Rule 9."""
        self.ledger.give_back(worker, leases, declined=declined)
        return self._look_around()

    def _serve_waiting(self) -> None:
        """Give samples that have come back to workers that wait at the end of the pass."""
        for rank, known in self.crew.present():
            if known.awaits_samples and known.reads is not None:
                grant = self.request(rank, *known.reads, {})
                if grant.leases:
                    known.grant, known.enters = grant, "returns"

    # -- Meetings ----------------------------------------------------------------------------------

    def idle(self, worker: int) -> list[Effect]:
        """A worker has broken out of its data: whatever it has been granted goes back. Rule 3."""
        self.ledger.take_back(worker)
        return self._rest(worker) + self._look_around()

    def _rest(self, worker: int) -> list[Effect]:
        """Stop waiting for a worker."""
        known = self.crew[worker]
        if known.state is not State.MEMBER:
            return []
        self._is_torn |= not self._policy.sealed and self.ledger.is_open(worker, self.turn)
        known.state = State.IDLE
        return [self._next_epoch()]

    def meet(self, worker: int, arrival: Arrival) -> list[Effect]:
        """A worker waits for all the others. Rules 1, 4, 8 and 9. Raises UsageError when it came
        for something else, and ProtocolError when it comes in the middle of a step.
        """
        known = self.crew[worker]
        if known.is_away:  # it left before this was read
            return []
        if (past := self._whereabouts.past(arrival)) is not None:
            chosen = worker == min(self.present)
            return [Met(worker, arrival.step, self.epoch, past, chosen, is_past=True)]
        if arrival.purpose is Purpose.START:
            known.arrival, known.enters = arrival, "joins"
            return self._look_around()
        for rank, other in self.crew.present():
            if other.arrival and rank != worker and not other.enters:
                check_same(worker, arrival, rank, other.arrival)
        self.ledger.settle(worker, arrival.step)
        self._whereabouts.arrived(arrival)
        effects = self._rest(worker)
        # What it still holds stays its own until the pass ends: samples that it has only read.
        known.arrival = arrival
        return effects + self._look_around()

    def _start(self) -> list[Effect]:
        ready = self.crew.entering("joins")
        is_full = len(ready) >= self._terms.num_workers and 0 in ready
        if not is_full or self.ledger.is_in_doubt():
            return []
        self.started = True
        for known in ready.values():
            known.become_member(0)
        membership = self._next_epoch(entering=ready.keys() - {0})
        mets = (Met(r, 0, self.epoch, chosen=r == 0, refreshed=r != 0) for r in ready)
        return [membership, *mets]

    def _end_meeting(self) -> list[Effect]:
        """Rules 4 and 9."""
        arrivals = self.crew.met()
        ends_passes = any(arrival.purpose is Purpose.EPOCH for arrival in arrivals.values())
        if not arrivals or (ends_passes and self.ledger.is_in_doubt()):
            return []
        if ends_passes:
            self.ledger.end_passes()
        turn = self._next_step() if self._policy.lockstep else 0
        step = max(turn, *(arrival.step for arrival in arrivals.values()))
        if self._policy.lockstep:
            stale = {rank for rank, arrival in arrivals.items() if arrival.step != step}
        else:  # a mean is of whatever each holds
            stale = {r for r, arrival in arrivals.items() if arrival.purpose is not Purpose.MEAN}
        means = weighted_means(list(arrivals.values()))
        self._whereabouts.met(arrivals.values(), means)
        self.turn, self._holds_turn = max(self.turn, step), False
        for rank in arrivals:
            self.crew[rank].become_member(step)
        membership = self._next_epoch(entering=stale)
        first = min(arrivals)
        given = any(arrival.hands_over for arrival in arrivals.values())
        mets = (
            Met(r, step, self.epoch, means, r == first, r in stale, handed_over=given)
            for r in arrivals
        )
        return [membership, *mets]

    # -- Turns -------------------------------------------------------------------------------------

    def _look_around(self) -> list[Effect]:
        """After somebody came, went or gave something back: what can go on now."""
        if self.ended:
            return []
        if not self.started:
            return self._start()
        self._serve_waiting()
        num_workers = len(self.present) + len(self.crew.entering("joins"))
        is_short = num_workers < self._terms.min_workers
        self.is_paused = is_short and not self.crew.has_finished
        if not self.present and self.crew.has_finished:
            self.ended = not self.ledger.is_in_doubt()
            return [Complete()] if self.ended else []
        waits_for_turn = self.crew.training and not self._holds_turn
        effects = [] if waits_for_turn else self._admit()
        return effects + self._end_meeting() + self._seal()

    def _admit(self) -> list[Effect]:
        """Let all enter who wait for it. A joiner waits until others train: between two passes it
        would not know which of the script's calls come next.
        """
        if self.is_paused:
            return []
        self._holds_turn = False
        may_join = self.crew.training or not self.present
        waiting = {
            rank: replace(known)
            for rank, known in sorted(self.crew.items())
            if known.enters
            and not self.ledger.is_in_doubt(rank)
            and (may_join or known.enters != "joins")
        }
        if not waiting:
            return []
        step = self._next_step()
        for rank, was in waiting.items():
            self.crew[rank].become_member(max(step, was.clock))
        membership = self._next_epoch(entering=waiting.keys())
        # First what each is told, so that the parts find it waiting for them.
        return [*(self._entered(rank, was) for rank, was in waiting.items()), membership]

    def _entered(self, rank: int, was: Worker) -> Effect:
        step = self.crew[rank].first_step
        if was.enters == "late":
            return Readmitted(rank, step)
        position = self._whereabouts.position if was.enters == "joins" else None
        chosen = rank == min(self.present)
        return Met(rank, step, self.epoch, (), chosen, True, was.grant, position)

    def _next_step(self) -> int:
        """The step of who enters now: the next version, or the slowest member's clock."""
        if not self._policy.lockstep:
            clocks = (self.crew[rank].clock for rank in self.crew.training)
            return min(clocks, default=self.turn)
        if self._is_torn and not self.crew.training:
            self.turn, self._is_torn = self.turn + 1, False
        return self.turn

    def _next_epoch(
        self, evicted: Mapping[int, int] = {}, *, entering: Collection[int] = ()
    ) -> Membership:
        self.epoch += 1
        return Membership(self.epoch, self.crew.terms(entering), evicted)

    # -- Time --------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Let time pass. Rules 1, 11 and 12."""
        if self.ended:
            return []
        if not self.started:
            here = {rank for rank, known in self.crew.items() if not known.is_away}
            reason = self._patience.missed(here, now)
        elif self.is_paused:
            reason = self._patience.paused(len(self.present), now)
        else:
            return self._evict_late(now)
        return self.fail(reason) if reason else []

    def _evict_late(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        steps = awaited(self.crew, self._policy, self.turn)
        for (rank, incarnation, step), seconds in self._patience.late(steps, now):
            reason = (
                f"others have waited {seconds:.1f} s for its step {step} "
                "(membership.step_deadline_seconds)"
            )
            effects += self.evict(rank, incarnation, "step_deadline", reason)
        return effects
