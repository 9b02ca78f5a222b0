from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ps_server.policy import SYNC, Consistency
from ps_server.seals import Seals

BOTH = frozenset({0, 1})


def backups(count: int) -> Consistency:
    return Consistency(quorum=None, bound=0, backups=count)


def test_a_worker_counts_once_it_is_ready_on_every_shard() -> None:
    seals = Seals(backups(1), BOTH)
    seals.ready(0, 1, 0)
    assert seals.decide(0, {0, 1}, 2) == frozenset()
    seals.ready(1, 1, 0)
    assert seals.decide(0, {0, 1}, 2) == {1}


def test_repeated_reports_do_not_stand_for_another_shard_or_worker() -> None:
    seals = Seals(backups(1), BOTH)
    for _ in range(3):
        seals.ready(0, 0, 0)
    seals.ready(1, 1, 0)
    assert seals.decide(0, {0, 1, 2}, 3) == frozenset()


def test_a_step_waits_for_all_members_but_the_backups() -> None:
    seals = Seals(backups(1), frozenset({0}))
    seals.ready(0, 2, 0)
    assert seals.decide(0, {0, 1, 2}, 3) == frozenset()
    seals.ready(0, 0, 0)
    assert seals.decide(0, {0, 1, 2}, 3) == {0, 2}


def test_each_step_is_decided_once() -> None:
    seals = Seals(backups(1), frozenset({0}))
    seals.ready(0, 0, 0)
    assert seals.decide(0, {0, 1}, 2) == {0}
    seals.ready(0, 1, 0)
    assert seals.decide(0, {0, 1}, 2) == frozenset()


def test_reports_of_another_step_do_not_count() -> None:
    seals = Seals(backups(1), frozenset({0}))
    seals.ready(0, 0, 1)
    assert seals.decide(0, {0, 1}, 2) == frozenset()
    assert seals.decide(1, {0, 1}, 2) == {0}
    seals.ready(0, 1, 1)  # too late, and not for step 2
    assert seals.decide(2, {0, 1}, 2) == frozenset()


def test_who_is_gone_or_not_able_is_not_named() -> None:
    seals = Seals(backups(1), frozenset({0}))
    seals.ready(0, 0, 0)
    seals.ready(0, 1, 0)
    seals.forget(0)
    assert seals.decide(0, {0, 1, 2}, 3) == frozenset()
    seals.ready(0, 2, 0)
    assert seals.decide(0, {1}, 3) == {1}, "fewer are able than an update waits for: all of them"


def test_with_as_many_backups_as_members_one_contributor_is_needed() -> None:
    seals = Seals(backups(3), frozenset({0}))
    assert seals.decide(0, {0, 1}, 2) == frozenset()
    seals.ready(0, 1, 0)
    assert seals.decide(0, {0, 1}, 2) == {1}


def test_without_backups_nothing_is_sealed() -> None:
    seals = Seals(SYNC, frozenset({0}))
    seals.ready(0, 0, 0)
    assert seals.decide(0, {0}, 1) == frozenset()


@given(st.integers(1, 3), st.permutations([(s, w) for s in range(2) for w in range(4)]))
def test_whatever_the_order_the_first_that_are_complete_are_named(
    count: int, reports: list[tuple[int, int]]
) -> None:
    seals, heard = Seals(backups(count), BOTH), Counter[int]()
    for shard, worker in reports:
        seals.ready(shard, worker, 0)
        heard[worker] += 1
        named = seals.decide(0, range(4), 4)
        if named:
            assert named == {worker for worker, times in heard.items() if times == 2}
            assert len(named) == 4 - count
            return
    raise AssertionError("all are complete, and nothing was sealed")
