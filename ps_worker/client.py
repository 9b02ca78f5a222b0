"""One worker's connection to one shard. The only file of the worker that knows gRPC."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import grpc

from ps_core.codec import PartFrame, decode_response
from ps_core.config import Config, RpcConfig
from ps_core.errors import (
    DataLossError,
    JobFailedError,
    ShardlineError,
    ShardUnreachableError,
    error_from,
)
from ps_core.rpc import (
    SHARD_SERVICE,
    open_channel,
    stream_stream,
    stream_unary,
    unary_stream,
    unary_unary,
)
from ps_core.v1 import shard_pb2

log = logging.getLogger(__name__)

_QUIET_SECONDS = 2.0
"""How long a shard may take to come up before the worker says that it waits."""

_MAX_REASON_CHARACTERS = 2000
"""Of a worker's last word: a script's error may hold a whole tensor."""


class Fail(Protocol):
    """Told the reason why a stream broke, and before that, not `final`, a symptom."""

    def __call__(self, failure: ShardlineError, *, final: bool = True) -> None: ...


def describe(address: str, config: RpcConfig) -> shard_pb2.DescribeResponse:
    """What the shard at `address` says about itself. Raises ShardUnreachableError within the call
    timeout.
    """
    with open_channel(address, config) as channel:
        call = unary_unary(channel, SHARD_SERVICE, "Describe")
        response: shard_pb2.DescribeResponse = _unary(
            call, shard_pb2.DescribeRequest(), f"shard at {address}", config.call_timeout_seconds
        )
        return response


def _unary(call: Any, request: Any, shard: str, timeout_seconds: float) -> Any:
    try:
        return call(request, timeout=timeout_seconds)
    except grpc.RpcError as error:
        raise _translate(error, shard) from error


def _translate(error: grpc.RpcError, shard: str) -> ShardlineError:
    """The error of a call that failed; one that names the shard when it did not answer."""
    code, details = error.code(), error.details() or ""
    failure = error_from(code, details)
    if isinstance(failure, ShardUnreachableError) or code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ShardUnreachableError(f"no answer from {shard} ({details})")
    return failure


class ShardClient:
    """A channel, and one Exchange stream with the thread that reads it."""

    def __init__(
        self, index: int, address: str, worker: shard_pb2.WorkerId, config: Config
    ) -> None:
        """Does not connect yet."""
        self.index = index
        self.address = address
        self._worker = worker
        self._config = config.rpc
        self._long_seconds = config.membership.join_timeout_seconds
        self._channel = open_channel(address, config.rpc)
        self._incarnation = 0
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None
        self._call: Any = None
        self._question: Any = None
        self._closing = False
        self._gone = False

    def __str__(self) -> str:
        return f"shard {self.index} at {self.address}"

    def connect(self) -> None:
        """Wait until the shard is up. Raises ShardUnreachableError after the connect timeout."""
        ready = grpc.channel_ready_future(self._channel)
        patience = self._config.connect_timeout_seconds
        try:
            ready.result(timeout=min(_QUIET_SECONDS, patience))
        except grpc.FutureTimeoutError:
            log.warning("waiting up to %g s for %s", patience, self)
            try:
                ready.result(timeout=max(0.0, patience - _QUIET_SECONDS))
            except grpc.FutureTimeoutError as error:
                ready.cancel()
                raise ShardUnreachableError(
                    f"{self} did not answer for {patience:g} s: check that it runs and that the "
                    "address is right"
                ) from error

    def join(self, job: shard_pb2.JobSpec) -> bool:
        """Introduce this worker; True: its initial values count."""
        request = shard_pb2.JoinRequest(
            worker=self._worker,
            shard=self.index,
            job=job,
            pid=os.getpid(),
            host=socket.gethostname(),
            expected_shard_incarnation=self._incarnation,
        )
        response = self._call_unary("Join", request)
        self._incarnation = response.shard_incarnation
        return bool(response.gives_initial_values)

    def leave(self, failure: str) -> None:
        """Say goodbye: finished, or failed for a reason. Nobody listens once the shard has died or
        has ended the job.
        """
        if not self._gone:
            reason = failure[:_MAX_REASON_CHARACTERS]
            self._call_unary("Leave", shard_pb2.LeaveRequest(worker=self._worker, failure=reason))

    def load(self, messages: Iterable[shard_pb2.LoadRequest | bytes]) -> None:
        """Give the shard values."""

        def requests() -> Iterator[shard_pb2.LoadRequest | bytes]:
            yield shard_pb2.LoadRequest(hello=shard_pb2.Hello(worker=self._worker))
            yield from messages

        call = stream_unary(self._channel, SHARD_SERVICE, "Load")
        _unary(call, requests(), str(self), self._long_seconds)

    def pull(self, content: shard_pb2.Content) -> Iterator[shard_pb2.PullResponse]:
        """Read the shard's values: the version first."""
        call = unary_stream(self._channel, SHARD_SERVICE, "Pull")
        request = shard_pb2.PullRequest(worker=self._worker, content=content)
        try:
            yield from call(request, timeout=self._long_seconds)
        except grpc.RpcError as error:
            raise _translate(error, str(self)) from error

    def open(
        self, receive: Callable[[PartFrame | shard_pb2.ExchangeResponse], None], fail: Fail
    ) -> None:
        """Open the stream. A thread of this client calls `receive` for each message, and `fail`
        when it breaks: with the symptom if the reason takes time to find, then with the reason.
        """
        self.send(shard_pb2.ExchangeRequest(hello=shard_pb2.Hello(worker=self._worker)))
        requests = iter(self._outgoing.get, None)
        self._call = stream_stream(self._channel, SHARD_SERVICE, "Exchange")(requests)
        self._reader = threading.Thread(
            target=self._read, args=(receive, fail), name=f"shard-{self.index}", daemon=True
        )
        self._reader.start()

    def send(self, message: shard_pb2.ExchangeRequest | bytes) -> None:
        """Send on the stream. Does not block."""
        self._outgoing.put(message)

    def close(self) -> None:
        """Finish the stream, wait a bounded time for it to end, and close the channel."""
        self._closing = True
        self._outgoing.put(None)
        if self._question is not None:
            self._question.cancel()
        if self._reader is not None:
            self._reader.join(self._config.drain_seconds)
            self._call.cancel()
            self._reader.join(self._config.drain_seconds)
        self._channel.close()

    def _call_unary(self, name: str, request: Any) -> Any:
        call = unary_unary(self._channel, SHARD_SERVICE, name)
        return _unary(call, request, str(self), self._config.call_timeout_seconds)

    def _read(
        self, receive: Callable[[PartFrame | shard_pb2.ExchangeResponse], None], fail: Fail
    ) -> None:
        failure: ShardlineError
        try:
            for frame in self._call:
                receive(decode_response(frame))
            failure = ShardUnreachableError(f"{self} ended the stream")
        except ShardlineError as error:
            failure = error
        except grpc.RpcError as error:
            failure = _translate(error, str(self))
            if isinstance(failure, ShardUnreachableError) and not self._closing:
                fail(failure, final=False)
                failure = self._diagnose(error.details())
            self._gone = isinstance(failure, (ShardUnreachableError, DataLossError, JobFailedError))
        except Exception as error:
            # The training thread waits for this one: it must not end in silence.
            log.exception("a bug in shardline, or in torch")
            failure = ShardlineError(f"an answer of {self}: {type(error).__name__}: {error}")
        if not self._closing:
            fail(failure)

    def _diagnose(self, symptom: str | None) -> ShardlineError:
        """Why the stream broke: the shard is asked whether it is still the one it was."""
        self._question = unary_unary(self._channel, SHARD_SERVICE, "Describe").future(
            shard_pb2.DescribeRequest(),
            timeout=max(self._config.reconnect_seconds, 0.1),
            wait_for_ready=True,
        )
        try:
            now = self._question.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            return ShardUnreachableError(
                f"{self} died or cannot be reached any more: the stream broke ({symptom})"
            )
        if now.incarnation != self._incarnation:
            return DataLossError(f"{self} restarted and lost its state: start the job again")
        if now.reason:
            return JobFailedError(now.reason)
        return ShardUnreachableError(f"the stream to {self} broke ({symptom})")
