import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from shardline.curves import curves, draw, labelled, mean
from shardline.records import StepRecord


def step(rank: int, number: int, values: Mapping[str, float]) -> StepRecord:
    return StepRecord(1.0, rank, "a", 0, number, 1, 1, 1, number, values)


RECORDS = [
    step(0, 1, {"loss": 4.0}),
    step(1, 1, {"loss": 2.0}),
    step(0, 2, {"loss": 3.0, "accuracy": 0.5}),
    step(1, 3, {}),
    step(1, 4, {"loss": 1.0}),
]


def test_a_curve_holds_what_one_worker_logged() -> None:
    assert curves(RECORDS, "loss") == {0: ([1, 2], [4.0, 3.0]), 1: ([1, 4], [2.0, 1.0])}
    assert curves(RECORDS, "accuracy") == {0: ([2], [0.5])}
    assert curves(RECORDS, "nothing") == {}


def test_the_mean_is_taken_step_by_step() -> None:
    assert mean(curves(RECORDS, "loss").values()) == ([1, 2, 4], [3.0, 3.0, 1.0])


def test_many_workers_become_one_line() -> None:
    lines = {rank: ([1], [float(rank)]) for rank in range(9)}
    assert labelled(lines) == {"mean of 9 workers": ([1], [4.0])}
    del lines[8]
    assert list(labelled(lines)) == [f"worker {rank}" for rank in range(8)]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "training.png"
    records = [*RECORDS, step(0, 5, {"loss": float("nan")})]
    assert draw(records, path, "digits")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_values_there_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "training.png"
    assert not draw([step(0, 1, {"lr": 0.1})], path, "digits")
    assert not path.exists()


def test_a_missing_matplotlib_is_an_import_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        draw(RECORDS, tmp_path / "training.png", "digits")
