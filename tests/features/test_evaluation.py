"""session.evaluate: the mode of the model meanwhile, and afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, run_alone
from tests.features.three_ways import Returned
from tests.reference import JOB_SEED, SEED, assert_close, samples

pytestmark = pytest.mark.timeout(TEST_SECONDS)

STAGES = {
    "SHARDLINE_PIPELINE_STAGES": "2",
    "SHARDLINE_PIPELINE_SCHEDULE": "gpipe",
    "SHARDLINE_PIPELINE_MICROBATCHES": "1",
}


def net() -> nn.Sequential:
    """Of which a layer is in evaluation mode while it trains."""
    layers = nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.BatchNorm1d(5), nn.Linear(5, 3)
    model = nn.Sequential(*layers).double()
    model[3].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def evaluate(session: Session) -> Returned:
    with session.model():
        model = net()
    session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    before = modes(model)
    output = session.evaluate(model, samples(9)[0])
    assert modes(model) == before
    held = {name: each for name, each in model.named_buffers() if not each.is_meta}
    return held if output is None else {**held, "output": output}


@pytest.mark.parametrize("way", ["alone", "stages"])
def test_dropout_is_off_and_running_statistics_are_used_and_stay(
    cluster: Cluster, way: str
) -> None:
    if way == "alone":
        results = [run_alone(evaluate, environ=JOB_SEED)]
    else:
        results = cluster.run(evaluate, num_shards=2, environ=JOB_SEED | STAGES)
    torch.manual_seed(SEED)
    model = net().eval()
    expected = {**dict(model.named_buffers()), "output": model(samples(9)[0]).detach()}
    found = {name: each for result in results for name, each in result.tensors.items()}
    assert_close(found, expected, 1e-12, way)
