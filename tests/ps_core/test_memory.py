"""Freed blocks of a frame's size are used again instead of being mapped anew."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_blocks_of_a_frames_size_are_not_mapped_again() -> None:
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    # 20 times two blocks of 1024 pages each, if they were mapped anew.
    assert int(done.stdout) < 20 * 1024
