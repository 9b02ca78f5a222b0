"""Buffers, element types, and the optimizer's state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ps_core.job import Job
from ps_core.optim_spec import describe
from ps_core.plan import ParameterSpec
from ps_core.settings import ConsistencyConfig
from ps_core.v1 import shard_pb2
from ps_server import values
from ps_server.shard import Shard
from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster
from tests.features.three_ways import (
    BATCH_SIZE,
    LR,
    NUM_STEPS,
    SIZES,
    Returned,
    Run,
    check,
    flat_state,
    of_the_model,
    restored_state,
    train_here,
    with_state,
)
from tests.reference import (
    JOB_SEED,
    MIXED,
    SEED,
    Net,
    assert_close,
    concatenated,
    gradients_of,
    initial_net,
    loss_of,
    plain_optimizer,
    samples,
    shares,
    train,
    weighted_mean,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


# -- Buffers and element types ---------------------------------------------------------------------


class Normed(nn.Module):
    """With BatchNorm, whose running statistics begin elsewhere in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 9, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(9, dtype=torch.float64)
        self.last = nn.Linear(9, 3, dtype=torch.float64)
        assert self.norm.running_mean is not None
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return output


def train_normed(session: Session) -> Returned:
    model = Normed()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    start = {f"start {name}": buffer.clone() for name, buffer in model.named_buffers()}
    for step in range(NUM_STEPS):
        x, y = shares(SIZES, step)[session.rank]
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        optimizer.step(samples=len(x))
    return {**start, **copy.deepcopy(model.state_dict())}


def test_within_a_pass_batch_norm_counts_on_each_worker_and_worker_0s_counts_are_kept(
    cluster: Cluster, tmp_path: Path
) -> None:
    environ = {**JOB_SEED, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    results = cluster.run(train_normed, environ=environ)

    torch.manual_seed(SEED)
    replicas = [Normed()]
    replicas.append(copy.deepcopy(replicas[0]))
    start = {f"start {name}": buffer.clone() for name, buffer in replicas[0].named_buffers()}
    optimizer = plain_optimizer("AdamW", replicas[0], lr=LR)
    for step in range(NUM_STEPS):
        each = [
            gradients_of(model, batch)
            for model, batch in zip(replicas, shares(SIZES, step), strict=True)
        ]
        weights = [size / sum(SIZES) for size in SIZES]
        for gradients, parameters in zip(
            zip(*each, strict=True),
            zip(*(model.parameters() for model in replicas), strict=True),
            strict=True,
        ):
            parameters[0].grad = weighted_mean(gradients, weights)
        optimizer.step()
        with torch.no_grad():
            for theirs, newest in zip(
                replicas[1].parameters(), replicas[0].parameters(), strict=True
            ):
                theirs.copy_(newest)

    for rank, (result, model) in enumerate(zip(results, replicas, strict=True)):
        assert_close(result.tensors, {**start, **model.state_dict()}, 1e-10, f"worker {rank}")
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == replicas[0].state_dict().keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, results[0].tensors[name]), name


def one_element_type(run: Run, *, dtype: str) -> Returned:
    model = Net(dtype)
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    train_here(run, model, optimizer)
    return with_state(model, optimizer)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", 1e-10), ("float32", 1e-6), ("bfloat16", 0.05), (MIXED, 0.05)],
)
def test_parameters_and_state_keep_their_element_types(
    cluster: Cluster, dtype: str, tolerance: float
) -> None:
    check(cluster, one_element_type, tolerance=tolerance, dtype=dtype)


# -- The optimizer's state -------------------------------------------------------------------------

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adagrad": {"initial_accumulator_value": 0.1, "lr_decay": 0.01},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def train_with(run: Run, *, optimizer: str, options: Mapping[str, Any]) -> Returned:
    model = Net()
    plain = getattr(torch.optim, optimizer)(model.parameters(), lr=LR, **options)
    shared = run.optimizer(plain, model)
    train_here(run, model, shared)
    return with_state(model, shared)


def go_on_with(
    run: Run,
    *,
    optimizer: str,
    options: Mapping[str, Any],
    start: str,
    groups: list[dict[str, Any]],
) -> Returned:
    """Go on from tensors in the file `start` and the groups of a `state_dict()`."""
    model = Net()
    tensors = load_file(start)
    model.load_state_dict(of_the_model(tensors))
    plain = getattr(torch.optim, optimizer)(model.parameters(), lr=9.0, **options)
    shared = run.optimizer(plain, model)
    shared.load_state_dict(restored_state(tensors, groups))
    train_here(run, model, shared, steps=range(NUM_STEPS, 2 * NUM_STEPS))
    return with_state(model, shared)


@every_optimizer
def test_plain_torch_can_go_on_from_the_state_of_a_session(
    cluster: Cluster, optimizer: str
) -> None:
    options = OPTIMIZERS[optimizer]
    _, results = check(cluster, train_with, optimizer=optimizer, options=options)
    whole = initial_net()
    straight = plain_optimizer(optimizer, whole, lr=LR, **options)
    train(whole, straight, (samples(BATCH_SIZE, step) for step in range(2 * NUM_STEPS)))
    for result in results:
        model = Net()
        model.load_state_dict(of_the_model(result.tensors))
        resumed = plain_optimizer(optimizer, model, lr=9.0)
        resumed.load_state_dict(restored_state(result.tensors, result.values["groups"]))
        later = range(NUM_STEPS, 2 * NUM_STEPS)
        train(model, resumed, (samples(BATCH_SIZE, step) for step in later))
        assert_close(model.state_dict(), whole.state_dict(), 1e-10)


@every_optimizer
def test_a_session_can_go_on_from_the_state_of_plain_torch(
    cluster: Cluster, optimizer: str, tmp_path: Path
) -> None:
    options = OPTIMIZERS[optimizer]
    model = initial_net()
    plain = plain_optimizer(optimizer, model, lr=LR, **options)
    train(model, plain, (samples(BATCH_SIZE, step) for step in range(NUM_STEPS)))
    groups = plain.state_dict()["param_groups"]
    file = tmp_path / "start.safetensors"
    save_file({**model.state_dict(), **flat_state(plain)}, file)
    arguments = {"start": str(file), "groups": groups, "options": options}
    check(cluster, go_on_with, optimizer=optimizer, **arguments)


def reload(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    for step in range(10):
        x, y = shares(SIZES, step)[session.rank]
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        optimizer.step(samples=len(x))
        optimizer.load_state_dict(optimizer.state_dict())
    return model.state_dict()


def test_one_worker_may_load_a_state_while_another_reads_it(cluster: Cluster) -> None:
    results = cluster.run(reload, environ=JOB_SEED)
    model = initial_net()
    batches = [concatenated(shares(SIZES, step)) for step in range(10)]
    train(model, plain_optimizer("AdamW", model, lr=LR), batches)
    for result in results:
        assert_close(result.tensors, model.state_dict(), 1e-10)


def test_a_state_is_read_as_it_was_when_it_was_asked_for() -> None:
    model = Net("float32")
    plain = torch.optim.AdamW(model.parameters())
    specs = tuple(
        ParameterSpec(name, p.dtype, tuple(p.shape), 0) for name, p in model.named_parameters()
    )
    job = Job("job", 1, 1, specs, 512, 2**20, describe(plain), ConsistencyConfig())
    shard = Shard(job, 0)
    for state in shard.parts.values():
        for index, piece in enumerate(state.part.slices):
            state.optimizer.write_state(index, "exp_avg", torch.ones(piece.length))
    responses = values.read(shard, {}, shard_pb2.PullRequest(content=shard_pb2.CONTENT_STATE))
    read = [next(responses) for _ in range(2)]  # the version, and the first tensor
    for state in shard.parts.values():  # another worker loads a state
        state.optimizer.clear_state()
    assert len([*read, *responses]) == 1 + sum(len(s.part.slices) for s in shard.parts.values())


def forget_the_state(run: Run) -> Returned:
    model = Net()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    fresh = torch.optim.AdamW(model.parameters(), lr=2 * LR).state_dict()
    train_here(run, model, optimizer, steps=range(5))
    optimizer.load_state_dict(fresh)
    train_here(run, model, optimizer, steps=range(5, NUM_STEPS))
    return with_state(model, optimizer)


def test_loading_an_empty_state_forgets_the_old_one(cluster: Cluster) -> None:
    check(cluster, forget_the_state)
