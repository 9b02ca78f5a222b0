"""Learning rate schedulers: a worker that joins a running job brings its own to where the others'
are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau

from ps_core.errors import UsageError
from ps_core.exchange import Position, Start
from ps_core.point import Point

S = TypeVar("S", bound=LRScheduler)


class Schedules:
    """A session's schedulers, in the order of their creation, which is the same on every worker."""

    def __init__(self) -> None:
        self._schedulers: list[LRScheduler] = []

    def build(self, make: Callable[[Optimizer], S], optimizer: Optimizer, start: Start) -> S:
        """`make(optimizer)`, stepped as often as the other workers have stepped theirs.

        The learning rate is then exactly theirs if no other scheduler acts on it too (torch's
        SequentialLR and ChainedScheduler make one of several). Raises UsageError.
        """
        scheduler = make(optimizer)
        _check(scheduler)
        if start.position is not None:
            _forward(scheduler, _target(start.position, start.step, len(self._schedulers)))
        self._schedulers.append(scheduler)
        return scheduler

    def counts(self) -> tuple[int, ...]:
        """How often each has been stepped."""
        return tuple(_count(scheduler) for scheduler in self._schedulers)


def _check(scheduler: object) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UsageError(
            "session.scheduler cannot bring ReduceLROnPlateau to where a running job is, since it "
            "depends on losses of the past: build it without session.scheduler"
        )
    if not isinstance(scheduler, LRScheduler):
        raise UsageError(
            f"session.scheduler got a {type(scheduler).__name__}: give it a function that takes "
            "the optimizer and returns one of torch.optim.lr_scheduler"
        )


def _target(position: Position, step: int, index: int) -> int:
    """How often scheduler `index` of a worker that begins with `step` would have been stepped.

    One whose count is nearer to the number of updates than to that of data epochs goes on in
    proportion to updates: it may have missed some, or be stepped several times in each. Any other
    is stepped after each data epoch.
    """
    if index >= len(position.schedules):
        return 0
    count, updates = position.schedules[index], position.schedules_step
    if _ratio(count, updates) <= _ratio(count, position.schedules_point.data_epoch):
        return round(count * step / updates) if updates else step
    return count + _epochs_between(position.schedules_point, position.point)


def _epochs_between(before: Point, after: Point) -> int:
    """How many data epochs have ended in between, of two loops at least."""
    if before.loop == after.loop:
        return after.data_epoch - before.data_epoch
    return (before.loop > 0) + after.data_epoch


def _ratio(one: int, other: int) -> float:
    """How many times one is the other, at least 1; infinite if only one of them is 0."""
    if one == other:
        return 1.0
    low, high = sorted((one, other))
    return high / low if low else math.inf


def _forward(scheduler: LRScheduler, target: int) -> None:
    """Step until it has been stepped `target` times."""
    with warnings.catch_warnings():
        # torch expects a step of the optimizer first; the other workers have taken those.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
        for _ in range(_count(scheduler), target):
            scheduler.step()


def _count(scheduler: LRScheduler) -> int:
    """How often it has been stepped. torch's ChainedScheduler counts in its members only."""
    if isinstance(scheduler, ChainedScheduler):
        return _count(scheduler._schedulers[0])
    return scheduler.last_epoch
