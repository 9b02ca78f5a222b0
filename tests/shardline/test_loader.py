"""Who trains on which samples: loaders of several workers around a lead that lives in memory.

What a pass must visit is computed again here, from the permutation that the loader promises.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ps_core.errors import Preempted, UsageError
from ps_core.exchange import Arrival, Grant, Meeting, Outcome, Purpose, Traffic
from ps_core.leases import Lease, LeaseBook, PassSpec, Totals
from ps_core.local import LocalExchange
from ps_core.metrics import WorkerMetrics
from shardline.attendance import Attendance
from shardline.journal import Journal
from shardline.loader import LeaseStream, Loader, Place, Requests, read_spec
from shardline.notices import Notices
from shardline.preemption import Preemption
from shardline.steps import Steps
from tests.shardline.buckets_of import gradients_of

SEED = 5
PATIENCE_SECONDS = 60.0


# -- A lead in memory ------------------------------------------------------------------------------


class Lead:
    """A book of leases and meetings that end when every worker has come. Safe for threads."""

    def __init__(self, num_workers: int, *, striped: bool = True) -> None:
        self.book = LeaseBook(striped=striped)
        self.changed = threading.Condition()
        self.num_workers = num_workers
        self.speeds: dict[int, float] = {}
        self.reads: dict[int, tuple[int, PassSpec]] = {}
        self.arrivals: dict[int, Arrival] = {}
        self.told: dict[int, Meeting] = {}
        self.idle: set[int] = set()
        self.positions: dict[int, tuple[int, int, range]] = {}
        """Lease → loader, pass, positions."""
        self.applied: list[list[int]] = []
        """Leases of each step."""
        self.meetings: list[Purpose] = []

    def request(self, rank: int, loader: int, spec: PassSpec) -> Grant:
        self.reads[rank] = loader, spec
        reading = [each for each in range(self.num_workers) if each not in self.idle]
        answer = self.book.request(loader, spec, rank, reading, self.speeds)
        lease = answer.lease
        if lease is not None:
            positions = range(lease.start, lease.start + lease.length)
            self.positions[lease.id] = loader, lease.number, positions
        return Grant(answer.number, () if lease is None else (lease,), answer.is_over)

    def look_around(self) -> None:
        """Serve who waits; end the meeting if all have come."""
        for rank, arrival in list(self.arrivals.items()):
            if arrival.takes_leases and rank in self.reads:
                grant = self.request(rank, *self.reads[rank])
                if grant.leases:
                    del self.arrivals[rank]
                    self.told[rank] = Meeting(arrival.step, (), chosen=rank == 0, grant=grant)
        if len(self.arrivals) == self.num_workers:
            purposes = {arrival.purpose for arrival in self.arrivals.values()}
            assert len(purposes) == 1, purposes
            self.meetings += purposes
            if purposes == {Purpose.EPOCH}:
                self.book.end_passes()
            for rank, arrival in self.arrivals.items():
                self.told[rank] = Meeting(arrival.step, arrival.values, chosen=rank == 0)
            self.arrivals.clear()
            self.idle.clear()
        self.changed.notify_all()

    def trained(self, loader: int = 0, number: int = 0) -> list[int]:
        """Positions of a pass that steps have used, sorted."""
        of_pass = [
            self.positions[lease][2]
            for lease in chain(*self.applied)
            if self.positions[lease][:2] == (loader, number)
        ]
        return sorted(chain(*of_pass))

    def totals(self) -> Totals:
        return self.book.totals()


class Seat:
    """One worker's side of the lead: Peers and DataLeases."""

    def __init__(self, lead: Lead, rank: int) -> None:
        self._lead, self._rank = lead, rank
        self._granted: deque[Grant] = deque()
        self.num_requests = 0

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        with self._lead.changed:
            self.num_requests += 1
            self._granted.append(self._lead.request(self._rank, loader, spec))

    def receive_lease(self) -> Grant:
        return self._granted.popleft()

    def holds_lease(self, lease: int) -> bool:
        return True

    def return_leases(self, leases: Sequence[int], *, declined: bool = False) -> None:
        with self._lead.changed:
            self._lead.book.give_back(self._rank, leases, declined=declined)
            self._lead.look_around()

    def step(self, step: int, leases: Sequence[int]) -> None:
        with self._lead.changed:
            assert self._rank not in self._lead.idle
            self._lead.book.consume(self._rank, step, leases)
            self._lead.book.settle(self._rank)
            self._lead.applied.append(list(leases))

    def idle(self) -> None:
        with self._lead.changed:
            self._lead.book.release(self._rank)
            self._lead.idle.add(self._rank)
            self._lead.look_around()

    def meet(self, arrival: Arrival) -> Meeting:
        lead = self._lead
        with lead.changed:
            lead.arrivals[self._rank] = arrival
            lead.look_around()
            assert lead.changed.wait_for(lambda: self._rank in lead.told, PATIENCE_SECONDS)
            return lead.told.pop(self._rank)


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Worker:
    """What a session puts around its loaders, and an optimizer that only takes notes."""

    def __init__(self, lead: Lead, rank: int = 0) -> None:
        self.lead, self.rank = lead, rank
        self.seat = Seat(lead, rank)
        self.attendance = Attendance()
        self.preemption = Preemption(1.0)
        self.steps = Steps(
            WorkerMetrics(rank, 1),
            Journal(None, rank, Traffic()),
            self.attendance,
            tuple,
            self.preemption.check,
        )
        self.weight = nn.Parameter(torch.zeros(3))
        self.steps.watch(gradients_of([self.weight]), self.seat)
        self.attendance.bind(self.seat, self)
        self.requests = Requests(lambda: self.seat)
        self.next_step = 0
        self.num_loaders = 0
        self.samples: list[float] = []
        """Weights of the steps."""
        self.said: list[str] = []

    def flush(self) -> None:
        """Nothing is left for later."""

    def loader(
        self,
        count: int,
        batch_size: int = 2,
        *,
        global_batch_size: int = 0,
        drop_last: bool = False,
        shuffle: bool = False,
        **options: object,
    ) -> Loader:
        dataset = Numbers(count)
        place = Place(
            self.num_loaders,
            self.lead.num_workers,
            SEED,
            self.requests,
            self.attendance,
            self.steps,
            self.preemption,
            Notices(self.said.append, speaks=True),
        )
        self.num_loaders += 1
        spec = read_spec(dataset, batch_size, global_batch_size, drop_last)
        return Loader(dataset, spec, place, shuffle=shuffle, options=options)

    def backward(self) -> None:
        self.weight.sum().backward()

    def step(self) -> None:
        self.steps.before_step()
        work = self.steps.take_work()
        self.seat.step(self.next_step, work.leases)
        self.next_step += 1
        self.samples.append(work.weight)
        outcome = Outcome(self.next_step, self.next_step, applied=True, staleness=0)
        self.steps.after_step(outcome, work, 0.0)

    def train(self, loader: Loader) -> list[list[int]]:
        """A step for each batch of a pass; the samples of each."""
        batches = []
        for batch in loader:
            batches.append(batch.tolist())
            self.backward()
            self.step()
            self.steps.gradients_cleared()
        return batches


def alone(**arguments: Any) -> tuple[Worker, Loader]:  # noqa: ANN401 - as in Worker.loader
    worker = Worker(Lead(1))
    return worker, worker.loader(**arguments)


def team(num_workers: int, *, striped: bool = True) -> tuple[Lead, list[Worker]]:
    lead = Lead(num_workers, striped=striped)
    return lead, [Worker(lead, rank) for rank in range(num_workers)]


def together(workers: Sequence[Worker], run: Callable[[Worker], Any]) -> list[Any]:
    """`run(worker)` at the same time, each in a thread; the results by rank."""
    with ThreadPoolExecutor(len(workers)) as threads:
        return [done.result() for done in [threads.submit(run, each) for each in workers]]


def permutation(count: int, number: int = 0) -> list[int]:
    """What pass `number` visits, as the docs say."""
    order: list[int] = torch.randperm(
        count, generator=torch.Generator().manual_seed(SEED + number)
    ).tolist()
    return order


@pytest.fixture
def forks() -> Iterator[None]:
    """From Python 3.12 on fork() warns when there are threads; here they are the point."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        yield


# -- Whose the samples are -------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    num_workers=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_in_lockstep_batch_b_of_a_pass_goes_to_worker_b_mod_n(
    count: int, batch_size: int, num_workers: int, drop_last: bool
) -> None:
    _, workers = team(num_workers)
    size: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last}
    loaders = [worker.loader(count, shuffle=True, **size) for worker in workers]
    for number in range(2):
        order = permutation(count, number)
        expected = [order[at : at + batch_size] for at in range(0, count, batch_size)]
        if drop_last and len(expected[-1]) < batch_size:
            expected.pop()
        is_alone = bool(expected) and len(expected[-1]) == 1 and (len(expected) - 1) % num_workers
        if is_alone and batch_size > 2:
            expected[-1].insert(0, expected[-2].pop())  # of the same update
        seen = together(workers, lambda worker: worker.train(loaders[worker.rank]))
        assert seen == [expected[rank::num_workers] for rank in range(num_workers)]
        assert [len(loader) for loader in loaders] == [len(expected[0::num_workers])] * num_workers


@settings(max_examples=20)
@given(
    count=st.integers(1, 60),
    batch_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    striped=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_sample_is_trained_on_once_whoever_is_slow(
    count: int, batch_sizes: list[int], striped: bool, seed: int
) -> None:
    lead, workers = team(len(batch_sizes), striped=striped)
    chance = random.Random(seed)
    naps = [[chance.random() < 0.3 for _ in range(2 * count)] for _ in workers]

    def run(worker: Worker) -> None:
        loader = worker.loader(count, batch_sizes[worker.rank])
        for number, _ in enumerate(loader):
            if naps[worker.rank][number]:
                threading.Event().wait(0.001)
            worker.backward()
            worker.step()

    together(workers, run)
    assert lead.trained() == list(range(count))
    assert lead.totals() == Totals(0, count, 0, 0, 0, 0)


def test_every_pass_has_another_order_and_every_worker_the_same() -> None:
    one, loader = alone(count=40, shuffle=True)
    other, again = alone(count=40, shuffle=True)
    passes = [one.train(loader) for _ in range(3)]
    assert [list(chain(*batches)) for batches in passes] == [permutation(40, n) for n in range(3)]
    assert [other.train(again) for _ in range(3)] == passes


def test_without_shuffling_the_order_is_that_of_the_dataset() -> None:
    worker, loader = alone(count=5)
    assert worker.train(loader) == [[0, 1], [2, 3], [4]]
    assert worker.train(loader) == [[0, 1], [2, 3], [4]]


def test_a_batch_may_be_larger_than_the_dataset() -> None:
    worker, loader = alone(count=3, batch_size=100)
    assert len(loader) == 1
    assert worker.train(loader) == [[0, 1, 2]]


def test_a_dataset_may_be_smaller_than_the_number_of_workers() -> None:
    lead, workers = team(4)
    loaders = [worker.loader(2, batch_size=1) for worker in workers]
    for number in range(2):
        seen = together(workers, lambda worker: worker.train(loaders[worker.rank]))
        assert seen == [[[0]], [[1]], [], []]
        assert lead.trained(number=number) == [0, 1]


def test_nothing_is_left_when_drop_last_drops_all() -> None:
    worker, loader = alone(count=3, batch_size=4, drop_last=True)
    assert len(loader) == 0
    assert worker.train(loader) == []


def test_leases_are_asked_for_before_they_are_needed() -> None:
    worker, loader = alone(count=20)
    batches = iter(loader)
    next(batches)
    assert worker.seat.num_requests == 2
    next(batches)
    assert worker.seat.num_requests == 3


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("speeds", "sizes"), [({}, [4, 4, 4]), ({0: 3.0, 1: 1.0}, [6, 2, 4])]
)  # worker 2, who is not known yet, counts as the mean of the others
@pytest.mark.parametrize("num_processes", [0, 2])
def test_with_a_global_batch_size_the_workers_share_every_update(
    speeds: dict[int, float], sizes: list[int], num_processes: int
) -> None:
    lead, workers = team(3)
    lead.speeds = speeds
    size: dict[str, Any] = {"global_batch_size": 12, "num_workers": num_processes}
    loaders = [worker.loader(50, **size) for worker in workers]
    assert [len(loader) for loader in loaders] == [5, 5, 5]
    batches = [iter(loader) for loader in loaders]
    for step in range(4):
        shares = [next(each).tolist() for each in batches]
        assert sorted(chain(*shares)) == list(range(12 * step, 12 * step + 12))
        assert [len(share) for share in shares] == sizes


# -- What becomes of them --------------------------------------------------------------------------


@pytest.mark.usefixtures("forks")
def test_what_is_read_ahead_is_applied_only_when_a_step_has_used_it() -> None:
    worker, loader = alone(count=20, num_workers=2, prefetch_factor=2)
    seen = []
    for number, batch in enumerate(loader):
        assert worker.lead.totals().applied == 2 * number
        seen.append(batch.tolist())
        if number == 0:
            assert worker.lead.totals().granted >= 8  # two processes, two batches each
        worker.backward()
        worker.step()
    assert list(chain(*seen)) == list(range(20))
    assert worker.lead.trained() == list(range(20))


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("num_processes", [0, 1])
def test_a_break_leaves_what_was_not_stepped_to_the_others(num_processes: int) -> None:
    lead, (first, second) = team(2)
    loaders = [worker.loader(20, num_workers=num_processes) for worker in (first, second)]
    for number, _ in enumerate(loaders[0]):
        if number == 2:
            break  # two batches are stepped, the third is not
        first.backward()
        first.step()
    assert lead.idle == {0}
    with closing(first):
        assert len(second.train(loaders[1])) == 8
        second.attendance.meet(Purpose.CLOSE)
    assert lead.trained() == list(range(20))
    assert lead.meetings == [Purpose.EPOCH, Purpose.CLOSE]


@contextmanager
def closing(worker: Worker) -> Iterator[None]:
    """The worker waits for the others at the end of its script meanwhile."""
    thread = threading.Thread(target=worker.attendance.meet, args=(Purpose.CLOSE,), daemon=True)
    thread.start()
    yield
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def test_when_all_break_the_rest_of_the_pass_is_abandoned() -> None:
    lead, workers = team(2)
    loaders = [worker.loader(20) for worker in workers]

    def run(worker: Worker) -> None:
        for _ in range(2):
            for _ in loaders[worker.rank]:
                worker.backward()
                worker.step()
                break
        worker.attendance.meet(Purpose.CLOSE)

    together(workers, run)
    assert [lead.trained(number=number) for number in (0, 1)] == [[0, 1, 2, 3]] * 2
    assert lead.totals().abandoned == 32


def test_an_exception_in_the_loop_body_leaves_the_rest_to_the_others() -> None:
    lead, (first, second) = team(2)
    loaders = [worker.loader(12) for worker in (first, second)]

    def run(worker: Worker) -> None:
        for number, _ in enumerate(loaders[worker.rank]):
            if worker is first and number == 1:
                raise RuntimeError("no such image")
            worker.backward()
            worker.step()

    with pytest.raises(RuntimeError, match="no such image"):
        run(first)
    assert lead.idle == {0}
    with closing(first):
        run(second)
        second.attendance.meet(Purpose.CLOSE)
    assert lead.trained() == list(range(12))


def test_a_skipped_batch_is_given_back_with_the_next_step_and_comes_again() -> None:
    worker, loader = alone(count=8)
    seen = []
    for batch in loader:
        seen.append(batch.tolist())
        if seen.count([2, 3]) == 1 and seen[-1] == [2, 3]:
            continue
        assert worker.lead.totals().returned == (2 if [6, 7] in seen else 0)
        worker.backward()
        worker.step()
        assert worker.lead.totals().returned == (2 if [4, 5] in seen else 0)
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7], [2, 3]]
    assert worker.lead.trained() == list(range(8))


def test_a_batch_that_one_worker_skips_is_another_workers() -> None:
    lead, workers = team(2)
    loaders = [worker.loader(12) for worker in workers]

    def run(worker: Worker) -> None:
        for batch in loaders[worker.rank]:
            if worker.rank == 0 and 4 in batch:
                continue
            worker.backward()
            worker.step()

    together(workers, run)
    assert lead.trained() == list(range(12))
    assert lead.totals().returned == 2


def test_a_script_that_always_skips_a_short_batch_ends() -> None:
    worker, loader = alone(count=9, batch_size=4)
    for number in range(2):
        seen = []
        for batch in loader:
            seen.append(batch.tolist())
            if len(batch) < 4:
                continue
            worker.backward()
            worker.step()
        assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8], [8]]
        assert worker.lead.trained(number=number) == list(range(8))
    assert worker.lead.totals().abandoned == 2


def test_gradients_that_are_thrown_away_are_a_skipped_batch() -> None:
    worker, loader = alone(count=6)
    seen = []
    for batch in loader:
        seen.append(batch.tolist())
        worker.backward()
        if seen == [[0, 1]]:
            worker.steps.gradients_cleared()
            continue
        worker.step()
        worker.steps.gradients_cleared()
    assert seen == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert worker.lead.trained() == list(range(6))


@pytest.mark.parametrize("clears", ["before the backward pass", "after the step", "never"])
def test_it_makes_no_difference_when_gradients_are_cleared(clears: str) -> None:
    worker, loader = alone(count=6)
    for _ in loader:
        if clears == "before the backward pass":
            worker.steps.gradients_cleared()
        worker.backward()
        worker.step()
        if clears == "after the step":
            worker.steps.gradients_cleared()
    assert worker.samples == [2, 2, 2]
    assert worker.lead.trained() == list(range(6))


def test_a_step_without_a_backward_pass_uses_the_batch_before_it() -> None:
    # Gradients of torch.func, or set by hand: no hook tells of them.
    worker, loader = alone(count=6)
    for _ in loader:
        worker.step()
    assert worker.samples == [2, 2, 2]
    assert worker.lead.trained() == list(range(6))


# -- Gradients that accumulate ---------------------------------------------------------------------


def test_one_step_uses_the_leases_of_all_batches_since_the_last() -> None:
    worker, loader = alone(count=12)
    for number, _ in enumerate(loader, start=1):
        worker.backward()
        if number % 3 == 0:
            worker.step()
            worker.steps.gradients_cleared()
    assert worker.samples == [6, 6]
    assert [len(leases) for leases in worker.lead.applied] == [3, 3]
    assert worker.lead.trained() == list(range(12))


def test_the_step_before_a_batchs_backward_pass_is_not_its_own() -> None:
    worker, loader = alone(count=6)
    for number, _ in enumerate(loader):
        if number:
            worker.step()
            worker.steps.gradients_cleared()
        worker.backward()
    worker.step()
    assert worker.samples == [2, 2, 2]
    assert worker.lead.trained() == list(range(6))


def accumulate(worker: Worker, loader: Loader, every: int = 2) -> list[list[int]]:
    seen = []
    for number, batch in enumerate(loader, start=1):
        seen.append(batch.tolist())
        worker.backward()
        if number % every == 0:
            worker.step()
            worker.steps.gradients_cleared()
    return seen


def test_a_last_step_after_the_loop_uses_what_was_left_over() -> None:
    lead, workers = team(2)
    loaders = [worker.loader(10) for worker in workers]  # three batches, and two

    def run(worker: Worker) -> None:
        for _ in range(2):
            accumulate(worker, loaders[worker.rank])
            if worker.rank == 0:
                worker.step()
                worker.steps.gradients_cleared()
        worker.attendance.meet(Purpose.CLOSE)

    together(workers, run)
    assert [worker.samples for worker in workers] == [[4, 2, 4, 2], [4, 4]]
    for number in range(2):
        assert lead.trained(number=number) == list(range(10))
    assert lead.meetings == [Purpose.EPOCH, Purpose.EPOCH, Purpose.CLOSE]


def test_what_is_left_over_weighs_in_the_first_step_of_the_next_pass() -> None:
    worker, loader = alone(count=6)
    assert accumulate(worker, loader) == [[0, 1], [2, 3], [4, 5]]  # as in plain torch, not twice
    assert accumulate(worker, loader) == [[0, 1], [2, 3], [4, 5]]
    assert worker.samples == [4, 2 + 4]
    assert worker.lead.totals().abandoned == 2


def test_what_is_left_over_and_thrown_away_was_for_others_to_train_on() -> None:
    lead, workers = team(2)
    loaders = [worker.loader(10) for worker in workers]

    def run(worker: Worker) -> None:
        for batch in loaders[worker.rank]:
            worker.backward()
            if worker.rank == 0 and 8 in batch:
                continue
            worker.step()
        worker.steps.gradients_cleared()
        worker.attendance.meet(Purpose.CLOSE)

    together(workers, run)
    assert lead.trained() == list(range(10))


def test_gradients_at_a_break_keep_their_weight_and_not_their_leases() -> None:
    worker, loader = alone(count=6)
    for _ in loader:
        worker.backward()
        break
    worker.step()
    assert worker.samples == [2]
    assert worker.lead.applied == [[]]


# -- Several loaders -------------------------------------------------------------------------------


def test_two_loaders_may_be_read_in_turn() -> None:
    lead, workers = team(2)
    pairs = [(worker.loader(10), worker.loader(7, 3)) for worker in workers]

    def run(worker: Worker) -> None:
        for _ in range(2):
            for loader in pairs[worker.rank]:
                worker.train(loader)

    together(workers, run)
    for number in range(2):
        assert lead.trained(0, number) == list(range(10))
        assert lead.trained(1, number) == list(range(7))


def test_answers_to_a_loader_that_was_broken_off_are_not_anothers() -> None:
    worker, first = alone(count=20)
    second = worker.loader(6)
    for _ in first:
        break
    assert worker.train(second) == [[0, 1], [2, 3], [4, 5]]
    assert len(worker.train(first)) == 10


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("num_processes", [0, 1])
def test_two_loaders_may_be_read_side_by_side(num_processes: int) -> None:
    worker, first = alone(count=6, num_workers=num_processes)
    second = worker.loader(20, 3, num_workers=num_processes)
    pairs = []
    for pair in zip(first, second, strict=False):
        pairs.append([batch.tolist() for batch in pair])
        worker.backward()
        worker.step()
    assert pairs == [[[0, 1], [0, 1, 2]], [[2, 3], [3, 4, 5]], [[4, 5], [6, 7, 8]]]
    assert worker.samples == [5, 5, 5]
    assert worker.lead.trained(0) == list(range(6))
    assert worker.lead.trained(1) == list(range(9))
    assert len(worker.train(second)) == 7


def test_a_pass_that_ends_within_another_is_refused_with_a_way_out() -> None:
    worker, outer = alone(count=6)
    inner = worker.loader(4)

    def run() -> None:
        for _ in outer:
            worker.backward()
            worker.step()
            for _ in inner:
                pass

    with pytest.raises(UsageError, match="with a plain DataLoader, or after the loop"):
        run()


# -- Passes that only read -------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_script_may_read_a_pass_without_training_on_it(num_workers: int) -> None:
    lead, workers = team(num_workers)
    loaders = [worker.loader(10, 3) for worker in workers]

    def run(worker: Worker) -> list[list[int]]:
        worker.train(worker.loader(8))  # first another one, to train on
        return [batch.tolist() for _ in range(2) for batch in loaders[worker.rank]]

    for worker, loader in zip(workers, loaders, strict=True):
        assert loader._place.index == 0, worker
    seen = together(workers, run)
    assert Counter(chain(*chain(*seen))) == dict.fromkeys(range(10), 2)
    assert lead.trained(1) == list(range(8))


def test_what_a_reading_pass_has_left_is_not_declined_in_the_next_one() -> None:
    worker, read = alone(count=4)
    trained = worker.loader(4)
    assert len(list(read)) == 2
    assert worker.train(trained) == [[0, 1], [2, 3]]
    assert worker.lead.totals().returned == 0


# -- Leaving ---------------------------------------------------------------------------------------


def test_a_worker_that_was_told_to_end_raises_at_its_next_batch_and_waits_for_nobody() -> None:
    lead, (worker, _) = team(2)
    batches = iter(worker.loader(20))
    assert next(batches).tolist() == [0, 1]
    worker.backward()
    worker.step()
    worker.preemption._requested = True
    with pytest.raises(Preempted):
        next(batches)
    assert lead.trained() == [0, 1]
    assert lead.idle == set()  # its last word follows


# -- Options and refusals --------------------------------------------------------------------------


def test_options_go_to_torch() -> None:
    def collate(items: list[int]) -> Tensor:
        return torch.tensor(items) * 10

    worker, loader = alone(count=4, collate_fn=collate)
    assert worker.train(loader) == [[0, 10], [20, 30]]


@pytest.mark.usefixtures("forks")
def test_worker_processes_may_load_the_data_and_stay() -> None:
    worker, loader = alone(count=4, num_workers=1, persistent_workers=True)
    assert [worker.train(loader) for _ in range(2)] == [[[0, 1], [2, 3]]] * 2


def test_alone_the_exchange_itself_keeps_the_book() -> None:
    exchange, spec = LocalExchange(), PassSpec(5, 2)
    stream = LeaseStream(Requests(lambda: exchange), 0, spec)
    for number in range(2):
        stream.begin()
        leases = list(iter(stream.take, None))
        assert [(lease.number, lease.start, lease.length) for lease in leases] == [
            (number, 0, 2),
            (number, 2, 2),
            (number, 4, 1),
        ]
        exchange.return_leases([leases[1].id])
        met = exchange.meet(Arrival(Purpose.EPOCH, 0, takes_leases=True))
        assert met.grant == Grant(number, (Lease(leases[2].id + 1, 0, number, 2, 2),))
        assert exchange.meet(Arrival(Purpose.EPOCH, 0, takes_leases=True)).grant is None


def test_a_pass_that_the_others_have_ended_is_passed_over() -> None:
    lead = Lead(1)
    first, later = Worker(lead), Worker(lead)
    assert first.train(first.loader(4)) == [[0, 1], [2, 3]]
    loader = later.loader(4, num_workers=0)
    later.next_step = first.next_step
    assert later.train(loader) == []
    assert lead.meetings == [Purpose.EPOCH]
    assert later.train(loader) == [[0, 1], [2, 3]]
    assert lead.meetings == [Purpose.EPOCH] * 2
    assert lead.trained(number=1) == [0, 1, 2, 3]
    assert lead.totals().abandoned == 0


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize("dataset", [Stream(), iter(range(3))])
def test_what_has_no_indices_is_refused_with_a_way_out(dataset: Any) -> None:  # noqa: ANN401 - it is none
    with pytest.raises(UsageError, match=r"optimizer\.step\(samples=n\)"):
        read_spec(dataset, 2, 0, drop_last=False)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        read_spec(Numbers(0), 2, 0, drop_last=False)


@pytest.mark.parametrize(
    ("batch_size", "global_batch_size", "reason"),
    [
        (0, 0, "batch_size is 0"),
        (-1, 0, "batch_size is -1"),
        (1, -1, "not negative"),
        (None, 0, "batch_size=None .*whole numbers"),
        (2.0, 0, "batch_size=2.0 .*whole numbers"),
        (1, "8", "global_batch_size='8': give whole numbers"),
    ],
)
def test_sizes_that_nothing_can_be_read_with_are_refused(
    batch_size: Any,  # noqa: ANN401 - some are wrong
    global_batch_size: Any,  # noqa: ANN401 - the same
    reason: str,
) -> None:
    with pytest.raises(UsageError, match=reason):
        read_spec(Numbers(3), batch_size, global_batch_size, drop_last=False)


@pytest.mark.parametrize(
    "options", [{"sampler": [1, 2]}, {"batch_sampler": [[1, 2]]}, {"in_order": False}]
)
def test_options_that_choose_the_samples_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"leave out {next(iter(options))}"):
        alone(count=4, **options)


# -- What users of torch's DataLoader expect -------------------------------------------------------


def test_a_loader_has_the_attributes_of_a_dataloader() -> None:
    loader = Worker(Lead(1)).loader(9, 4, drop_last=True)
    assert (len(loader.dataset), loader.batch_size, loader.drop_last) == (9, 4, True)  # type: ignore[arg-type]  # Sized
    assert (loader.num_workers, loader.pin_memory, loader.prefetch_factor) == (0, False, None)
    for name in ("sampler", "batch_sampler", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(loader, name)


class Stops(Numbers):
    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise StopIteration
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_that_raises_stop_iteration_does_not_end_the_pass(num_workers: int) -> None:
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    worker = Worker(Lead(1))
    loader = worker.loader(6, num_workers=num_workers)
    loader.dataset = Stops(6)
    with pytest.raises(UsageError, match=r"raised StopIteration for samples \[2, 3\] of 6"):
        worker.train(loader)


@pytest.mark.parametrize(
    ("count", "batch_size", "drop_last", "words"),
    [
        (3, 4, False, "3 samples in batches of 4 are 1 for 2 workers"),
        (3, 4, True, "3 samples are less than a batch of 4, and drop_last"),
        (8, 4, False, ""),
    ],
)
def test_a_pass_with_fewer_batches_than_workers_is_said_once(
    count: int, batch_size: int, drop_last: bool, words: str
) -> None:
    lead = Lead(2)
    workers = [Worker(lead, rank) for rank in range(2)]
    loaders = [worker.loader(count, batch_size, drop_last=drop_last) for worker in workers]
    for _ in range(2):
        together(workers, lambda worker: worker.train(loaders[worker.rank]))
    for worker in workers:
        assert len(worker.said) == bool(words)
        assert words in "".join(worker.said)
