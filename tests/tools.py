"""Programs that some tests need and nobody can install with pip."""

from __future__ import annotations

import os
import shutil

import pytest


def needed(name: str) -> str:
    """Its path. Without it the test is skipped, or fails where REQUIRE_TOOLS is set."""
    path = shutil.which(name)
    if path is not None:
        return path
    if os.environ.get("REQUIRE_TOOLS"):
        pytest.fail(f"{name} is not installed")
    pytest.skip(f"{name} is not installed")
