"""The seams of shardline: what a training step needs from the rest of the fleet.

`Exchange` is gradients in, parameters out. `Peers` is the other workers. `DataLeases` is who trains
on which samples. `OptimizerState` is the state that lives where the parameters are updated. One
class implements all four for each strategy.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from ps_core.buckets import Bucket
from ps_core.extras import Extras
from ps_core.leases import Lease, PassSpec
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import Plan
from ps_core.point import BEGINNING, Point


class Purpose(enum.IntEnum):
    """Why workers meet. The numbers are those of the wire."""

    START = 1
    EPOCH = 2
    MEAN = 3
    LOAD = 4
    CLOSE = 5


HANDS_OVER: Final = frozenset({Purpose.EPOCH, Purpose.CLOSE})
"""Meetings at which all take over the extras of the chosen worker."""


class Farewell(enum.IntEnum):
    """Why a worker leaves. The numbers are those of the wire."""

    FINISHED = 1
    PREEMPTED = 2
    FAILED = 3
    """Another process may take its place."""
    FATAL = 4
    """The same would happen to that one, so the job has failed."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a worker brings to a meeting."""

    purpose: Purpose
    step: int
    """Its next step."""
    values: tuple[float, ...] = ()
    weight: float = 1.0
    takes_leases: bool = False
    """It goes on with its pass when another worker's lease comes back."""
    point: Point = BEGINNING
    """Which call of the script this is."""
    hands_over: bool = False
    """This worker has handed over its extras before."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a running job stands when a worker joins it."""

    point: Point
    """The body of `session.epochs` that the others are in; its `count` is 0."""
    schedules: tuple[int, ...] = ()
    """How often each scheduler of `session.scheduler` has been stepped by the other workers, as of
    their step `schedules_step` in the body `schedules_point`.
    """
    schedules_step: int = 0
    schedules_point: Point = BEGINNING


@dataclass(frozen=True, slots=True)
class Start:
    """What a worker knows once it has joined."""

    step: int
    """The first step to run."""
    chosen: bool
    """This worker's buffers count, and it writes the model."""
    position: Position | None = None
    """Where the job stands, if it was running already."""


@dataclass(frozen=True, slots=True)
class Work:
    """What stands behind the gradients of one step."""

    samples: int
    """How many they come from."""
    leases: tuple[int, ...] = ()
    """Ids of the leases whose samples they come from."""
    data_seconds: float = 0.0
    """How long the worker waited for its data."""
    compute_seconds: float = 0.0
    """How long it computed on them."""
    schedules: tuple[int, ...] = ()
    """As in `Position`."""
    point: Point = BEGINNING
    """As in `Position`."""
    given_weight: float | None = None
    """Of the gradients in the mean, where that is not the number of samples."""

    @property
    def weight(self) -> float:
        """Of the gradients in the mean over workers; 0: the worker abstains."""
        return self.samples if self.given_weight is None else self.given_weight


UNEQUAL_BATCHES = (
    "workers %d and %d give their models different numbers of rows at step %d, and weigh the same: "
    "if these are samples, say how many with optimizer.step(samples=n)"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one step."""

    next_step: int
    """The step that this worker takes next."""
    version: int
    """Version of the parameters now held: updates that are in them."""
    applied: bool
    """False: this step's gradients were not used."""
    staleness: int
    """Versions between the gradients' base and the update they went into."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What a worker learns when all have met."""

    step: int
    """The next step; the parameters held are of this version."""
    means: tuple[float, ...]
    """Weighted means of the values every worker brought."""
    chosen: bool
    """This worker's buffers count, and it writes the model."""
    grant: Grant | None = None
    """At the end of an epoch: the pass is not over, these samples came back."""
    is_past: bool = False
    """The others met here before this worker joined: the means are theirs."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to one request for a lease."""

    number: int
    """Of the loader's pass, from 0; it seeds the permutation."""
    leases: tuple[Lease, ...]
    """Empty: there is nothing left for this worker now."""
    is_over: bool = False
    """The pass had ended before this worker came to it."""


def new_incarnation() -> int:
    """A number that no other process has."""
    return secrets.randbits(63) + 1


@dataclass(slots=True)
class Traffic:
    """What a worker has sent and received since it joined, in bytes of gradients and parameters."""

    pushed_bytes: int = 0
    pulled_bytes: int = 0


class Replica(Protocol):
    """The workers that hold one replica of the model, each a stage of it. All call together. Raises
    EvictedError when one of them is gone.
    """

    stage: int
    """Of this worker."""
    num_stages: int

    def share(self, data: bytes) -> bytes:
        """The `data` of the first stage; that of the others is ignored."""
        ...

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """As many numbers of every stage, in their order."""
        ...


class Exchange(Protocol):
    """Gradients in, parameters out. All calls come from the training thread."""

    traffic: Traffic
    incarnation: int
    """Tells this process apart from others of its rank, in all that is written of the job."""

    def join(
        self, plan: Plan, buckets: Sequence[Bucket], optimizer: OptimizerSpec, extras: Extras
    ) -> Start:
        """Enter the job; fill the buckets' parameters and the extras with the job's values. Blocks
        until all have joined.
        """
        ...

    def begin(self, step: int, work: Work, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Open `step`. With weight 0 the worker abstains: it submits nothing and takes the others'
        update.
        """
        ...

    def submit(self, bucket: Bucket, step: int) -> None:
        """Hand over a bucket's gradients. Never blocks on the network; owns the bucket until
        `settle` returns.
        """
        ...

    def settle(self, step: int) -> Outcome:
        """Wait until every bucket holds the parameters of the next step, which may be read
        afterwards.
        """
        ...

    def held_versions(self) -> tuple[int, int]:
        """The lowest and the highest version that some of the model's parameters have. They are one
        unless a step was broken off, or in modes without common steps.
        """
        ...

    def close(self, farewell: Farewell = Farewell.FINISHED, failure: str = "") -> None:
        """Leave the job, and say why. Idempotent; blocks for a bounded time."""
        ...


class Peers(Protocol):
    """The other workers of the job."""

    def idle(self) -> None:
        """From now on nobody waits for this worker, until the next meeting. Does not block."""
        ...

    def meet(self, arrival: Arrival) -> Meeting:
        """Wait until every worker has come for the same purpose, then hold the newest parameters.

        With `takes_leases` the wait also ends when samples come back that somebody must train on.
        At the end of an epoch and of the job all take over the extras of the chosen worker. Blocks
        as long as the other workers live and train.
        """
        ...


class DataLeases(Protocol):
    """Who trains on which samples. Requests are answered in order."""

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        """Ask for one lease of the loader's current pass. Does not block."""
        ...

    def receive_lease(self) -> Grant:
        """The answer to the oldest open request. Blocks for a round trip."""
        ...

    def return_leases(self, leases: Sequence[int], *, declined: bool = False) -> None:
        """Give back leases that no step will use; `declined`: the script skipped them."""
        ...

    def holds_lease(self, lease: int) -> bool:
        """Whether it may be trained on. False: it was taken back, and is others' by now."""
        ...


StateByParameter = Mapping[int, Mapping[str, torch.Tensor]]
"""Parameter index in the plan → torch.optim's state entries, whole tensors of the parameter's
shape.
"""


class OptimizerState(Protocol):
    """The optimizer's state, which lives where the parameters are updated."""

    def read_state(self) -> StateByParameter:
        """Gather a copy of the state of every parameter, all of one version."""
        ...

    def write_state(self, state: StateByParameter) -> None:
        """Replace the state of every parameter. Call between steps."""
        ...
