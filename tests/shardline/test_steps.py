"""What stands behind a step, whatever the script does with its batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from ps_core.errors import Preempted
from ps_core.exchange import Grant, Outcome, Traffic, Work
from ps_core.leases import Lease, PassSpec
from ps_core.metrics import REGISTRY, WorkerMetrics
from ps_core.point import Point
from shardline.attendance import Attendance
from shardline.journal import Journal
from shardline.preemption import Preemption
from shardline.steps import Steps
from tests.shardline.buckets_of import gradients_of

RANK = 71
WEIGHT = torch.nn.Parameter(torch.ones(3))
GRADIENTS = gradients_of([WEIGHT])


@dataclass
class Returned:
    """Leases that only notes what comes back."""

    heard: list[tuple[list[int], bool]] = field(default_factory=list)

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        raise AssertionError

    def receive_lease(self) -> Grant:
        raise AssertionError

    def holds_lease(self, lease: int) -> bool:
        return True

    def return_leases(self, leases: Sequence[int], *, declined: bool = False) -> None:
        self.heard.append((list(leases), declined))


@dataclass
class Given:
    """Steps with what is around them."""

    steps: Steps
    returned: Returned
    attendance: Attendance
    preemption: Preemption
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def batch(self, samples: int, *, backward: bool = True, loader: int = 0) -> int:
        """A batch of a loader; the id of its lease."""
        lease = Lease(next(self.numbers), loader, 0, 0, samples)
        self.steps.yielded(lease, 0.0)
        if backward:
            WEIGHT.sum().backward()
        return lease.id

    def take(self) -> tuple[float, tuple[int, ...]]:
        """Weight and leases of a step."""
        self.steps.before_step()
        work = self.steps.take_work()
        return work.weight, work.leases


@pytest.fixture
def given() -> Iterator[Given]:
    attendance, preemption = Attendance(), Preemption(1.0)
    steps = Steps(
        WorkerMetrics(RANK, 1),
        Journal(None, RANK, Traffic()),
        attendance,
        lambda: (4, 2),
        preemption.check,
    )
    returned = Returned()
    WEIGHT.grad = None
    steps.watch(GRADIENTS, returned)
    steps.begin_pass(0)
    yield Given(steps, returned, attendance, preemption)
    steps.close()


def test_a_step_weighs_the_batch_before_it(given: Given) -> None:
    one = given.batch(8)
    assert given.take() == (8, (one,))
    two = given.batch(5)
    assert given.take() == (5, (two,))


def test_accumulated_batches_add_up(given: Given) -> None:
    leases = given.batch(8), given.batch(8)
    assert given.take() == (16, leases)


def test_a_skipped_batch_does_not_count_and_is_given_back_with_the_next_step(given: Given) -> None:
    skipped, used = given.batch(100, backward=False), given.batch(8)
    assert given.returned.heard == []
    assert given.take() == (8, (used,))
    assert given.returned.heard == [([skipped], True)]
    given.batch(3)
    given.take()
    assert len(given.returned.heard) == 1


def test_two_backward_passes_of_one_batch_count_it_once(given: Given) -> None:
    lease = given.batch(8)
    WEIGHT.sum().backward()
    assert given.take() == (8, (lease,))


def test_gradients_that_are_thrown_away_do_not_count(given: Given) -> None:
    lost = given.batch(8)
    given.steps.gradients_cleared()
    kept = given.batch(3)
    assert given.take() == (3, (kept,))
    assert given.returned.heard == [([lost], True)]


def test_clearing_before_the_backward_pass_keeps_the_batch(given: Given) -> None:
    lease = given.batch(8, backward=False)
    given.steps.gradients_cleared()
    WEIGHT.sum().backward()
    assert given.take() == (8, (lease,))


def test_a_step_without_a_backward_pass_uses_the_latest_batch(given: Given) -> None:
    skipped, lease = given.batch(8, backward=False), given.batch(3, backward=False)
    assert given.take() == (3, (lease,))
    assert given.returned.heard == [([skipped], True)]


def test_batches_of_two_loaders_stand_side_by_side(given: Given) -> None:
    leases = given.batch(8, backward=False), given.batch(3, backward=False, loader=1)
    WEIGHT.sum().backward()
    assert given.take() == (11, leases)
    skipped = given.batch(8, backward=False)
    leases = given.batch(3, backward=False, loader=1), given.batch(8, backward=False)
    WEIGHT.sum().backward()
    assert given.take() == (11, leases)
    assert given.returned.heard == [([skipped], True)]


def test_without_a_loader_every_step_weighs_one(given: Given) -> None:
    WEIGHT.sum().backward()
    assert given.take() == (1, ())


# -- The end of a pass -----------------------------------------------------------------------------


def test_at_the_end_of_the_data_a_skipped_batch_is_given_back(given: Given) -> None:
    given.batch(8)
    given.take()
    skipped = given.batch(3, backward=False)
    assert given.steps.end_data(0)
    assert given.returned.heard == [([skipped], True)]


def test_a_worker_that_was_given_no_data_takes_what_others_leave(given: Given) -> None:
    assert given.steps.end_data(0)


def test_a_pass_without_a_step_only_reads(given: Given) -> None:
    given.batch(8)
    given.take()
    given.steps.begin_pass(0)
    for _ in range(3):
        given.batch(8, backward=False)
    assert not given.steps.end_data(0)
    given.steps.before_step()
    assert given.returned.heard == []


def test_gradients_left_over_keep_leases_and_weight_until_the_pass_has_ended(given: Given) -> None:
    first, second = given.batch(8), given.batch(5)
    assert given.steps.has_gradients(0)
    assert not given.steps.has_gradients(1)
    assert given.steps.end_data(0)
    assert given.take() == (13, (first, second))
    assert not given.steps.has_gradients(0)


def test_then_they_are_given_back_and_keep_their_weight(given: Given) -> None:
    left = given.batch(8)
    given.steps.end_data(0)
    given.steps.give_back_rest()
    given.attendance.num_ends += 1
    assert given.returned.heard == [([left], False)]
    assert not given.steps.has_gradients(0)
    given.steps.begin_pass(0)
    lease = given.batch(5)
    assert given.take() == (13, (lease,))
    assert len(given.returned.heard) == 1


def test_after_a_break_nothing_is_given_back(given: Given) -> None:
    given.batch(100, backward=False)
    given.batch(8)
    given.batch(100, backward=False)
    given.steps.drop_rest(0)
    given.attendance.num_ends += 1  # the attendance's part of it
    assert given.take() == (8, ())
    assert given.returned.heard == []


# -- Times and totals ------------------------------------------------------------------------------


def test_a_step_tells_where_the_job_stands(given: Given) -> None:
    given.attendance.begin_loop_body(6)
    given.batch(8)
    work = given.steps.take_work()
    assert (work.schedules, work.point) == ((4, 2), Point(0, 6))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its first element is what time it is."""
    now = [100.0]
    monkeypatch.setattr("shardline.steps.time.perf_counter", lambda: now[0])
    return now


def test_a_step_tells_how_long_its_worker_waited_and_computed(
    given: Given, clock: list[float]
) -> None:
    for computing in (2.0, 5.0):  # two batches, each after three seconds of work for it
        clock[0] += 3.0
        given.steps.yielded(Lease(next(given.numbers), 0, 0, 0, 8), 3.0)
        clock[0] += computing
        WEIGHT.sum().backward()
    given.steps.before_step()
    work = given.steps.take_work()
    assert (work.data_seconds, work.compute_seconds) == (6.0, 7.0)


def test_the_time_between_two_passes_is_nobodys(given: Given, clock: list[float]) -> None:
    given.batch(8)
    clock[0] += 2.0
    given.steps.end_data(0)
    clock[0] += 1000.0  # evaluates
    given.batch(8)
    clock[0] += 4.0
    given.steps.before_step()
    assert given.steps.take_work().compute_seconds == 6.0
    given.batch(8, backward=False)
    clock[0] += 1.0
    given.steps.drop_rest(0)
    clock[0] += 1000.0
    given.batch(8)
    clock[0] += 4.0
    given.steps.before_step()
    assert given.steps.take_work().compute_seconds == 5.0


@pytest.mark.parametrize("how", ["to none", "to zero"])
def test_gradients_that_are_thrown_away_by_hand_do_not_count(given: Given, how: str) -> None:
    lost = given.batch(8)
    if how == "to zero":
        assert WEIGHT.grad is not None
        WEIGHT.grad.zero_()
    else:
        WEIGHT.grad = None
    kept = given.batch(3)
    assert given.take() == (3, (kept,))
    assert given.returned.heard == [([lost], True)]


def test_gradients_that_are_thrown_away_right_before_the_step_do_not_count(given: Given) -> None:
    lost = given.batch(8)
    WEIGHT.grad = None
    assert given.take()[1] == ()
    assert given.returned.heard == [([lost], True)]


def test_a_second_step_with_a_batch_weighs_as_much_and_has_no_lease(given: Given) -> None:
    lease = given.batch(8)
    assert given.take() == (8, (lease,))
    WEIGHT.sum().backward()
    given.steps.before_step()
    again = given.steps.take_work()
    assert (again.weight, again.samples, again.leases) == (8, 0, ())
    following = given.batch(3)
    assert given.take() == (3, (following,))


def test_a_second_step_weighs_what_the_script_has_said_of_the_first(given: Given) -> None:
    given.batch(8)
    given.steps.before_step()
    work = given.steps.take_work()
    outcome = Outcome(next_step=1, version=1, applied=True, staleness=0)
    given.steps.after_step(outcome, replace(work, given_weight=2.5), 0.0)
    WEIGHT.sum().backward()
    assert given.take() == (2.5, ())


def test_after_a_pass_a_step_with_other_data_weighs_one(given: Given) -> None:
    given.batch(8)
    given.take()
    given.steps.end_data(0)
    WEIGHT.sum().backward()
    assert given.take() == (1, ())


def test_a_batch_weighs_its_samples_and_not_those_that_were_dropped(given: Given) -> None:
    lease = Lease(next(given.numbers), 0, 0, 0, 8)
    given.steps.yielded(lease, 0.0, 5)
    WEIGHT.sum().backward()
    assert given.take() == (5, (lease.id,))


def test_what_session_step_counts_is_the_weight_of_other_data(given: Given) -> None:
    for samples, weight in ((8, None), (4, 1.5)):
        given.steps.counted(samples, weight)
        WEIGHT.sum().backward()
    given.steps.before_step()
    work = given.steps.take_work()
    assert (work.samples, work.weight) == (12, 9.5)


def test_a_batch_that_weighs_nothing_has_no_gradients_to_lose(given: Given) -> None:
    lease = given.batch(8, backward=False)
    given.steps.counted(8, 0.0)
    assert given.take() == (0, (lease,))


def test_rows_of_the_model_tell_how_many_samples_there_are_and_not_what_they_weigh(
    given: Given,
) -> None:
    given.steps.given_rows(7)
    WEIGHT.sum().backward()
    given.steps.before_step()
    work = given.steps.take_work()
    assert (work.samples, work.weight) == (7, 1)


def test_a_change_of_gradients_is_noted_once() -> None:
    noted: list[str] = []
    attendance = Attendance()
    metrics, journal = WorkerMetrics(RANK, 1), Journal(None, RANK, Traffic())
    steps = Steps(metrics, journal, attendance, lambda: (), lambda: None)
    steps.watch(GRADIENTS, Returned(), lambda: noted.append("changed"))
    for _ in range(3):
        WEIGHT.grad = None
        WEIGHT.sum().backward()
        if _:
            torch.nn.utils.clip_grad_norm_([WEIGHT], 1.0)
        steps.before_step()
        steps.after_step(Outcome(1, 1, applied=True, staleness=0), steps.take_work(), 0.0)
        assert len(noted) == min(_, 1)
    steps.close()


def test_a_batch_without_loss_whose_gradients_are_clipped_weighs_as_any_other(
    given: Given,
) -> None:
    lease = given.batch(4, backward=False)
    (0.0 * WEIGHT).sum().backward()
    torch.nn.utils.clip_grad_norm_([WEIGHT], 1.0)
    assert given.take() == (4, (lease,))


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"worker": str(RANK), **labels}) or 0.0


def test_phases_and_totals_are_counted(given: Given) -> None:
    phases = ("data", "forward", "backward", "exchange")
    before = {phase: count("shardline_step_seconds_count", phase=phase) for phase in phases}
    given.batch(8)
    given.steps.before_step()
    outcome = Outcome(next_step=1, version=1, applied=True, staleness=0)
    given.steps.after_step(outcome, given.steps.take_work(), 0.5)
    after = {phase: count("shardline_step_seconds_count", phase=phase) for phase in phases}
    assert {phase: after[phase] - before[phase] for phase in phases} == dict.fromkeys(phases, 1.0)
    assert (given.steps.num_steps, given.steps.num_samples) == (1, 8)


def test_samples_of_a_refused_step_are_trained_on_and_not_applied(given: Given) -> None:
    names = ("shardline_samples_total", "shardline_applied_samples_total")
    before = [count(name) for name in names]
    for applied, samples in ((True, 8), (False, 4)):
        outcome = Outcome(next_step=1, version=1, applied=applied, staleness=0)
        given.steps.after_step(outcome, Work(samples), 0.5)
    assert [count(name) - b for name, b in zip(names, before, strict=True)] == [12, 8]


def test_of_what_a_script_logs_only_the_loss_is_a_metric(given: Given) -> None:
    given.steps.log({"loss": 2.0, "accuracy": 0.5})
    given.steps.log({"accuracy": 0.75})
    assert count("shardline_loss") == 2.0


@pytest.mark.parametrize(("samples", "nonfinite"), [(0, 1), (8, 0)])
def test_a_step_that_was_not_used_was_not_finite_or_refused(
    given: Given, samples: int, nonfinite: int
) -> None:
    names = ("shardline_nonfinite_steps_total", "shardline_refused_steps_total")
    before = [count(name) for name in names]
    outcome = Outcome(next_step=1, version=1, applied=False, staleness=0)
    given.steps.after_step(outcome, Work(samples), 0.5)
    after = [count(name) for name in names]
    assert [a - b for a, b in zip(after, before, strict=True)] == [nonfinite, 1 - nonfinite]


def test_after_closing_backward_passes_are_not_noticed(given: Given) -> None:
    given.steps.close()
    given.steps.close()
    given.batch(8)
    assert not given.steps.has_gradients(0)


# -- Preemption ------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_loader", [True, False])
def test_a_script_with_its_own_data_leaves_after_its_step(given: Given, from_loader: bool) -> None:
    if from_loader:
        given.batch(8)
    given.take()
    given.preemption._requested = True
    outcome = Outcome(next_step=1, version=1, applied=True, staleness=0)
    if from_loader:  # the loader tells
        given.steps.after_step(outcome, Work(8), 0.5)
    else:
        with pytest.raises(Preempted):
            given.steps.after_step(outcome, Work(1), 0.5)
    assert given.steps.num_steps == 1
