"""What a shard is told again whose control stream was broken."""

import pytest

from ps_core.errors import DataLossError
from ps_server.order_log import MAX_ORDERS, OrderLog
from ps_server.orders import Factor, Membership, Seal


def membership(epoch: int) -> Membership:
    return Membership(epoch, {})


def test_a_shard_is_told_in_order_what_came_after_the_epoch_that_it_knows() -> None:
    log = OrderLog()
    seal = Seal(3, frozenset({0}))
    for order in (membership(1), Factor(2, 0.5), membership(2), seal, membership(3)):
        log.add(order)
    factor = Factor(2, 0.5)
    assert log.since(0) == [membership(1), factor, membership(2), seal, membership(3)]
    assert log.since(2) == [factor, seal, membership(3)]
    assert log.since(3) == [factor, seal]


def test_only_the_last_order_of_a_kind_is_told_at_its_place() -> None:
    log = OrderLog()
    for order in (Factor(1, 0.5), membership(1), Factor(2, 0.25)):
        log.add(order)
    assert log.since(0) == [membership(1), Factor(2, 0.25)]


def test_a_shard_that_has_missed_what_is_not_kept_is_told_so() -> None:
    log = OrderLog()
    for epoch in range(1, MAX_ORDERS + 3):
        log.add(membership(epoch))
    assert log.since(2)[0] == membership(3)
    with pytest.raises(DataLossError, match="start the job again"):
        log.since(1)
