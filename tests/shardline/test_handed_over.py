"""What scripts report, log and average: kept as it is, or refused with its name."""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ps_core.config import load
from ps_core.errors import UsageError
from shardline.handed_over import kept, number
from shardline.records import EndRecord, Kept, parse
from shardline.session import Session


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.float16(0.25), 0.25),
        (np.int64(7), 7),
        (np.uint8(255), 255),
        (np.bool_(True), True),
        (np.array(3), 3),
        (np.array([[3.5]]), 3.5),
        (np.array([[1, 2]]), [[1, 2]]),
        (np.str_("best"), "best"),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor([2]), 2),
        (torch.tensor([True, False]), [True, False]),
        (torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), [[1.0, 2.0], [3.0, 4.0]]),
        (torch.zeros(0), []),
        (Path("runs") / "best", "runs/best"),
        (Fraction(1, 4), 0.25),
        (Decimal("0.5"), 0.5),
        (None, None),
        ((1, [np.int8(2)], {"a": torch.tensor(3)}), [1, [2], {"a": 3}]),
        (OrderedDict(x={1: Path("y")}), {"x": {"1": "y"}}),
    ],
    ids=repr,
)
def test_what_numpy_and_torch_give_is_kept_as_what_json_holds(
    value: object, expected: object
) -> None:
    result = kept("x", value)
    assert result == expected
    assert json.loads(json.dumps(result)) == expected
    assert type(result) is type(expected)


def test_what_is_kept_does_not_change_with_what_was_given() -> None:
    given_list, array = [1], np.zeros(2)
    result = kept("x", {"a": given_list, "b": array})
    given_list.append(2)
    array += 1
    assert result == {"a": [1], "b": [0.0, 0.0]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: not {"NaN", "Infinity", "-Infinity"} & set(re.findall(r"\w+", repr(value))))


@given(JSON)
def test_what_is_kept_is_read_back_from_the_record(value: Kept) -> None:
    record = EndRecord(0.0, 0, "a", 1, 2, 3.0, 4, 5, 6, {"x": kept("x", value)})
    assert parse(record.line()) == record
    assert record.reported["x"] == value


cyclic: list[object] = []
cyclic.append(cyclic)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        1j,
        torch.tensor(1j),
        torch.empty(2, device="meta"),
        b"bytes",
        {1, 2},
        {(1, 2): 3},
        cyclic,
        [1, {"deep": [print]}],
        10**5000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_kept_is_refused_at_the_call_with_its_name(value: object) -> None:
    session = Session(load(environ={"SHARDLINE_METRICS_PORT": "-1"}))
    with pytest.raises(UsageError, match=r"^session\.report\(best=…\) cannot keep a"):
        session.report(fine=1, best=value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.bool_(False), 0.0),
        (np.array([2]), 2.0),
        (torch.tensor([[3.0]], requires_grad=True), 3.0),
        (torch.tensor(math.inf), math.inf),
        (Fraction(1, 2), 0.5),
    ],
    ids=repr,
)
def test_one_number_is_a_number(value: object, expected: float) -> None:
    assert number("session.mean", value) == expected


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "None: leave it out where there is no value"),
        ("0.5", "a str: give a float"),
        (torch.ones(3), "a Tensor of shape [3]: give its mean, or each element by itself"),
        (np.ones((2, 2)), "a ndarray of shape [2, 2]: give its mean, or each element by itself"),
        ([1.0], "a list: give its mean, or each element by itself"),
        ({"a": 1}, "a dict: give each of its values a name of its own, as **values does"),
        (1j, "a complex: give a float"),
        (10**400, "an int: give a float"),
        (print, "a builtin_function_or_method: give a float"),
    ],
    ids=repr,
)
def test_what_is_not_one_number_is_refused_with_what_to_do(value: object, said: str) -> None:
    session = Session(load(environ={"SHARDLINE_METRICS_PORT": "-1"}))
    with pytest.raises(UsageError) as caught:
        session.log(fine=1.0, loss=value)  # type: ignore[arg-type]  # that is the point
    assert str(caught.value) == f"session.log(loss=…) takes one number, and was given {said}"
    if value is not None:
        with pytest.raises(UsageError, match=r"^session\.mean takes one number"):
            session.mean(value)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, None])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    session = Session(load(environ={"SHARDLINE_METRICS_PORT": "-1"}))
    with pytest.raises(UsageError, match="weight"):
        session.mean(1.0, weight)
