"""What becomes of each worker's buffers: at the end of a pass all hold those of worker 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardline.session import Session
from tests.buffers import contents, every_kind
from tests.cluster import TEST_SECONDS, Cluster
from tests.features.three_ways import LR, Returned
from tests.reference import Net, holding, loss_of, samples

pytestmark = pytest.mark.timeout(TEST_SECONDS)

STRATEGIES = {
    "parameter-server": {},
    "async": {"SHARDLINE_CONSISTENCY_MODE": "async"},
    "local": {"SHARDLINE_CONSISTENCY_MODE": "local"},
    "allreduce": {},
    "ZeRO": {"SHARDLINE_ALLREDUCE_SHARD_OPTIMIZER": "true"},
}


def num_shards(strategy: str) -> int:
    return 0 if strategy in ("allreduce", "ZeRO") else 2


class NetOfKinds(Net):
    """With buffers of every kind, which no forward uses."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.kinds = holding(every_kind(start))
        self.kinds.register_buffer("not kept", torch.full((2,), start), persistent=False)
        self.kinds.register_buffer("wide", torch.full((2,), start).to(torch.complex128), False)
        self.kinds.register_buffer("later", None)
        self.frozen = nn.Parameter(torch.full((1,), start).expand(5), requires_grad=False)

    def become(self, start: float) -> None:
        """Replace all buffers, as a forward that assigns to them."""
        for name, tensor in every_kind(start).items():
            setattr(self.kinds, name, tensor)
        setattr(self.kinds, "not kept", torch.full((2,), start))
        self.kinds.later = torch.full((1,), start)
        self.kinds.get_buffer("wide").fill_(start)
        self.frozen.data = torch.full((5,), start)

    def contents(self) -> dict[str, str]:
        return {**contents(dict(self.kinds.named_buffers())), **contents({"frozen": self.frozen})}


def passes(session: Session) -> Returned:
    """Three samples an epoch, so that worker 1 has one batch where worker 0 has two."""
    model = NetOfKinds(session.rank + 1)
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    found = [model.contents()]
    loader = session.loader(TensorDataset(*samples(3)), batch_size=1)
    for epoch in session.epochs(2):
        for batch in loader:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            model.become(10 * (epoch + 1) + session.rank)
        found.append(model.contents())
    return {"found": found}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_begin_and_end_each_pass_with_those_of_worker_0(
    cluster: Cluster, tmp_path: Path, strategy: str
) -> None:
    results = cluster.run(
        passes,
        num_shards=num_shards(strategy),
        environ={**STRATEGIES[strategy], "SHARDLINE_JOB_RUN_DIR": str(tmp_path)},
    )
    model = NetOfKinds(1)
    expected = [model.contents()]
    for start in (10, 20):
        model.become(start)
        expected.append(model.contents())
    for result in results:
        assert result.values["found"] == expected
    written = load_file(tmp_path / "model.safetensors")
    kept = {k.removeprefix("kinds."): t for k, t in written.items() if k.startswith("kinds.")}
    persistent = {k.removeprefix("kinds.") for k in model.state_dict() if k.startswith("kinds.")}
    assert contents(kept) == {k: v for k, v in expected[-1].items() if k in persistent}


class Counted(nn.Module):
    """Hands its input on, with buffers that differ from one replica to the other."""

    mean: Tensor

    def __init__(self, start: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3,), start))
        self.register_buffer("mask", torch.full((1,), start).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x


def split_passes(session: Session) -> Returned:
    """The last stage has the buffers, and replaces one after each step."""
    with session.model():
        counted = Counted(session.rank + 1.0)
        model = nn.Sequential(nn.Linear(7, 5), counted, nn.Linear(5, 3)).double()
    session.split(at=["1"])
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    train_step = session.step(model, nn.functional.mse_loss)
    loader = session.loader(TensorDataset(*samples(6)), batch_size=2)
    found = []
    for _ in session.epochs(2):
        for batch in loader:
            optimizer.zero_grad()
            train_step(batch)
            optimizer.step()
            if session.stage:
                counted.mean = counted.mean + session.rank + 1
        if session.stage:
            found.append([counted.mean.tolist(), counted.get_buffer("mask").tolist()])
    return {"found": found}


@pytest.mark.parametrize("shards", [0, 2])
def test_each_stage_has_those_of_the_first_replica(cluster: Cluster, shards: int) -> None:
    stages = {"SHARDLINE_PIPELINE_STAGES": "2", "SHARDLINE_PIPELINE_MICROBATCHES": "2"}
    strategy = {} if shards else {"SHARDLINE_JOB_STRATEGY": "allreduce"}
    results = cluster.run(
        split_passes, num_shards=shards, num_workers=4, environ={**stages, **strategy}
    )
    means = [[1.0 + 2 * epoch] * 3 for epoch in (1, 2)]  # two batches an epoch for replica 0
    expected = [[mean, [1.0] * 4] for mean in means]
    assert [result.values["found"] for result in results] == [[], expected, [], expected]
