"""One process of a run: started, listened to, signalled, and gone when the launcher is gone."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Final

from ps_core.errors import ShardlineError
from shardline.supervision import ProcessId

NUM_LAST_LINES: Final = 15
_MAX_LINE_BYTES: Final = 2**16  # a longer line is cut into several
_JOIN_SECONDS: Final = 2.0
_TRAMPOLINE: Final = """
import ctypes, os, signal, sys
parent, program, *command = sys.argv[1:]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(parent):  # it was gone before the call
    os._exit(1)
for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and so would the command
    signal.signal(number, signal.SIG_DFL)
with open("/proc/self/environ", "rb") as file:  # Python itself may have set LC_CTYPE
    pairs = [entry.partition(b"=") for entry in file.read().split(b"\\0") if entry]
os.execve(program, command, {name: value for name, _, value in pairs})
"""
"""The first program of every process: it has the kernel kill the process when its parent, the
launcher, is gone, and becomes the command. A `preexec_fn` could do that only while the launcher
has a single thread: a fork copies locks that other threads hold.
"""


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
    thread): the process is killed when that thread is gone.
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
        _ending_with_this_process(spec),
        env=dict(spec.environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the launcher only, which ends workers first
    )


def _ending_with_this_process(spec: ProcessSpec) -> tuple[str, ...]:
    """The command, so that it is killed when this process is gone; only Linux can do that."""
    program = shutil.which(spec.command[0], path=spec.environment.get("PATH", os.defpath))
    if program is None:
        raise FileNotFoundError(errno.ENOENT, "not a program that can be run")
    if sys.platform != "linux":
        return spec.command
    # Isolated from the user's packages and variables, which are for the command.
    python = (sys.executable, "-I", "-S", "-c", _TRAMPOLINE)
    return (*python, str(os.getpid()), program, *spec.command)
