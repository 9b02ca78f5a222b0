"""SIGTERM, sent to this process and to others that stand in for a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from ps_core.config import load
from ps_core.errors import Preempted
from shardline.ports import free_ports
from shardline.preemption import Preemption
from shardline.session import Session

LONG = 1000.0
PATIENCE_SECONDS = 100.0


@pytest.fixture
def before() -> Iterator[list[int]]:
    """The signals that a handler from before has seen."""
    seen: list[int] = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, handler)


def terminate() -> None:
    """This process; the handler has run when this returns."""
    signal.raise_signal(signal.SIGTERM)


def run(script: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which is as good as a worker."""
    head = "import os, signal, sys, time\nfrom shardline.preemption import Preemption\n"
    return subprocess.run(
        [sys.executable, "-c", head + script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


# -- A note is taken -------------------------------------------------------------------------------


def test_nobody_is_preempted_who_was_not_told_to_end(before: list[int]) -> None:
    preemption = Preemption(LONG)
    preemption.listen()
    preemption.check()
    assert not preemption.is_requested()
    preemption.close()


def test_sigterm_is_noted_and_raised_where_the_job_may_be_left(before: list[int]) -> None:
    preemption = Preemption(LONG)
    preemption.listen()
    for _ in range(2):
        terminate()
        assert preemption.is_requested()
        for _ in range(2):  # as often as it is asked
            with pytest.raises(Preempted):
                preemption.check()
    preemption.close()
    assert before == []


def test_it_is_an_exit_with_75_that_a_script_does_not_swallow_with_its_errors() -> None:
    def handle_errors() -> None:
        with suppress(Exception):
            raise Preempted

    with pytest.raises(SystemExit) as caught:
        handle_errors()
    assert caught.value.code == os.EX_TEMPFAIL == 75


def test_after_closing_the_signal_does_what_it_did_before(before: list[int]) -> None:
    preemption = Preemption(LONG)
    preemption.listen()
    preemption.close()
    preemption.close()
    terminate()
    assert before == [signal.SIGTERM]
    assert not preemption.is_requested()


def test_a_process_that_has_left_in_time_is_not_ended(before: list[int]) -> None:
    others = set(threading.enumerate())
    preemption = Preemption(LONG)
    preemption.listen()
    terminate()
    [timer] = set(threading.enumerate()) - others
    preemption.close()
    timer.join(PATIENCE_SECONDS)
    assert not timer.is_alive()


# -- Other threads and processes -------------------------------------------------------------------


def test_on_another_thread_than_the_main_one_the_signal_stays_as_it_was(before: list[int]) -> None:
    def work() -> None:
        preemption = Preemption(LONG)
        preemption.listen()
        preemption.check()
        preemption.close()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(work).result()
    terminate()
    assert before == [signal.SIGTERM]


def test_a_session_may_be_on_another_thread_than_the_main_one(before: list[int]) -> None:
    [port] = free_ports(1)
    environ = {
        "SHARDLINE_CLUSTER_SHARDS": f"127.0.0.1:{port}",
        "SHARDLINE_METRICS_PORT": "-1",
        "SHARDLINE_WORKER_DEVICE": "cpu",
    }

    def work() -> int:
        with Session(load(environ=environ)) as session:
            return session.rank

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(work).result() == 0
    terminate()
    assert before == [signal.SIGTERM]


def test_a_forked_process_dies_of_the_signal_and_its_parent_does_not() -> None:
    ended = run(
        """
preemption = Preemption(1000)
preemption.listen()
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1000)
_, status = os.waitpid(child, 0)
assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM, status
assert not preemption.is_requested()
"""
    )
    assert ended.returncode == 0, ended.stderr


def test_a_process_of_torchs_loader_dies_of_the_signal_and_its_parent_is_told() -> None:
    ended = run(
        """
from torch.utils.data import DataLoader, Dataset

class Deadly(Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGTERM)

preemption = Preemption(1000)
preemption.listen()
try:
    next(iter(DataLoader(Deadly(), num_workers=1)))
except RuntimeError as error:
    assert "DataLoader worker (pid" in str(error), error
else:
    sys.exit("it lives")
assert not preemption.is_requested()
"""
    )
    assert ended.returncode == 0, ended.stderr


# -- The grace time --------------------------------------------------------------------------------


def test_a_process_that_is_stuck_ends_with_75_after_the_grace_time() -> None:
    ended = run(
        """
preemption = Preemption(0.2)
preemption.listen()
os.kill(os.getpid(), signal.SIGTERM)
try:
    time.sleep(1000)
finally:
    print("cleaned up")
"""
    )
    assert ended.returncode == 75
    assert ended.stdout == ""
    assert ended.stderr == (
        "shardline: told to end 0.2 s ago and still in the middle of a batch "
        "(worker.grace_seconds): ending now\n"
    )
