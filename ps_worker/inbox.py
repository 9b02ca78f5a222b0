"""Where reader threads leave what they received, and the training thread waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ps_core.errors import JobFailedError, ShardlineError, ShardUnreachableError
from ps_core.v1 import shard_pb2


class Inbox:
    """Parts that are still expected, the end of a meeting, or the failure of a stream. Safe for
    threads.

    The waits have no timeout of their own: a peer may compute for hours. They end when a stream
    breaks, and the shards end every stream when a worker or shard is lost.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._expected: set[int] = set()
        self._met: shard_pb2.Met | None = None
        self._failure: ShardlineError | None = None
        self._symptom: ShardlineError | None = None

    def expect(self, parts: Iterable[int]) -> None:
        """Wait for these parts from now on."""
        with self._changed:
            self._expected.update(parts)

    def arrived(self, part: int) -> None:
        """A part's parameters are in place; one that nobody expects is a repeated answer."""
        with self._changed:
            self._expected.discard(part)
            if not self._expected:
                self._changed.notify_all()

    def met(self, met: shard_pb2.Met) -> None:
        """A meeting is over."""
        with self._changed:
            self._met = met
            self._changed.notify_all()

    def fail(self, failure: ShardlineError, *, final: bool = True) -> None:
        """A stream has broken; the first reason is kept.

        Not `final`: this is the symptom, and whoever reads the stream is finding out the reason.
        When another shard says meanwhile that the job has failed, that is the reason, but the error
        is of the symptom's kind: what this worker saw first does not depend on who is faster.
        """
        with self._changed:
            if not final:
                self._symptom = self._symptom or failure
                return
            if self._symptom is not None and isinstance(failure, JobFailedError):
                failure = type(self._symptom)(f"{self._symptom}: {failure}")
            self._failure = self._failure or failure
            self._changed.notify_all()

    def wait_for_parts(self) -> None:
        """Return once every expected part has arrived. Raises the failure."""
        self._wait(lambda: not self._expected)

    def wait_for_meeting(self) -> shard_pb2.Met:
        """Return once the meeting is over. Raises the failure."""
        self._wait(lambda: self._met is not None)
        met, self._met = self._met, None
        assert met is not None
        return met

    @contextmanager
    def explaining(self, patience_seconds: float) -> Iterator[None]:
        """Around a call that is not on a stream. Shards that end the job refuse calls at once; why
        they do so is what they say on the streams, which is raised instead.
        """
        try:
            yield
        except ShardUnreachableError as error:
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None, patience_seconds)
                raise (self._failure or error) from error

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: done() or self._failure is not None)
            if not done() and self._failure is not None:
                raise self._failure
