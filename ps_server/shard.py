"""One shard as a state machine: no gRPC, no thread, no clock. Calls go in, effects come out.

The rules, each with a scenario in tests/ps_server/scenarios:

1.  A shard is ready once every part has been given its initial value. Until the first worker enters
    a value may be given again.
2.  A worker opens a step with `begin`; its parts follow; a part is used at most once per worker and
    step.
3.  In lockstep a part is updated as soon as every member has contributed to it or abstained, and no
    sooner.
4.  A message's membership epoch may be news to the shard: then it is kept until the lead has told.
5.  Idle workers are no members: nobody waits for them. A member is waited for from its first step
    on.
6.  The parameters go to every worker that acted, as soon as the part is updated.
7.  A duplicate of an applied push changes nothing. It is answered with the parameters if what was
    sent before was lost with a stream, and with the step after the one that it belongs to: a worker
    that has gone on must not take this for the answer to a later step.
8.  The hyperparameters of an update are those of the lowest rank that contributed.
9.  With max_grad_norm all parts of a step wait for the lead's factor.
10. A step from which everybody abstained advances the version and changes no parameter. So does
    one that nobody is left to take.
11. A worker that enters is sent every part, of the version that its first step begins with.
12. With quorum 1 every push is an update of its own, at once; what it did not know of is counted.
13. With a bound nobody is sent parameters before the slowest member is near enough (the gate).
14. With backup workers gradients are kept until the lead's seal names the contributors; what comes
    later is refused, and answered once its worker has entered again.
15. A fenced process is heard no more. What it contributed in lockstep stays, with the right
    divisor; the shard tells what it has used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch

from ps_core.errors import ProtocolError
from ps_core.job import Job
from ps_core.optim_spec import same_kind
from ps_server.effects import (
    Arrived,
    BatchesDiffer,
    Duplicate,
    Effect,
    HyperparametersDiffer,
    Late,
    Refused,
    Release,
    Remains,
    Squares,
    Stale,
)
from ps_server.gate import Gate
from ps_server.held import Held
from ps_server.part import PartState
from ps_server.policy import Verdict, consistency_of, is_complete, judge, scaled
from ps_server.terms import Begin, Member, differing, unequal


class Shard:
    """The parts of one shard, and who has contributed what to them."""

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.policy = consistency_of(job.consistency)
        keep = self.policy.sealed or (self.policy.lockstep and job.consistency.deterministic)
        parts = job.plan.parts_of_shard(index)
        self.parts = {part.index: PartState(part, job.optimizer, keep=keep) for part in parts}
        self._missing = set(self.parts)
        self._epoch = 0
        self._members: Mapping[int, Member] = {}
        self._known: dict[int, Member] = {}
        """Rank → the process that entered last, and the step it entered with."""
        self._steps: dict[int, Begin] = {}
        self._progress: dict[int, int] = {}
        """Parts of a worker's open step that have come."""
        self._clocks: dict[int, int] = {}
        self._held = Held(len(parts))
        self._gate = Gate(self.policy)
        self._copies = job.consistency.delay_compensation > 0
        self._sealed = -1
        """The last step that has a seal."""
        self._averaged = 0

    @property
    def ready(self) -> bool:
        """Every part has its initial value."""
        return not self._missing

    @property
    def version(self) -> int:
        """Updates that every part has."""
        return min((state.version for state in self.parts.values()), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters held."""
        return sum(state.part.num_bytes for state in self.parts.values())

    @property
    def members(self) -> frozenset[int]:
        """The workers that an update waits for."""
        return frozenset(self._members)

    def clock(self, worker: int) -> int:
        """Steps of the worker that this shard has in full; a joiner's begin where it enters."""
        return self._clocks.get(worker, 0)

    def has_entered(self, worker: int, incarnation: int) -> bool:
        """The process has, and is the last one of its rank: what the worker is sent is for it."""
        known = self._known.get(worker)
        return known is not None and known.incarnation == incarnation

    def load(self, part: int, elements: torch.Tensor) -> None:
        """Give a part its initial value, which is copied. Rule 1."""
        state = self.part(part)
        if self._known:
            raise ProtocolError(f"part {part} has its initial value already")
        state.parameters.copy_(elements)
        self._missing.discard(part)

    def part(self, part: int) -> PartState:
        """A part of this shard. Raises ProtocolError for any other."""
        if part not in self.parts:
            raise ProtocolError(f"part {part} is not on this shard")
        return self.parts[part]

    # -- The lead's word ---------------------------------------------------------------------------

    def set_membership(
        self, epoch: int, members: Mapping[int, Member], evicted: Mapping[int, int] = {}
    ) -> list[Effect]:
        """Take the lead's word about who is a member from now on, and which processes (rank →
        incarnation) are fenced. Rules 4, 5, 11 and 15.
        """
        if epoch <= self._epoch:
            return []
        effects = [self._fence(rank, evicted[rank]) for rank in sorted(evicted)]
        before, self._epoch, self._members = self._members, epoch, dict(members)
        for rank, member in sorted(members.items()):
            if member.enters or rank not in before:
                effects += self._enter(rank, member)
        return [*effects, *self._advance_all(), *self._held.take(), *self._open_gate()]

    def seal(self, step: int, contributors: frozenset[int]) -> list[Effect]:
        """Make the step's update of these workers' gradients. Rule 14."""
        if not self.policy.sealed or step != self.version or step <= self._sealed:
            return []
        self._sealed = step
        begun = sorted(rank for rank, begin in self._steps.items() if begin.step == step)
        effects: list[Effect] = [Late(rank, step) for rank in begun if rank not in contributors]
        dropped = sum(state.drop_others(contributors) for state in self.parts.values())
        effects += [Refused(dropped)] if dropped else []
        return [*effects, *self._advance_all()]

    def apply_factor(self, step: int, factor: float) -> list[Effect]:
        """Take the lead's clip factor and update every part of the step. Rule 9."""
        if step != self.version or self._averaged < len(self.parts):
            return []
        self._averaged = 0
        applied = [self._apply(state, factor) for state in self.parts.values()]
        return [*applied, *self._advance_all()]

    # -- The workers' word -------------------------------------------------------------------------

    def begin(self, worker: int, begin: Begin) -> list[Effect]:
        """Open a worker's step; with weight 0 it abstains. Rules 2, 4, 8, 10 and 14."""
        return [*self._begin(worker, begin), *self._open_gate()]

    def _begin(self, worker: int, begin: Begin) -> list[Effect]:
        if not self.ready:
            raise ProtocolError(f"worker {worker} begins a step before the shard has its values")
        if not same_kind(self.job.optimizer.groups, begin.groups):
            raise ProtocolError(
                f"worker {worker} sends hyperparameters that the optimizer does not have"
            )
        self._held.forget(worker)
        if begin.epoch > self._epoch:
            known = self._known.get(worker)
            again = partial(self._begin, worker, begin)
            self._held.begin(worker, known.incarnation if known else 0, again)
            return []
        self._check_step(worker, begin.step)
        pair = differing(self._steps, worker, begin) if self.policy.lockstep else None
        effects: list[Effect] = [HyperparametersDiffer(begin.step, pair)] if pair else []
        other = unequal(self._steps, worker, begin) if self.policy.lockstep else None
        if other is not None:
            effects.append(BatchesDiffer(begin.step, (min(worker, other), max(worker, other))))
        if worker not in self._steps or self._steps[worker].step != begin.step:
            self._progress[worker] = 0
            if not self._is_over(worker, begin.step):
                self._gate.renew(worker)
        self._steps[worker] = begin
        if self._is_late(worker, begin.step):
            return [*effects, Late(worker, begin.step)]
        return effects + (self._abstain(worker, begin.step) if not begin.weight else [])

    def push(
        self, worker: int, step: int, part: int, present: Sequence[bool], gradient: torch.Tensor
    ) -> list[Effect]:
        """Take a gradient for a part, to be read until the update. Rules 2, 3, 6, 7, 12 and 14."""
        return [*self._push(worker, step, part, present, gradient), *self._open_gate()]

    def _push(
        self, worker: int, step: int, part: int, present: Sequence[bool], gradient: torch.Tensor
    ) -> list[Effect]:
        state = self.part(part)
        again = partial(self._push, worker, step, part, present, gradient)
        if self._held.follows(worker, again):
            return []
        opened = self._steps.get(worker)
        if opened is None or opened.step != step or not opened.weight:
            raise ProtocolError(
                f"worker {worker} pushes part {part} of step {step} without a begin"
            )
        match self._judge(state, worker, step):
            case Verdict.LATE:
                return [Refused(1)]
            case Verdict.DUPLICATE:
                return self._repeat(state, worker, step)
        group = opened.groups[state.part.group]
        if self.job.consistency.staleness_scaling:
            group = scaled(group, state.staleness(worker))
        state.contribute(worker, opened.weight, group, present, gradient)
        return self._use(worker, step, [part])

    def fetch(self, worker: int, parts: Collection[int]) -> list[Effect]:
        """Send a member parts that were lost; who is none gets them when it enters. Rule 11."""
        states = [self.part(part) for part in sorted(parts)] if worker in self._members else []
        clock = 0 if self.policy.lockstep else self.clock(worker)
        answers = [effect for state in states for effect in self._answer(state, worker, clock)]
        return answers + self._open_gate()

    def reopened(self, worker: int) -> None:
        """The worker has another stream: what was sent on the one before may be lost. Rule 7."""
        self._gate.renew(worker)

    # -- Rules -------------------------------------------------------------------------------------

    def _check_step(self, worker: int, step: int) -> None:
        if worker not in self._members and step >= self.clock(worker):
            raise ProtocolError(
                f"worker {worker} begins step {step} but is idle: it must meet first"
            )
        lockstep = self.policy.lockstep
        word, now = ("version", self.version) if lockstep else ("clock", self.clock(worker))
        if self.parts and step > now:
            raise ProtocolError(f"worker {worker} begins step {step} at {word} {now}")

    def _is_late(self, worker: int, step: int) -> bool:
        """The step was sealed without the worker, which is to be told so."""
        used = (state.has_used(worker, step) for state in self.parts.values())
        return step <= self._sealed and not self._is_over(worker, step) and not all(used)

    def _is_over(self, worker: int, step: int) -> bool:
        """The worker has been told to go on after this step: what still comes of it is outdated."""
        return step < self._known[worker].first_step

    def _judge(self, state: PartState, worker: int, step: int) -> Verdict:
        last_step = step if worker in state.acted else state.last_step.get(worker, -1)
        verdict = judge(self.policy, step, last_step, state.version)
        if verdict is Verdict.ACCEPT and step <= self._sealed:
            return Verdict.LATE  # the sealed step waits for its clip factor
        if verdict is Verdict.EARLY or (verdict is Verdict.LATE and not self.policy.sealed):
            raise ProtocolError(f"worker {worker} pushes step {step} at version {state.version}")
        return verdict

    def _repeat(self, state: PartState, worker: int, step: int) -> list[Effect]:
        refused = self._is_over(worker, step) and self.policy.sealed and self._steps[worker].weight
        counted = Refused(1) if refused else Duplicate(worker, step, state.part.index)
        answered = max(step + 1, self._known[worker].first_step)  # it may be told to go on further
        return [counted, *self._answer(state, worker, answered)]

    def _answer(self, state: PartState, worker: int, clock: int) -> list[Effect]:
        """Send a worker a part, unless it has it or will be sent it without asking."""
        index, waits = state.part.index, worker in state.acted or worker in state.awaiting
        if waits or self._gate.has(worker, index):
            return []
        if self.policy.lockstep:
            clock = 0 if clock == state.version else clock
            return [self._release(state, (worker,), clock)]
        self._gate.wait(worker, clock, index)
        return []

    def _abstain(self, worker: int, step: int) -> list[Effect]:
        effects: list[Effect] = []
        fresh = []
        for part, state in self.parts.items():
            if self._judge(state, worker, step) is Verdict.DUPLICATE:
                effects += self._repeat(state, worker, step)
            else:
                state.abstain(worker)
                fresh.append(part)
        return effects + self._use(worker, step, fresh)

    def _use(self, worker: int, step: int, parts: Sequence[int]) -> list[Effect]:
        """The worker has contributed to these parts, or abstained from them."""
        if not parts:
            return []
        act = self._advance if self.policy.lockstep else partial(self._apply_alone, worker)
        effects = [effect for part in parts for effect in act(part)]
        self._progress[worker] += len(parts)
        if self._progress[worker] == len(self.parts):
            self._clocks[worker] = step + 1
            version = step + 1 if self.policy.lockstep else self.version
            effects.append(Arrived(worker, step, version))
        return effects

    def _apply_alone(self, worker: int, part: int) -> list[Effect]:
        """Rules 12 and 13. Who abstains makes no update."""
        state, begin = self.parts[part], self._steps[worker]
        self._gate.wait(worker, begin.step + 1, part)
        if not begin.weight:
            state.note_abstention(worker, begin.step)
            return []
        stale = Stale(state.staleness(worker))
        if self._copies:
            state.compensate(worker, self.job.consistency.delay_compensation)
        state.average()
        state.apply(begin.step)
        return [stale]

    def _open_gate(self) -> list[Effect]:
        """Last in every call: what is sent is what the part is then."""
        opened = self._gate.open(self.clock(rank) for rank in self._members)
        return [self._release(self.parts[part], (who,), clock) for who, clock, part in opened]

    def _advance_all(self) -> Iterator[Effect]:
        if self.policy.lockstep:
            yield from (effect for part in self.parts for effect in self._advance(part))

    def _advance(self, part: int) -> list[Effect]:
        """Rules 3 and 10: update the part as long as it has what it waits for."""
        state = self.parts[part]
        effects: list[Effect] = []
        while not state.averaged and self._is_complete(state):
            state.average()
            if self.job.optimizer.max_grad_norm is None:
                effects.append(self._apply(state, 1.0))
                continue
            self._averaged += 1
            if self._averaged == len(self.parts):
                total = sum(each.squares() for each in self.parts.values())
                effects.append(Squares(state.version, total))
        return effects

    def _is_complete(self, state: PartState) -> bool:
        if self.policy.sealed:
            return self._sealed == state.version and bool(state.acted)
        expected = [r for r, m in self._members.items() if m.first_step <= state.version]
        if self._members and not expected:
            return True  # rule 10
        return is_complete(self.policy, state.acted, expected)

    def _apply(self, state: PartState, factor: float) -> Effect:
        acted = set(state.acted)
        state.apply(state.version, factor)
        enter = {r for r in state.awaiting if self._known[r].first_step <= state.version}
        state.awaiting -= enter
        return self._release(state, sorted((acted | enter) & self._members.keys()))

    def _release(self, state: PartState, workers: Sequence[int], clock: int = 0) -> Effect:
        for rank in workers:
            state.pull(rank, copy=self._copies)
            self._gate.sent(rank, state.part.index)
        return Release(state.part.index, state.version, tuple(workers), clock)

    def _enter(self, rank: int, member: Member) -> list[Effect]:
        """Rule 11."""
        is_new = not self.has_entered(rank, member.incarnation)
        first = self._clocks[rank] = member.first_step
        self._known[rank], self._progress[rank] = member, 0
        if is_new:
            self._steps.pop(rank, None)
            self._gate.forget(rank)
        effects: list[Effect] = []
        for state in self.parts.values():
            state.enter(rank, first)
            if member.enters and not self.policy.lockstep:
                self._gate.wait(rank, first, state.part.index)
            elif member.enters and state.version < first:
                state.awaiting.add(rank)
            elif member.enters:
                effects.append(self._release(state, (rank,)))
            elif is_new:  # it holds the values, since it has given them
                state.pull(rank, copy=self._copies)
        return effects

    def _fence(self, rank: int, incarnation: int) -> Effect:
        """Rule 15. A process that never entered has left nothing."""
        self._held.forget(rank)
        self._gate.forget(rank)
        for state in self.parts.values():
            state.forget(rank)
            if self.policy.sealed and state.version != self._sealed:
                state.drop_others(state.acted.keys() - {rank})
        begin, num_parts = self._steps.pop(rank, None), len(self.parts)
        entered = self.has_entered(rank, incarnation)
        if begin is None or not entered or self._is_over(rank, begin.step):
            return Remains(rank, incarnation, 0, 0, (), 0, num_parts)
        used = sum(state.has_used(rank, begin.step) for state in self.parts.values())
        known = begin.step, begin.samples, begin.leases
        return Remains(rank, incarnation, *known, used, num_parts, begin.given_weight)
