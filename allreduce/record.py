"""What every worker tells all others at the beginning of a round, as a row of numbers. Pure.

Float64 holds whole numbers up to 2^53 exactly, so one gather of one tensor carries everything.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ps_core.exchange import Arrival, Purpose, Work
from ps_core.point import BEGINNING, Point


class Call(enum.IntEnum):
    """What a worker wants of the others. Meetings have the numbers of their purposes."""

    EPOCH = Purpose.EPOCH
    MEAN = Purpose.MEAN
    LOAD = Purpose.LOAD
    CLOSE = Purpose.CLOSE
    STEP = 16
    READ = 17
    """The optimizer's state, of which every worker has a share."""
    LEAVE = 18
    """This worker takes part in this round, and in no other."""


_MEETINGS = frozenset({Call.EPOCH, Call.MEAN, Call.LOAD, Call.CLOSE})


@dataclass(frozen=True, slots=True)
class Reading:
    """Positions start .. start + length of a loader's pass, with what the pass reads."""

    loader: int
    number: int
    start: int
    length: int
    num_positions: int
    unit: int
    """Samples of one batch, or of one update with a global batch size."""
    is_shared: bool
    """There is a global batch size."""
    fingerprint: int = 0
    """As in PassSpec."""

    @property
    def positions(self) -> range:
        """What was read."""
        return range(self.start, self.start + self.length)


@dataclass(frozen=True, slots=True)
class Record:
    """One worker's row."""

    call: Call
    version: int
    """Updates that are in its parameters."""
    samples: int = 0
    """Behind its gradients."""
    values: tuple[float, ...] = ()
    weight: float = 1.0
    """Of the values."""
    takes_leases: bool = False
    point: Point = BEGINNING
    data_seconds: float = 0.0
    compute_seconds: float = 0.0
    schedules: tuple[int, ...] = ()
    hyperparameters: int = 0
    """A checksum of its own."""
    has_guest: bool = False
    """It has seen that somebody waits to be let in."""
    has_state: bool = False
    """Its optimizer's state is new, and everybody is to have it."""
    readings: tuple[Reading, ...] = ()
    """What its samples are."""
    given_weight: float | None = None
    """Of its gradients, where that is not the number of samples."""
    hands_over: bool = False
    """All take over the extras of the lowest rank."""

    @property
    def gradient_weight(self) -> float:
        """In the mean; 0: it has no gradients."""
        return self.samples if self.given_weight is None else self.given_weight

    @property
    def is_step(self) -> bool:
        """Whether it takes a step."""
        return self.call is Call.STEP

    @property
    def arrival(self) -> Arrival | None:
        """Why it waits for the others; None: it does not."""
        if self.call not in _MEETINGS:
            return None
        return Arrival(
            Purpose(self.call),
            self.version,
            self.values,
            self.weight,
            self.takes_leases,
            self.point,
            self.hands_over,
        )


def of_step(version: int, work: Work, hyperparameters: int, readings: Sequence[Reading]) -> Record:
    """A worker takes a step."""
    return Record(
        Call.STEP,
        version,
        samples=work.samples,
        point=work.point,
        data_seconds=work.data_seconds,
        compute_seconds=work.compute_seconds,
        schedules=work.schedules,
        hyperparameters=hyperparameters,
        readings=tuple(readings),
        given_weight=work.given_weight,
    )


def without_gradients(record: Record) -> Record:
    """The same call after the group has broken: collectives may have overwritten the gradients on
    some workers, so all abstain, and their samples are free again.
    """
    return replace(record, samples=0, readings=(), given_weight=None)


def of_arrival(version: int, arrival: Arrival, *, has_state: bool) -> Record:
    """A worker has come to a meeting."""
    return Record(
        Call(arrival.purpose),
        version,
        values=arrival.values,
        weight=arrival.weight,
        takes_leases=arrival.takes_leases,
        point=arrival.point,
        has_state=has_state,
        hands_over=arrival.hands_over,
    )


_READING_SIZE = 8


def encode(record: Record) -> list[float]:
    """As numbers, of which the first is how many there are."""
    point = record.point
    head = [
        record.call,
        record.version,
        record.samples,
        record.weight,
        record.takes_leases,
        point.loop,
        point.data_epoch,
        point.count,
        record.data_seconds,
        record.compute_seconds,
        record.hyperparameters,
        record.has_guest,
        record.has_state,
        record.gradient_weight,
        record.hands_over,
    ]
    readings = [
        number
        for each in record.readings
        for number in (
            each.loader, each.number, each.start, each.length,
            each.num_positions, each.unit, each.is_shared, each.fingerprint,
        )
    ]  # fmt: skip
    values = [len(record.values), *record.values, len(record.schedules), *record.schedules]
    numbers = [float(number) for number in (*head, *values, *readings)]
    return [float(1 + len(numbers)), *numbers]


def decode(numbers: Sequence[float]) -> Record:
    """The inverse; numbers after the record are ignored."""
    row = iter(numbers[1 : int(numbers[0])])

    def whole(count: int) -> list[int]:
        return [int(next(row)) for _ in range(count)]

    call, version, samples = whole(3)
    weight, takes_leases = next(row), bool(next(row))
    point = Point(*whole(3))
    data_seconds, compute_seconds = next(row), next(row)
    hyperparameters, has_guest, has_state = whole(3)
    gradient_weight, hands_over = next(row), bool(next(row))
    values = tuple(next(row) for _ in range(int(next(row))))
    schedules = tuple(whole(int(next(row))))
    rest = [int(number) for number in row]
    return Record(
        Call(call),
        version,
        samples,
        values,
        weight,
        takes_leases,
        point,
        data_seconds,
        compute_seconds,
        schedules,
        hyperparameters,
        bool(has_guest),
        bool(has_state),
        tuple(_reading(*rest[i : i + _READING_SIZE]) for i in range(0, len(rest), _READING_SIZE)),
        None if gradient_weight == samples else gradient_weight,
        hands_over,
    )


def _reading(
    loader: int,
    number: int,
    start: int,
    length: int,
    num_positions: int,
    unit: int,
    shared: int,
    fingerprint: int,
) -> Reading:
    return Reading(loader, number, start, length, num_positions, unit, bool(shared), fingerprint)
