"""How the C library keeps memory that was freed."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLD_BYTES = 2**25
"""The largest that glibc takes; no message is larger than 16 MiB."""
_TRIM_THRESHOLD_BYTES = 2**30
_SMALL_BYTES = 2**20


def keep_freed_memory() -> None:
    """Reuse the memory of large blocks instead of giving it back to the kernel each time.

    A frame, or a gradient that moves into its bucket, lives for milliseconds and is followed by one
    of the same size. glibc gives a block of megabytes back when it is freed, and the next one is
    cleared and mapped anew, page by page: as much work as all of our own copies. Does nothing where
    the C library is another one.
    """
    _set(_MMAP_THRESHOLD_BYTES, _TRIM_THRESHOLD_BYTES)


def return_freed_memory() -> None:
    """Give the memory of large blocks back to the kernel as soon as they are freed.

    A worker of a model that is split is there because memory is short. glibc learns from the first
    blocks that it frees to keep others of their size; the holes between those that live on add up
    to a good part of the model. Mapping them anew costs time, which has not been measured.
    """
    _set(_SMALL_BYTES, _SMALL_BYTES)


def release_freed_memory() -> None:
    """Give back to the kernel, once, whatever is free. Blocks for milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set(mmap_threshold_bytes: int, trim_threshold_bytes: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold_bytes)
        mallopt(_M_TRIM_THRESHOLD, trim_threshold_bytes)
