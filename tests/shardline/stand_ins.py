"""Small processes that stand in for shards and workers, and a launcher that runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 40.0

COMMON = """
import json, os, signal, subprocess, sys, time
run_dir = os.environ["SHARDLINE_JOB_RUN_DIR"]
rank = int(os.environ.get("SHARDLINE_CLUSTER_RANK", "0"))
index = int(os.environ.get("SHARDLINE_SERVER_INDEX", "0"))
num_workers = int(os.environ.get("SHARDLINE_CLUSTER_NUM_WORKERS", "1"))
metrics = os.path.join(run_dir, "metrics.jsonl")

def record(kind, **more):
    fields = dict(kind=kind, time=time.time(), rank=rank, incarnation=str(os.getpid()), samples=64,
                  version=2, pushed_bytes=1000, pulled_bytes=2000)
    with open(metrics, "a") as file:
        file.write(json.dumps(fields | more) + "\\n")

def step(number=2, **values):
    record("join")
    record("step", epoch=0, step=number, values=values)

def end(**reported):
    record("join")
    record("end", steps=2, seconds=1.0, reported=reported)

def all_have_trained():
    return sum('"step"' in line for line in open(metrics)) >= num_workers

def num_ended():
    return sum('"end"' in line for line in open(metrics))

def mark(word):
    open(os.path.join(run_dir, word), "w").close()

def num_starts():
    "How often this rank was started, this time included."
    with open(os.path.join(run_dir, f"starts-{rank}"), "a+") as file:
        file.write("x")
        return file.tell()

def marked(word):
    return os.path.exists(os.path.join(run_dir, word))

def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("waited in vain")
        time.sleep(0.01)
"""
# As a real shard: it ends once all workers have.
SHARD = "wait_for(lambda: num_ended() == num_workers)"
WAITING = "time.sleep(60)"


@dataclass(frozen=True, slots=True)
class Launched:
    """A launcher in its own process, and its run directory."""

    process: subprocess.Popen[str]
    run_dir: Path

    def wait_for_file(self, name: str) -> Path:
        path = self.run_dir / name
        wait_until(path.exists)
        return path

    def json(self, name: str) -> Any:  # noqa: ANN401  # JSON can be anything
        return json.loads(self.wait_for_file(name).read_text())

    def pids(self) -> list[int]:
        return [process["pid"] for process in self.json("cluster.json")["processes"]]

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output, standard error; all its processes must be gone."""
        out, err = self.process.communicate(timeout=TIMEOUT_SECONDS)
        if (self.run_dir / "cluster.json").exists():
            assert not [pid for pid in self.pids() if is_running(pid)]
        return self.process.returncode, out, err


@contextmanager
def launch(
    folder: Path,
    worker: str,
    *arguments: str,
    shard: str = SHARD,
    after: tuple[str, ...] = (),
    stdout: int = subprocess.PIPE,
    reconnect_seconds: float = 0,
    ignored: str = "",
) -> Iterator[Launched]:
    """Run the bodies `worker` and `shard`; `arguments` are the launcher's, `after` the script's. It
    starts with the signals `ignored`.

    Modules in `folder` come before all others.
    """
    scripts = [folder / "shard.py", folder / "train.py"]
    for path, body in zip(scripts, (shard, worker), strict=True):
        path.write_text(COMMON + body)
    process = subprocess.Popen(
        [
            *(sys.executable, str(Path(__file__).with_name("stand_in_run.py")), str(scripts[0])),
            *("--run-dir", str(folder / "run"), "--drain-seconds", "1", *arguments),
            *(str(scripts[1]), *after),
        ],
        cwd=folder,
        env=environment()
        | {
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "SHARDLINE_RPC_RECONNECT_SECONDS": str(reconnect_seconds),
            "IGNORED_SIGNALS": ignored,
        },
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Launched(process, folder / "run")
    finally:
        process.kill()  # its processes die with it
        process.communicate(timeout=TIMEOUT_SECONDS)


def environment() -> dict[str, str]:
    """That of this process, from which the packages of this checkout are found."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SHARDLINE_")}
    return own | {"PYTHONPATH": str(ROOT)}


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than an exit code that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = TIMEOUT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def interrupt(launched: Launched, number: signal.Signals = signal.SIGINT) -> None:
    """Send the launcher a signal."""
    launched.process.send_signal(number)
