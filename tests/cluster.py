"""Real shard and worker processes for tests, started once for all; many jobs run in them.

    with Cluster(num_shards=2, num_workers=2) as cluster:
        results = cluster.run(case, num_steps=20)  # one per worker

`case(session, num_steps=20)` runs on every worker. It is a function of an importable module, its
arguments are what JSON can hold, and it returns what `tests.host` can send back.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from safetensors.torch import load_file

from allreduce.store import Keeper
from ps_core.config import inherited_environment
from ps_core.listening import listen
from shardline.ports import free_ports
from tests.host import STACKS_SIGNAL, Case, Message, Result, run_case

ROOT: Final = Path(__file__).resolve().parent.parent
START_SECONDS: Final = 180.0
"""For importing torch in all processes at once, on a machine that others keep busy."""
JOB_SECONDS: Final = 60.0
TEST_SECONDS: Final = 2 * START_SECONDS + JOB_SECONDS
"""What a test with a cluster may take: it may have to start the processes, and again for a job."""
NOTHING: Final[Mapping[str, str]] = {}
DEFAULTS: Final = {
    "SHARDLINE_EXCHANGE_PART_BYTES": "512",  # so that small tensors are cut, and shards share them
    "SHARDLINE_METRICS_PORT": "-1",
    "SHARDLINE_RPC_CONNECT_TIMEOUT_SECONDS": "20",
    "SHARDLINE_MEMBERSHIP_JOIN_TIMEOUT_SECONDS": "20",
    "SHARDLINE_WORKER_DEVICE": "cpu",
    "SHARDLINE_WORKER_THREADS": "1",
}
# torch looks up the name of everybody who connects to its store. A name server that does not answer
# all of so many questions should cost a second at most; here and in the hosts.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

Inbox = queue.SimpleQueue[tuple[str, Message | None]]
"""Pairs of a host's name and its answer; None: it has died."""


class ClusterError(AssertionError):
    """A job did not go as the test expects; the message has the tails of all stderr files."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let this process compute as the hosts do: torch rounds differently with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_alone(case: Case, *, environ: Mapping[str, str] = NOTHING, **arguments: Any) -> Result:  # noqa: ANN401 - JSON
    """Run a case in this process, without shards. Raises what the session raises."""
    return run_case(case, {**DEFAULTS, **environ}, arguments)


class _Host:
    """One process `python -m tests.host` and the thread that reads its answers."""

    def __init__(self, name: str, folder: Path, inbox: Inbox) -> None:
        self.name = name
        self._stderr = folder / f"{name}.stderr"
        with self._stderr.open("ab") as stderr:
            # Warnings are errors here, too. In a process group of its own it is not reached by
            # Ctrl-C, and is killed with all that it has forked.
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "tests.host"],
                cwd=ROOT,
                env=inherited_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                process_group=0,
            )
        self._reader = threading.Thread(target=self._read, args=(inbox,), name=name, daemon=True)
        self._reader.start()

    def __str__(self) -> str:
        return f"{self.name} (pid {self._process.pid})"

    def _read(self, inbox: Inbox) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            inbox.put((self.name, json.loads(line)))
        inbox.put((self.name, None))

    def send(self, command: Message) -> None:
        """Give a command. An answer, or None when the process has died, comes to the inbox."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, which its reader tells
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def write_stacks(self) -> None:
        """Let it write to stderr what it is doing."""
        if self._process.poll() is None:
            self._process.send_signal(STACKS_SIGNAL)

    def tail(self, num_lines: int = 40) -> str:
        """The end of what it wrote to stderr."""
        lines = self._stderr.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def end(self) -> None:
        """Kill it with all that it has forked, and wait for its end."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # not waited for, so still its number
        self._process.wait(timeout=30)
        self._reader.join(timeout=30)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


class _Hosts:
    """The processes of all clusters, by name. What goes wrong ends them all."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="cluster-")
        self._folder = Path(self._temporary.name)
        self._hosts: dict[str, _Host] = {}
        self._inbox: Inbox = queue.SimpleQueue()
        self._job_numbers = itertools.count()
        atexit.register(self.close)

    def close(self) -> None:
        """End all processes, and remove their files."""
        self.end()
        self._temporary.cleanup()

    def start(self, names: Sequence[str]) -> None:
        """Start those of the processes that do not run, and wait until all are up."""
        if not self._hosts:
            self._inbox = queue.SimpleQueue()
        missing = [name for name in names if name not in self._hosts]
        for name in missing:
            self._hosts[name] = _Host(name, self._folder, self._inbox)
        self.collect(missing, START_SECONDS, "to start")

    def end(self) -> None:
        """End all processes."""
        for host in self._hosts.values():
            host.end()
        self._hosts = {}

    def next_job(self) -> str:
        """A name that no job has had."""
        return f"job-{next(self._job_numbers)}"

    def send(self, name: str, command: Message) -> None:
        """Give a process a command."""
        self._hosts[name].send(command)

    def result_file(self, worker: str) -> Path:
        """Where a worker leaves its tensors."""
        return self._folder / f"{worker}.safetensors"

    def collect(self, names: Sequence[str], seconds: float, what: str) -> dict[str, Message]:
        """One answer of each of these processes, which have `seconds` for it together."""
        deadline = time.monotonic() + seconds
        answers: dict[str, Message] = {}
        while missing := set(names) - answers.keys():
            try:
                name, answer = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                for name in missing:
                    self._hosts[name].write_stacks()
                time.sleep(0.5)  # the best that can be done: nothing tells that they are written
                said = "\n".join(f"{name} said {answers[name]}" for name in answers)
                late = f"{sorted(missing)} took over {seconds} s {what}"
                raise self.broken(f"{late}\n{said}") from None
            if answer is None or name not in missing:
                raise self.broken(f"waited for {sorted(missing)} {what}; {name} said {answer}")
            answers[name] = answer
        return answers

    def broken(self, what: str) -> ClusterError:
        """The error to raise: tells all that is known, and all processes are ended."""
        tails = [f"-- stderr of {host}\n{host.tail()}" for host in self._hosts.values()]
        self.end()
        return ClusterError("\n".join([what, *tails]))


@functools.cache
def _hosts() -> _Hosts:
    """Those of this test run: starting them takes longer than most tests."""
    return _Hosts()


class Cluster:
    """`num_shards` shards and `num_workers` workers, unless a job says otherwise.

    With 0 shards the workers are those of strategy allreduce. They have a rendezvous, and so have
    those of a job with several stages.

    All clusters use the same processes, one job at a time. A job that goes wrong ends them, and the
    next one starts new ones.
    """

    def __init__(self, num_shards: int, num_workers: int) -> None:
        self._num_shards, self._num_workers = num_shards, num_workers
        self._hosts = _hosts()

    def __enter__(self) -> Cluster:
        names = [*_names("shard", self._num_shards), *_names("worker", self._num_workers)]
        self._hosts.start(names)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The processes are there for the next cluster."""

    # -- Jobs --------------------------------------------------------------------------------------

    def run(
        self,
        case: Case,
        *,
        num_shards: int | None = None,
        num_workers: int | None = None,
        num_joiners: int = 0,
        environ: Mapping[str, str] = NOTHING,
        **arguments: Any,  # noqa: ANN401 - JSON
    ) -> list[Result]:
        """Run a job that ends well; what the case returned on each worker, by rank. The last
        `num_joiners` of them are not waited for at the start.
        """
        answers = self._run(case, num_shards, num_workers, num_joiners, environ, arguments)
        failures = [f"{n}: {a['traceback']}" for n, a in answers.items() if a["event"] != "done"]
        if failures:
            raise self._hosts.broken(f"{_name(case)} failed\n" + "\n".join(failures))
        workers = [name for name in answers if name.startswith("worker")]
        return [self._result(name, answers[name]) for name in workers]

    def run_failing(
        self,
        case: Case,
        *,
        num_shards: int | None = None,
        num_workers: int | None = None,
        environ: Mapping[str, str] = NOTHING,
        **arguments: Any,  # noqa: ANN401 - JSON
    ) -> list[str]:
        """Run a job that fails on every worker and every shard; each worker's error, by rank."""
        answers = self._run(case, num_shards, num_workers, 0, environ, arguments)
        well = [name for name, answer in answers.items() if answer["event"] == "done"]
        if well:
            raise self._hosts.broken(f"{_name(case)} should fail, but {', '.join(well)} ended well")
        return [answer["error"] for name, answer in answers.items() if name.startswith("worker")]

    def run_losing(
        self,
        case: Case,
        *,
        num_shards: int | None = None,
        num_workers: int | None = None,
        environ: Mapping[str, str] = NOTHING,
        **arguments: Any,  # noqa: ANN401 - JSON
    ) -> list[Result | str]:
        """Run a job that ends well, although some of its workers may not: what the case returned,
        or the worker's error, by rank.
        """
        answers = self._run(case, num_shards, num_workers, 0, environ, arguments)
        shards = [answer for name, answer in answers.items() if name.startswith("shard")]
        if any(answer["event"] != "done" for answer in shards):
            raise self._hosts.broken(f"{_name(case)} should end well: {answers}")
        return [
            self._result(name, answer) if answer["event"] == "done" else answer["error"]
            for name, answer in answers.items()
            if name.startswith("worker")
        ]

    def _result(self, worker: str, answer: Message) -> Result:
        return Result(answer["values"], load_file(self._hosts.result_file(worker)))

    def _run(
        self,
        case: Case,
        num_shards: int | None,
        num_workers: int | None,
        num_joiners: int,
        environ: Mapping[str, str],
        arguments: Mapping[str, Any],
    ) -> dict[str, Message]:
        """The last answer of every process of the job: shards first, then workers, in order."""
        shards = _names("shard", self._num_shards if num_shards is None else num_shards)
        workers = _names("worker", num_workers or self._num_workers)
        self._hosts.start([*shards, *workers])
        numbers = {
            "SHARDLINE_CLUSTER_NUM_WORKERS": str(len(workers) - num_joiners),
            "SHARDLINE_CLUSTER_MAX_WORKERS": str(len(workers)),
        }
        environ = {**numbers, **environ}
        is_staged = int(environ.get("SHARDLINE_PIPELINE_STAGES", "1")) > 1
        keeper = Keeper(listen("127.0.0.1:0")) if is_staged or not shards else None
        if keeper is not None:
            address = {"SHARDLINE_CLUSTER_RENDEZVOUS": f"127.0.0.1:{keeper.port}"}
            environ = {**address, **environ}
        if shards:
            common = self._serve(shards, workers, environ)
        else:
            common = {**DEFAULTS, "SHARDLINE_JOB_ID": self._hosts.next_job(), **environ}
        for rank, name in enumerate(workers):
            command = {
                "role": "worker",
                "case": _name(case),
                "arguments": arguments,
                "environ": {**common, "SHARDLINE_CLUSTER_RANK": str(rank)},
                "tensors": str(self._hosts.result_file(name)),
            }
            self._hosts.send(name, command)
        answers = self._hosts.collect([*shards, *workers], JOB_SECONDS, f"to finish {_name(case)}")
        return {name: answers[name] for name in [*shards, *workers]}

    def _serve(
        self, shards: Sequence[str], workers: Sequence[str], environ: Mapping[str, str]
    ) -> dict[str, str]:
        """Start the shards of a new job; the configuration that all its processes share."""
        for _ in range(3):
            ports = free_ports(len(shards))
            common = {
                **DEFAULTS,
                "SHARDLINE_JOB_ID": self._hosts.next_job(),
                "SHARDLINE_CLUSTER_SHARDS": ",".join(f"127.0.0.1:{port}" for port in ports),
                **environ,
            }
            # The lead first: a shard that calls before it listens waits a second to call again.
            if self._announced(shards[:1], common) and self._announced(shards[1:], common):
                return common
            self._hosts.end()
            self._hosts.start([*shards, *workers])
        raise self._hosts.broken("others took the ports of three jobs in a row")

    def _announced(self, shards: Sequence[str], common: Mapping[str, str]) -> bool:
        """Start shards; False: somebody took a port between its choice and its use."""
        for name in shards:
            environ = {**common, "SHARDLINE_SERVER_INDEX": name.partition("-")[2]}
            self._hosts.send(name, {"role": "shard", "environ": environ})
        answers = self._hosts.collect(shards, JOB_SECONDS, "to take calls")
        failures = [a["error"] for a in answers.values() if a["event"] != "announced"]
        if any("cannot listen" not in failure for failure in failures):
            raise self._hosts.broken(f"a shard did not start: {failures}")
        return not failures


def _names(role: str, count: int) -> list[str]:
    return [f"{role}-{index}" for index in range(count)]


def _name(case: Case) -> str:
    return f"{case.__module__}:{case.__qualname__}"
