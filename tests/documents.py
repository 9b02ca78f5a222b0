"""The shell commands of a document, by who runs them: `sh laptop`, `sh engine` or `sh cluster`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
DEPLOY: Final = ROOT / "docs" / "deploy.md"
MARKS: Final = frozenset({"laptop", "engine", "cluster"})
_BLOCK: Final = re.compile(r"^```sh *(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[tuple[str, str]]:
    """Mark and commands of each block, in order."""
    return _BLOCK.findall(path.read_text(encoding="utf-8"))


def commands(path: Path, mark: str) -> list[str]:
    """The commands of all blocks with this mark; at least one."""
    found = [text for own, text in blocks(path) if own == mark]
    assert found, f"{path.name} has no block marked {mark}"
    return found
