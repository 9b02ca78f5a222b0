"""Fixtures: every kustomization, and what it renders to."""

from pathlib import Path

import pytest

from tests.manifests.render import Document, folders
from tests.manifests.rendered import rendered


@pytest.fixture(params=folders(), ids=lambda path: f"{path.parent.name}/{path.name}")
def folder(request: pytest.FixtureRequest) -> Path:
    """Every overlay and every combination."""
    path: Path = request.param
    return path


@pytest.fixture
def documents(folder: Path) -> list[Document]:
    """What it renders to. Shared: do not change it."""
    return rendered(folder)
