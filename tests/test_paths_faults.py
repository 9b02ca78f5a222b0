"""`shardline run` with a model in stages of which one is killed or stopped, or has an error: judged
by what the command says, its exit code, and the files that it leaves.

Whatever is done to a process waits for a line of one, never for time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from signal import SIGKILL, SIGSTOP
from typing import Any, Final

import pytest

from tests.elastic import DATASET, Account
from tests.processes import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SETTINGS: Final = {
    "exchange.part_bytes": 512,
    "metrics.port": -1,
    "rpc.drain_seconds": 1,
    "rpc.reconnect_seconds": 0.5,
    "worker.device": "cpu",
}
SCRIPT: Final = f"""
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
import shardline

for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    method.__wrapped__.__dynamo_disable = method.__wrapped__  # imports torch's compiler otherwise

folder = Path(sys.argv[1])
bad_step = int(sys.argv[2])


{DATASET}

def loss_of(output, target):
    if optimizer.next_step == bad_step:
        raise ValueError("these targets are not of this world")
    return nn.functional.mse_loss(output, target)


with shardline.connect() as session:
    me = f"replica {{session.rank}} stage {{session.stage}}"
    with session.model():
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
    optimizer = session.optimizer(sgd, model)
    step = session.step(model, loss_of)
    print(f"{{me}} starts with step {{optimizer.next_step}} in process {{os.getpid()}}", flush=True)
    # In updates.jsonl a replica is one worker of the shards; without them it is its first worker.
    has_shards = session.config.strategy == "parameter-server"
    worker = session.rank if has_shards else session.config.cluster.rank - session.stage
    loader = session.loader(Squares(worker), batch_size=4)
    while (folder / "gate").exists():
        time.sleep(0.01)
    for epoch in session.epochs(100_000):
        if session.mean(float((folder / "stop").exists())) > 0:
            break
        for batch in loader:
            step(batch)
            optimizer.step()
            optimizer.zero_grad()
            print(f"{{me}} step {{optimizer.next_step}} in process {{os.getpid()}}", flush=True)
    print(f"{{me}} is done", flush=True)
"""


class Run:
    """A run of the launcher in a folder of its own."""

    def __init__(self, folder: Path, *options: str, bad_step: int = -1) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        script = folder / "train.py"
        script.write_text(SCRIPT)
        options = (*options, "--stages", "2", "--run-dir", str(self.run_dir))
        command = ["-m", "shardline", "run", *options, str(script), str(folder), str(bad_step)]
        self.launcher = Process("run", command, SETTINGS)

    def pids(self) -> dict[str, int]:
        """Of the processes that the launcher has started last, such as `worker 0`."""
        document = json.loads((self.run_dir / "cluster.json").read_text())
        return {f"{each['role']} {each['index']}": each["pid"] for each in document["processes"]}

    def stop(self) -> None:
        """Let all workers end together after this epoch."""
        (self.folder / "stop").touch()

    def summary(self) -> dict[str, Any]:
        """What the run came to."""
        document: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return document

    def check_samples(self) -> None:
        """Every sample of every pass was in one update: so says the summary, and so do the files,
        as counted here.
        """
        summary = self.summary()
        assert summary["samples_lost"] == summary["samples_repeated"] == 0
        assert summary["updates_duplicated"] == 0
        for file in self.folder.glob("read-*.txt"):
            file.replace(self.run_dir / file.name)
        account = Account(self.run_dir)
        # Without samples: of a worker whose group broke in the middle of its step.
        account.lines = [line for line in account.lines if line.get("samples", 1)]
        account.check(num_passes=1 + max(update["pass"] for update in account.updates()))


@contextmanager
def running(folder: Path, *options: str, bad_step: int = -1) -> Iterator[Run]:
    """At the end no process of the run is left."""
    run = Run(folder, *options, bad_step=bad_step)
    with closing(run.launcher):
        yield run
        left = [name for name, pid in run.pids().items() if Path(f"/proc/{pid}").exists()]
        assert not left, run.launcher.tail()


@pytest.mark.parametrize("options", [("--shards", "2"), ("--strategy", "allreduce")], ids="".join)
def test_a_replica_of_which_a_worker_is_killed_starts_again_as_one_and_no_sample_is_lost(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    with running(tmp_path, "--workers", "4", *options) as run:
        run.launcher.wait_for("replica 1 stage 1 step [4-9] ")
        before = run.pids()
        os.kill(before["worker 3"], SIGKILL)
        run.launcher.wait_for("worker 3 was killed by SIGKILL: starting it again")
        run.launcher.wait_for("worker 2 .*: starting it again")
        for stage in range(2):
            me = f"replica 1 stage {stage}"
            started = run.launcher.wait_for(rf"{me} starts with step [1-9]\d* in process (\d+)$")
            run.launcher.wait_for(f"{me} step .* in process {started[1]}$")
        run.stop()
        assert run.launcher.wait() == 0, run.launcher.tail()
        after = run.pids()
        for replica in range(2):
            for stage in range(2):
                assert f"replica {replica} stage {stage} is done" in run.launcher.output
    assert {name for name in before if before[name] != after[name]} == {"worker 2", "worker 3"}
    run.check_samples()
    assert run.summary()["restarts"] == 2


def test_the_other_replica_goes_on_without_one_of_which_a_stage_hangs(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    options = ("--shards", "2", "--workers", "4", "--collective-timeout", "2")
    with running(tmp_path, *options) as run:
        for replica in range(2):
            for stage in range(2):
                run.launcher.wait_for(f"replica {replica} stage {stage} starts with step 0")
        os.kill(run.pids()["worker 3"], SIGSTOP)
        (tmp_path / "gate").unlink()
        run.launcher.wait_for("replica 0 stage 1 step 30 ")
        run.stop()
        assert run.launcher.wait() == 0, run.launcher.tail()
    assert "replica 1 stage 0 step" not in run.launcher.output
    run.check_samples()


def test_a_killed_stage_ends_a_run_that_has_a_share_of_the_state_nowhere_else(
    tmp_path: Path,
) -> None:
    options = ("--strategy", "allreduce", "--shard-optimizer", "--workers", "4")
    with running(tmp_path, *options) as run:
        run.launcher.wait_for("replica 1 stage 1 step [4-9] ")
        os.kill(run.pids()["worker 3"], SIGKILL)
        assert run.launcher.wait() == 1, run.launcher.tail()
    assert "worker 3 was killed by SIGKILL" in run.launcher.output
    assert "a worker is gone, and with it its share of the optimizer's state" in run.launcher.output


def test_an_error_in_the_loss_ends_the_run_with_its_text(tmp_path: Path) -> None:
    with running(tmp_path, "--workers", "2", "--strategy", "allreduce", bad_step=3) as run:
        assert run.launcher.wait() == 1, run.launcher.tail()
    said = run.launcher.output
    assert "ValueError: these targets are not of this world" in said
    assert "worker 1 ended with exit code 1" in said
