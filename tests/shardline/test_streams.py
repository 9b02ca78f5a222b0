import subprocess
import sys
from pathlib import Path

import pytest

from tests.shardline.stand_ins import environment

PROGRAM = """
import os, sys
from shardline.streams import prepare_streams, say
prepare_streams()
with open(sys.argv[1], "w") as file:
    say("an error\\n")
    print("snowman \\N{SNOWMAN}", flush=True)
    file.write(f"file {file.fileno() > 2}\\n")
"""


def run(tmp_path: Path, redirection: str, encoding: str = "utf-8") -> tuple[int, str, str]:
    """Exit code, standard output and error of a process with this redirection of its streams."""
    command = f'exec "$0" -c "$1" "$2" {redirection}'
    done = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, PROGRAM, str(tmp_path / "file")],
        env=environment() | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (tmp_path / "file").read_text() == "file True\n"
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirection", "out", "err"),
    [
        ("", "snowman \N{SNOWMAN}\n", "an error\n"),
        (">&-", "", "an error\n"),
        ("2>&-", "snowman \N{SNOWMAN}\n", ""),
        ("<&- >&- 2>&-", "", ""),
        ("2>/dev/full", "snowman \N{SNOWMAN}\n", ""),
    ],
)
def test_closed_and_full_streams_swallow_what_is_written_and_files_keep_apart(
    tmp_path: Path, redirection: str, out: str, err: str
) -> None:
    assert run(tmp_path, redirection) == (0, out, err)


def test_what_the_output_cannot_encode_is_a_question_mark(tmp_path: Path) -> None:
    assert run(tmp_path, "", "ascii") == (0, "snowman ?\n", "an error\n")
