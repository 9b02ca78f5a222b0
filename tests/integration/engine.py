"""A Docker engine: the one that runs, or one that is started for as long as it is needed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.integration.shell import Failure, say, succeeds, wait_for

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0
_LAST_BYTES: Final = 2000


@contextmanager
def engine() -> Iterator[None]:
    """Docker commands work inside. Raises Failure when no engine can be started."""
    if succeeds(["docker", "info"]):
        yield
        return
    daemon = shutil.which("dockerd")
    if daemon is None:
        raise Failure("no Docker engine runs, and dockerd is not installed")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "dockerd.log"
        say("starting dockerd")
        with log.open("wb") as file:
            # Not in this process group: Ctrl-C must not end it before its containers are removed.
            process = subprocess.Popen(
                [daemon], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            _wait_for(process, log)
            yield
        finally:
            say("stopping dockerd")
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_SECONDS)


def _wait_for(process: subprocess.Popen[bytes], log: Path) -> None:
    def look() -> bool:
        if process.poll() is not None:
            raise Failure(f"dockerd ended with {process.returncode}:\n{_end(log)}")
        return succeeds(["docker", "info"])

    try:
        wait_for("dockerd answers", look, _START_SECONDS)
    except Failure as failure:
        raise Failure(f"{failure}\n{_end(log)}") from failure


def _end(log: Path) -> str:
    return log.read_bytes()[-_LAST_BYTES:].decode(errors="replace")
