"""When a worker goes idle and when it meets the others, with peers that only take notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from ps_core.exchange import Meeting, Purpose
from shardline.attendance import Attendance


@dataclass
class Optimizer:
    next_step: int = 0


@dataclass
class Notes:
    """Peers whose other workers are always `ahead` steps further."""

    ahead: int = 0
    heard: list[str] = field(default_factory=list)

    def idle(self, step: int) -> None:
        self.heard.append(f"idle {step}")

    def meet(
        self, purpose: Purpose, step: int, values: Sequence[float] = (), weight: float = 1.0
    ) -> Meeting:
        self.heard.append(f"meet {purpose.name.lower()} {step}")
        return Meeting(step + self.ahead, tuple(values), chosen=False)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def attendance(notes: Notes) -> Attendance:
    bound = Attendance()
    bound.bind(notes, Optimizer(3))
    return bound


def test_a_pass_that_ends_meets_the_others_once(attendance: Attendance, notes: Notes) -> None:
    attendance.enter_pass()
    attendance.step_taken()
    attendance.leave_pass(finished=True)
    attendance.end_loop_body()
    assert notes.heard == ["meet epoch 3"]


def test_a_broken_pass_goes_idle_at_once_and_meets_before_the_next(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.step_taken()
    attendance.leave_pass(finished=False)
    assert notes.heard == ["idle 3"]
    attendance.enter_pass()
    assert notes.heard == ["idle 3", "meet epoch 3"]


@pytest.mark.parametrize("purpose", [Purpose.MEAN, Purpose.LOAD, Purpose.CLOSE])
def test_a_broken_pass_is_made_up_for_before_any_other_meeting(
    attendance: Attendance, notes: Notes, purpose: Purpose
) -> None:
    attendance.leave_pass(finished=False)
    attendance.meet(purpose)
    assert notes.heard == ["idle 3", "meet epoch 3", f"meet {purpose.name.lower()} 3"]


def test_a_broken_pass_is_made_up_for_before_a_step(attendance: Attendance, notes: Notes) -> None:
    attendance.leave_pass(finished=False)
    attendance.ensure_member()
    attendance.ensure_member()
    assert notes.heard == ["idle 3", "meet epoch 3"]


def test_own_data_loading_meets_at_the_end_of_the_epoch_body(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.step_taken()
    attendance.end_loop_body()
    assert notes.heard == ["meet epoch 3"]


def test_a_worker_without_data_meets_the_others_all_the_same(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.begin_loop_body()
    attendance.end_loop_body()
    assert notes.heard == ["meet epoch 3"]


def test_averaging_within_a_pass_does_not_end_the_epoch(
    attendance: Attendance, notes: Notes
) -> None:
    attendance.enter_pass()
    attendance.step_taken()
    attendance.meet(Purpose.MEAN, [1.5])
    assert notes.heard == ["meet mean 3"]


def test_a_worker_goes_on_at_the_step_of_the_others() -> None:
    notes, optimizer, attendance = Notes(ahead=4), Optimizer(3), Attendance()
    attendance.bind(notes, optimizer)
    attendance.leave_pass(finished=True)
    assert optimizer.next_step == 7


def test_nothing_happens_before_a_job_is_joined_or_after_it_is_left(notes: Notes) -> None:
    attendance = Attendance()
    attendance.leave_pass(finished=False)
    assert attendance.meet(Purpose.MEAN, [2.0]).means == (2.0,)
    attendance.bind(notes, Optimizer())
    attendance.release()
    attendance.leave_pass(finished=False)
    assert notes.heard == []
