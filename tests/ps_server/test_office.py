"""The lead at the edge: who is told what, what is told again, and what counts as a sign of life."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ps_core.errors import DataLossError, MismatchError, ProtocolError, UsageError
from ps_core.exchange import Arrival, Position, Purpose
from ps_core.leases import PassSpec
from ps_core.metrics import REGISTRY
from ps_core.point import Point
from ps_core.settings import JobConfig
from ps_core.v1 import lead_pb2, shard_pb2
from ps_core.v1.lead_pb2 import ControlRequest, ControlResponse
from ps_server.effects import Remains
from ps_server.orders import Complete, Factor, Failed, Membership, Met
from ps_server.outbox import Outbox
from tests.ps_server.desk import CONFIG, JOB, OWN, Desk
from tests.ps_server.drain import drain


@pytest.fixture
def desk() -> Desk:
    return Desk()


def evictions(reason: str) -> float:
    value = REGISTRY.get_sample_value("shardline_evictions_total", {"reason": reason})
    assert value is not None
    return value


def joins() -> float:
    value = REGISTRY.get_sample_value("shardline_joins_total")
    assert value is not None
    return value


def kinds(outbox: Outbox) -> list[str | None]:
    """What a shard is told, by name; None: its stream ends well."""
    return [
        message.WhichOneof("message") if isinstance(message, ControlResponse) else None
        for message in drain(outbox)
    ]


# -- Workers come and go ---------------------------------------------------------------------------


def test_nothing_but_joining_is_possible_before_somebody_has_joined(desk: Desk) -> None:
    assert (desk.office.epoch, desk.office.is_paused, desk.office.totals()) == (0, False, None)
    assert desk.office.state(0) == ""
    desk.office.tick(time.monotonic())
    for call in (
        lambda: desk.office.idle(0),
        lambda: desk.office.meet(0, Arrival(Purpose.START, 0)),
        lambda: desk.office.give_back(0, [], declined=False),
        lambda: desk.office.request(0, 0, PassSpec(10, 2)),
        lambda: desk.office.ready(1, 0, 0),
        lambda: desk.office.squares(1, 0, 1.0),
        lambda: desk.office.leave(0, shard_pb2.FAREWELL_FINISHED, ""),
    ):
        with pytest.raises(ProtocolError, match="no worker has joined yet"):
            call()


def test_ranks_are_kept_for_workers_that_are_being_started(desk: Desk) -> None:
    reserve = desk.office.reserve
    assert [reserve(0.0), reserve(1.0)] == [2, 3], "before anybody has joined, too"
    with pytest.raises(MismatchError, match="--workers 2:6"):
        reserve(2.0)
    desk.start()
    desk.join(3)
    assert reserve(61.0) == 2, "whoever it was kept for did not come"
    with pytest.raises(MismatchError):
        reserve(100.0)
    desk.office.evict(3, 13, "stream", "gone")
    assert reserve(122.0) == 2
    assert reserve(122.0) == 3


def test_joining_again_changes_nothing(desk: Desk) -> None:
    before = joins()
    assert desk.join(0) is True
    assert desk.join(0) is True
    assert desk.join(1) is False
    assert joins() == before + 2
    assert desk.orders == []


def test_another_process_is_refused_while_the_holder_of_the_rank_is_alive(desk: Desk) -> None:
    desk.start()
    desk.office.beat(1)
    with pytest.raises(MismatchError, match="worker 1 has joined already, as another process"):
        desk.join(1, 77, alive=True)
    assert desk.office.state(1) == "member"


@pytest.mark.parametrize("alive", [pytest.param(True, id="it has never beaten"), False])
def test_another_process_replaces_a_holder_that_does_not_live(desk: Desk, alive: bool) -> None:
    desk.start()
    if not alive:
        desk.office.beat(1)  # its stream has closed since
    before, last_joins = evictions("replaced"), joins()
    desk.join(1, 77, alive=alive)
    assert evictions("replaced") == before + 1
    assert joins() == last_joins + 1
    membership = desk.orders[-1]
    assert isinstance(membership, Membership)
    assert membership.evicted == {1: 11}
    assert "another process has taken its rank" in membership.reason
    assert desk.office.state(1) == "joined"


def test_a_holder_whose_heart_has_stopped_is_replaced_although_its_stream_is_open() -> None:
    member = replace(CONFIG.membership, heartbeat_seconds=0.001, heartbeat_deadline_seconds=100)
    desk = Desk(replace(CONFIG, membership=member))
    desk.start()
    desk.office.beat(1)
    beaten = time.monotonic()
    while time.monotonic() < beaten + 0.004:  # three beats are missing
        pass
    desk.join(1, 77, alive=True)
    assert desk.office.state(1) == "joined"


FAREWELLS = [
    (shard_pb2.FAREWELL_FINISHED, "left", []),
    (shard_pb2.FAREWELL_PREEMPTED, "evicted", []),
    (shard_pb2.FAREWELL_FAILED, "evicted", [{1: 11}]),
]


@pytest.mark.parametrize(("farewell", "state", "fenced"), FAREWELLS)
def test_a_worker_says_goodbye_and_the_job_goes_on(
    desk: Desk, farewell: int, state: str, fenced: list[dict[int, int]]
) -> None:
    desk.start()
    desk.office.leave(1, farewell, "it ran out of memory")
    assert desk.office.state(1) == state
    memberships = [order for order in desk.orders if isinstance(order, Membership)]
    assert list(memberships[-1].members) == [0]
    assert [order.evicted for order in memberships if order.evicted] == fenced
    assert not any(isinstance(order, Failed) for order in desk.orders)


@pytest.mark.parametrize("farewell", [shard_pb2.FAREWELL_FATAL, 0, 99])
def test_a_worker_whose_failure_would_happen_again_ends_the_job(desk: Desk, farewell: int) -> None:
    desk.start()
    desk.office.leave(1, farewell, "the loss is NaN")
    assert desk.orders[-1] == Failed("worker 1 failed: the loss is NaN")


def test_the_job_is_complete_when_all_have_finished(desk: Desk) -> None:
    desk.start()
    desk.office.leave(1, shard_pb2.FAREWELL_FINISHED, "")
    desk.office.leave(0, shard_pb2.FAREWELL_FINISHED, "")
    assert desk.orders[-1] == Complete()


def test_saying_goodbye_twice_changes_nothing(desk: Desk) -> None:
    desk.start()
    desk.office.leave(1, shard_pb2.FAREWELL_FAILED, "it ran out of memory")
    count, before = len(desk.orders), evictions("failed")
    desk.office.leave(1, shard_pb2.FAREWELL_FAILED, "it ran out of memory")
    assert (len(desk.orders), evictions("failed")) == (count, before)


# -- Signs of life ---------------------------------------------------------------------------------


def test_a_worker_that_stops_beating_is_evicted_after_the_deadline(desk: Desk) -> None:
    desk.start()
    before = evictions("heartbeat")
    desk.office.beat(0)
    desk.office.beat(1)
    desk.tick_until(time.monotonic() + 1.5)
    assert desk.office.state(1) == "member"
    desk.tick_until(time.monotonic() + 3.5)
    assert desk.office.state(0) == desk.office.state(1) == "evicted"
    assert evictions("heartbeat") == before + 2
    membership = next(o for o in desk.orders if isinstance(o, Membership) and 1 in o.evicted)
    assert "it gave no sign of life for 2." in membership.reason


def test_a_worker_that_has_never_beaten_is_not_missed(desk: Desk) -> None:
    desk.start()
    desk.tick_until(time.monotonic() + 10)
    assert desk.office.state(0) == "member"


def test_a_heartbeat_that_comes_after_the_goodbye_is_not_waited_for(desk: Desk) -> None:
    desk.start()
    desk.office.leave(1, shard_pb2.FAREWELL_FINISHED, "")
    desk.office.beat(1)
    before = evictions("heartbeat")
    desk.tick_until(time.monotonic() + 10)
    assert evictions("heartbeat") == before
    assert desk.office.state(1) == "left"


def test_an_evicted_worker_is_evicted_once(desk: Desk) -> None:
    desk.start()
    before = evictions("stream")
    for _ in range(2):
        desk.office.evict(1, 11, "stream", "it died")
    desk.office.evict(1, 0, "stream", "nobody")
    desk.office.evict(9, 0, "stream", "nobody")
    assert evictions("stream") == before + 1


# -- Steps, samples and meetings -------------------------------------------------------------------


def test_a_worker_that_joins_a_running_job_is_told_where_it_stands(desk: Desk) -> None:
    desk.start()
    for worker in range(2):
        desk.begin(worker, 0, schedules=[3, 4], point={"loop": 1, "data_epoch": 2})
        desk.office.arrived(worker, 0, version=1)
    desk.join(2)
    desk.office.meet(2, Arrival(Purpose.START, 0))
    assert len(desk.answers) == 2  # not in the middle of a step
    desk.office.take_turn(1)
    met = desk.answers[-1]
    assert isinstance(met, Met)
    assert (met.worker, met.step, met.chosen, met.refreshed) == (2, 1, False, True)
    assert met.position == Position(Point(1, 2), (3, 4), 0, Point(1, 2))
    membership = desk.orders[-1]
    assert isinstance(membership, Membership)
    assert membership.members[2].enters
    assert membership.members[2].first_step == 1
    assert (met.epoch, desk.office.epoch) == (membership.epoch, membership.epoch)


def test_samples_are_granted_used_and_given_back(desk: Desk) -> None:
    desk.start()
    first = desk.office.request(0, 0, PassSpec(10, 2)).leases[0]
    other = desk.office.request(1, 0, PassSpec(10, 2)).leases[0]
    desk.office.give_back(1, [other.id], declined=False)
    desk.begin(0, 0, leases=[first.id])
    second = desk.office.request(0, 0, PassSpec(10, 2)).leases[0]
    desk.begin(0, 1, leases=[second.id])  # so the step before is settled
    totals = desk.office.totals()
    assert totals is not None
    assert (totals.applied, totals.returned, totals.granted, totals.open) == (2, 2, 2, 6)


def test_workers_that_do_not_want_the_same_are_told(desk: Desk) -> None:
    desk.start()
    desk.office.request(0, 0, PassSpec(10, 2))
    with pytest.raises(UsageError, match="num_samples=11 on worker 1"):
        desk.office.request(1, 0, PassSpec(11, 2))
    desk.office.meet(0, Arrival(Purpose.MEAN, 0, (1.0,)))
    with pytest.raises(UsageError, match="waits for all workers at 'epoch'"):
        desk.office.meet(1, Arrival(Purpose.EPOCH, 0))


def test_the_ledger_is_written_to_the_run_directory(tmp_path: Path) -> None:
    desk = Desk(replace(CONFIG, job=JobConfig(run_dir=str(tmp_path))))
    desk.start()
    lease = desk.office.request(1, 0, PassSpec(10, 2)).leases[0]
    desk.begin(1, 0, leases=[lease.id])
    desk.office.evict(1, 11, "stream", "it died")
    for shard in range(2):
        desk.office.remains(shard, Remains(1, 11, 0, 8, (lease.id,), 1 - shard, 4))
    desk.office.close()
    lines = [json.loads(line) for line in (tmp_path / "updates.jsonl").read_text().splitlines()]
    assert [(line["kind"], line.get("event"), line.get("state")) for line in lines] == [
        ("worker", "joined", None),
        ("worker", "joined", None),
        ("pass", None, None),
        ("worker", "evicted", None),
        ("update", None, "in_part"),
    ]


def test_a_job_with_too_few_workers_withholds_answers_until_one_has_come_back() -> None:
    member = replace(CONFIG.membership, min_workers=2)
    desk = Desk(replace(CONFIG, membership=member))
    desk.start()
    desk.office.evict(1, 11, "stream", "it died")
    resumed = desk.num_resumed
    assert desk.office.is_paused
    for shard in range(2):
        desk.office.remains(shard, Remains(1, 11, 0, 0, (), 0, 4))
    desk.office.take_turn(1)
    assert desk.num_resumed == resumed
    desk.join(1, 77)
    desk.office.meet(1, Arrival(Purpose.START, 0))
    assert not desk.office.is_paused
    assert desk.num_resumed > resumed
    assert isinstance(desk.answers[-1], Met)


# -- Shards ----------------------------------------------------------------------------------------


def test_a_shard_is_welcomed_and_told_every_order(desk: Desk) -> None:
    outbox = desk.open_shard()
    desk.start()
    desk.office.idle(1)
    desk.office.leave(0, shard_pb2.FAREWELL_FATAL, "because")
    assert kinds(outbox) == ["welcome", "membership", "membership", "failure", None]


def test_the_lead_s_own_shard_gets_every_order(desk: Desk) -> None:
    desk.start()
    [membership] = desk.orders
    assert isinstance(membership, Membership)
    assert set(membership.members) == {0, 1}


@pytest.mark.parametrize(("epoch", "missed"), [(0, [1, 2, 3]), (1, [2, 3]), (3, [])])
def test_a_shard_whose_stream_broke_is_told_what_it_has_missed(
    desk: Desk, epoch: int, missed: list[int]
) -> None:
    desk.open_shard()
    desk.start()
    desk.office.idle(0)
    desk.office.idle(1)
    welcome, *orders = drain(desk.open_shard(epoch=epoch))
    assert isinstance(welcome, ControlResponse)
    assert welcome.welcome.lead_incarnation == OWN
    assert [order.membership.epoch for order in orders if isinstance(order, ControlResponse)] == (
        missed
    )


def test_a_shard_whose_stream_broke_is_told_the_last_factor_again() -> None:
    clipped = replace(JOB, optimizer=replace(JOB.optimizer, max_grad_norm=1.0))
    desk = Desk(job=clipped)
    desk.open_shard()
    desk.start()
    for shard in range(2):
        desk.office.squares(shard, 0, 8.0)
    factor = desk.orders[-1]
    assert isinstance(factor, Factor)
    assert factor.factor == pytest.approx(1 / math.sqrt(16.0), rel=1e-5)
    *_, again = drain(desk.open_shard(epoch=1))
    assert isinstance(again, ControlResponse)
    assert again.factor == lead_pb2.Factor(step=0, factor=factor.factor)


def test_a_shard_that_comes_after_the_end_is_told_how_the_job_ended(desk: Desk) -> None:
    desk.open_shard()
    desk.start()
    desk.office.fail("because")
    *_, last = drain(desk.open_shard(epoch=1))
    assert isinstance(last, ControlResponse)
    assert last.failure.reason == "because"


@pytest.mark.parametrize("shard", [0, 2, 2**32 - 1])
def test_a_shard_that_the_job_does_not_have_is_refused(desk: Desk, shard: int) -> None:
    with pytest.raises(MismatchError, match=f"shard {shard} has no place beside the lead"):
        desk.office.open_control(lead_pb2.ShardHello(shard=shard, incarnation=5))


def test_a_shard_that_knew_another_lead_is_refused(desk: Desk) -> None:
    hello = lead_pb2.ShardHello(shard=1, incarnation=5, expected_lead_incarnation=OWN + 1)
    with pytest.raises(DataLossError, match=r"the lead .* restarted"):
        desk.office.open_control(hello)


def test_a_shard_may_restart_until_a_worker_has_joined(desk: Desk) -> None:
    old = desk.open_shard(55)
    desk.office.close_control(1, old, now=0.0)
    new = desk.open_shard(56)
    desk.start()
    with pytest.raises(MismatchError, match="shard 1 runs already, as another process"):
        desk.open_shard(57)
    desk.office.close_control(1, new, now=0.0)
    with pytest.raises(DataLossError, match="shard 1 restarted and lost its state"):
        desk.open_shard(57)
    assert desk.orders[-1] == Failed("shard 1 restarted and lost its state: start the job again")


def test_a_shard_that_does_not_come_back_ends_the_job(desk: Desk) -> None:
    outbox = desk.open_shard()
    desk.start()
    now = time.monotonic()
    desk.office.close_control(1, outbox, now)
    desk.office.tick(now + CONFIG.rpc.reconnect_seconds - 0.1)
    assert not any(isinstance(order, Failed) for order in desk.orders)
    desk.office.tick(now + CONFIG.rpc.reconnect_seconds)
    assert desk.orders[-1] == Failed(
        "shard 1 was lost: its stream to the lead closed and did not come back within 3 s "
        "(rpc.reconnect_seconds)"
    )


def test_a_shard_that_comes_back_in_time_is_not_lost(desk: Desk) -> None:
    old = desk.open_shard()
    desk.start()
    now = time.monotonic()
    desk.office.close_control(1, old, now)
    new = desk.open_shard(epoch=1)
    desk.office.close_control(1, old, now)
    desk.office.tick(now + 1000)
    assert not any(isinstance(order, Failed) for order in desk.orders)
    desk.office.idle(0)
    assert kinds(new) == ["welcome", "membership"]


def control(**fields: Any) -> ControlRequest:  # noqa: ANN401 - any message
    return ControlRequest(**fields)


ABOUT_NOBODY = {
    "remains": control(
        remains=lead_pb2.Remains(
            rank=77, incarnation=5, step=2**64 - 1, leases=[1, 2**64 - 1], used_parts=9, num_parts=3
        )
    ),
    "ready": control(ready=lead_pb2.Ready(step=2**64 - 1, rank=2**32 - 1)),
    "lost": control(lost=lead_pb2.Lost(rank=2**32 - 1, incarnation=9, reason="it died")),
    "lost nobody": control(lost=lead_pb2.Lost(rank=77)),
    "an older process": control(lost=lead_pb2.Lost(rank=1, incarnation=9, reason="it died")),
    "remains of one that lives": control(
        remains=lead_pb2.Remains(rank=1, incarnation=11, used_parts=4, num_parts=4)
    ),
}


@pytest.mark.parametrize("what", ABOUT_NOBODY)
def test_a_shard_s_word_about_a_worker_that_is_not_there_changes_nothing(
    desk: Desk, what: str
) -> None:
    desk.start()
    before = len(desk.orders), evictions("stream")
    desk.office.receive_control(1, ABOUT_NOBODY[what])
    assert (len(desk.orders), evictions("stream")) == before
    assert [desk.office.state(worker) for worker in (0, 1)] == ["member"] * 2


@pytest.mark.parametrize(
    "message", [control(), control(hello=lead_pb2.ShardHello(shard=1)), control(squares={})]
)
def test_a_message_that_has_no_place_on_an_open_control_stream_is_refused(
    desk: Desk, message: ControlRequest
) -> None:
    desk.start()
    with pytest.raises(ProtocolError, match="shard 1 sends"):
        desk.office.receive_control(1, message)


def test_a_worker_that_a_shard_has_lost_is_evicted(desk: Desk) -> None:
    desk.start()
    lost = lead_pb2.Lost(rank=1, incarnation=11, reason="its stream closed")
    desk.office.receive_control(1, control(lost=lost))
    membership = desk.orders[-1]
    assert isinstance(membership, Membership)
    assert (membership.evicted, membership.reason) == ({1: 11}, "its stream closed")


def test_a_shard_that_fails_ends_the_job_even_before_a_worker_has_come(desk: Desk) -> None:
    outbox = desk.open_shard()
    failure = lead_pb2.Failure(reason="shard 1 was stopped")
    desk.office.receive_control(1, control(failure=failure))
    assert desk.orders == [Failed("shard 1 was stopped")]
    assert kinds(outbox) == ["welcome", "failure", None]
