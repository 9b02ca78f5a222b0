"""`updates.jsonl` of an all-reduce job, written by the first worker of those that are there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from allreduce.record import Reading
from allreduce.rendezvous import Member
from allreduce.table import Table
from ps_core.entries import Contribution, Event, WorkerEvent
from ps_core.leases import Lease, PassEnd, PassOpened
from ps_core.updates_log import FILE_NAME, UpdatesLog

_TAIL_BYTES = 2**16
"""Of the file, which hold its last update."""


class Chronicle:
    """Every worker has one; only that of the first writes. If that worker dies between an update
    and its line, the next one adds it.
    """

    def __init__(self, run_dir: str, rank: int) -> None:
        self._run_dir = run_dir
        self._me = rank
        self._log: UpdatesLog | None = None
        self._told: set[tuple[int, int]] = set()
        """Passes that the file knows of."""
        self._members: dict[int, Member] = {}
        self._before: dict[int, Member] = {}

    def formed(
        self, members: Iterable[Member], leavers: Iterable[int], version: int, *, is_first: bool
    ) -> bool:
        """The group has formed, without the `leavers`, which left well. True: this worker has
        become the first.
        """
        self._before, self._members = self._members, {each.rank: each for each in members}
        if not self._before and version:  # a job that runs: the others were there before
            self._before = {rank: each for rank, each in self._members.items() if rank != self._me}
        if not is_first:
            self.close()
            return False
        was_first, preempted = self._log is not None, set(leavers)
        log = self._log = self._log or UpdatesLog(self._run_dir)
        for rank, member in self._before.items():
            if self._members.get(rank) != member:
                event: Event = "preempted" if rank in preempted else "evicted"
                log.write([_event(member, event, version)])
        new = [each for rank, each in self._members.items() if self._before.get(rank) != each]
        log.write(_event(each, "joined", version) for each in new)
        log.flush()
        return not was_first

    def updated(self, table: Table, version: int) -> None:
        """A round has made `version`."""
        self._write(table, version, self._members)

    def caught_up(self, table: Table, version: int) -> None:
        """This worker has become the first: the one before may not have written what `version` is
        made of.
        """
        if table.has_step and _last_version(self._run_dir) < version:
            self._write(table, version, self._before)

    def _write(self, table: Table, version: int, members: Mapping[int, Member]) -> None:
        if self._log is None:
            return
        for reading in table.readings():
            self._begin(self._log, reading)
        self._log.write(_contributions(table, version, members))
        self._log.flush()

    def ended(self, ends: Iterable[PassEnd]) -> None:
        """Passes are over."""
        if self._log is not None:
            self._log.write(end for end in ends if (end.loader, end.number) in self._told)
            self._log.flush()

    def close(self) -> None:
        """Idempotent."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _begin(self, file: UpdatesLog, reading: Reading) -> None:
        known = reading.loader, reading.number
        if known not in self._told:
            self._told.add(known)
            file.write([PassOpened(*known, reading.num_positions, dropped=0)])


def _contributions(
    table: Table, version: int, members: Mapping[int, Member]
) -> Iterator[Contribution]:
    for index, record in table.replicas.items():
        member = members.get(index * table.num_stages)
        if record.is_step and member is not None:
            leases = tuple(
                Lease(0, each.loader, each.number, each.start, each.length)
                for each in record.readings
            )
            process, step = int(member.token, 16), version - 1
            yield Contribution(
                member.rank, process, step, version, record.samples, leases, "applied",
                record.given_weight,
            )  # fmt: skip


def _event(member: Member, event: Event, version: int) -> WorkerEvent:
    return WorkerEvent(member.rank, int(member.token, 16), event, version)


def _last_version(run_dir: str) -> int:
    """Of the last update in the file; 0: none."""
    path = Path(run_dir) / FILE_NAME
    if not run_dir or not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    versions = (_version(line) for line in reversed(lines))
    return next((version for version in versions if version), 0)


def _version(line: bytes) -> int:
    try:
        return int(json.loads(line).get("version", 0))
    except ValueError:  # the first one may be cut
        return 0
