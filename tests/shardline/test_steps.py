"""How many samples stand behind a step, whatever the script does with its batches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ps_core.exchange import Outcome, Traffic
from ps_core.metrics import REGISTRY, WorkerMetrics
from shardline.attendance import Attendance
from shardline.journal import Journal
from shardline.steps import Steps

RANK = 71
WEIGHT = torch.nn.Parameter(torch.ones(3))


@pytest.fixture
def steps() -> Iterator[Steps]:
    counted = Steps(WorkerMetrics(RANK, 1), Journal(None, RANK, Traffic()), Attendance())
    counted.watch([WEIGHT])
    yield counted
    counted.close()


def train(steps: Steps, samples: int, *, backward: bool = True) -> None:
    steps.yielded(samples, 0.0)
    if backward:
        WEIGHT.sum().backward()


def test_a_step_weighs_the_batch_before_it(steps: Steps) -> None:
    train(steps, 8)
    assert steps.take_samples() == 8
    train(steps, 5)
    assert steps.take_samples() == 5


def test_accumulated_batches_add_up(steps: Steps) -> None:
    train(steps, 8)
    train(steps, 8)
    assert steps.take_samples() == 16


def test_a_skipped_batch_does_not_count(steps: Steps) -> None:
    train(steps, 100, backward=False)
    train(steps, 8)
    assert steps.take_samples() == 8


def test_two_backward_passes_of_one_batch_count_it_once(steps: Steps) -> None:
    train(steps, 8)
    WEIGHT.sum().backward()
    assert steps.take_samples() == 8


def test_gradients_that_are_thrown_away_do_not_count(steps: Steps) -> None:
    train(steps, 8)
    steps.gradients_cleared()
    train(steps, 3)
    assert steps.take_samples() == 3


def test_clearing_before_the_backward_pass_keeps_the_batch(steps: Steps) -> None:
    steps.yielded(8, 0.0)
    steps.gradients_cleared()
    WEIGHT.sum().backward()
    assert steps.take_samples() == 8


def test_without_a_loader_every_step_weighs_one(steps: Steps) -> None:
    WEIGHT.sum().backward()
    assert steps.take_samples() == 1


def test_phases_and_totals_are_counted(steps: Steps) -> None:
    def count(phase: str) -> float:
        labels = {"worker": str(RANK), "phase": phase}
        return REGISTRY.get_sample_value("shardline_step_seconds_count", labels) or 0.0

    before = {phase: count(phase) for phase in ("data", "forward", "backward", "exchange")}
    train(steps, 8)
    steps.before_step()
    steps.after_step(Outcome(version=1, applied=True, staleness=0), steps.take_samples(), 0.5)
    assert {phase: count(phase) - before[phase] for phase in before} == dict.fromkeys(before, 1.0)
    assert (steps.num_steps, steps.num_samples) == (1, 8)


def test_after_closing_backward_passes_are_not_noticed(steps: Steps) -> None:
    steps.close()
    steps.close()
    train(steps, 8)
    assert steps.take_samples() == 1
