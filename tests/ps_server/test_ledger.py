"""Each rule of ps_server/ledger.py. Positions and numbers of samples are counted by hand."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_core.entries import Contribution, WorkerEvent
from ps_core.errors import ProtocolError
from ps_core.leases import PassEnd, PassOpened, PassSpec
from ps_server.effects import Remains
from ps_server.ledger import Ledger

BOTH = frozenset({0, 1})
ONE = PassSpec(num_samples=8, batch_size=1)


def make() -> Ledger:
    return Ledger(BOTH, striped=False)


def lease(ledger: Ledger, worker: int) -> int:
    """The id of a lease of one sample."""
    (granted,) = ledger.request(worker, 0, ONE, [0, 1, 2], {}).leases
    return granted.id


def settled(ledger: Ledger) -> list[tuple[int, int, int, str, tuple[int, ...]]]:
    """Worker, incarnation, step, state and leases of what was entered since the last call."""
    return [
        (e.worker, e.incarnation, e.step, e.state, tuple(each.id for each in e.leases))
        for e in ledger.take_entries()
        if isinstance(e, Contribution)
    ]


def word(step: int, used: int, leases: tuple[int, ...] = (), *, incarnation: int = 7) -> Remains:
    """A shard of 2 parts about worker 1."""
    return Remains(1, incarnation, step, len(leases), leases, used, 2)


# -- 1. A step is settled when its worker names a later one as its next ----------------------------


@pytest.mark.parametrize("what", ["begin", "release", "settle"])
def test_a_step_is_settled_by_what_follows_it(what: str) -> None:
    ledger = make()
    first, second = lease(ledger, 1), lease(ledger, 1)
    ledger.begin(1, 7, 0, 1, [first])
    assert settled(ledger) == []
    match what:
        case "begin":
            ledger.begin(1, 7, 1, 1, [second])
        case "release":
            ledger.release(1)
        case "settle":
            ledger.settle(1, 1)
    assert settled(ledger) == [(1, 7, 0, "applied", (first,))]
    ledger.settle(1, 2)
    assert settled(ledger) == ([(1, 7, 1, "applied", (second,))] if what == "begin" else [])


@pytest.mark.parametrize("what", ["request", "give back", "take back"])
def test_what_a_worker_may_do_in_the_middle_of_a_step_settles_nothing(what: str) -> None:
    ledger = make()
    first, second = lease(ledger, 1), lease(ledger, 1)
    ledger.begin(1, 7, 0, 1, [first])
    match what:
        case "request":
            ledger.request(1, 0, ONE, [1], {})
        case "give back":
            ledger.give_back(1, [second], declined=False)
        case "take back":
            ledger.take_back(1)
            assert ledger.book.totals().granted == 1, "its step keeps its leases"
    assert settled(ledger) == []
    ledger.investigate(1, 7)
    ledger.remains(0, word(0, 2, (first,)))
    ledger.remains(1, word(0, 0, (first,)))
    assert settled(ledger) == [(1, 7, 0, "in_part", (first,))]


def test_nobody_goes_on_in_the_middle_of_a_step() -> None:
    ledger = make()
    first, second = lease(ledger, 1), lease(ledger, 1)
    ledger.begin(1, 7, 3, 1, [first])
    with pytest.raises(ProtocolError, match="worker 1 goes on in the middle of its step 3: let"):
        ledger.settle(1, 3)
    with pytest.raises(ProtocolError, match="worker 1 begins step 3 again with other samples: let"):
        ledger.begin(1, 7, 3, 1, [second])
    assert settled(ledger) == []


def test_a_begin_that_is_repeated_changes_nothing_even_after_the_step_is_settled() -> None:
    ledger = make()
    first = lease(ledger, 1)
    for _ in range(2):
        ledger.begin(1, 7, 0, 1, [first])
    ledger.settle(1, 1)
    ledger.begin(1, 7, 0, 1, [first])
    ledger.settle(1, 1)
    assert settled(ledger) == [(1, 7, 0, "applied", (first,))]


def test_leases_of_others_are_refused_and_the_step_before_is_settled_all_the_same() -> None:
    ledger = make()
    mine, theirs = lease(ledger, 1), lease(ledger, 2)
    ledger.begin(1, 7, 0, 1, [mine])
    with pytest.raises(ProtocolError, match=f"names lease {theirs}, which it does not hold"):
        ledger.begin(1, 7, 1, 1, [theirs])
    assert settled(ledger) == [(1, 7, 0, "applied", (mine,))]


def test_a_contribution_says_the_first_version_that_includes_it() -> None:
    ledger = make()
    ledger.begin(1, 7, 4, 3, [])
    ledger.settle(1, 5)
    ledger.begin(1, 7, 5, 3, [])
    ledger.arrived(1, 4, 90)  # late news of a step that is settled
    ledger.arrived(1, 5, 91)
    ledger.settle(1, 6)
    entries = [entry for entry in ledger.take_entries() if isinstance(entry, Contribution)]
    seen = [(entry.step, entry.version, entry.samples) for entry in entries]
    assert seen == [(4, 5, 3), (5, 91, 3)]


# -- 2. A refused step gives its leases back -------------------------------------------------------


def test_a_refused_step_is_entered_nowhere_and_its_samples_are_granted_again() -> None:
    ledger = make()
    first = lease(ledger, 1)
    ledger.begin(1, 7, 0, 1, [first])
    ledger.refuse(1)
    ledger.refuse(1)
    (again,) = ledger.request(2, 0, ONE, [1, 2], {}).leases
    assert (again.start, again.id != first) == (0, True)
    ledger.begin(1, 7, 0, 1, [first])  # a repeat
    ledger.settle(1, 1)
    assert settled(ledger) == []


# -- 3. The last step of a fenced process ----------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "state"),
    [((2, 2), "applied"), ((2, 1), "in_part"), ((0, 1), "in_part"), ((0, 0), "returned")],
)
def test_the_shards_say_what_became_of_the_last_step(used: tuple[int, int], state: str) -> None:
    ledger = make()
    first = lease(ledger, 1)
    ledger.begin(1, 7, 3, 1, [first])
    ledger.investigate(1, 7)
    assert ledger.is_in_doubt(1)
    assert not ledger.remains(0, word(3, used[0], (first,)))
    assert ledger.is_in_doubt()
    assert ledger.remains(1, word(3, used[1], (first,)))
    assert not ledger.is_in_doubt()
    assert settled(ledger) == ([] if state == "returned" else [(1, 7, 3, state, (first,))])
    totals = ledger.book.totals()
    counts = {"applied": totals.applied, "in_part": totals.applied_in_part}
    counts["returned"] = totals.returned
    assert {name for name, number in counts.items() if number} == {state}
    assert sum(counts.values()) == 1


def test_a_step_that_only_another_shard_knows_proves_that_the_one_before_is_settled() -> None:
    ledger = make()
    first, second = lease(ledger, 1), lease(ledger, 1)
    ledger.begin(1, 7, 0, 1, [first])
    ledger.investigate(1, 7)
    ledger.remains(0, word(0, 2, (first,)))
    ledger.remains(1, word(1, 2, (second,)))
    assert settled(ledger) == [(1, 7, 0, "applied", (first,)), (1, 7, 1, "in_part", (second,))]


def test_a_step_that_was_begun_and_not_used_anywhere_proves_it_too() -> None:
    ledger = make()
    first, second = lease(ledger, 1), lease(ledger, 1)
    ledger.begin(1, 7, 0, 1, [first])
    ledger.investigate(1, 7)
    ledger.remains(0, word(0, 2, (first,)))
    ledger.remains(1, word(1, 0, (second,)))
    assert settled(ledger) == [(1, 7, 0, "applied", (first,))]
    assert ledger.book.totals().returned == 1


def test_only_shards_that_hold_parts_are_asked() -> None:
    ledger = make()
    ledger.investigate(1, 7)
    assert not ledger.remains(0, word(0, 0))
    assert not ledger.remains(2, word(0, 0))
    assert ledger.is_in_doubt(1)
    assert ledger.remains(1, word(0, 0))


def test_word_of_another_process_or_a_second_time_is_not_heard() -> None:
    ledger = make()
    ledger.investigate(1, 7)
    assert not ledger.remains(0, word(0, 0, incarnation=6))
    assert not ledger.remains(1, word(0, 0, incarnation=6))
    assert not ledger.remains(0, word(0, 0))
    assert not ledger.remains(0, word(0, 0))
    assert ledger.remains(1, word(0, 0))
    assert not ledger.remains(1, word(0, 0))


def test_two_processes_of_a_rank_may_be_in_doubt_at_once() -> None:
    ledger = make()
    first = lease(ledger, 1)
    ledger.begin(1, 7, 3, 1, [first])
    ledger.investigate(1, 7)
    ledger.investigate(1, 8)
    ledger.remains(0, word(3, 2, (first,)))
    ledger.remains(0, word(0, 0, incarnation=8))
    ledger.remains(1, word(3, 2, (first,)))
    assert ledger.is_in_doubt(1)
    assert settled(ledger) == [(1, 7, 3, "applied", (first,))]
    assert ledger.remains(1, word(0, 0, incarnation=8))
    assert settled(ledger) == []


def test_what_the_next_process_of_the_rank_does_proves_nothing() -> None:
    ledger = make()
    first, ahead = lease(ledger, 1), lease(ledger, 1)
    ledger.begin(1, 7, 3, 1, [first])
    ledger.investigate(1, 7)
    ledger.settle(1, 0)
    ledger.take_back(1)
    ledger.release(1)
    assert settled(ledger) == []
    assert ledger.book.totals().granted == 2, f"lease {ahead} may be in a step that is not known"
    ledger.remains(0, word(3, 1, (first,)))
    ledger.remains(1, word(3, 0, (first,)))
    assert settled(ledger) == [(1, 7, 3, "in_part", (first,))]


def test_a_step_that_was_settled_before_the_death_is_entered_once() -> None:
    ledger = make()
    first = lease(ledger, 1)
    ledger.begin(1, 7, 3, 1, [first])
    ledger.release(1)
    ledger.investigate(1, 7)
    ledger.remains(0, word(3, 2, (first,)))
    ledger.remains(1, word(3, 2, (first,)))
    assert settled(ledger) == [(1, 7, 3, "applied", (first,))]


# -- 4. Whatever else was granted goes back --------------------------------------------------------


def test_what_a_worker_that_is_gone_had_asked_for_ahead_goes_back() -> None:
    ledger = make()
    lease(ledger, 1)
    ledger.release(1)
    assert ledger.book.totals().granted == 0
    lease(ledger, 1)
    ledger.investigate(1, 7)
    ledger.remains(0, word(0, 0))
    ledger.remains(1, word(0, 0))
    assert ledger.book.totals().granted == 0


# -- Entries ---------------------------------------------------------------------------------------


def test_entries_come_in_order_and_once() -> None:
    ledger = make()
    event = WorkerEvent(1, 7, "joined", 0)
    ledger.note(event)
    ledger.begin(1, 7, 0, 1, [lease(ledger, 1)])
    ledger.settle(1, 1)
    ledger.end_passes()
    first, second, third, fourth = ledger.take_entries()
    assert (first, second) == (event, PassOpened(0, 0, 8, 0))
    assert isinstance(third, Contribution)
    assert fourth == PassEnd(0, 0, ((1, 8),))
    assert ledger.take_entries() == []


# -- All of it, in any order -----------------------------------------------------------------------


MOVES = ["ask", "begin", "refuse", "return", "break off", "release", "die none", "die some"]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(MOVES)), max_size=60))
def test_every_sample_has_one_end_whatever_workers_do(moves: list[tuple[int, str]]) -> None:
    ledger = Ledger(frozenset({0}), striped=False)
    held: dict[int, list[int]] = {0: [], 1: [], 2: []}
    incarnations = [1, 1, 1]
    for step, (worker, move) in enumerate(moves):
        make_move(ledger, worker, move, step, held, incarnations)
    for worker in held:
        ledger.release(worker)
    ledger.end_passes()
    entries = ledger.take_entries()
    used = [p for e in entries if isinstance(e, Contribution) for p in positions(e)]
    abandoned = [
        position
        for entry in entries
        if isinstance(entry, PassEnd)
        for start, stop in entry.abandoned
        for position in range(start, stop)
    ]
    was_opened = any(isinstance(entry, PassOpened) for entry in entries)
    assert sorted(used + abandoned) == (list(range(10)) if was_opened else [])
    totals = ledger.book.totals()
    assert (totals.granted, totals.open) == (0, 0)


def positions(entry: Contribution) -> Iterator[int]:
    for each in entry.leases:
        yield from range(each.start, each.start + each.length)


def make_move(
    ledger: Ledger,
    worker: int,
    move: str,
    step: int,
    held: dict[int, list[int]],
    incarnations: list[int],
) -> None:
    leases = held[worker]
    if move != "refuse":
        held[worker] = []
    match move:
        case "ask":
            grant = ledger.request(worker, 0, PassSpec(10, 2), [0, 1, 2], {})
            held[worker] = leases + [each.id for each in grant.leases]
        case "begin":
            ledger.begin(worker, incarnations[worker], step, 1, leases)
        case "refuse":
            ledger.refuse(worker)
        case "return":
            ledger.give_back(worker, leases, declined=False)
        case "break off":
            ledger.take_back(worker)
        case "release":
            ledger.release(worker)
        case _:
            die(ledger, worker, incarnations, some=move == "die some")


def die(ledger: Ledger, worker: int, incarnations: list[int], *, some: bool) -> None:
    """One of two parts of the step in progress was used, or none."""
    incarnation = incarnations[worker]
    incarnations[worker] += 1
    ledger.investigate(worker, incarnation)
    known = ledger._steps.get(worker)
    if known is None or not known.is_open:
        ledger.remains(0, Remains(worker, incarnation, 0, 0, (), 0, 2))
        return
    leases = ledger.book.consumed_by(worker)
    ledger.remains(0, Remains(worker, incarnation, known.number, 1, leases, int(some), 2))
