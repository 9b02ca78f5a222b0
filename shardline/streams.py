"""Standard output and error, which may be closed, full, or read by no one."""

import contextlib
import io
import os
import sys


def say(text: str) -> None:
    """Write whole lines to standard error, as far as they can be written there."""
    if sys.stderr is not None:  # closed: 2>&-
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


def tell(text: str) -> None:
    """Tell the person who runs the script, in a line."""
    say(f"shardline: {text}\n")


def prepare_streams() -> None:
    """Make standard output show `?` for what it cannot encode, and open /dev/null in the place of
    streams that are closed: a file or socket would take their numbers, and what is written to them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
