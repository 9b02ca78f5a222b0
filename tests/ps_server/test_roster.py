"""Who a shard knows, whose stream counts, who is lost, and what is answered again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ps_core.errors import (
    EvictedError,
    JobFailedError,
    MismatchError,
    ProtocolError,
    ShardlineError,
    ShardUnreachableError,
)
from ps_core.v1 import shard_pb2
from ps_core.v1.shard_pb2 import ExchangeResponse, WorkerId
from ps_server.roster import Peer, Rate, Roster
from tests.ps_server.drain import drain

GRACE_SECONDS = 3.0
WORKER = WorkerId(rank=1, incarnation=11)
OTHER = WorkerId(rank=1, incarnation=12)
"""Another process of the same rank."""


@pytest.fixture
def roster() -> Roster:
    known = Roster(GRACE_SECONDS)
    admit(known, WORKER)
    return known


def admit(roster: Roster, worker: WorkerId) -> Peer:
    return roster.admit(worker, pid=42, host="here", deadline=100.0)


def leases(number: int) -> ExchangeResponse:
    """An answer that says which one it is."""
    message = ExchangeResponse(leases=shard_pb2.Leases(loader=number))
    return message


# -- Who is known ----------------------------------------------------------------------------------


def test_the_same_process_may_come_again(roster: Roster) -> None:
    assert admit(roster, WORKER) is roster[1]


@pytest.mark.parametrize(("rank", "incarnation"), [(0, 11), (1, 12)])
def test_a_stranger_is_not_identified(roster: Roster, rank: int, incarnation: int) -> None:
    with pytest.raises(MismatchError, match=f"worker {rank} has not joined"):
        roster.identify(WorkerId(rank=rank, incarnation=incarnation))


def test_workers_are_listed_by_rank(roster: Roster) -> None:
    admit(roster, WorkerId(rank=4, incarnation=1))
    admit(roster, WorkerId(rank=0, incarnation=1))
    assert [rank for rank, _ in roster] == [0, 1, 4]
    assert str(roster[4]) == "pid 42 on here"


def test_a_worker_is_alive_while_it_has_a_stream(roster: Roster) -> None:
    assert not roster.is_alive(0)
    assert not roster.is_alive(1)
    rank, outbox = roster.open(WORKER)
    assert roster.is_alive(1)
    roster.close(rank, outbox, now=10.0)
    assert not roster.is_alive(1)


# -- Fences ----------------------------------------------------------------------------------------

NOT_WELCOME = r"worker 1 was evicted \(it was silent\): it may come back as a new one"


def test_the_stream_of_a_fenced_process_ends_with_the_reason_after_what_it_was_owed(
    roster: Roster,
) -> None:
    _, outbox = roster.open(WORKER)
    outbox.put(b"owed")
    roster.fence(1, 11, "it was silent")
    owed, error = drain(outbox)
    assert owed == b"owed"
    assert isinstance(error, EvictedError)
    assert str(error) == NOT_WELCOME.replace("\\", "")
    assert not roster.is_alive(1)
    assert roster.is_fenced(1)


def test_what_a_fenced_process_still_says_is_not_taken(roster: Roster) -> None:
    rank, outbox = roster.open(WORKER)
    roster.check_stream(rank, outbox)
    roster.fence(1, 11, "it was silent")
    with pytest.raises(EvictedError, match=NOT_WELCOME):
        roster.check_stream(rank, outbox)


def test_a_fenced_process_can_neither_join_nor_call_nor_open_a_stream(roster: Roster) -> None:
    roster.fence(1, 11, "it was silent")
    with pytest.raises(EvictedError, match=NOT_WELCOME):
        admit(roster, WORKER)
    with pytest.raises(EvictedError, match=NOT_WELCOME):
        roster.identify(WORKER)
    with pytest.raises(EvictedError, match=NOT_WELCOME):
        roster.open(WORKER)


def test_a_process_that_never_came_may_be_fenced_too(roster: Roster) -> None:
    roster.fence(7, 70, "it was silent")
    with pytest.raises(EvictedError):
        admit(roster, WorkerId(rank=7, incarnation=70))
    admit(roster, WorkerId(rank=7, incarnation=71))


def test_a_fence_of_an_older_process_leaves_the_present_one_alone(roster: Roster) -> None:
    rank, outbox = roster.open(WORKER)
    roster.fence(1, 10, "late news")
    roster.check_stream(rank, outbox)
    assert roster.is_alive(1)
    assert not roster.is_fenced(1)
    assert drain(outbox) == []


def test_a_fenced_process_is_not_lost_as_well(roster: Roster) -> None:
    rank, outbox = roster.open(WORKER)
    roster.fence(1, 11, "it was silent")
    roster.close(rank, outbox, now=10.0)
    assert roster.lost(1000.0) == []


# -- Another process of the same rank --------------------------------------------------------------


def test_another_process_waits_for_the_lead_s_word_about_the_one_before(roster: Roster) -> None:
    rank, outbox = roster.open(WORKER)
    with pytest.raises(ShardUnreachableError, match=r"still another process \(pid 42 on here\)"):
        admit(roster, OTHER)
    roster.close(rank, outbox, now=10.0)  # its stream may come back
    with pytest.raises(ShardUnreachableError):
        admit(roster, OTHER)
    assert roster.identify(WORKER) == 1
    roster.fence(1, 11, "it was silent")
    assert admit(roster, OTHER) is roster[1]
    assert roster.identify(OTHER) == 1


def fence(roster: Roster) -> None:
    roster.fence(1, 11, "it was silent")


def leave(roster: Roster) -> None:
    roster.leave(1)


def lose(roster: Roster) -> None:
    rank, outbox = roster.open(WORKER)
    roster.close(rank, outbox, now=10.0)
    assert roster.lost(10.0 + GRACE_SECONDS) == [1]


@pytest.mark.parametrize("go", [fence, leave, lose])
def test_another_process_takes_the_place_of_one_that_is_gone_which_is_fenced(
    roster: Roster, go: Callable[[Roster], None]
) -> None:
    roster.open(WORKER)
    assert not roster.is_repeat(1, 1)
    roster.answer(1, leases(1))
    go(roster)
    peer = admit(roster, OTHER)
    assert roster[1] is peer
    assert (peer.incarnation, peer.last_number, peer.answers) == (12, 0, {})
    assert (peer.outbox, peer.opened, peer.left, peer.lost) == (None, False, False, False)
    with pytest.raises(EvictedError):
        admit(roster, WORKER)
    _, outbox = roster.open(OTHER)
    assert drain(outbox) == []
    assert not roster.is_repeat(1, 1)


def test_the_stream_of_a_process_that_has_left_ends_when_another_takes_its_place(
    roster: Roster,
) -> None:
    _, outbox = roster.open(WORKER)
    roster.leave(1)
    admit(roster, OTHER)
    [error] = drain(outbox)
    assert isinstance(error, EvictedError)
    assert "another process has taken its rank" in str(error)


def test_a_worker_that_was_lost_and_comes_back_before_it_is_fenced_keeps_its_rank(
    roster: Roster,
) -> None:
    lose(roster)
    roster.open(WORKER)
    with pytest.raises(ShardUnreachableError):
        admit(roster, OTHER)


def test_the_end_of_an_older_process_s_stream_does_not_close_the_new_one_s(roster: Roster) -> None:
    rank, old = roster.open(WORKER)
    roster.fence(1, 11, "it was silent")
    admit(roster, OTHER)
    _, new = roster.open(OTHER)
    roster.close(rank, old, now=10.0)
    assert roster.is_alive(1)
    assert roster.lost(1000.0) == []
    with pytest.raises(EvictedError):
        roster.check_stream(rank, old)
    roster.check_stream(rank, new)


def test_another_process_that_never_opens_a_stream_is_lost_after_its_own_deadline(
    roster: Roster,
) -> None:
    roster.fence(1, 11, "it was silent")
    roster.admit(OTHER, 43, "there", deadline=200.0)
    assert roster.lost(202.9) == []
    assert roster.lost(203.0) == [1]


# -- Streams ---------------------------------------------------------------------------------------


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


def test_a_second_stream_ends_the_first_with_an_error_after_which_a_client_tries_again(
    roster: Roster,
) -> None:
    _, first = roster.open(WORKER)
    rank, second = roster.open(WORKER)
    [error] = drain(first)
    assert isinstance(error, ShardUnreachableError)
    assert "another stream" in str(error)
    with pytest.raises(ShardUnreachableError, match="another stream"):
        roster.check_stream(rank, first)
    roster.close(rank, first, now=10.0)
    assert roster[1].outbox is second


@pytest.mark.parametrize(
    ("failure", "ends"), [(None, [None]), (JobFailedError("worker 2 died"), [])]
)
def test_the_end_of_the_job_ends_every_open_stream(
    roster: Roster, failure: ShardlineError | None, ends: list[None]
) -> None:
    admit(roster, WorkerId(rank=0, incarnation=5))  # it has no stream
    _, outbox = roster.open(WORKER)
    outbox.put(b"owed")
    roster.end_streams(failure)
    assert drain(outbox) == [b"owed", *ends, *([failure] if failure else [])]


# -- Numbered requests -----------------------------------------------------------------------------


def test_a_request_that_comes_again_is_not_new_and_is_answered_as_before(roster: Roster) -> None:
    roster.open(WORKER)
    assert not roster.is_repeat(1, 1)
    roster.answer(1, leases(1))
    assert not roster.is_repeat(1, 2)
    roster.answer(1, leases(2))
    _, outbox = roster.open(WORKER)
    assert roster.is_repeat(1, 1)
    assert roster.is_repeat(1, 2)
    assert drain(outbox) == [
        ExchangeResponse(leases=shard_pb2.Leases(loader=1), number=1),
        ExchangeResponse(leases=shard_pb2.Leases(loader=2), number=2),
    ]


def test_a_request_that_comes_again_before_its_answer_is_answered_once(roster: Roster) -> None:
    roster.open(WORKER)
    assert not roster.is_repeat(1, 1)
    _, outbox = roster.open(WORKER)
    assert roster.is_repeat(1, 1)
    roster.answer(1, leases(1))
    assert drain(outbox) == [ExchangeResponse(leases=shard_pb2.Leases(loader=1), number=1)]


def test_an_answer_for_a_worker_without_a_stream_waits_for_the_repeat(roster: Roster) -> None:
    rank, outbox = roster.open(WORKER)
    assert not roster.is_repeat(1, 1)
    roster.close(rank, outbox, now=10.0)
    roster.answer(1, leases(1))
    assert drain(outbox) == []
    _, outbox = roster.open(WORKER)
    assert drain(outbox) == []
    assert roster.is_repeat(1, 1)
    assert len(drain(outbox)) == 1


@pytest.mark.parametrize("number", [0, 2, 3, 2**64 - 1])
def test_a_request_out_of_turn_is_refused_and_changes_nothing(roster: Roster, number: int) -> None:
    with pytest.raises(ProtocolError, match=f"worker 1 sends request {number} after request 0"):
        roster.is_repeat(1, number)
    assert not roster.is_repeat(1, 1)


def test_only_the_latest_answers_are_kept(roster: Roster) -> None:
    _, outbox = roster.open(WORKER)
    for number in range(1, 1001):
        assert not roster.is_repeat(1, number)
        roster.answer(1, leases(number))
    assert len(drain(outbox)) == 1000
    assert sorted(roster[1].answers) == list(range(937, 1001))  # 64 of them
    assert roster.is_repeat(1, 936)
    assert drain(outbox) == []
    assert roster.is_repeat(1, 937)
    assert len(drain(outbox)) == 1


def test_what_a_worker_is_told_unasked_is_told_on_its_stream_if_it_has_one(roster: Roster) -> None:
    refused = ExchangeResponse(refused=shard_pb2.Refused(next_step=7))
    roster.tell(1, refused)
    _, outbox = roster.open(WORKER)
    assert drain(outbox) == []
    roster.tell(1, refused)
    assert drain(outbox) == [refused]


# -- Rates -----------------------------------------------------------------------------------------


def test_a_rate_settles_on_the_growth_of_its_counter() -> None:
    rate = Rate()
    for second in range(1, 60):
        rate.update(second * 100.0, elapsed_seconds=1.0)
    assert rate.per_second == pytest.approx(100.0, rel=1e-3)
    for _ in range(60):
        rate.update(5900.0, elapsed_seconds=1.0)
    assert rate.per_second == pytest.approx(0.0, abs=0.01)


def test_bytes_become_rates(roster: Roster) -> None:
    roster[1].received_bytes = 6000
    roster.update_rates(elapsed_seconds=6.0)
    assert roster[1].rate.per_second == pytest.approx(1000.0)
