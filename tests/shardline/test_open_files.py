import subprocess
import sys

import pytest

from tests.shardline.stand_ins import environment

PROGRAM = """
import resource, sys
from ps_core.errors import ConfigError
from shardline.open_files import allow_open_files
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    allow_open_files(num_processes=10)
except ConfigError as error:
    print(error)
else:
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "words"),
    [
        (200, 300, "200 300"),
        (40, 300, "84 300"),
        (
            40,
            50,
            "a run of 10 processes needs about 84 open files in each, and this machine allows",
        ),
    ],
)
def test_the_limit_of_open_files_is_raised_or_the_run_refused(
    soft: int, hard: int, words: str
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(soft), str(hard)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(words), done.stderr
