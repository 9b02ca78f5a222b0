"""How much memory this process may use: the limits of its control groups."""

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
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return math.inf
    return min((_read(file) for line in lines for file in _files(line, mounted)), default=math.inf)


def _files(line: str, mounted: Path) -> Iterator[Path]:
    """Where the limits of a group and of those around it are. A container may see its own group as
    the outermost one, under another path than the one that it is told.
    """
    _, controllers, path = line.split(":", maxsplit=2)
    if controllers == "memory":
        mounted, name = mounted / "memory", "memory.limit_in_bytes"
    elif not controllers:
        name = "memory.max"
    else:
        return
    group = Path(path.lstrip("/"))
    for each in (group, *group.parents):
        yield mounted / each / name


def _read(file: Path) -> float:
    try:
        text = file.read_text().strip()
    except OSError:  # the outermost group of version 2 has no limit
        return math.inf
    return math.inf if text == "max" or int(text) >= _UNLIMITED else int(text)
