"""Weights that are tied by their memory, and tensors that have a weight's values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model
from torch import Tensor, nn

from tests.cluster import TEST_SECONDS, Cluster
from tests.features.three_ways import (
    LR,
    PlainTorch,
    Returned,
    Run,
    check,
    run_script,
    train_here,
)
from tests.reference import JOB_SEED

pytestmark = pytest.mark.timeout(TEST_SECONDS)


class Aliased(nn.Module):
    """`second` and `third` have the weight of `first`. So has `seen`, and `row` a row of it;
    through these no gradient flows.
    """

    seen: Tensor

    def __init__(self, *, by_memory: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(7, 7).double() for _ in range(3))
        self.out = nn.Linear(7, 3).double()
        weight = self.first.weight
        if by_memory:
            self.second.weight.data = weight.data
            self.third.weight = nn.Parameter(weight.data)
        else:
            self.second.weight = self.third.weight = weight
        self.register_buffer("seen", weight.data)
        self.row = weight.detach()[2]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.tanh(layer(x)) @ self.seen + self.row
        output: Tensor = self.out(x)
        return output


def train_aliased(run: Run, *, optimizer: str) -> Returned:
    """With AdamW as if one object had been put into all three places: torch would keep a state for
    each object over the one memory.
    """
    model = Aliased(by_memory=optimizer == "SGD" or not isinstance(run, PlainTorch))
    plain = getattr(torch.optim, optimizer)(model.parameters(), lr=10 * LR)
    train_here(run, model, run.optimizer(plain, model))
    return {**model.state_dict(), "row": model.row}


@pytest.mark.parametrize(("optimizer", "num_shards"), [("SGD", 2), ("AdamW", 2), ("AdamW", 0)])
def test_what_shares_the_memory_of_a_weight_is_trained_as_that_weight(
    cluster: Cluster, optimizer: str, num_shards: int
) -> None:
    check(cluster, train_aliased, num_shards=num_shards, optimizer=optimizer)


def test_it_is_in_the_models_file_once(cluster: Cluster, tmp_path: Path) -> None:
    environ = {**JOB_SEED, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    script, arguments = f"{__name__}:train_aliased", {"optimizer": "AdamW"}
    results = cluster.run(run_script, environ=environ, script=script, arguments=arguments)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for name in ("second.weight", "third.weight", "seen"):
        assert metadata[f"tied.{name}"] == "first.weight"
    model = Aliased(by_memory=True)
    missing, unexpected = load_model(model, path)
    assert not [*missing, *unexpected]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, results[1].tensors[name]), name
