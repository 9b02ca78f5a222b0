"""Limits as the kernel writes them, in folders that look like its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ps_core.cgroup import memory_limit_bytes

VERSION_1 = "5:devices:/pods\n4:memory:/pods/one\n0::/\n"
VERSION_2 = "0::/pods/one\n"


def limit(folder: Path, membership: str, files: dict[str, str]) -> float:
    (folder / "cgroup").write_text(membership)
    for name, text in files.items():
        path = folder / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return memory_limit_bytes(folder / "cgroup", folder / "mounted")


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
