"""When a worker goes idle and when it meets the others, with peers that only take notes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest

from ps_core.errors import JobFailedError
from ps_core.exchange import Arrival, Grant, Meeting, Purpose
from ps_core.leases import Lease
from ps_core.point import Point
from shardline.attendance import Attendance

GRANT = Grant(0, (Lease(id=7, loader=0, number=0, start=4, length=2),))


@dataclass
class Notes:
    """Peers whose other workers are always `ahead` steps further, and an optimizer."""

    ahead: int = 0
    grants: deque[Grant] = field(default_factory=deque)
    """What the next meetings answer."""
    heard: list[str] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    next_step: int = 3
    failure: JobFailedError | None = None

    def flush(self) -> None:
        self.heard.append("flush")
        if self.failure is not None:
            raise self.failure

    def idle(self) -> None:
        self.heard.append("idle")

    def meet(self, arrival: Arrival) -> Meeting:
        self.heard.append(f"meet {arrival.purpose.name.lower()} {arrival.step}")
        self.arrivals.append(arrival)
        grant = self.grants.popleft() if self.grants else None
        return Meeting(arrival.step + self.ahead, arrival.values, chosen=False, grant=grant)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def attendance(notes: Notes) -> Attendance:
    bound = Attendance()
    bound.bind(notes, notes)
    return bound


EPOCH = ["flush", "meet epoch 3"]
BREAK = ["flush", "idle"]


def test_a_pass_that_ends_meets_the_others_once(attendance: Attendance, notes: Notes) -> None:
    attendance.begin_loop_body(0)
    attendance.ensure_met()
    attendance.ensure_member()
    attendance.step_taken()
    assert attendance.end_epoch(takes_leases=True) is None
    attendance.end_loop_body()
    assert notes.heard == EPOCH
    assert attendance.num_ends == 1


def test_a_pass_goes_on_when_samples_come_back(attendance: Attendance, notes: Notes) -> None:
    notes.grants.append(GRANT)
    assert attendance.end_epoch(takes_leases=True) == GRANT
    assert attendance.num_ends == 0
    attendance.step_taken()
    assert attendance.end_epoch(takes_leases=True) is None
    assert [arrival.takes_leases for arrival in notes.arrivals] == [True, True]
    assert attendance.num_ends == 1


def test_a_broken_pass_goes_idle_at_once_and_meets_before_the_next(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.step_taken()
    attendance.break_off()
    assert notes.heard == BREAK
    assert attendance.num_ends == 1
    attendance.ensure_met()
    attendance.ensure_met()
    assert notes.heard == [*BREAK, *EPOCH]
    assert not notes.arrivals[0].takes_leases


@pytest.mark.parametrize("purpose", [Purpose.MEAN, Purpose.LOAD, Purpose.CLOSE])
def test_a_broken_pass_is_made_up_for_before_any_other_meeting(
    attendance: Attendance, notes: Notes, purpose: Purpose
) -> None:
    attendance.break_off()
    attendance.meet(purpose)
    assert notes.heard == [*BREAK, *EPOCH, "flush", f"meet {purpose.name.lower()} 3"]


def test_a_broken_pass_is_made_up_for_before_a_step(attendance: Attendance, notes: Notes) -> None:
    attendance.break_off()
    attendance.ensure_member()
    attendance.ensure_member()
    assert notes.heard == [*BREAK, *EPOCH]


def test_a_worker_breaks_out_although_the_job_has_failed_and_is_told_at_the_next_call(
    attendance: Attendance, notes: Notes
) -> None:
    notes.failure = JobFailedError("worker 1 died")
    attendance.break_off()
    with pytest.raises(JobFailedError, match="worker 1 died"):
        attendance.ensure_member()


def test_a_meeting_that_is_put_off_comes_after_the_last_step(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.begin_loop_body(0)
    attendance.put_off(lambda: notes.heard.append("give back"))
    attendance.ensure_member()
    attendance.step_taken()
    assert notes.heard == []
    assert attendance.num_ends == 0
    attendance.end_loop_body()
    attendance.ensure_met()
    assert notes.heard == ["give back", *EPOCH]


@pytest.mark.parametrize("purpose", [Purpose.MEAN, Purpose.LOAD, Purpose.CLOSE])
def test_a_meeting_that_is_put_off_comes_before_any_other(
    attendance: Attendance, notes: Notes, purpose: Purpose
) -> None:
    attendance.put_off(lambda: notes.heard.append("give back"))
    attendance.meet(purpose)
    attendance.end_loop_body()
    assert notes.heard == ["give back", *EPOCH, "flush", f"meet {purpose.name.lower()} 3"]


def test_own_data_loading_meets_at_the_end_of_the_epoch_body(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.step_taken()
    attendance.end_loop_body()
    assert notes.heard == EPOCH


def test_a_worker_without_data_meets_the_others_all_the_same(
    attendance: Attendance, notes: Notes
) -> None:
    for epoch in range(2):
        attendance.begin_loop_body(epoch)
        attendance.end_loop_body()
    assert notes.heard == [*EPOCH, *EPOCH]
    assert [arrival.point.data_epoch for arrival in notes.arrivals] == [0, 1]


def test_averaging_within_a_pass_does_not_end_the_epoch(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.step_taken()
    assert attendance.meet(Purpose.MEAN, [1.5], 2.0).means == (1.5,)
    assert notes.heard == ["flush", "meet mean 3"]
    point = Point(count=1)
    assert notes.arrivals == [Arrival(Purpose.MEAN, 3, (1.5,), 2.0, point=point)]
    assert attendance.num_ends == 0


def test_a_worker_goes_on_at_the_step_of_the_others(attendance: Attendance, notes: Notes) -> None:
    notes.ahead = 4
    attendance.end_epoch()
    assert notes.next_step == 7


def test_without_an_optimizer_a_worker_meets_at_step_0(notes: Notes) -> None:
    attendance = Attendance()
    attendance.bind(notes)
    attendance.break_off()
    attendance.ensure_met()
    assert notes.heard == ["idle", "meet epoch 0"]


def test_nothing_happens_before_a_job_is_joined_or_after_it_is_left(notes: Notes) -> None:
    attendance = Attendance()
    attendance.break_off()
    assert attendance.meet(Purpose.MEAN, [2.0]).means == (2.0,)
    attendance.bind(notes, notes)
    attendance.release()
    attendance.break_off()
    attendance.end_epoch()
    assert notes.heard == []


# -- Which call of the script it is ----------------------------------------------------------------


def test_passes_and_meetings_are_counted_in_each_body_of_the_loop(
    attendance: Attendance, notes: Notes
) -> None:
    assert attendance.begin_pass(0) == Point(0, 0, 1)
    for loop in (1, 2):
        for epoch in attendance.begin_loop(2):
            attendance.begin_loop_body(epoch)
            assert attendance.begin_pass(0) == Point(loop, epoch, 1)
            assert attendance.begin_pass(1) == Point(loop, epoch, 1)
            assert attendance.begin_pass(0) == Point(loop, epoch, 2)
            attendance.end_epoch()
            attendance.meet(Purpose.MEAN)
            attendance.meet(Purpose.LOAD)
    counted = [a.point.count for a in notes.arrivals if a.purpose is not Purpose.EPOCH]
    assert counted == [1, 2] * 4


def test_nobody_is_met_at_the_end_of_a_pass_that_is_over(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.begin_loop_body(0)
    attendance.begin_pass(0)
    attendance.pass_over()
    attendance.end_loop_body()
    assert notes.heard == []
    attendance.begin_loop_body(1)
    attendance.end_loop_body()
    assert notes.heard == EPOCH


def test_meetings_within_a_pass_have_no_name(attendance: Attendance, notes: Notes) -> None:
    attendance.begin_loop_body(2)
    attendance.meet(Purpose.MEAN)
    for end in (attendance.end_epoch, attendance.break_off, attendance.pass_over):
        attendance.begin_pass(0)
        attendance.meet(Purpose.MEAN)
        end()
        attendance.meet(Purpose.MEAN)
    counted = [a.point.count for a in notes.arrivals if a.purpose is Purpose.MEAN]
    assert counted == [1, 0, 2, 0, 3, 0, 4]
    assert {a.point.data_epoch for a in notes.arrivals} == {2}


def test_a_meeting_that_follows_gradients_left_over_has_a_name(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.begin_pass(0)
    attendance.put_off(lambda: None)
    attendance.meet(Purpose.MEAN)
    assert [a.point.count for a in notes.arrivals] == [0, 1]


@pytest.mark.parametrize(
    ("there", "first", "second"),
    [
        (Point(), [0, 1, 2], [0, 1, 2]),
        (Point(1, 0), [0, 1, 2], [0, 1, 2]),
        (Point(1, 2), [2], [0, 1, 2]),
        (Point(1, 3), [], [0, 1, 2]),
        (Point(2, 1), [], [1, 2]),
        (Point(2, 3), [], []),
    ],
)
def test_a_joiner_goes_through_what_is_left_of_the_loops(
    attendance: Attendance, there: Point, first: list[int], second: list[int]
) -> None:
    attendance.others_are_at(there)
    for loop, left in ((1, first), (2, second)):
        assert list(attendance.begin_loop(3)) == left
        attendance.end_loop(3)
        assert attendance.point == Point(loop, 3)


def test_a_loop_may_start_later_where_the_others_are_not_further() -> None:
    attendance = Attendance()
    assert list(attendance.begin_loop(5, start=3)) == [3, 4]
    assert list(attendance.begin_loop(2, start=3)) == []
    joined = Attendance()
    joined.others_are_at(Point(1, 4))
    assert list(joined.begin_loop(5, start=3)) == [4]
    assert list(joined.begin_loop(5, start=3)) == [3, 4]
