"""What training scripts use of torch works on shards and alone as it does in plain torch.

Most tests run one script three times: with plain torch in one process, in a session alone, and on
two shards with two workers that see unequal shares of every batch.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import time
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Timer
from typing import Any, Protocol

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import IterableDataset, TensorDataset

from ps_core.config import load
from ps_core.errors import (
    MismatchError,
    NonFiniteError,
    Preempted,
    ShardlineError,
    ShardUnreachableError,
    UsageError,
)
from ps_core.exchange import Farewell
from ps_core.job import Job
from ps_core.metrics import REGISTRY
from ps_core.optim_spec import describe
from ps_core.optimizer import ExchangeOptimizer
from ps_core.plan import ParameterSpec
from ps_core.point import Point
from ps_core.settings import ConsistencyConfig
from ps_core.v1 import shard_pb2
from ps_server import values
from ps_server.shard import Shard
from shardline.ports import free_ports
from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, one_thread, run_alone
from tests.host import Case, Result
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
    train_averaged,
    weighted_mean,
)

NUM_STEPS = 12
BAD_STEPS = (0, 5)
"""In which gradients overflow or are not numbers, in the tests about those."""
BATCH_SIZE = 7
SIZES = (4, 3)
"""Two workers' shares of a batch."""
LR = 1e-3
MAX_GRAD_NORM = 1.5
"""Between the smallest and the largest norm in the test that uses it."""
Returned = Mapping[str, Any]
Scaler = torch.amp.GradScaler
pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with one_thread(), Cluster(num_shards=3, num_workers=2) as cluster:
        yield cluster


# -- One script, three ways ------------------------------------------------------------------------


class Run(Protocol):
    """All that differs between plain torch and a session in the scripts below."""

    def optimizer(
        self, plain: torch.optim.Optimizer, model: nn.Module, max_grad_norm: float | None = None
    ) -> torch.optim.Optimizer: ...

    def share(self, *tensors: Tensor) -> Sequence[Tensor]:
        """This process's rows of a batch."""
        ...

    def step(
        self, optimizer: torch.optim.Optimizer, num_samples: int, scaler: Scaler | None = None
    ) -> None: ...

    def mean(self, value: Tensor, weight: float) -> float: ...


class PlainTorch:
    """One process, whole batches, no session."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        self.norms: list[float] = []

    def optimizer(
        self, plain: torch.optim.Optimizer, model: nn.Module, max_grad_norm: float | None = None
    ) -> torch.optim.Optimizer:
        self._clipped, self._max_grad_norm = list(model.parameters()), max_grad_norm
        return plain

    def share(self, *tensors: Tensor) -> Sequence[Tensor]:
        return tensors

    def step(
        self, optimizer: torch.optim.Optimizer, num_samples: int, scaler: Scaler | None = None
    ) -> None:
        if self._max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self._clipped, self._max_grad_norm)
            self.norms.append(float(norm))
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)

    def mean(self, value: Tensor, weight: float) -> float:
        return float(value)


class InSession:
    """One worker of a job, or a process that trains alone."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def optimizer(
        self, plain: torch.optim.Optimizer, model: nn.Module, max_grad_norm: float | None = None
    ) -> torch.optim.Optimizer:
        return self._session.optimizer(plain, model, max_grad_norm=max_grad_norm)

    def share(self, *tensors: Tensor) -> Sequence[Tensor]:
        session = self._session
        return [tensor.tensor_split(session.world_size)[session.rank] for tensor in tensors]

    def step(
        self, optimizer: torch.optim.Optimizer, num_samples: int, scaler: Scaler | None = None
    ) -> None:
        if scaler is None:
            optimizer.step(samples=num_samples)  # type: ignore[call-overload]  # a session's optimizer
        else:
            scaler.step(optimizer, samples=num_samples)

    def mean(self, value: Tensor, weight: float) -> float:
        return self._session.mean(value, weight)


Script = Callable[..., Returned]
"""Takes a `Run`, and arguments that JSON can hold."""


def run_script(session: Session, *, script: str, arguments: Mapping[str, Any]) -> Returned:
    """The case of every script: a worker calls it by its name."""
    function: Script = globals()[script]
    return function(InSession(session), **arguments)


def check(
    cluster: Cluster,
    script: Script,
    *,
    tolerance: float = 1e-10,
    num_shards: int = 2,
    **arguments: Any,  # noqa: ANN401 - JSON
) -> tuple[PlainTorch, list[Result]]:
    """The script must return the same in plain torch, alone and on every worker of a job."""
    plain = PlainTorch()
    expected = script(plain, **arguments)
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in expected.items() if name not in tensors}
    call: dict[str, Any] = {"script": script.__name__, "arguments": arguments, "environ": JOB_SEED}
    results = [run_alone(run_script, **call)]
    results += cluster.run(run_script, num_shards=num_shards, **call)
    for who, result in zip(("alone", "worker 0", "worker 1"), results, strict=True):
        assert_close(result.tensors, tensors, tolerance, who)
        assert result.values == json.loads(json.dumps(values)), f"{who}, seed {SEED}"
    return plain, results


def train_here(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[], None] = lambda: None,
    steps: Sequence[int] = range(NUM_STEPS),
) -> None:
    """The usual loop."""
    for step in steps:
        x, y = run.share(*samples(BATCH_SIZE, step))
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        run.step(optimizer, len(x))
        after_step()


def with_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The model's tensors, and the optimizer's state and groups."""
    return {
        **model.state_dict(),
        **flat_state(optimizer),
        "groups": optimizer.state_dict()["param_groups"],
    }


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of `state_dict()`, named `state.<parameter>.<key>`."""
    return {
        f"state.{index}.{key}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def restored_state(
    tensors: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The `state_dict()` that `with_state` has taken apart."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("state."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": list(groups)}


def of_the_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `with_state` took from the model."""
    return {name: value for name, value in tensors.items() if not name.startswith("state.")}


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
    name = "frozen_outside_the_optimizer"
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
    assert own.startswith("MismatchError: the job's model has 'of_worker_0'")
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
    results = cluster.run(run_script, environ=environ, script="tied_weights", arguments={})
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


# -- Gradients: accumulated, clipped, scaled -------------------------------------------------------


def accumulated_gradients(run: Run) -> Returned:
    model = Net()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    for step in range(NUM_STEPS):
        num_samples = 0
        for micro in range(3):
            x, y = run.share(*samples(BATCH_SIZE, 3 * step + micro))
            (loss_of(model, (x, y)) / 3).backward()
            num_samples += len(x)
        run.step(optimizer, num_samples)
        optimizer.zero_grad()
    return with_state(model, optimizer)


def test_gradients_may_accumulate_before_a_step(cluster: Cluster) -> None:
    check(cluster, accumulated_gradients)


def accumulate_with_loader(session: Session) -> Returned:
    """Two batches of the loader per step, which counts the samples of both."""
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    x, y = samples(30)
    seen: dict[int, list[int]] = {}
    for _ in session.epochs(2):
        for number, (rows,) in enumerate(session.loader(TensorDataset(torch.arange(30)), 4)):
            seen.setdefault(optimizer.next_step, []).extend(rows.tolist())
            # The sum over the samples of both batches, which the step turns into their mean.
            (loss_of(model, (x[rows], y[rows])) * len(rows)).backward()
            if number % 2:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad /= len(seen[optimizer.next_step])
                optimizer.step()
                optimizer.zero_grad()
    return {"seen": seen, **model.state_dict()}


def test_all_batches_since_the_last_step_count_as_its_samples(cluster: Cluster) -> None:
    results = cluster.run(accumulate_with_loader, environ=JOB_SEED)
    x, y = samples(30)
    model = initial_net()
    steps = sorted({int(step) for result in results for step in result.values["seen"]})
    rows = [[n for r in results for n in r.values["seen"].get(str(step), [])] for step in steps]
    train(model, plain_optimizer("AdamW", model, lr=LR), [(x[n], y[n]) for n in rows])
    for rank, result in enumerate(results):
        assert_close(result.tensors, model.state_dict(), 1e-10, f"worker {rank}")


def clip_own_gradients(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    for step in range(NUM_STEPS):
        x, y = shares(SIZES[: session.world_size], step)[session.rank]
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step(samples=len(x))
    return model.state_dict()


def clipped(gradients: list[Tensor]) -> list[Tensor]:
    """Scaled down to a 2-norm of 0.5 as torch's `clip_grad_norm_` does."""
    norm = float(sum((g**2).sum() for g in gradients)) ** 0.5
    return [g * min(1.0, 0.5 / (norm + 1e-6)) for g in gradients]


def test_a_script_clips_the_gradients_of_its_own_worker(cluster: Cluster) -> None:
    for num_workers in (1, 2):
        model = initial_net()
        steps = [shares(SIZES[:num_workers], step) for step in range(NUM_STEPS)]
        train_averaged(model, plain_optimizer("AdamW", model, lr=LR), steps, clipped)
        if num_workers == 1:
            results = [run_alone(clip_own_gradients, environ=JOB_SEED)]
        else:
            results = cluster.run(clip_own_gradients, environ=JOB_SEED)
        for rank, result in enumerate(results):
            assert_close(result.tensors, model.state_dict(), 1e-10, f"worker {rank}")


def clipped_mean(run: Run) -> Returned:
    model = Net()
    plain = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    optimizer = run.optimizer(plain, model, max_grad_norm=MAX_GRAD_NORM)
    train_here(run, model, optimizer)
    return with_state(model, optimizer)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_max_grad_norm_clips_the_mean_over_all_workers(cluster: Cluster, num_shards: int) -> None:
    plain, _ = check(cluster, clipped_mean, num_shards=num_shards)
    assert min(plain.norms) < MAX_GRAD_NORM < max(plain.norms)


def overflow(loss: Tensor) -> Tensor:
    """The same loss, whose gradients are infinite or NaN."""
    return loss * torch.inf


def scaled_gradients(run: Run, *, overflow_in: Sequence[int], unscale: bool) -> Returned:
    model = Net()
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales = []
    for step in range(NUM_STEPS):
        x, y = run.share(*samples(BATCH_SIZE, step))
        optimizer.zero_grad()
        loss = loss_of(model, (x, y))
        scaler.scale(overflow(loss) if step in overflow_in else loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        run.step(optimizer, len(x), scaler)
        scaler.update()
        scales.append(scaler.get_scale())
    return {**with_state(model, optimizer), "scales": scales}


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow_in", [[], [0, 5]])
def test_a_grad_scaler_scales_and_skips_steps_that_overflow_everywhere(
    cluster: Cluster, overflow_in: list[int], unscale: bool
) -> None:
    check(cluster, scaled_gradients, overflow_in=overflow_in, unscale=unscale)


def overflow_on_worker_1(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(NUM_STEPS):
        x, y = shares(SIZES, step)[session.rank]
        optimizer.zero_grad()
        loss = loss_of(model, (x, y))
        overflows = session.rank == 1 and step in BAD_STEPS
        scaler.scale(overflow(loss) if overflows else loss).backward()
        scaler.step(optimizer, samples=len(x))
        scaler.update()
    told = {"loss_scale": scaler.get_scale(), "num_skipped": optimizer.num_skipped}
    return {**told, **model.state_dict()}


def trained_without_worker_1_in_bad_steps() -> Mapping[str, Tensor]:
    steps = [shares(SIZES, step) for step in range(NUM_STEPS)]
    batches = [
        batches[0] if step in BAD_STEPS else concatenated(batches)
        for step, batches in enumerate(steps)
    ]
    model = initial_net()
    train(model, plain_optimizer("AdamW", model, lr=LR), batches)
    return model.state_dict()


def test_a_worker_whose_gradients_overflow_abstains_from_the_step(cluster: Cluster) -> None:
    results = cluster.run(overflow_on_worker_1, environ=JOB_SEED)
    for rank, result in enumerate(results):
        assert_close(result.tensors, trained_without_worker_1_in_bad_steps(), 1e-10, f"{rank}")
    assert [result.values for result in results] == [
        {"loss_scale": 1024.0, "num_skipped": 0},
        {"loss_scale": 256.0, "num_skipped": 2},
    ]


# -- Gradients that are not finite -----------------------------------------------------------------


def nan_on_the_last_worker(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    counted = ("shardline_nonfinite_steps_total", {"worker": str(session.rank)})
    before = REGISTRY.get_sample_value(*counted)
    for step in range(NUM_STEPS):
        x, y = shares(SIZES, step)[session.rank]
        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        if session.rank == session.world_size - 1 and step in BAD_STEPS:
            assert model.second.weight.grad is not None
            model.second.weight.grad[3, 5] = torch.nan
        optimizer.step(samples=len(x))
    after = REGISTRY.get_sample_value(*counted)
    assert before is not None
    assert after is not None
    return {
        "counted": after - before,
        "num_skipped": optimizer.num_skipped,
        **model.state_dict(),
    }


SKIP = {**JOB_SEED, "SHARDLINE_WORKER_NONFINITE": "skip"}


def test_a_worker_whose_gradients_are_not_finite_may_skip_the_step(cluster: Cluster) -> None:
    results = cluster.run(nan_on_the_last_worker, environ=SKIP)
    for rank, result in enumerate(results):
        assert_close(result.tensors, trained_without_worker_1_in_bad_steps(), 1e-10, f"{rank}")
    told = [(result.values["counted"], result.values["num_skipped"]) for result in results]
    assert told == [(0, 0), (2, 2)]


def test_alone_a_step_that_is_skipped_changes_nothing() -> None:
    with one_thread():
        result = run_alone(nan_on_the_last_worker, environ=SKIP)
        model = initial_net()
        good = [shares(SIZES, step)[0] for step in range(NUM_STEPS) if step not in BAD_STEPS]
        train(model, plain_optimizer("AdamW", model, lr=LR), good)
    assert_close(result.tensors, model.state_dict(), 1e-10)
    assert (result.values["counted"], result.values["num_skipped"]) == (2, 2)


def test_otherwise_it_fails_the_job_on_every_worker_and_names_the_parameter(
    cluster: Cluster,
) -> None:
    others, own = cluster.run_failing(nan_on_the_last_worker, environ=JOB_SEED)
    for words in ("NonFiniteError", "second.weight", "step 0"):
        assert words in own
        assert words in others
    assert others.startswith("JobFailedError: worker 1 failed: ")


def test_alone_it_ends_the_process() -> None:
    with pytest.raises(SystemExit) as caught:
        run_alone(nan_on_the_last_worker, environ=JOB_SEED)
    assert caught.value.code == 1
    assert "second.weight" in str(caught.value.__cause__)


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
    return {**start, **model.state_dict()}


def test_batch_norm_counts_on_each_worker_and_worker_0s_counts_are_kept(
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
    responses = values.read(shard, {}, shard_pb2.CONTENT_STATE)
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


# -- Data that ends early, or not for all at once --------------------------------------------------


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


# -- What becomes of the samples -------------------------------------------------------------------


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


def skip_some(session: Session) -> Returned:
    """Worker 0 skips a batch once; the last one, which is short, is skipped by whoever gets it."""
    book = Book(session, 30, batch_size=4)
    skipped: list[list[int]] = []
    for (rows,) in book.loader:
        if len(rows) < 4 or (session.rank == 0 and not skipped):
            skipped.append(rows.tolist())
            continue
        book.train(rows)
    return {**book.returned(), "skipped": skipped}


def test_a_skipped_batch_comes_to_another_worker_and_a_second_time_to_nobody(
    cluster: Cluster,
) -> None:
    results = cluster.run(skip_some, environ=JOB_SEED)
    skipped = [rows for result in results for rows in result.values["skipped"]]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(SEED)).tolist()
    short = order[28:]
    assert skipped.count(short) == 2
    assert_trained_as_one(results, 30, [n for n in range(30) if n not in short])


def accumulate_and_leave_over(session: Session, *, last_step: bool) -> Returned:
    """Two batches per step, of three in a pass; the third is stepped with after the loop, or in the
    next pass.
    """
    book = Book(session, 12 * session.world_size, batch_size=4)
    for _ in session.epochs(2):
        for number, (rows,) in enumerate(book.loader):
            book.backward(rows)
            if number % 2:
                book.step()
        if last_step:
            book.step()
    if book.open:
        book.step()
    return book.returned()


@pytest.mark.parametrize("last_step", [True, False])
def test_batches_that_are_left_over_after_accumulation_are_used_as_in_plain_torch(
    cluster: Cluster, last_step: bool
) -> None:
    alone = run_alone(accumulate_and_leave_over, environ=JOB_SEED, last_step=last_step)
    sizes = [8, 4, 8, 4] if last_step else [8, 12, 4]
    batches = assert_trained_as_one([alone], 12, [*range(12)] * 2)
    assert [len(rows) for rows in batches] == sizes
    if last_step:
        results = cluster.run(accumulate_and_leave_over, environ=JOB_SEED, last_step=True)
        assert_trained_as_one(results, 24, [*range(24)] * 2)


def clear_before_backward(session: Session) -> Returned:
    book = Book(session, 30, batch_size=4)
    for (rows,) in book.loader:
        book.optimizer.zero_grad()
        book.train(rows)
    return book.returned()


def with_functional_gradients(session: Session) -> Returned:
    """No backward pass tells that a batch is used."""
    book = Book(session, 30, batch_size=4)
    for (rows,) in book.loader:
        gradients = gradients_of(book.model, (book.x[rows], book.y[rows]))
        for parameter, gradient in zip(book.model.parameters(), gradients, strict=True):
            parameter.grad = gradient * len(rows)
        book.open += rows.tolist()
        book.step()
    return book.returned()


def average_within_a_pass(session: Session) -> Returned:
    """Worker 1 asks for data while worker 0 waits for it in a meeting."""
    book = Book(session, 30, batch_size=4)
    for (rows,) in book.loader:
        session.mean(len(rows))
        book.train(rows)
        time.sleep(0.03 * session.rank)
    return book.returned()


@pytest.mark.parametrize(
    "case", [clear_before_backward, with_functional_gradients, average_within_a_pass]
)
def test_workers_batches_of_a_step_are_neighbours_whatever_the_script_does(
    cluster: Cluster, case: Case
) -> None:
    results = cluster.run(case, environ=JOB_SEED)
    batches = assert_trained_as_one(results, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(SEED)).tolist()
    assert batches == [order[at : at + 8] for at in range(0, 30, 8)]


def loaders_made_in_every_epoch(session: Session) -> Returned:
    book = Book(session, 1)
    read = []
    for _ in session.epochs(3):
        for (rows,) in session.loader(TensorDataset(torch.arange(20)), 4):
            read += rows.tolist()
    return {"read": read, **book.returned()}


def test_a_loader_that_is_made_anew_in_every_epoch_goes_on_with_another_order() -> None:
    result = run_alone(loaders_made_in_every_epoch, environ=JOB_SEED)
    generators = [torch.Generator().manual_seed(SEED + number) for number in range(3)]
    orders = [torch.randperm(20, generator=each).tolist() for each in generators]
    assert result.values["read"] == [n for order in orders for n in order]


def number_loaders(session: Session, *, there: Sequence[int]) -> Returned:
    """The numbers of loaders that are made before, in, between and after two loops."""
    session._attendance.others_are_at(Point(*there))
    numbers: dict[str, list[int]] = {}

    def make(where: str) -> None:
        loaders = [session.loader(TensorDataset(torch.arange(4)), 2) for _ in range(2)]
        numbers[where] = [loader._place.index for loader in loaders]

    make("before")
    for _ in session.epochs(2):
        make("in the first")
    make("between")
    for _ in session.epochs(3):
        make("in the second")
        break
    make("after")
    return numbers


def test_loaders_have_the_same_numbers_on_a_joiner_that_leaves_a_loop_out() -> None:
    numbers = run_alone(number_loaders, there=[0, 0]).values
    assert len({number for each in numbers.values() for number in each}) == 10
    joiner = run_alone(number_loaders, there=[2, 1]).values
    assert "in the first" not in joiner
    assert joiner == {where: numbers[where] for where in joiner}


def evaluate(session: Session) -> Returned:
    """After every epoch all workers share the evaluation."""
    book = Book(session, 30, batch_size=4)
    held_out = session.loader(TensorDataset(torch.arange(7)), 2, shuffle=False)
    read, means = [], []
    for _ in session.epochs(2):
        for (rows,) in book.loader:
            book.train(rows)
        own = []
        with torch.no_grad():
            for (rows,) in held_out:
                own += rows.tolist()
        read += own
        means.append(session.mean(sum(own) / max(1, len(own)), len(own)))
    return {**book.returned(), "read": read, "means": means}


def test_workers_may_share_an_evaluation(cluster: Cluster) -> None:
    for results in ([run_alone(evaluate, environ=JOB_SEED)], cluster.run(evaluate)):
        read = [n for result in results for n in result.values["read"]]
        assert sorted(read) == sorted([*range(7)] * 2)
        for result in results:
            assert result.values["means"] == pytest.approx([3.0, 3.0])


def read_before_the_optimizer(session: Session) -> Returned:
    loader = session.loader(TensorDataset(torch.arange(7)), 2)
    return {"passes": [[rows.tolist() for (rows,) in loader] for _ in range(2)]}


def test_alone_a_loader_may_be_read_before_there_is_an_optimizer() -> None:
    passes = run_alone(read_before_the_optimizer).values["passes"]
    assert [sorted(n for rows in batches for n in rows) for batches in passes] == [[*range(7)]] * 2


def test_on_shards_a_loader_needs_the_other_workers() -> None:
    environ = {"SHARDLINE_CLUSTER_SHARDS": f"127.0.0.1:{free_ports(1)[0]}"}
    with pytest.raises(SystemExit) as caught:
        run_alone(read_before_the_optimizer, environ=environ)
    assert isinstance(caught.value.__cause__, UsageError)
    assert "call session.optimizer(...) before the loop" in str(caught.value.__cause__)


def break_with_processes(session: Session) -> Returned:
    """Worker 1 breaks with batches that its loader's processes have read ahead."""
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    book = Book(session, 40, batch_size=4, num_workers=2)
    for number, (rows,) in enumerate(book.loader):
        if session.rank == 1 and number == 1:
            break
        book.train(rows)
    return book.returned()


def test_what_was_read_ahead_at_a_break_is_trained_on_by_others(cluster: Cluster) -> None:
    assert_trained_as_one(cluster.run(break_with_processes, environ=JOB_SEED), 40)


def share_global_batches(session: Session, *, num_processes: int) -> Returned:
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    book = Book(session, 50, global_batch_size=12, num_workers=num_processes)
    for _ in session.epochs(2):
        for (rows,) in book.loader:
            book.train(rows)
    return {"length": len(book.loader), **book.returned()}


@pytest.mark.parametrize("num_processes", [0, 1])
def test_a_global_batch_is_shared_whatever_the_number_of_workers(
    cluster: Cluster, num_processes: int
) -> None:
    for num_workers in (1, 2):
        results = cluster.run(
            share_global_batches,
            num_workers=num_workers,
            environ=JOB_SEED,
            num_processes=num_processes,
        )
        assert [result.values["length"] for result in results] == [5] * num_workers
        batches = assert_trained_as_one(results, 50, [*range(50)] * 2)
        assert [len(rows) for rows in batches] == [12, 12, 12, 12, 2] * 2
        order = torch.randperm(50, generator=torch.Generator().manual_seed(SEED)).tolist()
        assert [sorted(rows) for rows in batches[:5]] == [
            sorted(order[at : at + 12]) for at in range(0, 50, 12)
        ]


def two_loaders(session: Session) -> Returned:
    """Worker 0 breaks out of the first; the second has fewer batches than workers."""
    book = Book(session, 30, batch_size=4)
    second = session.loader(TensorDataset(torch.arange(3)), 4)
    for _ in session.epochs(2):
        for number, (rows,) in enumerate(book.loader):
            book.train(rows)
            if session.rank == 0 and number == 1:
                break
        for (rows,) in second:
            book.train(rows)
    return book.returned()


def test_two_loaders_may_be_read_in_turn(cluster: Cluster) -> None:
    results = cluster.run(two_loaders, environ=JOB_SEED)
    assert_trained_as_one(results, 30, [*range(30), 0, 1, 2] * 2)


# -- Workers that leave, and that join -------------------------------------------------------------


def leave_in_the_loop(session: Session, *, how: str) -> Returned:
    """In the middle of its second batch worker 1 fails, or is told to end."""
    book = Book(session, 30, batch_size=4)
    for _ in session.epochs(1):
        for number, (rows,) in enumerate(book.loader):
            if session.rank == 1 and number == 1:
                if how == "fails":
                    raise RuntimeError("no such image")
                os.kill(os.getpid(), signal.SIGTERM)
            book.train(rows)
            if session.rank == 1:
                (Path(session.config.job.run_dir) / f"rows-{number}").write_text(str(book.seen[-1]))
    return book.returned()


@pytest.mark.parametrize(
    ("how", "error", "event", "num_own"),
    [
        ("fails", "RuntimeError: no such image", "failed", 1),
        ("is told to end", "Preempted: 75", "preempted", 2),
    ],
)
def test_the_others_train_on_what_a_worker_leaves(
    cluster: Cluster, how: str, error: str, event: str, num_own: int, tmp_path: Path
) -> None:
    environ = {**JOB_SEED, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    result, told = cluster.run_losing(leave_in_the_loop, environ=environ, how=how)
    assert told == error
    assert isinstance(result, Result)
    own = [literal_eval((tmp_path / f"rows-{n}").read_text()) for n in range(num_own)]
    assert not (tmp_path / f"rows-{num_own}").exists()
    other = Result({"seen": own}, result.tensors)
    assert_trained_as_one([result, other], 30)
    entries = [json.loads(line) for line in (tmp_path / "updates.jsonl").read_text().splitlines()]
    assert event in [each["event"] for each in entries if each["kind"] == "worker"]


def leave_without_a_loader(session: Session, *, waits: bool) -> Returned:
    """Worker 1 is told to end in its second step, or while it waits for worker 0."""
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    log = Path(session.config.job.run_dir) / "updates.jsonl"
    for _ in session.epochs(1):
        if session.rank == 0 and waits:
            wait_until(lambda: '"event":"preempted"' in log.read_text())
        for step in range(0 if session.rank and waits else NUM_STEPS):
            x, y = shares(SIZES, step)[session.rank]
            optimizer.zero_grad()
            loss_of(model, (x, y)).backward()
            if session.rank == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            optimizer.step(samples=len(x))
        if session.rank == 1:
            Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return model.state_dict()


@pytest.mark.parametrize(("waits", "num_shared"), [(False, 2), (True, 0)])
def test_a_worker_without_a_loader_leaves_after_its_step_or_while_it_waits(
    cluster: Cluster, waits: bool, num_shared: int, tmp_path: Path
) -> None:
    environ = {**JOB_SEED, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    result, told = cluster.run_losing(leave_without_a_loader, environ=environ, waits=waits)
    assert told == "Preempted: 75"
    assert isinstance(result, Result)
    steps = [shares(SIZES, step) for step in range(NUM_STEPS)]
    model = initial_net()
    batches = [
        concatenated(batches) if step < num_shared else batches[0]
        for step, batches in enumerate(steps)
    ]
    train(model, plain_optimizer("AdamW", model, lr=LR), batches)
    assert_close(result.tensors, model.state_dict(), 1e-10)


@pytest.mark.parametrize(
    ("error", "farewell"),
    [
        (Preempted(), Farewell.PREEMPTED),
        (RuntimeError("out of memory"), Farewell.FAILED),
        (KeyboardInterrupt(), Farewell.FAILED),
        (SystemExit(3), Farewell.FAILED),
        (ShardUnreachableError("shard 1 is gone"), Farewell.FAILED),
        (UsageError("step(samples=0)"), Farewell.FATAL),
        (NonFiniteError("the gradient of x"), Farewell.FATAL),
        (MismatchError("another model"), Farewell.FATAL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value.name,
)
def test_the_others_are_told_whether_a_new_process_could_do_better(
    error: BaseException, farewell: Farewell, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Farewell, str]] = []
    session = Session(load(environ={"SHARDLINE_METRICS_PORT": "-1"}))
    monkeypatch.setattr(session.exchange, "close", lambda *last_word: told.append(last_word))
    is_ours = isinstance(error, ShardlineError)
    with pytest.raises(SystemExit if is_ours else type(error)), session:
        raise error
    assert told == [(farewell, f"{type(error).__name__}: {error}")]


def test_a_script_that_exits_well_has_ended_well(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[object, ...]] = []
    session = Session(load(environ={"SHARDLINE_METRICS_PORT": "-1"}))
    monkeypatch.setattr(session.exchange, "close", lambda *last_word: told.append(last_word))
    with pytest.raises(SystemExit), session:
        raise SystemExit(0)
    assert told == [()]


def join_late(session: Session, *, folder: str) -> Returned:
    """Worker 2 joins in the second epoch, when the others have seen that it is coming."""
    comes, enters = Path(folder) / "comes", Path(folder) / "enters"
    if session.rank == 2:
        wait_until(comes.exists)
        enters.touch()
    book = Book(session, 64, batch_size=4)
    schedule = session.scheduler(lambda each: lr_scheduler.LambdaLR(each, lambda n: 1 / (1 + n)))
    begins = [book.optimizer.next_step, schedule.last_epoch, book.optimizer.param_groups[0]["lr"]]
    epochs = []
    for epoch in session.epochs(4):
        epochs.append(epoch)
        for (rows,) in session.loader(book.dataset, 4):
            if session.rank == 0 and epoch == 1:
                comes.touch()
                wait_until(enters.exists)
            book.train(rows)
            schedule.step()
    return {"epochs": epochs, "begins": begins, **book.returned()}


def wait_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_that_joins_begins_at_the_others_epoch_and_learning_rate(
    cluster: Cluster, tmp_path: Path
) -> None:
    results = cluster.run(
        join_late, num_workers=3, num_joiners=1, environ=JOB_SEED, folder=str(tmp_path)
    )
    first, second, joiner = (result.values for result in results)
    assert first["epochs"] == second["epochs"] == [0, 1, 2, 3]
    assert joiner["epochs"] == [1, 2, 3]
    step, count, rate = joiner["begins"]
    assert 8 < step < 16
    assert (count, rate) == (step, LR * (1 / (1 + step)))  # as LambdaLR multiplies
    assert joiner["seen"][0][0] == step
    seen = [n for result in results for _, rows in result.values["seen"] for n in rows]
    assert sorted(seen) == sorted([*range(64)] * 4)
    for result in results:
        assert_close(result.tensors, results[0].tensors, 0)


# -- Numbers ---------------------------------------------------------------------------------------


def average(session: Session) -> Returned:
    model = Net()
    session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    value = float(10 + session.rank)
    return {
        "plain": session.mean(value),
        "weighted": session.mean(torch.tensor(value), weight=1 + 2 * session.rank),
        "nothing here": session.mean(value, weight=session.rank),
    }


def test_a_mean_is_over_all_workers_and_weighted(cluster: Cluster) -> None:
    assert run_alone(average).values["plain"] == 10.0
    for result in cluster.run(average):
        assert result.values == {
            "plain": 10.5,
            "weighted": (1 * 10 + 3 * 11) / 4,
            "nothing here": 11.0,
        }


def log_and_report(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    for epoch in session.epochs(2):
        for step in range(3):
            x, y = shares(SIZES, step)[session.rank]
            optimizer.zero_grad()
            loss_of(model, (x, y)).backward()
            optimizer.step(samples=len(x))
            session.log(progress=10 * epoch + step + session.rank / 2)
    session.log(bad=torch.tensor(torch.nan))
    session.report(accuracy=torch.tensor(0.25), name=f"worker {session.rank}")
    return {}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_logged_and_reported_is_in_the_file_of_records(
    cluster: Cluster, num_workers: int, tmp_path: Path
) -> None:
    environ = {"SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    if num_workers == 1:
        run_alone(log_and_report, environ=environ)
    else:
        cluster.run(log_and_report, environ=environ)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for rank in range(num_workers):
        own = [line for line in lines if line["rank"] == rank]
        values: dict[str, Any] = {}
        for line in own[:-1]:
            assert line["kind"] == "step"
            values |= line["values"]
        assert values == {"progress": 12 + rank / 2, "bad": "NaN"}
        end = own[-1]
        assert end["kind"] == "end"
        assert end["reported"] == {"accuracy": 0.25, "name": f"worker {rank}"}
        assert (end["steps"], end["version"], end["samples"]) == (6, 6, 6 * SIZES[rank])
        assert (end["pushed_bytes"] > 0) == (end["pulled_bytes"] > 0) == (num_workers > 1)


# -- Refusals --------------------------------------------------------------------------------------


class ThirdParty(torch.optim.SGD):
    """A subclass may compute anything."""


class Stream(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(7)


def joined(session: Session) -> tuple[Net, ExchangeOptimizer]:
    """A session that has taken one step, with gradients for the next."""
    model = Net()
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    for step in range(2):
        if step:
            optimizer.step()
        loss_of(model, shares(SIZES, step)[session.rank]).backward()
    return model, optimizer


def sparse_gradients(session: Session) -> Returned:
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1))
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    return {}


def another_group(session: Session) -> Returned:
    _, optimizer = joined(session)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    return {}


def unfreeze(session: Session) -> Returned:
    model = Net()
    model.first.requires_grad_(False)
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    model.first.requires_grad_(True)
    loss_of(model, samples(4)).backward()
    optimizer.step()
    return {}


def copy_into(session: Session) -> Returned:
    model, optimizer = joined(session)
    with torch.no_grad():
        model.second.weight.copy_(torch.zeros(11, 13))
    optimizer.step()
    return {}


def clamp_data(session: Session) -> Returned:
    model, optimizer = joined(session)
    model.second.weight.data.clamp_(-0.001, 0.001)
    optimizer.step()
    return {}


def replace_data(session: Session) -> Returned:
    model, optimizer = joined(session)
    model.second.weight.data = model.second.weight.data.clone()
    optimizer.step()
    return {}


def load_weights_late(session: Session) -> Returned:
    model, optimizer = joined(session)
    model.load_state_dict(Net().state_dict())
    optimizer.step()
    return {}


def with_closure(session: Session) -> Returned:
    _, optimizer = joined(session)
    optimizer.step(lambda: 1.0)
    return {}


def no_samples(session: Session) -> Returned:
    _, optimizer = joined(session)
    optimizer.step(samples=0)
    return {}


def early_scheduler(session: Session) -> Returned:
    session.scheduler(lambda optimizer: lr_scheduler.ConstantLR(optimizer))
    return {}


def second_optimizer(session: Session) -> Returned:
    model, _ = joined(session)
    session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    return {}


def iterable_dataset(session: Session) -> Returned:
    joined(session)
    session.loader(Stream())
    return {}


def empty_dataset(session: Session) -> Returned:
    joined(session)
    session.loader(TensorDataset(torch.zeros(0, 7)))
    return {}


def with_optimizer(session: Session, name: str) -> Returned:
    model = nn.Linear(3, 3, bias=False)
    kind = ThirdParty if name == "ThirdParty" else getattr(torch.optim, name)
    session.optimizer(kind(model.parameters(), lr=LR), model)
    return {}


def lbfgs(session: Session) -> Returned:
    return with_optimizer(session, "LBFGS")


def muon(session: Session) -> Returned:
    return with_optimizer(session, "Muon")


def adafactor(session: Session) -> Returned:
    return with_optimizer(session, "Adafactor")


def third_party(session: Session) -> Returned:
    return with_optimizer(session, "ThirdParty")


def stray_parameter(session: Session) -> Returned:
    model, other = Net(), nn.Linear(2, 5)
    session.optimizer(torch.optim.SGD([*model.parameters(), *other.parameters()], lr=LR), model)
    return {}


def nothing_to_train(session: Session) -> Returned:
    model = Net().requires_grad_(False)
    session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    return {}


MID_RUN: dict[Case, list[str]] = {
    sparse_gradients: ["sparse=False"],
    another_group: ["add_param_group", "before session.optimizer"],
    unfreeze: ["unfrozen", "before session.optimizer"],
    copy_into: ["second.weight", "changed between steps", "before session.optimizer"],
    clamp_data: ["second.weight", "changed between steps", "before session.optimizer"],
    replace_data: ["second.weight", "changed between steps", "before session.optimizer"],
    load_weights_late: ["changed between steps", "before session.optimizer"],
    with_closure: ["step(closure)", "before step()"],
    no_samples: ["samples=0", "at least one"],
    second_optimizer: ["called twice"],
    iterable_dataset: ["map-style", "session.rank", "step(samples=n)"],
    empty_dataset: ["empty"],
}
AT_THE_START: dict[Case, list[str]] = {
    lbfgs: ["LBFGS", "Use one of", "AdamW"],
    muon: ["Muon", "Use one of"],
    adafactor: ["Adafactor", "Use one of"],
    third_party: ["ThirdParty", "Use one of"],
    stray_parameter: ["[5, 2]", "session.optimizer the module that holds all"],
    early_scheduler: ["before session.scheduler"],
    nothing_to_train: ["requires a gradient", "nothing to train"],
}


@pytest.mark.parametrize("case", [*MID_RUN, *AT_THE_START])
def test_a_session_alone_refuses(case: Case) -> None:
    with pytest.raises(SystemExit) as caught:
        run_alone(case)
    assert caught.value.code == 2
    error = caught.value.__cause__
    assert isinstance(error, UsageError)
    for words in {**MID_RUN, **AT_THE_START}[case]:
        assert words in str(error)


@pytest.mark.parametrize("case", MID_RUN)
def test_a_worker_refuses(cluster: Cluster, case: Case) -> None:
    errors = cluster.run_failing(case)
    own = [error for error in errors if error.startswith("UsageError")]
    told = [error for error in errors if error.startswith("JobFailedError: worker")]
    assert own
    assert len(own) + len(told) == len(errors), errors
    for words in MID_RUN[case]:
        assert all(words in error for error in errors), errors
