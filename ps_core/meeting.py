"""Workers that meet: that all came for the same, and what their numbers come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ps_core.errors import UsageError
from ps_core.exchange import Arrival

_ADVICE: Final = (
    "call session.epochs, session.mean and load_state_dict in the same order on every worker"
)


def check_same(worker: int, arrival: Arrival, rank: int, other: Arrival) -> None:
    """Raises UsageError unless two workers have come for the same purpose, by the same call of the
    script, with as many numbers.
    """
    mine, theirs = arrival.purpose.name.lower(), other.purpose.name.lower()
    if mine != theirs:
        raise UsageError(
            f"worker {worker} waits for all workers at '{mine}' and worker {rank} at '{theirs}': "
            f"{_ADVICE}"
        )
    here, there = arrival.point, other.point
    if here != there and here.count and there.count:
        raise UsageError(
            f"worker {worker} comes to '{mine}' for {here} and worker {rank} for {there}: {_ADVICE}"
        )
    if len(arrival.values) != len(other.values):
        raise UsageError(
            f"worker {worker} averages {len(arrival.values)} numbers and worker {rank} "
            f"{len(other.values)}"
        )


def weighted_means(arrivals: Sequence[Arrival]) -> tuple[float, ...]:
    """The means of the values that each brought, by weight; NaN when nothing has weight."""
    total = sum(arrival.weight for arrival in arrivals)
    columns = zip(*(arrival.values for arrival in arrivals), strict=True)
    return tuple(
        sum(a.weight * v for a, v in zip(arrivals, column, strict=True) if a.weight) / total
        if total
        else math.nan
        for column in columns
    )
