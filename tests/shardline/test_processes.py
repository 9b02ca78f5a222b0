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

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end it with us")


def spec(code: str, *arguments: str) -> ProcessSpec:
    command = (sys.executable, "-u", "-c", code, *arguments)
    return ProcessSpec(ProcessId("worker", 0), command, {"HOME": "/"})


@contextmanager
def started(code: str | ProcessSpec, log: io.BufferedIOBase | None = None) -> Iterator[Child]:
    what = spec(code) if isinstance(code, str) else code
    child = Child(what, log or io.BytesIO())  # type: ignore[arg-type]  # has what is used
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


def output(command: tuple[str, ...], environment: dict[str, str]) -> list[str]:
    """The lines that a command writes."""
    lines: list[str] = []
    with started(ProcessSpec(ProcessId("worker", 0), command, environment)) as child:
        child.listen(collect(lines))
        assert ended(child) == 0
        child.close()
    return lines


def test_a_command_gets_its_variables_and_no_other() -> None:
    variables = {"PATH": "/usr/bin:/bin", "PYTHONHOME": "/nowhere", "NAME": "a=b"}
    assert set(output(("env",), variables)) == {f"{key}={text}" for key, text in variables.items()}


def test_a_command_gets_its_arguments_as_they_are() -> None:
    arguments = ("two words", "", "-c", "--", "line\nend", "\udcff")
    show = "import os, sys; print([os.fsencode(each) for each in sys.argv[1:]])"
    lines = output((sys.executable, "-c", show, *arguments), {})
    assert lines == [str([os.fsencode(each) for each in arguments])]


@LINUX_ONLY
def test_a_command_ignores_no_signal_that_we_do_not_ignore_for_it() -> None:
    [line] = output(("grep", "SigIgn", "/proc/self/status"), {"PATH": "/usr/bin:/bin"})
    ignored = int(line.split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python itself ignores
        assert not ignored >> (number - 1) & 1


@LINUX_ONLY
def test_nothing_runs_when_its_parent_was_gone_before(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("shardline.processes.os.getpid", lambda: 1)  # whose child it is not
        child = Child(spec("print('it runs')"), io.BytesIO())
    child.listen(collect(lines))
    assert ended(child) == 1
    child.close()
    assert lines == []


def test_processes_can_be_started_while_others_are_listened_to() -> None:
    lines: list[str] = []
    with started("input()") as first, started("import time; time.sleep(60)") as second:
        second.listen(collect(lines))
        first.listen(collect(lines))
        with started("print('third')") as third:
            third.listen(collect(lines))
            assert ended(third) == 0
            third.close()
    assert "third" in lines


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
