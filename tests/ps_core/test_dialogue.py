"""What a worker and the lead say to each other besides parts, over the wire and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from ps_core import dialogue
from ps_core.codec import decode_groups
from ps_core.errors import ProtocolError
from ps_core.exchange import Arrival, Grant, Position, Purpose, Work
from ps_core.leases import Lease, PassSpec
from ps_core.optim_spec import Hyperparameters
from ps_core.point import Point
from ps_core.v1 import shard_pb2
from ps_core.weights import MAX_WEIGHT, MIN_WEIGHT

numbers = st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1))
samples = st.one_of(st.integers(0, 3), st.integers(0, 2**48))
large = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))
steps = st.one_of(st.integers(0, 3), st.integers(0, 2**62))
reals = st.floats(allow_nan=False)
seconds = st.floats(0, 1e9)
weights = st.just(0.0) | st.floats(MIN_WEIGHT, MAX_WEIGHT)


def over_the_wire(message: Any) -> Any:  # noqa: ANN401 - the type that goes in comes out
    assert isinstance(message, Message)
    return type(message).FromString(message.SerializeToString())


# -- Steps -----------------------------------------------------------------------------------------

points = st.builds(Point, numbers, numbers, numbers)
works = st.builds(
    Work,
    samples=samples,
    leases=st.lists(large, max_size=5).map(tuple),
    data_seconds=seconds,
    compute_seconds=seconds,
    schedules=st.lists(numbers, max_size=5).map(tuple),
    point=points,
    given_weight=st.none() | weights,
)


@given(steps, large, works)
def test_a_begin_comes_back_as_it_was_sent(step: int, epoch: int, work: Work) -> None:
    groups: list[Hyperparameters] = [
        {"lr": 0.5, "betas": (0.9, 0.99)},
        {"lr": 1, "amsgrad": True},
    ]
    message = over_the_wire(dialogue.encode_begin(step, epoch, work, groups))
    assert (message.step, message.epoch) == (step, epoch)
    assert decode_groups(message.groups) == tuple(groups)
    assert dialogue.decode_work(message) == work


def test_what_a_begin_leaves_out_is_nothing() -> None:
    assert dialogue.decode_work(shard_pb2.Begin()) == Work(0)


@pytest.mark.parametrize("weight", [-1.0, 1e-44, 1e308, float("nan"), float("inf")])
def test_gradients_with_a_weight_that_is_none_are_refused(weight: float) -> None:
    with pytest.raises(ProtocolError, match="averaged with weight"):
        dialogue.decode_work(over_the_wire(shard_pb2.Begin(weight=weight)))


HUGE: dict[str, tuple[dict[str, Any], str]] = {
    "a step": ({"step": 2**62 + 1}, "step 4611686018427387905 is beyond all training"),
    "the last step": ({"step": 2**64 - 1}, "is beyond all training"),
    "a weight": ({"samples": 2**48 + 1}, "281474976710657 samples cannot be behind one step"),
    "leases": ({"leases": range(2**16 + 1)}, "65537 leases cannot be behind one step"),
    "schedulers": ({"schedules": [1] * (2**10 + 1)}, "1025 schedulers are more than 1024"),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_begin_with_huge_values_is_refused(what: str) -> None:
    fields, reason = HUGE[what]
    with pytest.raises(ProtocolError, match=reason):
        dialogue.decode_work(over_the_wire(shard_pb2.Begin(**fields)))


def test_a_begin_with_the_largest_values_is_taken() -> None:
    work = Work(2**48, tuple(range(2**16)), schedules=(2**32 - 1,) * 2**10)
    message = over_the_wire(dialogue.encode_begin(2**62, 0, work, ()))
    assert dialogue.decode_work(message) == work


# -- Meetings --------------------------------------------------------------------------------------

arrivals = st.builds(
    Arrival,
    st.sampled_from(Purpose),
    steps,
    st.lists(reals, max_size=4).map(tuple),
    weights,
    st.booleans(),
    points,
)


@given(arrivals)
def test_an_arrival_comes_back_as_it_was_sent(arrival: Arrival) -> None:
    assert dialogue.decode_meet(over_the_wire(dialogue.encode_meet(arrival))) == arrival


def test_values_that_are_no_numbers_may_be_averaged() -> None:
    arrival = Arrival(Purpose.MEAN, 3, (math.nan, math.inf))
    back = dialogue.decode_meet(over_the_wire(dialogue.encode_meet(arrival)))
    assert math.isnan(back.values[0])
    assert back.values[1] == math.inf


def test_purposes_have_the_numbers_of_the_wire() -> None:
    # Compared by name: PURPOSE_START is START.
    assert {p.name: int(p) for p in Purpose} == {
        name.removeprefix("PURPOSE_"): number
        for name, number in shard_pb2.Purpose.items()
        if number
    }


@pytest.mark.parametrize("purpose", [0, 6, 99, -1, 2**31 - 1])
def test_a_meeting_without_a_known_purpose_is_refused(purpose: int) -> None:
    message = shard_pb2.Meet(weight=1)
    message.purpose = purpose  # type: ignore[assignment]  # proto3 enums are open
    with pytest.raises(ProtocolError, match=f"unknown purpose {purpose} of a meeting"):
        dialogue.decode_meet(over_the_wire(message))


@pytest.mark.parametrize("weight", [-1.0, -1e-300, math.inf, -math.inf, math.nan])
def test_a_weight_that_nothing_can_be_averaged_with_is_refused(weight: float) -> None:
    message = shard_pb2.Meet(purpose=shard_pb2.PURPOSE_MEAN, weight=weight)
    with pytest.raises(ProtocolError, match="numbers cannot be averaged with weight"):
        dialogue.decode_meet(message)


def test_a_meeting_at_a_step_beyond_all_training_is_refused() -> None:
    message = shard_pb2.Meet(purpose=shard_pb2.PURPOSE_MEAN, step=2**64 - 1)
    with pytest.raises(ProtocolError, match="step 18446744073709551615 is beyond all training"):
        dialogue.decode_meet(message)


@given(st.builds(Position, points, st.lists(numbers, max_size=5).map(tuple), large, points))
def test_a_position_comes_back_as_it_was_sent(position: Position) -> None:
    message = over_the_wire(dialogue.encode_position(position))
    assert dialogue.decode_position(message) == position


# -- Samples ---------------------------------------------------------------------------------------


specs = st.builds(PassSpec, samples, st.integers(1, 2**64 - 1), large, st.booleans(), points, large)


@given(numbers, specs)
def test_a_request_for_samples_comes_back_as_it_was_sent(loader: int, spec: PassSpec) -> None:
    message = over_the_wire(dialogue.encode_lease_request(loader, spec))
    assert message.loader == loader
    assert dialogue.decode_pass(message) == spec
    assert not message.returned


def test_a_worker_that_only_gives_back_wants_nothing() -> None:
    message = over_the_wire(shard_pb2.LeaseRequest(returned=[7], declined=True))
    assert dialogue.decode_pass(message) is None


def test_a_pass_with_a_global_batch_needs_no_batch_size() -> None:
    message = dialogue.encode_lease_request(0, PassSpec(100, 0, 32))
    assert dialogue.decode_pass(over_the_wire(message)) == PassSpec(100, 0, 32)


def request(**fields: int) -> shard_pb2.LeaseRequest:
    message = shard_pb2.LeaseRequest()
    wanted: shard_pb2.Pass = getattr(message, "pass")
    wanted.SetInParent()
    for name, value in fields.items():
        setattr(wanted, name, value)
    return message


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(request(), id="an empty pass"),
        pytest.param(request(num_samples=10), id="no batch size"),
        pytest.param(request(num_samples=2**48 + 1, batch_size=1), id="too many samples"),
        pytest.param(request(num_samples=2**63, batch_size=1), id="more than a length can be"),
        pytest.param(request(num_samples=2**64 - 1, global_batch_size=8), id="all bits"),
    ],
)
def test_a_pass_that_cannot_be_is_refused(message: shard_pb2.LeaseRequest) -> None:
    with pytest.raises(ProtocolError, match="pass"):
        dialogue.decode_pass(over_the_wire(message))


def lease_lists(loader: int, number: int) -> st.SearchStrategy[list[Lease]]:
    lease = st.builds(Lease, large, st.just(loader), st.just(number), large, large)
    return st.lists(lease, max_size=4)


@given(numbers, large, st.data())
def test_a_grant_comes_back_as_it_was_sent(loader: int, number: int, data: st.DataObject) -> None:
    grant = Grant(number, tuple(data.draw(lease_lists(loader, number))))
    assert dialogue.decode_grant(over_the_wire(dialogue.encode_grant(grant))) == grant
