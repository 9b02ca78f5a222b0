import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_core.ranges import Ranges

positions = st.sets(st.integers(0, 40))


def ranges_of(positions: set[int]) -> list[range]:
    """The runs of consecutive numbers, the slow way."""
    starts = sorted(p for p in positions if p - 1 not in positions)
    stops = sorted(p + 1 for p in positions if p + 1 not in positions)
    return [range(start, stop) for start, stop in zip(starts, stops, strict=True)]


@given(positions, st.randoms())
def test_positions_in_any_order_become_sorted_ranges_that_do_not_touch(
    positions: set[int], chance: object
) -> None:
    order = sorted(positions)
    chance.shuffle(order)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    ranges = Ranges(range(position, position + 1) for position in order)
    assert list(ranges) == ranges_of(positions)
    assert len(ranges) == len(positions)


@given(positions, st.integers(0, 40), st.integers(0, 40))
def test_adding_a_range_is_the_union(positions: set[int], start: int, length: int) -> None:
    added = range(start, start + length)
    ranges = Ranges(ranges_of(positions - set(added)))
    ranges.add(added)
    assert list(ranges) == ranges_of(positions | set(added))


@given(positions, st.integers(0, 40), st.integers(0, 40))
def test_removing_a_range_is_the_difference(positions: set[int], start: int, length: int) -> None:
    removed = range(start, start + length)
    ranges = Ranges(ranges_of(positions | set(removed)))
    ranges.remove(removed)
    assert list(ranges) == ranges_of(positions - set(removed))


@given(positions, st.integers(1, 10))
def test_taking_gives_the_lowest_positions_up_to_the_first_gap(
    positions: set[int], limit: int
) -> None:
    ranges = Ranges(ranges_of(positions))
    taken = ranges.take_first(limit)
    if not positions:
        assert taken is None
        return
    assert taken == ranges_of(positions)[0][:limit]
    assert list(ranges) == ranges_of(positions - set(taken))


def test_the_first_range_of_a_length_is_the_lowest_that_has_it() -> None:
    ranges = Ranges([range(10, 14), range(0, 2), range(20, 30)])
    assert ranges.first() == range(0, 2)
    assert ranges.first(at_least=3) == range(10, 14)
    assert ranges.first(at_least=11) is None


@pytest.mark.parametrize("added", [range(3, 6), range(8, 12), range(5, 8), range(0, 20)])
def test_adding_what_is_there_is_a_bug(added: range) -> None:
    with pytest.raises(AssertionError):
        Ranges([range(5, 10)]).add(added)


@pytest.mark.parametrize("removed", [range(3, 6), range(8, 12), range(0, 2), range(12, 14)])
def test_removing_what_is_not_there_is_a_bug(removed: range) -> None:
    with pytest.raises(AssertionError):
        Ranges([range(5, 10)]).remove(removed)
