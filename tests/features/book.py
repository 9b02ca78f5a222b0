"""A worker that writes down which rows it trains on; all of them together are to be one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from shardline.session import Session
from tests.features.three_ways import (
    LR,
    Returned,
)
from tests.host import Result
from tests.reference import (
    Net,
    assert_close,
    initial_net,
    loss_of,
    plain_optimizer,
    samples,
    train,
)


class Book:
    """The rows of every step that a worker takes with a loader over their numbers."""

    def __init__(self, session: Session, num_rows: int, **options: Any) -> None:  # noqa: ANN401 - session.loader's
        self.x, self.y = samples(num_rows)
        self.model = Net()
        plain = torch.optim.AdamW(self.model.parameters(), lr=LR)
        self.optimizer = session.optimizer(plain, self.model)
        self.dataset = TensorDataset(torch.arange(num_rows))
        self.loader = session.loader(self.dataset, **options)
        self.seen: list[tuple[int, list[int]]] = []
        self.open: list[int] = []

    def backward(self, rows: Tensor) -> None:
        """Its gradients are sums over the samples."""
        self.open += rows.tolist()
        (loss_of(self.model, (self.x[rows], self.y[rows])) * len(rows)).backward()

    def step(self) -> None:
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad /= len(self.open)
        self.seen.append((self.optimizer.next_step, self.open))
        self.open = []
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, rows: Tensor) -> None:
        self.backward(rows)
        self.step()

    def returned(self) -> Returned:
        return {"seen": self.seen, **self.model.state_dict()}


def assert_trained_as_one(
    results: Sequence[Result], num_rows: int, expected: Sequence[int] | None = None
) -> list[list[int]]:
    """What a `Book` tells of all workers: steps of one process with all the rows of each step.
    `expected`: the rows, as often as they are trained on. Returns the rows of each step.
    """
    seen = [entry for result in results for entry in result.values["seen"]]
    steps = sorted({step for step, _ in seen})
    assert steps == list(range(len(steps)))
    batches = [[n for at, rows in seen if at == step for n in rows] for step in steps]
    assert sorted(n for rows in batches for n in rows) == sorted(expected or range(num_rows))
    x, y = samples(num_rows)
    model = initial_net()
    train(model, plain_optimizer("AdamW", model, lr=LR), [(x[rows], y[rows]) for rows in batches])
    for rank, result in enumerate(results):
        assert_close(result.tensors, model.state_dict(), 1e-10, f"worker {rank}")
    return batches
