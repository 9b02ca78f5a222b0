"""The files of a run that hold its model: their names, what their headers say, and what a writer
leaves that dies. Needs no torch.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Final

COMPLETE: Final = "model.safetensors"
RESCUED: Final = "interrupted.safetensors"
"""Of a model that was not trained to the end."""
INTERRUPTED: Final = "interrupted"
"""The key in its metadata that says where training was."""


def temporary(path: Path) -> Path:
    """Where a writer of `path` writes, of which there may be several, on several machines."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def remove_unfinished(path: Path) -> None:
    """Remove what writers of `path` have left that died of it. Call it when none is at work."""
    for unfinished in path.parent.glob(f".{path.name}.*"):
        unfinished.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says besides its tensors; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return dict(header["__metadata__"])
    except (OSError, ValueError, KeyError):
        return {}
