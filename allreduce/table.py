"""What all workers have said in one round, and what follows from it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from allreduce.record import Call, Reading, Record
from ps_core.exchange import Arrival, Purpose
from ps_core.meeting import check_same, weighted_means


@dataclass(frozen=True, slots=True)
class Table:
    """Rank → what its worker has said."""

    rows: Mapping[int, Record]
    num_stages: int = 1
    """Workers of a replica, whose ranks follow one another; what is said of samples, its first
    worker says.
    """

    @property
    def replicas(self) -> dict[int, Record]:
        """Replica → what its first worker has said."""
        stages = self.num_stages
        return {rank // stages: each for rank, each in self.rows.items() if not rank % stages}

    @property
    def has_step(self) -> bool:
        """Somebody takes a step, and so all do."""
        return any(record.is_step for record in self.rows.values())

    @property
    def total(self) -> float:
        """Weight of all gradients behind the update."""
        return math.fsum(record.gradient_weight for record in self.replicas.values())

    @property
    def leader(self) -> int:
        """The lowest replica that takes the step, of those with gradients if there are any."""
        replicas = self.replicas
        return min(
            (index for index, record in replicas.items() if record.is_step),
            key=lambda index: (not replicas[index].gradient_weight, index),
        )

    @property
    def is_of_one_mind(self) -> bool:
        """All would apply the update with the same hyperparameters."""
        return len({record.hyperparameters for record in self.rows.values()}) == 1

    @property
    def differ(self) -> bool:
        """Those that take the step have different hyperparameters."""
        own = {each.hyperparameters for each in self.rows.values() if each.is_step}
        return len(own) > 1

    @property
    def unequal(self) -> tuple[int, int] | None:
        """Two replicas whose batches have different sizes and weigh the same, since neither script
        has said what they weigh.
        """
        silent = {
            index: each.samples
            for index, each in sorted(self.replicas.items())
            if each.gradient_weight == 1 and each.samples and not each.readings
        }
        for (one, samples), (other, others) in pairwise(silent.items()):
            if samples != others:
                return one, other
        return None

    @property
    def leavers(self) -> tuple[int, ...]:
        """Who takes part for the last time."""
        return self._ranks(Call.LEAVE)

    @property
    def readers(self) -> tuple[int, ...]:
        """Who wants the optimizer's state."""
        return self._ranks(Call.READ)

    def _ranks(self, call: Call) -> tuple[int, ...]:
        return tuple(rank for rank, record in self.rows.items() if record.call is call)

    @property
    def has_guest(self) -> bool:
        """Somebody waits to be let in."""
        return any(record.has_guest for record in self.rows.values())

    @property
    def takers(self) -> tuple[int, ...]:
        """Replicas that go on with their pass if there is more to read."""
        return tuple(index for index, record in self.replicas.items() if record.takes_leases)

    @property
    def writer(self) -> int | None:
        """The replica whose optimizer's state everybody is to have."""
        return next((index for index, each in self.replicas.items() if each.has_state), None)

    @property
    def hands_over(self) -> bool:
        """All have come to a meeting, and take over the extras of the lowest rank."""
        return all(each.arrival is not None for each in self.rows.values()) and any(
            each.hands_over for each in self.rows.values()
        )

    def readings(self) -> Iterator[Reading]:
        """What the update is made of."""
        for record in self.replicas.values():
            yield from record.readings

    @property
    def arrivals(self) -> dict[int, Arrival]:
        """Rank → why its worker waits, of those that do."""
        waiting = {r: each.arrival for r, each in sorted(self.rows.items())}
        return {rank: arrival for rank, arrival in waiting.items() if arrival is not None}

    def meeting(self) -> Purpose | None:
        """What all have come for; None: somebody takes a step or leaves. Raises UsageError when
        they have come for different things.
        """
        arrivals = self.arrivals
        if len(arrivals) < len(self.rows):
            return None
        (first, arrival), *others = arrivals.items()
        for rank, other in others:
            check_same(rank, other, first, arrival)
        return arrival.purpose

    def means(self) -> tuple[float, ...]:
        """Weighted means of the values that all have brought."""
        return weighted_means(list(self.arrivals.values()))
