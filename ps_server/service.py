"""gRPC handlers: decode, one call, encode. Method names are those of the protos."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from ps_core.codec import PartFrame, decode_request, parse
from ps_core.errors import ProtocolError, ShardlineError, status_of
from ps_core.shard_metrics import ShardMetrics
from ps_core.v1 import lead_pb2, shard_pb2
from ps_server import status
from ps_server.node import Node
from ps_server.office import Office
from ps_server.outbox import Outbox
from ps_server.values import Buffers

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Any, Context], Awaitable[Any]]


log = logging.getLogger(__name__)

_MAX_DETAILS_BYTES = 2000
"""gRPC drops a status whose text, up to three bytes for each of these, is above 8 KiB."""


def _takes(decode: Callable[[bytes], Any]) -> Callable[[Handler], Handler]:
    """Turns a handler of decoded requests into one of bytes, whose errors end the call."""

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def handle(self: Any, request: bytes | AsyncIterator[bytes], context: Context) -> Any:
            try:
                if isinstance(request, bytes):
                    decoded = decode(request)
                else:
                    decoded = _decode_all(decode, request)
                return await handler(self, decoded, context)
            except ShardlineError as error:
                failure = error
            except Exception as error:
                # Without this gRPC would answer UNKNOWN, which no peer can tell from its own bugs.
                log.exception("a call ended with an error that nobody foresaw")
                failure = ShardlineError(f"the shard failed: {type(error).__name__}: {error}")
            self.metrics.refused(status_of(failure).name)
            await context.abort(status_of(failure), _details(failure))

        return handle

    return decorate


def _details(error: ShardlineError) -> str:
    return str(error).encode()[:_MAX_DETAILS_BYTES].decode(errors="ignore")


def _message(kind: type[Message]) -> Callable[[bytes], Message]:
    return functools.partial(parse, kind)


async def _decode_all(
    decode: Callable[[bytes], Any], requests: AsyncIterator[bytes]
) -> AsyncIterator[Any]:
    async for request in requests:
        yield decode(request)


async def _send_all(outbox: Outbox, context: Context, writing: asyncio.Lock) -> None:
    """Write an outbox to a stream until it finishes. Raises the error it was failed with. Do not
    cancel it while it holds `writing`.
    """
    while (message := await outbox.get()) is not None:
        async with writing:
            await context.write(message)


async def _run_both(reading: Awaitable[None], outbox: Outbox, context: Context) -> None:
    """Read and write one stream until the peer has finished or either side fails."""
    writing = asyncio.Lock()
    writer = asyncio.ensure_future(_send_all(outbox, context, writing))
    reader = asyncio.ensure_future(reading)
    try:
        done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        reader.cancel()
        async with writing:  # a status never arrives when it overtakes a write
            writer.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)


async def _first(requests: AsyncIterator[Any], field: str) -> Any:
    """The given field of a stream's first message. Raises ProtocolError."""
    async for request in requests:
        if not isinstance(request, PartFrame) and request.WhichOneof("message") == field:
            return getattr(request, field)
        break
    raise ProtocolError(f"the first message of the stream must be {field}")


class ShardService:
    """The workers' side."""

    def __init__(self, node: Node, metrics: ShardMetrics) -> None:
        self.metrics = metrics
        self._node = node

    @_takes(_message(shard_pb2.ReserveRequest))
    async def Reserve(
        self, request: shard_pb2.ReserveRequest, context: Context
    ) -> shard_pb2.ReserveResponse:
        return shard_pb2.ReserveResponse(rank=self._node.reserve())

    @_takes(_message(shard_pb2.JoinRequest))
    async def Join(
        self, request: shard_pb2.JoinRequest, context: Context
    ) -> shard_pb2.JoinResponse:
        return self._node.join(request)

    @_takes(decode_request)
    async def Exchange(
        self, requests: AsyncIterator[PartFrame | shard_pb2.ExchangeRequest], context: Context
    ) -> None:
        hello: shard_pb2.Hello = await _first(requests, "hello")
        rank, outbox = self._node.open_stream(hello.worker)
        try:
            await _run_both(self._receive(rank, outbox, requests), outbox, context)
        finally:
            self._node.close_stream(rank, outbox)

    async def _receive(
        self,
        rank: int,
        outbox: Outbox,
        requests: AsyncIterator[PartFrame | shard_pb2.ExchangeRequest],
    ) -> None:
        async for request in requests:
            self._node.receive(rank, outbox, request)

    @_takes(_message(shard_pb2.LoadRequest))
    async def Load(
        self, requests: AsyncIterator[shard_pb2.LoadRequest], context: Context
    ) -> shard_pb2.LoadResponse:
        hello: shard_pb2.Hello = await _first(requests, "hello")
        self._node.identify(hello.worker)
        loaded: Buffers = {}
        async for request in requests:
            self._node.identify(hello.worker)  # it may have been evicted meanwhile
            self._node.load(loaded, request)
        self._node.keep(loaded)
        return shard_pb2.LoadResponse(version=self._node.version)

    @_takes(_message(shard_pb2.PullRequest))
    async def Pull(self, request: shard_pb2.PullRequest, context: Context) -> None:
        self._node.identify(request.worker)
        for response in self._node.read(request):
            await context.write(response)

    @_takes(_message(shard_pb2.DescribeRequest))
    async def Describe(
        self, request: shard_pb2.DescribeRequest, context: Context
    ) -> shard_pb2.DescribeResponse:
        return status.describe(self._node)

    @_takes(_message(shard_pb2.LeaveRequest))
    async def Leave(
        self, request: shard_pb2.LeaveRequest, context: Context
    ) -> shard_pb2.LeaveResponse:
        self._node.leave(request)
        return shard_pb2.LeaveResponse()


class LeadService:
    """The other shards' side of the lead."""

    def __init__(self, office: Office, metrics: ShardMetrics) -> None:
        self.metrics = metrics
        self._office = office

    @_takes(_message(lead_pb2.ControlRequest))
    async def Control(
        self, requests: AsyncIterator[lead_pb2.ControlRequest], context: Context
    ) -> None:
        hello: lead_pb2.ShardHello = await _first(requests, "hello")
        outbox = self._office.open_control(hello)
        try:
            await _run_both(self._receive(hello.shard, requests), outbox, context)
        finally:
            self._office.close_control(hello.shard, outbox, time.monotonic())

    async def _receive(self, shard: int, requests: AsyncIterator[lead_pb2.ControlRequest]) -> None:
        async for request in requests:
            self._office.receive_control(shard, request)
