from ps_core.exchange import Arrival, Grant, Purpose
from ps_server.crew import Crew, State, Worker

EPOCH = Arrival(Purpose.EPOCH, 3, takes_leases=True)
EVERY = (State.JOINED, State.MEMBER, State.IDLE, State.LEFT, State.GONE)


def crew_of(*states: State) -> Crew:
    """Ranks 0, 1, … in these states, as incarnations 10, 11, …"""
    return Crew({rank: Worker(10 + rank, state) for rank, state in enumerate(states)})


def test_a_rank_is_held_until_its_process_is_away() -> None:
    crew = crew_of(*EVERY)
    assert [crew.incarnation(rank) for rank in range(6)] == [10, 11, 12, 0, 0, 0]


def test_members_and_idle_workers_take_part() -> None:
    crew = crew_of(*EVERY)
    assert crew.members == {1}
    assert [rank for rank, _ in crew.present()] == [1, 2]


def test_a_member_trains_unless_it_waits_to_enter() -> None:
    crew = crew_of(State.MEMBER, State.MEMBER, State.IDLE)
    crew[1].enters = "late"
    assert crew.members == {0, 1}
    assert crew.training == {0}
    assert crew.entering("late").keys() == {1}
    assert crew.entering("joins") == {}


def test_a_meeting_is_over_when_all_who_take_part_have_come_and_none_is_to_go_on() -> None:
    crew = crew_of(State.IDLE, State.IDLE, State.JOINED, State.LEFT)
    assert crew.met() == {}
    crew[0].arrival = EPOCH
    assert crew.met() == {}
    crew[1].arrival = EPOCH
    assert crew.met() == {0: EPOCH, 1: EPOCH}
    crew[1].enters = "returns"
    assert crew.met() == {}
    assert crew_of(State.LEFT, State.GONE).met() == {}


def test_who_broke_out_of_its_pass_does_not_share_it() -> None:
    crew = crew_of(State.MEMBER, State.IDLE, State.IDLE, State.JOINED)
    crew[2].arrival = EPOCH
    assert crew.reading(members_only=False) == {0, 2}
    assert crew.reading(members_only=True) == {0}


def test_somebody_has_finished_only_when_it_said_so() -> None:
    assert not crew_of(State.GONE, State.MEMBER).has_finished
    assert crew_of(State.LEFT, State.MEMBER).has_finished


def test_a_worker_awaits_samples_at_the_end_of_its_pass_until_it_has_some() -> None:
    worker = Worker(1, State.IDLE)
    assert not worker.awaits_samples
    worker.arrival = Arrival(Purpose.EPOCH, 3)
    assert not worker.awaits_samples
    worker.arrival = EPOCH
    assert worker.awaits_samples
    worker.enters = "returns"
    assert not worker.awaits_samples


def test_becoming_a_member_begins_anew() -> None:
    worker = Worker(1, State.IDLE, EPOCH, enters="returns", grant=Grant(0, ()))
    worker.become_member(5)
    assert worker == Worker(1, State.MEMBER, first_step=5, clock=5)


def test_a_worker_that_departs_waits_for_nothing_and_keeps_its_clock() -> None:
    worker = Worker(1, State.IDLE, EPOCH, 2, "returns", 6, Grant(0, ()))
    worker.depart(State.GONE)
    assert worker == Worker(1, State.GONE, first_step=2, clock=6)
    assert worker.is_away
