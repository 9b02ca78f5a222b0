"""What a worker writes into metrics.jsonl, read back by the launcher's own reader."""

from __future__ import annotations

import errno
import itertools
import os
import time
from pathlib import Path

import pytest

from ps_core.exchange import Traffic
from shardline import journal as journal_module
from shardline.journal import Journal
from shardline.records import EndRecord, JoinRecord, StepRecord, Tail


@pytest.fixture
def tail(tmp_path: Path) -> Tail:
    return Tail(tmp_path / "metrics.jsonl")


def test_a_step_is_written_with_the_totals_of_its_worker(tmp_path: Path, tail: Tail) -> None:
    journal = Journal(tmp_path, 1, Traffic(pushed_bytes=10, pulled_bytes=20), "a1")
    journal.step(epoch=2, version=7, samples=64)
    (record,) = tail.read()
    assert isinstance(record, StepRecord)
    assert (record.rank, record.incarnation) == (1, "a1")
    assert (record.epoch, record.version, record.samples) == (2, 7, 64)
    assert (record.pushed_bytes, record.pulled_bytes) == (10, 20)
    journal.close()


def test_that_the_worker_has_joined_is_written(tmp_path: Path, tail: Tail) -> None:
    journal = Journal(tmp_path, 1, Traffic(), "a1")
    journal.joined()
    journal.close()
    (record,) = tail.read()
    assert isinstance(record, JoinRecord)
    assert (record.rank, record.incarnation) == (1, "a1")


def values(tail: Tail) -> list[tuple[int, int, dict[str, float]]]:
    """Epoch, step and values of every line that has any."""
    steps = [each for each in tail.read() if isinstance(each, StepRecord)]
    return [(each.epoch, each.step, dict(each.values)) for each in steps if each.values]


def test_every_logged_value_is_kept_at_its_own_step_and_epoch(tmp_path: Path, tail: Tail) -> None:
    journal = Journal(tmp_path, 0, Traffic(), "a1")
    expected = []
    journal.log({"loss": 9.0})
    expected.append((0, 0, {"loss": 9.0}))
    for epoch in range(3):
        for version in range(1 + 20 * epoch, 21 + 20 * epoch):
            journal.step(epoch, version, 8 * version)
            journal.log({"loss": 1 / version})
            expected.append((epoch, version, {"loss": 1 / version}))
        journal.log({"accuracy": 0.5})
        expected[-1][2]["accuracy"] = 0.5
    journal.close()
    kept: dict[tuple[int, int], dict[str, float]] = {}
    for epoch, step, each in values(tail):
        kept.setdefault((epoch, step), {}).update(each)
    assert [(*place, each) for place, each in kept.items()] == expected


def test_a_name_that_is_logged_twice_at_a_step_is_kept_twice(tmp_path: Path, tail: Tail) -> None:
    journal = Journal(tmp_path, 0, Traffic(), "a1")
    journal.step(0, 1, 8)
    for number in range(5):
        journal.log({"loss": float(number)})
    journal.close()
    assert [each["loss"] for _, _, each in values(tail)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_many_values_a_second_make_few_writes(
    tmp_path: Path, tail: Tail, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    write = os.write

    def counted(descriptor: int, data: bytes) -> int:
        sizes.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", counted)
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    monkeypatch.setattr(journal_module, "_INTERVAL_SECONDS", 100)
    journal = Journal(tmp_path, 0, Traffic(), "a1")
    for version in range(500):
        journal.step(0, version, version)
        journal.log({"loss": 1.0})
    journal.close()
    assert len(values(tail)) == 500
    assert len(sizes) <= 12


def test_a_full_disk_is_told_once_and_stops_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(journal_module, "_INTERVAL_SECONDS", 0)
    journal = Journal(tmp_path, 0, Traffic(), "a1")
    for version in range(3):
        journal.step(0, version, version)
    journal.end(3, {})
    journal.close()
    said = "shardline: metrics.jsonl lacks lines: No space left on device\n"
    assert capsys.readouterr().err == said


def test_the_last_line_tells_the_totals_and_the_results(tmp_path: Path, tail: Tail) -> None:
    journal = Journal(tmp_path, 0, Traffic(), "a1")
    journal.step(0, 1, 8)
    journal.log({"loss": 2.0, "accuracy": 0.5})
    journal.end(1, {"accuracy": 0.5})
    journal.close()
    first, second, last = tail.read()
    assert isinstance(first, StepRecord)
    assert isinstance(second, StepRecord)
    assert isinstance(last, EndRecord)
    assert (first.values, second.values) == ({}, {"loss": 2.0, "accuracy": 0.5})
    assert (last.steps, last.samples, last.version) == (1, 8, 1)
    assert last.reported == {"accuracy": 0.5}
    assert {record.incarnation for record in (first, second, last)} == {"a1"}


def test_many_steps_a_second_make_few_lines(tmp_path: Path, tail: Tail) -> None:
    journal = Journal(tmp_path, 0, Traffic(), "a1")
    for version in range(1000):
        journal.step(0, version, version)
    journal.close()
    assert 1 <= len(tail.read()) < 100


def test_without_a_run_directory_nothing_is_written(tmp_path: Path) -> None:
    journal = Journal(None, 0, Traffic(), "a1")
    journal.step(0, 1, 8)
    journal.end(1, {})
    journal.close()
    assert list(tmp_path.iterdir()) == []
