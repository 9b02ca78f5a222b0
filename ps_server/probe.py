"""`python -m ps_server.probe`: is the shard of this container up? Its health check.

Reads the same configuration as the shard does. Ends with 0 when the shard answers that it serves,
and otherwise with 1, which are the two that Docker knows. Imports no torch: it runs every few
seconds.
"""

import contextlib
import ipaddress
import sys

from ps_core.config import listen_address, load, split_address
from ps_core.errors import ConfigError
from ps_core.rpc import is_serving

_TIMEOUT_SECONDS = 3.0


def main() -> int:
    """0: the shard serves; 1: it does not, or nobody can tell."""
    try:
        address = listen_address(load())
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0 if is_serving(_from_inside(address), _TIMEOUT_SECONDS) else 1


def _from_inside(address: str) -> str:
    """What listens on all addresses is reached over loopback."""
    host, port = split_address(address)
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            return f"127.0.0.1:{port}"
    return address


if __name__ == "__main__":
    sys.exit(main())
