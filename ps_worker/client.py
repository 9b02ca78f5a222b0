"""One worker's connection to one shard."""

from __future__ import annotations

import logging
import os
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import grpc

from ps_core.codec import PartFrame, decode_response
from ps_core.errors import (
    DataLossError,
    EvictedError,
    JobFailedError,
    JobOverError,
    ShardlineError,
    ShardUnreachableError,
)
from ps_core.rpc import (
    SHARD_SERVICE,
    Frame,
    open_channel,
    stream_stream,
    stream_unary,
    unary_stream,
    unary_unary,
)
from ps_core.settings import Config
from ps_core.v1 import shard_pb2
from ps_worker.calls import LONG_KEY, translate, unary

log = logging.getLogger(__name__)

_QUIET_SECONDS = 2.0
"""How long a shard may take to come up before the worker says that it waits."""

_MAX_REASON_CHARACTERS = 2000
"""Of a worker's last word: a script's error may hold a whole tensor."""

_STEADY_SECONDS = 1.0
"""A stream that has lived this long, or has brought a message, was open."""


class Listener(Protocol):
    """Whoever uses the stream. Called by the stream's thread."""

    def receive(self, shard: int, response: PartFrame | shard_pb2.ExchangeResponse) -> None:
        """A message has come."""
        ...

    def missing(self, shard: int) -> list[shard_pb2.ExchangeRequest | Frame]:
        """The stream has broken and is open again: what the shard must hear, again or now."""
        ...

    def recovered(self, shard: int) -> None:
        """The stream is open again."""
        ...

    def fail(self, shard: int, failure: ShardlineError, *, final: bool = True) -> None:
        """The stream is broken for this reason; before that, not `final`, for a symptom."""
        ...


def _is_over() -> JobOverError:
    return JobOverError("the job is complete: there is nothing left to do")


def _wants_answer(request: shard_pb2.ExchangeRequest) -> bool:
    """Of a numbered one."""
    return request.HasField("meet") or request.lease.HasField("pass")


class ShardClient:
    """A channel, and one Exchange stream with the thread that reads it.

    A stream that breaks is opened again, and what the shard has not answered is sent again: the
    very same messages, which the shard knows if it has seen them.
    """

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
        self._sending = threading.Lock()
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._requests: dict[int, shard_pb2.ExchangeRequest] = {}
        """Numbered ones that are not answered yet."""
        self._last_number = 0
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
                    f"{self} did not answer for {patience:g} s (rpc.connect_timeout_seconds): "
                    "check that it runs and that the address is right"
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

    def leave(self, farewell: int, failure: str) -> None:
        """Say goodbye. Nobody listens once the shard has died, or has ended the job."""
        if not self._gone:
            reason = failure[:_MAX_REASON_CHARACTERS]
            request = shard_pb2.LeaveRequest(worker=self._worker, failure=reason)
            request.farewell = farewell  # type: ignore[assignment]  # enums are ints on the wire
            self._call_unary("Leave", request)

    def load(self, messages: Iterable[shard_pb2.LoadRequest | bytes]) -> None:
        """Give the shard values."""

        def requests() -> Iterator[shard_pb2.LoadRequest | bytes]:
            yield shard_pb2.LoadRequest(hello=shard_pb2.Hello(worker=self._worker))
            yield from messages

        call = stream_unary(self._channel, SHARD_SERVICE, "Load")
        unary(call, requests(), str(self), self._long_seconds, LONG_KEY)

    def pull(
        self, content: shard_pb2.Content, held: Mapping[str, bytes] = MappingProxyType({})
    ) -> Iterator[shard_pb2.PullResponse]:
        """Read the shard's values: the version first. Buffers with the digests `held` come without
        data.
        """
        call = unary_stream(self._channel, SHARD_SERVICE, "Pull")
        request = shard_pb2.PullRequest(worker=self._worker, content=content, held=held)
        try:
            yield from call(request, timeout=self._long_seconds)
        except grpc.RpcError as error:
            raise translate(error, str(self), LONG_KEY) from error

    def open(self, listener: Listener) -> None:
        """Open the stream. A thread of this client tells the listener what comes."""
        self._open_stream(list)
        self._reader = threading.Thread(
            target=self._read, args=(listener,), name=f"shard-{self.index}", daemon=True
        )
        self._reader.start()

    def send(self, message: shard_pb2.ExchangeRequest | Frame) -> None:
        """Send on the stream. Does not block; a frame is made later, on a thread of gRPC."""
        with self._sending:
            self._outgoing.put(message)

    def request(self, message: shard_pb2.ExchangeRequest) -> None:
        """Send a request to the lead, numbered, and again whenever the stream breaks before an
        answer to it or a later one has come. Does not block.
        """
        with self._sending:
            self._last_number += 1
            message.number = self._last_number
            self._requests[message.number] = message
            self._outgoing.put(message)

    def answered(self, number: int) -> bool:
        """The lead has answered this request, and so has seen all before: those that want no answer
        are done. False: it was answered before, and this is a repeat.
        """
        with self._sending:
            is_first = self._requests.pop(number, None) is not None
            for old, request in list(self._requests.items()):
                if old < number and not _wants_answer(request):
                    del self._requests[old]
            return is_first

    def close(self) -> None:
        """Finish the stream, wait a bounded time for it to end, and close the channel."""
        with self._sending:
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
        return unary(call, request, str(self), self._config.call_timeout_seconds)

    def _open_stream(
        self, missing: Callable[[], Iterable[shard_pb2.ExchangeRequest | Frame]]
    ) -> None:
        """Start a stream that says hello, repeats what is not answered, and goes on from there.

        `missing` is asked while nothing can be sent: what is sent before is among what it returns.
        Raises ShardUnreachableError once the client is being closed.
        """
        with self._sending:
            self._check_open()
            self._outgoing.put(None)  # for the stream before
            self._outgoing = queue.SimpleQueue()
            self._outgoing.put(
                shard_pb2.ExchangeRequest(hello=shard_pb2.Hello(worker=self._worker))
            )
            for message in (*self._requests.values(), *missing()):
                self._outgoing.put(message)
            requests = iter(self._outgoing.get, None)
            self._call = stream_stream(self._channel, SHARD_SERVICE, "Exchange")(requests)

    def _check_open(self) -> None:
        """Call it while nothing can be sent, or closed."""
        if self._closing:
            raise ShardUnreachableError(f"the stream to {self} is being closed")

    def _read(self, listener: Listener) -> None:
        failure: ShardlineError
        try:
            self._read_on(listener)
            failure = _is_over()
        except ShardlineError as error:
            failure = error
        except Exception as error:
            # The training thread waits for this one: it must not end in silence.
            log.exception("a bug in shardline, or in torch")
            failure = ShardlineError(f"an answer of {self}: {type(error).__name__}: {error}")
        over = (ShardUnreachableError, DataLossError, JobFailedError, EvictedError, JobOverError)
        self._gone = isinstance(failure, over)
        if not self._closing:
            listener.fail(self.index, failure)

    def _read_on(self, listener: Listener) -> None:
        """Read until the shard ends the stream well. Raises why it cannot be read any more."""
        patience_ends: float | None = None
        while True:
            opened = time.monotonic()
            try:
                for frame in self._call:
                    patience_ends = None
                    listener.receive(self.index, decode_response(frame))
                return
            except grpc.RpcError as error:
                symptom = translate(error, str(self))
                if not isinstance(symptom, ShardUnreachableError) or self._closing:
                    raise symptom from error
            now = time.monotonic()
            if patience_ends is None or now - opened > _STEADY_SECONDS:
                patience_ends = now + self._config.reconnect_seconds
            self._recover(listener, symptom, patience_ends)

    def _recover(
        self, listener: Listener, symptom: ShardUnreachableError, patience_ends: float
    ) -> None:
        """Open the stream again. Raises why that is not possible."""
        listener.fail(self.index, symptom, final=False)
        failure = self._diagnose(symptom, max(patience_ends - time.monotonic(), 0.1))
        if failure is not None:
            raise failure
        if time.monotonic() >= patience_ends:
            raise symptom
        time.sleep(random.uniform(0.01, 0.05))  # noqa: S311 - jitter, not a secret
        log.warning("the stream to %s broke: opening it again", self)
        self._open_stream(lambda: listener.missing(self.index))
        listener.recovered(self.index)

    def _diagnose(
        self, symptom: ShardUnreachableError, patience_seconds: float
    ) -> ShardlineError | None:
        """Why the stream broke, if it was not only the connection: the shard is asked whether it is
        still the one it was.
        """
        with self._sending:
            self._check_open()
            self._question = unary_unary(self._channel, SHARD_SERVICE, "Describe").future(
                shard_pb2.DescribeRequest(), timeout=patience_seconds, wait_for_ready=True
            )
        try:
            now = self._question.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            return ShardUnreachableError(
                f"{self} died or cannot be reached any more: the stream broke ({symptom}) and did "
                f"not come back within {self._config.reconnect_seconds:g} s (rpc.reconnect_seconds)"
            )
        if now.incarnation != self._incarnation:
            return DataLossError(f"{self} restarted and lost its state: start the job again")
        if now.reason:
            return JobFailedError(now.reason)
        if now.phase == shard_pb2.PHASE_COMPLETE:
            return _is_over()
        return None
