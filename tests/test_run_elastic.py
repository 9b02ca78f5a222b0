"""`shardline run` with workers that are killed, join and are told to go: the command that users
type, judged by the files that it leaves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from tests.elastic import BATCH_SIZE, NUM_EPOCHS, NUM_SAMPLES, SCRIPT, Account
from tests.processes import PATIENCE_SECONDS, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class Run:
    """A run of the launcher in a folder of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.script = folder / "train.py"
        self.script.write_text(SCRIPT)
        options = ("--shards", "2", *options, "--run-dir", str(self.run_dir))
        self._lines: list[str] = []
        self._process = self.start("run", *options)

    def start(self, command: str, *options: str) -> subprocess.Popen[str]:
        """Start a command that runs the script."""
        small = {"exchange.part_bytes": 512, "worker.device": "cpu", "metrics.port": -1}
        return subprocess.Popen(
            [sys.executable, "-m", "shardline", command, *options, self.script, self.folder],
            env=environment(small),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, words: str) -> None:
        """Read what the launcher shows until a line has these words."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if words in line:
                return
        raise AssertionError(f"no {words!r} in\n{''.join(self._lines[-40:])}")

    def processes(self, role: str) -> list[dict[str, Any]]:
        """Those that the launcher has started, by index."""
        document = json.loads((self.run_dir / "cluster.json").read_text())
        found = [each for each in document["processes"] if each["role"] == role]
        return sorted(found, key=lambda each: int(each["index"]))

    def open_gate(self) -> None:
        (self.folder / "go").touch()

    def finish(self) -> dict[str, Any]:
        """Wait for its end, which must be good; the summary."""
        rest, _ = self._process.communicate(timeout=PATIENCE_SECONDS)
        assert self._process.returncode == 0, "".join(self._lines[-40:]) + rest
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary

    def account(self) -> Account:
        """The ledger is in the run directory, what was read beside the script."""
        for file in self.folder.glob("read-*.txt"):
            file.replace(self.run_dir / file.name)
        return Account(self.run_dir)

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=PATIENCE_SECONDS)


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Run]:
    run = Run(folder, *options)
    try:
        yield run
    finally:
        run.close()


def check_sums(summary: dict[str, Any], account: Account) -> None:
    """The summary says what the test itself counts in the ledger."""
    account.check()
    assert summary["samples_lost"] == summary["samples_repeated"] == 0
    assert summary["updates_duplicated"] == 0
    assert summary["samples_applied_in_part"] == account.in_part()
    applied = sum(account.applied_by().values()) - account.in_part()
    assert summary["samples_applied"] == applied
    assert applied + account.in_part() == NUM_EPOCHS * NUM_SAMPLES


def test_a_killed_worker_is_restarted_contributes_again_and_no_sample_is_lost(
    tmp_path: Path,
) -> None:
    with running(tmp_path, "--workers", "3") as run:
        run.wait_for("[worker 1] step 10 ")
        victim = run.processes("worker")[1]["pid"]
        os.kill(victim, SIGKILL)
        run.wait_for("worker 1 was killed by SIGKILL: starting it again")
        run.wait_for("[worker 0] waits for go")
        log = run.run_dir / "shard-0.log"
        while log.read_text().count("worker 1 joined") < 2:
            run.wait_for("")
        run.open_gate()
        summary = run.finish()
        account = run.account()
    check_sums(summary, account)
    assert summary["restarts"] == summary["evictions"] == 1
    assert account.in_part() <= BATCH_SIZE
    by_worker_1 = {u["incarnation"] for u in account.updates() if u["worker"] == 1}
    assert len(by_worker_1) == 2


def test_workers_are_added_and_told_to_go_and_nothing_is_applied_in_part(tmp_path: Path) -> None:
    with running(tmp_path, "--workers", "2:4") as run:
        run.wait_for("[worker 0] waits for go")
        lead = run.processes("shard")[0]["address"]
        joiners = [run.start("worker", "--join", lead) for _ in range(2)]
        log = run.run_dir / "shard-0.log"
        while not all(f"worker {rank} joined" in log.read_text() for rank in (2, 3)):
            run.wait_for("")
        run.open_gate()
        run.wait_for("[worker 1] step")
        os.kill(run.processes("worker")[1]["pid"], SIGTERM)
        run.wait_for("worker 1 was preempted")
        summary = run.finish()
        for joiner in joiners:
            out, _ = joiner.communicate(timeout=PATIENCE_SECONDS)
            assert joiner.returncode == 0, out
        account = run.account()
    check_sums(summary, account)
    assert summary["samples_applied_in_part"] == 0
    assert summary["preemptions"] == len(account.events("preempted")) == 1
    assert {2, 3} <= set(account.applied_by())
