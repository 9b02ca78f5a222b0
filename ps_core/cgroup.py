"""How much memory and CPU time this process may use: the limits of its control groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_MOUNTED: Final = Path("/sys/fs/cgroup")
_UNLIMITED: Final = 2**62
"""Version 1 has no word for it: a group without a limit has nearly 2^63 bytes."""


def memory_limit_bytes(membership: Path = _MEMBERSHIP, mounted: Path = _MOUNTED) -> float:
    """The lowest limit of the groups that this process is in, of version 1 or 2; infinity where
    there is none, as everywhere but on Linux.
    """
    groups = _groups("memory", membership, mounted)
    return min(map(_memory_limit_bytes, groups), default=math.inf)


def cpu_limit(membership: Path = _MEMBERSHIP, mounted: Path = _MOUNTED) -> float:
    """The same for CPU time: how many CPUs' worth of it."""
    return min(map(_cpu_limit, _groups("cpu", membership, mounted)), default=math.inf)


def _groups(controller: str, membership: Path, mounted: Path) -> Iterator[Path]:
    """The folders of a group and of those around it. A container may see its own group as the
    outermost one, under another path than the one that it is told.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if not controllers:  # version 2
            root = mounted
        elif controller in controllers.split(","):
            root = mounted / controller
        else:
            continue
        group = Path(path.lstrip("/"))
        yield from (root / each for each in (group, *group.parents))


def _memory_limit_bytes(group: Path) -> float:
    text = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes") or "max"
    return math.inf if text == "max" or int(text) >= _UNLIMITED else int(text)


def _cpu_limit(group: Path) -> float:
    quota, period = (_read(group / "cpu.max") or "max 0").split()
    if quota == "max":
        quota = _read(group / "cpu.cfs_quota_us") or "-1"
        period = _read(group / "cpu.cfs_period_us") or "1"
    return int(quota) / int(period) if int(quota) > 0 else math.inf


def _read(file: Path) -> str:
    """Nothing where there is no such file: the outermost group of version 2 has no limits."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
