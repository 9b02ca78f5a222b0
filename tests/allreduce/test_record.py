from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allreduce.record import (
    Call,
    Reading,
    Record,
    decode,
    encode,
    of_arrival,
    of_step,
    without_gradients,
)
from ps_core.exchange import Arrival, Purpose, Work
from ps_core.point import Point

LARGEST = 2**53
"""Up to here float64 has every whole number."""

whole = st.integers(0, LARGEST)
numbers = st.floats(allow_nan=False)
points = st.builds(Point, whole, whole, whole)
readings = st.builds(Reading, whole, whole, whole, whole, whole, whole, st.booleans(), whole)
records = st.builds(
    Record,
    call=st.sampled_from(Call),
    version=whole,
    samples=whole,
    values=st.lists(numbers, max_size=80).map(tuple),
    weight=numbers,
    takes_leases=st.booleans(),
    point=points,
    data_seconds=numbers,
    compute_seconds=numbers,
    schedules=st.lists(whole, max_size=5).map(tuple),
    hyperparameters=st.integers(0, 2**32 - 1),
    has_guest=st.booleans(),
    has_state=st.booleans(),
    readings=st.lists(readings, max_size=12).map(tuple),
    given_weight=st.none() | st.floats(0.001, 0.999),
)


def sent(row: list[float], length: int = 0) -> list[float]:
    """As the others receive it: as float64, padded with zeros up to a length."""
    padded = row + [0.0] * (length - len(row))
    received: list[float] = torch.tensor(padded, dtype=torch.float64).tolist()
    return received


@given(records, st.integers(0, 200))
def test_a_record_comes_back_from_its_numbers_whatever_follows_them(
    record: Record, length: int
) -> None:
    row = encode(record)
    assert row[0] == len(row), "the first number says how many"
    received = sent(row, length)
    back = decode(received)
    assert back == record
    kinds = [type(value) for value in (back.version, back.takes_leases, back.schedules, back.call)]
    assert kinds == [int, bool, tuple, Call]


def test_whole_numbers_are_exact_up_to_two_to_the_53() -> None:
    reading = Reading(LARGEST, LARGEST - 1, LARGEST - 2, 1, LARGEST, 3, is_shared=True)
    record = Record(Call.STEP, LARGEST - 3, samples=LARGEST - 1, readings=(reading,))
    assert decode(sent(encode(record))) == record


def test_a_row_may_be_longer_than_64_numbers() -> None:
    reading = Reading(1, 2, 0, 4, 1000, 4, is_shared=False)
    batches = tuple(replace(reading, start=4 * number) for number in range(20))
    record = Record(Call.STEP, 5, samples=80, readings=batches, schedules=tuple(range(30)))
    row = encode(record)
    assert row[0] == len(row) > 64
    assert decode(sent(row, len(row))) == record


def test_a_value_may_be_nan() -> None:
    (value,) = decode(encode(Record(Call.MEAN, 1, values=(float("nan"),)))).values
    assert value != value


def test_a_step_says_what_stands_behind_it() -> None:
    reading = Reading(1, 2, 10, 4, 1000, 4, is_shared=False)
    work = Work(4, (7,), 0.5, 1.5, (3, 4), Point(1, 2, 0))
    record = of_step(9, work, 123, [reading])
    assert record.is_step
    assert record.arrival is None
    assert (record.version, record.samples, record.hyperparameters) == (9, 4, 123)
    assert (record.data_seconds, record.compute_seconds) == (0.5, 1.5)
    assert (record.schedules, record.point, record.readings) == ((3, 4), Point(1, 2, 0), (reading,))
    assert list(reading.positions) == [10, 11, 12, 13]


def test_without_gradients_a_step_is_made_of_nothing_and_is_still_one() -> None:
    reading = Reading(1, 2, 10, 4, 1000, 4, is_shared=False)
    record = of_step(9, Work(4, (7,), 0.5, 1.5, (3, 4), Point(1, 2, 0)), 123, [reading])
    assert without_gradients(record) == replace(record, samples=0, readings=())


@pytest.mark.parametrize("purpose", [p for p in Purpose if p is not Purpose.START])
def test_an_arrival_comes_back_from_a_record(purpose: Purpose) -> None:
    arrival = Arrival(purpose, 8, (1.5, -2.0), 3.0, True, Point(1, 2, 3), hands_over=True)
    record = of_arrival(8, arrival, has_state=True)
    assert record.has_state
    assert not record.is_step
    assert decode(encode(record)).arrival == arrival


@pytest.mark.parametrize("call", [Call.STEP, Call.READ, Call.LEAVE])
def test_who_has_come_to_no_meeting_has_no_arrival(call: Call) -> None:
    assert Record(call, 3).arrival is None
