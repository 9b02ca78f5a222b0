import asyncio
import socket
from pathlib import Path

import pytest

from ps_core.errors import ConfigError, ShardlineError
from ps_core.metrics import start_endpoint
from ps_core.rpc import build_server, is_serving
from ps_core.settings import RpcConfig
from shardline.ports import candidates, ephemeral_range, free_ports, held_ports


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


def test_nothing_takes_a_held_port_but_a_process_that_it_is_held_for() -> None:
    with held_ports(2) as ports:
        for port in ports:
            with pytest.raises(OSError, match="in use"):
                socket.create_server(("127.0.0.1", port))
            with pytest.raises(ConfigError, match="cannot listen on"):
                asyncio.run(serve(port, shared=False))
            with pytest.raises(ConfigError, match="cannot listen on"):
                start_endpoint("127.0.0.1", port)
        asyncio.run(serve(ports[0], shared=True))
        endpoint = start_endpoint("127.0.0.1", ports[1], shared=True)
        assert endpoint is not None
        endpoint.close()
        with pytest.raises(ShardlineError, match="only 0 of 1"):
            free_ports(1, ports)
    assert sorted(free_ports(2, ports)) == sorted(ports)


async def serve(port: int, *, shared: bool) -> None:
    """A server that can be reached, and that no other one can sit beside."""
    server = build_server(f"127.0.0.1:{port}", [], RpcConfig(shared_ports=shared))
    await server.start()
    assert await asyncio.to_thread(is_serving, f"127.0.0.1:{port}", 10)
    with pytest.raises(ConfigError, match="cannot listen on"):
        build_server(f"127.0.0.1:{port}", [], RpcConfig())
    await server.drain(0)
