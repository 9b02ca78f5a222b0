"""Backward passes: while gradients are sent, in several parts, and through weights of the past."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardline.session import Session
from tests.cluster import NOTHING, TEST_SECONDS, Cluster, run_alone
from tests.features.three_ways import LR, NUM_STEPS, Returned
from tests.reference import JOB_SEED, SEED, Net, assert_close, loss_of, samples

pytestmark = pytest.mark.timeout(TEST_SECONDS)

BATCH_SIZE = 8
ZERO_1 = {"SHARDLINE_ALLREDUCE_SHARD_OPTIMIZER": "true"}
LOCAL = {"SHARDLINE_CONSISTENCY_MODE": "local", "SHARDLINE_CONSISTENCY_LOCAL_STEPS": "1"}


class Uses(nn.Module):
    """Layers that are used twice: in checkpoints of both kinds and plainly; and one that is not
    used in every step.
    """

    step = 0

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(7, 7, dtype=torch.float64) for _ in range(5))
        self.first, self.reentrant, self.other, self.plain, self.sometimes = layers
        self.out = nn.Linear(7, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(2):
            x = checkpoint(self.reentrant, torch.tanh(x), use_reentrant=True)
            x = checkpoint(self.other, torch.tanh(x), use_reentrant=False)
            x = self.plain(torch.tanh(x))
        x = self.sometimes(x) if self.step % 3 == 1 else x
        output: Tensor = self.out(x)
        return output


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=10 * LR)


def overlapped(session: Session) -> Returned:
    model = Uses()
    optimizer = session.optimizer(adamw(model), model)
    train_step = session.step(model, nn.functional.mse_loss, overlap=True)
    for model.step in range(NUM_STEPS):
        batch = samples(BATCH_SIZE, model.step)
        train_step([each.tensor_split(session.world_size)[session.rank] for each in batch])
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(("num_shards", "environ"), [(2, NOTHING), (0, NOTHING), (0, ZERO_1)])
def test_gradients_that_are_sent_during_backward_are_complete(
    cluster: Cluster, num_shards: int, environ: Mapping[str, str]
) -> None:
    torch.manual_seed(SEED)
    model = Uses()
    optimizer = adamw(model)
    for model.step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, samples(BATCH_SIZE, model.step)).backward()
        optimizer.step()
    # A bucket for each layer or two.
    environ = {**JOB_SEED, "SHARDLINE_EXCHANGE_BUCKET_BYTES": "512", **environ}
    for result in cluster.run(overlapped, num_shards=num_shards, environ=environ):
        assert_close(result.tensors, model.state_dict(), 1e-10)


def two_graphs(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(adamw(model), model)
    first, second = (loss_of(model, samples(4, stream)) for stream in range(2))
    first.backward()
    optimizer.step()
    try:
        second.backward()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def test_alone_a_backward_pass_through_weights_of_the_past_fails_as_in_plain_torch() -> None:
    assert "modified by an inplace operation" in run_alone(two_graphs).values["error"]


@pytest.mark.parametrize(
    ("num_shards", "environ"), [(2, NOTHING), (2, LOCAL), (0, NOTHING), (0, ZERO_1)]
)
def test_a_backward_pass_through_weights_of_the_past_fails_as_in_plain_torch(
    cluster: Cluster, num_shards: int, environ: Mapping[str, str]
) -> None:
    for result in cluster.run(two_graphs, num_shards=num_shards, environ=environ):
        assert "modified by an inplace operation" in result.values["error"]
