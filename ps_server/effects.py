"""What a shard wants done after a call: the edge carries these out, in order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Release:
    """Send the part's parameters, now of `version`, to these workers."""

    part: int
    version: int
    workers: tuple[int, ...]
    clock: int = 0
    """Steps of the worker that this answers; 0 in lockstep where it is `version`."""


@dataclass(frozen=True, slots=True)
class Squares:
    """Tell the lead this shard's share of the squared norm of the step's mean gradient."""

    step: int
    total: float


@dataclass(frozen=True, slots=True)
class Arrived:
    """The shard has all of a worker's step. `version` includes it, once its update is complete."""

    worker: int
    step: int
    version: int


@dataclass(frozen=True, slots=True)
class Stale:
    """An update came from gradients that did not know this many earlier ones."""

    versions: int


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A push arrived again."""

    worker: int
    step: int
    part: int


@dataclass(frozen=True, slots=True)
class Late:
    """A worker has begun a step whose update was made without it."""

    worker: int
    step: int


@dataclass(frozen=True, slots=True)
class Refused:
    """This many parts of late gradients were dropped."""

    parts: int


@dataclass(frozen=True, slots=True)
class Remains:
    """Tell the lead what the shard has used of the last step that a fenced process began."""

    worker: int
    incarnation: int
    step: int
    samples: int
    leases: tuple[int, ...]
    used_parts: int
    num_parts: int
    given_weight: float | None = None


@dataclass(frozen=True, slots=True)
class HyperparametersDiffer:
    """Two workers have different hyperparameters in one step; the lower rank's are used."""

    step: int
    workers: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BatchesDiffer:
    """Two workers' batches of one step have different sizes, and weigh the same."""

    step: int
    workers: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Ready:
    """Tell the lead that the shard has all of a worker's step, and waits for its seal."""

    worker: int
    step: int


@dataclass(frozen=True, slots=True)
class Lost:
    """Tell the lead that a worker's stream broke and did not come back, or that it has said what no
    worker says.
    """

    worker: int
    incarnation: int
    reason: str


Effect = (
    Release
    | Squares
    | Arrived
    | Stale
    | Duplicate
    | Late
    | Refused
    | Remains
    | Lost
    | HyperparametersDiffer
    | BatchesDiffer
)
