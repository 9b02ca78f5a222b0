import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise, zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_core.lease_pool import Asking, Dealer, FirstCome, Piece, Pool, Rounds, Stripes, shares

NO_SPEEDS: Mapping[int, float] = {}


def ask(
    worker: int,
    workers: Sequence[int],
    batch: int = 10,
    total: int = 0,
    speeds: Mapping[int, float] = NO_SPEEDS,
) -> Asking:
    return Asking(worker, tuple(workers), batch, total, speeds)


def drain(dealer: Dealer, workers: Sequence[int], batch: int = 10) -> dict[int, list[range]]:
    """What everybody gets when they ask in turn until nobody gets anything."""
    got: dict[int, list[range]] = {worker: [] for worker in workers}
    waiting = list(workers)
    while waiting:
        worker = waiting.pop(0)
        taken = dealer.take(ask(worker, workers, batch))
        if taken is not None:
            got[worker].append(taken)
            waiting.append(worker)
    return got


# -- First come, first served ----------------------------------------------------------------------


def test_first_come_gives_the_lowest_positions_and_fewer_at_the_end() -> None:
    dealer = FirstCome([range(25)])
    assert [dealer.take(ask(worker, [0, 1])) for worker in (1, 1, 0, 0)] == [
        range(0, 10),
        range(10, 20),
        range(20, 25),
        None,
    ]


def test_first_come_gives_what_came_back_before_what_nobody_has_had() -> None:
    dealer = FirstCome([range(100)])
    returned = dealer.take(ask(0, [0, 1]))
    assert returned is not None
    dealer.take(ask(1, [0, 1]))
    dealer.put_back(returned)
    assert dealer.take(ask(1, [0, 1])) == returned
    assert dealer.take(ask(0, [0, 1])) == range(20, 30)


def test_first_come_gives_a_worker_as_much_as_it_asks_for() -> None:
    dealer = FirstCome([range(100)])
    assert dealer.take(ask(0, [0, 1], batch=32)) == range(32)
    assert dealer.take(ask(1, [0, 1], batch=8)) == range(32, 40)


def test_first_come_gives_a_worker_its_share_of_a_global_batch() -> None:
    dealer = FirstCome([range(100)])
    speeds = {0: 30.0, 1: 10.0}
    assert dealer.take(ask(0, [0, 1], total=16, speeds=speeds)) == range(0, 12)
    assert dealer.take(ask(0, [0, 1], total=16, speeds=speeds)) == range(12, 24)
    assert dealer.take(ask(1, [0, 1], total=16, speeds=speeds)) == range(24, 28)


def test_first_come_leaves_nobody_out_of_a_global_batch_that_is_too_small() -> None:
    assert FirstCome([range(9)]).take(ask(2, [0, 1, 2], total=2)) == range(1)


# -- Stripes ---------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 5), st.data())
def test_a_worker_gets_every_nth_batch_whoever_asks_first(
    num_samples: int, batch: int, num_workers: int, data: st.DataObject
) -> None:
    workers = range(num_workers)
    dealer = Stripes([range(num_samples)])
    got: dict[int, list[range]] = {worker: [] for worker in workers}
    waiting = list(workers)
    while waiting:
        worker = data.draw(st.sampled_from(waiting))
        taken = dealer.take(ask(worker, workers, batch))
        if taken is None:
            waiting.remove(worker)
        else:
            got[worker].append(taken)
    starts = [*range(0, num_samples, batch), num_samples]
    last = len(starts) - 2
    if batch > 2 and last > 0 and last % num_workers and num_samples % batch == 1:
        starts[last] -= 1
    batches = [range(start, end) for start, end in pairwise(starts)]
    assert got == {worker: batches[worker::num_workers] for worker in workers}


@pytest.mark.parametrize(
    ("count", "batch", "lengths"),
    [
        (21, 4, {0: [4, 4, 3], 1: [4, 4, 2]}),
        (17, 4, {0: [4, 4, 1], 1: [4, 4]}),  # an update of one sample, as in one process
        (22, 4, {0: [4, 4, 4], 1: [4, 4, 2]}),
        (7, 2, {0: [2, 2], 1: [2, 1]}),
        (4, 3, {0: [2], 1: [2]}),
    ],
)
def test_a_last_unit_of_one_takes_another_from_its_neighbour_in_the_same_update(
    count: int, batch: int, lengths: dict[int, list[int]]
) -> None:
    got = drain(Stripes([range(count)]), [0, 1], batch)
    assert {worker: [len(unit) for unit in units] for worker, units in got.items()} == lengths
    taken = [
        position for units in zip_longest(*got.values()) for u in units for position in u or ()
    ]
    assert taken == [*range(count)]


def test_a_unit_that_nobody_has_taken_is_free_where_the_last_one_has_grown() -> None:
    stripes = Stripes([range(9)])
    assert stripes.take(ask(1, [0, 1], 4)) == range(4, 8)
    assert list(stripes.free()) == [range(4), range(8, 9)]
    stripes = Stripes([range(13)])
    assert [stripes.take(ask(1, [0, 1], 4)) for _ in range(2)] == [range(4, 8), range(11, 13)]
    assert list(stripes.free()) == [range(4), range(8, 11)]


def test_stripes_go_by_rank_among_the_workers_that_are_there() -> None:
    assert drain(Stripes([range(50)]), [2, 5]) == {
        2: [range(0, 10), range(20, 30), range(40, 50)],
        5: [range(10, 20), range(30, 40)],
    }


def test_no_unit_reaches_over_a_gap() -> None:
    assert drain(Stripes([range(0, 15), range(20, 30)]), [0, 1]) == {
        0: [range(0, 10), range(20, 30)],
        1: [range(10, 15)],
    }


def test_what_came_back_waits_until_a_worker_has_taken_its_own() -> None:
    dealer = Stripes([range(40)])
    returned = dealer.take(ask(0, [0, 1]))
    assert returned == range(0, 10)
    dealer.put_back(returned)
    assert [dealer.take(ask(1, [0, 1])) for _ in range(4)] == [
        range(10, 20),
        range(30, 40),
        range(0, 10),
        None,
    ]


def test_a_worker_that_has_taken_its_own_gets_nothing_of_another_workers() -> None:
    dealer = Stripes([range(40)])
    assert [dealer.take(ask(0, [0, 1])) for _ in range(3)] == [range(0, 10), range(20, 30), None]
    assert list(dealer.free()) == [range(10, 20), range(30, 40)]


def test_units_are_dealt_anew_when_a_worker_is_gone() -> None:
    dealer = Stripes([range(90)])
    first = [dealer.take(ask(worker, [0, 1, 2])) for worker in (0, 1, 2)]
    assert first[2] == range(20, 30)
    dealer.put_back(range(20, 30))  # worker 2 is gone with its first batch
    assert drain(dealer, [0, 1]) == {
        0: [range(20, 30), range(40, 50), range(60, 70), range(80, 90)],
        1: [range(30, 40), range(50, 60), range(70, 80)],
    }


def test_units_are_dealt_anew_when_a_worker_comes() -> None:
    dealer = Stripes([range(60)])
    assert dealer.take(ask(0, [0])) == range(0, 10)
    assert drain(dealer, [0, 1]) == {
        0: [range(10, 20), range(30, 40), range(50, 60)],
        1: [range(20, 30), range(40, 50)],
    }


@given(st.integers(0, 120), st.integers(1, 9), st.lists(st.integers(0, 3), max_size=20))
def test_a_new_deal_has_exactly_what_nobody_has_taken(
    num_samples: int, batch: int, asking: list[int]
) -> None:
    dealer = Stripes([range(num_samples)])
    taken = [dealer.take(ask(worker, range(4), batch)) for worker in asking]
    missing = {position for positions in taken if positions for position in positions}
    assert [p for positions in dealer.free() for p in positions] == [
        position for position in range(num_samples) if position not in missing
    ]
    rest = drain(dealer, [7, 9], batch)
    handed_out = sorted(p for pieces in rest.values() for piece in pieces for p in piece)
    assert handed_out == sorted(set(range(num_samples)) - missing)


def test_workers_with_different_batch_sizes_are_served_first_come() -> None:
    dealer = Stripes([range(100)])
    assert dealer.take(ask(0, [0, 1], batch=20)) == range(0, 20)
    assert dealer.take(ask(1, [0, 1], batch=10)) == range(20, 30)
    assert dealer.take(ask(0, [0, 1], batch=20)) == range(30, 50)
    assert dealer.take(ask(0, [0, 1], batch=20)) == range(50, 70)


def test_stripes_do_not_come_back_in_a_pass_with_different_batch_sizes() -> None:
    dealer = Stripes([range(100)])
    for worker, batch in ((0, 20), (1, 10)):
        dealer.take(ask(worker, [0, 1], batch))
    assert dealer.take(ask(0, [0, 2], 20)) == range(30, 50)
    assert dealer.take(ask(2, [0, 2], 20)) == range(50, 70)
    assert dealer.take(ask(2, [0, 2], 20)) == range(70, 90)


# -- Rounds ----------------------------------------------------------------------------------------


def test_a_round_is_shared_out_by_speed_and_laid_out_by_rank() -> None:
    dealer = Rounds([range(64)])
    speeds = {0: 10.0, 1: 20.0, 2: 10.0}
    asking = [ask(worker, [0, 1, 2], total=32, speeds=speeds) for worker in (2, 0, 1)]
    assert [dealer.take(one) for one in asking] == [range(24, 32), range(0, 8), range(8, 24)]
    assert [dealer.take(one) for one in asking] == [range(56, 64), range(32, 40), range(40, 56)]
    assert [dealer.take(one) for one in asking] == [None, None, None]


def test_a_worker_takes_its_shares_from_the_earliest_round_on() -> None:
    dealer = Rounds([range(40)])
    fast, slow = (ask(worker, [0, 1], total=20) for worker in (0, 1))
    assert [dealer.take(fast) for _ in range(3)] == [range(0, 10), range(20, 30), None]
    assert [dealer.take(slow) for _ in range(3)] == [range(10, 20), range(30, 40), None]


def test_speeds_count_when_a_round_opens() -> None:
    dealer = Rounds([range(40)])
    assert dealer.take(ask(0, [0, 1], total=20)) == range(0, 10)
    speeds = {0: 1.0, 1: 3.0}
    assert dealer.take(ask(1, [0, 1], total=20, speeds=speeds)) == range(10, 20)
    assert dealer.take(ask(1, [0, 1], total=20, speeds=speeds)) == range(25, 40)


def test_the_last_round_has_what_is_left() -> None:
    dealer = Rounds([range(26)])
    asking = [ask(worker, [0, 1], total=20) for worker in (0, 1)]
    assert [dealer.take(one) for one in asking] == [range(0, 10), range(10, 20)]
    assert [dealer.take(one) for one in asking] == [range(20, 23), range(23, 26)]


def test_the_shares_of_a_worker_that_is_gone_are_free_again() -> None:
    dealer = Rounds([range(60)])
    for worker in (0, 1):
        dealer.take(ask(worker, [0, 1, 2], total=30))
    asking = [ask(worker, [0, 1], total=30) for worker in (0, 1)]
    assert [dealer.take(one) for one in asking] == [range(20, 35), range(35, 50)]
    assert [dealer.take(one) for one in asking] == [range(50, 55), range(55, 60)]


def test_a_new_worker_has_its_first_share_in_the_next_new_round() -> None:
    dealer = Rounds([range(80)])
    assert dealer.take(ask(0, [0, 1], total=20)) == range(0, 10)
    assert dealer.take(ask(2, [0, 1, 2], total=30)) == range(40, 50)
    assert dealer.take(ask(1, [0, 1, 2], total=30)) == range(10, 20)


def test_what_came_back_is_the_next_round() -> None:
    dealer = Rounds([range(60)])
    returned = dealer.take(ask(0, [0, 1], total=20))
    assert returned == range(0, 10)
    dealer.put_back(returned)
    assert dealer.take(ask(0, [0, 1], total=20)) == range(0, 5)
    assert dealer.take(ask(0, [0, 1], total=20)) == range(20, 30)


def test_a_worker_without_a_share_of_a_round_goes_on_with_the_next() -> None:
    dealer = Rounds([range(60)])
    for worker in (0, 1, 2):
        dealer.take(ask(worker, [0, 1, 2], total=30))
    dealer.put_back(range(0, 2))  # too short for three workers
    everybody = [ask(worker, [0, 1, 2], total=30) for worker in (0, 1, 2)]
    assert [dealer.take(one) for one in everybody] == [range(30, 40), range(40, 50), range(50, 60)]
    assert dealer.take(everybody[2]) is None
    assert [dealer.take(one) for one in everybody] == [range(0, 1), range(1, 2), None]


def test_a_worker_that_has_no_share_leaves_the_round_to_others() -> None:
    dealer = Rounds([range(10)])
    speeds = {0: 1.0, 1: 50.0, 2: 50.0}
    slow, fast = (ask(worker, [0, 1, 2], total=2, speeds=speeds) for worker in (0, 1))
    assert [dealer.take(slow), dealer.take(slow)] == [None, None]
    assert [dealer.take(fast) for _ in range(4)] == [
        range(start, start + 1) for start in (0, 2, 4, 6)
    ]
    assert dealer.take(slow) is None
    # No round is open that it could have had no part in: now that all are equally fast, it has one.
    assert dealer.take(ask(0, [0, 1, 2], total=2)) == range(8, 9)


# -- Shares ----------------------------------------------------------------------------------------

speeds_of_many = st.dictionaries(
    st.integers(0, 9), st.floats(0, 1e308) | st.sampled_from([math.nan, math.inf, -1.0])
)
many_workers = st.sets(st.integers(0, 9), min_size=1).map(sorted)


@pytest.mark.parametrize(
    ("total", "speeds", "expected"),
    [
        (12, {}, [4, 4, 4]),
        (8, {}, [3, 3, 2]),  # the lower rank first
        (40, {0: 2.0, 1: 1.0, 2: 1.0}, [20, 10, 10]),
        (10, {0: 3.0, 1: 2.0, 2: 2.0}, [4, 3, 3]),  # 4.29 2.86 2.86
        (9, {0: 1.0, 1: 2.0}, [2, 4, 3]),  # worker 2 counts as 1.5
        (9, {0: 1.0, 1: 2.0, 2: 0.0}, [2, 4, 3]),
        (9, {0: 1.0, 1: 2.0, 2: math.nan}, [2, 4, 3]),
        (9, {0: 1.0, 1: 2.0, 2: math.inf}, [2, 4, 3]),
        (100, {0: 1e-9, 1: 1.0, 2: 1.0}, [1, 49, 50]),  # nobody is left out
        (3, {0: 1.0, 1: 1e9, 2: 1.0}, [1, 1, 1]),
        (2, {0: 1.0, 1: 50.0, 2: 50.0}, [0, 1, 1]),
        (0, {}, [0, 0, 0]),
    ],
)
def test_a_batch_is_split_by_speed(
    total: int, speeds: dict[int, float], expected: list[int]
) -> None:
    assert shares(total, [0, 1, 2], speeds) == dict(enumerate(expected))


@given(st.integers(0, 10**12), many_workers, speeds_of_many)
def test_shares_sum_up_and_leave_nobody_out(
    total: int, workers: list[int], speeds: dict[int, float]
) -> None:
    sizes = shares(total, workers, speeds)
    assert list(sizes) == workers
    assert sum(sizes.values()) == total
    assert min(sizes.values()) >= (1 if total >= len(workers) else 0)


@given(
    st.integers(0, 10**6),
    st.dictionaries(st.integers(0, 9), st.floats(1e-3, 1e3), min_size=1),
)
def test_no_share_is_a_sample_or_more_from_its_quota(total: int, speeds: dict[int, float]) -> None:
    workers = sorted(speeds)
    whole = sum(map(Fraction, speeds.values()))
    quotas = {worker: total * Fraction(speed) / whole for worker, speed in speeds.items()}
    if min(quotas.values()) >= 1:
        sizes = shares(total, workers, speeds)
        assert all(abs(sizes[worker] - quotas[worker]) < 1 for worker in workers)


# -- What was declined -----------------------------------------------------------------------------


def test_what_was_declined_goes_out_last() -> None:
    pool = Pool(FirstCome([range(30)]))
    piece = pool.take(ask(0, [0, 1]))
    assert piece == Piece(range(0, 10))
    pool.put_back(Piece(range(0, 10), declined_by=0))
    assert [pool.take(ask(1, [0, 1])) for _ in range(4)] == [
        Piece(range(10, 20)),
        Piece(range(20, 30)),
        Piece(range(0, 10), declined_by=0),
        None,
    ]


def test_what_was_declined_goes_to_another_worker_if_there_is_one() -> None:
    pool = Pool(FirstCome([range(10)]))
    pool.take(ask(0, [0, 1]))
    pool.put_back(Piece(range(10), declined_by=0))
    assert pool.take(ask(0, [0, 1])) is None
    assert pool.take(ask(0, [0])) == Piece(range(10), declined_by=0)


def test_a_smaller_batch_takes_a_part_of_what_was_declined() -> None:
    pool = Pool(FirstCome([range(10)]))
    pool.take(ask(0, [0, 1]))
    pool.put_back(Piece(range(10), declined_by=0))
    assert pool.take(ask(1, [0, 1], batch=6)) == Piece(range(0, 6), declined_by=0)
    assert pool.take(ask(1, [0, 1], batch=6)) == Piece(range(6, 10), declined_by=0)


def test_free_positions_are_counted_wherever_they_are() -> None:
    pool = Pool(Stripes([range(100)]))
    for worker in (0, 1, 0):
        pool.take(ask(worker, [0, 1]))
    assert pool.num_free == 70
    pool.put_back(Piece(range(0, 10), declined_by=0))
    pool.put_back(Piece(range(10, 20)))
    assert pool.num_free == 90 == len(pool.free())
    assert list(pool.free()) == [range(0, 20), range(30, 100)]
