"""A worker's requests to the lead, and what it is told that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ps_core import dialogue
from ps_core.errors import ProtocolError, UsageError
from ps_core.exchange import Arrival, Grant, Position, Purpose
from ps_core.leases import Lease, PassSpec
from ps_core.point import Point
from ps_core.v1 import shard_pb2
from ps_core.v1.shard_pb2 import ExchangeRequest, ExchangeResponse
from ps_server import requests
from ps_server.orders import Met, Readmitted
from tests.ps_server.desk import Desk

SPEC = PassSpec(num_samples=10, batch_size=4)


@pytest.fixture
def desk() -> Desk:
    """A job of two workers that has started."""
    desk = Desk()
    desk.start()
    return desk


def ask(desk: Desk, rank: int, **fields: Any) -> ExchangeResponse | None:  # noqa: ANN401 - a message
    return requests.obey(desk.office, rank, ExchangeRequest(**fields))


def granted(answer: ExchangeResponse | None) -> Grant:
    assert answer is not None
    assert answer.WhichOneof("message") == "leases"
    return dialogue.decode_grant(answer.leases)


def test_a_request_for_samples_is_answered_with_a_lease(desk: Desk) -> None:
    wanted = dialogue.encode_lease_request(3, SPEC)
    # Striped: worker 1 gets the second batch although it asks first.
    assert granted(ask(desk, 1, lease=wanted)) == Grant(0, (Lease(1, 3, 0, 4, 4),))
    assert granted(ask(desk, 0, lease=wanted)) == Grant(0, (Lease(2, 3, 0, 0, 4),))
    assert granted(ask(desk, 0, lease=wanted)) == Grant(0, (Lease(3, 3, 0, 8, 2),))
    assert granted(ask(desk, 0, lease=wanted)) == Grant(0, ())


def give_back(leases: Sequence[int], *, declined: bool = False) -> shard_pb2.LeaseRequest:
    return shard_pb2.LeaseRequest(returned=leases, declined=declined)


def test_what_is_given_back_is_not_answered(desk: Desk) -> None:
    [lease] = granted(ask(desk, 0, lease=dialogue.encode_lease_request(0, SPEC))).leases
    assert ask(desk, 0, lease=give_back([lease.id])) is None
    totals = desk.office.totals()
    assert totals is not None
    assert (totals.returned, totals.granted) == (4, 0)


def test_what_is_declined_twice_is_abandoned(desk: Desk) -> None:
    desk.office.idle(1)  # so that it comes back to the same worker
    desk.office.leave(1, shard_pb2.FAREWELL_FINISHED, "")
    wanted = dialogue.encode_lease_request(0, PassSpec(4, 4))
    for _ in range(2):
        [lease] = granted(ask(desk, 0, lease=wanted)).leases
        ask(desk, 0, lease=give_back([lease.id], declined=True))
    assert granted(ask(desk, 0, lease=wanted)).leases == ()
    totals = desk.office.totals()
    assert totals is not None
    assert (totals.returned, totals.abandoned) == (4, 4)


def test_one_request_may_give_back_and_ask(desk: Desk) -> None:
    wanted = dialogue.encode_lease_request(0, PassSpec(4, 4))
    [lease] = granted(ask(desk, 0, lease=wanted)).leases
    wanted.returned.append(lease.id)
    assert granted(ask(desk, 0, lease=wanted)).leases == (Lease(2, 0, 0, 0, 4),)


def test_a_request_that_wants_nothing_changes_nothing(desk: Desk) -> None:
    assert ask(desk, 0, lease=shard_pb2.LeaseRequest()) is None


def test_a_lease_of_another_worker_cannot_be_given_back(desk: Desk) -> None:
    [lease] = granted(ask(desk, 0, lease=dialogue.encode_lease_request(0, SPEC))).leases
    with pytest.raises(ProtocolError, match="worker 1 names lease 1, which it does not hold"):
        ask(desk, 1, lease=give_back([lease.id]))


def test_a_worker_that_has_not_entered_is_granted_nothing(desk: Desk) -> None:
    desk.join(2)
    with pytest.raises(ProtocolError, match="worker 2 asks for samples and does not take part"):
        ask(desk, 2, lease=dialogue.encode_lease_request(0, SPEC))


def test_a_worker_that_has_not_entered_meets_nobody(desk: Desk) -> None:
    desk.join(2)
    meet = dialogue.encode_meet(Arrival(Purpose.MEAN, 0, (1.0,), point=Point(0, 0, 1)))
    with pytest.raises(ProtocolError, match="worker 2 meets others and does not take part"):
        ask(desk, 2, meet=meet)


def test_a_worker_that_waits_may_ask_for_a_share_of_a_global_batch(desk: Desk) -> None:
    desk.office.idle(1)
    wanted = dialogue.encode_lease_request(0, PassSpec(10, 0, global_batch_size=4))
    assert granted(ask(desk, 1, lease=wanted)).leases


def test_workers_that_disagree_about_a_pass_are_told(desk: Desk) -> None:
    ask(desk, 0, lease=dialogue.encode_lease_request(0, SPEC))
    with pytest.raises(UsageError, match="num_samples=11 on worker 1"):
        ask(desk, 1, lease=dialogue.encode_lease_request(0, PassSpec(11, 4)))


def test_a_pass_over_more_samples_than_there_can_be_is_refused(desk: Desk) -> None:
    wanted = dialogue.encode_lease_request(0, PassSpec(2**64 - 1, 4))
    with pytest.raises(ProtocolError, match="never ends"):
        ask(desk, 0, lease=wanted)


def test_a_worker_that_goes_idle_is_not_answered(desk: Desk) -> None:
    assert ask(desk, 1, idle=shard_pb2.Idle()) is None
    assert desk.office.state(1) == "idle"


def test_a_meeting_is_answered_when_all_have_come(desk: Desk) -> None:
    desk.answers.clear()
    for rank, value in ((1, 3.0), (0, 1.0)):
        assert not desk.answers
        arrival = Arrival(Purpose.MEAN, 0, (value,), weight=1.0 + 2 * rank)
        assert ask(desk, rank, meet=dialogue.encode_meet(arrival)) is None
    told = {met.worker: met for met in desk.answers if isinstance(met, Met)}
    assert set(told) == {0, 1}
    assert told[0].means == told[1].means == ((1 * 1.0 + 3 * 3.0) / 4,)


def test_a_meeting_for_nothing_is_refused(desk: Desk) -> None:
    with pytest.raises(ProtocolError, match="unknown purpose 0 of a meeting"):
        ask(desk, 0, meet=shard_pb2.Meet())


# -- What a worker is told -------------------------------------------------------------------------


def test_a_worker_is_told_what_it_needs_to_go_on() -> None:
    lease = Lease(7, 2, 5, 64, 32)
    met = Met(
        worker=1,
        step=9,
        epoch=4,
        means=(0.5, -1.0),
        chosen=True,
        refreshed=True,
        grant=Grant(5, (lease,)),
        position=Position(Point(1, 3), (9, 2), 8, Point(1, 3)),
    )
    answer = requests.encode_told(met)
    assert answer.number == 0  # the roster counts
    told = answer.met
    assert (told.step, told.epoch, list(told.means)) == (9, 4, [0.5, -1.0])
    assert told.chosen
    assert told.refreshed
    assert dialogue.decode_grant(told.leases) == met.grant
    assert dialogue.decode_position(told.position) == met.position


def test_what_does_not_matter_is_left_out() -> None:
    told = requests.encode_told(Met(worker=1, step=9, epoch=4)).met
    assert not told.HasField("leases")
    assert not told.HasField("position")
    assert told == shard_pb2.Met(step=9, epoch=4)


def test_a_worker_that_was_too_late_is_told_its_next_step() -> None:
    answer = requests.encode_told(Readmitted(worker=1, next_step=9))
    assert answer == ExchangeResponse(refused=shard_pb2.Refused(next_step=9))
