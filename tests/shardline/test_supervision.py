from signal import SIGINT, SIGKILL, SIGTERM, Signals

import pytest

from shardline.supervision import (
    LONELY_SECONDS,
    NOTICE_SECONDS,
    REAP_SECONDS,
    SPARE_SECONDS,
    ProcessId,
    Role,
    Supervisor,
)

S0, W0, W1 = ProcessId("shard", 0), ProcessId("worker", 0), ProcessId("worker", 1)
DRAIN = 2.0
KILL = DRAIN + SPARE_SECONDS  # after a word


def supervisor() -> Supervisor:
    return Supervisor([S0, W0, W1], drain_seconds=DRAIN)


def sent(run: Supervisor, now: float) -> list[tuple[Signals, tuple[ProcessId, ...]]]:
    return [(order.signal, order.processes) for order in run.due(now)]


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
    run = Supervisor([S0, W0, W1], DRAIN, reconnect_seconds=4.0)
    run.exited(W0, 1, 0)
    assert sent(run, 4 + NOTICE_SECONDS - 0.1) == []
    assert sent(run, 4 + NOTICE_SECONDS) == [(SIGTERM, (S0, W1))]


def test_a_failure_while_shards_end_counts() -> None:
    run = supervisor()
    run.exited(W0, 0, 0)
    run.exited(W1, 0, 0)
    run.exited(S0, 1, 1)
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


def test_an_exit_is_described_in_words() -> None:
    run = supervisor()
    run.exited(W0, -SIGKILL, 0)
    run.exited(W1, 7, 0)
    run.exited(S0, -64, 0)
    assert str(run.exits[W0]) == "worker 0 was killed by SIGKILL"
    assert str(run.exits[W1]) == "worker 1 ended with exit code 7"
    assert str(run.exits[S0]) == "shard 0 was killed by SIGRTMAX"
