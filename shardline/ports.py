"""Free TCP ports for the processes of a run on this machine."""

import contextlib
import random
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ps_core.errors import ShardlineError

_EPHEMERAL_FILE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_EPHEMERAL: Final = (49152, 65535)  # IANA's range, where the kernel does not tell its own
_LOWEST: Final = 10000  # below live many well-known services


def ephemeral_range(file: Path = _EPHEMERAL_FILE) -> tuple[int, int]:
    """First and last port that the kernel gives to outgoing connections."""
    try:
        first, last = map(int, file.read_text().split())
    except (OSError, ValueError):
        return _EPHEMERAL
    return first, last


def candidates(ephemeral: tuple[int, int]) -> list[int]:
    """The ports to try.

    Not the kernel's own: it could give one to an outgoing connection before the process that it
    was found for binds it. When the kernel claims them all, there is no better choice than those.
    """
    first, last = ephemeral
    outside = [port for port in range(_LOWEST, 65536) if not first <= port <= last]
    return outside or list(range(_LOWEST, 65536))


@contextlib.contextmanager
def held_ports(count: int, ports: Sequence[int] | None = None) -> Iterator[list[int]]:
    """`count` different ports of `ports` on 127.0.0.1, which until the end of the block only those
    processes of this user can listen on that share them (`rpc.shared_ports`).

    They are tried from a random one on, so that runs started together take different ones.
    ShardlineError when there are not enough.
    """
    ports = candidates(ephemeral_range()) if ports is None else ports
    start = random.randrange(len(ports)) if ports else 0  # noqa: S311  # spreads, hides nothing
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in _around(ports, start):
            if len(found) == count:
                break
            if _can_hold(port, held):
                found.append(port)
        if len(found) < count:
            raise ShardlineError(f"only {len(found)} of {count} ports are free on this machine")
        yield found


def free_ports(count: int, ports: Sequence[int] | None = None) -> list[int]:
    """Such ports, which nothing uses now."""
    with held_ports(count, ports) as found:
        return found


def _around(ports: Sequence[int], start: int) -> Iterator[int]:
    yield from ports[start:]
    yield from ports[:start]


def _can_hold(port: int, held: contextlib.ExitStack) -> bool:
    holder = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    try:
        holder.bind(("127.0.0.1", port))
    except OSError:
        return False
    # From now on: the holder itself must not share the port of another one.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return True
