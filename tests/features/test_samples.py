"""What becomes of every sample, whatever a script does with its loader."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch.utils.data import TensorDataset

from ps_core.errors import (
    UsageError,
)
from ps_core.point import Point
from shardline.ports import free_ports
from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, run_alone
from tests.features.book import Book, assert_trained_as_one
from tests.features.three_ways import (
    Returned,
)
from tests.host import Case
from tests.reference import (
    JOB_SEED,
    SEED,
    gradients_of,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


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
