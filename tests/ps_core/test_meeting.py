import math

import pytest

from ps_core.errors import UsageError
from ps_core.exchange import Arrival, Purpose
from ps_core.meeting import check_same, weighted_means


def mean(*values: float, weight: float = 1.0) -> Arrival:
    return Arrival(Purpose.MEAN, 0, values, weight)


def test_means_are_weighted() -> None:
    # (3 x 1 + 1 x 5) / 4 and (3 x 10 + 1 x 20) / 4
    brought = [mean(1.0, 10.0, weight=3.0), mean(5.0, 20.0, weight=1.0)]
    assert weighted_means(brought) == (2.0, 12.5)


def test_who_has_no_weight_does_not_spoil_the_mean() -> None:
    assert weighted_means([mean(math.nan, weight=0.0), mean(5.0, weight=2.0)]) == (5.0,)


def test_a_mean_of_nothing_is_not_a_number() -> None:
    (value,) = weighted_means([mean(1.0, weight=0.0)])
    assert math.isnan(value)


def test_meetings_without_numbers_have_no_means() -> None:
    assert weighted_means([Arrival(Purpose.EPOCH, 3), Arrival(Purpose.EPOCH, 5)]) == ()


def test_the_same_purpose_is_the_same_whatever_the_step_and_the_numbers() -> None:
    check_same(0, mean(1.0), 1, mean(2.0, weight=9.0))
    check_same(0, Arrival(Purpose.EPOCH, 3), 1, Arrival(Purpose.EPOCH, 7, takes_leases=True))


def test_another_purpose_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match="worker 2 waits for all workers at 'epoch' and worker 0"):
        check_same(2, Arrival(Purpose.EPOCH, 0), 0, mean(1.0))


def test_another_count_of_numbers_is_refused() -> None:
    with pytest.raises(UsageError, match="worker 2 averages 1 numbers and worker 0 2"):
        check_same(2, mean(1.0), 0, mean(1.0, 2.0))
