"""The other shards' stream to the lead: orders come down it, squares and failures go up."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator

import grpc

from ps_core.codec import parse
from ps_core.config import RpcConfig
from ps_core.errors import JobFailedError, ShardlineError, ShardUnreachableError, error_from
from ps_core.rpc import LEAD_SERVICE, open_async_channel, stream_stream
from ps_core.v1 import lead_pb2
from ps_server.lead import Failed
from ps_server.node import Node
from ps_server.office import decode_order
from ps_server.shard import Squares

log = logging.getLogger(__name__)


class LeadLink:
    """Keeps one stream to the lead open, and ends the node when that is impossible."""

    def __init__(self, node: Node, address: str, config: RpcConfig) -> None:
        self._node = node
        self._address = address
        self._config = config
        self._outgoing: asyncio.Queue[lead_pb2.ControlRequest | None] = asyncio.Queue()
        self._said: dict[type[Squares | Failed], lead_pb2.ControlRequest] = {}
        self._lead_incarnation = 0

    def report(self, message: Squares | Failed) -> None:
        """Tell the lead. Does not block."""
        if isinstance(message, Squares):
            squares = lead_pb2.Squares(step=message.step, total=message.total)
            request = lead_pb2.ControlRequest(squares=squares)
        else:
            failure = lead_pb2.Failure(reason=message.reason)
            request = lead_pb2.ControlRequest(failure=failure)
        self._said[type(message)] = request
        self._outgoing.put_nowait(request)

    @property
    def _has_job(self) -> bool:
        """A worker has joined this shard: until then a restart of the lead loses nothing."""
        return self._node.shard is not None

    async def run(self) -> None:
        """Serve the link until the node has ended; when the lead cannot be reached in time, end the
        node.
        """
        patience = self._config.connect_timeout_seconds
        async with open_async_channel(self._address, self._config) as channel:
            while not self._node.ended.is_set():
                try:
                    await asyncio.wait_for(channel.channel_ready(), patience)
                    await self._serve(channel)
                except TimeoutError:
                    self._give_up(patience)
                except grpc.aio.AioRpcError as error:
                    self._handle(error_from(error.code(), error.details() or ""))
                except ShardlineError as error:
                    self._node.end(error)
                if self._has_job:
                    patience = self._config.reconnect_seconds
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
            expected_lead_incarnation=self._lead_incarnation if self._has_job else 0,
        )
        yield lead_pb2.ControlRequest(hello=hello)
        for request in tuple(self._said.values()):
            yield request  # the last stream may have broken under it; the lead knows repeats
        while (said := await outgoing.get()) is not None:
            yield said

    def _handle(self, error: ShardlineError) -> None:
        if isinstance(error, ShardUnreachableError):
            log.warning("the stream to the lead broke (%s): opening it again", error)
        else:
            self._node.end(error)

    def _give_up(self, patience: float) -> None:
        self._node.end(
            JobFailedError(
                f"the lead (shard 0 at {self._address}) could not be reached for {patience:g} s"
            )
        )
