"""Who a shard knows, whose stream counts, and who is lost."""

from __future__ import annotations

import asyncio

import pytest

from ps_core.errors import JobFailedError, MismatchError
from ps_core.v1 import shard_pb2
from ps_server.roster import Rate, Roster

GRACE_SECONDS = 3.0
WORKER = shard_pb2.WorkerId(rank=1, incarnation=11)


@pytest.fixture
def roster() -> Roster:
    known = Roster(GRACE_SECONDS)
    known.admit(WORKER, pid=42, host="here", deadline=100.0)
    return known


def test_the_same_process_may_come_again(roster: Roster) -> None:
    assert roster.admit(WORKER, 42, "here", 100.0) is roster[1]


def test_another_process_with_the_same_rank_is_refused(roster: Roster) -> None:
    other = shard_pb2.WorkerId(rank=1, incarnation=12)
    with pytest.raises(MismatchError, match=r"pid 42 on here.*own rank"):
        roster.admit(other, 43, "there", 100.0)


@pytest.mark.parametrize(("rank", "incarnation"), [(0, 11), (1, 12)])
def test_a_stranger_is_not_identified(roster: Roster, rank: int, incarnation: int) -> None:
    with pytest.raises(MismatchError, match=f"worker {rank} has not joined"):
        roster.identify(shard_pb2.WorkerId(rank=rank, incarnation=incarnation))


def test_a_closed_stream_loses_its_worker_after_the_grace_time(roster: Roster) -> None:
    rank, outbox = roster.open(WORKER)
    roster.close(rank, outbox, now=10.0)
    assert roster.lost(12.9) == []
    assert roster.lost(13.0) == [1]
    assert roster.lost(14.0) == []


def test_a_worker_that_opens_its_stream_again_is_not_lost(roster: Roster) -> None:
    rank, outbox = roster.open(WORKER)
    roster.close(rank, outbox, now=10.0)
    roster.open(WORKER)
    assert roster.lost(99.0) == []


def test_a_worker_that_has_left_is_not_lost(roster: Roster) -> None:
    rank, outbox = roster.open(WORKER)
    roster.leave(rank)
    roster.close(rank, outbox, now=10.0)
    assert roster.lost(99.0) == []


def test_a_worker_that_never_opens_a_stream_is_lost_after_its_deadline(roster: Roster) -> None:
    assert roster.lost(102.9) == []
    assert roster.lost(103.0) == [1]


def test_a_second_stream_ends_the_first(roster: Roster) -> None:
    _, first = roster.open(WORKER)
    rank, second = roster.open(WORKER)
    with pytest.raises(JobFailedError, match="another stream"):
        asyncio.run(first.get())
    roster.close(rank, first, now=10.0)
    assert roster[1].outbox is second


def test_a_rate_settles_on_the_growth_of_its_counter() -> None:
    rate = Rate()
    for second in range(1, 60):
        rate.update(second * 100.0, elapsed_seconds=1.0)
    assert rate.per_second == pytest.approx(100.0, rel=1e-3)
    for _ in range(60):
        rate.update(5900.0, elapsed_seconds=1.0)
    assert rate.per_second == pytest.approx(0.0, abs=0.01)
