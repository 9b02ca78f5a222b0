from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allreduce.passes import Passes
from allreduce.record import Reading
from allreduce.state import Agreed, adopt, encode
from ps_core.errors import UsageError
from ps_core.leases import Lease, LeaseBook, PassSpec
from ps_core.point import Point

SPEC = PassSpec(num_samples=20, batch_size=2)


def workers(*ranks: int) -> dict[int, Passes]:
    """One for each rank, and these are the members."""
    made = {rank: Passes(rank) for rank in ranks}
    for each in made.values():
        each.set_members(ranks)
    return made


def draw(passes: Passes, spec: PassSpec = SPEC, loader: int = 0) -> Lease:
    (lease,) = passes.request(loader, spec).leases
    return lease


def positions(lease: Lease) -> list[int]:
    return list(range(lease.start, lease.start + lease.length))


def draw_all(passes: Passes, spec: PassSpec = SPEC, loader: int = 0) -> list[list[int]]:
    """The positions of every lease that is left for this worker."""
    drawn = []
    while leases := passes.request(loader, spec).leases:
        drawn += [positions(lease) for lease in leases]
    return drawn


def use(members: Iterable[Passes], *readings: Sequence[Reading]) -> None:
    """An update is made of what some workers have consumed."""
    everything = [reading for each in readings for reading in each]
    for each in members:
        each.use(everything)


def reading(start: int, length: int = 2, number: int = 0, num_positions: int = 20) -> Reading:
    return Reading(0, number, start, length, num_positions, 2, is_shared=False)


def joiner(rank: int, of: Passes) -> Passes:
    """One that is told all that others agree on."""
    agreed = Agreed(Passes(rank))
    adopt(agreed, encode(Agreed(of)))
    return agreed.passes


# -- Rule 1: the order -----------------------------------------------------------------------------


def test_batches_are_dealt_in_turn_by_rank() -> None:
    crew = workers(5, 2)
    assert draw_all(crew[2]) == [[0, 1], [4, 5], [8, 9], [12, 13], [16, 17]]
    assert draw_all(crew[5]) == [[2, 3], [6, 7], [10, 11], [14, 15], [18, 19]]


@given(
    num_samples=st.integers(0, 60),
    batch_size=st.integers(1, 7),
    num_workers=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_a_step_of_all_reads_what_one_process_with_so_many_times_the_batch_would(
    num_samples: int, batch_size: int, num_workers: int, drop_last: bool
) -> None:
    spec = PassSpec(num_samples, batch_size, drop_last=drop_last)
    crew = workers(*range(num_workers))
    size, count = batch_size * num_workers, spec.num_positions
    for start in range(0, count, size):
        grants = [each.request(0, spec) for each in crew.values()]
        step = [p for grant in grants for lease in grant.leases for p in positions(lease)]
        assert step == list(range(start, min(start + size, count)))
    assert not any(each.request(0, spec).leases for each in crew.values())


@given(
    num_samples=st.integers(0, 60),
    batch_size=st.integers(1, 7),
    global_batch_size=st.sampled_from([0, 5, 6, 11, 16]),
    drop_last=st.booleans(),
    speeds=st.lists(st.sampled_from([1.0, 2.0, 2.5, 7.0, 40.0]), min_size=1, max_size=5),
)
def test_the_order_is_that_of_the_lease_book_while_nobody_comes_or_goes(
    num_samples: int,
    batch_size: int,
    global_batch_size: int,
    drop_last: bool,
    speeds: list[float],
) -> None:
    spec = PassSpec(num_samples, batch_size, global_batch_size, drop_last)
    crew, book = workers(*range(len(speeds))), LeaseBook(striped=True)
    by_rank = dict(enumerate(speeds))
    for each in crew.values():
        each.speeds.update(by_rank)
        each.set_members(tuple(crew))
    for number in range(2):
        is_dry = False
        while not is_dry:
            is_dry = True
            for rank, each in crew.items():
                answer = book.request(0, spec, rank, list(crew), by_rank)
                grant = each.request(0, spec)
                expected = [] if answer.lease is None else positions(answer.lease)
                assert [p for lease in grant.leases for p in positions(lease)] == expected
                assert grant.number == answer.number == number
                is_dry = is_dry and not grant.leases
        book.end_passes()
        for each in crew.values():
            each.end()


def test_with_a_global_batch_size_an_update_is_shared_out_by_speed() -> None:
    spec = PassSpec(24, 1, global_batch_size=12)
    crew = workers(0, 1, 2)
    for each in crew.values():
        for rank, seconds in ((0, 1.0), (1, 2.0), (2, 6.0)):
            each.measured(rank, 12, seconds)  # 12, 6 and 2 samples per second
        each.end()
    sizes = {0: 12 * 12 / 20, 1: 12 * 6 / 20, 2: 12 * 2 / 20}
    shares = {rank: [len(drawn) for drawn in draw_all(each, spec)] for rank, each in crew.items()}
    assert shares == {0: [7, 7], 1: [4, 4], 2: [1, 1]}, f"rounded from {sizes}"


def measure(crew: Mapping[int, Passes]) -> None:
    for each in crew.values():
        each.measured(0, 60, 1.0)
        each.measured(1, 30, 1.0)


def test_the_speeds_are_those_when_all_last_were_at_the_same_point() -> None:
    spec = PassSpec(24, 1, global_batch_size=12)
    crew = workers(0, 1)
    first = draw(crew[0], spec)
    measure(crew)
    assert (first.length, draw(crew[1], spec).length) == (6, 6), "one begins before, one after"
    for each in crew.values():
        each.set_members((0, 1))
    assert [draw(each, spec).length for each in crew.values()] == [8, 4]


def test_the_next_pass_is_dealt_by_the_speeds_at_the_end_of_the_one_before() -> None:
    spec = PassSpec(24, 1, global_batch_size=12)
    crew = workers(0, 1)
    draw(crew[0], spec)
    measure(crew)
    for each in crew.values():
        each.end()
    first = draw(crew[0], spec)
    for each in crew.values():
        each.measured(1, 6000, 1.0)
    assert [first.length, draw(crew[1], spec).length] == [8, 4]


def test_a_worker_without_a_share_of_an_update_goes_on_with_the_next() -> None:
    spec = PassSpec(7, 1, global_batch_size=2)
    crew = workers(0, 1, 2)
    drawn = [draw_all(each, spec) for each in crew.values()]
    assert drawn == [[[0], [2], [4], [6]], [[1], [3], [5]], []]


def test_a_speed_is_a_mean_that_follows_slowly() -> None:
    (passes,) = workers(0).values()
    passes.measured(3, 0, 1.0)
    passes.measured(3, 8, 0.0)
    assert passes.speeds == {}, "there was nothing to measure"
    passes.measured(3, 10, 1.0)
    passes.measured(3, 60, 2.0)
    assert passes.speeds == {3: pytest.approx(10 + 0.2 * (30 - 10))}


# -- Rule 2: what an update is made of -------------------------------------------------------------


def test_only_what_an_update_is_made_of_is_used() -> None:
    crew = workers(0, 1)
    leases = [draw(each) for each in crew.values()]
    draw(crew[0])  # ahead
    crew[1].give_back([draw(crew[1]).id])
    readings = [each.consume([lease.id]) for each, lease in zip(crew.values(), leases, strict=True)]
    assert readings == [[reading(0)], [reading(2)]]
    use(crew.values(), *readings)
    for each in crew.values():
        assert each.open[0].free() == [range(4, 20)]


def test_a_worker_that_has_read_nothing_learns_of_the_pass_from_the_others() -> None:
    crew = workers(0, 1)
    use(crew.values(), crew[0].consume([draw(crew[0]).id]))
    assert crew[1].open[0].free() == [range(2, 20)]
    assert draw_all(crew[1])[0] == [2, 3]


def test_what_was_read_in_a_pass_that_has_ended_makes_no_difference() -> None:
    (passes,) = workers(0).values()
    draw(passes)
    passes.end()
    passes.use([reading(0)])
    assert passes.open == {}
    assert draw(passes).number == 1
    passes.use([reading(2)])
    assert passes.open[0].free() == [range(20)]


def test_a_lease_is_consumed_once_and_not_after_it_was_given_back() -> None:
    (passes,) = workers(0).values()
    first, second = draw(passes), draw(passes)
    assert passes.consume([first.id]) == [reading(0)]
    assert passes.consume([first.id, second.id]) == [reading(2)]
    third = draw(passes)
    assert passes.holds(third.id)
    passes.give_back([third.id, third.id, 99])
    assert not passes.holds(third.id)
    assert passes.consume([third.id]) == []


@pytest.mark.parametrize(
    ("own", "theirs", "said"),
    [
        (SPEC, replace(SPEC, num_samples=18), "18 samples in batches of 2"),
        (SPEC, replace(SPEC, batch_size=5), "20 samples in batches of 5"),
        (replace(SPEC, global_batch_size=8), SPEC, "20 samples in updates of 8"),
        (SPEC, replace(SPEC, global_batch_size=2), "20 samples in updates of 2"),
    ],
    ids=["samples", "batch_size", "global_batch_size", "only how it is shared out"],
)
def test_workers_that_read_a_pass_differently_are_told_so(
    own: PassSpec, theirs: PassSpec, said: str
) -> None:
    crew = workers(0, 1)
    read = crew[1].consume([draw(crew[1], theirs).id])
    draw(crew[0], own)
    with pytest.raises(UsageError, match="loader 0 differently") as raised:
        crew[0].use(read)
    assert said in str(raised.value)
    crew[1].use(read)
    with pytest.raises(UsageError, match="loader 0 differently"):
        crew[1].request(0, own)


# -- Rule 3: other members -------------------------------------------------------------------------


def test_what_is_free_is_dealt_anew_when_the_members_change() -> None:
    crew = workers(0, 1, 2)
    readings = [each.consume([draw(each).id]) for each in crew.values()]
    use(crew.values(), *readings)
    ahead = {rank: draw(each) for rank, each in crew.items()}
    for rank in (0, 2):
        crew[rank].set_members((0, 2))
        assert not crew[rank].holds(ahead[rank].id)
        assert crew[rank].consume([ahead[rank].id]) == []
    assert draw_all(crew[0]) == [[6, 7], [10, 11], [14, 15], [18, 19]]
    assert draw_all(crew[2]) == [[8, 9], [12, 13], [16, 17]]


def test_what_is_behind_a_step_that_a_loss_has_broken_is_dealt_again() -> None:
    crew = workers(0, 1, 2)
    for each in crew.values():
        each.consume([draw(each).id])
    for rank in (0, 2):
        crew[rank].set_members((0, 2))
    assert [lease.start for lease in map(draw, (crew[0], crew[2]))] == [0, 2]


def test_who_joins_is_dealt_in() -> None:
    crew = workers(0, 1)
    use(crew.values(), *(each.consume([draw(each).id]) for each in crew.values()))
    draw(crew[0])
    crew[4] = joiner(4, crew[0])
    for each in crew.values():
        each.set_members((0, 1, 4))
    firsts = [draw(each) for each in crew.values()]
    assert [lease.start for lease in firsts] == [4, 6, 8]
    assert {lease.number for lease in firsts} == {0}


def test_who_joins_between_passes_begins_with_the_next() -> None:
    crew = workers(0, 1)
    for each in crew.values():
        draw(each)
        each.end()
    crew[2] = joiner(2, crew[1])
    for each in crew.values():
        each.set_members((0, 1, 2))
    firsts = [draw(each) for each in crew.values()]
    assert [(lease.number, lease.start) for lease in firsts] == [(1, 0), (1, 2), (1, 4)]


# -- Rule 4: the end -------------------------------------------------------------------------------


def step_with_all(crew: Mapping[int, Passes]) -> None:
    """Every worker uses all that is left for it but its last batch."""
    readings = []
    for each in crew.values():
        leases = []
        while grant := each.request(0, SPEC).leases:
            leases += [lease.id for lease in grant]
        readings.append(each.consume(leases[:-1]))
    use(crew.values(), *readings)


def test_what_is_free_at_the_end_is_dealt_to_those_who_want_more() -> None:
    crew = workers(0, 1, 2)
    step_with_all(crew)
    assert [each.goes_on((2, 0)) for each in crew.values()] == [True] * 3
    grants = {rank: each.more() for rank, each in crew.items()}
    assert grants[1] is None
    given = [grants[rank] for rank in (0, 2)]
    assert [grant and positions(grant.leases[0]) for grant in given] == [[14, 15], [16, 17]]
    readings = [crew[rank].consume([grant.leases[0].id]) for rank, grant in grants.items() if grant]
    use(crew.values(), *readings)
    assert [each.goes_on((0,)) for each in crew.values()] == [True] * 3
    grant = crew[0].more()
    assert grant is not None
    assert positions(grant.leases[0]) == [18, 19]
    use(crew.values(), crew[0].consume([grant.leases[0].id]))
    assert not any(each.goes_on((0, 1, 2)) for each in crew.values()), "nothing is left"


def test_a_pass_ends_with_what_nobody_wants() -> None:
    crew = workers(0, 1)
    step_with_all(crew)
    assert [each.goes_on(()) for each in crew.values()] == [False] * 2
    for each in crew.values():
        each.end()
    assert [draw(each).number for each in crew.values()] == [1, 1]


def test_a_pass_ends_without_what_was_dealt_once_more_in_vain() -> None:
    crew = workers(0, 1)
    step_with_all(crew)
    for expected in (True, False):
        assert [each.goes_on((0, 1)) for each in crew.values()] == [expected] * 2
        for each in crew.values():
            if expected and (grant := each.more()):
                each.give_back([lease.id for lease in grant.leases])


def test_there_is_no_more_for_who_has_read_nothing_or_gets_nothing() -> None:
    crew = workers(0, 1)
    use(crew.values(), [reading(start) for start in range(0, 18, 2)])
    assert [each.goes_on((0, 1)) for each in crew.values()] == [True] * 2
    assert crew[0].more() is None, "it does not know what it reads"
    draw_all(crew[1])
    for each in crew.values():
        each.use([])
    crew[1].set_members((0, 1))
    assert crew[1].more() is None, "the only batch is another's"


def test_what_was_drawn_before_the_end_is_void_after_it() -> None:
    (passes,) = workers(0).values()
    lease = draw(passes)
    assert passes.goes_on((0,))
    assert not passes.holds(lease.id)
    lease = draw(passes)
    passes.end()
    assert passes.consume([lease.id]) == []


def test_every_pass_of_every_loader_ends_at_once() -> None:
    (passes,) = workers(0).values()
    for loader in (0, 5):
        draw(passes, loader=loader)
    passes.end()
    assert [draw(passes, loader=loader).number for loader in (0, 5, 9)] == [1, 1, 0]


def test_a_pass_costs_as_little_for_many_samples_as_for_few() -> None:
    spec = PassSpec(10**13, 10**6)
    crew = workers(0, 1)
    for start in (0, 2 * 10**6):
        leases = [draw(each, spec) for each in crew.values()]
        assert [lease.start for lease in leases] == [start, start + 10**6]
        use(crew.values(), *(e.consume([x.id]) for e, x in zip(crew.values(), leases, strict=True)))
    for each in crew.values():
        each.set_members((0, 1))
    assert draw(crew[1], spec).start == 5 * 10**6
    assert crew[0].goes_on((0, 1))


# -- Rule 5: late ----------------------------------------------------------------------------------


def test_who_comes_to_a_pass_that_has_ended_is_told_so() -> None:
    (passes,) = workers(0).values()
    draw(passes, replace(SPEC, point=Point(1, 3, 1)))
    passes.end()
    for late in (passes, joiner(4, passes)):
        for point in (Point(1, 3, 1), Point(1, 2, 9), Point(0, 0, 1)):
            grant = late.request(0, replace(SPEC, point=point))
            assert (grant.is_over, grant.leases) == (True, ())
        assert late.open == {}
        grant = late.request(0, replace(SPEC, point=Point(1, 3, 2)))
        assert (grant.is_over, grant.number) == (False, 1)


def test_workers_whose_samples_differ_are_told_so() -> None:
    passes, others = Passes(0), Passes(1)
    for each in (passes, others):
        each.set_members((0, 1))
    passes.request(0, replace(SPEC, fingerprint=7))
    lease = others.request(0, replace(SPEC, fingerprint=8)).leases[0]
    with pytest.raises(UsageError, match="loader 0 has other samples on one worker"):
        passes.use(others.consume([lease.id]))
