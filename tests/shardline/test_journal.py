"""What a worker writes into metrics.jsonl, read back by the launcher's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from ps_core.exchange import Traffic
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


def test_values_between_two_lines_are_kept_for_the_next(tmp_path: Path, tail: Tail) -> None:
    journal = Journal(tmp_path, 0, Traffic(), "a1")
    journal.step(0, 1, 8)
    journal.log({"loss": 2.0})
    journal.log({"loss": 1.0, "accuracy": 0.5})
    journal.end(1, {"accuracy": 0.5})
    journal.close()
    first, second, last = tail.read()
    assert isinstance(first, StepRecord)
    assert isinstance(second, StepRecord)
    assert isinstance(last, EndRecord)
    assert (first.values, second.values) == ({}, {"loss": 1.0, "accuracy": 0.5})
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
