"""Limits as the kernel writes them, in folders that look like its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from ps_core.cgroup import cpu_limit, memory_limit_bytes

VERSION_1 = "5:devices:/pods\n4:memory:/pods/one\n3:cpu,cpuacct:/pods/one\n0::/\n"
VERSION_2 = "0::/pods/one\n"


def limit(
    folder: Path,
    membership: str,
    files: dict[str, str],
    read: Callable[[Path, Path], float] = memory_limit_bytes,
) -> float:
    (folder / "cgroup").write_text(membership)
    for name, text in files.items():
        path = folder / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return read(folder / "cgroup", folder / "mounted")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"pods/one/memory.max": "4096"}, 4096),
        ({"pods/one/memory.max": "4096", "pods/memory.max": "1024"}, 1024),
        ({"pods/one/memory.max": "max", "pods/memory.max": "8192"}, 8192),
        ({"pods/one/memory.max": "max"}, math.inf),
        ({"memory.max": "2048"}, 2048),  # its own group is the outermost that a container sees
        ({"pods/two/memory.max": "512"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_lowest_limit_counts(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    assert limit(tmp_path, VERSION_2, files) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory/pods/one/memory.limit_in_bytes": "4096"}, 4096),
        ({"memory/memory.limit_in_bytes": "2048"}, 2048),
        ({"memory/pods/one/memory.limit_in_bytes": "9223372036854771712"}, math.inf),
        ({"devices/pods/memory.limit_in_bytes": "1024"}, math.inf),
    ],
)
def test_version_1_has_a_group_per_controller(
    tmp_path: Path, files: dict[str, str], expected: float
) -> None:
    assert limit(tmp_path, VERSION_1, files) == expected


def test_a_kernel_without_groups_sets_no_limit(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path / "absent", tmp_path) == math.inf
    assert cpu_limit(tmp_path / "absent", tmp_path) == math.inf


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"pods/one/cpu.max": "200000 100000"}, 2),
        ({"pods/one/cpu.max": "max 100000", "pods/cpu.max": "150000 100000"}, 1.5),
        ({"pods/one/cpu.max": "400000 100000", "cpu.max": "50000 100000"}, 0.5),
        ({"pods/one/cpu.max": "max 100000"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_lowest_share_of_the_cpus_counts(
    tmp_path: Path, files: dict[str, str], expected: float
) -> None:
    assert limit(tmp_path, VERSION_2, files, cpu_limit) == expected


@pytest.mark.parametrize(
    ("quota", "period", "expected"), [("300000", "100000", 3), ("-1", "100000", math.inf)]
)
def test_version_1_has_a_quota_and_a_period(
    tmp_path: Path, quota: str, period: str, expected: float
) -> None:
    files = {
        "cpu/pods/one/cpu.cfs_quota_us": quota,
        "cpu/pods/one/cpu.cfs_period_us": period,
        "cpu/pods/cpu.cfs_quota_us": "-1",
    }
    assert limit(tmp_path, VERSION_1, files, cpu_limit) == expected
