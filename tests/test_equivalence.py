"""Any number of workers and shards trains as one process on the concatenated batches does."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from ps_core.plan import ParameterSpec, make_plan
from shardline.session import Session
from tests.cluster import DEFAULTS, TEST_SECONDS, Cluster, one_thread
from tests.host import Result
from tests.reference import (
    JOB_SEED,
    MIXED,
    Net,
    assert_close,
    concatenated,
    initial_net,
    loss_of,
    plain_optimizer,
    samples,
    shares,
    train,
    train_averaged,
)

TOPOLOGIES = [(shards, workers) for shards in (1, 2, 3) for workers in (1, 2, 3)]
SEVERAL_WORKERS = [(shards, workers) for shards, workers in TOPOLOGIES if workers > 1]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adagrad": {},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
}
LR = 1e-3
NUM_STEPS = 20
EQUAL_SIZES = [(4, 4, 4)]
UNEQUAL_SIZES = [(1, 5, 3), (6, 2, 2), (3, 3, 7)]
DETERMINISTIC = {"SHARDLINE_CONSISTENCY_DETERMINISTIC": "1"}

topologies = pytest.mark.parametrize(("num_shards", "num_workers"), TOPOLOGIES)
several_workers = pytest.mark.parametrize(("num_shards", "num_workers"), SEVERAL_WORKERS)
Parameters = Mapping[str, torch.Tensor]
pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with one_thread(), Cluster(num_shards=3, num_workers=3) as cluster:
        yield cluster


# -- What every worker does ------------------------------------------------------------------------


def train_on_shares(
    session: Session,
    *,
    optimizer: str,
    options: dict[str, Any],
    sizes: Sequence[Sequence[int]],
    dtype: str = "float64",
    delays: Sequence[float] = (0, 0, 0),
) -> Parameters:
    """Train on this worker's share of every step's batch; sizes and delays are by rank."""
    model = Net(dtype)
    plain = getattr(torch.optim, optimizer)(model.parameters(), lr=LR, **options)
    shared = session.optimizer(plain, model)
    for step in range(NUM_STEPS):
        x, y = shares(sizes[step % len(sizes)][: session.world_size], step)[session.rank]
        shared.zero_grad()
        loss_of(model, (x, y)).backward()
        time.sleep(delays[session.rank])
        shared.step(samples=len(x))
    return model.state_dict()


def train_on_dataset(
    session: Session, *, num_samples: int, batch_size: int, num_epochs: int
) -> dict[str, Any]:
    """Train with `session.loader`; `seen` has (epoch, step, sample numbers) of every batch."""
    x, y = samples(num_samples)
    model = Net()
    shared = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    loader = session.loader(TensorDataset(torch.arange(num_samples)), batch_size)
    seen = []
    for epoch in session.epochs(num_epochs):
        for (numbers,) in loader:
            seen.append((epoch, shared.next_step, numbers.tolist()))
            shared.zero_grad()
            loss_of(model, (x[numbers], y[numbers])).backward()
            shared.step()
    return {"seen": seen, **model.state_dict()}


# -- What one process does -------------------------------------------------------------------------


def all_shares(sizes: Sequence[Sequence[int]], num_workers: int) -> list[list[Any]]:
    return [shares(sizes[step % len(sizes)][:num_workers], step) for step in range(NUM_STEPS)]


def trained_on_whole_batches(
    optimizer: str,
    options: dict[str, Any],
    sizes: Sequence[Sequence[int]],
    num_workers: int,
    dtype: str = "float64",
) -> Parameters:
    model = initial_net(dtype)
    plain = plain_optimizer(optimizer, model, lr=LR, **options)
    train(model, plain, (concatenated(batches) for batches in all_shares(sizes, num_workers)))
    return model.state_dict()


def trained_on_averages(
    optimizer: str,
    options: dict[str, Any],
    sizes: Sequence[Sequence[int]],
    num_workers: int,
    dtype: str,
) -> Parameters:
    model = initial_net(dtype)
    plain = plain_optimizer(optimizer, model, lr=LR, **options)
    train_averaged(model, plain, all_shares(sizes, num_workers))
    return model.state_dict()


def assert_all_close(
    results: Sequence[Result], expected: Parameters, tolerance: float, case: str = ""
) -> None:
    start = initial_net().state_dict()
    moved = max(float((expected[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-6, "the reference does not train"
    for rank, result in enumerate(results):
        assert_close(result.tensors, expected, tolerance, f"{case} worker {rank}")


def test_the_shards_share_the_models_tensors() -> None:
    specs = [
        ParameterSpec(name, parameter.dtype, tuple(parameter.shape), 0)
        for name, parameter in Net().named_parameters()
    ]
    for num_shards in (2, 3):
        plan = make_plan(specs, num_shards, int(DEFAULTS["SHARDLINE_EXCHANGE_PART_BYTES"]), 2**20)
        shards_of: dict[int, set[int]] = {}
        for part in plan.parts:
            for piece in part.slices:
                shards_of.setdefault(piece.parameter, set()).add(part.shard)
        assert max(map(len, shards_of.values())) == num_shards


# -- Every topology --------------------------------------------------------------------------------


@topologies
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float64_training_equals_one_process(
    cluster: Cluster, num_shards: int, num_workers: int, optimizer: str
) -> None:
    options = OPTIMIZERS[optimizer]
    results = cluster.run(
        train_on_shares,
        num_shards=num_shards,
        num_workers=num_workers,
        environ=JOB_SEED,
        optimizer=optimizer,
        options=options,
        sizes=EQUAL_SIZES,
    )
    expected = trained_on_whole_batches(optimizer, options, EQUAL_SIZES, num_workers)
    assert_all_close(results, expected, 1e-10)


@topologies
def test_float32_training_equals_one_process_and_with_one_worker_bit_for_bit(
    cluster: Cluster, num_shards: int, num_workers: int
) -> None:
    case: dict[str, Any] = {"optimizer": "SGD", "options": OPTIMIZERS["SGD"], "dtype": "float32"}
    results = cluster.run(
        train_on_shares,
        num_shards=num_shards,
        num_workers=num_workers,
        environ=JOB_SEED,
        sizes=EQUAL_SIZES,
        **case,
    )
    expected = trained_on_whole_batches(sizes=EQUAL_SIZES, num_workers=num_workers, **case)
    assert_all_close(results, expected, 1e-6 if num_workers > 1 else 0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_one_worker_equals_one_process_bit_for_bit(
    cluster: Cluster, optimizer: str, dtype: str
) -> None:
    case: dict[str, Any] = {
        "optimizer": optimizer,
        "options": OPTIMIZERS[optimizer],
        "sizes": UNEQUAL_SIZES,
        "dtype": dtype,
    }
    results = cluster.run(train_on_shares, num_shards=2, num_workers=1, environ=JOB_SEED, **case)
    assert_all_close(results, trained_on_whole_batches(num_workers=1, **case), 0)


# -- Several workers -------------------------------------------------------------------------------


@several_workers
def test_a_gradient_counts_as_much_as_the_samples_behind_it(
    cluster: Cluster, num_shards: int, num_workers: int
) -> None:
    results = cluster.run(
        train_on_shares,
        num_shards=num_shards,
        num_workers=num_workers,
        environ=JOB_SEED,
        optimizer="AdamW",
        options={},
        sizes=UNEQUAL_SIZES,
    )
    expected = trained_on_whole_batches("AdamW", {}, UNEQUAL_SIZES, num_workers)
    assert_all_close(results, expected, 1e-10)


@several_workers
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_bfloat16_gradients_are_added_in_float32_and_rounded_once(
    cluster: Cluster, num_shards: int, num_workers: int, optimizer: str
) -> None:
    case: dict[str, Any] = {
        "optimizer": optimizer,
        "options": OPTIMIZERS[optimizer],
        "sizes": [(2, 2, 4)],  # weights without rounding, so that only the sum can differ
        "dtype": "bfloat16",
    }
    results = cluster.run(
        train_on_shares,
        num_shards=num_shards,
        num_workers=num_workers,
        environ={**JOB_SEED, **DETERMINISTIC},
        **case,
    )
    assert_all_close(results, trained_on_averages(num_workers=num_workers, **case), 0)


@several_workers
def test_a_model_of_mixed_element_types_trains_each_in_its_own(
    cluster: Cluster, num_shards: int, num_workers: int
) -> None:
    case: dict[str, Any] = {
        "optimizer": "AdamW",
        "options": {},
        "sizes": [(2, 2, 4)],
        "dtype": MIXED,
    }
    results = cluster.run(
        train_on_shares,
        num_shards=num_shards,
        num_workers=num_workers,
        environ={**JOB_SEED, **DETERMINISTIC},
        **case,
    )
    assert_all_close(results, trained_on_averages(num_workers=num_workers, **case), 0)


@pytest.mark.parametrize(("num_shards", "num_workers"), [(1, 3), (2, 2), (3, 3)])
def test_deterministic_runs_are_equal_bit_for_bit_whoever_is_late(
    cluster: Cluster, num_shards: int, num_workers: int
) -> None:
    def run(*delays: float) -> list[Result]:
        return cluster.run(
            train_on_shares,
            num_shards=num_shards,
            num_workers=num_workers,
            environ={**JOB_SEED, **DETERMINISTIC},
            optimizer="SGD",
            options=OPTIMIZERS["SGD"],
            sizes=UNEQUAL_SIZES,
            dtype="float32",
            delays=delays,
        )

    late = 0.01
    first, *others = run(late, 0, 0)
    for result in [*others, *run(0, late, 0)]:
        assert_close(result.tensors, first.tensors, 0)


# -- Data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_shards", "num_workers"), [(1, 2), (2, 2), (2, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize(("num_samples", "batch_size"), [(53, 4), (24, 4), (3, 2)])
def test_the_loaders_batches_of_one_step_are_one_batch(
    cluster: Cluster, num_shards: int, num_workers: int, num_samples: int, batch_size: int
) -> None:
    num_epochs = 3
    results = cluster.run(
        train_on_dataset,
        num_shards=num_shards,
        num_workers=num_workers,
        environ=JOB_SEED,
        num_samples=num_samples,
        batch_size=batch_size,
        num_epochs=num_epochs,
    )
    seen = [entry for result in results for entry in result.values["seen"]]
    for epoch in range(num_epochs):
        used = sorted(number for at, _, numbers in seen if at == epoch for number in numbers)
        assert used == list(range(num_samples))
    num_steps = num_epochs * -(-num_samples // (batch_size * num_workers))
    assert {step for _, step, _ in seen} == set(range(num_steps))

    x, y = samples(num_samples)
    model = initial_net()
    batches = []
    for step in range(num_steps):
        together = [number for _, at, numbers in seen if at == step for number in numbers]
        batches.append((x[together], y[together]))
    train(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True), batches)
    for result in results:
        assert_close(result.tensors, model.state_dict(), 1e-10)
