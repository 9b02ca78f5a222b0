"""Rendered manifests for tests, each rendered once."""

import functools
from pathlib import Path

from tests.manifests.render import Document, render
from tests.tools import needed

_render = functools.cache(render)


def rendered(folder: Path) -> list[Document]:
    """What a folder renders to."""
    needed("kubectl")
    return _render(folder)
