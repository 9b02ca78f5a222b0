"""Commands of the integration run: shown, bounded, and with a reason when they fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from rich.console import Console

T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parents[2]
_WIDTH: Final = None if sys.stdout.isatty() else 120
console: Final = Console(highlight=False, soft_wrap=True, width=_WIDTH)
_LAST_LINES: Final = 40


class Failure(Exception):
    """A step of the run did not do what it should; the message says which and why."""


def say(text: str) -> None:
    """A line for whoever watches."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}")


def run(
    command: Sequence[str], seconds: float = 60, environment: Mapping[str, str] | None = None
) -> str:
    """What the command prints, in the project's folder. Raises Failure."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=dict(os.environ) | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"{' '.join(command)} took more than {seconds:g} s") from error
    except OSError as error:
        raise Failure(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise Failure(f"{' '.join(command)} ended with {done.returncode}:\n{last}")
    return done.stdout


def succeeds(command: Sequence[str], seconds: float = 60) -> bool:
    """Whether the command ends well."""
    try:
        run(command, seconds)
    except Failure:
        return False
    return True


def wait_for(what: str, look: Callable[[], T | None], seconds: float, pause: float = 0.5) -> T:
    """The first answer of `look` that is one (not None, not False). Raises Failure."""
    deadline = time.monotonic() + seconds
    while True:
        answer = look()
        if answer is not None and answer is not False:
            return answer
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not within {seconds:g} s")
        time.sleep(pause)
