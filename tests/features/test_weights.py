"""What a batch weighs in the mean over workers: as much as in one process with all batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster
from tests.features.book import Book, assert_trained_as_one
from tests.features.three_ways import LR, SIZES, Returned
from tests.reference import (
    JOB_SEED,
    SEED,
    Net,
    assert_close,
    concatenated,
    initial_net,
    loss_of,
    plain_optimizer,
    samples,
    shares,
    train,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)

AVERAGING = {
    "CONSISTENCY_MODE": "local",
    "CONSISTENCY_LOCAL_STEPS": "1",
    "CONSISTENCY_OUTER_LR": "1",
    "CONSISTENCY_OUTER_MOMENTUM": "0",
}
"""Mode local, where it is the same as synchronous SGD."""
WAYS: dict[str, tuple[int, Mapping[str, str]]] = {
    "shards": (2, {}),
    "deterministic": (2, {"CONSISTENCY_DETERMINISTIC": "true"}),
    "local": (2, AVERAGING),
    "allreduce": (0, {"JOB_STRATEGY": "allreduce"}),
    "ZeRO-1": (0, {"JOB_STRATEGY": "allreduce", "ALLREDUCE_SHARD_OPTIMIZER": "true"}),
}
"""Shards and configuration."""
STAGES = (2, {"PIPELINE_STAGES": "2", "PIPELINE_MICROBATCHES": "4"})


def environ_of(settings: Mapping[str, str]) -> dict[str, str]:
    return JOB_SEED | {f"SHARDLINE_{name}": value for name, value in settings.items()}


# -- Losses that are no means over samples ---------------------------------------------------------

NUM_ROWS, IGNORED = 22, -100


def class_weights() -> Tensor:
    return torch.tensor([0.3, 1.7, 0.25], dtype=torch.float64)


def weight_of(target: Tensor) -> Tensor:
    """What CrossEntropyLoss divides by."""
    return class_weights()[target[target != IGNORED]].sum()


def labelled() -> tuple[Tensor, Tensor]:
    """Rows and classes; some are to be ignored, among them a whole batch of worker 1."""
    x, _ = samples(NUM_ROWS)
    target = torch.arange(NUM_ROWS) ** 2 % 3
    target[torch.arange(NUM_ROWS) % 5 == 1] = IGNORED
    target[4:8] = IGNORED
    return x, target


def classifier(num_inputs: int) -> nn.Sequential:
    layers = nn.Linear(num_inputs, 6), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def weigh_classes(session: Session, *, batch_size: int, by_hand: bool) -> Returned:
    x, target = labelled()
    with session.model():
        model = classifier(x.shape[1])
    plain = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = session.optimizer(plain, model)
    loss_fn = nn.CrossEntropyLoss(class_weights(), ignore_index=IGNORED)
    train_step = session.step(model, loss_fn, weight=weight_of)
    for batch in session.loader(TensorDataset(x, target), batch_size, shuffle=False):
        optimizer.zero_grad()
        if by_hand:
            loss_fn(model(batch[0]), batch[1]).backward()
            optimizer.step(samples=weight_of(batch[1]))
        else:
            train_step(batch)
            optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if not p.is_meta}


@pytest.mark.parametrize(
    ("way", "by_hand"), [*((way, False) for way in (*WAYS, "stages")), ("shards", True)]
)
def test_class_weights_and_ignored_targets_count_as_in_one_process(
    cluster: Cluster, way: str, by_hand: bool
) -> None:
    num_shards, settings = {**WAYS, "stages": STAGES}[way]
    results = cluster.run(
        weigh_classes,
        num_shards=num_shards,
        environ=environ_of(settings),
        batch_size=8 if way == "stages" else 4,
        by_hand=by_hand,
    )
    x, target = labelled()
    torch.manual_seed(SEED)
    model = classifier(x.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_fn = nn.CrossEntropyLoss(class_weights(), ignore_index=IGNORED)
    for start in range(0, NUM_ROWS, 8):
        optimizer.zero_grad()
        rows = slice(start, start + 8)
        loss_fn(model(x[rows]), target[rows]).backward()
        optimizer.step()
    expected = dict(model.named_parameters())
    for rank, result in enumerate(results):
        assert result.tensors
        own = {name: expected[name].detach() for name in result.tensors}
        assert_close(result.tensors, own, 1e-10, f"worker {rank}")


# -- What the script does with its batches ---------------------------------------------------------


def throw_away(session: Session, *, how: str) -> Returned:
    """Worker 0 does not like its first batch, and says so after the backward pass."""
    book = Book(session, 30, batch_size=4)
    is_first = session.rank == 0
    for (rows,) in book.loader:
        book.backward(rows)
        if is_first:
            is_first = False
            THROWS[how](book.model)
            book.open = []
            continue
        book.step()
    return book.returned()


def to_none(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


THROWS: dict[str, Callable[[nn.Module], Any]] = {
    "zero_grad": lambda model: model.zero_grad(),
    "to none": to_none,
    "to zero": lambda model: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize(
    ("how", "way"), [*((how, "shards") for how in THROWS), ("to none", "allreduce")]
)
def test_a_batch_whose_gradients_are_thrown_away_is_skipped(
    cluster: Cluster, how: str, way: str
) -> None:
    num_shards, settings = WAYS[way]
    results = cluster.run(throw_away, num_shards=num_shards, environ=environ_of(settings), how=how)
    assert_trained_as_one(results, 30)


def step_twice(session: Session) -> Returned:
    x, y = samples(NUM_ROWS)
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    for (rows,) in session.loader(TensorDataset(torch.arange(NUM_ROWS)), 4, shuffle=False):
        for sign in (1.0, -0.5):
            optimizer.zero_grad()
            (sign * loss_of(model, (x[rows], y[rows]))).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("way", ["shards", "allreduce"])
def test_every_step_with_a_batch_weighs_as_much_as_the_first(cluster: Cluster, way: str) -> None:
    num_shards, settings = WAYS[way]
    results = cluster.run(step_twice, num_shards=num_shards, environ=environ_of(settings))
    x, y = samples(NUM_ROWS)
    model = initial_net()
    optimizer = plain_optimizer("AdamW", model, lr=LR)
    for start in range(0, NUM_ROWS, 8):
        for sign in (1.0, -0.5):
            optimizer.zero_grad()
            (sign * loss_of(model, (x[start : start + 8], y[start : start + 8]))).backward()
            optimizer.step()
    for rank, result in enumerate(results):
        assert_close(result.tensors, model.state_dict(), 1e-10, f"worker {rank}")


def keep_some(samples: list[tuple[Tensor]]) -> list[Tensor] | None:
    """None of the first four, and not every fifth."""
    kept = [row for (row,) in samples if row >= 4 and row % 5]
    return [torch.stack(kept)] if kept else None


def drop_samples(session: Session) -> Returned:
    book = Book(session, 30, batch_size=4, shuffle=False, collate_fn=keep_some)
    for (rows,) in book.loader:
        book.train(rows)
    return book.returned()


@pytest.mark.parametrize("way", ["shards", "allreduce"])
def test_a_batch_weighs_what_a_collate_fn_has_left_of_it(cluster: Cluster, way: str) -> None:
    num_shards, settings = WAYS[way]
    results = cluster.run(drop_samples, num_shards=num_shards, environ=environ_of(settings))
    assert_trained_as_one(results, 30, [row for row in range(4, 30) if row % 5])


def own_data(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    train_step = session.step(model, nn.functional.mse_loss)
    for step in range(4):
        optimizer.zero_grad()
        train_step(shares(SIZES, step)[session.rank])
        optimizer.step()
    return model.state_dict()


def test_a_batch_that_session_step_has_seen_weighs_its_samples(cluster: Cluster) -> None:
    model = initial_net()
    batches = [concatenated(shares(SIZES, step)) for step in range(4)]
    optimizer = plain_optimizer("AdamW", model, lr=LR)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    for result in cluster.run(own_data, environ=JOB_SEED):
        assert_close(result.tensors, model.state_dict(), 1e-10)


def abstain(session: Session) -> Returned:
    """Worker 1 has nothing to learn from its second batch, whose loss is not a number."""
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    for step in range(3):
        x, y = shares(SIZES, step)[session.rank]
        optimizer.zero_grad()
        is_empty = session.rank == 1 and step == 1
        (loss_of(model, (x, y)) * (float("nan") if is_empty else 1.0)).backward()
        optimizer.step(samples=0 if is_empty else len(x))
    return {"skipped": optimizer.num_skipped, **model.state_dict()}


@pytest.mark.parametrize("way", ["shards", "allreduce"])
def test_with_no_samples_a_worker_abstains_and_the_others_go_on(cluster: Cluster, way: str) -> None:
    num_shards, settings = WAYS[way]
    results = cluster.run(abstain, num_shards=num_shards, environ=environ_of(settings))
    model = initial_net()
    both = [shares(SIZES, step) for step in range(3)]
    batches = [concatenated(both[0]), both[1][0], concatenated(both[2])]
    train(model, plain_optimizer("AdamW", model, lr=LR), batches)
    for result in results:
        assert result.values["skipped"] == 0
        assert_close(result.tensors, model.state_dict(), 1e-10)


def normalise(session: Session) -> Returned:
    """BatchNorm cannot train on a single sample."""
    model = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    sizes = []
    for (x,) in session.loader(TensorDataset(torch.linspace(0, 1, 21).double()[:, None]), 4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        sizes.append(len(x))
    return {"sizes": sizes}


@pytest.mark.parametrize("way", ["shards", "allreduce"])
def test_no_worker_is_left_with_one_sample_of_an_update(cluster: Cluster, way: str) -> None:
    num_shards, settings = WAYS[way]
    results = cluster.run(normalise, num_shards=num_shards, environ=environ_of(settings))
    assert [result.values["sizes"] for result in results] == [[4, 4, 3], [4, 4, 2]]
