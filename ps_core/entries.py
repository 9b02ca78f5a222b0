"""What is written down of a job: what became of its samples, and who came and went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ps_core.leases import Lease, PassEnd, PassOpened

Event = Literal["joined", "evicted", "preempted", "failed", "finished"]


@dataclass(frozen=True, slots=True)
class Contribution:
    """A worker's step has become part of the parameters, in full or in part."""

    worker: int
    incarnation: int
    step: int
    version: int
    """The first version that includes it."""
    samples: int
    leases: tuple[Lease, ...]
    state: Literal["applied", "in_part"]
    given_weight: float | None = None

    @property
    def weight(self) -> float:
        """In the mean; 0: the worker abstained."""
        return self.samples if self.given_weight is None else self.given_weight


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """A worker has come or gone."""

    worker: int
    incarnation: int
    event: Event
    step: int
    reason: str = ""


Entry = Contribution | WorkerEvent | PassOpened | PassEnd
