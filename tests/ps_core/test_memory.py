"""Freed blocks of a frame's size are used again instead of being mapped anew, until they are given
back.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")

_MAP_AGAIN = """
import resource
from ps_core.memory import keep_freed_memory
keep_freed_memory()
size = 4 * 2**20
bytes(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytes(bytearray(size))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_RELEASE = """
import os
from pathlib import Path
from ps_core.memory import keep_freed_memory, release_freed_memory

def resident_mebibytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

keep_freed_memory()
before = resident_mebibytes()
blocks = [bytearray(2**20) for _ in range(100)]
last = bytearray(2**20)  # what lies above the freed blocks
blocks.clear()
kept = resident_mebibytes() - before
release_freed_memory()
print(kept, resident_mebibytes() - before)
"""


def run(program: str) -> list[float]:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [float(each) for each in done.stdout.split()]


def test_blocks_of_a_frames_size_are_not_mapped_again() -> None:
    # 20 times two blocks of 1024 pages each, if they were mapped anew.
    assert run(_MAP_AGAIN)[0] < 20 * 1024


def test_what_was_kept_is_given_back_at_a_word() -> None:
    kept, left = run(_RELEASE)
    assert kept > 90
    assert left < 10
