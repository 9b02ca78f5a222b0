"""Freed memory goes back to the kernel, but not after every small tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Large blocks that are freed with a smaller one, which stays, in each hole: the heap only grows.
_PROGRAM = """
import sys
import torch
from pathlib import Path
from pipeline.freed import Freed
from ps_core.memory import keep_freed_memory

keep_freed_memory()
freed = Freed()
kept = []
for _ in range(8):
    torch.ones(2**22)  # fits into no hole that the imports have left
    kept += [torch.ones(2**15)]
    if sys.argv[1] == "give back":
        freed.add(2**24)
pages = int(Path("/proc/self/statm").read_text().split()[1])
print(pages * 4096 // 2**20)
"""


def resident_mebibytes(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, mode],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_holes_between_small_tensors_are_given_back() -> None:
    # 128 MiB of ones, of which at most the last 32 are still there.
    assert resident_mebibytes("give back") < resident_mebibytes("keep") - 64
