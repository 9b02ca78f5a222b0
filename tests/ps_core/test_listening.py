import socket
from contextlib import closing, suppress
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported without a list

from allreduce.store import Keeper
from ps_core.errors import ConfigError
from ps_core.listening import listen


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def own_addresses() -> list[str]:
    """Of this machine, besides 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with suppress(OSError):  # there may be no network
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        return [each for each in ("127.0.0.2", probe.getsockname()[0]) if each != "0.0.0.0"]  # noqa: S104


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_for_this_machine_answers_at_no_other_address(host: str) -> None:
    keeper = Keeper(listen(f"{host}:0"))
    TCPStore(host, keeper.port, is_master=False).set("key", "value")
    assert not any(answers(other, keeper.port) for other in own_addresses())


def test_a_store_for_this_machine_is_kept_at_an_ipv6_address_too() -> None:
    try:
        keeper = Keeper(listen("[::1]:0"))
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    TCPStore("::1", keeper.port, is_master=False).set("key", "value")
    assert not any(answers(other, keeper.port) for other in ["127.0.0.1", *own_addresses()])


def named(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Every name stands for these addresses."""

    def look_up(host: str, port: int, **_: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.mark.parametrize(
    ("found", "listens_at"),
    [
        (["192.0.2.1"], "0.0.0.0"),  # noqa: S104  # of another machine, which passes packets on
        (["127.0.1.1"], "0.0.0.0"),  # noqa: S104  # as Debian names a machine to itself
    ],
)
def test_a_name_that_has_no_address_of_this_machine_for_others_is_listened_to_everywhere(
    monkeypatch: pytest.MonkeyPatch, found: list[str], listens_at: str
) -> None:
    named(monkeypatch, *found)
    with closing(listen("worker-0:0")) as listener:
        assert listener.getsockname()[0] == listens_at


def test_a_name_is_listened_to_at_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_addresses()[-1]
    if own.startswith("127."):
        pytest.skip("this machine has no network")
    named(monkeypatch, "192.0.2.1", own)
    with closing(listen("worker-0:0")) as listener:
        assert listener.getsockname()[0] == own


def test_a_port_in_use_is_the_users_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {address}: .* in use"):
            listen(address)


def test_a_host_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on no-host\.invalid:0"):
        listen("no-host.invalid:0")
