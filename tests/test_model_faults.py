"""The model of a job whose chosen worker is lost, or cannot write, when training is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM, Signals
from typing import Final

import pytest
import torch
from safetensors import safe_open
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
num_steps = {NUM_STEPS}
with shardline.connect() as session:
    with session.model():
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    train = session.step(model, torch.nn.functional.mse_loss)
    for _ in range(num_steps):
        train((torch.ones(4, 16), torch.zeros(4, 16)))
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {{optimizer.next_step}}", flush=True)
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
ZERO: Final = {"allreduce.shard_optimizer": True}
STAGES: Final = {"pipeline.stages": 2, "pipeline.microbatches": 2}


def trained(num_steps: int) -> dict[str, torch.Tensor]:
    """What plain torch comes to: every worker has the same batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(num_steps):
        torch.nn.functional.mse_loss(model(torch.ones(4, 16)), torch.zeros(4, 16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def check_model(folder: Path, name: str = "model", num_steps: int = NUM_STEPS) -> None:
    stored, expected = load_file(folder / f"{name}.safetensors"), trained(num_steps)
    assert stored.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(stored[key], tensor)
    assert not list(folder.glob(".*")), "a temporary file stays"


@pytest.mark.parametrize(
    ("num_shards", "number", "settings"),
    [
        pytest.param(1, SIGKILL, {}, id="shards, killed"),
        pytest.param(1, SIGSTOP, LOCAL, id="shards, stopped", marks=pytest.mark.slow),
        pytest.param(0, SIGKILL, {}, id="all-reduce, killed"),
        pytest.param(0, SIGSTOP, ZERO, id="ZeRO-1, stopped", marks=pytest.mark.slow),
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


# -- What there is when training ends before -------------------------------------------------------

ENDLESS: Final = SCRIPT.replace(f"num_steps = {NUM_STEPS}", "num_steps = 10**6")


def check_rescued(folder: Path) -> None:
    """As of the version that its metadata names, or of two that follow one another."""
    with safe_open(folder / "interrupted.safetensors", "pt") as file:
        when = file.metadata()["interrupted"]
    versions = [int(number) for number in re.findall(r"\d+", when)]
    assert versions[0] >= 3
    if len(versions) == 1:
        assert when == f"at version {versions[0]}"
        return check_model(folder, "interrupted", versions[0])
    first, last = versions
    assert (when, last) == (f"between versions {first} and {last}", first + 1)
    stored, before, after = load_file(folder / "interrupted.safetensors"), *map(trained, versions)
    for key, tensor in stored.items():
        is_one_of_them = (tensor - before[key]).abs().minimum((tensor - after[key]).abs()) < 1e-6
        assert is_one_of_them.all(), key


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 0], ids=["shards", "all-reduce"])
def test_workers_that_are_told_to_end_keep_the_model_that_they_have(
    tmp_path: Path, num_shards: int
) -> None:
    keeper = Keeper(listen("127.0.0.1:0"))
    with Fleet(tmp_path, num_shards=num_shards, num_workers=2) as fleet:
        fleet.settings["job.run_dir"] = str(tmp_path)
        if not num_shards:
            fleet.settings["cluster.rendezvous"] = f"127.0.0.1:{keeper.port}"
        fleet.shards()
        workers = [fleet.worker(rank, ENDLESS) for rank in range(2)]
        for worker in workers:
            worker.wait_for("^step 3$")
        for worker in workers:
            worker.send(SIGTERM)
        assert [worker.wait() for worker in workers] == [75, 75]
    assert "training is not complete: the model at version" in workers[0].output
    assert "the model" not in workers[1].output
    check_rescued(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_workers_that_lose_a_shard_keep_the_model_that_they_have(tmp_path: Path) -> None:
    with Fleet(tmp_path, num_shards=2, num_workers=2) as fleet:
        fleet.settings |= {"job.run_dir": str(tmp_path), "exchange.part_bytes": 512}
        shards = fleet.shards()
        workers = [fleet.worker(rank, ENDLESS) for rank in range(2)]
        for worker in workers:
            worker.wait_for("^step 3$")
        shards[1].send(SIGKILL)
        assert 0 not in [worker.wait() for worker in workers]
    check_rescued(tmp_path)


def test_a_script_that_fails_after_training_alone_keeps_its_model(tmp_path: Path) -> None:
    with Fleet(tmp_path, num_shards=0) as fleet:
        fleet.settings["job.run_dir"] = str(tmp_path)
        worker = fleet.worker(0, SCRIPT + "    raise KeyError('no such metric')\n")
        assert worker.wait() == 1
    check_rescued(tmp_path)
