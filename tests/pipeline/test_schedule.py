from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from pipeline.group import as_default
from pipeline.schedule import (
    SCHEDULES,
    build,
    check_microbatches,
    default_microbatches,
    splits_backward,
    stages_of,
    virtual_stages,
    worker_of,
)
from ps_core.errors import UsageError

PLACES = {
    # schedule, workers: the stages of each worker
    ("gpipe", 3): [(0,), (1,), (2,)],
    ("1f1b", 2): [(0,), (1,)],
    ("interleaved", 2): [(0, 2), (1, 3)],
    ("interleaved", 3): [(0, 3), (1, 4), (2, 5)],
    ("interleaved-zero-bubble", 2): [(0, 2), (1, 3)],
    ("zbv", 1): [(0, 1)],
    ("zbv", 2): [(0, 3), (1, 2)],
    ("zbv", 3): [(0, 5), (1, 4), (2, 3)],
}


@pytest.mark.parametrize(("schedule", "num_workers"), PLACES)
def test_every_worker_holds_the_stages_of_its_place(schedule: str, num_workers: int) -> None:
    held = [stages_of(schedule, worker, num_workers) for worker in range(num_workers)]
    assert held == PLACES[schedule, num_workers]
    for worker, stages in enumerate(held):
        assert len(stages) == virtual_stages(schedule)
        assert all(worker_of(schedule, stage, num_workers) == worker for stage in stages)


def test_two_schedules_split_the_backward_pass() -> None:
    assert [s for s in SCHEDULES if splits_backward(s)] == ["interleaved-zero-bubble", "zbv"]


@pytest.mark.parametrize(
    "ask",
    [
        virtual_stages,
        splits_backward,
        lambda name: stages_of(name, 0, 2),
        lambda name: worker_of(name, 0, 2),
        lambda name: check_microbatches(name, 2, 4),
        lambda name: default_microbatches(name, 2),
    ],
)
def test_an_unknown_schedule_is_refused_with_the_known_names(ask: Callable[[str], object]) -> None:
    with pytest.raises(UsageError, match="no schedule '2f2b': give one of gpipe, 1f1b, inter"):
        ask("2f2b")


@pytest.mark.parametrize(
    ("schedule", "num_workers", "num_microbatches", "instead"),
    [
        ("gpipe", 2, 0, "1"),
        ("gpipe", 2, -9, "1"),
        ("1f1b", 4, 3, "4"),
        ("interleaved", 2, 5, "4 or 6"),
        ("interleaved", 4, 9, "8 or 10"),
        ("interleaved-zero-bubble", 3, 7, "6 or 8"),
        ("interleaved-zero-bubble", 3, 0, "1"),
        ("zbv", 3, 0, "1"),
    ],
)
def test_a_number_of_microbatches_that_does_not_fit_is_refused_with_one_that_does(
    schedule: str, num_workers: int, num_microbatches: int, instead: str
) -> None:
    with pytest.raises(UsageError, match=rf"{num_microbatches} microbatches: give {instead}$"):
        check_microbatches(schedule, num_workers, num_microbatches)
    check_microbatches(schedule, num_workers, int(instead.split()[-1]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_default_number_of_microbatches_fits_and_keeps_the_bubble_small(schedule: str) -> None:
    for num_workers in range(1, 9):
        num_microbatches = default_microbatches(schedule, num_workers)
        check_microbatches(schedule, num_workers, num_microbatches)
        assert (num_workers - 1) / (num_microbatches + num_workers - 1) < 0.2


class _Group(dist.ProcessGroup):
    """As many workers as one likes, of whom nobody exists."""

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the way that can be subclassed
        self._rank, self._size = rank, size


def _build(schedule: str, num_workers: int, num_microbatches: int) -> None:
    num_stages = num_workers * virtual_stages(schedule)
    group = _Group(0, num_workers)
    with as_default(group):
        stages = [
            PipelineStage(nn.Identity(), stage, num_stages, torch.device("cpu"), group=group)
            for stage in stages_of(schedule, 0, num_workers)
        ]
        build(schedule, stages, num_microbatches, nn.functional.mse_loss)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_exactly_what_torch_can_run_is_accepted(schedule: str, num_workers: int) -> None:
    for num_microbatches in range(1, 4 * num_workers + 3):
        try:
            check_microbatches(schedule, num_workers, num_microbatches)
        except UsageError:
            with pytest.raises(ValueError, match=r"[Mm]icrobatches"):
                _build(schedule, num_workers, num_microbatches)
        else:
            _build(schedule, num_workers, num_microbatches)
