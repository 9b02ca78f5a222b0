"""The lead's orders and the shards' words about fenced processes, over the wire and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_core.errors import ShardlineError
from ps_core.v1 import lead_pb2
from ps_server.control import Order, decode_order, decode_remains, encode_order, encode_remains
from ps_server.effects import Remains
from ps_server.orders import Complete, Factor, Failed, Membership, Seal
from ps_server.terms import Member

ranks = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))
large = st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1))
counts = st.integers(0, 2**32 - 1)

memberships = st.builds(
    Membership,
    large,
    st.dictionaries(ranks, st.builds(Member, large, large, st.booleans()), max_size=5),
    st.dictionaries(ranks, large, max_size=3),
    st.text(),
)
orders = st.one_of(
    memberships,
    st.builds(Factor, large, st.floats(allow_nan=False)),
    st.builds(Seal, large, st.frozensets(ranks, max_size=6)),
    st.builds(Failed, st.text()),
    st.just(Complete()),
)


@given(orders)
def test_an_order_comes_back_as_it_was_sent(order: Order) -> None:
    frame = encode_order(order).SerializeToString()
    assert decode_order(lead_pb2.ControlResponse.FromString(frame)) == order


def test_a_membership_says_on_the_wire_who_waits_for_whom_and_who_is_fenced() -> None:
    order = Membership(
        7, {2: Member(22, 5, enters=True), 0: Member(20, 3)}, {1: 21}, reason="it was silent"
    )
    assert encode_order(order).membership == lead_pb2.Membership(
        epoch=7,
        members=[
            lead_pb2.Member(rank=0, incarnation=20, first_step=3),
            lead_pb2.Member(rank=2, incarnation=22, first_step=5, enters=True),
        ],
        evicted=[lead_pb2.Member(rank=1, incarnation=21)],
        reason="it was silent",
    )


def test_the_contributors_of_a_seal_are_in_order() -> None:
    seal = encode_order(Seal(4, frozenset({9, 1, 5}))).seal
    assert (seal.step, list(seal.contributors)) == (4, [1, 5, 9])


def test_a_welcome_is_no_order() -> None:
    welcome = lead_pb2.Welcome(lead_incarnation=5)
    assert decode_order(lead_pb2.ControlResponse(welcome=welcome)) is None


def test_every_message_of_the_lead_is_known() -> None:
    names = {field.name for field in lead_pb2.ControlResponse.DESCRIPTOR.fields}
    for name in names:
        message = lead_pb2.ControlResponse()
        getattr(message, name).SetInParent()
        assert (decode_order(message) is None) is (name == "welcome")


def test_a_message_of_another_release_is_refused() -> None:
    with pytest.raises(ShardlineError, match="run the same release everywhere"):
        decode_order(lead_pb2.ControlResponse())


@given(
    st.builds(
        Remains,
        ranks,
        large,
        large,
        large,
        st.lists(large, max_size=5).map(tuple),
        counts,
        counts,
    )
)
def test_the_word_about_a_fenced_process_comes_back_as_it_was_sent(remains: Remains) -> None:
    frame = encode_remains(remains).SerializeToString()
    assert decode_remains(lead_pb2.Remains.FromString(frame)) == remains


def test_the_word_about_a_fenced_process_is_in_the_fields_of_the_wire() -> None:
    remains = Remains(
        worker=1, incarnation=21, step=9, samples=32, leases=(5, 6), used_parts=2, num_parts=4
    )
    assert encode_remains(remains) == lead_pb2.Remains(
        rank=1, incarnation=21, step=9, samples=32, leases=[5, 6], used_parts=2, num_parts=4
    )
