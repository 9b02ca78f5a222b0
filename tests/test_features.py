"""What training scripts use of torch works on shards and alone as it does in plain torch.

Most tests run one script three times: with plain torch in one process, in a session alone, and on
two shards with two workers that see unequal shares of every batch.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import IterableDataset, TensorDataset

from ps_core.errors import UsageError
from ps_core.metrics import REGISTRY
from ps_core.optimizer import ExchangeOptimizer
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


def test_the_length_of_a_loader_is_its_number_of_batches(cluster: Cluster) -> None:
    alone = run_alone(count_batches).values["counts"]
    assert alone == [[n, n] for n in (5, 6, 5, 1, 3)]
    first, second = (result.values["counts"] for result in cluster.run(count_batches))
    assert first == [[n, n] for n in (3, 3, 3, 1, 2)]
    assert second == [[n, n] for n in (2, 3, 2, 0, 1)]


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
