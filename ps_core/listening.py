"""Sockets that listen where they are needed, and at no other address of this machine."""

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any, Final

from ps_core.config import is_loopback, split_address
from ps_core.errors import ConfigError

_BACKLOG: Final = 4096
"""Connections that may wait to be accepted."""


def listen(address: str) -> socket.socket:
    """A socket that listens at `address`, `host:port`, by which others reach this process. Raises
    ConfigError.

    It listens at all addresses of this machine where the right one cannot be known: `host` is
    translated on its way here, or is a name that stands for a loopback address here alone.
    """
    host, port = split_address(address)
    try:
        for family, place in _own_addresses(address):
            with contextlib.suppress(_NotOurs):
                return _listen(place, family)
        if is_loopback(address):
            raise OSError(errno.EADDRNOTAVAIL, "this machine has no such address")
        return _listen(("", port), socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror}; choose another port, or end the "
            "process that holds it"
        ) from error


class _NotOurs(OSError):
    """Another machine has the address."""


def _own_addresses(address: str) -> Iterator[tuple[int, Any]]:
    """What the host stands for, without loopback addresses that only this machine knows it by."""
    host, port = split_address(address)
    for family, _, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if is_loopback(address) or not ipaddress.ip_address(place[0]).is_loopback:
            yield family, place


def _listen(place: Any, family: int) -> socket.socket:  # noqa: ANN401  # an address of the family
    try:
        return socket.create_server(place, family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise _NotOurs(error.errno, error.strerror) from error
        raise
