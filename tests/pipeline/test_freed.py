"""Freed memory goes back to the kernel, but not after every small tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Large blocks that are freed. A smaller one that stays is above each of them, and one in the hole
# that it leaves, so that the next one does not fit: the heap only grows.
_PROGRAM = """
import sys
import torch
from pathlib import Path
from pipeline.freed import Freed
from ps_core.memory import keep_freed_memory

keep_freed_memory()
freed = Freed()
kept = [torch.ones(2**20) for _ in range(16)]  # what the imports have left free is full
for _ in range(8):
    large = torch.ones(2**22)
    kept += [torch.ones(2**21)]
    del large
    kept += [torch.ones(2**21 + 2**19)]
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
    # Eight times 6 MiB that nothing fits into.
    assert resident_mebibytes("give back") < resident_mebibytes("keep") - 40
