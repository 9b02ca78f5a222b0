"""The seams of shardline: what a training step needs from the rest of the fleet.

`Exchange` is gradients in, parameters out. `Peers` is the other workers. `OptimizerState` is the
state that lives where the parameters are updated. One class implements all three for each strategy.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ps_core.buckets import Bucket
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import Plan


class Purpose(enum.IntEnum):
    """Why workers meet. The numbers are those of the wire."""

    START = 1
    EPOCH = 2
    MEAN = 3
    LOAD = 4
    CLOSE = 5


@dataclass(frozen=True, slots=True)
class Start:
    """What a worker knows once it has joined."""

    step: int
    """The first step to run."""
    chosen: bool
    """This worker's buffers count, and it writes the model."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one step."""

    version: int
    """Version of the parameters now held."""
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


@dataclass(slots=True)
class Traffic:
    """What a worker has sent and received since it joined, in bytes of gradients and parameters."""

    pushed_bytes: int = 0
    pulled_bytes: int = 0


ReadExtras = Callable[[], Mapping[str, torch.Tensor]]
"""Reads the model's tensors that are not trained, by name: buffers and frozen parameters. The
chosen worker's count.
"""


class Exchange(Protocol):
    """Gradients in, parameters out. All calls come from the training thread."""

    traffic: Traffic

    def join(
        self, plan: Plan, buckets: Sequence[Bucket], optimizer: OptimizerSpec, extras: ReadExtras
    ) -> Start:
        """Enter the job; fill the buckets' parameters and the extras with the job's values. Blocks
        until all have joined.
        """
        ...

    def begin(self, step: int, samples: int, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Open `step`. With `samples` 0 the worker abstains: it submits nothing and takes the
        others' update.
        """
        ...

    def submit(self, bucket: Bucket, step: int) -> None:
        """Hand over a bucket's gradients. Never blocks on the network; owns the bucket until
        `settle` returns.
        """
        ...

    def settle(self, step: int) -> Outcome:
        """Wait until every bucket holds the parameters for `step` + 1, which may be read
        afterwards.
        """
        ...

    def close(self, failure: str = "") -> None:
        """Leave the job: finished, or failed for the reason given. Idempotent; blocks for a bounded
        time.
        """
        ...


class Peers(Protocol):
    """The other workers of the job."""

    def idle(self, step: int) -> None:
        """From `step` on nobody waits for this worker, until the next meeting. Does not block."""
        ...

    def meet(
        self, purpose: Purpose, step: int, values: Sequence[float] = (), weight: float = 1.0
    ) -> Meeting:
        """Wait until every worker has come for the same purpose, then hold the newest parameters.

        At the end of an epoch and of the job the chosen worker first hands over its extras.

        Blocks as long as the other workers live: one that dies or fails ends the wait with
        JobFailedError.
        """
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
