import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from types import FunctionType, ModuleType

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ps_core.errors import ProtocolError, UsageError
from ps_core.leases import Answer, Lease, LeaseBook, PassEnd, PassOpened, PassSpec, Totals
from ps_core.point import Point

SPEC = PassSpec(num_samples=100, batch_size=10)
WORKERS = [0, 1]


def grant(
    book: LeaseBook,
    worker: int = 0,
    spec: PassSpec = SPEC,
    loader: int = 0,
    workers: Iterable[int] = WORKERS,
) -> Lease:
    lease = book.request(loader, spec, worker, list(workers)).lease
    assert lease is not None
    return lease


def consume(book: LeaseBook, worker: int = 0, step: int = 0) -> Lease:
    lease = grant(book, worker)
    book.consume(worker, step, [lease.id])
    return lease


@pytest.fixture(params=[False, True], ids=["first come", "striped"])
def book(request: pytest.FixtureRequest) -> LeaseBook:
    return LeaseBook(striped=request.param)


# -- Passes open and end. Rules 1, 2, 7 and 9 -----------------------------------------------------


def test_the_first_request_opens_the_pass_and_says_so_once(book: LeaseBook) -> None:
    first = book.request(3, SPEC, 1, WORKERS)
    assert first.number == 0
    assert first.opened == PassOpened(loader=3, number=0, num_samples=100, dropped=0)
    assert book.request(3, SPEC, 0, WORKERS).opened is None


def test_passes_are_numbered_for_each_loader(book: LeaseBook) -> None:
    assert book.request(0, SPEC, 0, WORKERS).number == 0
    book.end_passes()
    assert book.request(0, SPEC, 0, WORKERS).number == 1
    assert book.request(1, SPEC, 0, WORKERS).number == 0


def test_who_comes_to_a_pass_that_has_ended_is_told_so_and_opens_none(book: LeaseBook) -> None:
    def ask(loader: int, *point: int) -> Answer:
        return book.request(loader, replace(SPEC, point=Point(*point)), 0, WORKERS)

    assert ask(0, 1, 3, 1).number == 0
    book.end_passes()
    over = Answer(0, None, None, is_over=True)
    for point in ((0, 0, 1), (1, 2, 1), (1, 2, 9), (1, 3, 1)):
        assert ask(0, *point) == over
    assert not ask(1, 1, 3, 1).is_over, "another loader's"
    totals = book.totals()
    assert totals.open + totals.granted == SPEC.num_samples, "the other loader's pass only"
    for number, point in enumerate(((1, 3, 2), (1, 4, 1), (2, 0, 1)), start=1):
        answer = ask(0, *point)
        assert (answer.number, answer.is_over) == (number, False)
        book.end_passes()


def test_leases_are_numbered_through_the_job(book: LeaseBook) -> None:
    leases = [grant(book, loader=0), grant(book, loader=1), grant(book, worker=1)]
    book.end_passes()
    leases.append(grant(book))
    assert [lease.id for lease in leases] == [1, 2, 3, 4]
    assert [(lease.loader, lease.number) for lease in leases] == [(0, 0), (1, 0), (0, 0), (0, 1)]


def test_an_exhausted_pass_stays_open_until_all_have_come_to_its_end() -> None:
    book = LeaseBook(striped=False)
    spec = PassSpec(num_samples=10, batch_size=10)
    grant(book, spec=spec)
    for worker in WORKERS:
        answer = book.request(0, spec, worker, WORKERS)
        assert (answer.number, answer.lease) == (0, None)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("num_samples=90", PassSpec(90, 10)),
        ("global_batch_size=20", PassSpec(100, 10, global_batch_size=20)),
        ("drop_last=True", PassSpec(100, 10, drop_last=True)),
    ],
)
def test_workers_that_do_not_read_the_same_are_told_both_values(
    book: LeaseBook, field: str, other: PassSpec
) -> None:
    grant(book)
    name = field.split("=")[0]
    with pytest.raises(UsageError, match=f"{field} on worker 1 and {name}=.*give every worker"):
        book.request(0, other, 1, WORKERS)
    book.end_passes()
    book.request(0, other, 1, WORKERS)


def test_batch_sizes_may_differ(book: LeaseBook) -> None:
    lengths = [
        grant(book, worker, PassSpec(100, size)).length for worker, size in ((0, 32), (1, 8))
    ]
    assert lengths == [32, 8]


@pytest.mark.parametrize(
    ("spec", "dropped"),
    [
        (PassSpec(107, 10), 0),
        (PassSpec(107, 10, drop_last=True), 7),
        (PassSpec(107, 10, global_batch_size=25, drop_last=True), 7),
        (PassSpec(107, 10, global_batch_size=40, drop_last=True), 27),
        (PassSpec(7, 10, drop_last=True), 7),
    ],
)
def test_drop_last_drops_what_does_not_fill_a_batch(
    book: LeaseBook, spec: PassSpec, dropped: int
) -> None:
    opened = book.request(0, spec, 0, [0]).opened
    assert opened == PassOpened(0, 0, spec.num_samples, dropped)
    num_read = spec.num_samples - dropped
    [end] = book.end_passes()
    assert end.abandoned == (((0, num_read),) if num_read else ())


@pytest.mark.parametrize(
    "make",
    [
        lambda: PassSpec(100, 0),
        lambda: PassSpec(-1, 10),
        lambda: PassSpec(100, 10, global_batch_size=-1),
    ],
)
def test_sizes_that_cannot_be_read_are_refused(make: Callable[[], PassSpec]) -> None:
    with pytest.raises(UsageError):
        make()


def test_what_is_free_or_granted_when_a_pass_ends_is_abandoned() -> None:
    book = LeaseBook(striped=False)
    consume(book, 0)  # 0 .. 10
    grant(book, 0)  # 10 .. 20
    consume(book, 1)  # 20 .. 30
    book.settle(0)
    book.settle_in_part(1)
    assert book.end_passes() == [PassEnd(0, 0, abandoned=((10, 20), (30, 100)))]
    assert book.end_passes() == []
    assert not book.totals().granted


def test_all_open_passes_end_together(book: LeaseBook) -> None:
    for loader in (2, 0):
        grant(book, loader=loader)
    assert book.end_passes() == [PassEnd(0, 0, ((0, 100),)), PassEnd(2, 0, ((0, 100),))]


def test_a_pass_ends_only_when_every_step_has_been_decided(book: LeaseBook) -> None:
    consume(book)
    with pytest.raises(AssertionError):
        book.end_passes()


# -- Steps. Rules 4 and 5 --------------------------------------------------------------------------


def test_consumed_leases_are_applied_once(book: LeaseBook) -> None:
    leases = grant(book), grant(book)
    book.consume(0, 5, [lease.id for lease in leases])
    assert book.consumed_by(0) == (1, 2)
    assert book.settle(0) == leases
    assert book.settle(0) == ()
    assert book.consumed_by(0) == ()


def test_a_step_takes_only_what_it_has_consumed(book: LeaseBook) -> None:
    consumed = consume(book)
    grant(book)
    consume(book, worker=1)
    assert book.settle(0) == (consumed,)
    assert book.totals().granted == 20


def test_leases_of_several_loaders_can_be_in_one_step(book: LeaseBook) -> None:
    leases = grant(book, loader=0), grant(book, loader=1)
    book.consume(0, 0, [lease.id for lease in leases])
    assert book.settle(0) == leases


def test_what_was_applied_in_part_is_never_granted_again(book: LeaseBook) -> None:
    spec = PassSpec(num_samples=10, batch_size=10)
    lease = grant(book, spec=spec)
    book.consume(0, 0, [lease.id])
    book.release(0)
    assert book.settle_in_part(0) == (lease,)
    assert book.request(0, spec, 1, [1]).lease is None


def test_what_was_refused_is_granted_again_under_a_new_lease(book: LeaseBook) -> None:
    spec = PassSpec(num_samples=10, batch_size=10)
    lease = grant(book, spec=spec)
    book.consume(0, 0, [lease.id])
    assert book.refuse(0) == (lease,)
    assert book.refuse(0) == ()
    assert grant(book, 1, spec) == Lease(id=2, loader=0, number=0, start=0, length=10)


def test_a_worker_consumes_only_what_it_holds(book: LeaseBook) -> None:
    mine, others = grant(book, 0), grant(book, 1)
    for ids in ([others.id], [mine.id, others.id], [99], [mine.id, mine.id], [0]):
        with pytest.raises(ProtocolError):
            book.consume(0, 0, ids)
    assert book.consumed_by(0) == ()
    book.consume(0, 0, [mine.id])


@pytest.mark.parametrize("decide", [LeaseBook.settle, LeaseBook.refuse])
def test_a_closed_lease_cannot_be_consumed(
    book: LeaseBook, decide: Callable[[LeaseBook, int], object]
) -> None:
    lease = consume(book)
    decide(book, 0)
    with pytest.raises(ProtocolError):
        book.consume(0, 1, [lease.id])


@pytest.mark.parametrize("decide", [None, LeaseBook.settle, LeaseBook.refuse])
def test_beginning_a_step_again_changes_nothing(
    book: LeaseBook, decide: Callable[[LeaseBook, int], object] | None
) -> None:
    lease = consume(book, step=7)
    if decide:
        decide(book, 0)
    before = book.totals()
    book.consume(0, 7, [lease.id])
    assert book.totals() == before


def test_a_step_begins_only_when_the_one_before_is_decided(book: LeaseBook) -> None:
    consume(book, step=3)
    with pytest.raises(ProtocolError, match="begins step 4 in the middle of 3"):
        book.consume(0, 4, [])
    book.settle(0)
    book.consume(0, 4, [])


# -- What comes back. Rules 5 and 6 ----------------------------------------------------------------


def test_what_is_given_back_is_granted_again() -> None:
    book = LeaseBook(striped=False)
    leases = grant(book), grant(book)
    book.give_back(0, [lease.id for lease in leases], declined=False)
    assert grant(book, 1).start == 0
    assert grant(book, 1).start == 10


def test_giving_back_what_is_closed_is_ignored(book: LeaseBook) -> None:
    given, applied = grant(book), grant(book)
    book.consume(0, 0, [applied.id])
    book.settle(0)
    book.give_back(0, [given.id, given.id], declined=False)
    after = book.totals()
    for declined in (False, True):
        book.give_back(0, [given.id, applied.id], declined=declined)
    assert book.totals() == after


def test_a_worker_gives_back_only_what_it_holds_and_has_not_consumed(book: LeaseBook) -> None:
    mine, others, consumed = grant(book, 0), grant(book, 1), consume(book, 0)
    for ids in ([others.id], [mine.id, others.id], [99], [0], [consumed.id]):
        with pytest.raises(ProtocolError):
            book.give_back(0, ids, declined=False)
    assert book.totals().returned == 0


def test_a_worker_that_is_gone_leaves_what_it_has_not_consumed() -> None:
    book = LeaseBook(striped=False)
    consumed, granted, others = consume(book, 0), grant(book, 0), grant(book, 1)
    book.release(0)
    assert book.consumed_by(0) == (consumed.id,)
    assert grant(book, 1).start == granted.start
    book.consume(1, 0, [others.id])
    assert book.refuse(0) == (consumed,)
    assert grant(book, 1).start == consumed.start


def test_a_new_process_begins_under_a_rank_once_the_old_ones_step_is_decided(
    book: LeaseBook,
) -> None:
    consume(book, 0, step=4)
    book.release(0)
    lease = grant(book, 0)
    with pytest.raises(ProtocolError):
        book.consume(0, 4, [lease.id])
    book.refuse(0)
    book.consume(0, 4, [lease.id])
    assert book.consumed_by(0) == (lease.id,)


def test_a_declined_batch_goes_to_another_worker_once_and_is_then_abandoned(
    book: LeaseBook,
) -> None:
    spec = PassSpec(num_samples=10, batch_size=10)
    book.give_back(0, [grant(book, 0, spec).id], declined=True)
    assert book.totals().open
    assert book.request(0, spec, 0, WORKERS).lease is None
    book.give_back(1, [grant(book, 1, spec).id], declined=True)
    assert not book.totals().open
    assert book.totals() == Totals(0, 0, 0, returned=10, abandoned=10, open=0)
    assert book.end_passes() == [PassEnd(0, 0, ((0, 10),))]
    assert book.totals().abandoned == 10


def test_a_script_that_always_skips_a_short_batch_ends_its_pass_alone(book: LeaseBook) -> None:
    spec = PassSpec(num_samples=25, batch_size=10)
    step = 0
    while lease := book.request(0, spec, 0, [0]).lease:
        if lease.length < 10:
            book.give_back(0, [lease.id], declined=True)
        else:
            book.consume(0, step, [lease.id])
            book.settle(0)
            step += 1
    assert step == 2
    assert lease is None
    assert book.end_passes() == [PassEnd(0, 0, ((20, 25),))]


@pytest.mark.parametrize("way", ["give back", "release", "refuse"])
def test_a_declined_batch_that_comes_back_otherwise_keeps_its_one_chance(
    book: LeaseBook, way: str
) -> None:
    spec = PassSpec(num_samples=10, batch_size=10)
    book.give_back(0, [grant(book, 0, spec).id], declined=True)
    lease = grant(book, 1, spec)
    match way:
        case "give back":
            book.give_back(1, [lease.id], declined=False)
        case "release":
            book.release(1)
        case _:
            book.consume(1, 0, [lease.id])
            book.refuse(1)
    assert book.request(0, spec, 0, WORKERS).lease is None
    book.give_back(1, [grant(book, 1, spec).id], declined=True)
    assert not book.totals().open


# -- What is asked about ---------------------------------------------------------------------------


def test_totals_count_samples_over_all_passes() -> None:
    book = LeaseBook(striped=False)
    for step in range(2):
        consume(book, 0, step)
        book.settle(0)
    book.give_back(0, [grant(book).id], declined=False)
    assert book.totals() == Totals(0, 20, 0, returned=10, abandoned=0, open=80)
    book.end_passes()
    consume(book, 0, 2)
    book.settle_in_part(0)
    grant(book)
    assert book.totals() == Totals(10, 20, 10, returned=10, abandoned=80, open=80)


def test_a_global_batch_is_shared_out_by_speed(book: LeaseBook) -> None:
    spec = PassSpec(100, 10, global_batch_size=40)
    speeds = {0: 30.0, 1: 10.0}
    leases = [book.request(0, spec, worker, WORKERS, speeds).lease for worker in WORKERS]
    assert [(lease.start, lease.length) for lease in leases if lease] == [(0, 30), (30, 10)]


def test_the_order_of_asking_and_of_naming_workers_makes_no_difference_when_striped() -> None:
    spec = PassSpec(70, 10)
    got = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        book = LeaseBook(striped=True)
        leases = {worker: grant(book, worker, spec, workers=order).start for worker in order}
        got.append([leases[worker] for worker in range(3)])
    assert got == [[0, 10, 20]] * 3


# -- The cost of a huge pass. Rule 8 ---------------------------------------------------------------

HUGE = 10**9


def num_objects(root: object) -> int:
    """How many objects hang on `root`."""
    seen: set[int] = set()
    found = [root]
    while found:
        item = found.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | FunctionType):
            continue
        seen.add(id(item))
        found += gc.get_referents(item)
    return len(seen)


@pytest.mark.parametrize(
    "spec", [PassSpec(HUGE, 64), PassSpec(HUGE, 64, global_batch_size=256)], ids=["batch", "global"]
)
def test_memory_does_not_grow_with_samples_or_applied_leases(
    book: LeaseBook, spec: PassSpec
) -> None:
    sizes = []
    for step in range(2000):
        leases = [grant(book, worker, spec, workers=range(4)) for worker in range(4)]
        for worker, lease in enumerate(leases):
            book.consume(worker, step, [lease.id])
            book.settle(worker)
        if step in (10, 1999):
            sizes.append(num_objects(book))
    assert sizes[1] <= sizes[0] + 4  # numbers that are no longer small and shared
    assert sizes[1] < 200
    assert book.totals().applied == 2000 * 4 * 64


def test_a_huge_pass_is_dealt_anew_without_counting_through_it() -> None:
    book = LeaseBook(striped=True)
    spec = PassSpec(HUGE, 64)
    for num_workers in (4, 3, 5, 2):
        for worker in range(num_workers):
            book.give_back(
                worker,
                [grant(book, worker, spec, workers=range(num_workers)).id],
                declined=False,
            )
    assert num_objects(book) < 200
    assert book.end_passes() == [PassEnd(0, 0, ((0, HUGE),))]


# -- Every position is in one state: any calls in any order ----------------------------------------

RANKS = range(3)
FREE, GRANTED, CONSUMED = "free", "granted", "consumed"
APPLIED, IN_PART, ABANDONED = "applied", "in part", "abandoned"


def runs(positions: Iterable[int]) -> list[list[int]]:
    """Positions as lists of consecutive ones, the slow way."""
    found: list[list[int]] = []
    for position in sorted(positions):
        if found and found[-1][-1] + 1 == position:
            found[-1].append(position)
        else:
            found.append([position])
    return found


class PassModel:
    """One pass with one entry for each position."""

    def __init__(self, number: int, num_positions: int, *, striped: bool, total: int) -> None:
        self.number = number
        self.striped, self.total = striped, total
        self.states = [FREE] * num_positions
        self.declined_by: dict[int, int] = {}
        self.reserved: dict[int, list[list[int]]] = {}
        self.dealt_for: tuple[list[int], int] | None = None
        self.mixed = False

    def count(self, *states: str) -> int:
        return sum(self.states.count(state) for state in states)

    def unreserved(self) -> list[int]:
        reserved = {p for units in self.reserved.values() for unit in units for p in unit}
        free = (p for p, state in enumerate(self.states) if state == FREE)
        return [p for p in free if p not in reserved and p not in self.declined_by]

    def expected(self, worker: int, workers: list[int], size: int) -> list[int]:
        """What the worker must be granted now; empty: nothing."""
        if self.total:
            size = max(1, self.share(workers, worker, self.total))
        if self.striped and self.total:
            self.round(worker, workers)
        elif self.striped:
            self.deal(workers, size)
        if self.reserved.get(worker):
            return self.reserved[worker].pop(0)
        if not (self.striped and self.total):
            for run in runs(self.unreserved()):
                return run[:size]
        return self.second_chance(worker, workers, size)

    def second_chance(self, worker: int, workers: list[int], size: int) -> list[int]:
        for decliner in RANKS:
            if decliner == worker and workers != [worker]:
                continue
            declined = (p for p, by in self.declined_by.items() if by == decliner)
            for run in runs(p for p in declined if self.states[p] == FREE):
                return run[:size]
        return []

    def deal(self, workers: list[int], size: int) -> None:
        self.mixed |= self.dealt_for is not None and self.dealt_for[1] != size
        if self.mixed:
            self.reserved = {}
        elif self.dealt_for != (workers, size):
            self.reserved = {}
            units = [
                run[start : start + size]
                for run in runs(self.unreserved())
                for start in range(0, len(run), size)
            ]
            self.reserved = {w: units[i :: len(workers)] for i, w in enumerate(workers)}
            self.dealt_for = ([*workers], size)

    def round(self, worker: int, workers: list[int]) -> None:
        self.reserved = {w: units for w, units in self.reserved.items() if w in workers}
        if self.reserved.get(worker):
            return
        free = runs(self.unreserved())
        for run in [*(run for run in free if len(run) >= len(workers)), *free][:1]:
            whole = iter(run[: self.total])
            sizes = {w: self.share(workers, w, min(len(run), self.total)) for w in workers}
            if sizes[worker]:
                for other in workers:
                    part = list(islice(whole, sizes[other]))
                    self.reserved.setdefault(other, []).extend([part] if part else [])

    @staticmethod
    def share(workers: list[int], worker: int, total: int) -> int:
        """Nobody's speed is known here."""
        each, rest = divmod(total, len(workers))
        return each + (1 if workers.index(worker) < rest else 0)


class LeaseMachine(RuleBasedStateMachine):
    """Any calls in any order, against a model with a state for each position."""

    @initialize(
        striped=st.booleans(),
        total=st.sampled_from([0, 0, 0, 2, 6, 7]),
        batches=st.sampled_from([[4, 4, 4], [4, 4, 4], [1, 1, 1], [5, 3, 5]]),
        num_samples=st.sampled_from([0, 3, 12, 30, 50]),
        drop_last=st.booleans(),
    )
    def begin(
        self, striped: bool, total: int, batches: list[int], num_samples: int, drop_last: bool
    ) -> None:
        self.book = LeaseBook(striped=striped)
        self.striped = striped
        self.specs = [PassSpec(num_samples, batch, total, drop_last) for batch in batches]
        self.present = list(RANKS)
        self.passes: dict[int, PassModel] = {}
        self.num_passes = [0, 0]
        self.held: dict[int, tuple[int, Lease]] = {}
        self.steps = [0, 0, 0]
        self.finished = dict.fromkeys((APPLIED, IN_PART, ABANDONED), 0)
        self.returned = 0

    def positions(self, lease: Lease) -> range:
        return range(lease.start, lease.start + lease.length)

    def close(self, lease: Lease, state: str) -> None:
        del self.held[lease.id]
        for position in self.positions(lease):
            self.passes[lease.loader].states[position] = state
        if state == FREE:
            self.returned += lease.length

    def held_by(self, worker: int, state: str) -> list[Lease]:
        mine = (lease for owner, lease in self.held.values() if owner == worker)
        return [x for x in mine if self.passes[x.loader].states[x.start] == state]

    @rule(loader=st.integers(0, 1), ranks=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def ask(self, loader: int, ranks: list[int]) -> None:
        for rank in ranks:
            self.request(loader, self.present[rank % len(self.present)])

    def request(self, loader: int, worker: int) -> None:
        spec = self.specs[worker]
        answer = self.book.request(loader, spec, worker, self.present[::-1])
        if loader not in self.passes:
            unit = spec.global_batch_size or spec.batch_size
            dropped = spec.num_samples % unit if spec.drop_last else 0
            number = self.num_passes[loader]
            assert answer.opened == PassOpened(loader, number, spec.num_samples, dropped)
            self.num_passes[loader] += 1
            self.passes[loader] = PassModel(
                number,
                spec.num_samples - dropped,
                striped=self.striped,
                total=spec.global_batch_size,
            )
        current = self.passes[loader]
        expected = current.expected(worker, self.present, spec.batch_size)
        assert answer.number == current.number
        if answer.lease is None:
            assert expected == []
            return
        assert list(self.positions(answer.lease)) == expected
        assert {current.states[position] for position in expected} == {FREE}
        self.held[answer.lease.id] = (worker, answer.lease)
        for position in expected:
            current.states[position] = GRANTED

    @precondition(lambda self: self.held)
    @rule(worker=st.sampled_from(RANKS), data=st.data())
    def consume(self, worker: int, data: st.DataObject) -> None:
        if self.held_by(worker, CONSUMED):
            return
        granted = self.held_by(worker, GRANTED)
        leases = [lease for lease in granted if data.draw(st.booleans())]
        self.steps[worker] += 1
        for _ in range(2):
            self.book.consume(worker, self.steps[worker], [lease.id for lease in leases])
        for lease in leases:
            for position in self.positions(lease):
                self.passes[lease.loader].states[position] = CONSUMED
        assert self.book.consumed_by(worker) == tuple(lease.id for lease in leases)

    @precondition(lambda self: self.held)
    @rule(worker=st.sampled_from(RANKS), how=st.sampled_from([APPLIED, APPLIED, IN_PART, FREE]))
    def decide(self, worker: int, how: str) -> None:
        consumed = self.held_by(worker, CONSUMED)
        calls = {
            APPLIED: self.book.settle,
            IN_PART: self.book.settle_in_part,
            FREE: self.book.refuse,
        }
        assert calls[how](worker) == tuple(consumed)
        for lease in consumed:
            self.close(lease, how)

    @precondition(lambda self: self.held)
    @rule(worker=st.sampled_from(RANKS), declined=st.booleans(), data=st.data())
    def give_back(self, worker: int, declined: bool, data: st.DataObject) -> None:
        granted = self.held_by(worker, GRANTED)
        leases = [lease for lease in granted if data.draw(st.booleans())]
        self.book.give_back(worker, [lease.id for lease in leases], declined=declined)
        for lease in leases:
            known = self.passes[lease.loader].declined_by
            again = declined and lease.start in known
            self.close(lease, ABANDONED if again else FREE)
            if declined:
                known.update((p, worker) for p in self.positions(lease) if not again)

    @precondition(lambda self: self.held)
    @rule(worker=st.sampled_from(RANKS), lease_id=st.integers(0, 40))
    def misuse(self, worker: int, lease_id: int) -> None:
        owner, lease = self.held.get(lease_id, (None, None))
        if owner != worker or lease in self.held_by(worker, CONSUMED):
            with pytest.raises(ProtocolError):
                self.book.consume(worker, 1000, [lease_id])
        if lease is not None and (owner != worker or lease in self.held_by(worker, CONSUMED)):
            with pytest.raises(ProtocolError):
                self.book.give_back(worker, [lease_id], declined=True)

    @rule(worker=st.sampled_from(RANKS))
    def release(self, worker: int) -> None:
        self.book.release(worker)
        for lease in self.held_by(worker, GRANTED):
            self.close(lease, FREE)
        if len(self.present) > 1 and worker in self.present:
            self.present.remove(worker)

    @precondition(lambda self: len(self.present) < len(RANKS))
    @rule(worker=st.sampled_from(RANKS))
    def come(self, worker: int) -> None:
        self.present = sorted({*self.present, worker})

    @precondition(lambda self: self.passes)
    @rule()
    def end_passes(self) -> None:
        for worker in RANKS:
            self.decide(worker, APPLIED)
        expected = []
        for loader, current in sorted(self.passes.items()):
            lost = [p for p, s in enumerate(current.states) if s in (FREE, GRANTED, ABANDONED)]
            ranges = tuple((run[0], run[-1] + 1) for run in runs(lost))
            expected.append(PassEnd(loader, current.number, ranges))
            self.finished[ABANDONED] += len(lost)
            for state in (APPLIED, IN_PART):
                self.finished[state] += current.count(state)
        assert self.book.end_passes() == expected
        self.passes.clear()
        self.held.clear()

    @invariant()
    def every_sample_is_counted_where_it_is(self) -> None:
        def total(*states: str) -> int:
            before = sum(self.finished.get(state, 0) for state in states)
            return before + sum(current.count(*states) for current in self.passes.values())

        assert self.book.totals() == Totals(
            granted=total(GRANTED, CONSUMED),
            applied=total(APPLIED),
            applied_in_part=total(IN_PART),
            returned=self.returned,
            abandoned=total(ABANDONED),
            open=total(FREE),
        )


LeaseMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestLeaseMachine = LeaseMachine.TestCase


def test_workers_whose_samples_differ_are_told_so() -> None:
    book = LeaseBook(striped=True)
    spec = PassSpec(num_samples=10, batch_size=5, fingerprint=7)
    book.request(0, spec, 0, (0, 1))
    book.request(0, replace(spec, fingerprint=0), 1, (0, 1))
    with pytest.raises(UsageError, match="loader 0 has other samples on one worker"):
        book.request(0, replace(spec, fingerprint=8), 1, (0, 1))
