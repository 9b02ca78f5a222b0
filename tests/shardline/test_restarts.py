import pytest

from shardline.restarts import PREEMPTED, QUICK_SECONDS, REPLICA_SECONDS, Restarts


def delays(restarts: Restarts, rank: int, code: int, count: int, ran_seconds: float) -> list[float]:
    """How long a worker waits that ends so often, each time after `ran_seconds`."""
    found, now = [], 0.0
    for _ in range(count):
        again = restarts.ended(rank, code, now)
        assert again is not None
        found.append(again.delay_seconds)
        now += again.delay_seconds
        restarts.started(rank, now)
        now += ran_seconds
    return found


def test_there_are_so_many_restarts_in_the_window_and_no_more() -> None:
    restarts = Restarts(max_restarts=3, window_seconds=300)
    whys = []
    for now in (0, 100, 299):
        again = restarts.ended(rank=now % 2, code=1, now=now)
        assert again is not None
        whys.append(again.why)
    assert whys == [f"{count} of 3 restarts in 300 s" for count in (1, 2, 3)]
    assert restarts.ended(0, 1, 299.9) is None
    assert restarts.num_recent(299.9) == 3


def test_restarts_that_have_left_the_window_do_not_count() -> None:
    restarts = Restarts(max_restarts=2, window_seconds=10)
    assert restarts.ended(0, 1, 0)
    assert restarts.ended(0, 1, 5)
    assert restarts.ended(0, 1, 9.9) is None
    again = restarts.ended(0, 1, 10)
    assert again is not None
    assert again.why == "2 of 2 restarts in 10 s"
    assert restarts.ended(0, 1, 14.9) is None
    assert restarts.ended(0, 1, 15)


@pytest.mark.parametrize("code", [1, 3, -9, -15, 139])
def test_without_restarts_no_failure_is_forgiven(code: int) -> None:
    assert Restarts(0, 300).ended(0, code, 1) is None


def test_a_preempted_worker_is_replaced_however_often_it_happens() -> None:
    restarts = Restarts(max_restarts=1, window_seconds=300)
    for now in range(2000):
        assert restarts.ended(0, PREEMPTED, now)
        restarts.started(0, now)
    assert restarts.num_recent(2000) == 0
    assert restarts.ended(0, 1, 2000)


def test_a_worker_that_keeps_failing_quickly_waits_longer_and_longer() -> None:
    assert delays(Restarts(9, 1e9), 0, 1, 6, ran_seconds=1) == [0.5, 1, 2, 4, 4, 4]
    slow = delays(Restarts(9, 1e9), 0, 1, 4, ran_seconds=QUICK_SECONDS)
    assert slow == [0.5, 0.5, 0.5, 0.5]


def test_a_worker_that_is_preempted_again_and_again_never_spins() -> None:
    assert delays(Restarts(0, 1), 0, PREEMPTED, 5, ran_seconds=0) == [1, 1, 2, 4, 4]


def test_patience_is_with_each_worker_and_comes_back() -> None:
    restarts = Restarts(99, 1e9)
    delays(restarts, 0, 1, 4, ran_seconds=1)
    other = restarts.ended(1, 1, 20)
    assert other is not None
    assert other.delay_seconds == 0.5
    restarts.started(0, 20)
    recovered = restarts.ended(0, 1, 20 + QUICK_SECONDS)
    assert recovered is not None
    assert recovered.delay_seconds == 0.5


def test_the_workers_of_a_replica_count_as_one() -> None:
    restarts = Restarts(max_restarts=1, window_seconds=300, num_stages=2)
    assert restarts.ended(2, -9, 0)
    again = restarts.ended(3, 3, 1)
    assert again is not None
    assert again.why == "with the rest of its replica"
    assert restarts.num_recent(1) == 1


@pytest.mark.parametrize(("rank", "seconds"), [(2, 1.0), (3, REPLICA_SECONDS), (0, 1.0), (1, 1.0)])
def test_what_is_no_part_of_a_replicas_death_counts_for_itself(rank: int, seconds: float) -> None:
    restarts = Restarts(max_restarts=1, window_seconds=300, num_stages=2)
    assert restarts.ended(2, -9, 0)
    assert restarts.ended(rank, 1, seconds) is None
