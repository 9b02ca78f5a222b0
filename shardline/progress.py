"""What the workers' records add up to: no clock, no files, no terminal."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from shardline.records import EndRecord, JoinRecord, Kept, Record, StepRecord

WINDOW_SECONDS: Final = 5.0
"""Samples per second are counted over this time, or over the last two records."""


class _Sample(NamedTuple):
    """How many samples and steps there were at a time."""

    time: float
    samples: int
    steps: int


class _Speed(NamedTuple):
    """Per second."""

    samples: float = 0.0
    steps: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker at a moment."""

    rank: int
    epoch: int = 0
    step: int = 0
    samples: int = 0
    samples_per_second: float = 0.0
    has_finished: bool = False
    is_starting: bool = False  # its process has written no record yet
    steps_per_second: float = 0.0


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

    @property
    def steps_per_second(self) -> float:
        return max(worker.steps_per_second for worker in self.workers)


@dataclass(frozen=True, slots=True)
class Totals:
    """What the workers did in the whole run, with all their processes; steps and version are the
    highest of any worker.
    """

    steps: int
    version: int
    samples: int
    samples_per_second: float  # while they trained: from each worker's first step to its last
    pushed_bytes: int
    pulled_bytes: int
    reported: Mapping[str, Kept]  # by the lowest rank that has reported anything
    values: Mapping[str, float]  # as in View
    steps_per_second: float = 0.0  # of the fastest worker


def _speed(first: _Sample, last: _Sample) -> _Speed:
    """Between two moments; 0 when they are one."""
    seconds = last.time - first.time
    if seconds <= 0:
        return _Speed()
    return _Speed((last.samples - first.samples) / seconds, (last.steps - first.steps) / seconds)


@dataclass(frozen=True, slots=True)
class _Done:
    """What one process of a worker has done so far."""

    samples: int
    pushed_bytes: int
    pulled_bytes: int


@dataclass(slots=True)
class _Worker:
    """What is known about one worker; times are seconds since 1970, as in its records."""

    rank: int
    epoch: int = 0
    steps: int = 0
    version: int = 0
    values: dict[str, float] = field(default_factory=dict)
    reported: Mapping[str, Kept] | None = None  # once it has finished
    is_starting: bool = True
    has_joined: bool = False  # with any of its processes
    first: _Sample | None = None
    recent: deque[_Sample] = field(default_factory=deque)
    done: dict[str, _Done] = field(default_factory=dict)  # by incarnation

    @property
    def samples(self) -> int:
        return sum(done.samples for done in self.done.values())

    @property
    def pushed_bytes(self) -> int:
        return sum(done.pushed_bytes for done in self.done.values())

    @property
    def pulled_bytes(self) -> int:
        return sum(done.pulled_bytes for done in self.done.values())

    def start(self) -> None:
        """It has a new process."""
        self.is_starting, self.reported = True, None

    def add(self, record: Record) -> None:
        if record.incarnation not in self.done:
            self.reported = None
        self.is_starting = False
        if isinstance(record, JoinRecord):
            self.has_joined = True
            return
        self.done[record.incarnation] = _Done(
            record.samples, record.pushed_bytes, record.pulled_bytes
        )
        self.version = max(self.version, record.version)
        if isinstance(record, EndRecord):
            self.steps, self.reported = max(self.steps, record.steps), record.reported
        else:
            self._add_step(record)

    def _add_step(self, record: StepRecord) -> None:
        self.epoch, self.steps = record.epoch, max(self.steps, record.step)
        self.values.update(record.values)
        sample = _Sample(record.time, self.samples, self.steps)
        self.first = self.first or sample
        self.recent.append(sample)
        while len(self.recent) > 2 and self.recent[1][0] <= record.time - WINDOW_SECONDS:
            self.recent.popleft()

    def speed(self, now: float) -> _Speed:
        if len(self.recent) < 2 or self.reported is not None:
            return _Speed()
        first, last = self.recent[0], self.recent[-1]
        if now - last[0] > max(WINDOW_SECONDS, 2 * (last[0] - first[0])):
            return _Speed()  # it stands still
        return _speed(first, last)

    def mean_speed(self) -> _Speed:
        return _speed(self.first, self.recent[-1]) if self.first else _Speed()

    def view(self, now: float) -> WorkerView:
        speed = self.speed(now)
        finished = self.reported is not None
        return WorkerView(
            self.rank,
            self.epoch,
            self.steps,
            self.samples,
            speed.samples,
            finished,
            self.is_starting,
            speed.steps,
        )


class Progress:
    """Folds the records of the workers of one run.

    It begins with `num_workers` workers; others, of ranks below `num_ranks`, are workers from their
    first record on.
    """

    def __init__(self, num_workers: int, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._by_rank = {rank: _Worker(rank) for rank in range(num_workers)}

    @property
    def _workers(self) -> list[_Worker]:
        return [self._by_rank[rank] for rank in sorted(self._by_rank)]

    def restarted(self, rank: int) -> None:
        """The worker's process was started again."""
        self._by_rank[rank].start()

    def add(self, records: Iterable[Record]) -> None:
        """Take records, each process's in order; those of ranks that cannot exist are ignored."""
        for record in records:
            if 0 <= record.rank < self._num_ranks:
                self._by_rank.setdefault(record.rank, _Worker(record.rank)).add(record)

    @property
    def finished(self) -> set[int]:
        """The ranks of the workers that have written their last record."""
        return {worker.rank for worker in self._workers if worker.reported is not None}

    @property
    def joined(self) -> set[int]:
        """The ranks of the workers that have ever taken part in the job."""
        return {worker.rank for worker in self._workers if worker.has_joined}

    @property
    def has_trained(self) -> bool:
        """Some worker has taken a step."""
        return any(worker.steps for worker in self._workers)

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
            samples_per_second=sum(worker.mean_speed().samples for worker in workers),
            steps_per_second=max(worker.mean_speed().steps for worker in workers),
            pushed_bytes=sum(worker.pushed_bytes for worker in workers),
            pulled_bytes=sum(worker.pulled_bytes for worker in workers),
            reported=next((worker.reported for worker in workers if worker.reported), {}),
            values=self._mean_values(),
        )

    def _mean_values(self) -> dict[str, float]:
        names = {name: None for worker in self._workers for name in worker.values}
        return {name: self._mean(name) for name in names}

    def _mean(self, name: str) -> float:
        values = [worker.values[name] for worker in self._workers if name in worker.values]
        return sum(values) / len(values)
