"""How the C library keeps the memory of frames."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLD_BYTES = 2**25
"""The largest that glibc takes; no message is larger than 16 MiB."""
_TRIM_THRESHOLD_BYTES = 2**30


def keep_freed_memory() -> None:
    """Reuse the memory of large blocks instead of giving it back to the kernel each time.

    A frame lives for milliseconds and is followed by one of the same size. glibc gives a block of
    megabytes back when it is freed, and the next one is cleared and mapped anew, page by page: as
    much work as all of our own copies. Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
