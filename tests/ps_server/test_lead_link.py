"""A shard's stream to the lead: what it says, what it says again, and when it gives up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

import grpc
import pytest
import torch
from grpc import StatusCode

from ps_core import codec
from ps_core.errors import (
    DataLossError,
    JobFailedError,
    MismatchError,
    ShardlineError,
    ShardUnreachableError,
)
from ps_core.settings import RpcConfig, ServerConfig
from ps_core.shard_metrics import ShardMetrics
from ps_core.v1 import lead_pb2, shard_pb2
from ps_core.v1.lead_pb2 import ControlRequest, ControlResponse
from ps_server.control import encode_order, encode_remains
from ps_server.effects import Lost, Ready, Remains, Squares
from ps_server.lead_link import LeadLink, _translate
from ps_server.node import Node, Report
from ps_server.orders import Complete, Failed, Membership
from ps_server.terms import Member
from tests.processes import free_ports
from tests.ps_server.desk import CONFIG, JOB
from tests.ps_worker.fake_shard import PATIENCE_SECONDS, Answer, FakeStream, as_bytes

WORKER = shard_pb2.WorkerId(rank=1, incarnation=11)
LONG = RpcConfig(connect_timeout_seconds=50, reconnect_seconds=50)
SILENCE = Remains(1, 11, 4, 8, (3,), 2, 4)


class FakeLead:
    """Listens from the beginning, and answers what the test says."""

    def __init__(self) -> None:
        self._streams: SimpleQueue[FakeStream] = SimpleQueue()
        self._pool = ThreadPoolExecutor()
        self._server = grpc.server(self._pool)
        handler: grpc.RpcMethodHandler[bytes, Answer] = grpc.stream_stream_rpc_method_handler(
            self._control, response_serializer=as_bytes
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("ps_core.v1.LeadService", {"Control": handler}),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def accept(self) -> FakeStream:
        return self._streams.get(timeout=PATIENCE_SECONDS)

    def die(self) -> None:
        """Break all connections, and take no others."""
        self._server.stop(None).wait(PATIENCE_SECONDS)
        self._pool.shutdown()

    def _control(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[Answer]:
        stream = FakeStream()
        context.add_callback(stream.end)
        threading.Thread(target=stream.take, args=(requests,), daemon=True).start()
        self._streams.put(stream)
        yield from stream.answers()
        code, details = stream.end_status
        if code is not StatusCode.OK:
            context.abort(code, details)


class LinkedNode:
    """Shard 1, whose link runs on a thread of its own."""

    def __init__(self, address: str, rpc: RpcConfig) -> None:
        config = replace(CONFIG, server=ServerConfig(index=1), rpc=rpc)
        self.node = Node(config, 55, ShardMetrics(1, "sync"))
        self.link = LeadLink(self.node, address, rpc)
        self._pool = ThreadPoolExecutor(1)
        self._ready = threading.Event()
        self._ended = self._pool.submit(asyncio.run, self._run())
        assert self._ready.wait(PATIENCE_SECONDS)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        await self.link.run()

    def report(self, *messages: Squares | Ready | Remains | Lost | Failed) -> None:
        """Tell the lead; returns once the link knows."""
        send: Report = self.link.report
        for message in messages:
            self._call(send, message)

    def has_a_job(self) -> None:
        """A worker joins the shard."""
        worker = shard_pb2.JoinRequest(worker=WORKER, shard=1, job=codec.encode_job(JOB))
        self._call(self.node.join, worker)
        assert self.node.shard is not None
        for index, state in self.node.shard.parts.items():
            self.node.shard.load(index, torch.zeros(state.part.length))

    def end(self) -> None:
        """End the node as its server does, and wait for the link."""
        self._loop.call_soon_threadsafe(self.node.end, None)

    def wait(self) -> ShardlineError | None:
        """Wait until the node and its link have ended; why."""
        self._ended.result(PATIENCE_SECONDS)
        self._pool.shutdown()
        return self.node.failure

    def _call(self, call: object, *arguments: object) -> None:
        done: Future[None] = Future()

        def run() -> None:
            assert callable(call)
            call(*arguments)
            done.set_result(None)

        self._loop.call_soon_threadsafe(run)
        done.result(PATIENCE_SECONDS)


@contextmanager
def a_link(rpc: RpcConfig = LONG) -> Iterator[tuple[LinkedNode, FakeLead, FakeStream]]:
    """A shard that has said hello, its lead, and the stream between them."""
    lead = FakeLead()
    linked = LinkedNode(lead.address, rpc)
    stream = lead.accept()
    assert read(stream) == hello()
    stream.send(ControlResponse(welcome=lead_pb2.Welcome(lead_incarnation=99)))
    yield linked, lead, stream
    lead.die()


def read(stream: FakeStream) -> ControlRequest:
    return ControlRequest.FromString(stream.read_bytes())


def hello(*, expected: int = 0, epoch: int = 0) -> ControlRequest:
    return ControlRequest(
        hello=lead_pb2.ShardHello(
            shard=1, incarnation=55, expected_lead_incarnation=expected, epoch=epoch
        )
    )


def ready(step: int, rank: int) -> ControlRequest:
    return ControlRequest(ready=lead_pb2.Ready(step=step, rank=rank))


def break_stream(stream: FakeStream) -> None:
    stream.end(StatusCode.UNAVAILABLE, "Socket closed")


def finish(stream: FakeStream, linked: LinkedNode) -> ShardlineError | None:
    """The job is complete."""
    stream.send(encode_order(Complete()))
    stream.end()
    return linked.wait()


# -- What is said ----------------------------------------------------------------------------------


def test_every_report_is_sent_as_its_message() -> None:
    with a_link() as (linked, _, stream):
        linked.report(
            Squares(3, 0.5),
            Ready(1, 3),
            SILENCE,
            Lost(2, 12, "its stream closed"),
            Failed("shard 1 was stopped"),
        )
        lost = lead_pb2.Lost(rank=2, incarnation=12, reason="its stream closed")
        assert [read(stream) for _ in range(5)] == [
            ControlRequest(squares=lead_pb2.Squares(step=3, total=0.5)),
            ready(3, 1),
            ControlRequest(remains=encode_remains(SILENCE)),
            ControlRequest(lost=lost),
            ControlRequest(failure=lead_pb2.Failure(reason="shard 1 was stopped")),
        ]
        assert finish(stream, linked) is None


def test_orders_are_obeyed() -> None:
    with a_link() as (linked, _, stream):
        linked.has_a_job()
        stream.send(encode_order(Membership(3, {1: Member(11, 0)})))
        stream.send(encode_order(Failed("worker 2 failed")))
        stream.end()
        failure = linked.wait()
        assert isinstance(failure, JobFailedError)
        assert str(failure) == "worker 2 failed"
        assert linked.node.epoch == 3


def test_what_is_said_before_the_lead_listens_is_said_when_it_does() -> None:
    lead = FakeLead()
    linked = LinkedNode(lead.address, LONG)
    linked.report(Failed("shard 1 was stopped"))
    stream = lead.accept()
    said = [read(stream), read(stream)]
    assert said == [hello(), ControlRequest(failure=lead_pb2.Failure(reason="shard 1 was stopped"))]
    finish(stream, linked)
    lead.die()


# -- A stream that breaks --------------------------------------------------------------------------


def test_after_a_break_the_latest_of_each_kind_is_said_again() -> None:
    with a_link() as (linked, lead, stream):
        linked.report(Squares(3, 0.5), Ready(1, 3), Ready(2, 3))
        linked.report(Squares(4, 0.25), Ready(2, 4), Lost(3, 13, "its stream closed"))
        for _ in range(6):
            read(stream)
        break_stream(stream)
        again = lead.accept()
        assert read(again) == hello()
        lost = lead_pb2.Lost(rank=3, incarnation=13, reason="its stream closed")
        assert [read(again) for _ in range(4)] == [
            ControlRequest(squares=lead_pb2.Squares(step=4, total=0.25)),
            ready(3, 1),
            ready(4, 2),
            ControlRequest(lost=lost),
        ]
        linked.report(Ready(1, 4))
        assert read(again) == ready(4, 1)
        finish(again, linked)


def test_a_fenced_process_is_not_said_to_be_ready_again() -> None:
    # The lead would take it for the next process of the same rank.
    with a_link() as (linked, lead, stream):
        linked.report(Ready(1, 4), Ready(2, 4), SILENCE)
        break_stream(stream)
        again = lead.accept()
        assert read(again) == hello()
        said = [read(again), read(again)]
        assert said == [ready(4, 2), ControlRequest(remains=encode_remains(SILENCE))]
        linked.report(Ready(1, 5))
        assert read(again) == ready(5, 1)
        finish(again, linked)


@pytest.mark.parametrize(
    ("details", "kind"),
    [("Internal error from Core", ShardUnreachableError), ("a bug", ShardlineError)],
)
def test_a_stream_that_breaks_while_it_is_written_to_is_opened_again(
    details: str, kind: type[ShardlineError]
) -> None:
    # One time in twenty on a busy machine gRPC has no better word for it.
    metadata = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(StatusCode.INTERNAL, metadata, metadata, details)
    assert type(_translate(error)) is kind


def test_a_shard_with_a_job_holds_on_to_its_lead_and_says_what_it_was_told_last() -> None:
    with a_link() as (linked, lead, stream):
        linked.has_a_job()
        stream.send(encode_order(Membership(3, {1: Member(11, 0)})))
        break_stream(stream)
        again = lead.accept()
        assert read(again) == hello(expected=99, epoch=3)
        finish(again, linked)


def test_a_shard_that_nobody_has_joined_takes_any_lead() -> None:
    with a_link() as (linked, lead, stream):
        break_stream(stream)
        again = lead.accept()
        assert read(again) == hello(expected=0)
        again.send(ControlResponse(welcome=lead_pb2.Welcome(lead_incarnation=100)))
        finish(again, linked)


def test_a_stream_may_break_again_and_again() -> None:
    with a_link() as (linked, lead, stream):
        linked.report(Squares(3, 0.5))
        for _ in range(5):
            break_stream(stream)
            stream = lead.accept()
            assert read(stream) == hello()
            assert read(stream).squares.step == 3
        finish(stream, linked)


# -- A stream that does not come back --------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (StatusCode.DATA_LOSS, DataLossError),
        (StatusCode.FAILED_PRECONDITION, MismatchError),
        (StatusCode.ABORTED, JobFailedError),
        (StatusCode.INTERNAL, ShardlineError),
    ],
)
def test_what_the_lead_refuses_a_shard_with_ends_it(
    code: StatusCode, kind: type[ShardlineError]
) -> None:
    with a_link() as (linked, _, stream):
        stream.end(code, "why")
        failure = linked.wait()
        assert type(failure) is kind
        assert "why" in str(failure)


def test_an_order_of_another_release_ends_the_shard() -> None:
    with a_link() as (linked, _, stream):
        stream.send(ControlResponse())
        failure = linked.wait()
        assert "run the same release everywhere" in str(failure)


def test_bytes_that_are_no_order_end_the_shard() -> None:
    with a_link() as (linked, _, stream):
        stream.send(b"\xff\xff")
        assert "2 bytes that are no ControlResponse" in str(linked.wait())


def test_a_lead_that_died_is_given_up_after_the_time_to_reconnect() -> None:
    rpc = RpcConfig(connect_timeout_seconds=50, reconnect_seconds=0.3)
    with a_link(rpc) as (linked, lead, _):
        linked.has_a_job()
        lead.die()
        failure = linked.wait()
        assert isinstance(failure, JobFailedError)
        assert str(failure) == (
            f"the lead (shard 0 at {lead.address}) could not be reached for 0.3 s "
            "(rpc.reconnect_seconds)"
        )


def test_a_lead_that_never_comes_is_given_up_after_the_time_to_connect() -> None:
    [port] = free_ports(1)
    linked = LinkedNode(f"127.0.0.1:{port}", RpcConfig(connect_timeout_seconds=0.2))
    failure = str(linked.wait())
    assert "could not be reached for 0.2 s (rpc.connect_timeout_seconds)" in failure


def test_a_link_ends_with_its_node() -> None:
    with a_link() as (linked, _, stream):
        linked.end()
        stream.end()
        assert linked.wait() is None
