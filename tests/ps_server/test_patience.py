import pytest

from ps_server.crew import Crew, State, Worker
from ps_server.patience import Patience, awaited
from ps_server.policy import SYNC, Consistency
from ps_server.terms import Terms

BACKUP = Consistency(quorum=None, bound=0, backups=1)
BOUNDED = Consistency(quorum=1, bound=2)
ASYNC = Consistency(quorum=1, bound=None)


def crew_at(*clocks: int) -> Crew:
    ranks = enumerate(clocks)
    return Crew({rank: Worker(1, State.MEMBER, first_step=0, clock=clock) for rank, clock in ranks})


def late(crew: Crew, policy: Consistency, turn: int = 0) -> set[int]:
    return {rank for rank, _, _ in awaited(crew, policy, turn)}


# -- Joining ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "named"),
    [
        (set[int](), "4 of 4 workers never joined: 0, 1, 2, 3"),
        ({0, 2}, "2 of 4 workers never joined: 1, 3"),
        ({1, 2, 3, 7}, "1 of 4 workers never joined: 0"),
        ({0, 7}, "2 of 4 workers never joined: 1, 2"),
        ({0, 1, 2, 3}, ""),
        ({0, 5, 6, 7}, ""),
    ],
)
def test_those_who_are_missing_at_the_deadline_are_named(here: set[int], named: str) -> None:
    patience = Patience(Terms(num_workers=4, deadline=60.0))
    assert patience.missed(here, 59.9) == ""
    advice = " (membership.join_timeout_seconds): look into their logs"
    assert patience.missed(here, 60.0) == (named + advice if named else "")


# -- Pausing ---------------------------------------------------------------------------------------


def test_a_pause_is_bounded_and_counted_from_its_beginning() -> None:
    patience = Patience(Terms(3, 0.0, min_workers=2, pause_seconds=10.0))
    assert patience.paused(1, 100.0) == ""
    assert patience.paused(1, 109.9) == ""
    patience.late([], 109.95)  # not paused: over
    assert patience.paused(1, 200.0) == ""
    assert patience.paused(1, 209.9) == ""
    assert patience.paused(1, 210.0) == (
        "paused for 10 s with 1 workers, and at least 2 are wanted: start more, or lower "
        "membership.min_workers or raise membership.pause_timeout_seconds"
    )


# -- Late steps ------------------------------------------------------------------------------------


def test_a_step_is_too_late_after_the_deadline_for_as_long_as_it_is_waited_for() -> None:
    patience = Patience(Terms(2, 0.0, step_seconds=5.0))
    step = (1, 9, 4)
    assert patience.late([step], 10.0) == []
    assert patience.late([step], 15.0) == []
    assert patience.late([step], 15.5) == [(step, 5.5)]
    assert patience.late([], 16.0) == []
    assert patience.late([step], 17.0) == []


def test_another_step_or_process_has_its_own_time() -> None:
    patience = Patience(Terms(2, 0.0, step_seconds=5.0))
    patience.late([(1, 9, 4)], 10.0)
    assert patience.late([(1, 9, 5), (1, 8, 4)], 20.0) == []


def test_a_pause_stops_the_time_of_all_steps() -> None:
    patience = Patience(Terms(2, 0.0, step_seconds=5.0))
    patience.late([(1, 9, 4)], 10.0)
    patience.paused(1, 12.0)
    assert patience.late([(1, 9, 4)], 20.0) == []


def test_without_a_deadline_nobody_is_late() -> None:
    patience = Patience(Terms(2, 0.0))
    patience.late([(1, 9, 4)], 0.0)
    assert patience.late([(1, 9, 4)], 1e9) == []


# -- Who is waited for -----------------------------------------------------------------------------


def test_in_sync_all_wait_for_whoever_is_a_step_behind() -> None:
    assert late(crew_at(4, 5, 4), SYNC) == {0, 2}
    assert late(crew_at(5, 5, 5), SYNC) == set()


def test_with_a_bound_nobody_waits_before_it_is_reached() -> None:
    assert late(crew_at(4, 6), BOUNDED) == set()
    assert late(crew_at(4, 7), BOUNDED) == {0}


def test_without_a_bound_nobody_waits() -> None:
    assert late(crew_at(0, 1000), ASYNC) == set()


def test_with_backup_workers_nobody_waits_for_a_step_that_is_made() -> None:
    crew = crew_at(3, 5, 6)  # step 5 is in progress; worker 2 is done, worker 0 has missed two
    assert late(crew, BACKUP, turn=5) == {1}


def test_who_is_no_member_or_waits_to_enter_neither_waits_nor_is_waited_for() -> None:
    crew = crew_at(4, 5, 9)
    crew[0].state = State.IDLE
    crew[2].enters = "late"
    assert late(crew, SYNC) == set()
