import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allreduce.hyperparameters import checksum, from_numbers, to_numbers
from ps_core.optim_spec import OPTIMIZERS, Hyperparameters, read_groups

numbers = st.floats(allow_nan=False)
values = st.one_of(
    numbers,
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.lists(numbers, min_size=1, max_size=3).map(tuple),
)
keywords = st.text(max_size=5).filter(lambda key: key not in ("foreach", "fused"))
groups = st.lists(st.dictionaries(keywords, values, max_size=6), max_size=3)


def like(groups: Sequence[Hyperparameters]) -> list[Hyperparameters]:
    """The same keywords and types, with other values, in another order."""
    return [
        {
            key: tuple(0.5 for _ in value) if isinstance(value, tuple) else type(value)(1)
            for key, value in reversed(list(group.items()))
        }
        for group in groups
    ]


@given(groups)
def test_values_come_back_with_the_keywords_and_types_of_ones_own(
    groups: list[Hyperparameters],
) -> None:
    row = to_numbers(groups)
    assert all(type(number) is float for number in row)
    back = from_numbers(like(groups), row)
    assert back == groups
    for group, own in zip(back, groups, strict=True):
        for key, value in own.items():
            assert isinstance(group[key], bool) == isinstance(value, bool)
            assert isinstance(group[key], tuple) == isinstance(value, tuple)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_those_of_every_optimizer_are_taken_by_torch(name: str) -> None:
    make: type = OPTIMIZERS[name]
    given = make([torch.zeros(2)], lr=0.3)
    own = make([torch.zeros(2, requires_grad=True)], lr=0.7)
    shared = from_numbers(read_groups(own), to_numbers(read_groups(given)))
    own.param_groups[0].update(shared[0])
    assert read_groups(own) == read_groups(given)
    own.param_groups[0]["params"][0].grad = torch.ones(2)
    own.step()
    assert own.param_groups[0]["params"][0].isfinite().all()


@pytest.mark.parametrize("kernel", ["foreach", "fused"])
def test_how_a_step_is_computed_stays_ones_own(kernel: str) -> None:
    theirs: list[Hyperparameters] = [{"lr": 0.5, kernel: True}]
    plain: list[Hyperparameters] = [{"lr": 0.5}]
    assert to_numbers(theirs) == to_numbers(plain)
    assert from_numbers([{"lr": 0.1, kernel: False}], [0.5]) == [{"lr": 0.5, kernel: False}]


def test_the_order_of_keywords_makes_no_difference() -> None:
    assert to_numbers([{"lr": 1.0, "betas": (2.0, 3.0)}]) == [2.0, 3.0, 1.0]
    assert to_numbers([{"betas": (2.0, 3.0), "lr": 1.0}]) == [2.0, 3.0, 1.0]


def test_checksums_differ_when_anything_does() -> None:
    rows = [[], [0.0], [-0.0], [0.1], [math.nextafter(0.1, 1)], [0.1, 0.2], [0.2, 0.1]]
    sums = [checksum(row) for row in rows]
    assert len(set(sums)) == len(rows)
    assert sums == [checksum(list(row)) for row in rows]
    assert all(0 <= each < 2**32 for each in sums), "a row of numbers holds it exactly"
