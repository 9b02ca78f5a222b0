"""Schedulers of a worker that joins late, compared with those of one that was there all along."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from ps_core.errors import UsageError
from ps_core.exchange import Position, Start
from ps_core.point import Point
from shardline.schedules import Schedules

Make = Callable[[torch.optim.Optimizer], LRScheduler]
AT_THE_BEGINNING = Start(step=0, chosen=True)


def sequential(optimizer: torch.optim.Optimizer) -> LRScheduler:
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    decay = lr_scheduler.ExponentialLR(optimizer, 0.9)
    return lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[5])


def chained(optimizer: torch.optim.Optimizer) -> LRScheduler:
    warmup = lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=6)
    return lr_scheduler.ChainedScheduler([warmup, lr_scheduler.ExponentialLR(optimizer, 0.9)])


def chain_of_a_sequence(optimizer: torch.optim.Optimizer) -> LRScheduler:
    decay = lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    return lr_scheduler.ChainedScheduler([sequential(optimizer), decay])


MAKERS: dict[str, Make] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, gamma=0.3),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 9]),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=20),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, 4, 2
    ),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=40),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 15),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "ChainedScheduler of SequentialLR": chain_of_a_sequence,
}
all_kinds = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def new_optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(3))], "lr": lr} for lr in (0.1, 0.025)]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def step(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, count: int = 1) -> None:
    for _ in range(count):
        optimizer.step()
        scheduler.step()


def settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Everything that a scheduler may change; numbers are compared exactly."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def late(make: Make, position: Position, step: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The only scheduler of a worker that joins a running job at `step`."""
    optimizer = new_optimizer()
    start = Start(step, chosen=False, position=position)
    return optimizer, Schedules().build(make, optimizer, start)


# -- Catching up -----------------------------------------------------------------------------------


def at(epoch: int) -> Point:
    """The body for an epoch of the first session.epochs."""
    return Point(1, epoch)


@all_kinds
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 7, 12])
def test_a_scheduler_stepped_per_update_is_brought_to_the_first_step(
    make: Make, count: int
) -> None:
    present = new_optimizer()
    scheduler = make(present)
    step(present, scheduler, count)
    # The others' counts may be older than the step with which this worker begins.
    told = max(count - 2, 0)
    position = Position(at(0), schedules=(told,), schedules_step=told)
    joined, brought = late(make, position, step=count)
    assert settings(joined) == settings(present)
    assert brought.get_last_lr() == scheduler.get_last_lr()
    for _ in range(15):
        step(present, scheduler)
        step(joined, brought)
        assert settings(joined) == settings(present)


@all_kinds
@pytest.mark.parametrize("epoch", [1, 5, 8])
def test_a_scheduler_stepped_per_data_epoch_is_brought_to_the_epoch(make: Make, epoch: int) -> None:
    present = new_optimizer()
    scheduler = make(present)
    step(present, scheduler, epoch)
    position = Position(
        at(epoch),
        schedules=(epoch - 1,),
        schedules_step=70,
        schedules_point=at(epoch - 1),
    )
    joined, brought = late(make, position, step=83)
    assert settings(joined) == settings(present)
    step(present, scheduler, 6)
    step(joined, brought, 6)
    assert settings(joined) == settings(present)


def test_epochs_are_counted_on_from_one_loop_to_the_next() -> None:
    position = Position(Point(2, 1), (8,), schedules_step=100, schedules_point=at(8))
    _, scheduler = late(MAKERS["StepLR"], position, step=110)
    assert scheduler.last_epoch == 10


def test_what_came_before_the_first_loop_was_no_epoch() -> None:
    position = Position(at(0), (0,), schedules_step=100, schedules_point=Point())
    _, scheduler = late(MAKERS["StepLR"], position, step=110)
    assert scheduler.last_epoch == 0


def test_a_scheduler_that_began_elsewhere_keeps_its_distance() -> None:
    # Stepped twice per epoch, or not in every one: nobody knows, so the last count is the best.
    position = Position(at(9), schedules=(16,), schedules_step=100, schedules_point=at(8))
    _, scheduler = late(MAKERS["StepLR"], position, step=110)
    assert scheduler.last_epoch == 17


@pytest.mark.parametrize(
    ("count", "brought"),
    [
        (60, 66),
        (57, 63),  # the worker that told had no data in some updates
        (600, 660),  # local steps: ten in each update
        (20, 22),  # stepped in every third
    ],
)
def test_a_scheduler_of_updates_goes_on_in_proportion(count: int, brought: int) -> None:
    position = Position(at(3), schedules=(count,), schedules_step=60, schedules_point=at(2))
    _, scheduler = late(MAKERS["LambdaLR"], position, step=66)
    assert scheduler.last_epoch == brought


def test_each_scheduler_is_brought_to_its_own_place() -> None:
    schedules, optimizers = Schedules(), [new_optimizer() for _ in range(3)]
    position = Position(at(4), schedules=(60, 3), schedules_step=60, schedules_point=at(3))
    start = Start(63, chosen=False, position=position)
    for optimizer in optimizers:
        schedules.build(MAKERS["LambdaLR"], optimizer, start)
    assert schedules.counts() == (63, 4, 0)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    assert rates == [0.1 * (1 / 64), 0.1 * (1 / 5), 0.1]


@all_kinds
def test_at_the_beginning_of_a_job_nothing_is_stepped(make: Make) -> None:
    present, joined, schedules = new_optimizer(), new_optimizer(), Schedules()
    scheduler = make(present)
    brought = schedules.build(make, joined, AT_THE_BEGINNING)
    assert schedules.counts() == (0,)
    assert settings(joined) == settings(present)
    step(present, scheduler, 3)
    step(joined, brought, 3)
    assert settings(joined) == settings(present)


def test_a_scheduler_that_the_script_has_restored_is_only_brought_forward() -> None:
    def restored(optimizer: torch.optim.Optimizer) -> LRScheduler:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n), last_epoch=6)

    position = Position(at(0), schedules=(9,), schedules_step=9)
    for first_step, count in ((9, 9), (5, 7)):
        _, scheduler = late(restored, position, step=first_step)
        assert scheduler.last_epoch == count


def test_other_warnings_are_shown() -> None:
    def warns(count: int) -> float:
        if count == 2:
            warnings.warn("from the script", UserWarning, stacklevel=1)
        return 1.0

    position = Position(at(0), schedules=(3,), schedules_step=3)
    with pytest.warns(UserWarning, match="from the script"):
        late(lambda optimizer: lr_scheduler.LambdaLR(optimizer, warns), position, step=3)


# -- Counting --------------------------------------------------------------------------------------


@all_kinds
def test_counts_are_how_often_each_was_stepped(make: Make) -> None:
    schedules, first, second = Schedules(), new_optimizer(), new_optimizer()
    assert schedules.counts() == ()
    often = schedules.build(make, first, AT_THE_BEGINNING)
    rarely = schedules.build(make, second, AT_THE_BEGINNING)
    for number in range(1, 13):
        step(first, often)
        step(second, rarely, number % 2)
        assert schedules.counts() == (number, (number + 1) // 2)


@all_kinds
def test_a_scheduler_keeps_its_own_state_dict_and_counts_follow_it(make: Make) -> None:
    schedules, optimizer, other = Schedules(), new_optimizer(), new_optimizer()
    scheduler = schedules.build(make, optimizer, AT_THE_BEGINNING)
    plain = make(other)
    step(other, plain, 8)
    assert scheduler.state_dict().keys() == plain.state_dict().keys()
    optimizer.load_state_dict(other.state_dict())
    scheduler.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert schedules.counts() == (8,)
    step(other, plain, 3)
    step(optimizer, scheduler, 3)
    assert schedules.counts() == (11,)
    assert settings(optimizer) == settings(other)


# -- What cannot be brought along ------------------------------------------------------------------


@pytest.mark.parametrize("position", [None, Position(at(2), schedules=(2,), schedules_step=20)])
def test_a_scheduler_that_depends_on_losses_is_refused_on_every_worker(
    position: Position | None,
) -> None:
    start = Start(21, chosen=False, position=position)
    with pytest.raises(UsageError, match=r"build it without session\.scheduler"):
        Schedules().build(lr_scheduler.ReduceLROnPlateau, new_optimizer(), start)


def test_something_else_is_refused() -> None:
    with pytest.raises(UsageError, match=r"got a SGD: .*returns one of torch\.optim\.lr_scheduler"):
        Schedules().build(lambda optimizer: optimizer, new_optimizer(), AT_THE_BEGINNING)  # type: ignore[type-var]  # that is the test
