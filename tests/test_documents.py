"""What the documents tell people to type works, or says what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ps_core.config import inherited_environment
from tests.documents import DEPLOY, MARKS, ROOT, blocks, commands

MARKED = sorted(
    path for folder in ("docs", "k8s") for path in (ROOT / folder).rglob("*.md") if blocks(path)
)


def test_there_are_commands_to_look_at() -> None:
    assert {DEPLOY, ROOT / "k8s" / "README.md"} <= set(MARKED)


@pytest.mark.parametrize("path", MARKED, ids=str)
def test_every_block_of_commands_says_who_runs_it(path: Path) -> None:
    assert {mark for mark, _ in blocks(path)} <= MARKS


@pytest.mark.slow
@pytest.mark.parametrize("text", commands(DEPLOY, "laptop"))
def test_the_commands_for_a_laptop_work(text: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", text],
        cwd=tmp_path,
        env=dict(inherited_environment()) | {"PATH": path},
        timeout=300,
        check=True,
    )
