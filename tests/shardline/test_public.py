"""What a user finds: names, help and words, of a session alone."""

from __future__ import annotations

import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch

import shardline
from ps_core.errors import UsageError
from shardline.session import Session
from tests.cluster import run_alone

ROOT = Path(__file__).parents[2]


def test_the_package_lists_its_public_names() -> None:
    assert dir(shardline) == ["Session", "ShardlineError", "__version__", "connect"]


def test_every_package_says_that_it_is_annotated() -> None:
    for package in ROOT.glob("*/__init__.py"):
        assert (package.parent / "py.typed").exists(), package


def public_attributes(session: Session) -> dict[str, Any]:
    return {"names": sorted(name for name in vars(session) if not name.startswith("_"))}


def test_the_help_of_a_session_explains_its_attributes() -> None:
    names = run_alone(public_attributes).values["names"]
    text = pydoc.render_doc(Session)
    for name in set(names) - {"exchange"}:  # which the optimizer uses
        assert f" {name}: " in text


def epochs(session: Session) -> dict[str, Any]:
    model = torch.nn.Linear(2, 1)
    session.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(UsageError, match="start=-1"):
        list(session.epochs(3, start=-1))
    return {"epochs": list(session.epochs(5, start=3)), "next": list(session.epochs(2))}


def test_epochs_may_start_later_and_a_run_without_a_folder_says_so_once(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = "the model, logged values and results of this job will not be written: set"
    assert run_alone(epochs).values == {"epochs": [3, 4], "next": [0, 1]}
    assert capfd.readouterr().err.count(words) == 1
    run_alone(epochs, environ={"SHARDLINE_JOB_RUN_DIR": str(tmp_path)})
    assert words not in capfd.readouterr().err
