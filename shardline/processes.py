"""One process of a run: started, listened to, signalled, and gone when the launcher is gone."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Final

from ps_core.errors import ShardlineError
from shardline.supervision import ProcessId

NUM_LAST_LINES: Final = 15
_MAX_LINE_BYTES: Final = 2**16  # a longer line is cut into several
_JOIN_SECONDS: Final = 2.0
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to start, and where people find it."""

    id: ProcessId
    command: tuple[str, ...]
    environment: Mapping[str, str]  # all of it
    address: str | None = None  # host:port of a shard
    metrics_url: str | None = None

    @property
    def log_name(self) -> str:
        return f"{self.id.role}-{self.id.index}.log"


class Child:
    """A running process, the first of its own session.

    `log` gets all that it writes, `on_line` each line as text, on a thread of this object; both
    begin with `listen`. Must be made by a thread that lives until the process has ended (the main
    thread), before any thread is started.
    """

    def __init__(self, spec: ProcessSpec, log: IO[bytes]) -> None:
        self.spec = spec
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._log = log
        self._log_is_good = True
        self._ended = False
        try:
            self._process = _start(spec)
        except OSError as exc:
            raise ShardlineError(f"cannot start {spec.id} ({spec.command[0]}): {exc}") from exc
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def listen(self, on_line: Callable[[str], None]) -> None:
        """Start to read what the process writes."""
        name = f"reader of {self.spec.id}"
        self._reader = threading.Thread(target=self._read, args=(on_line,), name=name, daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """The exit code once the process has ended (negative: a signal), then also of its children.

        Processes that it leaves behind are killed.
        """
        if self._ended:
            return self._process.returncode
        # Until it is reaped, no other process can get its number, which is that of its group too.
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self._kill_group()
        self._ended = True
        return self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, SIGKILL also to the children of the process."""
        if self._ended:
            return
        if number is signal.SIGKILL:
            self._kill_group()
        else:
            self._process.send_signal(number)

    def close(self) -> bool:
        """Wait for the rest of what an ended process wrote; False if its pipe is still held."""
        assert self._process.stdout is not None
        if self._reader is not None:
            self._reader.join(_JOIN_SECONDS)
            if self._reader.is_alive():
                return False
        self._process.stdout.close()
        with contextlib.suppress(OSError):  # of a full disk
            self._log.close()
        return True

    def _kill_group(self) -> None:
        # macOS refuses where only the ended process itself is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for line in iter(partial(self._process.stdout.readline, _MAX_LINE_BYTES), b""):
            self._write_log(line)
            text = line.decode("utf-8", "replace").rstrip("\r\n").rpartition("\r")[2]
            self.last_lines.append(text)
            on_line(text)

    def _write_log(self, line: bytes) -> None:
        """A full disk must not stop the process, so the log ends there and reading goes on."""
        try:
            if self._log_is_good:
                self._log.write(line)
                self._log.flush()
        except OSError as exc:
            self._log_is_good = False
            self.last_lines.append(f"(the log ends here: {exc})")


def _start(spec: ProcessSpec) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        spec.command,
        env=dict(spec.environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the launcher only, which ends workers first
        # Safe because no other thread runs yet.
        preexec_fn=_end_with_parent(),
    )


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process calls so that the kernel kills it when the launcher is gone."""
    if sys.platform != "linux":
        return None
    prctl: Any = ctypes.CDLL(None).prctl
    launcher = os.getpid()

    def end_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it was gone before the call
            os._exit(1)

    return end_with_parent
