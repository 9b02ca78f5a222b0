"""What stands in `updates.jsonl`, whoever writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from allreduce.chronicle import Chronicle
from allreduce.record import Call, Reading, Record
from allreduce.rendezvous import Member
from allreduce.table import Table
from ps_core.leases import PassEnd
from ps_core.updates_log import FILE_NAME


def member(rank: int, token: str = "") -> Member:
    return Member(rank, pid=100 + rank, token=token or f"{rank + 16:x}", device="cpu")


MEMBERS = [member(0), member(1), member(2)]


def reading(start: int, length: int = 2) -> Reading:
    return Reading(0, 0, start, length, num_positions=40, unit=2, is_shared=False)


def step(version: int, starts: Sequence[int], num_stages: int = 1) -> Table:
    """Each rank takes a step with two samples from its start on; None: it waits."""
    rows = {
        rank: Record(Call.STEP, version - 1, samples=2, readings=(reading(start),))
        for rank, start in enumerate(starts)
    }
    return Table(rows, num_stages)


def lines(folder: Path, kind: str, *fields: str) -> list[tuple[Any, ...]]:
    text = (folder / FILE_NAME).read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    return [tuple(each[field] for field in fields) for each in entries if each["kind"] == kind]


Open = Callable[[int], Chronicle]


@pytest.fixture
def open_for(tmp_path: Path) -> Iterator[Open]:
    """The chronicle of a rank."""
    with ExitStack() as stack:

        def make(rank: int) -> Chronicle:
            chronicle = Chronicle(str(tmp_path), rank)
            stack.callback(chronicle.close)
            return chronicle

        yield make


def updates(folder: Path) -> list[tuple[Any, ...]]:
    return lines(folder, "update", "version", "worker", "ranges")


def test_only_the_first_worker_writes(open_for: Open, tmp_path: Path) -> None:
    chronicles = [open_for(rank) for rank in range(3)]
    for rank, each in enumerate(chronicles):
        assert each.formed(MEMBERS, (), 0, is_first=rank == 0) is (rank == 0)
        each.updated(step(1, [0, 2, 4]), 1)
        each.ended([PassEnd(0, 0, ())])
        each.close()
    assert lines(tmp_path, "worker", "worker", "event") == [(i, "joined") for i in range(3)]
    assert lines(tmp_path, "pass", "loader", "pass", "num_samples") == [(0, 0, 40)]
    assert updates(tmp_path) == [(1, 0, [[0, 2]]), (1, 1, [[2, 4]]), (1, 2, [[4, 6]])]
    assert lines(tmp_path, "pass_end", "loader", "pass") == [(0, 0)]


def test_a_pass_begins_once_and_ends_only_if_it_has_begun(open_for: Open, tmp_path: Path) -> None:
    chronicle = open_for(0)
    chronicle.formed(MEMBERS[:1], (), 0, is_first=True)
    for version in (1, 2):
        chronicle.updated(step(version, [2 * version]), version)
    chronicle.ended([PassEnd(0, 0, ()), PassEnd(5, 3, ())])
    assert lines(tmp_path, "pass", "loader") == [(0,)]
    assert lines(tmp_path, "pass_end", "loader") == [(0,)]


def test_who_is_gone_was_evicted_or_has_left_and_who_is_new_has_joined(
    open_for: Open, tmp_path: Path
) -> None:
    chronicle = open_for(0)
    chronicle.formed(MEMBERS, (), 0, is_first=True)
    again = member(1, token="ff")
    chronicle.formed([member(0), again], (2,), 7, is_first=True)
    events = lines(tmp_path, "worker", "worker", "incarnation", "event", "step")[3:]
    assert events == [
        (1, str(int(MEMBERS[1].token, 16)), "evicted", 7),
        (2, str(int(MEMBERS[2].token, 16)), "preempted", 7),
        (1, "255", "joined", 7),
    ]


@pytest.mark.parametrize("has_written", [True, False])
def test_who_becomes_the_first_adds_what_the_one_before_has_not_written(
    open_for: Open, tmp_path: Path, *, has_written: bool
) -> None:
    first, second = (open_for(rank) for rank in (0, 1))
    for rank, each in enumerate((first, second)):
        each.formed(MEMBERS, (), 0, is_first=rank == 0)
    for version in (1, 2):
        table = step(version, [6 * version, 6 * version + 2, 6 * version + 4])
        if version == 1 or has_written:
            first.updated(table, version)
        second.updated(table, version)
    assert second.formed(MEMBERS[1:], (), 2, is_first=True)
    second.caught_up(table, 2)
    assert updates(tmp_path) == [
        *[(1, rank, [[6 + 2 * rank, 8 + 2 * rank]]) for rank in range(3)],
        *[(2, rank, [[12 + 2 * rank, 14 + 2 * rank]]) for rank in range(3)],
    ]


def test_the_last_update_is_found_in_a_long_file_that_a_death_has_cut(
    open_for: Open, tmp_path: Path
) -> None:
    first = open_for(0)
    first.formed(MEMBERS, (), 0, is_first=True)
    for version in range(1, 301):
        first.updated(step(version, [0, 2, 4]), version)
    path = tmp_path / FILE_NAME
    assert path.stat().st_size > 2**16
    before = len(updates(tmp_path))
    second = open_for(1)
    second.formed(MEMBERS, (), 300, is_first=False)
    second.formed(MEMBERS[1:], (), 300, is_first=True)
    second.caught_up(step(300, [0, 2, 4]), 300)
    assert len(updates(tmp_path)) == before
    with path.open("a") as file:
        file.write('{"kind":"update","version":30')
    assert open_for(2).formed(MEMBERS[2:], (), 300, is_first=True)


def test_of_a_split_model_the_first_worker_of_each_replica_stands_for_it(
    open_for: Open, tmp_path: Path
) -> None:
    chronicle = open_for(0)
    members = [member(rank) for rank in range(4)]
    chronicle.formed(members, (), 0, is_first=True)
    chronicle.updated(step(1, [0, 90, 2, 91], num_stages=2), 1)
    assert updates(tmp_path) == [(1, 0, [[0, 2]]), (1, 2, [[2, 4]])]


def test_without_a_run_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chronicle = Chronicle("", 0)
    chronicle.formed(MEMBERS, (), 0, is_first=True)
    chronicle.updated(step(1, [0, 2, 4]), 1)
    chronicle.caught_up(step(1, [0, 2, 4]), 1)
    chronicle.close()
    assert not list(tmp_path.iterdir())
