import math
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from shardline.curves import Curve, Curves, labelled, mean
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


def curves(*records: StepRecord) -> Curves:
    found = Curves()
    found.add(records)
    return found


def points(curve: Curve) -> list[tuple[int, float]]:
    return list(zip(curve.steps, curve.values, strict=True))


def curve_of(*given: tuple[int, float]) -> Curve:
    curve = Curve()
    for each in given:
        curve.add(*each)
    return curve


def test_a_curve_holds_what_one_worker_logged() -> None:
    found = curves(*RECORDS)
    losses = {rank: points(curve) for rank, curve in found.of("loss").items()}
    assert losses == {0: [(1, 4.0), (2, 3.0)], 1: [(1, 2.0), (4, 1.0)]}
    assert {rank: points(curve) for rank, curve in found.of("accuracy").items()} == {0: [(2, 0.5)]}
    assert found.of("nothing") == {}


def test_the_mean_is_taken_step_by_step() -> None:
    lines = curves(*RECORDS).of("loss").values()
    assert points(mean(lines)) == [(1, 3.0), (2, 3.0), (4, 1.0)]


def test_many_workers_become_one_line() -> None:
    lines = {rank: curve_of((1, float(rank))) for rank in range(9)}
    (label,) = labelled(lines)
    assert label == "mean of 9 workers"
    assert points(labelled(lines)[label]) == [(1, 4.0)]
    del lines[8]
    assert list(labelled(lines)) == [f"worker {rank}" for rank in range(8)]


def test_a_line_of_many_points_keeps_its_lowest_and_highest_ones() -> None:
    generator = random.Random(0)
    curve = curve_of(*((n, generator.random()) for n in range(100_000)))
    curve.values[777], curve.values[55_555] = -1.0, 2.0
    curve.values[10:20] = type(curve.values)("d", [math.nan] * 10)
    thin = curve.thinned()
    assert len(thin.steps) <= 2000
    assert {(777, -1.0), (55_555, 2.0)} <= set(points(thin)) <= set(points(curve))
    assert list(thin.steps) == sorted(thin.steps)


def test_a_line_of_few_points_keeps_all() -> None:
    curve = curve_of(*((n, float(n)) for n in range(2000)))
    assert curve.thinned() is curve


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "training.png"
    assert curves(*RECORDS, step(0, 5, {"loss": float("nan")})).draw(path, "digits")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_million_points_are_drawn_as_fast_as_few(tmp_path: Path) -> None:
    found = curves(*RECORDS)
    found.draw(tmp_path / "few.png", "digits")  # imports matplotlib
    curve = found.of("loss")[0]
    curve.steps.extend(range(1_000_000))
    curve.values.extend((number * 0.618) % 1 for number in range(1_000_000))
    started = time.process_time()
    found.draw(tmp_path / "many.png", "digits")
    assert time.process_time() - started < 10


def test_without_values_there_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "training.png"
    assert not curves(step(0, 1, {"lr": 0.1})).draw(path, "digits")
    assert not path.exists()


def test_a_missing_matplotlib_is_an_import_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        curves(*RECORDS).draw(tmp_path / "training.png", "digits")
