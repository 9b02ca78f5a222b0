"""Data that ends early, or not for all workers at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, run_alone
from tests.features.three_ways import (
    LR,
    SIZES,
    Returned,
)
from tests.reference import (
    JOB_SEED,
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


def break_early(session: Session, *, breaks: Sequence[int], num_rows: int) -> Returned:
    """Two epochs; in the first, `breaks` has the number of batches by rank, 0: all of them."""
    x, y = samples(num_rows)
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    loader = session.loader(TensorDataset(torch.arange(num_rows)), 4)
    seen = []
    after: dict[str, Tensor] = {}
    for epoch in session.epochs(2):
        for number, (rows,) in enumerate(loader, start=1):
            seen.append([optimizer.next_step, rows.tolist()])
            optimizer.zero_grad()
            loss_of(model, (x[rows], y[rows])).backward()
            optimizer.step()
            if epoch == 0 and number == breaks[session.rank]:
                break
        mean = session.mean(session.rank)
        if epoch == 0:
            after = {f"then {name}": tensor.clone() for name, tensor in model.state_dict().items()}
    return {"seen": seen, "mean": mean, **after, **model.state_dict()}


@pytest.mark.parametrize(
    ("breaks", "num_rows"),
    [
        ((0, 2), 40),  # worker 1 leaves first
        ((1, 0), 40),  # worker 0, whose buffers count, leaves first
        ((2, 2), 40),  # both at the same step
        ((3, 1), 40),  # both, one after the other
        ((0, 0), 34),  # the last batch is worker 0's, and small
        ((5, 0), 37),  # a break after the last batch
    ],
)
def test_workers_may_end_a_pass_at_different_steps(
    cluster: Cluster, breaks: tuple[int, int], num_rows: int
) -> None:
    results = cluster.run(break_early, environ=JOB_SEED, breaks=breaks, num_rows=num_rows)
    seen = [entry for result in results for entry in result.values["seen"]]
    steps = sorted({step for step, _ in seen})
    assert steps == list(range(len(steps)))
    together = [[n for at, rows in seen if at == step for n in rows] for step in steps]
    x, y = samples(num_rows)
    model = initial_net()
    train(model, plain_optimizer("AdamW", model, lr=LR), [(x[rows], y[rows]) for rows in together])
    for rank, result in enumerate(results):
        final = {n: t for n, t in result.tensors.items() if not n.startswith("then ")}
        assert_close(final, model.state_dict(), 1e-10, f"worker {rank}")
        for name in final:  # after the first pass, too, all workers hold the same
            then = f"then {name}"
            assert torch.equal(result.tensors[then], results[0].tensors[then]), name
        assert result.values["mean"] == 0.5
    if 0 in breaks:  # one goes on to the end: what the other has left is its own
        assert sorted(n for rows in together for n in rows) == sorted([*range(num_rows)] * 2)


def bring_own_data(session: Session, *, num_steps: Sequence[int]) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    for epoch in session.epochs(2):
        for number in range(num_steps[session.rank]):
            x, y = shares(SIZES, 100 * epoch + number)[session.rank]
            optimizer.zero_grad()
            loss_of(model, (x, y)).backward()
            optimizer.step(samples=len(x))
    return model.state_dict()


@pytest.mark.parametrize("num_steps", [(3, 5), (6, 2), (0, 4)])
def test_workers_with_their_own_data_may_take_unequal_numbers_of_steps(
    cluster: Cluster, num_steps: tuple[int, int]
) -> None:
    results = cluster.run(bring_own_data, environ=JOB_SEED, num_steps=num_steps)
    batches = []
    for epoch in range(2):
        for number in range(max(num_steps)):
            both = shares(SIZES, 100 * epoch + number)
            batches.append(concatenated([both[r] for r in (0, 1) if number < num_steps[r]]))
    model = initial_net()
    train(model, plain_optimizer("AdamW", model, lr=LR), batches)
    for rank, result in enumerate(results):
        assert_close(result.tensors, model.state_dict(), 1e-10, f"worker {rank}")


def fork_loaders(session: Session, *, num_epochs: int) -> Returned:
    """With DataLoader's own processes, forked anew in every pass while the streams are open."""
    # From Python 3.12 on fork() warns when there are threads; here it is the point.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    x, y = samples(24)
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    loader = session.loader(TensorDataset(torch.arange(24), x, y), 4, num_workers=2)
    seen = []
    for _ in session.epochs(num_epochs):
        for rows, inputs, targets in loader:
            seen.append([optimizer.next_step, rows.tolist()])
            optimizer.zero_grad()
            loss_of(model, (inputs, targets)).backward()
            optimizer.step()
    return {"seen": seen, **model.state_dict()}


def test_a_loader_may_fork_processes_of_its_own_in_the_middle_of_a_job(cluster: Cluster) -> None:
    num_epochs = 6
    results = cluster.run(fork_loaders, environ=JOB_SEED, num_epochs=num_epochs)
    seen = [entry for result in results for entry in result.values["seen"]]
    x, y = samples(24)
    rows = [[n for at, rows in seen if at == step for n in rows] for step in range(3 * num_epochs)]
    model = initial_net()
    train(model, plain_optimizer("AdamW", model, lr=LR), [(x[each], y[each]) for each in rows])
    for rank, result in enumerate(results):
        assert_close(result.tensors, model.state_dict(), 1e-10, f"worker {rank}")


def count_batches(session: Session) -> Returned:
    model = Net()
    session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    counts = []
    for num_samples, batch_size, drop_last in LOADERS:
        dataset = TensorDataset(torch.arange(num_samples))
        loader = session.loader(dataset, batch_size, drop_last=drop_last)
        counts.append([len(loader), sum(1 for _ in loader)])
    return {"counts": counts}


LOADERS = [(10, 2, False), (11, 2, False), (11, 2, True), (1, 4, False), (12, 4, False)]


def test_the_length_of_a_loader_is_its_number_of_batches_rounded_up(cluster: Cluster) -> None:
    alone = run_alone(count_batches).values["counts"]
    assert alone == [[n, n] for n in (5, 6, 5, 1, 3)]
    first, second = (result.values["counts"] for result in cluster.run(count_batches))
    lengths = (3, 3, 3, 1, 2)
    assert first == [[n, n] for n in lengths]
    assert second == [[n, m] for n, m in zip(lengths, (2, 3, 2, 0, 1), strict=True)]


def split(session: Session, *, is_late: bool) -> Returned:
    """A part of the data is held out, drawn before or after the worker has joined."""
    model = Net()
    order = np.random.permutation(40)
    plain = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer = session.optimizer(plain, model)
    if is_late:
        order = np.random.permutation(40)
    x, y = samples(40)
    kept = Subset(TensorDataset(torch.arange(40), x, y), order[:24].tolist())
    read = []
    for rows, *batch in session.loader(kept, 4):
        optimizer.zero_grad()
        loss_of(model, (batch[0], batch[1])).backward()
        optimizer.step()
        read += rows.tolist()
    return {"read": read, "kept": sorted(order[:24].tolist())}


@pytest.mark.parametrize("num_shards", [2, 0])
def test_workers_that_split_their_data_differently_are_refused(
    cluster: Cluster, num_shards: int
) -> None:
    strategy = {} if num_shards else {"SHARDLINE_JOB_STRATEGY": "allreduce"}
    environ = JOB_SEED | strategy
    results = cluster.run(split, num_shards=num_shards, environ=environ, is_late=False)
    assert results[0].values["kept"] == results[1].values["kept"]
    read = [row for result in results for row in result.values["read"]]
    assert sorted(read) == results[0].values["kept"]
    errors = cluster.run_failing(split, num_shards=num_shards, environ=environ, is_late=True)
    for error in errors:
        assert "loader 0 has other samples on one worker than on another" in error
