"""The pipeline schedules: which stages a worker holds, and in which order they run.

The orders themselves are torch's. A schedule has one or two stages per worker: with P workers the
*loop* shape puts stages r and P + r on worker r, the *V* shape stages r and 2P − 1 − r.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from ps_core.errors import UsageError

_MICROBATCHES_PER_WORKER: Final = 4
"""With M = 4P the bubble of 1F1B, (P − 1) / (M + P − 1), stays under a fifth."""


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(output, target) → a scalar."""


class TorchSchedule(Protocol):
    """What all of torch's schedules share."""

    def step(
        self,
        *inputs: torch.Tensor,
        target: torch.Tensor | None,
        losses: list[torch.Tensor],
        return_outputs: bool,
    ) -> object:
        """Run forward and backward of one batch; blocks until all is received and sent."""


def _at_least_one(num_workers: int, num_microbatches: int) -> bool:
    return num_microbatches >= 1


def _fills_the_pipeline(num_workers: int, num_microbatches: int) -> bool:
    return num_microbatches >= num_workers


def _in_equal_rounds(num_workers: int, num_microbatches: int) -> bool:
    """Microbatches go round in `num_microbatches // num_workers` rounds of equal length."""
    rounds = max(1, num_microbatches // num_workers)
    return num_microbatches >= 1 and num_microbatches % rounds == 0


@dataclass(frozen=True, slots=True)
class _Kind:
    """`accepts` says whether torch runs (workers, microbatches); `splits_backward`: the gradients
    of a stage's inputs come first and those of its parameters later, to fill the bubbles.
    """

    build: Callable[..., TorchSchedule]
    accepts: Callable[[int, int], bool]
    virtual_stages: int = 1
    is_v: bool = False
    splits_backward: bool = False


def _single(schedule: Callable[..., TorchSchedule]) -> Callable[..., TorchSchedule]:
    """Torch's schedules for one stage per worker take the stage itself, not a list."""

    def build(
        stages: list[PipelineStage], num_microbatches: int, *, loss_fn: Loss, scale_grads: bool
    ) -> TorchSchedule:
        [stage] = stages
        return schedule(stage, num_microbatches, loss_fn=loss_fn, scale_grads=scale_grads)

    return build


_KINDS: Final[dict[str, _Kind]] = {
    "gpipe": _Kind(_single(ScheduleGPipe), _at_least_one),
    "1f1b": _Kind(_single(Schedule1F1B), _fills_the_pipeline),
    "interleaved": _Kind(ScheduleInterleaved1F1B, _in_equal_rounds, virtual_stages=2),
    "interleaved-zero-bubble": _Kind(
        ScheduleInterleavedZeroBubble, _in_equal_rounds, virtual_stages=2, splits_backward=True
    ),
    "zbv": _Kind(
        ScheduleZBVZeroBubble, _at_least_one, virtual_stages=2, is_v=True, splits_backward=True
    ),
}

SCHEDULES: Final = tuple(_KINDS)
"""The names a user can give."""


def _kind(schedule: str) -> _Kind:
    if schedule not in _KINDS:
        raise UsageError(f"there is no schedule {schedule!r}: give one of {', '.join(SCHEDULES)}")
    return _KINDS[schedule]


def virtual_stages(schedule: str) -> int:
    """Stages per worker. UsageError for an unknown name, here and in all functions below."""
    return _kind(schedule).virtual_stages


def splits_backward(schedule: str) -> bool:
    """Whether the gradients of parameters are computed apart from those of the stage's inputs."""
    return _kind(schedule).splits_backward


def worker_of(schedule: str, stage: int, num_workers: int) -> int:
    """The worker that holds `stage`."""
    lap, place = divmod(stage, num_workers)
    backwards = _kind(schedule).is_v and lap % 2 == 1
    return num_workers - 1 - place if backwards else place


def stages_of(schedule: str, worker: int, num_workers: int) -> tuple[int, ...]:
    """The stages that `worker` holds, ascending."""
    num_stages = virtual_stages(schedule) * num_workers
    return tuple(s for s in range(num_stages) if worker_of(schedule, s, num_workers) == worker)


def check_microbatches(schedule: str, num_workers: int, num_microbatches: int) -> None:
    """UsageError unless `schedule` can cut a batch into `num_microbatches`; it says which can."""
    kind = _kind(schedule)
    if not kind.accepts(num_workers, num_microbatches):
        instead = " or ".join(map(str, _nearest(kind, num_workers, num_microbatches)))
        raise UsageError(
            f"schedule {schedule!r} on {num_workers} workers cannot run {num_microbatches} "
            f"microbatches: give {instead}"
        )


def _nearest(kind: _Kind, num_workers: int, num_microbatches: int) -> Iterator[int]:
    below = range(num_microbatches - 1, 0, -1)
    yield from [n for n in below if kind.accepts(num_workers, n)][:1]
    above = itertools.count(max(1, num_microbatches + 1))  # multiples of num_workers always fit
    yield next(n for n in above if kind.accepts(num_workers, n))


def default_microbatches(schedule: str, num_workers: int) -> int:
    """A number that keeps the bubble small: four per worker, which every schedule accepts."""
    num_microbatches = _MICROBATCHES_PER_WORKER * num_workers
    check_microbatches(schedule, num_workers, num_microbatches)
    return num_microbatches


@contextmanager
def without_dump() -> Iterator[None]:
    """Keep torch from logging its whole schedule when an error passes through it."""
    logger = logging.getLogger("torch.distributed.pipelining.schedules")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def build(
    schedule: str,
    stages: Sequence[PipelineStage],
    num_microbatches: int,
    loss: Loss,
) -> TorchSchedule:
    """Torch's schedule object for this worker's `stages`, ascending.

    `loss(output, target)` is called for each microbatch on the worker with the last stage; its
    gradients are added up as they are, not averaged. Blocks on no other worker.
    """
    kind = _kind(schedule)
    try:
        return kind.build(list(stages), num_microbatches, loss_fn=loss, scale_grads=False)
    except RuntimeError as error:
        raise UsageError(f"schedule {schedule!r} cannot run these stages: {error}") from error
