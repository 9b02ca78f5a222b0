import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ps_core.errors import ShardlineError
from shardline.processes import NUM_LAST_LINES, Child, ProcessSpec
from shardline.supervision import ProcessId
from tests.shardline.stand_ins import wait_until

# The timeouts of these tests run on a thread; the launcher itself starts processes before threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def spec(code: str, *arguments: str) -> ProcessSpec:
    command = (sys.executable, "-u", "-c", code, *arguments)
    return ProcessSpec(ProcessId("worker", 0), command, {"HOME": "/"})


@contextmanager
def started(code: str, log: io.BufferedIOBase | None = None) -> Iterator[Child]:
    child = Child(spec(code), log or io.BytesIO())  # type: ignore[arg-type]  # has what is used
    try:
        yield child
    finally:
        child.send(signal.SIGKILL)
        wait_until(lambda: child.poll() is not None)
        child.close()


def ended(child: Child) -> int | None:
    wait_until(lambda: child.poll() is not None)
    return child.poll()


def collect(into: list[str]) -> Callable[[str], None]:
    return into.append


def test_lines_and_exit_code_arrive() -> None:
    lines: list[str] = []
    with started("print('a'); print('b', end=''); raise SystemExit(7)") as child:
        child.listen(collect(lines))
        assert ended(child) == 7
        assert child.close()
    assert lines == ["a", "b"]


def test_a_signal_is_a_negative_exit_code() -> None:
    with started("import time; time.sleep(60)") as child:
        assert child.poll() is None
        child.send(signal.SIGTERM)
        assert ended(child) == -signal.SIGTERM
        child.send(signal.SIGTERM)  # to nobody


def test_the_environment_is_the_given_one() -> None:
    lines: list[str] = []
    with started(
        "import os; print(sorted(os.environ)); print(os.getsid(0) == os.getpid())"
    ) as child:
        child.listen(collect(lines))
        ended(child)
        child.close()
    assert "HOME" in lines[0]
    assert "PATH" not in lines[0]
    assert lines[1] == "True"


def test_only_the_last_lines_are_remembered() -> None:
    with started("for i in range(100): print(i)") as child:
        child.listen(lambda text: None)
        ended(child)
        child.close()
        assert list(child.last_lines) == [str(i) for i in range(100 - NUM_LAST_LINES, 100)]


def test_a_full_disk_ends_the_log_and_not_the_process() -> None:
    lines: list[str] = []
    with Path("/dev/full").open("wb") as log, started("print('a'); print('b')", log) as child:
        child.listen(collect(lines))
        assert ended(child) == 0
        assert child.close()
    assert lines == ["a", "b"]
    assert any("No space left" in line for line in child.last_lines)


def test_a_pipe_that_somebody_else_holds_is_not_waited_for() -> None:
    holder = "import os, time; os.setsid(); print(os.getpid()); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-uc', '{holder}'])"
    code += "; import time; time.sleep(60)"
    lines: list[str] = []
    with started(code) as child:
        child.listen(collect(lines))
        wait_until(lambda: len(lines) == 1)
        child.send(signal.SIGKILL)
        ended(child)
        before = time.monotonic()
        assert not child.close()
        assert time.monotonic() - before < 5
        os.kill(int(lines[0]), signal.SIGKILL)
        assert child.close()


def test_a_command_that_does_not_exist_is_named() -> None:
    nothing = ProcessSpec(ProcessId("shard", 1), ("/no/such/program",), {})
    with pytest.raises(ShardlineError, match=r"cannot start shard 1 ./no/such/program"):
        Child(nothing, io.BytesIO())
