"""The systems that benchmarks/train.py compares, and the processes of one of them.

The workers of a system that runs wait for their turn, and take the steps that they are told to.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from shardline.ports import free_ports

WORKER = Path(__file__).parent / "train_worker.py"
START_SECONDS = 90.0  # for all workers of a system to say hello
REPLY_SECONDS = 120.0  # for joining and building a model
STEP_SECONDS = 5.0  # no step may take longer, on average
END_SECONDS = 60.0  # for processes to end by themselves, and again when they are told to
POLL_SECONDS = 0.1
LOG_BYTES = 4000  # of what failed processes wrote last


class System(NamedTuple):
    label: str
    kind: str  # of benchmarks/train_worker.py
    num_workers: int
    options: tuple[str, ...] = ()  # of `shardline run`
    in_speed: bool = True  # has a row in the tables of samples per second
    in_memory: bool = True
    overlaps: bool = False  # gradients are sent while backward still computes others

    @property
    def is_staged(self) -> bool:
        return "--stages" in self.options


SHARDS = ("--shards", "2")
ALLREDUCE = ("--strategy", "allreduce")
TWO, FOUR = (("--stages", str(stages), "--schedule", "1f1b") for stages in (2, 4))
LAUNCHED = "shardline"
SYSTEMS: Mapping[str, System] = {
    "one": System("one process", "plain", 1),
    "ddp": System("DDP over Gloo", "plain", 2),
    "allreduce": System("all-reduce", LAUNCHED, 2, ALLREDUCE),
    "allreduce-overlap": System("all-reduce, overlap", LAUNCHED, 2, ALLREDUCE, overlaps=True),
    "zero": System("all-reduce, ZeRO-1", LAUNCHED, 2, (*ALLREDUCE, "--shard-optimizer")),
    "sync": System("2 shards, sync", LAUNCHED, 2, SHARDS, in_memory=False),
    "sync-overlap": System(
        "2 shards, overlap", LAUNCHED, 2, SHARDS, in_memory=False, overlaps=True
    ),
    "async": System("2 shards, async", LAUNCHED, 2, (*SHARDS, "--mode", "async"), in_memory=False),
    "stages2": System("2 stages, all-reduce", LAUNCHED, 2, (*ALLREDUCE, *TWO)),
    "stages2-shards": System("2 stages, 2 shards", LAUNCHED, 2, (*SHARDS, *TWO)),
    "stages4": System("4 stages, all-reduce", LAUNCHED, 4, (*ALLREDUCE, *FOUR), in_speed=False),
    "stages4-shards": System(
        "4 stages, 4 shards", LAUNCHED, 4, ("--shards", "4", *FOUR), in_speed=False
    ),
}
BARE = System("no training", "bare", 1)
BARE_STAGED = System("no training, pipelining imported", "bare-staged", 1)


class Job(NamedTuple):
    model: str
    layers: int
    width: int
    batch: int  # samples of all workers together
    num_steps: int  # all that are taken


class Turn(NamedTuple):
    seconds: float  # from the first worker's begin to the last one's end
    num_steps: int


class Fleet:
    """The workers of one system."""

    def __init__(self, system: System, job: Job, folder: str, log: IO[bytes]) -> None:
        """Starts them; `log` gets all that they write. `close` must follow."""
        self._system = system
        self._log = log
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._workers: list[tuple[socket.socket, IO[str]]] = []
        port = int(self._listener.getsockname()[1])
        own = {"OMP_NUM_THREADS": "1", "SHARDLINE_METRICS_PORT": "-1"}
        for command in commands(system, job, port, folder):
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=dict(os.environ) | own,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                )
            )

    def meet(self) -> None:
        """Wait for all workers to say hello. Raises RuntimeError, TimeoutError."""
        deadline = time.monotonic() + START_SECONDS
        self._listener.settimeout(POLL_SECONDS)
        while len(self._workers) < self._system.num_workers:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                self._workers.append((connection, connection.makefile("r", encoding="utf-8")))
            if any(process.poll() is not None for process in self._processes):
                raise self._failure("ended before it began to train")
            if time.monotonic() > deadline:
                raise self._failure("has not started")
        self._hear()

    def take_turn(self, num_steps: int) -> Turn:
        """Let every worker take so many steps, and wait for all."""
        self._tell(num_steps)
        replies = self._hear(num_steps)
        begin = min(reply["begin"] for reply in replies)
        return Turn(max(reply["end"] for reply in replies) - begin, num_steps)

    def finish(self) -> list[dict[str, Any]]:
        """No more turns. What each worker says of its memory, when all have ended well."""
        self._tell(0)
        reports, lasts = self._hear(), self._hear()
        deadline = time.monotonic() + END_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.returncode != 0:
                raise self._failure("did not end well")
        return [
            report | {"last_peak_bytes": last["peak_bytes"]}
            for report, last in zip(reports, lasts, strict=True)
        ]

    def close(self) -> None:
        """End what still runs. Idempotent."""
        for process in self._processes:
            process.terminate()
        for connection, lines in self._workers:
            lines.close()
            connection.close()
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(END_SECONDS)
        self._listener.close()

    def _tell(self, num_steps: int) -> None:
        try:
            for connection, _ in self._workers:
                connection.sendall(json.dumps({"steps": num_steps}).encode() + b"\n")
        except OSError as error:
            raise self._failure("has lost a worker") from error

    def _hear(self, num_steps: int = 0) -> list[dict[str, Any]]:
        """A line from every worker, after so many steps."""
        try:
            for connection, _ in self._workers:
                connection.settimeout(REPLY_SECONDS + STEP_SECONDS * num_steps)
            lines = [lines.readline() for _, lines in self._workers]
        except OSError as error:
            raise self._failure("does not answer") from error
        if not all(lines):
            raise self._failure("has lost a worker")
        return [json.loads(line) for line in lines]

    def _failure(self, what: str) -> RuntimeError:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_BYTES))
        text = self._log.read().decode(errors="replace")
        return RuntimeError(f"{self._system.label} {what}. It wrote:\n{text}")


def commands(system: System, job: Job, port: int, folder: str) -> Iterator[Sequence[str]]:
    """What to start: one command for the whole system, or one for each worker."""
    script = [str(WORKER), "--kind", system.kind, "--model", job.model, "--layers", str(job.layers)]
    script += ["--width", str(job.width), "--batch", str(job.batch), "--steps", str(job.num_steps)]
    script += ["--control", str(port)]
    script += ["--overlap"] if system.overlaps else []
    if system.kind == LAUNCHED:
        run_dir = tempfile.mkdtemp(dir=folder) + "/run"
        run = ["-m", "shardline", "run", "--workers", str(system.num_workers), "--threads", "1"]
        run += ["--max-restarts", "0", "--run-dir", run_dir, *system.options]
        yield [sys.executable, *run, *script]
        return
    gloo = ["--workers", str(system.num_workers), "--gloo-port", str(free_ports(1)[0])]
    for rank in range(system.num_workers):
        yield [sys.executable, "-u", *script, *gloo, "--rank", str(rank)]


@contextlib.contextmanager
def running(system: System, job: Job, folder: str) -> Iterator[Fleet]:
    """Its workers, ready for their first turn."""
    with tempfile.TemporaryFile(dir=folder) as log:
        fleet = Fleet(system, job, folder, log)
        try:
            fleet.meet()
            yield fleet
        finally:
            fleet.close()
