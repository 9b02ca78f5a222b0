"""The health check of a container: a process of its own, every few seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from signal import SIGTERM

import pytest

from ps_core.config import inherited_environment
from tests.processes import Fleet, free_ports


def probe(address: str, host: str = "0.0.0.0") -> subprocess.CompletedProcess[str]:  # noqa: S104 - as in a container
    settings = {"SHARDLINE_CLUSTER_SHARDS": address, "SHARDLINE_SERVER_HOST": host}
    return subprocess.run(
        [sys.executable, "-m", "ps_server.probe"],
        env=dict(inherited_environment()) | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])  # noqa: S104 - as in a container
def test_a_shard_is_up_until_it_is_told_to_stop(tmp_path: Path, host: str) -> None:
    with Fleet(tmp_path) as fleet:
        shard = fleet.shard(0)
        assert probe(fleet.addresses[0], host).returncode == 0
        shard.send(SIGTERM)
        assert shard.wait() == 0
        assert probe(fleet.addresses[0], host).returncode == 1


def test_where_nothing_listens_no_shard_is_up() -> None:
    (port,) = free_ports(1)
    assert probe(f"127.0.0.1:{port}").returncode == 1


def test_a_wrong_configuration_is_said() -> None:
    done = probe("nonsense")
    assert done.returncode == 1
    assert "'nonsense'" in done.stderr


def test_it_starts_quickly() -> None:
    program = "import sys, ps_server.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
