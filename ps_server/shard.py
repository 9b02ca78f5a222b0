"""One shard as a state machine: no gRPC, no thread, no clock. Calls go in, effects come out.

The rules, each with a scenario in tests/ps_server/scenarios:

1.  A shard is ready once every part has been given its initial value, once.
2.  A worker opens a step with `begin`; its parts follow; a part is used at most once per worker and
    step.
3.  A part is updated as soon as every member has contributed to it or abstained, and no sooner.
4.  A step's membership epoch may be news to the shard: then it keeps contributions and waits to be
    told.
5.  Idle workers are no members: nobody waits for them.
6.  The parameters go to every worker that acted, as soon as the part is updated.
7.  A duplicate of an applied push is answered with the parameters and changes nothing.
8.  The hyperparameters of an update are those of the lowest rank that contributed.
9.  With max_grad_norm all parts of a step wait for the lead's factor.
10. A step from which everybody abstained advances the version and changes no parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ps_core.errors import ProtocolError
from ps_core.job import Job
from ps_core.optim_spec import Hyperparameters, same_kind
from ps_server.part import PartState
from ps_server.policy import SYNC, Verdict, is_complete, judge


@dataclass(frozen=True, slots=True)
class Release:
    """Send the part's parameters, now of `version`, to these workers."""

    part: int
    version: int
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Squares:
    """Tell the lead this shard's share of the squared norm of the step's mean gradient."""

    step: int
    total: float


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A push arrived again."""

    worker: int
    step: int
    part: int


@dataclass(frozen=True, slots=True)
class HyperparametersDiffer:
    """Two workers have different hyperparameters in one step; the lower rank's are used."""

    step: int
    workers: tuple[int, int]


Effect = Release | Squares | Duplicate | HyperparametersDiffer


@dataclass(frozen=True, slots=True)
class _Step:
    """What a worker said when it opened its current step."""

    step: int
    epoch: int
    samples: int
    groups: tuple[Hyperparameters, ...]


class Shard:
    """The parts of one shard, and who has contributed what to them."""

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.parts = {
            part.index: PartState(part, job.optimizer, deterministic=job.deterministic)
            for part in job.plan.parts_of_shard(index)
        }
        self._consistency = SYNC
        self._missing = set(self.parts)
        self._epoch = 0
        self._members: frozenset[int] = frozenset()
        self._steps: dict[int, _Step] = {}
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
        return self._members

    def clock(self, worker: int) -> int:
        """Steps of the worker that every part has used."""
        applied = (
            min(state.version, state.last_step.get(worker, -1) + 1) for state in self.parts.values()
        )
        return min(applied, default=0)

    def load(self, part: int, elements: torch.Tensor) -> None:
        """Give a part its initial value, which is copied. Rule 1."""
        state = self.part(part)
        if part not in self._missing:
            raise ProtocolError(f"part {part} has its initial value already")
        state.parameters.copy_(elements)
        self._missing.discard(part)

    def set_membership(self, epoch: int, members: frozenset[int]) -> list[Effect]:
        """Take the lead's word about who is a member from now on. Rules 4 and 5."""
        if epoch <= self._epoch:
            return []
        self._epoch, self._members = epoch, members
        return [effect for part in self.parts for effect in self._advance(part)]

    def begin(
        self,
        worker: int,
        step: int,
        epoch: int,
        samples: int,
        groups: tuple[Hyperparameters, ...],
    ) -> list[Effect]:
        """Open a worker's step; 0 samples: it abstains. Rules 2, 8 and 10."""
        if not self.ready:
            raise ProtocolError(
                f"worker {worker} begins step {step} before the shard has its values"
            )
        if not same_kind(self.job.optimizer.groups, groups):
            raise ProtocolError(
                f"worker {worker} sends hyperparameters that the optimizer does not have"
            )
        if epoch <= self._epoch and worker not in self._members:
            raise ProtocolError(
                f"worker {worker} begins step {step} but is idle: it must meet first"
            )
        if self.parts and step > self.version:
            raise ProtocolError(f"worker {worker} begins step {step} at version {self.version}")
        opened = _Step(step, epoch, samples, groups)
        effects: list[Effect] = []
        for other, known in self._steps.items():
            if other != worker and known.step == step and known.groups != groups:
                effects.append(
                    HyperparametersDiffer(step, (min(worker, other), max(worker, other)))
                )
                break
        self._steps[worker] = opened
        if samples == 0:
            effects += self._abstain(worker, step)
        return effects

    def push(
        self,
        worker: int,
        step: int,
        part: int,
        present: Sequence[bool],
        gradient: torch.Tensor,
    ) -> list[Effect]:
        """Take a worker's gradient for a part; `gradient` is read until the part is updated. Rules
        2, 3, 6, 7.
        """
        state = self.part(part)
        opened = self._steps.get(worker)
        if opened is None or opened.step != step or opened.samples == 0:
            raise ProtocolError(
                f"worker {worker} pushes part {part} of step {step} without a begin"
            )
        if not self._judge(state, worker, step):
            return self._repeat(state, worker, step)
        state.contribute(worker, step, opened.samples, present, gradient)
        return self._advance(part)

    def apply_factor(self, step: int, factor: float) -> list[Effect]:
        """Take the lead's clip factor and update every part of the step. Rule 9."""
        if step != self.version or self._averaged < len(self.parts):
            return []
        self._averaged = 0
        return [self._apply(state, factor) for state in self.parts.values()]

    def part(self, part: int) -> PartState:
        """A part of this shard. Raises ProtocolError for any other."""
        if part not in self.parts:
            raise ProtocolError(f"part {part} is not on this shard")
        return self.parts[part]

    def _judge(self, state: PartState, worker: int, step: int) -> bool:
        last_step = state.last_step.get(worker, -1)
        verdict = judge(self._consistency, step, last_step, state.version)
        if verdict is Verdict.EARLY:
            raise ProtocolError(f"worker {worker} pushes step {step} at version {state.version}")
        return verdict is Verdict.ACCEPT

    def _repeat(self, state: PartState, worker: int, step: int) -> list[Effect]:
        index = state.part.index
        effects: list[Effect] = [Duplicate(worker, step, index)]
        if state.version > step:
            effects.append(Release(index, state.version, (worker,)))
        return effects

    def _abstain(self, worker: int, step: int) -> list[Effect]:
        effects: list[Effect] = []
        for part, state in self.parts.items():
            if self._judge(state, worker, step):
                state.abstain(worker, step)
                effects += self._advance(part)
            else:
                effects += self._repeat(state, worker, step)
        return effects

    def _advance(self, part: int) -> list[Effect]:
        state = self.parts[part]
        if state.averaged or not self._is_complete(state):
            return []
        state.average()
        if self.job.optimizer.max_grad_norm is None:
            return [self._apply(state, 1.0)]
        self._averaged += 1
        if self._averaged < len(self.parts):
            return []
        total = sum(state.squares() for state in self.parts.values())
        return [Squares(state.version, total)]

    def _is_complete(self, state: PartState) -> bool:
        told = all(self._steps[worker].epoch <= self._epoch for worker in state.acted)
        return told and is_complete(self._consistency, state.acted, self._members)

    def _apply(self, state: PartState, factor: float) -> Release:
        workers = tuple(sorted(state.acted))
        contributors = [worker for worker in workers if state.acted[worker]]
        first = min(contributors, default=workers[0])
        state.apply(self._steps[first].groups[state.part.group], factor)
        return Release(state.part.index, state.version, workers)
