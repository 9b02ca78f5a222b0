import socket
from pathlib import Path

import pytest

from ps_core.errors import ShardlineError
from shardline.ports import candidates, ephemeral_range, free_ports


def test_ports_are_different_and_can_be_bound() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_ports_lie_outside_the_range_that_the_kernel_gives_away() -> None:
    first, last = ephemeral_range()
    assert all(not first <= port <= last for port in free_ports(20))
    assert candidates((32768, 60999)) == [*range(10000, 32768), *range(61000, 65536)]


def test_when_the_kernel_gives_all_away_there_is_still_an_answer() -> None:
    assert candidates((1024, 65535)) == list(range(10000, 65536))


def test_the_kernel_is_asked_for_its_range(tmp_path: Path) -> None:
    file = tmp_path / "ip_local_port_range"
    assert ephemeral_range(file) == (49152, 65535)
    file.write_text("15000\t20000\n")
    assert ephemeral_range(file) == (15000, 20000)


def test_a_port_in_use_is_passed_over() -> None:
    free = free_ports(3)
    with socket.create_server(("127.0.0.1", free[1])):
        for _ in range(10):  # wherever the search starts
            assert sorted(free_ports(2, free)) == sorted([free[0], free[2]])


def test_too_few_free_ports_are_an_error() -> None:
    free = free_ports(2)
    with pytest.raises(ShardlineError, match="only 2 of 3 ports are free"):
        free_ports(3, free)
    with pytest.raises(ShardlineError, match="only 0 of 1 ports are free"):
        free_ports(1, [])
