"""The lead's orders, for shards whose control stream was broken. Pure."""

from __future__ import annotations

from typing import Final

from ps_core.errors import DataLossError
from ps_server.control import Order
from ps_server.orders import Membership

MAX_ORDERS: Final = 4096


class OrderLog:
    """Every membership, up to a number, and the last order of each other kind, as they came."""

    def __init__(self) -> None:
        self._orders: dict[object, Order] = {}
        self._epoch = 0

    def add(self, order: Order) -> None:
        """Keep an order."""
        key: object = type(order)
        if isinstance(order, Membership):
            key = self._epoch = order.epoch
        self._orders.pop(key, None)
        self._orders[key] = order
        if len(self._orders) > MAX_ORDERS:
            del self._orders[next(iter(self._orders))]

    def since(self, epoch: int) -> list[Order]:
        """What a shard may have missed that knows this membership epoch. Raises DataLossError when
        some of that is not kept any more.
        """
        memberships = {key for key in self._orders if isinstance(key, int) and key > epoch}
        if len(memberships) < self._epoch - epoch:
            raise DataLossError(
                f"a shard has missed more than {MAX_ORDERS} orders of the lead while its stream "
                "was broken: start the job again"
            )
        return [
            order
            for key, order in self._orders.items()
            if not isinstance(key, int) or key in memberships
        ]
