"""What shard and lead are told in their own types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ps_core.optim_spec import Hyperparameters


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that updates wait for."""

    incarnation: int
    first_step: int
    enters: bool = False
    """It comes with this epoch: it must be sent every part."""


@dataclass(frozen=True, slots=True)
class Begin:
    """What a worker says when it opens a step."""

    step: int
    epoch: int
    samples: int
    groups: tuple[Hyperparameters, ...]
    leases: tuple[int, ...] = ()
    given_weight: float | None = None

    @property
    def weight(self) -> float:
        """As in Work."""
        return self.samples if self.given_weight is None else self.given_weight


def differing(begun: Mapping[int, Begin], worker: int, begin: Begin) -> tuple[int, int] | None:
    """Two workers, this one and another, that have different hyperparameters in the same step."""
    for other, known in begun.items():
        if other != worker and known.step == begin.step and known.groups != begin.groups:
            return min(worker, other), max(worker, other)
    return None


def unequal(begun: Mapping[int, Begin], worker: int, begin: Begin) -> int | None:
    """Another worker that has a batch of another size in the same step, which weighs as much since
    neither script has said what it weighs.
    """
    if not _weighs_one(begin):
        return None
    for other, known in begun.items():
        is_same_step = other != worker and known.step == begin.step and _weighs_one(known)
        if is_same_step and known.samples != begin.samples:
            return other
    return None


def _weighs_one(begin: Begin) -> bool:
    return begin.weight == 1 and begin.samples > 0 and not begin.leases


Cause = Literal["stream", "heartbeat", "step_deadline", "failed", "replaced"]
"""Why a worker is evicted."""


@dataclass(slots=True)
class Terms:
    """What a job asks of its workers."""

    num_workers: int
    deadline: float
    """When the last worker must have joined, on the caller's clock."""
    min_workers: int = 1
    pause_seconds: float = 120.0
    step_seconds: float = 0.0
    """The step deadline; 0: none."""
