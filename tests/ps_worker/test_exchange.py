"""What a worker says again when a stream breaks in the middle of a step or of a meeting, and what
it does with answers that come twice or late.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from grpc import StatusCode

from ps_core import codec
from ps_core.buckets import Bucket, make_buckets
from ps_core.exchange import Arrival, Farewell, Purpose, Start, Work
from ps_core.extras import Extras
from ps_core.leases import PassSpec
from ps_core.metrics import WorkerMetrics
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec, Plan, make_plan
from ps_core.settings import (
    ClusterConfig,
    Config,
    ConsistencyConfig,
    ExchangeConfig,
    MembershipConfig,
    RpcConfig,
)
from ps_core.tensors import digest
from ps_core.v1 import shard_pb2
from ps_core.v1.shard_pb2 import ExchangeRequest, ExchangeResponse, Met
from ps_worker.exchange import ParameterServerExchange
from tests.ps_worker.fake_shard import PATIENCE_SECONDS, FakeShard, FakeStream
from tests.reference import holding

SGD = OptimizerSpec("SGD", ({"lr": 0.1},))
SHAPES = ((100,), (300,), (64,))
"""Of parameters, each in a bucket of its own."""


@dataclass
class Desk:
    """A worker of a job with one shard, which the test plays."""

    shard: FakeShard
    exchange: ParameterServerExchange
    plan: Plan
    buckets: list[Bucket]
    threads: ThreadPoolExecutor
    stream: FakeStream

    @property
    def parts(self) -> list[int]:
        return [part.index for part in self.plan.parts]

    def run(self, call: Any, *arguments: Any) -> Future[Any]:  # noqa: ANN401 - any call
        """Call something that waits for the shard."""
        return self.threads.submit(call, *arguments)

    def begin(self, step: int) -> None:
        for bucket in self.buckets:
            bucket.gradients.copy_(torch.arange(len(bucket.gradients)) + 0.5 + step)
            bucket.present = [True] * len(bucket.present)
        self.exchange.begin(step, Work(8, leases=(3,)), SGD.groups)

    def submit(self, index: int, step: int) -> list[bytes]:
        """Hand a bucket over; its frames, made independently."""
        self.exchange.submit(self.buckets[index], step)
        return self.frames(index, step)

    def frames(self, index: int, step: int) -> list[bytes]:
        return [
            codec.encode_push(
                step, part, [True] * len(part.slices), self.buckets[index].host_gradients
            )
            for part in self.plan.parts
            if part.bucket == index
        ]

    def answer(self, part: int, version: int, value: float) -> None:
        """Send a part whose elements all have one value."""
        elements = torch.full((self.plan.parts[part].length,), value)
        self.stream.send(codec.encode_answer(version, part, elements, epoch=1))

    def answer_again(self, part: int, version: int, clock: int) -> None:
        """Answer a repeat of the step before `clock`, when the part is of a later version."""
        elements = torch.full((self.plan.parts[part].length,), -1.0)
        self.stream.send(codec.encode_answer(version, part, elements, epoch=1, clock=clock))

    def break_stream(self) -> None:
        self.stream.end(StatusCode.UNAVAILABLE, "Socket closed")

    def reopen(self) -> None:
        """The worker opens its stream again, and says hello first."""
        self.stream = self.shard.accept()
        assert self.read().HasField("hello")

    def read_bytes(self) -> bytes:
        """What the worker says next, but for signs of life."""
        beat = ExchangeRequest(heartbeat=shard_pb2.Heartbeat()).SerializeToString()
        while (frame := self.stream.read_bytes()) == beat:
            pass
        return frame

    def read(self) -> ExchangeRequest:
        return ExchangeRequest.FromString(self.read_bytes())

    def values(self) -> set[float]:
        """All that the parameters hold."""
        return {
            float(value)
            for part in self.plan.parts
            for value in self.buckets[part.bucket].parameters[part.start : part.start + part.length]
        }

    def settle(self, step: int, value: float) -> None:
        """The shard answers all that is expected; the parameters all have this value then."""
        settled = self.run(self.exchange.settle, step)
        for part in self.parts:
            self.answer(part, step + 1, value)
        outcome = settled.result(PATIENCE_SECONDS)
        assert (outcome.next_step, outcome.applied) == (step + 1, True)
        assert self.values() == {value, 0.0} or self.values() == {value}


def made_config(shard: FakeShard, consistency: ConsistencyConfig) -> Config:
    return Config(
        cluster=ClusterConfig(shards=(shard.address,)),
        consistency=consistency,
        exchange=ExchangeConfig(part_bytes=512, bucket_bytes=256),
        rpc=RpcConfig(reconnect_seconds=50, call_timeout_seconds=50),
        membership=MembershipConfig(heartbeat_seconds=0.05),
    )


@contextmanager
def joined(consistency: ConsistencyConfig) -> Iterator[Desk]:
    with FakeShard() as shard, ThreadPoolExecutor() as threads:
        config = made_config(shard, consistency)
        specs = tuple(
            ParameterSpec(f"p{index}", torch.float32, shape, 0)
            for index, shape in enumerate(SHAPES)
        )
        sizes = config.exchange
        plan = make_plan(specs, 1, sizes.part_bytes, sizes.bucket_bytes)
        buckets = make_buckets(plan, [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES])
        exchange = ParameterServerExchange(config, WorkerMetrics(0, 1))
        extras = Extras(holding({"count": torch.zeros(2)}), ())
        start = threads.submit(exchange.join, plan, buckets, SGD, extras)
        desk = Desk(shard, exchange, plan, buckets, threads, shard.accept())
        assert desk.read().HasField("hello")
        assert desk.read().meet.purpose == shard_pb2.PURPOSE_START
        desk.stream.send(ExchangeResponse(met=Met(epoch=1, chosen=True), number=1))
        assert start.result(PATIENCE_SECONDS) == Start(0, chosen=True)
        while not shard.calls.empty():  # the join, and the initial values
            shard.called()
        yield desk
        exchange.close(Farewell.FINISHED)


@pytest.fixture
def desk() -> Iterator[Desk]:
    with joined(ConsistencyConfig()) as desk:
        yield desk


def test_the_plan_of_these_tests_has_several_buckets_and_parts(desk: Desk) -> None:
    assert [len(desk.frames(index, 0)) for index in range(3)] == [1, 3, 1]


# -- In the middle of a step -----------------------------------------------------------------------


@pytest.mark.parametrize("num_read", range(7))
def test_what_was_not_answered_is_said_again_in_order_and_with_the_same_bytes(
    desk: Desk, num_read: int
) -> None:
    desk.begin(0)
    pushes = [frame for index in (2, 1, 0) for frame in desk.submit(index, 0)]
    said = [desk.read_bytes() for _ in range(num_read)]
    desk.break_stream()
    desk.reopen()
    again = [desk.read_bytes() for _ in range(6)]
    assert ExchangeRequest.FromString(again[0]).begin.leases == [3]
    assert again[1:] == pushes
    assert said == again[:num_read]
    desk.settle(0, 7.0)


@pytest.mark.parametrize("num_answered", range(6))
def test_what_was_answered_is_not_said_again(desk: Desk, num_answered: int) -> None:
    desk.begin(0)
    pushes: dict[int, object] = {}
    for index in range(3):
        numbers = [part.index for part in desk.plan.parts if part.bucket == index]
        pushes.update(zip(numbers, desk.submit(index, 0), strict=True))
    for _ in range(6):
        desk.read_bytes()
    answered = desk.parts[:num_answered]
    for part in answered:
        desk.answer(part, 1, 7.0)
    desk.break_stream()
    desk.reopen()
    assert desk.read().HasField("begin")
    for part in desk.parts[num_answered:]:
        assert desk.read_bytes() == pushes[part]
    for part in desk.parts[num_answered:]:
        desk.answer(part, 1, 7.0)
    assert desk.run(desk.exchange.settle, 0).result(PATIENCE_SECONDS).next_step == 1
    assert desk.values() <= {7.0, 0.0}


def test_what_is_submitted_while_the_stream_is_broken_is_said_once(desk: Desk) -> None:
    desk.shard.may_describe.clear()
    desk.begin(0)
    first = desk.submit(2, 0)
    desk.break_stream()
    later = [*desk.submit(1, 0), *desk.submit(0, 0)]
    desk.shard.may_describe.set()
    desk.reopen()
    assert desk.read().HasField("begin")
    assert [desk.read_bytes() for _ in range(5)] == [*first, *later]
    desk.settle(0, 7.0)
    desk.begin(1)  # the next message is of the next step
    assert desk.read().begin.step == 1


def test_between_steps_nothing_is_missing(desk: Desk) -> None:
    desk.begin(0)
    for index in range(3):
        desk.submit(index, 0)
    for _ in range(6):
        desk.read_bytes()
    desk.settle(0, 7.0)
    desk.break_stream()
    desk.reopen()
    desk.begin(1)
    assert desk.read().begin.step == 1


def test_an_answer_of_an_older_version_is_not_taken(desk: Desk) -> None:
    desk.begin(0)
    settled = desk.run(desk.exchange.settle, 0)
    for part in desk.parts:
        desk.answer(part, 0, 3.0)
    for part in desk.parts:
        desk.answer(part, 1, 7.0)
    assert settled.result(PATIENCE_SECONDS).version == 1
    assert 3.0 not in desk.values()


def test_an_answer_that_comes_twice_does_not_reach_the_next_step(desk: Desk) -> None:
    desk.begin(0)
    desk.settle(0, 7.0)
    desk.begin(1)
    settled = desk.run(desk.exchange.settle, 1)
    for part in desk.parts:
        desk.answer(part, 1, 3.0)  # again
    for part in desk.parts:
        desk.answer(part, 2, 8.0)
    assert settled.result(PATIENCE_SECONDS).next_step == 2
    assert 3.0 not in desk.values()


def test_a_part_that_the_plan_does_not_have_ends_the_worker(desk: Desk) -> None:
    desk.begin(0)
    settled = desk.run(desk.exchange.settle, 0)
    desk.stream.send(codec.encode_answer(1, 99, torch.ones(4)))
    assert "sends part 99" in str(settled.exception(PATIENCE_SECONDS))


# -- Meetings and leases ---------------------------------------------------------------------------


def test_in_a_meeting_the_parts_that_may_have_been_lost_are_fetched(desk: Desk) -> None:
    meeting = desk.run(desk.exchange.meet, Arrival(Purpose.EPOCH, 0))
    request = desk.read()
    assert (request.number, request.meet.purpose) == (2, shard_pb2.PURPOSE_EPOCH)
    desk.answer(desk.parts[0], 4, 7.0)  # before the word about it
    desk.stream.send(ExchangeResponse(leases=shard_pb2.Leases(), number=99))  # of nobody
    desk.break_stream()
    desk.reopen()
    assert desk.read() == request
    # Also what has come: it may have been a repeat, and what the meeting meant is lost.
    assert list(desk.read().fetch.parts) == desk.parts
    desk.stream.send(ExchangeResponse(met=Met(step=4, epoch=2, refreshed=True), number=2))
    for part in desk.parts[1:]:
        desk.answer(part, 4, 7.0)
    assert meeting.result(PATIENCE_SECONDS).step == 4
    assert desk.values() <= {7.0, 0.0}


def meet(desk: Desk, number: int, told: Met) -> shard_pb2.Meet:
    """Come to the end of a pass, and be told this; what the worker has said."""
    meeting = desk.run(desk.exchange.meet, Arrival(Purpose.EPOCH, 0))
    said = desk.read()
    assert said.number == number
    desk.stream.send(ExchangeResponse(met=told, number=number))
    assert meeting.result(PATIENCE_SECONDS).chosen == told.chosen
    return said.meet


def test_the_chosen_worker_hands_its_buffers_over_and_all_take_them(desk: Desk) -> None:
    said = meet(desk, 2, Met(epoch=2, chosen=True, handed_over=True))
    assert said.hands_over
    pulled = desk.shard.called()
    assert isinstance(pulled, shard_pb2.PullRequest)
    assert pulled.held == {"count": digest(torch.zeros(2))}


def test_a_worker_that_is_chosen_after_the_one_before_it_has_gone_sends_its_own(
    desk: Desk,
) -> None:
    meet(desk, 2, Met(epoch=2))
    said = meet(desk, 3, Met(epoch=3, chosen=True))
    assert not said.hands_over
    loads = [desk.shard.called(), desk.shard.called()]
    assert isinstance(loads[1], shard_pb2.LoadRequest)
    assert loads[1].buffer.spec.name == "count"
    assert desk.shard.calls.empty()


def test_the_end_of_a_meeting_that_is_told_twice_does_not_end_the_next_wait(desk: Desk) -> None:
    meeting = desk.run(desk.exchange.meet, Arrival(Purpose.MEAN, 0, (1.0,)))
    assert desk.read().number == 2
    met = ExchangeResponse(met=Met(epoch=2, means=[1.0]), number=2)
    desk.stream.send(met)
    assert meeting.result(PATIENCE_SECONDS).means == (1.0,)
    desk.begin(0)
    settled = desk.run(desk.exchange.settle, 0)
    desk.stream.send(met)  # it crossed the repeated request, after a break
    for part in desk.parts:
        assert not settled.done()
        desk.answer(part, 1, 7.0)
    assert settled.result(PATIENCE_SECONDS).next_step == 1
    meeting = desk.run(desk.exchange.meet, Arrival(Purpose.MEAN, 1, (5.0,)))
    while desk.read().number != 3:  # behind the step's begin
        pass
    desk.stream.send(ExchangeResponse(met=Met(step=1, epoch=3, means=[5.0]), number=3))
    assert meeting.result(PATIENCE_SECONDS).means == (5.0,)


def test_the_answer_to_a_repeated_step_is_not_taken_for_that_of_the_present_one(desk: Desk) -> None:
    # With backup workers others may have gone further than this one, which is late for step 4.
    desk.begin(4)
    settled = desk.run(desk.exchange.settle, 4)
    for part in desk.parts:
        desk.answer_again(part, version=5, clock=4)
    desk.stream.send(ExchangeResponse(refused=shard_pb2.Refused(next_step=6)))
    for part in desk.parts:
        assert not settled.done()
        desk.answer(part, 6, 7.0)
    outcome = settled.result(PATIENCE_SECONDS)
    assert (outcome.next_step, outcome.version, outcome.applied) == (6, 6, False)
    assert desk.values() <= {7.0, 0.0}


def granted(number: int, lease_id: int) -> ExchangeResponse:
    lease = shard_pb2.Lease(id=lease_id, start=0, length=2)
    return ExchangeResponse(leases=shard_pb2.Leases(leases=[lease]), number=number)


def test_a_lease_that_is_granted_twice_is_taken_once(desk: Desk) -> None:
    for _ in range(2):
        desk.exchange.request_lease(0, PassSpec(10, 2))
    assert [desk.read().number for _ in range(2)] == [2, 3]
    desk.stream.send(granted(2, 11))
    desk.break_stream()
    desk.reopen()
    assert desk.read().number == 3
    desk.stream.send(granted(2, 11), granted(3, 12), granted(3, 12))
    leases = [desk.run(desk.exchange.receive_lease).result(PATIENCE_SECONDS) for _ in range(2)]
    assert [grant.leases[0].id for grant in leases] == [11, 12]
    desk.exchange.request_lease(0, PassSpec(10, 2))
    desk.stream.send(granted(4, 13))
    grant = desk.run(desk.exchange.receive_lease).result(PATIENCE_SECONDS)
    assert grant.leases[0].id == 13


def test_an_idle_worker_says_so_again_until_a_later_request_is_answered(desk: Desk) -> None:
    desk.exchange.idle()
    desk.exchange.return_leases([5])
    assert [desk.read().number for _ in range(2)] == [2, 3]
    desk.break_stream()
    desk.reopen()
    assert [desk.read().WhichOneof("message") for _ in range(2)] == ["idle", "lease"]
    desk.exchange.request_lease(0, PassSpec(10, 2))
    assert desk.read().number == 4
    desk.stream.send(granted(4, 11))
    desk.run(desk.exchange.receive_lease).result(PATIENCE_SECONDS)
    desk.break_stream()
    desk.reopen()
    desk.begin(0)
    assert desk.read().HasField("begin")


# -- Refusals, and modes without lockstep ----------------------------------------------------------


def test_a_refused_step_was_not_applied_and_the_next_one_is(desk: Desk) -> None:
    refused = ExchangeResponse(refused=shard_pb2.Refused(next_step=3))
    desk.begin(0)
    settled = desk.run(desk.exchange.settle, 0)
    desk.stream.send(refused)
    for part in desk.parts:
        desk.answer(part, 3, 7.0)
    outcome = settled.result(PATIENCE_SECONDS)
    assert (outcome.next_step, outcome.applied) == (3, False)
    desk.begin(3)
    settled = desk.run(desk.exchange.settle, 3)
    desk.stream.send(refused)  # again, because the begin was repeated
    for part in desk.parts:
        desk.answer(part, 4, 8.0)
    assert settled.result(PATIENCE_SECONDS).applied


def test_without_lockstep_the_worker_s_own_clock_says_how_new_a_part_is() -> None:
    with joined(ConsistencyConfig("async")) as desk:
        desk.begin(0)
        for clock, value in ((0, 3.0), (1, 7.0)):
            for part in desk.parts:
                elements = torch.full((desk.plan.parts[part].length,), value)
                # The others have made seven updates meanwhile, and this push was the eighth.
                desk.stream.send(codec.encode_answer(8, part, elements, clock=clock))
        # A lease that is answered behind the parts: they are all here before the step is settled.
        desk.exchange.request_lease(0, PassSpec(8, 4))
        while not (asked := desk.read()).HasField("lease"):
            pass
        desk.stream.send(ExchangeResponse(leases=shard_pb2.Leases(), number=asked.number))
        desk.run(desk.exchange.receive_lease).result(PATIENCE_SECONDS)
        outcome = desk.run(desk.exchange.settle, 0).result(PATIENCE_SECONDS)
        assert (outcome.next_step, outcome.version, outcome.staleness) == (1, 8, 7)
        assert 3.0 not in desk.values()
