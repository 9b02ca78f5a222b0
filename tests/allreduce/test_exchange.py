"""What only a group whose members come and go does; tests/test_exchange_contract.py has the rest.

Workers are threads of one process. A worker is killed by closing its connections without a word.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from allreduce import rendezvous
from allreduce.exchange import AllReduceExchange
from allreduce.group import PeerLostError
from allreduce.store import Keeper
from ps_core.config import load
from ps_core.errors import DataLossError, JobFailedError, MismatchError, UsageError
from ps_core.exchange import Arrival, Farewell, Grant, Meeting, Purpose, Start, Work
from ps_core.extras import Extras
from ps_core.leases import PassSpec
from ps_core.listening import listen
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from tests.allreduce.replicas import BUCKET_BYTES, Alone, gradients, net, planned, spec_of
from tests.allreduce.together import PATIENCE_SECONDS, Worker, outcomes, together, wait_until
from tests.reference import Batch, assert_close, concatenated, holding, samples

ADAMW: dict[str, Any] = {"weight_decay": 0.1}
PASS = PassSpec(60, batch_size=2)
TOLERANCE = 1e-12


class Job:
    """Workers, and which batches each update is made of."""

    def __init__(self, stack: ExitStack, num_workers: int, **settings: object) -> None:
        self.stack = stack
        self.keeper = Keeper(listen("127.0.0.1:0"))
        self.settings = {
            "cluster.rendezvous": f"127.0.0.1:{self.keeper.port}",
            "cluster.num_workers": num_workers,
            "cluster.max_workers": 8,
            "membership.heartbeat_floor_seconds": 600,
            "allreduce.timeout_seconds": PATIENCE_SECONDS / 2,
            **settings,
        }
        self._lock = threading.Lock()
        self._batches: dict[int, list[Batch]] = defaultdict(list)
        self.workers = [Trainer(self, rank) for rank in range(num_workers)]
        together(*(worker.join for worker in self.workers))

    def note(self, version: int, batch: Batch) -> None:
        with self._lock:
            self._batches[version].append(batch)

    def check(self, *workers: Trainer) -> None:
        """All hold what one process comes to with the same batches."""
        alone = Alone("AdamW", **ADAMW)
        for _, batches in sorted(self._batches.items()):
            alone.step(concatenated(batches))
        state = alone.state()
        whole = together(*(worker.exchange.read_state for worker in workers))
        for worker, entries in zip(workers, whole, strict=True):
            assert worker.version == workers[0].version
            assert_close(worker.parameters(), alone.parameters(), TOLERANCE)
            own = {
                f"{worker.names[index]} {key}": value
                for index, each in entries.items()
                for key, value in each.items()
            }
            assert_close(own, state, TOLERANCE)


class Trainer:
    """One worker."""

    def __init__(self, job: Job, rank: int, spec: OptimizerSpec | None = None) -> None:
        self.job, self.rank, self.version = job, rank, 0
        keys = {**job.settings, "cluster.rank": rank}
        environ = {f"SHARDLINE_{key.replace('.', '_').upper()}": str(v) for key, v in keys.items()}
        self.model = net()
        self.statistics = holding({"count": torch.full((3,), float(rank))})
        self.names = [name for name, _ in self.model.named_parameters()]
        self.plan, self.buckets = planned(self.model, BUCKET_BYTES)
        self.spec = spec or spec_of("AdamW", **ADAMW)
        self.groups: tuple[Hyperparameters, ...] = self.spec.groups
        self.exchange = AllReduceExchange(load(environ=environ), torch.device("cpu"))
        job.stack.callback(self.kill)

    def join(self) -> Start:
        start = self.exchange.join(self.plan, self.buckets, self.spec, Extras(self.statistics, ()))
        self.version = start.step
        return start

    def join_or_fail(self) -> Start:
        """As a session does it."""
        try:
            return self.join()
        except MismatchError as error:
            self.exchange.close(Farewell.FATAL, str(error))
            raise

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.exchange._joined.ranks

    def batch(self) -> Batch:
        """Of this worker, for its next step."""
        return samples(2 + self.rank, 100 * self.version + self.rank)

    def begin(self, leases: tuple[int, ...] = ()) -> Batch:
        """Open a step, whose gradients are computed."""
        batch = self.batch()
        own = gradients(self.model, batch)
        for name, parameter in self.model.named_parameters():
            parameter.grad = own[name]
        self.exchange.begin(self.version, Work(len(batch[0]), leases), self.groups)
        return batch

    def submit(self) -> None:
        for bucket in self.buckets:
            bucket.collect()
            self.exchange.submit(bucket, self.version)

    def step(self, leases: tuple[int, ...] = ()) -> bool:
        """A whole one; whether it was of use."""
        batch = self.begin(leases)
        self.submit()
        outcome = self.exchange.settle(self.version)
        assert outcome.version == self.version + 1
        self.version = outcome.version
        if outcome.applied:
            self.job.note(self.version, batch)
        return outcome.applied

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step_with(self, ranks: tuple[int, ...]) -> None:
        """Until these are the members, which all of them learn after the same step."""
        while self.ranks != ranks:
            self.step()
            time.sleep(0.005)  # leaves the processor to who comes

    def draw(self) -> Grant:
        self.exchange.request_lease(0, PASS)
        return self.exchange.receive_lease()

    def kill(self) -> None:
        crew, self.exchange._crew = self.exchange._crew, None
        if crew is not None:
            crew.rendezvous.close()
            crew.drop()
            self.job.keeper.ended(self.rank, crew.rendezvous.me.pid)

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def step_all(*workers: Trainer, count: int = 1) -> None:
    together(*(partial(worker.steps, count) for worker in workers))


# -- Lost --------------------------------------------------------------------------------------


def test_a_step_that_is_complete_nowhere_comes_to_nothing(stack: ExitStack) -> None:
    job = Job(stack, 3, **{"allreduce.timeout_seconds": 10 * PATIENCE_SECONDS})
    first, second, third = job.workers
    step_all(*job.workers)
    leases = {worker: worker.draw().leases[0].id for worker in job.workers}
    before = first.parameters()
    waiting = [Worker(partial(each.step, (leases[each],))) for each in (first, second)]
    third.begin((leases[third],))  # all hear of its samples, and then it is gone
    third.exchange._hear(third.exchange._round)
    third.kill()
    assert [each.outcome() for each in waiting] == [False, False]
    assert first.ranks == second.ranks == (0, 1)
    assert_close(first.parameters(), before, 0)
    assert [each.draw().leases[0].start for each in (first, second)] == [0, 2], "dealt anew"
    step_all(first, second, count=2)
    job.check(first, second)


def test_a_loss_is_noticed_at_once_by_all(stack: ExitStack) -> None:
    """Also by those whom no connection joins to the lost one in Gloo's rings."""
    job = Job(stack, 6)
    step_all(*job.workers)
    *others, lost = job.workers
    for number in range(2):
        waiting = [Worker(each.step) for each in others]
        began = time.monotonic()
        lost.kill()
        assert [each.outcome() for each in waiting] == [False] * len(others)
        assert time.monotonic() - began < PATIENCE_SECONDS / 4, "half of this is the timeout"
        step_all(*others)
        assert others[0].ranks == tuple(range(5 - number))
        *others, lost = others
    job.check(*others)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_step_that_is_complete_on_one_counts_for_all(stack: ExitStack, ahead: int) -> None:
    job = Job(stack, 3)
    third, front, behind = job.workers[2], job.workers[ahead], job.workers[1 - ahead]
    leases = {worker: (worker.draw().leases[0].id,) for worker in job.workers}
    is_complete = threading.Event()
    collect = behind.exchange._updater.collect

    def lose_all() -> None:
        collect()  # the others need its part
        assert is_complete.wait(PATIENCE_SECONDS)
        monkeypatch.undo()
        raise PeerLostError("the others are gone")

    def die() -> None:
        assert third.step(leases[third])
        third.kill()

    def go_on() -> None:
        assert front.step(leases[front])
        assert dying.outcome() is None
        is_complete.set()
        assert not front.step((front.draw().leases[0].id,)), "the group breaks in the middle"

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(behind.exchange._updater, "collect", lose_all)
        dying = Worker(die)
        going_on = Worker(go_on)
        assert behind.step(leases[behind])
        (lease,) = behind.draw().leases
        assert lease.start == (6 if ahead else 8), "what is left is dealt to two"
        assert behind.step((lease.id,))
        assert going_on.outcome() is None
    job.check(front, behind)
    for worker in (front, behind):
        assert list(worker.exchange._agreed.passes.open[0].used) == [
            *([range(8)] if ahead else [range(6), range(8, 10)])
        ]


def test_rank_0_may_be_lost_and_come_back(stack: ExitStack) -> None:
    job = Job(stack, 2)
    lost, other = job.workers
    step_all(lost, other)
    lost.kill()
    other.steps(2)
    again = Trainer(job, 0)
    joining = Worker(again.join)
    wait_until(lambda: other.exchange._joined.rendezvous.has_guest(), "it waits")
    other.step_with((0, 1))
    start = joining.outcome()
    assert isinstance(start, Start)
    assert (start.step, start.chosen) == (other.version, True)
    assert start.position is not None
    assert again.statistics.get_buffer("count").tolist() == [0, 0, 0], (
        "those of rank 0 that all have had"
    )
    step_all(again, other, count=2)
    job.check(again, other)


def test_of_a_sharded_optimizer_nobody_may_be_lost(stack: ExitStack) -> None:
    job = Job(stack, 3, **{"allreduce.shard_optimizer": "true"})
    step_all(*job.workers)
    job.workers[1].kill()
    first, third = outcomes(job.workers[0].step, job.workers[2].step)
    for error in (first, third):
        assert isinstance(error, DataLossError)
        assert "--shard-optimizer" in str(error)


def test_without_elasticity_the_loss_of_a_worker_fails_the_job(stack: ExitStack) -> None:
    job = Job(stack, 2, **{"cluster.elastic": "false"})
    step_all(*job.workers)
    job.workers[0].kill()
    with pytest.raises(JobFailedError, match="start the job again with all of them"):
        job.workers[1].step()


# -- Guests and leavers ----------------------------------------------------------------------------


@pytest.mark.parametrize("shard_optimizer", ["false", "true"])
def test_workers_join_and_leave_between_steps_and_the_state_goes_with_them(
    stack: ExitStack, shard_optimizer: str
) -> None:
    job = Job(stack, 2, **{"allreduce.shard_optimizer": shard_optimizer})
    first, second = job.workers
    step_all(first, second)
    for rank in (5, 2):
        guest = Trainer(job, rank)
        joining = Worker(guest.join)
        loops = [Worker(partial(each.step_with, (0, 1, rank))) for each in (first, second)]
        start = joining.outcome()
        assert isinstance(start, Start)
        assert [each.outcome() for each in loops] == [None, None]
        assert (start.step, start.chosen) == (first.version, False)
        step_all(first, second, guest, count=2)
        job.check(first, second, guest)
        leaving = Worker(partial(guest.exchange.close, Farewell.PREEMPTED))
        loops = [Worker(partial(each.step_with, (0, 1))) for each in (first, second)]
        assert [each.outcome() for each in (leaving, *loops)] == [None] * 3
        step_all(first, second)
        job.check(first, second)


def test_who_leaves_while_the_others_wait_is_not_waited_for(stack: ExitStack) -> None:
    job = Job(stack, 3)
    first, second, third = job.workers
    arrival = Arrival(Purpose.MEAN, 0, (4.0,))
    waiting = [Worker(partial(each.exchange.meet, arrival)) for each in (first, second)]
    third.exchange.close(Farewell.PREEMPTED)
    for each in waiting:
        meeting = each.outcome()
        assert not isinstance(meeting, BaseException)
        assert meeting.means == (4.0,)  # type: ignore[attr-defined]  # a Meeting
    assert first.ranks == (0, 1)


def test_all_may_leave_at_once(stack: ExitStack) -> None:
    job = Job(stack, 3)
    step_all(*job.workers)
    together(*(partial(each.exchange.close, Farewell.PREEMPTED) for each in job.workers))


def test_the_last_meeting_is_over_for_all_once_it_is_for_one(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_FAREWELL_SECONDS", 0.1)
    first, second = Job(stack, 2).workers
    step_all(first, second)
    closing = Worker(partial(first.exchange.meet, Arrival(Purpose.CLOSE, 1)))
    second.exchange._joined.rendezvous.finish()
    second.kill()
    meeting = closing.outcome()
    assert isinstance(meeting, Meeting)
    assert meeting.chosen, "somebody must write the model"


def test_who_cannot_say_farewell_has_left_all_the_same(stack: ExitStack) -> None:
    job = Job(stack, 2)
    step_all(*job.workers)
    first, second = job.workers
    second.exchange._joined.rendezvous.fail("another one has failed")
    first.kill()
    second.exchange.close(Farewell.PREEMPTED)
    assert second.exchange._crew is None
    second.exchange.close()


# -- Differences -----------------------------------------------------------------------------------


def test_the_hyperparameters_of_the_lowest_rank_count(
    stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(stack, 3)
    for worker in job.workers[1:]:
        worker.groups = tuple({**group, "lr": 100.0 + worker.rank} for group in worker.groups)
    with caplog.at_level(logging.WARNING, "allreduce.exchange"):
        step_all(*job.workers, count=2)
    assert len({record.message for record in caplog.records}) == 1
    assert len(caplog.records) == 3, "each worker says so once"
    job.check(*job.workers)


def test_who_waits_in_a_meeting_takes_the_hyperparameters_of_who_steps(stack: ExitStack) -> None:
    job = Job(stack, 2)
    first, second = job.workers
    arrival = Arrival(Purpose.EPOCH, 0)
    waiting = Worker(partial(first.exchange.meet, arrival))
    second.groups = tuple({**group, "lr": 0.5} for group in second.groups)
    second.steps(2)
    second.exchange.meet(arrival)
    assert not isinstance(waiting.outcome(), BaseException)
    assert_close(first.parameters(), second.parameters(), 0)
    alone = Alone("AdamW", **ADAMW)
    for group in alone.optimizer.param_groups:
        group["lr"] = 0.5
    for version in (1, 2):
        alone.step(job._batches[version][0])
    assert_close(first.parameters(), alone.parameters(), TOLERANCE)


@pytest.mark.parametrize(
    "extras",
    [
        {"other": torch.zeros(3)},
        {"count": torch.zeros(1)},
        {"count": torch.zeros(3, dtype=torch.float64)},
    ],
    ids=["name", "shape", "type"],
)
def test_a_guest_with_other_buffers_is_told_what_differs(
    stack: ExitStack, extras: Mapping[str, Tensor]
) -> None:
    job = Job(stack, 1)
    (first,) = job.workers
    guest = Trainer(job, 1)
    guest.statistics = holding(extras)
    joining = Worker(guest.join_or_fail)
    while joining.is_alive():
        first.step()
    error = joining.outcome()
    assert isinstance(error, MismatchError)
    assert "'count'" in str(error)
    first.steps(2)
    assert first.ranks == (0,)
    job.check(first)


def test_a_guest_with_another_optimizer_is_told_what_differs(stack: ExitStack) -> None:
    job = Job(stack, 1)
    guest = Trainer(job, 1, spec_of("AdamW", weight_decay=0.5))
    with pytest.raises(MismatchError, match="worker 1 and the worker that came first"):
        guest.join_or_fail()
    job.workers[0].steps(2)
    job.check(job.workers[0])


def test_workers_that_meet_for_different_things_are_told_both(stack: ExitStack) -> None:
    job = Job(stack, 2)
    purposes = (Purpose.MEAN, Purpose.EPOCH)
    calls = [
        partial(worker.exchange.meet, Arrival(purpose, 0))
        for worker, purpose in zip(job.workers, purposes, strict=True)
    ]
    for error in outcomes(*calls):
        assert isinstance(error, UsageError)
        assert "'mean'" in str(error)
        assert "'epoch'" in str(error)


# -- State -----------------------------------------------------------------------------------------


def test_one_may_read_a_sharded_state_while_the_others_step_and_wait(stack: ExitStack) -> None:
    job = Job(stack, 3, **{"allreduce.shard_optimizer": "true"})
    reader, other, third = job.workers
    step_all(*job.workers)
    waiting = Worker(partial(third.exchange.meet, Arrival(Purpose.EPOCH, 1)))
    reading = Worker(reader.exchange.read_state)
    stepping = Worker(other.step)
    state = reading.outcome()
    assert isinstance(state, dict)
    assert {key: float(value) for key, value in state[0].items() if key == "step"} == {"step": 1}
    assert reader.step()
    assert stepping.outcome() is True
    for each in (reader, other):
        each.exchange.idle()
    together(*(partial(e.exchange.meet, Arrival(Purpose.EPOCH, 2)) for e in (reader, other)))
    assert not isinstance(waiting.outcome(), BaseException)
    third.version = 2
    job.check(*job.workers)
