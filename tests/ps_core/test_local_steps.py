"""Local steps, compared with plain torch and with DiLoCo written out."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ps_core.buckets import Bucket, make_buckets
from ps_core.errors import NonFiniteError, UsageError
from ps_core.exchange import Meeting, Outcome, Purpose, Start, Work
from ps_core.extras import Extras
from ps_core.local import LocalExchange
from ps_core.local_steps import LocalStepsOptimizer, outer_spec
from ps_core.optim_spec import Hyperparameters, OptimizerSpec, build
from ps_core.plan import ParameterSpec, Plan, make_plan
from ps_core.point import Point
from ps_core.settings import ConsistencyConfig
from tests.reference import (
    MIXED,
    Batch,
    DiLoCo,
    Net,
    assert_close,
    gradients_of,
    initial_net,
    loss_of,
    samples,
    shares,
    train,
    train_averaged,
    weighted_mean,
)

NEVER = 10**6
"""Local steps, in tests about the steps between exchanges."""
NAN = math.nan
MakeInner = Callable[[nn.Module], torch.optim.Optimizer]


# -- Exchanges -------------------------------------------------------------------------------------


class Recorded(LocalExchange):
    """Keeps what it is given. Nobody has granted the leases, so the book is not told of them."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[int, Work, Sequence[Hyperparameters]]] = []

    @property
    def works(self) -> list[Work]:
        return [work for _, work, _ in self.begun]

    def begin(self, step: int, work: Work, hyperparameters: Sequence[Hyperparameters]) -> None:
        self.begun.append((step, work, hyperparameters))
        super().begin(step, replace(work, leases=()), hyperparameters)


class Hub:
    """Where workers, one per thread, leave their gradients for each other."""

    def __init__(self, num_workers: int) -> None:
        self.barrier = threading.Barrier(num_workers, timeout=60)
        self.given: dict[int, tuple[int, list[Tensor]]] = {}


class Averaged(Recorded):
    """Every worker applies the mean over all workers' samples."""

    def __init__(self, hub: Hub, rank: int) -> None:
        super().__init__()
        self._hub, self._rank = hub, rank

    def join(
        self, plan: Plan, buckets: Sequence[Bucket], optimizer: OptimizerSpec, extras: Extras
    ) -> Start:
        self._all = buckets
        return super().join(plan, buckets, optimizer, extras)

    def begin(self, step: int, work: Work, hyperparameters: Sequence[Hyperparameters]) -> None:
        self._weight = work.samples
        super().begin(step, replace(work, samples=1), hyperparameters)

    def submit(self, bucket: Bucket, step: int) -> None:
        """All are read in `settle`."""

    def settle(self, step: int) -> Outcome:
        gradients = [bucket.gradients.clone() for bucket in self._all]
        self._hub.given[self._rank] = self._weight, gradients
        self._hub.barrier.wait()
        given = [each for _, each in sorted(self._hub.given.items()) if each[0]]
        self._hub.barrier.wait()
        shares = [weight / sum(weight for weight, _ in given) for weight, _ in given]
        for index, bucket in enumerate(self._all):
            bucket.gradients.copy_(weighted_mean([each[index] for _, each in given], shares))
            bucket.present = [True] * len(bucket.members)
            super().submit(bucket, step)
        return replace(super().settle(step), applied=self._weight > 0)


BODIES = Point(1, 0), Point(1, 1)
"""Of session.epochs."""

# -- Workers ---------------------------------------------------------------------------------------


@dataclass
class Observed:
    """What the optimizer tells, and the work that it takes: one sample, unless told otherwise."""

    works: list[Work] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    num_cleared: int = 0

    def before_step(self) -> None:
        pass

    def before_backward(self) -> None:
        pass

    def take_work(self) -> Work:
        return self.works.pop(0) if self.works else Work(samples=1)

    def gradients_cleared(self) -> None:
        self.num_cleared += 1

    def after_step(self, outcome: Outcome, work: Work, exchange_seconds: float) -> None:
        assert exchange_seconds >= 0
        self.outcomes.append(outcome)
        self.samples.append(work.samples)

    is_scheduled = False

    def meet(self, purpose: Purpose, values: Sequence[float] = ()) -> Meeting:
        """Alone: nobody else is to come."""
        return Meeting(0, tuple(values), chosen=True)


@dataclass(frozen=True)
class Worker:
    model: nn.Module
    inner: torch.optim.Optimizer
    buckets: Sequence[Bucket]
    exchange: Recorded
    observer: Observed
    optimizer: LocalStepsOptimizer

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, batch).backward()
        self.optimizer.step(samples=len(batch[0]))


def enter(
    model: nn.Module,
    make_inner: MakeInner,
    *,
    local_steps: int,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    nonfinite: Literal["error", "skip"] = "error",
    max_grad_norm: float | None = None,
    exchange: Recorded | None = None,
) -> Worker:
    inner = make_inner(model)
    config = ConsistencyConfig(outer_lr=outer_lr, outer_momentum=outer_momentum)
    outer = outer_spec(config, len(inner.param_groups))
    trained, specs = trained_parameters(model, inner)
    plan = make_plan(specs, 1, 2**20, 1024)  # several buckets
    buckets = make_buckets(plan, trained)
    exchange, observer = exchange or Recorded(), Observed()
    start = exchange.join(plan, buckets, outer, Extras(torch.nn.Module(), ()))
    optimizer = LocalStepsOptimizer(
        inner,
        plan,
        buckets,
        exchange,
        observer,
        first_step=start.step,
        nonfinite=nonfinite,
        outer=outer,
        local_steps=local_steps,
        max_grad_norm=max_grad_norm,
    )
    return Worker(model, inner, buckets, exchange, observer, optimizer)


def trained_parameters(
    model: nn.Module, inner: torch.optim.Optimizer
) -> tuple[list[nn.Parameter], list[ParameterSpec]]:
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = [
        (p, ParameterSpec(names[id(p)], p.dtype, tuple(p.shape), number))
        for number, group in enumerate(inner.param_groups)
        for p in group["params"]
        if p.requires_grad
    ]
    return [p for p, _ in pairs], [spec for _, spec in pairs]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def adamw_in_groups(model: nn.Module) -> torch.optim.Optimizer:
    """One group for weights, one for vectors."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "lr": 0.02},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def together(workers: Sequence[Worker], run: Callable[[int, Worker], None]) -> None:
    """`run(rank, worker)` at the same time, each in a thread."""
    with ThreadPoolExecutor(len(workers)) as threads:
        for done in [threads.submit(run, *each) for each in enumerate(workers)]:
            done.result()


# -- DiLoCo written out ----------------------------------------------------------------------------


def diloco(models: int, make_inner: MakeInner, dtype: str = "float64") -> DiLoCo:
    nets = [initial_net(dtype) for _ in range(models)]
    return DiLoCo(nets, [make_inner(net) for net in nets], lr=0.7, momentum=0.9)


def assert_same_state(
    actual: torch.optim.Optimizer, expected: torch.optim.Optimizer, tolerance: float
) -> None:
    """The state entries of all parameters."""
    got, wanted = (
        {
            f"{number} {key}": value
            for number, entries in optimizer.state_dict()["state"].items()
            for key, value in entries.items()
        }
        for optimizer in (actual, expected)
    )
    assert wanted
    assert_close(got, wanted, tolerance)


# -- One step is averaging SGD ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_one_local_step_with_outer_rate_1_is_plain_sgd_to_the_bit(dtype: str) -> None:
    # θ − (θ − θ') is θ' to the bit where both differ by less than a factor of two (Sterbenz).
    torch.manual_seed(1)
    model = nn.Linear(7, 3, dtype=getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data.uniform_(1.2, 1.8)
    plain = copy.deepcopy(model)
    before = values(model)
    worker = enter(model, sgd, local_steps=1, outer_lr=1.0, outer_momentum=0.0)
    batches = [(x.to(plain.weight.dtype), y) for x, y in (samples(5, n) for n in range(4))]
    for batch in batches:
        worker.step(batch)
    train(plain, sgd(plain), batches)
    assert_close(values(model), values(plain), tolerance=0)
    assert all((values(model)[name] != value).any() for name, value in before.items())


def test_one_local_step_with_outer_rate_1_is_plain_sgd_with_all_its_options() -> None:
    def inner(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.01, nesterov=True)

    plain = initial_net()
    worker = enter(initial_net(), inner, local_steps=1, outer_lr=1.0, outer_momentum=0.0)
    batches = [samples(5, n) for n in range(6)]
    for batch in batches:
        worker.step(batch)
    train(plain, inner(plain), batches)
    assert_close(values(worker.model), values(plain), tolerance=1e-14)


def test_one_local_step_of_two_workers_is_averaging_sgd_weighted_by_samples() -> None:
    sizes, hub = (5, 2), Hub(2)
    workers = [
        enter(
            initial_net(),
            sgd,
            local_steps=1,
            outer_lr=1.0,
            outer_momentum=0.0,
            exchange=Averaged(hub, rank),
        )
        for rank in range(2)
    ]
    steps = [shares(sizes, n) for n in range(6)]

    def run(rank: int, worker: Worker) -> None:
        for batches in steps:
            worker.step(batches[rank])

    together(workers, run)
    plain = initial_net()
    train_averaged(plain, sgd(plain), steps)
    for worker in workers:
        assert_close(values(worker.model), values(plain), tolerance=1e-14)


# -- DiLoCo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_inner", [adamw, adamw_in_groups])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), (MIXED, 0.02)])
def test_local_steps_of_one_worker_are_diloco(
    make_inner: MakeInner, dtype: str, tolerance: float
) -> None:
    worker, expected = (
        enter(initial_net(dtype), make_inner, local_steps=5),
        diloco(1, make_inner, dtype),
    )
    for number in range(4):
        batches = [samples(6, 5 * number + n) for n in range(5)]
        for batch in batches:
            worker.step(batch)
        expected.round([batches])
        assert_close(values(worker.model), values(expected.models[0]), tolerance)
    assert_same_state(worker.inner, expected.inners[0], 10 * tolerance)
    assert [step for step, _, _ in worker.exchange.begun] == [0, 1, 2, 3]


@pytest.mark.parametrize("make_inner", [adamw, adamw_in_groups])
def test_local_steps_of_two_workers_are_diloco_weighted_by_samples(make_inner: MakeInner) -> None:
    sizes, hub = (6, 2), Hub(2)
    workers = [
        enter(initial_net(), make_inner, local_steps=5, exchange=Averaged(hub, rank))
        for rank in range(2)
    ]
    steps = [shares(sizes, n) for n in range(20)]

    def run(rank: int, worker: Worker) -> None:
        for batches in steps:
            worker.step(batches[rank])

    together(workers, run)
    expected = diloco(2, make_inner)
    for start in range(0, 20, 5):
        expected.round([[step[rank] for step in steps[start : start + 5]] for rank in range(2)])
    for worker, model, inner in zip(workers, expected.models, expected.inners, strict=True):
        assert_close(values(worker.model), values(model), 1e-13)
        assert_same_state(worker.inner, inner, 1e-12)


@pytest.mark.gpu
def test_local_steps_on_a_gpu_are_diloco() -> None:
    def on_gpu(batch: Batch) -> Batch:
        return batch[0].cuda(), batch[1].cuda()

    worker = enter(initial_net().cuda(), adamw, local_steps=3)
    net = initial_net().cuda()
    expected = DiLoCo([net], [adamw(net)], lr=0.7, momentum=0.9)
    for number in range(3):
        batches = [on_gpu(samples(6, 3 * number + n)) for n in range(3)]
        for batch in batches:
            worker.step(batch)
        expected.round([batches])
    assert_close(values(worker.model), values(net), 1e-12)


def test_the_outer_optimizer_of_the_job_has_one_entry_for_each_group() -> None:
    config = ConsistencyConfig(mode="local", outer_lr=0.5, outer_momentum=0.8)
    group = {"lr": 0.5, "momentum": 0.8, "nesterov": True}
    assert outer_spec(config, 3) == OptimizerSpec("SGD", (group, group, group))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_torch_takes_the_outer_optimizer(momentum: float) -> None:
    spec = outer_spec(ConsistencyConfig(outer_momentum=momentum), 1)
    optimizer = build(spec, [(0, [torch.ones(3)])])
    assert optimizer.param_groups[0]["nesterov"] is (momentum > 0)


def test_the_hyperparameters_of_an_exchange_are_those_of_the_outer_optimizer() -> None:
    worker = enter(initial_net(), adamw_in_groups, local_steps=1, outer_lr=0.3)
    worker.optimizer.param_groups[0]["lr"] = 0.123
    worker.step(samples(4))
    group = {"lr": 0.3, "momentum": 0.9, "nesterov": True}
    assert worker.exchange.begun == [(0, Work(samples=4), (group, group))]


# -- Between exchanges -----------------------------------------------------------------------------


def test_between_exchanges_a_worker_trains_alone_as_in_plain_torch() -> None:
    worker, plain = enter(initial_net(), adamw, local_steps=NEVER), initial_net()
    batches = [samples(5, n) for n in range(6)]
    for batch in batches:
        worker.step(batch)
    train(plain, adamw(plain), batches)
    assert_close(values(worker.model), values(plain), tolerance=0)
    assert not worker.exchange.begun


def test_every_step_is_told_once_and_those_without_an_exchange_leave_the_version() -> None:
    worker = enter(initial_net(), adamw, local_steps=3)
    for n in range(7):
        worker.step(samples(2 + n, n))
    assert [outcome.version for outcome in worker.observer.outcomes] == [0, 0, 1, 1, 1, 2, 2]
    assert [outcome.next_step for outcome in worker.observer.outcomes] == [0, 0, 1, 1, 1, 2, 2]
    assert all(outcome.applied for outcome in worker.observer.outcomes)
    assert worker.observer.samples == [2, 3, 4, 5, 6, 7, 8]
    assert worker.optimizer.next_step == 2


def test_an_exchange_carries_the_work_of_all_its_inner_steps() -> None:
    worker = enter(initial_net(), adamw, local_steps=3)
    worker.observer.works = [
        Work(
            4,
            leases=(7, 8),
            data_seconds=1.0,
            compute_seconds=2.0,
            schedules=(1,),
            point=BODIES[0],
        ),
        Work(
            4,
            leases=(9,),
            data_seconds=0.5,
            compute_seconds=0.25,
            schedules=(2,),
            point=BODIES[0],
        ),
        Work(3, leases=(11,), compute_seconds=0.75, schedules=(3,), point=BODIES[1]),
        Work(2, leases=(12,)),
    ]
    for n in range(4):
        worker.model.zero_grad()
        loss_of(worker.model, samples(4, n)).backward()
        worker.optimizer.step()
    worker.optimizer.flush()
    first = Work(11, (7, 8, 9, 11), 1.5, 3.0, schedules=(3,), point=BODIES[1])
    assert worker.exchange.works == [first, Work(2, leases=(12,))]


def test_what_a_meeting_writes_is_where_the_next_inner_steps_begin() -> None:
    worker = enter(initial_net(), sgd, local_steps=2, outer_momentum=0.0)
    for n in range(2):
        worker.step(samples(4, n))
    for bucket in worker.buckets:
        bucket.host_parameters.mul_(0.5)
        bucket.upload()
    worker.optimizer.next_step = 9
    expected = initial_net()
    expected.load_state_dict(worker.model.state_dict())
    job = DiLoCo([expected], [sgd(expected)], lr=0.7, momentum=0.0)
    for n in range(2, 4):
        worker.step(samples(4, n))
    job.round([[samples(4, 2), samples(4, 3)]])
    assert_close(values(worker.model), values(expected), 1e-14)
    assert [outcome.version for outcome in worker.observer.outcomes] == [0, 1, 9, 10]


def test_a_parameter_that_never_has_a_gradient_stays_as_it_is() -> None:
    model = initial_net()
    before = model.scale.detach().clone()
    worker = enter(model, adamw, local_steps=2)
    for n in range(6):
        worker.optimizer.zero_grad()
        hidden = model.third(model.second(model.norm(model.first(samples(3, n)[0]))))
        hidden.square().mean().backward()
        worker.optimizer.step()
    assert torch.equal(model.scale, before)


# -- Flush -----------------------------------------------------------------------------------------


def test_flush_exchanges_what_is_pending() -> None:
    worker, expected = enter(initial_net(), adamw, local_steps=5), diloco(1, adamw)
    rounds = [range(5), range(5, 7), range(7, 12)]
    for steps in rounds:
        batches = [samples(4, n) for n in steps]
        for batch in batches:
            worker.step(batch)
        worker.optimizer.flush()
        expected.round([batches])
        assert_close(values(worker.model), values(expected.models[0]), 1e-13)
    assert [work.samples for work in worker.exchange.works] == [20, 8, 20]
    assert worker.optimizer.next_step == 3
    assert len(worker.observer.outcomes) == 12


def test_flush_does_nothing_when_nothing_is_pending() -> None:
    worker = enter(initial_net(), adamw, local_steps=2)
    worker.optimizer.flush()
    for n in range(2):
        worker.step(samples(4, n))
    after = values(worker.model)
    for _ in range(2):
        worker.optimizer.flush()
    assert_close(values(worker.model), after, tolerance=0)
    assert len(worker.exchange.begun) == 1


# -- Steps that are skipped ------------------------------------------------------------------------


def spoil(worker: Worker, value: float = NAN) -> None:
    """A step whose gradient is not finite in one element."""
    worker.optimizer.zero_grad()
    loss_of(worker.model, samples(4)).backward()
    gradient = worker.model.get_parameter("second.weight").grad
    assert gradient is not None
    gradient[3, 4] = value
    worker.optimizer.step(samples=4)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_ends_the_job_by_default(value: float) -> None:
    worker = enter(initial_net(), adamw, local_steps=5)
    before = values(worker.model)
    with pytest.raises(NonFiniteError, match=r"gradient of second\.weight .* at step 0: lower"):
        spoil(worker, value)
    assert_close(values(worker.model), before, tolerance=0)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_gradient_that_is_not_finite_skips_its_inner_step_if_asked(position: int) -> None:
    worker, expected = (
        enter(initial_net(), adamw, local_steps=3, nonfinite="skip"),
        diloco(1, adamw),
    )
    batches = [samples(4, n) for n in range(2)]
    for batch in batches[:position]:
        worker.step(batch)
    spoil(worker)
    for batch in batches[position:]:
        worker.step(batch)
    expected.round([batches])
    assert_close(values(worker.model), values(expected.models[0]), 1e-13)
    assert_same_state(worker.inner, expected.inners[0], 1e-13)
    assert worker.exchange.works == [Work(samples=8)]
    assert [o.applied for o in worker.observer.outcomes] == [n != position for n in range(3)]
    assert worker.observer.samples == [0 if n == position else 4 for n in range(3)]
    assert worker.optimizer.num_skipped == 1


def test_a_worker_that_skipped_every_inner_step_takes_the_update_of_the_others() -> None:
    hub = Hub(2)
    workers = [
        enter(initial_net(), adamw, local_steps=2, nonfinite="skip", exchange=Averaged(hub, rank))
        for rank in range(2)
    ]

    def run(rank: int, worker: Worker) -> None:
        for n in range(2):
            worker.step(samples(4, n)) if rank else spoil(worker)

    together(workers, run)
    expected = diloco(1, adamw)
    expected.round([[samples(4, 0), samples(4, 1)]])
    for worker in workers:
        assert_close(values(worker.model), values(expected.models[0]), 1e-13)
    assert not workers[0].inner.state
    assert [[o.applied for o in w.observer.outcomes] for w in workers] == [[False] * 2, [True] * 2]


def ruin(model: nn.Module) -> torch.optim.Optimizer:
    """Its steps make infinity of finite gradients."""
    return torch.optim.SGD(model.parameters(), lr=math.inf)


def test_parameters_that_are_not_finite_end_the_job_before_others_take_them() -> None:
    worker = enter(initial_net(), ruin, local_steps=1)
    with pytest.raises(NonFiniteError, match=r"local steps made of .* holds NaN or infinity"):
        worker.step(samples(4))
    assert not worker.exchange.begun


def test_parameters_that_are_not_finite_are_dropped_if_asked() -> None:
    worker = enter(initial_net(), ruin, local_steps=1, nonfinite="skip")
    before = values(worker.model)
    worker.step(samples(4))
    assert_close(values(worker.model), before, tolerance=0)
    assert worker.exchange.works == [Work(samples=0)]
    assert not worker.observer.outcomes[0].applied
    assert worker.optimizer.num_skipped == 1


# -- What scripts do with gradients and optimizers -------------------------------------------------


@pytest.mark.parametrize("unscales", [False, True])
def test_a_grad_scaler_scales_and_skips_as_with_plain_torch(unscales: bool) -> None:
    def train_scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        scales = []
        for n in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, samples(5, n))
            scaler.scale(loss * math.inf if n in (0, 6) else loss).backward()
            if unscales:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    worker, plain = enter(initial_net(), adamw, local_steps=NEVER), initial_net()
    assert train_scaled(worker.model, worker.optimizer) == train_scaled(plain, adamw(plain))
    assert_close(values(worker.model), values(plain), tolerance=0)
    assert worker.optimizer.num_skipped == 2
    assert worker.observer.samples == [0, 1, 1, 1, 1, 1, 0, 1, 1, 1]


def test_the_gradient_of_this_worker_is_clipped() -> None:
    worker, plain = enter(initial_net(), adamw, local_steps=NEVER, max_grad_norm=0.5), initial_net()
    optimizer = adamw(plain)
    norms = []
    for n in range(6):
        worker.step(samples(5, n))
        for parameter, gradient in zip(
            plain.parameters(), gradients_of(plain, samples(5, n)), strict=True
        ):
            parameter.grad = gradient
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 0.5)))
        optimizer.step()
    assert min(norms) > 0.5
    assert_close(values(worker.model), values(plain), tolerance=0)


def test_a_scheduler_acts_on_the_inner_steps() -> None:
    def train_scheduled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
        for n in range(8):
            train(model, optimizer, [samples(5, n)])
            scheduler.step()

    worker, plain = enter(initial_net(), adamw_in_groups, local_steps=NEVER), initial_net()
    train_scheduled(worker.model, worker.optimizer)
    train_scheduled(plain, adamw_in_groups(plain))
    assert_close(values(worker.model), values(plain), tolerance=0)


def test_a_sparse_gradient_is_the_inner_optimizers_business() -> None:
    def inner(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(model.parameters(), lr=0.1)

    torch.manual_seed(2)
    model = nn.Embedding(10, 4, sparse=True)
    plain = copy.deepcopy(model)
    worker, optimizer = enter(model, inner, local_steps=NEVER, nonfinite="skip"), inner(plain)
    for factor in (1.0, math.inf, 2.0):
        for each, stepping in ((model, worker.optimizer), (plain, optimizer)):
            stepping.zero_grad()
            (each(torch.tensor([1, 2, 2])).sum() * factor).backward()
            if each is model or factor < math.inf:
                stepping.step()
    assert_close(values(model), values(plain), tolerance=0)
    assert worker.optimizer.num_skipped == 1


def test_zero_grad_drops_the_gradients_and_tells_the_observer() -> None:
    worker = enter(initial_net(), adamw, local_steps=2)
    worker.step(samples(3))
    worker.optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in worker.model.parameters())
    assert worker.observer.num_cleared == 2


@pytest.mark.parametrize("num_samples", [-1, math.nan, math.inf])
def test_a_weight_that_is_no_weight_is_refused(num_samples: float) -> None:
    worker = enter(initial_net(), adamw, local_steps=2)
    with pytest.raises(UsageError, match="give 0, or a number from"):
        worker.optimizer.step(samples=num_samples)


def test_a_closure_computes_the_gradients_of_an_inner_step() -> None:
    worker, plain = enter(initial_net(), adamw, local_steps=4), initial_net()
    optimizer = adamw(plain)
    for n in range(3):
        losses = [loss_of(model, samples(4, n)) for model in (worker.model, plain)]
        assert worker.optimizer.step(losses[0].backward) is None  # what the closure returns
        optimizer.step(losses[1].backward)
        worker.optimizer.zero_grad()
        optimizer.zero_grad()
    assert_close(values(worker.model), values(plain), 0)


def test_more_parameters_are_refused() -> None:
    worker = enter(initial_net(), adamw, local_steps=2)
    with pytest.raises(UsageError, match="add_param_group"):
        worker.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


# -- Changes by the script -------------------------------------------------------------------------


def add(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(1.0)


def clamp_data(parameter: nn.Parameter) -> None:
    parameter.data.clamp_(-0.01, 0.01)


def replace_data(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.clone() + 1


@pytest.mark.parametrize("change", [add, clamp_data, replace_data])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_a_parameter_changed_by_the_script_is_found(
    change: Callable[[nn.Parameter], None], num_steps: int
) -> None:
    worker = enter(initial_net(), adamw, local_steps=2)
    for n in range(num_steps):
        worker.step(samples(4, n))
    change(worker.model.get_parameter("second.weight"))
    with pytest.raises(UsageError, match=r"second\.weight was changed between steps"):
        worker.step(samples(4))
    if num_steps % 2:
        with pytest.raises(UsageError, match=r"second\.weight was changed between steps"):
            worker.optimizer.flush()


def test_frozen_parameters_stay_frozen_and_are_not_exchanged() -> None:
    def freeze() -> Net:
        net = initial_net()
        net.first.requires_grad_(False)
        return net

    worker, plain = enter(freeze(), adamw, local_steps=2), freeze()
    assert sum(len(bucket.members) for bucket in worker.buckets) == len(values(plain)) - 2
    expected = DiLoCo([plain], [adamw(plain)], lr=0.7, momentum=0.9)
    for number in range(2):
        batches = [samples(4, 2 * number + n) for n in range(2)]
        for batch in batches:
            worker.step(batch)
        expected.round([batches])
    assert_close(values(worker.model), values(plain), 1e-13)
    first = worker.model.get_submodule("first")
    assert_close(values(first), values(initial_net().first), tolerance=0)
    worker.model.requires_grad_(True)
    with pytest.raises(UsageError, match="unfrozen"):
        worker.step(samples(4))


# -- The state -------------------------------------------------------------------------------------


def test_the_state_dict_is_that_of_the_users_optimizer() -> None:
    worker, plain = enter(initial_net(), adamw_in_groups, local_steps=NEVER), initial_net()
    optimizer = adamw_in_groups(plain)
    batches = [samples(5, n) for n in range(3)]
    for batch in batches:
        worker.step(batch)
    train(plain, optimizer, batches)
    got, wanted = worker.optimizer.state_dict(), optimizer.state_dict()
    assert got["param_groups"] == wanted["param_groups"]
    assert_same_state(worker.optimizer, optimizer, tolerance=0)
    assert all(parameter in worker.optimizer.state for parameter in worker.model.parameters())


@pytest.mark.parametrize("local_steps", [2, NEVER])
def test_a_loaded_state_goes_on_as_the_saved_one(local_steps: int) -> None:
    def make(model: nn.Module) -> tuple[Worker, torch.optim.lr_scheduler.LRScheduler]:
        worker = enter(model, adamw_in_groups, local_steps=local_steps, outer_momentum=0.0)
        return worker, torch.optim.lr_scheduler.ExponentialLR(worker.optimizer, 0.5)

    def train_on(worker: Worker, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        for n in range(4):
            worker.step(samples(5, n))
        scheduler.step()

    first, scheduler = make(initial_net())
    train_on(first, scheduler)
    second, resumed = make(copy.deepcopy(first.model))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    resumed.load_state_dict(scheduler.state_dict())
    train_on(first, scheduler)
    train_on(second, resumed)
    assert_close(values(second.model), values(first.model), tolerance=0)
    assert_same_state(second.optimizer, first.optimizer, tolerance=0)
    assert second.inner.param_groups is second.optimizer.param_groups
    rates = [group["lr"] for group in second.inner.param_groups]
    assert rates == pytest.approx([0.02 * 0.25, 0.01 * 0.25])
