"""Where a session may be used: inside its block, once in a process that has others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ps_core.config import load
from ps_core.errors import UsageError
from shardline.session import Session
from tests.processes import Fleet

STRATEGIES = {
    "alone": {},
    "shards": {"SHARDLINE_CLUSTER_SHARDS": "127.0.0.1:1"},
    "all-reduce": {"SHARDLINE_CLUSTER_RENDEZVOUS": "127.0.0.1:1"},
}


def make_optimizer(session: Session) -> None:
    model = torch.nn.Linear(2, 2)
    session.optimizer(torch.optim.SGD(model.parameters()), model)


def make_loader(session: Session) -> None:
    session.loader(torch.utils.data.TensorDataset(torch.ones(4, 2)), 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("call", [make_optimizer, make_loader])
def test_nothing_is_trained_outside_of_the_block(
    strategy: str, call: Callable[[Session], None]
) -> None:
    environ = {"SHARDLINE_METRICS_PORT": "-1", **STRATEGIES[strategy]}
    session = Session(load(environ=environ))
    with pytest.raises(UsageError, match=r"write `with shardline\.connect\(\) as session:`"):
        call(session)


@pytest.mark.parametrize("call", [make_optimizer, make_loader])
def test_nothing_is_trained_after_the_block(call: Callable[[Session], None]) -> None:
    with Session(load(environ={"SHARDLINE_METRICS_PORT": "-1"})) as session:
        pass
    with pytest.raises(UsageError, match="outside of the session's block"):
        call(session)


FOLDS = """
import torch
import shardline

for fold in range(2):
    model = torch.nn.Linear(2, 2)
    with shardline.connect() as session:
        optimizer = session.optimizer(torch.optim.SGD(model.parameters()), model)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    print(f"fold {fold} is done", flush=True)
"""


def test_a_second_job_of_a_process_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        (shard,) = fleet.shards()
        worker = fleet.worker(0, FOLDS)
        assert (worker.wait(), shard.wait()) == (2, 0)
    assert "fold 0 is done" in worker.output
    assert "shardline: shardline.connect() was called twice: " in worker.output
    assert "start a `shardline run` for each" in worker.output


def test_a_process_that_trains_alone_may_train_several_models(tmp_path: Path) -> None:
    with Fleet(tmp_path, num_shards=0) as fleet:
        worker = fleet.worker(0, FOLDS)
        assert worker.wait() == 0
    assert "fold 1 is done" in worker.output
