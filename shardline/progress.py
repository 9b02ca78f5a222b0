"""What the workers' records add up to: no clock, no files, no terminal."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from shardline.records import EndRecord, Record, Scalar, StepRecord

WINDOW_SECONDS: Final = 5.0
"""Samples per second are counted over this time, or over the last two records."""


_Sample = tuple[float, int]
"""When, and how many samples until then."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker at a moment."""

    rank: int
    epoch: int = 0
    step: int = 0
    samples: int = 0
    samples_per_second: float = 0.0
    has_finished: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """All workers at a moment; each of `values` is the mean of the workers' latest."""

    elapsed_seconds: float
    workers: tuple[WorkerView, ...]
    values: Mapping[str, float]
    pushed_bytes: int
    pulled_bytes: int

    @property
    def epoch(self) -> int:
        return max(worker.epoch for worker in self.workers)

    @property
    def step(self) -> int:
        return max(worker.step for worker in self.workers)

    @property
    def samples(self) -> int:
        return sum(worker.samples for worker in self.workers)

    @property
    def samples_per_second(self) -> float:
        return sum(worker.samples_per_second for worker in self.workers)


@dataclass(frozen=True, slots=True)
class Totals:
    """What the workers did in the whole run; steps and version are the highest of any worker."""

    steps: int
    version: int
    samples: int
    samples_per_second: float  # while they trained: from each worker's first step to its last
    pushed_bytes: int
    pulled_bytes: int
    reported: Mapping[str, Scalar]  # by rank 0
    values: Mapping[str, float]  # as in View


def _speed(first: _Sample, last: _Sample) -> float:
    """Samples per second between two moments; 0 when they are one."""
    return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0


@dataclass(slots=True)
class _Worker:
    """What is known about one worker; times are seconds since 1970, as in its records."""

    rank: int
    epoch: int = 0
    steps: int = 0
    samples: int = 0
    version: int = 0
    pushed_bytes: int = 0
    pulled_bytes: int = 0
    values: dict[str, float] = field(default_factory=dict)
    reported: Mapping[str, Scalar] | None = None  # once it has finished
    first: _Sample | None = None
    recent: deque[_Sample] = field(default_factory=deque)

    def add(self, record: Record) -> None:
        self.samples, self.version = record.samples, record.version
        self.pushed_bytes, self.pulled_bytes = record.pushed_bytes, record.pulled_bytes
        if isinstance(record, EndRecord):
            self.steps, self.reported = record.steps, record.reported
        else:
            self._add_step(record)

    def _add_step(self, record: StepRecord) -> None:
        self.epoch, self.steps = record.epoch, record.step
        self.values.update(record.values)
        self.first = self.first or (record.time, record.samples)
        self.recent.append((record.time, record.samples))
        while len(self.recent) > 2 and self.recent[1][0] <= record.time - WINDOW_SECONDS:
            self.recent.popleft()

    def samples_per_second(self, now: float) -> float:
        if len(self.recent) < 2 or self.reported is not None:
            return 0.0
        first, last = self.recent[0], self.recent[-1]
        if now - last[0] > max(WINDOW_SECONDS, 2 * (last[0] - first[0])):
            return 0.0  # it stands still
        return _speed(first, last)

    def mean_samples_per_second(self) -> float:
        return _speed(self.first, self.recent[-1]) if self.first else 0.0

    def view(self, now: float) -> WorkerView:
        speed = self.samples_per_second(now)
        finished = self.reported is not None
        return WorkerView(self.rank, self.epoch, self.steps, self.samples, speed, finished)


class Progress:
    """Folds the records of `num_workers` workers."""

    def __init__(self, num_workers: int) -> None:
        self._workers = [_Worker(rank) for rank in range(num_workers)]

    def add(self, records: Iterable[Record]) -> None:
        """Take records, each worker's in order; those of ranks that do not exist are ignored."""
        for record in records:
            if 0 <= record.rank < len(self._workers):
                self._workers[record.rank].add(record)

    @property
    def finished(self) -> set[int]:
        """The ranks of the workers that have written their last record."""
        return {worker.rank for worker in self._workers if worker.reported is not None}

    def view(self, elapsed_seconds: float, now: float) -> View:
        """The workers at time `now`, in seconds since 1970."""
        return View(
            elapsed_seconds,
            tuple(worker.view(now) for worker in self._workers),
            self._mean_values(),
            sum(worker.pushed_bytes for worker in self._workers),
            sum(worker.pulled_bytes for worker in self._workers),
        )

    def totals(self) -> Totals:
        """What has been done so far."""
        workers = self._workers
        return Totals(
            steps=max(worker.steps for worker in workers),
            version=max(worker.version for worker in workers),
            samples=sum(worker.samples for worker in workers),
            samples_per_second=sum(worker.mean_samples_per_second() for worker in workers),
            pushed_bytes=sum(worker.pushed_bytes for worker in workers),
            pulled_bytes=sum(worker.pulled_bytes for worker in workers),
            reported=workers[0].reported or {},
            values=self._mean_values(),
        )

    def _mean_values(self) -> dict[str, float]:
        names = {name: None for worker in self._workers for name in worker.values}
        return {name: self._mean(name) for name in names}

    def _mean(self, name: str) -> float:
        values = [worker.values[name] for worker in self._workers if name in worker.values]
        return sum(values) / len(values)
