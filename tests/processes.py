"""Real shards and workers for tests: started, listened to, signalled, and gone when the test is.

with Fleet(tmp_path, num_shards=2, num_workers=2) as fleet:
    lead = fleet.shard(0)
    worker = fleet.worker(1, script)
    worker.wait_for("step 5")  # ends as soon as the line is there
    lead.send(SIGKILL)
    assert worker.wait() == 3
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from ps_core.config import inherited_environment
from tests.zygote import zygote

ROOT: Final = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS: Final = 100.0
"""Bounds every wait; nothing takes that long, not even on a busy machine."""

_TAIL_LINES: Final = 40
_EPHEMERAL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_SETTINGS: Final[Mapping[str, object]] = {
    "metrics.port": -1,
    "worker.device": "cpu",
    "worker.threads": 1,
    "rpc.connect_timeout_seconds": 90,
    "rpc.reconnect_seconds": 1,
    "membership.join_timeout_seconds": 90,
}


# -- Ports -----------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody uses, none of them one that the kernel gives to outgoing
    connections: it could be taken before the process it is meant for binds it.
    """
    first, last = map(int, _EPHEMERAL.read_text().split())
    ports = [port for port in range(10000, 65536) if not first <= port <= last]
    random.SystemRandom().shuffle(ports)
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port := ports.pop()))
            except OSError:
                continue
            found.append(port)
    return found


@contextmanager
def occupied_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Proxy:
    """Carries connections to `address` from an address of its own, until they are cut."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = host, int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._refuses = False
        self._threads: list[threading.Thread] = []
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._run(self._accept)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        self._server.close()

    def cut(self) -> None:
        """Break all connections; new ones are taken."""
        while self._open:
            with suppress(OSError):  # it was broken already
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def refuse(self) -> None:
        """Break all connections, and take no new ones."""
        self._refuses = True
        self.cut()

    def take_again(self) -> None:
        """After `refuse`."""
        self._refuses = False

    def _accept(self) -> None:
        with suppress(OSError):  # the server was shut down
            while True:
                near, _ = self._server.accept()
                self._run(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        with suppress(OSError), near, socket.create_connection(self._target) as far:
            self._open += [near, far]
            if self._refuses:
                self.cut()
            back = self._run(self._carry, far, near)
            self._carry(near, far)
            back.join(PATIENCE_SECONDS)

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # cut
            while data := source.recv(2**16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):  # cut
                end.shutdown(socket.SHUT_RDWR)

    def _run(self, work: Callable[..., None], *arguments: socket.socket) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread


# -- Processes -------------------------------------------------------------------------------------


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """This process's environment with these configuration keys, such as "cluster.rank"."""
    named = {f"SHARDLINE_{key.replace('.', '_').upper()}": v for key, v in settings.items()}
    return {
        **inherited_environment(),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **{name: str(int(v) if isinstance(v, bool) else v) for name, v in named.items()},
    }


class Process:
    """A process and the lines it has written so far."""

    def __init__(self, name: str, arguments: Sequence[str], settings: Mapping[str, object]) -> None:
        """Start Python with these arguments."""
        self.name = name
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._process = zygote().fork(arguments, environment(settings))
        self._reader = threading.Thread(target=self._read, name=f"reader of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        """All that it has written."""
        with self._changed:
            return "\n".join(self._lines)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line with `pattern`. AssertionError when the process ends without one."""
        seen = 0
        with self._changed:
            while True:
                for line in self._lines[seen:]:
                    if match := re.search(pattern, line):
                        return match
                seen = len(self._lines)
                if self._ended or not self._changed.wait(PATIENCE_SECONDS):
                    raise AssertionError(f"no {pattern!r} in\n{self.tail()}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end and return the exit code; negative: the signal that ended it."""
        try:
            code = self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.tail()}") from None
        self._reader.join(PATIENCE_SECONDS)
        return code

    def tail(self) -> str:
        """Its last lines, for the report of a failed test."""
        state = "running" if self.is_running else f"exit code {self._process.returncode}"
        lines = self._lines[-_TAIL_LINES:]
        return "\n".join([f"-- {self.name} (pid {self.pid}, {state})", *lines])

    def close(self) -> None:
        """Kill it if it still runs, and reap it."""
        if self.is_running:
            self._process.kill()
        self.wait()
        self._process.stdout.close()

    def peak_memory_bytes(self) -> int:
        """The most memory it has held so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024

    def cpu_seconds(self) -> float:
        """What it has computed so far, however busy the machine was."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime

    def _read(self) -> None:
        for line in self._process.stdout:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Fleet:
    """The processes of one job. At the end all are killed, and their last lines are printed, which
    pytest shows when the test has failed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_shards: int = 1,
        num_workers: int = 1,
        settings: Mapping[str, object] = {},
    ) -> None:
        """`folder` takes scripts; `settings` are configuration keys for all processes."""
        self.folder = folder
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(num_shards)]
        self.settings: dict[str, object] = {
            **_SETTINGS,
            "cluster.shards": ",".join(self.addresses),
            "cluster.num_workers": num_workers,
            **settings,
        }
        self._processes: list[Process] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.close()
            print(process.tail())  # noqa: T201 - pytest shows it with the failure

    def start(
        self, name: str, arguments: Sequence[str], settings: Mapping[str, object] = {}
    ) -> Process:
        """Start Python with these arguments."""
        own = {**self.settings, **settings}
        process = Process(name, arguments, own)
        self._processes.append(process)
        return process

    def start_shard(self, index: int, settings: Mapping[str, object] = {}) -> Process:
        """Start a shard, and do not wait for it."""
        own = {"server.index": index, **settings}
        return self.start(f"shard {index}", ["-m", "ps_server"], own)

    def shard(self, index: int, settings: Mapping[str, object] = {}) -> Process:
        """Start a shard and wait until it takes calls."""
        shard = self.start_shard(index, settings)
        shard.wait_for(f"^shard {index} listens on port ")
        return shard

    def shards(self) -> list[Process]:
        """Start all shards at once and wait until all take calls."""
        shards = [self.start_shard(index) for index in range(len(self.addresses))]
        for index, shard in enumerate(shards):
            shard.wait_for(f"^shard {index} listens on port ")
        return shards

    def worker(self, rank: int, script: str, settings: Mapping[str, object] = {}) -> Process:
        """Start a worker that runs the text of `script`, and do not wait for it."""
        path = self.folder / f"worker-{rank}-{len(self._processes)}.py"
        path.write_text(script)
        return self.start(f"worker {rank}", [str(path)], {"cluster.rank": rank, **settings})
