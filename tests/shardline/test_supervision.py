from signal import SIGINT, SIGKILL, SIGTERM, Signals

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.restarts import PREEMPTED, Restarts
from shardline.supervision import (
    LONELY_SECONDS,
    NOTICE_SECONDS,
    REAP_SECONDS,
    SPARE_SECONDS,
    ProcessId,
    Role,
    Start,
    Supervisor,
)

S0, S1 = ProcessId("shard", 0), ProcessId("shard", 1)
W0, W1, W2 = ProcessId("worker", 0), ProcessId("worker", 1), ProcessId("worker", 2)
DRAIN = 2.0
KILL = DRAIN + SPARE_SECONDS  # after a word


def supervisor(
    max_restarts: int = 0, *more: ProcessId, reconnect_seconds: float = 0.0
) -> Supervisor:
    """Of a job that trains."""
    run = before_training(max_restarts, *more, reconnect_seconds=reconnect_seconds)
    run.joined, run.has_trained = {0, 1, 2}, True
    return run


def before_training(
    max_restarts: int = 0, *more: ProcessId, reconnect_seconds: float = 0.0
) -> Supervisor:
    restarts = Restarts(max_restarts, window_seconds=300)
    return Supervisor([S0, W0, W1, *more], DRAIN, restarts, reconnect_seconds)


def sent(run: Supervisor, now: float) -> list[tuple[Signals, tuple[ProcessId, ...]]]:
    orders = run.due(now)
    assert not [order for order in orders if isinstance(order, Start)]
    return [(order.signal, order.processes) for order in orders if not isinstance(order, Start)]


def started(run: Supervisor, now: float) -> list[Start]:
    orders = run.due(now)
    assert all(isinstance(order, Start) for order in orders)
    return [order for order in orders if isinstance(order, Start)]


def test_a_run_is_over_with_0_when_workers_and_then_shards_end() -> None:
    run = supervisor()
    for now, process in enumerate((W0, W1, S0)):
        assert not run.is_over(now)
        run.exited(process, 0, now)
        assert sent(run, now) == []
    assert run.is_over(3)
    assert run.exit_code() == 0
    assert run.failure is None


def test_a_shard_that_stays_is_told_after_a_while_and_killed_after_another() -> None:
    run = supervisor()
    run.exited(W0, 0, 10)
    run.exited(W1, 0, 10)
    told = 10 + DRAIN + SPARE_SECONDS
    assert sent(run, told - 0.1) == []
    assert sent(run, told) == [(SIGTERM, (S0,))]
    assert sent(run, told + KILL - 0.1) == []
    assert sent(run, told + KILL) == [(SIGKILL, (S0,))]
    run.exited(S0, -SIGKILL, 30)
    assert run.exit_code() == 0


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (2, 1), (3, 3), (-9, 1), (139, 1)])
@pytest.mark.parametrize("role", ["shard", "worker"])
def test_the_first_failure_counts(role: Role, code: int, expected: int) -> None:
    run = supervisor()
    run.exited(ProcessId(role, 0), code, 1)
    run.exited(W1, 1, 1.5)
    assert run.failure is not None
    assert run.failure.process == ProcessId(role, 0)
    assert run.exit_code() == expected


def test_after_a_failure_the_others_get_a_moment_then_a_word_then_none() -> None:
    run = supervisor()
    run.exited(W0, 1, 0)
    assert sent(run, NOTICE_SECONDS - 0.1) == []
    assert sent(run, NOTICE_SECONDS) == [(SIGTERM, (S0, W1))]
    run.exited(S0, 0, NOTICE_SECONDS + 1)
    assert sent(run, NOTICE_SECONDS + KILL) == [(SIGKILL, (W1,))]
    assert not run.is_over(NOTICE_SECONDS + KILL + 0.1)
    assert run.is_over(NOTICE_SECONDS + KILL + REAP_SECONDS + 0.1)  # whatever became of it


def test_shards_without_any_worker_left_are_not_waited_for() -> None:
    run = supervisor()
    run.exited(W0, 2, 0)
    run.exited(W1, 2, 1)
    assert sent(run, 1 + LONELY_SECONDS - 0.1) == []
    assert sent(run, 1 + LONELY_SECONDS) == [(SIGTERM, (S0,))]
    assert sent(run, 1 + LONELY_SECONDS + KILL) == [(SIGKILL, (S0,))]


def test_the_moment_to_notice_begins_when_nobody_can_reconnect_any_more() -> None:
    run = supervisor(reconnect_seconds=4.0)
    run.exited(W0, 1, 0)
    assert sent(run, 4 + NOTICE_SECONDS - 0.1) == []
    assert sent(run, 4 + NOTICE_SECONDS) == [(SIGTERM, (S0, W1))]


def test_a_failure_while_shards_end_counts() -> None:
    run = supervisor()
    run.exited(W0, 0, 0)
    run.exited(W1, 0, 0)
    run.exited(S0, 1, 1)
    assert run.exit_code() == 1


def test_a_shard_that_is_lost_once_training_is_complete_fails_nothing() -> None:
    run = supervisor(0, S1)
    run.exited(S0, -SIGKILL, 10)
    assert sent(run, 10) == []
    for process in (W0, W1):
        assert run.failure is not None
        run.finished.add(process.index)
        run.exited(process, 0, 11)
    run.exited(S1, 1, 11.5)  # it has noticed that the lead is gone
    assert sent(run, 12) == []
    assert run.is_over(12)
    assert (run.failure, run.exit_code()) == (None, 0)


def test_a_shard_that_has_not_noticed_that_another_is_lost_at_the_end_is_told() -> None:
    run = supervisor(0, S1)
    run.exited(S0, -SIGKILL, 10)
    run.finished = {0, 1}
    run.exited(W0, 0, 11)
    run.exited(W1, 0, 11)
    assert sent(run, 11 + LONELY_SECONDS) == [(SIGTERM, (S1,))]
    run.exited(S1, -SIGTERM, 13)
    assert run.exit_code() == 0


@pytest.mark.parametrize("end", [1, 3, -9])
def test_a_lost_shard_is_blamed_when_a_worker_does_not_end_well(end: int) -> None:
    run = supervisor()
    run.exited(S0, -SIGKILL, 10)
    run.finished = {0, 1}
    run.exited(W0, 0, 11)
    run.exited(W1, end, 11)
    assert run.failure is not None
    assert (run.failure.process, run.exit_code()) == (S0, 1)


def test_a_lost_shard_is_blamed_when_workers_end_without_a_last_record() -> None:
    run = supervisor()
    run.exited(S0, -SIGKILL, 10)
    run.finished = {0}
    for process in (W0, W1):
        run.exited(process, 0, 11)
    assert run.exit_code() == 1


def test_a_shard_that_ends_before_the_workers_is_blamed_unless_somebody_fails_first() -> None:
    run = supervisor()
    run.exited(S0, 0, 0)
    assert run.due(NOTICE_SECONDS - 0.1) == []
    assert run.failure is None
    assert sent(run, NOTICE_SECONDS) == [(SIGTERM, (W0, W1))]
    assert run.failure == run.exits[S0]
    assert run.exit_code() == 1


def test_a_shard_may_end_when_all_workers_have_written_their_last_record() -> None:
    run = supervisor()
    run.finished = {0, 1}
    run.exited(S0, 0, 0)
    assert run.due(100) == []
    run.exited(W0, 0, 101)
    run.exited(W1, 0, 102)
    assert run.exit_code() == 0


def test_an_interrupt_ends_workers_then_shards() -> None:
    run = supervisor()
    run.interrupt(SIGINT, 0)
    assert sent(run, 0) == [(SIGTERM, (W0, W1))]
    run.exited(W0, -SIGTERM, 0.5)
    assert sent(run, 0.5) == []
    run.exited(W1, -SIGTERM, 0.6)
    assert sent(run, 0.6) == [(SIGTERM, (S0,))]
    run.exited(S0, 0, 0.7)
    assert run.is_over(0.7)
    assert run.exit_code() == 130
    assert run.failure is None


def test_an_interrupt_does_not_wait_for_ever() -> None:
    run = supervisor()
    run.interrupt(SIGTERM, 0)
    assert sent(run, 0) == [(SIGTERM, (W0, W1))]
    assert sent(run, DRAIN) == [(SIGTERM, (S0,))]
    assert sent(run, DRAIN + KILL) == [(SIGKILL, (S0, W0, W1))]
    assert run.exit_code() == 143


def test_a_second_interrupt_kills_at_once_and_the_first_one_counts() -> None:
    run = supervisor()
    run.interrupt(SIGINT, 0)
    run.due(0)
    run.interrupt(SIGTERM, 0.1)
    assert sent(run, 0.1) == [(SIGKILL, (S0, W0, W1))]
    assert run.exit_code() == 130


def test_an_interrupt_after_a_failure_does_not_wait_for_anybody_to_notice() -> None:
    run = supervisor()
    run.exited(W0, 1, 0)
    run.interrupt(SIGINT, 1)
    assert sent(run, 1) == [(SIGTERM, (W1,))]
    assert run.exit_code() == 130


# Workers that are started again


def test_a_worker_that_fails_is_started_again_after_a_moment() -> None:
    run = supervisor(3)
    run.exited(W1, -SIGKILL, 10)
    assert run.due(10.4) == []
    note = "worker 1 was killed by SIGKILL: starting it again (1 of 3 restarts in 300 s)"
    assert started(run, 10.5) == [Start(W1, note)]
    assert run.due(11) == []
    assert run.failure is None
    assert (run.num_restarts, run.num_preemptions) == (1, 0)
    assert run.alive() == (S0, W0, W1)
    for process in (W0, W1, S0):
        run.exited(process, 0, 20)
    assert run.due(20) == []
    assert run.is_over(20)
    assert run.exit_code() == 0


def test_one_failure_too_many_ends_the_run_and_tells_how_many_there_were() -> None:
    run = supervisor(2)
    for now, process in ((0.0, W0), (10.0, W1)):
        run.exited(process, 1, now)
        assert len(started(run, now + 1)) == 1
    run.exited(W0, -SIGKILL, 20)
    assert run.failure == run.exits[W0]
    assert run.num_spent_restarts == 2
    assert run.num_restarts == 2
    assert sent(run, 20 + NOTICE_SECONDS) == [(SIGTERM, (S0, W1))]
    assert run.exit_code() == 1


def test_failures_that_are_long_past_are_forgotten() -> None:
    run = supervisor(1)
    for now in (0.0, 300.0, 600.0):
        run.exited(W0, 1, now)
        assert len(started(run, now + 5)) == 1
    assert run.failure is None
    assert run.num_restarts == 3


def test_a_preempted_worker_is_replaced_and_not_counted() -> None:
    run = supervisor(0)
    for now in (0.0, 100.0, 200.0):
        run.exited(W0, PREEMPTED, now)
        assert run.due(now + 0.9) == []
        [start] = started(run, now + 1)
        assert start.process == W0
        assert start.note.startswith("worker 0 was preempted: starting it again (")
    assert (run.num_restarts, run.num_preemptions) == (0, 3)
    assert run.failure is None


def test_wrong_usage_is_never_repeated() -> None:
    run = supervisor(3)
    run.exited(W0, 2, 0)
    assert run.failure == run.exits[W0]
    assert run.num_spent_restarts == 0
    assert sent(run, NOTICE_SECONDS) == [(SIGTERM, (S0, W1))]


@pytest.mark.parametrize("code", [1, PREEMPTED, -SIGKILL])
def test_a_shard_is_never_started_again(code: int) -> None:
    run = supervisor(3)
    run.exited(S0, code, 0)
    assert run.failure == run.exits[S0]
    assert str(run.failure) != "shard 0 was preempted"


def test_shards_are_not_told_to_end_while_a_worker_is_about_to_start() -> None:
    run = supervisor(3)
    run.exited(W1, 1, 0)
    run.exited(W0, 0, 0.1)
    assert not run.is_over(0.2)
    assert len(started(run, 0.5)) == 1
    assert sent(run, 100) == []
    run.exited(W1, 0, 101)
    assert sent(run, 101 + DRAIN + SPARE_SECONDS) == [(SIGTERM, (S0,))]


def test_nobody_is_started_after_the_failure_of_another() -> None:
    run = supervisor(3)
    run.exited(W1, 1, 0)
    run.exited(S0, 1, 0.1)
    assert run.due(1) == []
    run.exited(W0, 3, 1)
    assert run.is_over(1)
    assert run.failure == run.exits[S0]
    assert run.num_restarts == 0


def test_nobody_is_started_after_an_interrupt() -> None:
    run = supervisor(3)
    run.exited(W1, 1, 0)
    run.interrupt(SIGINT, 0.1)
    assert sent(run, 1) == [(SIGTERM, (W0,))]
    run.exited(W0, PREEMPTED, 1)
    assert sent(run, 1) == [(SIGTERM, (S0,))]
    run.exited(S0, 0, 1)
    assert run.is_over(1)
    assert (run.num_restarts, run.num_preemptions) == (0, 0)


def test_nobody_is_started_for_a_shard_that_is_gone() -> None:
    run = supervisor(3)
    run.exited(S0, 0, 0)
    run.exited(W0, 3, 0.1)
    run.exited(W1, 3, 0.2)
    assert run.due(NOTICE_SECONDS - 0.1) == []
    assert not run.is_over(NOTICE_SECONDS - 0.1)
    run.due(NOTICE_SECONDS)
    assert run.failure == run.exits[S0]
    assert run.is_over(NOTICE_SECONDS)


def test_a_script_that_fails_after_it_has_finished_is_not_started_again() -> None:
    run = supervisor(3)
    run.finished = {0, 1}
    run.exited(W0, 1, 0)
    assert run.failure == run.exits[W0]


def test_a_worker_that_is_preempted_when_it_has_finished_has_finished() -> None:
    run = supervisor(3)
    run.finished = {0, 1}
    run.exited(W0, PREEMPTED, 0)
    run.exited(W1, 0, 0)
    assert sent(run, DRAIN + SPARE_SECONDS) == [(SIGTERM, (S0,))]
    assert (run.failure, run.num_preemptions) == (None, 0)


# A job that has not taken a step


@pytest.mark.parametrize("joined", [set(), {0, 1}])
def test_a_script_that_fails_before_the_first_step_ends_the_run_at_once(joined: set[int]) -> None:
    run = before_training(3)
    run.joined = joined
    run.exited(W1, 1, 0)
    assert run.failure == run.exits[W1]
    assert sent(run, LONELY_SECONDS) == [(SIGTERM, (S0, W0))]
    assert sent(run, 2 * LONELY_SECONDS) == [(SIGKILL, (S0, W0))]
    assert (run.num_restarts, run.exit_code()) == (0, 1)


@pytest.mark.parametrize("code", [3, PREEMPTED, -SIGKILL])
def test_a_worker_that_failed_for_a_reason_outside_its_script_starts_again(code: int) -> None:
    run = before_training(3)
    run.exited(W1, code, 0)
    assert [start.process for start in started(run, 2)] == [W1]


def test_a_worker_whose_next_process_fails_early_is_one_of_a_job_that_trains() -> None:
    run = supervisor(3)
    run.joined = {0, 1}
    for now in (0.0, 10.0):
        run.exited(W1, 1, now)
        assert [start.process for start in started(run, now + 5)] == [W1]


@pytest.mark.parametrize("joined", [set(), {0}])
def test_a_worker_that_ends_without_having_joined_is_no_success(joined: set[int]) -> None:
    run = before_training(3)
    run.joined = joined
    run.finished = {1}  # its session has ended well
    run.exited(W1, 0, 0)
    assert run.failure == run.exits[W1]
    assert sent(run, LONELY_SECONDS) == [(SIGTERM, (S0, W0))]
    assert run.exit_code() == 1


def test_a_worker_that_comes_when_the_job_is_complete_has_not_failed() -> None:
    run = supervisor(3)
    run.joined = run.finished = {0}
    run.exited(W0, 0, 0)
    run.exited(W1, 0, 0)
    run.exited(S0, 0, 0)
    assert run.exit_code() == 0


# Workers that the others have finished without


def test_a_job_can_be_complete_without_a_worker_that_died() -> None:
    run = supervisor(3)
    run.finished = {0}
    run.exited(W1, -SIGKILL, 0)
    run.exited(W0, 0, 0.1)
    run.exited(S0, 0, 0.2)
    assert run.due(0.3) == []
    assert run.is_over(0.3)
    assert run.exit_code() == 0
    assert run.num_restarts == 0


@pytest.mark.parametrize("code", [0, 1, 2, 3, -SIGKILL])
def test_what_a_worker_does_after_the_job_is_complete_is_no_failure(code: int) -> None:
    run = supervisor(0)
    run.finished = {0}
    run.exited(S0, 0, 0)
    run.exited(W1, code, 0.1)
    assert run.due(100) == []
    run.exited(W0, 0, 100)
    assert run.is_over(100)
    assert run.exit_code() == 0


def test_a_worker_that_hangs_when_all_have_ended_is_told_and_then_killed() -> None:
    run = supervisor(3)
    run.finished = {0}
    run.exited(W0, 0, 0)
    run.exited(S0, 0, 1)
    assert sent(run, 1) == []
    [order] = run.due(1 + LONELY_SECONDS)
    assert not isinstance(order, Start)
    assert (order.signal, order.processes) == (SIGTERM, (W1,))
    assert order.note == "worker 1 still there, although the job is complete: sending SIGTERM"
    assert sent(run, 1 + LONELY_SECONDS + KILL) == [(SIGKILL, (W1,))]
    assert sent(run, 1 + LONELY_SECONDS + KILL + 1) == []
    run.exited(W1, -SIGKILL, 20)
    assert run.is_over(20)
    assert run.exit_code() == 0


def test_a_worker_that_hangs_waits_for_those_that_have_finished() -> None:
    run = supervisor(3, W2)
    run.finished = {0, 2}
    run.exited(S0, 0, 0)
    run.exited(W0, 0, 0)
    assert run.due(100) == []  # worker 2 still works, without shards
    run.exited(W2, 0, 100)
    assert run.due(100) == []
    assert sent(run, 100 + LONELY_SECONDS) == [(SIGTERM, (W1,))]


def test_a_job_is_complete_when_all_shards_have_ended() -> None:
    run = supervisor(3, S1)
    run.finished = {0}
    run.exited(W0, 0, 0)
    run.exited(S0, 0, 0)
    run.exited(W1, 3, 0)
    assert run.due(1) == []
    run.exited(S1, 0, 1)
    assert run.due(1) == []
    assert run.is_over(1)
    assert run.exit_code() == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from([S0, S1, W0, W1, W2]),
            st.sampled_from([0, 0, 1, 2, 3, PREEMPTED, -SIGKILL]),
            st.booleans(),
            st.sampled_from([0.0, 0.1, 1.0, 10.0]),
        )
    ),
    st.integers(0, 2),
)
def test_a_run_ends_when_its_processes_do(
    exits: list[tuple[ProcessId, int, bool, float]], max_restarts: int
) -> None:
    run, now = supervisor(max_restarts, S1, W2), 0.0
    for process, code, has_finished, wait_seconds in exits:
        now += wait_seconds
        run.due(now)
        if process in run.alive():
            if process.role == "worker" and has_finished:
                run.finished.add(process.index)
            run.exited(process, code, now)
    for _ in range(20):  # from here on nobody fails, and shards end when they have no workers
        now += 1
        run.due(now)
        for process in run.alive({"worker"}) or run.alive():
            run.exited(process, 0, now)
    assert run.is_over(now)
    assert run.due(now + 1000) == []


def test_an_exit_is_described_in_words() -> None:
    run = supervisor()
    run.exited(W0, -SIGKILL, 0)
    run.exited(W1, 7, 0)
    run.exited(S0, -64, 0)
    assert str(run.exits[W0]) == "worker 0 was killed by SIGKILL"
    assert str(run.exits[W1]) == "worker 1 ended with exit code 7"
    assert str(run.exits[S0]) == "shard 0 was killed by SIGRTMAX"
