"""All workers of an all-reduce job are told to end at once, and others come."""

from __future__ import annotations

import re
from pathlib import Path
from signal import SIGTERM

import pytest
import torch
from safetensors.torch import load_file

from allreduce.store import Keeper
from ps_core.listening import listen
from tests.processes import Fleet

SCRIPT = """
import sys
import time
from pathlib import Path

import torch
import shardline

for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    method.__wrapped__.__dynamo_disable = method.__wrapped__  # imports torch's compiler otherwise

folder = Path(__file__).parent
torch.manual_seed(0)
model = torch.nn.Linear(8, 8, dtype=torch.float64)
with shardline.connect() as session:
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = session.optimizer(adam, model)
    print(f"begins with step {optimizer.next_step}", flush=True)
    while not (folder / "stop").exists():
        model(torch.ones(4, 8, dtype=torch.float64)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {optimizer.next_step}", flush=True)
        time.sleep(0.01)
    session.mean(0.0)
    print(f"ends with step {optimizer.next_step}", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True], ids=["all-reduce", "ZeRO-1"])
def test_the_last_worker_stays_until_another_has_taken_over(
    tmp_path: Path, is_sharded: bool
) -> None:
    keeper = Keeper(listen("127.0.0.1:0"))
    with Fleet(tmp_path, num_shards=0, num_workers=2) as fleet:
        fleet.settings |= {
            "cluster.rendezvous": f"127.0.0.1:{keeper.port}",
            "allreduce.shard_optimizer": is_sharded,
            "job.run_dir": str(tmp_path),
            "worker.grace_seconds": 60,
        }
        workers = [fleet.worker(rank, SCRIPT) for rank in range(2)]
        for worker in workers:
            worker.wait_for("^step 3$")
        for worker in reversed(workers):  # so that the first one is among the last
            worker.send(SIGTERM)
        workers[0].wait_for("all workers were told to end: waiting 45 s for one to take over")
        assert workers[1].wait() == 75
        keeper.ended(1, workers[1].pid)
        heir = fleet.worker(1, SCRIPT)
        assert workers[0].wait() == 75
        keeper.ended(0, workers[0].pid)
        begun = int(heir.wait_for(r"begins with step (\d+)")[1])
        assert begun >= 3
        other = fleet.worker(0, SCRIPT)
        other.wait_for(r"^step \d+$")
        (tmp_path / "stop").touch()
        assert [heir.wait(), other.wait()] == [0, 0]
        ended = re.findall(r"ends with step (\d+)", heir.output + other.output)
        assert ended[0] == ended[1]
    check_model(tmp_path / "model.safetensors", int(ended[0]))


def check_model(path: Path, num_steps: int) -> None:
    """Plain torch, with the batch that all workers had, or with nothing while some left."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(num_steps):
        model(torch.ones(4, 8, dtype=torch.float64)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in load_file(path).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_last_worker_says_so_when_none_comes(tmp_path: Path) -> None:
    keeper = Keeper(listen("127.0.0.1:0"))
    with Fleet(tmp_path, num_shards=0) as fleet:
        fleet.settings |= {
            "cluster.rendezvous": f"127.0.0.1:{keeper.port}",
            "worker.grace_seconds": 2,
        }
        worker = fleet.worker(0, SCRIPT)
        worker.wait_for("^step 3$")
        worker.send(SIGTERM)
        assert worker.wait() == 75
        assert "no worker has come: the job's parameters go with this one" in worker.output


@pytest.mark.slow
def test_the_last_worker_does_not_wait_when_the_run_is_interrupted(tmp_path: Path) -> None:
    keeper = Keeper(listen("127.0.0.1:0"))
    with Fleet(tmp_path, num_shards=0) as fleet:
        fleet.settings |= {
            "cluster.rendezvous": f"127.0.0.1:{keeper.port}",
            "worker.grace_seconds": 10_000,
        }
        worker = fleet.worker(0, SCRIPT)
        worker.wait_for("^step 3$")
        keeper.interrupt()
        worker.send(SIGTERM)
        assert worker.wait() == 75
