"""Gives the memory of temporaries back to the kernel while a model is built."""

from __future__ import annotations

from typing import Final

from ps_core.memory import release_freed_memory

_SLACK_BYTES: Final = 2**25


class Freed:
    """Counts the bytes of freed temporaries, and returns them to the kernel every 32 MiB.

    glibc keeps freed blocks of up to 32 MiB. What a model keeps while it is built is small and ends
    up in them, so that the next temporary does not fit: together they would grow to the size of the
    whole model.
    """

    def __init__(self) -> None:
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Note that temporaries of so many bytes have been freed."""
        self._num_bytes += num_bytes
        if self._num_bytes >= _SLACK_BYTES:
            self._num_bytes = 0
            release_freed_memory()
