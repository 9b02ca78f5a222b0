"""Every mode of consistency over real shards and workers: what it computes, and what of all others
it keeps.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from ps_core.config import load
from ps_core.errors import ConfigError, UsageError
from ps_core.optimizer import ExchangeOptimizer
from ps_worker.calls import describe
from shardline.ledger import Balance, Ledger
from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, one_thread, run_alone
from tests.host import Case, Result
from tests.reference import (
    JOB_SEED,
    DiLoCo,
    Net,
    assert_close,
    gradients_of,
    initial_net,
    loss_of,
    plain_optimizer,
    samples,
    shares,
    train_averaged,
)

NUM_STEPS = 6
SIZES = (4, 3)
"""Two workers' shares of a batch."""
LR = 1e-2
Returned = Mapping[str, Any]
Environ = Mapping[str, str]
pytestmark = pytest.mark.timeout(TEST_SECONDS)


def mode(name: str, **modifiers: object) -> Environ:
    """The variables that choose a mode."""
    chosen = {
        f"SHARDLINE_CONSISTENCY_{key.upper()}": str(value) for key, value in modifiers.items()
    }
    return {**JOB_SEED, "SHARDLINE_CONSISTENCY_MODE": name, **chosen}


SYNC = mode("sync")
LOCAL = mode("local", local_steps=3)
MODES: dict[str, Environ] = {
    "sync": SYNC,
    "backup workers": mode("sync", backup_workers=1),
    "bounded": mode("bounded", bound=2),
    "async": mode("async"),
    "staleness scaling": mode("async", staleness_scaling=1),
    "delay compensation": mode("async", delay_compensation=0.1),
    "local": LOCAL,
}
every_mode = pytest.mark.parametrize("environ", MODES.values(), ids=MODES)
AVERAGING = mode("local", local_steps=1, outer_lr=1.0, outer_momentum=0.0)
"""Local steps that are plain steps."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with one_thread(), Cluster(num_shards=2, num_workers=3) as cluster:
        yield cluster


# -- A convex problem, whose solution is known -----------------------------------------------------

NUM_ROWS = 94
"""Not a multiple of the batch size."""
NUM_EPOCHS = 12
SOLUTION = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)


class Problem:
    """Least squares without noise: every batch has the same solution."""

    def __init__(self, session: Session, lr: float, **options: Any) -> None:  # noqa: ANN401 - session.optimizer's
        self.x = samples(NUM_ROWS)[0][:, :3]
        self.model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
        plain = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.optimizer = session.optimizer(plain, self.model, **options)
        self.loader = session.loader(TensorDataset(torch.arange(NUM_ROWS)), 4)

    def backward(self, rows: Tensor) -> None:
        x = self.x[rows]
        nn.functional.mse_loss(self.model(x), x @ SOLUTION.T).backward()

    def train(self, rows: Tensor) -> None:
        self.optimizer.zero_grad()
        self.backward(rows)
        self.optimizer.step()

    def copy(self) -> Tensor:
        return self.model.weight.detach().clone()


def solve(session: Session) -> Returned:
    problem = Problem(session, lr=0.1)
    after, means = [], []
    for epoch in session.epochs(NUM_EPOCHS):
        for (rows,) in problem.loader:
            problem.train(rows)
        after.append(problem.copy())
        means.append(session.mean(10 * epoch + session.rank, weight=1 + session.rank))
    return {"after": torch.stack(after), "means": means, **problem.model.state_dict()}


def meet_often(session: Session, *, num_meetings: int) -> Returned:
    """A meeting after every step, to which one worker in turn comes late."""
    problem, means = Problem(session, lr=0.02), []
    rows = torch.arange(4)
    for number in range(num_meetings):
        if number % session.world_size == session.rank:
            time.sleep(0.005)
        problem.train(rows)
        means.append(session.mean(number + session.rank))
    return {"means": means, "weight": problem.copy()}


def test_workers_that_are_late_for_the_update_are_met_all_the_same(cluster: Cluster) -> None:
    count = 150
    results = cluster.run(meet_often, environ=MODES["backup workers"], num_meetings=count)
    for result in results:
        assert result.values["means"] == [number + 1 for number in range(count)]
        assert torch.equal(result.tensors["weight"], results[0].tensors["weight"])


def balance_of(run_dir: Path) -> Balance:
    """What the lead has written about all samples."""
    ledger = Ledger()
    ledger.read((run_dir / "updates.jsonl").read_bytes().splitlines(keepends=True))
    return ledger.balance()


@every_mode
def test_every_mode_trains_and_all_workers_hold_the_same_after_every_epoch(
    cluster: Cluster, environ: Environ, tmp_path: Path
) -> None:
    results = cluster.run(solve, environ={**environ, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)})
    first = results[0].tensors
    for result in results:
        assert torch.equal(result.tensors["after"], first["after"])
        assert torch.equal(result.tensors["weight"], first["weight"])
        means = [10 * epoch + (0 * 1 + 1 * 2 + 2 * 3) / 6 for epoch in range(NUM_EPOCHS)]
        assert result.values["means"] == pytest.approx(means)
    assert torch.equal(first["after"][-1], first["weight"])
    distances = [float((each - SOLUTION).abs().max()) for each in first["after"]]
    assert distances[-1] < 0.05 < 0.2 < distances[0]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], first["weight"])
    assert balance_of(tmp_path) == Balance(
        samples_applied=NUM_EPOCHS * NUM_ROWS, passes=NUM_EPOCHS, joins=3
    )


# -- Whatever a script does with its samples -------------------------------------------------------


def treat_badly(session: Session) -> Returned:
    """Worker 0 breaks out of the first pass, worker 1 skips a batch of each, worker 2 accumulates
    two batches per step.
    """
    problem = Problem(session, lr=0.02)
    after = []
    for epoch in session.epochs(3):
        has_skipped = False
        for number, (rows,) in enumerate(problem.loader):
            if session.rank == 0 and epoch == 0 and number == 2:
                break
            if session.rank == 1 and number and not has_skipped:
                has_skipped = True
                continue
            problem.backward(rows)
            if session.rank != 2 or number % 2:
                problem.optimizer.step()
                problem.optimizer.zero_grad()
        if session.rank == 2 and problem.model.weight.grad is not None:
            problem.optimizer.step()
            problem.optimizer.zero_grad()
        session.mean(0.0)
        after.append(problem.copy())
    return {"after": torch.stack(after)}


@every_mode
def test_in_every_mode_every_sample_is_used_once_whatever_the_script_does(
    cluster: Cluster, environ: Environ, tmp_path: Path
) -> None:
    results = cluster.run(treat_badly, environ={**environ, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)})
    for result in results:
        assert torch.equal(result.tensors["after"], results[0].tensors["after"])
    assert balance_of(tmp_path) == Balance(samples_applied=3 * NUM_ROWS, passes=3, joins=3)


def leave(session: Session, *, how: str) -> Returned:
    """In its third batch of the second pass worker 1 fails, or is told to end."""
    problem = Problem(session, lr=0.05)
    for epoch in session.epochs(3):
        for number, (rows,) in enumerate(problem.loader):
            if (session.rank, epoch, number) == (1, 1, 2):
                if how == "fails":
                    raise RuntimeError("no such image")
                os.kill(os.getpid(), signal.SIGTERM)
            problem.train(rows)
    return problem.model.state_dict()


@every_mode
@pytest.mark.parametrize(
    ("how", "error"),
    [("fails", "RuntimeError: no such image"), ("is told to end", "Preempted: 75")],
)
def test_in_every_mode_others_train_on_what_a_worker_leaves(
    cluster: Cluster, environ: Environ, how: str, error: str, tmp_path: Path
) -> None:
    run_dir = {"SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    first, told, other = cluster.run_losing(leave, environ={**environ, **run_dir}, how=how)
    assert told == error
    assert isinstance(first, Result)
    assert isinstance(other, Result)
    assert torch.equal(first.tensors["weight"], other.tensors["weight"])
    assert balance_of(tmp_path) == Balance(samples_applied=3 * NUM_ROWS, passes=3, joins=3)


def skip_gradients(session: Session) -> Returned:
    """Worker 1 has a gradient that is not a number, now and then."""
    problem = Problem(session, lr=0.05)
    for _ in session.epochs(2):
        for number, (rows,) in enumerate(problem.loader):
            problem.optimizer.zero_grad()
            problem.backward(rows)
            if session.rank == 1 and number in (0, 3):
                assert problem.model.weight.grad is not None
                problem.model.weight.grad[0, 0] = torch.nan
            problem.optimizer.step()
    return {"skipped": problem.optimizer.num_skipped, **problem.model.state_dict()}


@every_mode
def test_in_every_mode_a_worker_may_skip_gradients_that_are_not_finite(
    cluster: Cluster, environ: Environ
) -> None:
    skip = {**environ, "SHARDLINE_WORKER_NONFINITE": "skip"}
    results = cluster.run(skip_gradients, environ=skip)
    assert [result.values["skipped"] for result in results] == [0, 4, 0]
    for result in results:
        assert_close(result.tensors, results[0].tensors, 0)


# -- One worker: nothing is ever stale -------------------------------------------------------------


def train_one(
    session: Session,
    *,
    optimizer: str,
    dtype: str = "float32",
    max_grad_norm: float | None = None,
    has_schedule: bool = False,
) -> Returned:
    model = Net(dtype)
    plain = getattr(torch.optim, optimizer)(model.parameters(), lr=LR, weight_decay=0.1)
    shared = session.optimizer(plain, model, max_grad_norm=max_grad_norm)
    if has_schedule:
        schedule = session.scheduler(lambda each: lr_scheduler.ExponentialLR(each, 0.8))
    for step in range(2 * NUM_STEPS):
        shared.zero_grad()
        loss_of(model, samples(7, step)).backward()
        shared.step(samples=7)
        if has_schedule:
            schedule.step()
    session.mean(0.0)  # so that no local step is left for later
    return model.state_dict()


def plain_one(
    *,
    optimizer: str,
    dtype: str = "float32",
    max_grad_norm: float | None = None,
    has_schedule: bool = False,
) -> Mapping[str, Tensor]:
    model = initial_net(dtype)
    plain = plain_optimizer(optimizer, model, lr=LR, weight_decay=0.1)
    schedule = lr_scheduler.ExponentialLR(plain, 0.8 if has_schedule else 1.0)
    norms = []
    for step in range(2 * NUM_STEPS):
        plain.zero_grad()
        loss_of(model, samples(7, step)).backward()
        if max_grad_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
        plain.step()
        schedule.step()
    assert max_grad_norm is None or min(norms) < max_grad_norm < max(norms)
    return model.state_dict()


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        (name, optimizer)
        for name in MODES
        for optimizer in ("SGD", "AdamW")
        if name != "local" and (name, optimizer) != ("delay compensation", "AdamW")  # refused
    ],
)
def test_one_worker_trains_as_one_process_bit_for_bit(
    cluster: Cluster, name: str, optimizer: str
) -> None:
    expected = plain_one(optimizer=optimizer)
    case: dict[str, Any] = {"environ": MODES[name], "optimizer": optimizer}
    assert_close(run_alone(train_one, **case).tensors, expected, 0)
    [result] = cluster.run(train_one, num_workers=1, **case)
    assert_close(result.tensors, expected, 0)


ONE_BY_ONE = {**MODES, "local": AVERAGING}
one_by_one = pytest.mark.parametrize("environ", ONE_BY_ONE.values(), ids=ONE_BY_ONE)


@one_by_one
def test_in_every_mode_schedules_move_the_learning_rate(cluster: Cluster, environ: Environ) -> None:
    case: dict[str, Any] = {"optimizer": "SGD", "dtype": "float64", "has_schedule": True}
    for result in (
        run_alone(train_one, environ=environ, **case),
        *cluster.run(train_one, num_workers=1, environ=environ, **case),
    ):
        assert_close(result.tensors, plain_one(**case), 1e-12)


@one_by_one
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_in_every_mode_max_grad_norm_clips_as_torch_does(
    cluster: Cluster, environ: Environ, dtype: str
) -> None:
    case: dict[str, Any] = {"optimizer": "SGD", "dtype": dtype, "max_grad_norm": 1.5}
    for result in (
        run_alone(train_one, environ=environ, **case),
        *cluster.run(train_one, num_workers=1, environ=environ, **case),
    ):
        assert_close(result.tensors, plain_one(**case), 1e-12 if dtype == "float64" else 1e-6)


# -- Stale gradients, in an order that the test chooses --------------------------------------------


def step_after_another(session: Session) -> Returned:
    """Worker 0 takes a step, then worker 1 with a gradient of the parameters from before it."""
    model = Net()
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    loss_of(model, shares(SIZES, 0)[session.rank]).backward()
    for rank in range(2):
        if session.rank == rank:
            optimizer.step()
        session.mean(0.0)
    return next_epoch(session, model)


def next_epoch(session: Session, model: nn.Module) -> Returned:
    for _ in session.epochs(1):
        pass
    return model.state_dict()


def stepped_after_another(correct: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """SGD with two gradients of the initial parameters, the second one times 0.1 and `correct`ed,
    given how far the parameters have moved.
    """
    model = initial_net()
    start = [p.detach().clone() for p in model.parameters()]
    first, second = (gradients_of(model, batch) for batch in shares(SIZES, 0))
    with torch.no_grad():
        for parameter, g0, g1, begin in zip(model.parameters(), first, second, start, strict=True):
            parameter.sub_(0.1 * g0)
            parameter.sub_(0.1 * correct(g1, parameter - begin))
    return model.state_dict()


@pytest.mark.parametrize(
    ("environ", "correct"),
    [
        (MODES["async"], lambda g, moved: g),
        (MODES["bounded"], lambda g, moved: g),
        (MODES["staleness scaling"], lambda g, moved: g / 2),
        (mode("async", delay_compensation=0.5), lambda g, moved: g + 0.5 * g * g * moved),
    ],
    ids=["async", "bounded", "staleness scaling", "delay compensation"],
)
def test_a_stale_gradient_is_applied_as_its_mode_says(
    cluster: Cluster, environ: Environ, correct: Callable[[Tensor, Tensor], Tensor]
) -> None:
    results = cluster.run(step_after_another, num_workers=2, environ=environ)
    for result in results:
        assert_close(result.tensors, stepped_after_another(correct), 1e-14)


def run_ahead(session: Session, *, num_ahead: int, folder: str) -> Returned:
    """Worker 1 takes its first step when the shards have all of `num_ahead` steps of worker 0, and
    if these are all it takes, when it has ended.
    """
    model = Net()
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.01), model)
    end = Path(folder) / "end"
    if session.rank == 1:
        wait_for_clock(session, num_ahead)
        if num_ahead == NUM_STEPS:
            wait_until(end.exists)
    begun, times = time.monotonic(), []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, shares(SIZES, step)[session.rank]).backward()
        optimizer.step()
        times.append(time.monotonic())
    if session.rank == 0:
        end.touch()
    return {"begun": begun, "times": times, **next_epoch(session, model)}


def wait_for_clock(session: Session, clock: int) -> None:
    """Until every shard has all of that many steps of worker 0."""
    for address in session.config.cluster.shards:
        wait_until(lambda at=address: describe(at, session.config.rpc).workers[0].clock >= clock)  # type: ignore[misc]


def wait_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("environ", "num_sent", "num_answered"),
    [(MODES["bounded"], 3, 2), (MODES["async"], NUM_STEPS, NUM_STEPS)],
    ids=["bounded", "async"],
)
def test_a_worker_runs_ahead_as_far_as_the_bound_allows(
    cluster: Cluster, environ: Environ, num_sent: int, num_answered: int, tmp_path: Path
) -> None:
    case: dict[str, Any] = {"num_ahead": num_sent, "folder": str(tmp_path)}
    first, second = cluster.run(run_ahead, num_workers=2, environ=environ, **case)
    ahead = [moment for moment in first.values["times"] if moment < second.values["begun"]]
    assert len(ahead) == num_answered
    assert_close(first.tensors, second.tensors, 0)


# -- Local steps -----------------------------------------------------------------------------------


def step_locally(session: Session, *, num_steps: Sequence[int], optimizer: str) -> Returned:
    """An epoch for each number of steps."""
    model = Net()
    plain = getattr(torch.optim, optimizer)(model.parameters(), lr=LR)
    shared = session.optimizer(plain, model)
    for epoch in session.epochs(len(num_steps)):
        for number in range(num_steps[epoch]):
            x, y = shares(SIZES, 10 * epoch + number)[session.rank]
            shared.zero_grad()
            loss_of(model, (x, y)).backward()
            shared.step(samples=len(x))
    return model.state_dict()


def test_one_local_step_with_outer_rate_1_is_averaging_sgd(cluster: Cluster) -> None:
    case: dict[str, Any] = {"num_steps": [NUM_STEPS], "optimizer": "SGD"}
    results = cluster.run(step_locally, num_workers=2, environ=AVERAGING, **case)
    model = initial_net()
    steps = [shares(SIZES, number) for number in range(NUM_STEPS)]
    train_averaged(model, torch.optim.SGD(model.parameters(), lr=LR), steps)
    for result in results:
        assert_close(result.tensors, model.state_dict(), 1e-14)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_local_steps_are_diloco_and_a_meeting_exchanges_what_is_left(
    cluster: Cluster, optimizer: str
) -> None:
    environ = mode("local", local_steps=4, outer_lr=0.6, outer_momentum=0.8, deterministic=1)
    case: dict[str, Any] = {"num_steps": [10, 3], "optimizer": optimizer}
    results = cluster.run(step_locally, num_workers=2, environ=environ, **case)
    models = [initial_net(), initial_net()]
    inners = [plain_optimizer(optimizer, model, lr=LR) for model in models]
    diloco = DiLoCo(models, inners, lr=0.6, momentum=0.8)
    for numbers in (range(4), range(4, 8), range(8, 10), range(10, 13)):
        diloco.round([[shares(SIZES, number)[rank] for number in numbers] for rank in (0, 1)])
    for result in results:
        assert_close(result.tensors, models[0].state_dict(), 1e-12)
        assert_close(result.tensors, results[0].tensors, 0)


# -- The optimizer's state -------------------------------------------------------------------------


def move_state(session: Session, *, optimizer: str, loads: bool) -> Returned:
    """Everybody reads the state while nobody steps, and loads it again."""
    model = Net()
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    plain = getattr(torch.optim, optimizer)(model.parameters(), lr=LR, **options)
    shared = session.optimizer(plain, model)

    def steps(first: int) -> None:
        for step in range(first, first + 3):
            shared.zero_grad()
            loss_of(model, samples(7, step)).backward()
            shared.step(samples=7)
        session.mean(0.0)

    steps(0)
    before = flat(shared)
    session.mean(0.0)  # all have read
    if loads:
        shared.load_state_dict(shared.state_dict())
    after = flat(shared)
    session.mean(0.0)
    steps(3)
    return {
        **{f"before {key}": value for key, value in before.items()},
        **{f"after {key}": value for key, value in after.items()},
        **next_epoch(session, model),
    }


def flat(optimizer: ExchangeOptimizer) -> dict[str, Tensor]:
    return {
        f"{index} {key}": value.clone()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


@every_mode
def test_in_every_mode_the_state_is_read_and_loaded_while_nobody_steps(
    cluster: Cluster, environ: Environ
) -> None:
    is_local = environ is LOCAL
    optimizer = "SGD" if environ is MODES["delay compensation"] else "Adam"
    results = cluster.run(move_state, environ=environ, optimizer=optimizer, loads=True)
    for result in results:
        before = {n[7:]: t for n, t in result.tensors.items() if n.startswith("before ")}
        after = {n[6:]: t for n, t in result.tensors.items() if n.startswith("after ")}
        assert before
        assert_close(after, before, 0)
        held = {
            name: tensor
            for name, tensor in result.tensors.items()
            if not (is_local and name.startswith(("before", "after")))  # each worker has its own
        }
        assert_close(held, {name: results[0].tensors[name] for name in held}, 0)


@every_mode
def test_in_every_mode_loading_what_is_there_changes_nothing(
    cluster: Cluster, environ: Environ
) -> None:
    optimizer = "SGD" if environ is MODES["delay compensation"] else "Adam"
    [loaded], [kept] = (
        cluster.run(move_state, num_workers=1, environ=environ, optimizer=optimizer, loads=loads)
        for loads in (True, False)
    )
    assert_close(loaded.tensors, kept.tensors, 0)


# -- What is refused -------------------------------------------------------------------------------


def adam(session: Session) -> Returned:
    model = Net()
    session.optimizer(torch.optim.Adam(model.parameters()), model)
    return {}


def global_batches(session: Session) -> Returned:
    session.loader(TensorDataset(torch.arange(4)), global_batch_size=4)
    return {}


@pytest.mark.parametrize(
    ("case", "environ", "reason"),
    [
        (adam, MODES["delay compensation"], "derived for SGD, and Adam scales each element"),
        *(
            (global_batches, MODES[name], "global_batch_size needs mode sync")
            for name in ("bounded", "async", "local")
        ),
    ],
)
def test_a_session_refuses_what_its_mode_cannot_do(
    case: Case, environ: Environ, reason: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_alone(case, environ=environ)
    assert caught.value.code == 2
    assert isinstance(caught.value.__cause__, UsageError)
    assert reason in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "environ",
    [
        mode("bounded", staleness_scaling=1),
        mode("sync", delay_compensation=0.1),
        mode("async", backup_workers=1),
        mode("async", staleness_scaling=1, delay_compensation=0.1),
    ],
)
def test_a_modifier_goes_with_its_mode_only(environ: Environ) -> None:
    with pytest.raises(ConfigError, match=r"consistency\.(\w+) "):
        load(environ={**environ, "SHARDLINE_CLUSTER_NUM_WORKERS": "3"})


def test_a_bound_of_0_is_sync(caplog: pytest.LogCaptureFixture) -> None:
    config = load(environ=mode("bounded", bound=0))
    assert config.consistency.mode == "sync"
    assert "training is synchronous (mode sync)" in caplog.text
