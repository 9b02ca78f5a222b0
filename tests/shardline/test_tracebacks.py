import subprocess
import sys

import pytest

from shardline.tracebacks import HeldTraceback

CHAINED = """
try:
    {}["key"]
except KeyError as error:
    raise ValueError("a bad batch\\n\\tof three lines\\n  in all") from error
"""


def written_by(script: str) -> list[str]:
    """What Python itself writes."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    "script",
    ["mistake", "def f(:", CHAINED, "raise ExceptionGroup('two', [ValueError(1), KeyError(2)])"],
)
def test_a_traceback_at_the_end_is_held(script: str) -> None:
    held, lines = HeldTraceback(), written_by(script)
    assert held.add("before") == ["before"]
    assert [shown for line in lines for shown in held.add(line)] == []
    assert held.lines == held.release() == lines
    assert held.release() == []


def test_a_traceback_that_something_follows_is_shown_with_it() -> None:
    held, lines = HeldTraceback(), written_by("mistake")
    assert [shown for line in [*lines, "going on"] for shown in held.add(line)] == [
        *lines,
        "going on",
    ]
    assert held.add("    as usual") == ["    as usual"]
