"""Rendered manifests for tests, each rendered once."""

import functools
import os
import shutil
from pathlib import Path

import pytest

from tests.manifests.render import Document, render

_render = functools.cache(render)


def rendered(folder: Path) -> list[Document]:
    """What a folder renders to. Skips the test without kubectl, unless REQUIRE_TOOLS is set."""
    if shutil.which("kubectl") is None and not os.environ.get("REQUIRE_TOOLS"):
        pytest.skip("needs kubectl")
    return _render(folder)
