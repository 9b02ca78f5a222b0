"""A line of updates.jsonl for every entry, and what the reader of a run makes of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ps_core.entries import Contribution, Entry, WorkerEvent
from ps_core.errors import ConfigError, DataLossError
from ps_core.leases import Lease, PassEnd, PassOpened
from ps_core.updates_log import FILE_NAME, UpdatesLog
from shardline.ledger import Balance, Ledger

INCARNATION = 2**63 + 1
"""More than a float holds exactly, which is what readers in other languages have."""


def lease(number: int, start: int, length: int, *, loader: int = 0, of_pass: int = 0) -> Lease:
    return Lease(number, loader, of_pass, start, length)


def contribution(*leases: Lease, step: int = 3, samples: int = 32) -> Contribution:
    return Contribution(1, INCARNATION, step, step + 1, samples, leases, "applied")


def write(folder: Path, *entries: Entry) -> list[dict[str, Any]]:
    """The lines of these entries."""
    log = UpdatesLog(str(folder))
    log.write(entries)
    log.close()
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """Without the time, which must be now."""
    assert abs(line.pop("time") - time.time()) < 60
    return line


# -- Lines -----------------------------------------------------------------------------------------


def test_the_beginning_of_a_pass_says_how_much_it_reads(tmp_path: Path) -> None:
    [line] = write(tmp_path, PassOpened(2, 5, num_samples=1437, dropped=29))
    assert line == {"kind": "pass", "loader": 2, "pass": 5, "num_samples": 1437, "dropped": 29}


def test_the_end_of_a_pass_says_what_it_has_left_over(tmp_path: Path) -> None:
    [line] = write(tmp_path, PassEnd(2, 5, ((64, 96), (100, 101))))
    assert line == {
        "kind": "pass_end",
        "loader": 2,
        "pass": 5,
        "abandoned": [[64, 96], [100, 101]],
    }


@pytest.mark.parametrize("event", ["joined", "evicted", "preempted", "failed", "finished"])
def test_a_worker_that_comes_or_goes_has_a_line(tmp_path: Path, event: Any) -> None:  # noqa: ANN401 - a literal
    [line] = write(tmp_path, WorkerEvent(1, INCARNATION, event, 16, reason='it said "no"\n'))
    assert timeless(line) == {
        "kind": "worker",
        "worker": 1,
        "incarnation": "9223372036854775809",
        "event": event,
        "reason": 'it said "no"\n',
        "step": 16,
    }


def test_an_update_names_its_samples(tmp_path: Path) -> None:
    [line] = write(tmp_path, contribution(lease(8, 32, 16), lease(9, 64, 16)))
    assert timeless(line) == {
        "kind": "update",
        "loader": 0,
        "pass": 0,
        "version": 4,
        "worker": 1,
        "incarnation": "9223372036854775809",
        "step": 3,
        "samples": 32,
        "weight": 32,
        "state": "applied",
        "ranges": [[32, 48], [64, 80]],
    }


def test_an_update_of_which_a_part_was_used_says_so(tmp_path: Path) -> None:
    entry = Contribution(1, INCARNATION, 3, 4, 16, (lease(8, 0, 16),), "in_part")
    [line] = write(tmp_path, entry)
    assert (line["state"], line["ranges"]) == ("in_part", [[0, 16]])


def test_an_update_of_a_script_with_its_own_data_has_no_pass(tmp_path: Path) -> None:
    [line] = write(tmp_path, contribution(samples=1))
    assert (line["loader"], line["pass"], line["ranges"], line["samples"]) == (None, None, [], 1)


def test_an_update_of_samples_of_two_passes_has_a_line_for_each(tmp_path: Path) -> None:
    leases = lease(8, 0, 4), lease(9, 0, 4, loader=1), lease(10, 8, 4)
    lines = write(tmp_path, contribution(*leases, samples=12))
    assert [(line["loader"], line["pass"], line["ranges"]) for line in lines] == [
        (0, 0, [[0, 4], [8, 12]]),
        (1, 0, [[0, 4]]),
    ]


# -- The file --------------------------------------------------------------------------------------


def test_lines_are_added_to_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, PassOpened(0, 0, 10, 0))
    kinds = [line["kind"] for line in write(tmp_path, PassEnd(0, 0, ()))]
    assert kinds == ["pass", "pass_end"]


def test_what_was_written_is_there_after_a_flush(tmp_path: Path) -> None:
    log = UpdatesLog(str(tmp_path))
    log.write([PassOpened(0, 0, 10, 0)])
    log.flush()
    assert (tmp_path / FILE_NAME).read_text().endswith("}\n")
    log.close()


def test_closing_twice_and_writing_afterwards_are_harmless(tmp_path: Path) -> None:
    log = UpdatesLog(str(tmp_path))
    log.close()
    log.close()
    log.write([PassOpened(0, 0, 10, 0)])
    log.flush()
    assert (tmp_path / FILE_NAME).read_text() == ""


def test_without_a_run_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = UpdatesLog("")
    log.write([PassOpened(0, 0, 10, 0)])
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_does_not_exist_is_the_user_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot write .*No such file or directory.*job\.run_dir"
    ):
        UpdatesLog(str(tmp_path / "nowhere"))


# -- What a run's reader makes of it ---------------------------------------------------------------


def test_the_reader_of_a_run_adds_all_lines_up(tmp_path: Path) -> None:
    # One pass of 20 samples, of which 2 are not read: 8 applied by worker 1, 4 in part by worker 2
    # that died, 3 of them once more by worker 1, 3 abandoned. That leaves 3 of which nobody says
    # anything. Then a pass that has not ended, and a step with a script's own data.
    other = 12
    write(
        tmp_path,
        WorkerEvent(1, INCARNATION, "joined", 0),
        WorkerEvent(2, other, "joined", 0),
        PassOpened(0, 0, 20, 2),
        contribution(lease(1, 0, 8), step=0, samples=8),
        Contribution(2, other, 0, 1, 4, (lease(2, 8, 4),), "in_part"),
        WorkerEvent(2, other, "evicted", 1, "it was silent"),
        contribution(lease(3, 9, 3), step=1, samples=3),
        PassEnd(0, 0, ((12, 15),)),
        PassOpened(0, 1, 20, 0),
        contribution(step=2, samples=1),
        WorkerEvent(1, INCARNATION, "preempted", 3),
        WorkerEvent(1, INCARNATION, "failed", 3),
        WorkerEvent(1, INCARNATION, "finished", 3),
    )
    ledger = Ledger()
    with (tmp_path / FILE_NAME).open("rb") as file:
        ledger.read(file)
    assert ledger.balance() == Balance(
        samples_lost=3,
        samples_repeated=3,
        samples_applied=11,
        samples_applied_in_part=4,
        samples_abandoned=3,
        updates_duplicated=0,
        passes=2,
        joins=2,
        evictions=1,
        malformed_ledger_lines=0,
    )


def test_the_reader_sees_a_step_that_counts_twice(tmp_path: Path) -> None:
    write(tmp_path, contribution(), contribution())
    ledger = Ledger()
    ledger.read((tmp_path / FILE_NAME).read_bytes().splitlines(keepends=True))
    assert ledger.balance().updates_duplicated == 1


def test_a_step_with_samples_of_two_passes_does_not_count_twice(tmp_path: Path) -> None:
    write(tmp_path, contribution(lease(8, 0, 4), lease(9, 0, 4, loader=1)))
    ledger = Ledger()
    ledger.read((tmp_path / FILE_NAME).read_bytes().splitlines(keepends=True))
    assert ledger.balance().updates_duplicated == 0
    assert ledger.balance().samples_applied == 8


def test_a_run_does_not_begin_where_another_has_begun(tmp_path: Path) -> None:
    for _ in range(2):  # nobody had come to the first one
        UpdatesLog(str(tmp_path), is_new=True).close()
    lines = write(tmp_path, WorkerEvent(0, 11, "joined", 0))
    with pytest.raises(DataLossError, match=r"updates\.jsonl tells of a run .*empty job\.run_dir"):
        UpdatesLog(str(tmp_path), is_new=True)
    assert write(tmp_path) == lines, "it is as it was"


def test_an_update_says_what_it_weighs_where_that_is_not_its_samples(tmp_path: Path) -> None:
    entry = Contribution(1, INCARNATION, 3, 4, 16, (), "applied", given_weight=2.5)
    [line] = write(tmp_path, entry)
    assert (line["samples"], line["weight"]) == (16, 2.5)
