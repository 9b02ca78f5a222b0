"""Who is slow, in which phase of a step, and how late each worker is: pure, time is an argument.

Stragglers are named from what workers measure of themselves, not guessed from who comes last: with
updates that wait for everybody, all workers take equally long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final, Literal, get_args

Phase = Literal["data", "compute", "network"]
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)

RATIO: Final = 1.5
"""A straggler takes at least this many times as long as the median of the other workers."""
MIN_OBSERVATIONS: Final = 5
"""Nothing is said about a worker, or compared with it, before this many of its steps."""
WEIGHT: Final = 0.2
"""Of a new value in a smoothed one: a change is half seen after three steps, nine tenths after
ten.
"""
MAX_STEPS: Final = 64
"""Steps whose first arrival a shard remembers."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A worker is a straggler."""

    worker: int
    ratio: float
    """Its step time over the median of the other workers'."""
    phase: Phase
    """Where it loses the most seconds to the others' median for that phase."""

    def __str__(self) -> str:
        return f"{self.ratio:.1f}x slower than the median, in {self.phase}"


@dataclass(slots=True)
class _Pace:
    """Smoothed measures of one worker."""

    num_steps: int = 0
    seconds: dict[Phase, float] = field(default_factory=dict)
    samples_per_second: float | None = None

    @property
    def known(self) -> bool:
        return self.num_steps >= MIN_OBSERVATIONS

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(slots=True)
class Stragglers:
    """Compares the workers of a job with each other."""

    _paces: dict[int, _Pace] = field(default_factory=dict)

    def observe(
        self,
        worker: int,
        data_seconds: float,
        compute_seconds: float,
        network_seconds: float,
        samples: int,
    ) -> None:
        """Take in one finished step of a worker.

        The seconds are its own: waiting for its data, computing, and moving its bytes. Time in
        which it only waits for other workers must not be in any of them, or the fastest worker
        would look as slow as the one it waits for. A step with a time that cannot be (negative,
        NaN, infinite) is ignored; one without samples says nothing about the speed.
        """
        step = (data_seconds, compute_seconds, network_seconds)
        if min(step) < 0 or not math.isfinite(sum(step)):
            return
        pace = self._paces.setdefault(worker, _Pace())
        pace.num_steps += 1
        for phase, seconds in zip(PHASES, step, strict=True):
            pace.seconds[phase] = _smoothed(pace.seconds.get(phase), seconds)
        busy_seconds = data_seconds + compute_seconds
        rate = samples / busy_seconds if busy_seconds > 0 else math.inf
        if samples > 0 and math.isfinite(rate):
            pace.samples_per_second = _smoothed(pace.samples_per_second, rate)

    def forget(self, worker: int) -> None:
        """The worker is gone, or another process has taken its place."""
        self._paces.pop(worker, None)

    def verdict(self, worker: int) -> Verdict | None:
        """Whether a worker is a straggler. None: it is not, or there is not enough to compare."""
        own = self._paces.get(worker)
        others = [p for rank, p in self._paces.items() if rank != worker and p.known]
        if own is None or not own.known or not others:
            return None
        usual_seconds = median(pace.step_seconds for pace in others)
        if usual_seconds == 0 or own.step_seconds < RATIO * usual_seconds:
            return None
        return Verdict(worker, own.step_seconds / usual_seconds, _slow_phase(own, others))

    def speed(self, worker: int) -> float | None:
        """Samples per second of data and compute time, smoothed; None while it is not known.

        The network does not count: its time does not grow with the samples of a step.
        """
        pace = self._paces.get(worker)
        return pace.samples_per_second if pace and pace.known else None


@dataclass(slots=True)
class _Arrivals:
    """When the workers' shares of one step have come."""

    first: float
    last: float


@dataclass(slots=True)
class Lags:
    """How late the workers' steps are complete on one shard."""

    _lags: dict[int, float] = field(default_factory=dict)
    _latest: dict[int, int] = field(default_factory=dict)
    """Each worker's latest step."""
    _steps: dict[int, _Arrivals] = field(default_factory=dict)
    _forgotten: int = -1
    """The latest step that is not remembered any more."""

    def arrived(self, worker: int, step: int, now: float) -> None:
        """The last part of a worker's step has come. A worker's steps come in order; a repeated one
        is ignored, as is a time that cannot be.

        The worker's lag is the time since the first worker completed this step. For a step so old
        that it is forgotten, the time since the oldest step that is remembered stands in; the lag
        is at least that.
        """
        if not math.isfinite(now) or step <= self._latest.get(worker, -1):
            return
        self._latest[worker] = step
        arrivals = self._arrivals(step, now)
        lag_seconds = now - arrivals.first
        if not 0 <= lag_seconds < math.inf:
            return
        self._lags[worker] = _smoothed(self._lags.get(worker), lag_seconds)
        arrivals.last = max(arrivals.last, now)

    def forget(self, worker: int) -> None:
        """The worker is gone, or another process has taken its place."""
        self._lags.pop(worker, None)
        self._latest.pop(worker, None)

    def lag_seconds(self, worker: int) -> float:
        """How much later than the first worker a worker completes a step, smoothed; 0 when it has
        completed none.
        """
        return self._lags.get(worker, 0.0)

    def waited(self, step: int) -> float:
        """Seconds from the first arrival of a step to the last one so far; 0 when the step is not
        remembered.
        """
        arrivals = self._steps.get(step)
        return arrivals.last - arrivals.first if arrivals else 0.0

    def _arrivals(self, step: int, now: float) -> _Arrivals:
        """Those of a step, or what stands in for them."""
        if step <= self._forgotten:
            oldest = self._steps[min(self._steps)]
            return _Arrivals(oldest.first, oldest.first)
        arrivals = self._steps.setdefault(step, _Arrivals(now, now))
        if len(self._steps) > MAX_STEPS:
            self._forgotten = min(self._steps)
            del self._steps[self._forgotten]
        return arrivals


def _smoothed(before: float | None, value: float) -> float:
    """An exponentially weighted moving average; it starts with the first value as it is."""
    return value if before is None else before + WEIGHT * (value - before)


def _slow_phase(own: _Pace, others: Sequence[_Pace]) -> Phase:
    def lost_seconds(phase: Phase) -> float:
        return own.seconds[phase] - median(other.seconds[phase] for other in others)

    return max(PHASES, key=lost_seconds)
