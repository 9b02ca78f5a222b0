"""Every mode learns to read handwritten digits: three workers, two shards, a small CNN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster

NUM_EPOCHS = 8

MODES = {
    "sync": {},
    "backup workers": {"BACKUP_WORKERS": "1"},
    "bounded": {"MODE": "bounded", "BOUND": "1"},
    "async": {"MODE": "async"},
    "async, staleness scaling": {"MODE": "async", "STALENESS_SCALING": "1"},
    # With a momentum of 0.9 it still swings after these few rounds, and rounding decides how far.
    "local": {"MODE": "local", "LOCAL_STEPS": "4", "OUTER_MOMENTUM": "0.5"},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(num_shards=2, num_workers=3) as cluster:
        yield cluster


def read_digits(session: Session) -> dict[str, Any]:
    """Train on a third of each batch, and measure on digits that nobody has trained on."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits)
    torch.manual_seed(session.seed)
    model = nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=5e-3), model)
    loader = session.loader(TensorDataset(images[:1400], labels[:1400]), batch_size=21)
    for _ in session.epochs(NUM_EPOCHS):
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        correct = model(images[1400:]).argmax(dim=1) == labels[1400:]
    accuracy = float(correct.double().mean())
    return {"accuracy": accuracy, "sum": sum(float(p.detach().sum()) for p in model.parameters())}


@pytest.mark.timeout(TEST_SECONDS)
@pytest.mark.parametrize("mode", MODES)
def test_it_converges(cluster: Cluster, mode: str) -> None:
    environ = {f"SHARDLINE_CONSISTENCY_{key}": value for key, value in MODES[mode].items()}
    results = cluster.run(
        read_digits, environ={**environ, "SHARDLINE_EXCHANGE_PART_BYTES": "65536"}
    )
    # The last 397 digits are of other writers, and harder; one process reaches 0.96 in this time.
    assert min(result.values["accuracy"] for result in results) > 0.88
    assert len({result.values["sum"] for result in results}) == 1, "all hold the same model"
