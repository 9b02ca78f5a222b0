"""Beats come at once and then regularly, from a thread of their own, until they are stopped."""

from __future__ import annotations

import threading
import time

from ps_core.heartbeat import Heartbeat

PATIENCE_SECONDS = 60.0


class Counter:
    """Counts beats and lets a test wait for them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self) -> None:
        with self._changed:
            self.times.append(time.monotonic())
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.times) >= count, PATIENCE_SECONDS)


def test_the_first_beat_comes_at_once() -> None:
    beats = Counter()
    heartbeat = Heartbeat(1e6, beats)
    beats.wait_for(1)
    heartbeat.close()
    assert len(beats.times) == 1


def test_beats_come_no_sooner_than_the_interval() -> None:
    beats = Counter()
    heartbeat = Heartbeat(0.02, beats)
    beats.wait_for(4)
    heartbeat.close()
    gaps = [after - before for before, after in zip(beats.times, beats.times[1:], strict=False)]
    assert min(gaps) > 0.015


def test_beats_do_not_wait_for_the_training_thread() -> None:
    beats = Counter()
    heartbeat = Heartbeat(0.001, beats)
    beats.wait_for(3)
    heartbeat.close()
    assert beats.threads == {"heartbeat"}


def test_no_beat_comes_after_the_end() -> None:
    beats = Counter()
    heartbeat = Heartbeat(0.001, beats)
    beats.wait_for(3)
    heartbeat.close()
    count = len(beats.times)
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
    heartbeat.close()
    assert len(beats.times) == count


def test_the_end_does_not_wait_for_the_next_beat() -> None:
    beats = Counter()
    heartbeat = Heartbeat(1e6, beats)
    started = time.monotonic()
    heartbeat.close()
    assert time.monotonic() - started < PATIENCE_SECONDS
