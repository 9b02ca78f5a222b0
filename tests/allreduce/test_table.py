import math

import pytest

from allreduce.record import Call, Reading, Record
from allreduce.table import Table
from ps_core.errors import UsageError
from ps_core.exchange import Purpose
from ps_core.point import Point


def step(samples: int, hyperparameters: int = 1, **fields: object) -> Record:
    return Record(Call.STEP, 3, samples=samples, hyperparameters=hyperparameters, **fields)  # type: ignore[arg-type]  # of a record


def waits(
    purpose: Purpose = Purpose.EPOCH, *values: float, weight: float = 1.0, **fields: object
) -> Record:
    return Record(Call(purpose), 3, values=values, weight=weight, **fields)  # type: ignore[arg-type]  # of a record


@pytest.mark.parametrize(
    ("others", "hands_over"),
    [([waits()], True), ([step(1)], False), ([Record(Call.LEAVE, 3)], False)],
)
def test_extras_are_handed_over_when_all_have_come(others: list[Record], hands_over: bool) -> None:
    rows = [waits(hands_over=True), *others]
    assert Table(dict(enumerate(rows))).hands_over is hands_over
    assert not Table({0: waits(), 1: waits()}).hands_over


def reading(start: int) -> Reading:
    return Reading(0, 0, start, 4, 100, 4, is_shared=False)


# -- Steps -----------------------------------------------------------------------------------------


def test_the_total_is_of_all_who_take_the_step() -> None:
    table = Table({0: step(3), 2: waits(), 5: step(4), 6: step(0)})
    assert table.has_step
    assert table.total == 7
    assert not Table({0: waits(), 1: Record(Call.LEAVE, 3)}).has_step


def test_the_leader_is_the_lowest_with_gradients() -> None:
    assert Table({1: waits(), 2: step(0), 4: step(5), 7: step(9)}).leader == 4


def test_without_gradients_the_leader_is_the_lowest_that_takes_the_step() -> None:
    assert Table({1: waits(), 2: step(0), 4: step(0)}).leader == 2


def test_of_one_mind_are_those_who_all_have_the_hyperparameters() -> None:
    assert Table({0: step(1, 8), 1: step(1, 8)}).is_of_one_mind
    assert not Table({0: step(1, 8), 1: step(1, 9)}).is_of_one_mind
    assert not Table({0: step(1, 8), 1: waits()}).is_of_one_mind, "who waits has none"


def test_they_differ_only_among_those_who_take_the_step() -> None:
    assert not Table({0: step(1, 8), 1: step(1, 8), 2: waits()}).differ
    assert Table({0: step(1, 8), 1: step(0, 9), 2: waits()}).differ


def test_the_update_is_made_of_what_all_have_read() -> None:
    third = step(8, readings=(reading(8), reading(4)))
    rows = {0: step(4, readings=(reading(0),)), 1: waits(), 2: third}
    assert list(Table(rows).readings()) == [reading(0), reading(8), reading(4)]


# -- Who wants what --------------------------------------------------------------------------------


def test_who_leaves_and_who_reads_the_state_is_named_by_rank() -> None:
    table = Table({0: step(1), 3: Record(Call.LEAVE, 3), 4: Record(Call.READ, 3), 9: waits()})
    assert table.leavers == (3,)
    assert table.readers == (4,)
    assert Table({0: step(1)}).leavers == Table({0: step(1)}).readers == ()


def test_takers_are_those_who_go_on_with_their_pass() -> None:
    table = Table({0: waits(takes_leases=True), 1: waits(), 4: waits(takes_leases=True)})
    assert table.takers == (0, 4)


def test_the_state_is_of_whoever_has_written_some() -> None:
    assert Table({0: waits(Purpose.LOAD), 2: waits(Purpose.LOAD, has_state=True)}).writer == 2
    assert Table({0: waits(Purpose.LOAD)}).writer is None


def test_a_guest_is_seen_by_anybody() -> None:
    assert Table({0: step(1), 1: step(1, has_guest=True)}).has_guest
    assert not Table({0: step(1), 1: step(1)}).has_guest


# -- Meetings --------------------------------------------------------------------------------------


def test_a_meeting_is_over_when_all_have_come() -> None:
    assert Table({0: waits(Purpose.MEAN), 1: waits(Purpose.MEAN)}).meeting() is Purpose.MEAN


@pytest.mark.parametrize("other", [step(4), Record(Call.READ, 3), Record(Call.LEAVE, 3)])
def test_nobody_has_met_while_somebody_does_something_else(other: Record) -> None:
    table = Table({0: waits(), 1: other})
    assert table.meeting() is None
    assert set(table.arrivals) == {0}


def test_means_are_weighted() -> None:
    met = Table({4: waits(Purpose.MEAN, 5.0, -1.0, weight=3), 1: waits(Purpose.MEAN, 1.0, 7.0)})
    assert met.means() == ((3 * 5 + 1) / 4, (3 * -1 + 7) / 4)


def test_what_has_no_weight_does_not_count_whatever_it_is() -> None:
    met = Table({0: waits(Purpose.MEAN, math.nan, weight=0), 1: waits(Purpose.MEAN, 2.0)})
    assert met.means() == (2.0,)
    (nothing,) = Table({0: waits(Purpose.MEAN, 1.0, weight=0)}).means()
    assert math.isnan(nothing)


@pytest.mark.parametrize(
    ("first", "other", "said"),
    [
        (waits(Purpose.EPOCH), waits(Purpose.MEAN, 1.0), ("'epoch'", "'mean'")),
        (waits(point=Point(1, 2, 1)), waits(point=Point(1, 2, 2)), ("time 1 in", "time 2 in")),
        (
            waits(Purpose.MEAN, 1.0),
            waits(Purpose.MEAN, 1.0, 2.0),
            ("worker 8 averages 2 numbers", "worker 3 1"),
        ),
    ],
    ids=["purposes", "calls", "numbers"],
)
def test_workers_that_come_for_different_things_are_both_named(
    first: Record, other: Record, said: tuple[str, str]
) -> None:
    table = Table({3: first, 5: first, 8: other})
    with pytest.raises(UsageError) as raised:
        table.meeting()
    for name in ("worker 3", "worker 8", *said):
        assert name in str(raised.value)


# -- Replicas of several workers -------------------------------------------------------------------


def test_what_is_said_of_samples_the_first_worker_of_a_replica_says() -> None:
    rows = {
        0: step(0, readings=()),
        1: step(50, readings=(reading(50),)),
        2: step(3, readings=(reading(0),)),
        3: step(60),
        4: waits(takes_leases=True),
        5: waits(),
    }
    table = Table(rows, num_stages=2)
    assert table.replicas == {0: rows[0], 1: rows[2], 2: rows[4]}
    assert table.total == 3
    assert table.leader == 1, "a replica, not a rank"
    assert table.takers == (2,)
    assert list(table.readings()) == [reading(0)]


def test_who_leaves_and_what_all_have_come_for_is_said_by_every_worker() -> None:
    ranks = {0: waits(), 1: waits(), 2: waits(), 3: Record(Call.LEAVE, 3)}
    table = Table(ranks, num_stages=2)
    assert table.leavers == (3,)
    assert table.meeting() is None
    with pytest.raises(UsageError, match="worker 3"):
        Table({**ranks, 3: waits(Purpose.MEAN)}, num_stages=2).meeting()


def test_the_state_of_a_replica_is_that_of_all_its_workers() -> None:
    rows = {rank: waits(Purpose.LOAD, has_state=rank >= 2) for rank in range(4)}
    assert Table(rows, num_stages=2).writer == 1


def test_batches_of_unequal_sizes_that_weigh_the_same_are_noticed() -> None:
    def silent(samples: int) -> Record:
        return Record(Call.STEP, 3, samples=samples, given_weight=1.0)

    assert Table({0: silent(4), 1: silent(5)}).unequal == (0, 1)
    assert Table({0: silent(4), 1: silent(4), 2: silent(0), 3: step(7)}).unequal is None
    assert Table({0: step(4), 1: step(5)}).unequal is None


def test_weights_that_are_no_numbers_of_samples_add_up() -> None:
    rows = {r: Record(Call.STEP, 3, samples=4, given_weight=w) for r, w in enumerate((0.25, 0.0))}
    assert Table(rows).total == 0.25
    assert Table(rows).leader == 0
