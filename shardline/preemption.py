"""SIGTERM means that this machine is wanted back: the worker leaves at its next batch."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from ps_core.errors import Preempted
from shardline.streams import say


class Preemption:
    """Whether this process was told to end, and how long it has for that.

    The handler only takes a note; the training thread looks at it between batches and while it
    waits for other workers. A process that has not left in time ends all the same: the lead then
    finds it gone, as after a crash.
    """

    def __init__(self, grace_seconds: float) -> None:
        """Does not listen yet."""
        self._grace_seconds = grace_seconds
        self._requested = False
        self._owner = os.getpid()
        self._is_listening = False
        self._before: object = None
        self._timer: threading.Timer | None = None

    def listen(self) -> None:
        """Take SIGTERM from now on. Only the main thread may; elsewhere the signal ends the process
        as it always did.
        """
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._is_listening = True

    def close(self) -> None:
        """The process has left: SIGTERM does what it did before. Idempotent."""
        if self._is_listening:
            # None: the handler was not made in Python, and cannot be put back from here.
            before = signal.SIG_DFL if self._before is None else self._before
            signal.signal(signal.SIGTERM, before)  # type: ignore[arg-type]  # from signal()
            self._is_listening = False
        if self._timer is not None:
            self._timer.cancel()

    def is_requested(self) -> bool:
        """It was told to end."""
        return self._requested

    def check(self) -> None:
        """Raises Preempted when it was told to end. Call it where the job may be left."""
        if self._requested:
            raise Preempted

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a process of the loader, which inherited the handler
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._requested:
            return
        self._requested = True
        self._timer = threading.Timer(self._grace_seconds, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self) -> None:
        say(
            f"shardline: told to end {self._grace_seconds:g} s ago and still in the middle of a "
            "batch (worker.grace_seconds): ending now\n"
        )
        os._exit(Preempted().code)  # type: ignore[arg-type]  # always 75
