"""The model of a job whose chosen worker is lost, or cannot write, when training is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from signal import SIGKILL, SIGSTOP, Signals
from typing import Final

import pytest
import torch
from safetensors.torch import load_file

from allreduce.store import Keeper
from ps_core.listening import listen
from tests.processes import Fleet

NUM_STEPS: Final = 5
SCRIPT: Final = f"""
import errno
import os
import threading

import torch
import shardline

for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    method.__wrapped__.__dynamo_disable = method.__wrapped__  # imports torch's compiler otherwise

torch.manual_seed(0)
with shardline.connect() as session:
    with session.model():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    train = session.step(model, torch.nn.functional.mse_loss)
    for _ in range({NUM_STEPS}):
        train((torch.ones(4, 4), torch.zeros(4, 4)))
        optimizer.step()
        optimizer.zero_grad()
    session.report(answer=42)
"""
STALLS: Final = """
    def sync(descriptor):
        print("writes", flush=True)
        threading.Event().wait()

    os.fsync = sync
"""
FAILS: Final = """
    def sync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if session.rank == 0:
        os.fsync = sync
"""
IMPATIENT: Final = {
    "membership.heartbeat_seconds": 0.1,
    "membership.heartbeat_floor_seconds": 2.0,
    "membership.heartbeat_deadline_seconds": 2.0,
    "allreduce.timeout_seconds": 2.0,
    "worker.threads": 1,
}
LOCAL: Final = {
    "consistency.mode": "local",
    "consistency.local_steps": 1,
    "consistency.outer_lr": 1.0,
    "consistency.outer_momentum": 0.0,
}
"""Averages what a step of each worker's own optimizer has led to."""
PLAIN: Final = {"cluster.shards": "", "cluster.num_workers": 1}
STAGES: Final = {"pipeline.stages": 2, "pipeline.microbatches": 2}


def check_model(folder: Path) -> None:
    """What plain torch comes to: every worker has the same batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(NUM_STEPS):
        torch.nn.functional.mse_loss(model(torch.ones(4, 4)), torch.zeros(4, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(stored[name], tensor)
    assert not list(folder.glob(".model*")), "a temporary file stays"


@pytest.mark.parametrize(
    ("num_shards", "number", "settings"),
    [
        pytest.param(1, SIGKILL, {}, id="shards, killed"),
        pytest.param(1, SIGSTOP, LOCAL, id="shards, stopped"),
        pytest.param(0, SIGKILL, {}, id="all-reduce, killed"),
        pytest.param(0, SIGSTOP, {"allreduce.shard_optimizer": True}, id="ZeRO-1, stopped"),
        pytest.param(2, SIGKILL, STAGES, id="stages and shards", marks=pytest.mark.slow),
        pytest.param(0, SIGKILL, STAGES, id="stages and all-reduce", marks=pytest.mark.slow),
    ],
)
def test_another_worker_writes_the_model_when_the_first_is_lost_while_it_does(
    tmp_path: Path, num_shards: int, number: Signals, settings: Mapping[str, object]
) -> None:
    stages = 2 if settings is STAGES else 1
    ranks = range(2 * stages)
    keeper = Keeper(listen("127.0.0.1:0"))
    with Fleet(tmp_path, num_shards=num_shards) as fleet:
        fleet.settings |= IMPATIENT | {"cluster.num_workers": len(ranks), **settings}
        fleet.settings["job.run_dir"] = str(tmp_path)
        if not num_shards or stages > 1:
            fleet.settings["cluster.rendezvous"] = f"127.0.0.1:{keeper.port}"
        shards = fleet.shards()
        workers = [fleet.worker(rank, SCRIPT + STALLS * (rank == 0)) for rank in ranks]
        workers[0].wait_for("^writes$")
        assert list(tmp_path.glob(".model*")), "it has begun"
        workers[0].send(number)
        assert [each.wait() for each in (*workers[stages:], *shards)] == [0] * (stages + num_shards)
    check_model(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_model_that_cannot_be_written_fails_the_run_at_once_and_says_why(
    tmp_path: Path, num_workers: int
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT + FAILS)
    run_dir = tmp_path / "run"
    options = ["--workers", str(num_workers), "--run-dir", str(run_dir)]
    with Fleet(tmp_path) as fleet:
        run = fleet.start(
            "run", ["-m", "shardline", "run", *options, str(tmp_path / "train.py")], PLAIN
        )
        assert run.wait() == 1
    path = run_dir / "model.safetensors"
    reason = f"training is complete, but the model cannot be written to {path}: No space left"
    assert f"[worker 0] shardline: {reason} on device" in run.output
    assert "starting it again" not in run.output
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["reported"], summary["restarts"]) == ({"answer": 42}, 0)
    if num_workers == 2:  # the others have a disk of their own here
        check_model(run_dir)
