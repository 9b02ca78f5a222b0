"""The other shards' stream to the lead: orders come down it, squares and failures go up."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator

import grpc

from ps_core.codec import parse
from ps_core.errors import JobFailedError, ShardlineError, ShardUnreachableError, error_from
from ps_core.rpc import LEAD_SERVICE, open_async_channel, stream_stream
from ps_core.settings import RpcConfig
from ps_core.v1 import lead_pb2
from ps_server.control import decode_order, encode_remains
from ps_server.effects import Lost, Ready, Remains, Squares
from ps_server.node import Node
from ps_server.orders import Failed

log = logging.getLogger(__name__)

_WRITE_FAILED = "Internal error from Core"


class LeadLink:
    """Keeps one stream to the lead open, and ends the node when that is impossible."""

    def __init__(self, node: Node, address: str, config: RpcConfig) -> None:
        self._node = node
        self._address = address
        self._config = config
        self._outgoing: asyncio.Queue[lead_pb2.ControlRequest | None] = asyncio.Queue()
        self._said: dict[object, lead_pb2.ControlRequest] = {}
        """What the lead must hear again when the stream has broken; it knows repeats."""
        self._lead_incarnation = 0
        self._is_bound = False
        """The job began under this lead: another one would not know of it."""

    def report(self, message: Squares | Ready | Remains | Lost | Failed) -> None:
        """Tell the lead. Does not block."""
        key, request = _encode(message)
        if isinstance(message, Remains):  # another process of its rank must not count as ready
            self._said.pop((Ready, message.worker), None)
        self._said[key] = request
        self._outgoing.put_nowait(request)

    @property
    def _has_job(self) -> bool:
        """A worker has joined this shard: until then a restart of the lead loses nothing."""
        return self._node.shard is not None

    async def run(self) -> None:
        """Serve the link until the node has ended; when the lead cannot be reached in time, end the
        node.
        """
        patience, key = self._config.connect_timeout_seconds, "rpc.connect_timeout_seconds"
        async with open_async_channel(self._address, self._config) as channel:
            while not self._node.ended.is_set():
                try:
                    await asyncio.wait_for(channel.channel_ready(), patience)
                    await self._serve(channel)
                except TimeoutError:
                    self._give_up(patience, key)
                except grpc.aio.AioRpcError as error:
                    self._handle(_translate(error))
                except ShardlineError as error:
                    self._node.end(error)
                if self._has_job:
                    patience, key = self._config.reconnect_seconds, "rpc.reconnect_seconds"
                await asyncio.sleep(random.uniform(0.05, 0.25))  # noqa: S311 - jitter, not a secret

    async def _serve(self, channel: grpc.aio.Channel) -> None:
        outgoing = self._outgoing = asyncio.Queue()
        call = stream_stream(channel, LEAD_SERVICE, "Control")(self._requests(outgoing))
        try:
            async for frame in call:
                self._obey(parse(lead_pb2.ControlResponse, frame))
        finally:
            # gRPC goes on asking for requests after the call has ended.
            outgoing.put_nowait(None)
            self._is_bound = self._is_bound or self._has_job

    def _obey(self, message: lead_pb2.ControlResponse) -> None:
        if message.HasField("welcome"):
            self._lead_incarnation = message.welcome.lead_incarnation
            log.info("connected to the lead at %s", self._address)
        order = decode_order(message)
        if order is not None:
            self._node.obey(order)

    async def _requests(
        self, outgoing: asyncio.Queue[lead_pb2.ControlRequest | None]
    ) -> AsyncIterator[lead_pb2.ControlRequest]:
        hello = lead_pb2.ShardHello(
            shard=self._node.index,
            incarnation=self._node.incarnation,
            expected_lead_incarnation=self._lead_incarnation if self._is_bound else 0,
            epoch=self._node.epoch,
        )
        yield lead_pb2.ControlRequest(hello=hello)
        for request in tuple(self._said.values()):
            yield request
        while (said := await outgoing.get()) is not None:
            yield said

    def _handle(self, error: ShardlineError) -> None:
        if isinstance(error, ShardUnreachableError):
            log.warning("the stream to the lead broke (%s): opening it again", error)
        else:
            self._node.end(error)

    def _give_up(self, patience: float, key: str) -> None:
        self._node.end(
            JobFailedError(
                f"the lead (shard 0 at {self._address}) could not be reached for {patience:g} s "
                f"({key})"
            )
        )


def _translate(error: grpc.aio.AioRpcError) -> ShardlineError:
    """A stream that breaks while it is written to ends with an error that gRPC makes up for want of
    the true one.
    """
    details = error.details() or ""
    if error.code() is grpc.StatusCode.INTERNAL and details.startswith(_WRITE_FAILED):
        return ShardUnreachableError("it was being written to")
    return error_from(error.code(), details)


def _encode(
    message: Squares | Ready | Remains | Lost | Failed,
) -> tuple[object, lead_pb2.ControlRequest]:
    """A report as a message, and what it replaces among those said before."""
    match message:
        case Squares(step, total):
            squares = lead_pb2.Squares(step=step, total=total)
            return Squares, lead_pb2.ControlRequest(squares=squares)
        case Ready(worker, step):
            ready = lead_pb2.Ready(step=step, rank=worker)
            return (Ready, worker), lead_pb2.ControlRequest(ready=ready)
        case Remains(worker, incarnation):
            remains = encode_remains(message)
            return (Remains, worker, incarnation), lead_pb2.ControlRequest(remains=remains)
        case Lost(worker, incarnation, reason):
            lost = lead_pb2.Lost(rank=worker, incarnation=incarnation, reason=reason)
            return (Lost, worker, incarnation), lead_pb2.ControlRequest(lost=lost)
        case Failed(reason):
            failure = lead_pb2.Failure(reason=reason)
            return Failed, lead_pb2.ControlRequest(failure=failure)
