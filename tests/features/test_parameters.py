"""Schedules, groups of parameters, and parameters that are frozen, unused or shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.optim import lr_scheduler

from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster
from tests.features.three_ways import (
    BATCH_SIZE,
    LR,
    NUM_STEPS,
    SIZES,
    Returned,
    Run,
    Script,
    check,
    run_script,
    train_here,
    with_state,
)
from tests.reference import (
    JOB_SEED,
    Net,
    loss_of,
    samples,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


# -- Schedules and groups --------------------------------------------------------------------------


def lambda_schedule(run: Run) -> Returned:
    model = Net()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train_here(run, model, optimizer, schedule.step)
    return with_state(model, optimizer)


def one_cycle_schedule(run: Run) -> Returned:
    model = Net()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=10 * LR, total_steps=NUM_STEPS)
    betas = []

    def after_step() -> None:
        betas.append(optimizer.param_groups[0]["betas"])
        if len(betas) < NUM_STEPS:
            schedule.step()

    train_here(run, model, optimizer, after_step)
    assert len(set(betas)) > 2  # it moves the betas, too
    return with_state(model, optimizer)


def cosine_schedule(run: Run) -> Returned:
    model = Net()
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), model)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, T_max=NUM_STEPS)
    train_here(run, model, optimizer, schedule.step)
    return with_state(model, optimizer)


def schedule_made_before_the_session(run: Run) -> Returned:
    model = Net()
    plain = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    schedule = lr_scheduler.CosineAnnealingLR(plain, T_max=NUM_STEPS)
    optimizer = run.optimizer(plain, model)
    plain._opt_called = True  # type: ignore[attr-defined]  # or torch warns: it watches this one
    train_here(run, model, optimizer, schedule.step)
    return with_state(model, optimizer)


@pytest.mark.parametrize(
    "script",
    [lambda_schedule, one_cycle_schedule, cosine_schedule, schedule_made_before_the_session],
)
def test_schedules_move_the_hyperparameters_of_every_step(cluster: Cluster, script: Script) -> None:
    check(cluster, script)


def plateau_schedule(run: Run) -> Returned:
    model = Net()
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.3), model)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    means, rates = [], []
    for step in range(NUM_STEPS):
        x, y = run.share(*samples(BATCH_SIZE, step))
        optimizer.zero_grad()
        loss = loss_of(model, (x, y))
        loss.backward()
        run.step(optimizer, len(x))
        means.append(run.mean(loss.detach(), len(x)))
        schedule.step(means[-1])
        rates.append(schedule.get_last_lr()[0])
    assert 1 < len(set(rates)) < NUM_STEPS
    return {**model.state_dict(), "means": torch.tensor(means), "rates": rates}


def test_a_plateau_of_the_mean_loss_is_seen_by_all_workers_alike(cluster: Cluster) -> None:
    check(cluster, plateau_schedule)


def several_groups(run: Run) -> Returned:
    model = Net()
    groups: list[dict[str, Any]] = [
        {"params": [model.second.weight, model.first.weight], "weight_decay": 0.3},
        {"params": [model.first.bias, model.second.bias, model.scale], "lr": 3e-3},
        {"params": [*model.third.parameters(), *model.norm.parameters()], "betas": (0.5, 0.6)},
    ]
    plain = torch.optim.AdamW(groups, lr=LR, weight_decay=0.01)
    optimizer = run.optimizer(plain, model)
    schedule = lr_scheduler.LambdaLR(optimizer, [lambda n: 1.0, lambda n: 0.9**n, lambda n: 2.0])
    train_here(run, model, optimizer, schedule.step)
    return with_state(model, optimizer)


def test_every_group_has_its_own_hyperparameters(cluster: Cluster) -> None:
    check(cluster, several_groups)


# -- Parameters that are frozen, unused or shared --------------------------------------------------


class NetWithBuffers(Net):
    """Frozen first layer, and buffers that differ from process to process; some transposed."""

    offset: Tensor
    hidden: Tensor
    turned: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first.weight = nn.Parameter(torch.randn(7, 13, dtype=torch.float64).t())
        self.second.weight = nn.Parameter(torch.randn(13, 11, dtype=torch.float64).t())
        self.first.requires_grad_(False)
        self.register_buffer("turned", torch.randn(3, BATCH_SIZE).t())
        self.register_buffer("offset", torch.randn(7, dtype=torch.float64))
        self.register_buffer("hidden", torch.randn(3).half(), persistent=False)
        self.register_buffer("count", torch.randint(1000, ()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.offset) + self.hidden + self.turned[0]


def frozen_in_the_optimizer(run: Run) -> Returned:
    model = NetWithBuffers()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    train_here(run, model, optimizer)
    return {**with_state(model, optimizer), "hidden": model.hidden}


def frozen_outside_the_optimizer(run: Run) -> Returned:
    model = NetWithBuffers()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = run.optimizer(torch.optim.AdamW(trained, lr=LR), model)
    train_here(run, model, optimizer)
    return {**with_state(model, optimizer), "hidden": model.hidden}


@pytest.mark.parametrize("script", [frozen_in_the_optimizer, frozen_outside_the_optimizer])
def test_frozen_parameters_and_buffers_are_those_of_worker_0_and_stay(
    cluster: Cluster, script: Script
) -> None:
    check(cluster, script)


def test_they_are_in_the_models_file_whatever_their_strides(
    cluster: Cluster, tmp_path: Path
) -> None:
    environ = {**JOB_SEED, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    name = f"{__name__}:frozen_outside_the_optimizer"
    result = cluster.run(run_script, environ=environ, script=name, arguments={})[1]
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == NetWithBuffers().state_dict().keys()
    for key, tensor in written.items():
        assert torch.equal(tensor, result.tensors[key]), key


def another_buffer_on_worker_1(session: Session) -> Returned:
    model = Net()
    model.register_buffer(f"of worker {session.rank}".replace(" ", "_"), torch.zeros(3))
    session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    return {}


def test_a_model_with_other_buffers_is_refused(cluster: Cluster) -> None:
    told, own = cluster.run_failing(another_buffer_on_worker_1)
    assert own.startswith("MismatchError: 'of_worker_0' is absent in this worker's model")
    assert "MismatchError" in told


class Branches(nn.Module):
    """A trunk, a branch that every sample takes and one that only some samples take."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(7, 9, dtype=torch.float64)
        self.always = nn.Linear(9, 3, dtype=torch.float64)
        self.sometimes = nn.Linear(9, 3, dtype=torch.float64)

    def forward(self, x: Tensor, takes: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        output: Tensor = self.always(hidden)
        if takes.any():
            output = output.index_add(
                0, takes.nonzero().flatten(), torch.tanh(self.sometimes(hidden[takes]))
            )
        return output


def train_branches(run: Run, taken_in_step: Callable[[int], Tensor]) -> Returned:
    model = Branches()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    optimizer = run.optimizer(plain, model)
    for step in range(NUM_STEPS):
        x, y, takes = run.share(*samples(BATCH_SIZE, step), taken_in_step(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x, takes), y).backward()
        assert (model.sometimes.weight.grad is None) == (not takes.any())
        run.step(optimizer, len(x))
    return with_state(model, optimizer)


def unused_on_all_workers(run: Run) -> Returned:
    return train_branches(run, lambda step: torch.full([BATCH_SIZE], step % 3 == 1))


def unused_on_one_worker(run: Run) -> Returned:
    """In steps of each kind: only worker 1 takes the branch, both do, nobody does."""
    first = torch.tensor([[0], [1], [0]]).bool()
    second = torch.tensor([[1], [1], [0]]).bool()
    taken = torch.cat([first.expand(3, SIZES[0]), second.expand(3, SIZES[1])], dim=1)
    return train_branches(run, lambda step: taken[step % 3])


def test_a_parameter_that_no_worker_used_is_skipped(cluster: Cluster) -> None:
    check(cluster, unused_on_all_workers)


def test_a_parameter_that_one_worker_used_is_averaged_over_all_samples(cluster: Cluster) -> None:
    check(cluster, unused_on_one_worker)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 7, bias=False, dtype=torch.float64)
        self.down = nn.Linear(7, 7, dtype=torch.float64)
        self.down.weight = self.up.weight
        self.out = nn.Linear(7, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return output


def tied_weights(run: Run) -> Returned:
    model = Tied()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    train_here(run, model, optimizer)
    return with_state(model, optimizer)


def test_a_tied_weight_is_trained_once_for_all_its_places(cluster: Cluster) -> None:
    check(cluster, tied_weights)


def test_a_tied_weight_is_stored_once_and_plain_torch_reads_it_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    environ = {**JOB_SEED, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    name = f"{__name__}:tied_weights"
    results = cluster.run(run_script, environ=environ, script=name, arguments={})
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["down.bias", "out.bias", "out.weight", "up.weight"]
        assert file.metadata()["tied.down.weight"] == "up.weight"
    model = Tied()
    missing, unexpected = load_model(model, path)
    assert not [*missing, *unexpected]
    assert model.down.weight is model.up.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, results[0].tensors[name]), name


# -- Parameters that a script touches, or that hold nothing ----------------------------------------


class WithNothing(Net):
    """A part of it was turned off, and has parameters without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0, 3, dtype=torch.float64))


def train_with_nothing(run: Run) -> Returned:
    model = WithNothing()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    train_here(run, model, optimizer)
    return with_state(model, optimizer)


@pytest.mark.parametrize("num_shards", [2, 0])
def test_a_parameter_without_elements_is_kept_and_not_trained(
    cluster: Cluster, num_shards: int
) -> None:
    check(cluster, train_with_nothing, num_shards=num_shards)


def sharpness_aware(run: Run) -> Returned:
    """SAM, with the same samples on every worker, and a look at averaged weights now and then."""
    model = Net()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for step in range(NUM_STEPS):
        batch = samples(BATCH_SIZE, step)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        before = [parameter.data.clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=0.1)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.data = value
        run.step(optimizer, BATCH_SIZE)
        own = {name: value.clone() for name, value in model.state_dict().items()}
        average = {name: value.lerp(own[name], 0.1) for name, value in average.items()}
        if step % 3 == 0:
            model.load_state_dict(average)
            losses.append(loss_of(model, batch).detach())
            model.load_state_dict(own)
    return {**with_state(model, optimizer), "losses": torch.stack(losses)}


@pytest.mark.parametrize("num_shards", [2, 0])
def test_a_script_may_change_parameters_if_it_puts_their_values_back(
    cluster: Cluster, num_shards: int
) -> None:
    check(cluster, sharpness_aware, num_shards=num_shards)
