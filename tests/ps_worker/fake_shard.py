"""A shard for tests of a client: a real server, whose streams do what the test says."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from ps_core.v1 import shard_pb2
from ps_core.v1.shard_pb2 import ExchangeRequest

PATIENCE_SECONDS: Final = 60.0
Answer = Message | bytes


def as_bytes(answer: Answer) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


class FakeStream:
    """One Exchange stream, from the side of the shard."""

    def __init__(self) -> None:
        self._received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self.end_status = grpc.StatusCode.OK, ""
        self.is_kept_open = False
        """The stream does not end when the client finishes it."""

    def read_bytes(self) -> bytes:
        """The next message. AssertionError when the client has ended the stream."""
        frame = self._received.get(timeout=PATIENCE_SECONDS)
        assert frame is not None, "the client has ended the stream"
        return frame

    def read(self) -> ExchangeRequest:
        return ExchangeRequest.FromString(self.read_bytes())

    def read_rest(self) -> list[ExchangeRequest]:
        """What comes until the client ends the stream, or its connection breaks."""
        frames = iter(lambda: self._received.get(timeout=PATIENCE_SECONDS), None)
        return [ExchangeRequest.FromString(frame) for frame in frames]

    def send(self, *answers: Answer) -> None:
        for answer in answers:
            self._outgoing.put(answer)

    def end(self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "") -> None:
        """End the stream after what was sent."""
        self.end_status = code, details
        self._outgoing.put(None)

    def take(self, requests: Iterator[bytes]) -> None:
        with suppress(grpc.RpcError, Exception):  # the client has gone
            for frame in requests:
                self._received.put(frame)
        self._received.put(None)
        if not self.is_kept_open:
            self._outgoing.put(None)

    def answers(self) -> Iterator[Answer]:
        return iter(self._outgoing.get, None)


class FakeShard:
    """Takes the calls of ShardService and keeps what they say. In a `with` block it listens."""

    def __init__(self) -> None:
        self.description = shard_pb2.DescribeResponse(incarnation=5)
        self.may_describe = threading.Event()
        self.may_describe.set()
        self.num_streams = 0
        self.streams: queue.SimpleQueue[FakeStream] = queue.SimpleQueue()
        self.calls: queue.SimpleQueue[Message] = queue.SimpleQueue()
        """Requests of unary calls, and messages of loads."""
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        """What unary calls, loads and pulls are refused with."""
        self.num_refused = 0
        self.pulled: list[Answer] = []
        self.reserved = 2
        """The rank that a worker is to have."""
        self.joined = shard_pb2.JoinResponse(shard_incarnation=5, gives_initial_values=True)

    def __enter__(self) -> FakeShard:
        self._pool = ThreadPoolExecutor()
        self._server = grpc.server(self._pool)
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Exchange": stream(self._exchange, response_serializer=as_bytes),
            "Describe": unary(self._describe, response_serializer=as_bytes),
            "Reserve": unary(
                self._unary(
                    shard_pb2.ReserveRequest, lambda: shard_pb2.ReserveResponse(rank=self.reserved)
                ),
                response_serializer=as_bytes,
            ),
            "Join": unary(
                self._unary(shard_pb2.JoinRequest, lambda: self.joined),
                response_serializer=as_bytes,
            ),
            "Leave": unary(
                self._unary(shard_pb2.LeaveRequest, shard_pb2.LeaveResponse),
                response_serializer=as_bytes,
            ),
            "Load": grpc.stream_unary_rpc_method_handler(self._load, response_serializer=as_bytes),
            "Pull": grpc.unary_stream_rpc_method_handler(self._pull, response_serializer=as_bytes),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("ps_core.v1.ShardService", handlers),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.may_describe.set()
        self.die()
        self._pool.shutdown()

    def die(self) -> None:
        """Break all connections, and take no others."""
        self._server.stop(None).wait(PATIENCE_SECONDS)

    def accept(self) -> FakeStream:
        """The next stream that the client opens."""
        return self.streams.get(timeout=PATIENCE_SECONDS)

    def called(self) -> Message:
        """The next request of a unary call, or message of a load."""
        return self.calls.get(timeout=PATIENCE_SECONDS)

    def _exchange(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[Answer]:
        stream = FakeStream()
        context.add_callback(stream.end)
        threading.Thread(target=stream.take, args=(requests,), daemon=True).start()
        self.num_streams += 1
        self.streams.put(stream)
        yield from stream.answers()
        code, details = stream.end_status
        if code is not grpc.StatusCode.OK:
            context.abort(code, details)

    def _describe(self, request: bytes, context: grpc.ServicerContext) -> Answer:
        self.may_describe.wait(PATIENCE_SECONDS)
        return self.description

    def _check(self, context: grpc.ServicerContext) -> None:
        if self.refusal is not None:
            self.num_refused += 1
            context.abort(*self.refusal)

    def _unary(
        self, kind: type[Message], answer: Callable[[], Answer]
    ) -> Callable[[bytes, grpc.ServicerContext], Answer]:
        def handle(request: bytes, context: grpc.ServicerContext) -> Answer:
            self._check(context)
            self.calls.put(kind.FromString(request))
            return answer()

        return handle

    def _load(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Answer:
        for request in requests:
            self.calls.put(shard_pb2.LoadRequest.FromString(request))
        self._check(context)
        return shard_pb2.LoadResponse(version=3)

    def _pull(self, request: bytes, context: grpc.ServicerContext) -> Iterator[Answer]:
        self.calls.put(shard_pb2.PullRequest.FromString(request))
        yield from self.pulled
        self._check(context)
