"""Starts Python programs quickly: forks them off a process that has imported torch already.

    child = fork(["-m", "ps_server"], environment)   # as `python -m ps_server`

Importing torch takes seconds, a fork milliseconds, and the tests start hundreds of processes. A
child is a process like any other: signals, exit codes and its death are real. The zygote ends with
the tests, however those end, since the socket between them then closes.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
_START_SECONDS: Final = 180.0
_MAX_MESSAGE_BYTES: Final = 2**16


class ForkedChild:
    """A running process, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(self, pid: int, stdout: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout = os.fdopen(stdout, encoding="utf-8", errors="replace")
        self._ended = threading.Event()

    def poll(self) -> int | None:
        """The exit code once it has ended; negative: the signal that ended it."""
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:  # until the zygote is told so, the number is this child's
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def ended(self, code: int) -> None:
        """The zygote has seen its end."""
        self.returncode = code
        self._ended.set()


class Zygote:
    """The test process's side."""

    def __init__(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = here
        self._lock = threading.Lock()
        self._started: dict[int, threading.Event] = {}
        self._children: dict[int, ForkedChild] = {}
        self._pids: list[int] = []
        self._answered = threading.Semaphore(0)
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote", str(there.fileno())],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._reader = threading.Thread(target=self._read, name="zygote", daemon=True)
        self._reader.start()
        atexit.register(self.close)

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedChild:
        """Start `python ARGUMENTS`; standard output and error go to one pipe."""
        reader, writer = os.pipe()
        request = json.dumps({"arguments": list(arguments), "environment": dict(environment)})
        with self._lock:
            socket.send_fds(self._socket, [request.encode()], [writer])
            os.close(writer)
            if not self._answered.acquire(timeout=_START_SECONDS):
                raise AssertionError("the zygote does not start a process")
            child = ForkedChild(self._pids.pop(), reader)
            self._children[child.pid] = child
        self._socket.send(json.dumps({"known": child.pid}).encode())
        return child

    def close(self) -> None:
        """End the zygote; what it has forked ends with the tests that started it."""
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reader, which closing does not
        self._reader.join()
        self._socket.close()
        self._process.wait(timeout=_START_SECONDS)

    def _read(self) -> None:
        try:
            while data := self._socket.recv(_MAX_MESSAGE_BYTES):
                message = json.loads(data)
                if "started" in message:
                    self._pids.append(message["started"])
                    self._answered.release()
                else:
                    self._children.pop(message["ended"]).ended(message["code"])
        except OSError:  # closed
            return


@functools.cache
def zygote() -> Zygote:
    """The one of this test process."""
    return Zygote()


# -- The zygote's own process ----------------------------------------------------------------------


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork what is asked for, and tell about ends. In a child: what it is to run."""
    wake, awake = os.pipe()
    os.set_blocking(awake, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(awake, warn_on_full_buffer=False)
    known: set[int] = set()
    while True:
        ready, _, _ = select.select([channel.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, _MAX_MESSAGE_BYTES)
        if channel.fileno() in ready:
            data, descriptors, _, _ = socket.recv_fds(channel, _MAX_MESSAGE_BYTES, 1)
            if not data:
                return None
            message: dict[str, Any] = json.loads(data)
            if "known" in message:
                known.add(message["known"])
            else:
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for descriptor in (wake, awake):
                        os.close(descriptor)
                    return {**message, "output": descriptors[0]}
                os.close(descriptors[0])
                channel.send(json.dumps({"started": pid}).encode())
        _tell_ends(channel, known)


def _tell_ends(channel: socket.socket, known: set[int]) -> None:
    """Report and reap the children that have ended; only those that the tests know, so that a
    number is not given to another process before its end is told.
    """
    for pid in sorted(known):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            known.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            channel.send(json.dumps({"ended": pid, "code": code}).encode())


def _become(request: dict[str, Any]) -> None:
    """Run a program as Python's command line would."""
    os.dup2(request["output"], 1)
    os.dup2(request["output"], 2)
    os.close(request["output"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv = [rest[0], *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - a test's own text
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def _warm_up() -> None:
    """Import what every shard and worker imports, and what torch imports at the first use."""
    import torch

    import ps_server.server
    import shardline

    assert ps_server.server
    assert shardline
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])


def main() -> None:
    """Serve until the tests have ended; a child leaves by running its program."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _warm_up()
    request = _serve(channel)
    channel.close()
    if request is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _become(request)


if __name__ == "__main__":
    main()
