"""A worker's signs of life."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Heartbeat:
    """Calls `beat` at once and then every `interval_seconds`, on a thread of its own, until closed.

    The thread lives and stops with the process, which is what the beats prove: a worker that only
    computes, or waits, keeps beating; one that is stopped or gone does not.
    """

    def __init__(self, interval_seconds: float, beat: Callable[[], None]) -> None:
        self._interval_seconds = interval_seconds
        self._beat = beat
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait for the thread. Idempotent."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        self._beat()
        while not self._closed.wait(self._interval_seconds):
            self._beat()
