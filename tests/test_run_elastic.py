"""`shardline run` with workers that are killed, join and are told to go: the command that users
type, judged by the files that it leaves.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.elastic import BATCH_SIZE, HOLD_EPOCH, NUM_EPOCHS, NUM_SAMPLES, SCRIPT, Account
from tests.processes import PATIENCE_SECONDS, Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SETTINGS = {"exchange.part_bytes": 512, "worker.device": "cpu", "metrics.port": -1}


class Run:
    """A run of the launcher in a folder of its own."""

    def __init__(self, folder: Path, *options: str, script: str = SCRIPT) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        (folder / "train.py").write_text(script)
        options = ("--shards", "2", *options, "--run-dir", str(self.run_dir))
        self.launcher = self.start("run", *options)

    def start(self, command: str, *options: str) -> Process:
        """Start a command that runs the script."""
        script = [str(self.folder / "train.py"), str(self.folder)]
        return Process(command, ["-m", "shardline", command, *options, *script], SETTINGS)

    def wait_for_joins(self, rank: int, count: int) -> None:
        """Wait until as many processes of a rank have joined the lead, which only its log tells."""
        log, deadline = self.run_dir / "shard-0.log", time.monotonic() + PATIENCE_SECONDS
        while log.read_text().count(f"worker {rank} joined") < count:
            assert time.monotonic() < deadline, self.launcher.tail()
            time.sleep(0.05)

    def processes(self, role: str) -> list[dict[str, Any]]:
        """Those that the launcher has started, by index."""
        document = json.loads((self.run_dir / "cluster.json").read_text())
        found = [each for each in document["processes"] if each["role"] == role]
        return sorted(found, key=lambda each: int(each["index"]))

    def open_gate(self) -> None:
        (self.folder / "go").touch()

    def finish(self) -> dict[str, Any]:
        """Wait for its end, which must be good; the summary."""
        assert self.launcher.wait() == 0, self.launcher.tail()
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary

    def account(self) -> Account:
        """The ledger is in the run directory, what was read beside the script."""
        for file in self.folder.glob("read-*.txt"):
            file.replace(self.run_dir / file.name)
        return Account(self.run_dir)


@contextmanager
def running(folder: Path, *options: str, script: str = SCRIPT) -> Iterator[Run]:
    run = Run(folder, *options, script=script)
    with closing(run.launcher):
        yield run


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
        run.launcher.wait_for(r"\[worker 1\] step 10 ")
        os.kill(run.processes("worker")[1]["pid"], SIGKILL)
        run.launcher.wait_for("worker 1 was killed by SIGKILL: starting it again")
        run.launcher.wait_for(r"\[worker 0\] waits for go")
        run.wait_for_joins(1, count=2)
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
        run.launcher.wait_for(r"\[worker 0\] waits for go")
        lead = run.processes("shard")[0]["address"]
        first, second = (run.start("worker", "--join", lead) for _ in range(2))
        with closing(first), closing(second):
            for rank in (2, 3):
                run.wait_for_joins(rank, count=1)
            hold = tmp_path / "hold"
            hold.touch()
            run.open_gate()
            run.launcher.wait_for(rf"\[worker 1\] step \d+ epoch {HOLD_EPOCH}")
            os.kill(run.processes("worker")[1]["pid"], SIGTERM)
            hold.unlink()
            summary = run.finish()
            assert [first.wait(), second.wait()] == [0, 0]
    account = run.account()
    check_sums(summary, account)
    assert summary["samples_applied_in_part"] == 0
    assert summary["preemptions"] == len(account.events("preempted")) == 1
    assert {2, 3} <= set(account.applied_by())


WRITES_SLOWLY = """
import sys
import time
from pathlib import Path

import torch
import shardline
from shardline import model_file

folder, write_model = Path(sys.argv[1]), model_file.write_model


def write_slowly(*arguments):
    print("writes", flush=True)
    while not (folder / "go").exists():
        time.sleep(0.01)
    write_model(*arguments)


model_file.write_model = write_slowly
model = torch.nn.Linear(8, 8)
with shardline.connect() as session:
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for _ in range(300):
        model(torch.ones(4, 8)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.parametrize("index", [0, 1])
def test_a_shard_that_is_lost_while_the_model_is_written_fails_nothing(
    tmp_path: Path, index: int
) -> None:
    with running(tmp_path, "--workers", "2", script=WRITES_SLOWLY) as run:
        run.launcher.wait_for(r"\[worker 0\] writes")
        os.kill(run.processes("shard")[index]["pid"], SIGKILL)
        run.open_gate()
        run.finish()
    assert set(load_file(run.run_dir / "model.safetensors")) == {"weight", "bias"}
