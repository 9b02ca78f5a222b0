"""`updates.jsonl` in the run directory: what became of every sample and contribution.

One JSON object per line, in the order in which it happened; `kind` says which. Positions are those
of the pass's permutation, as ranges [start, stop).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ps_core.entries import Contribution, Entry, WorkerEvent
from ps_core.errors import ConfigError, DataLossError
from ps_core.leases import Lease, PassEnd, PassOpened

FILE_NAME = "updates.jsonl"


class UpdatesLog:
    """Appends to the file; without a run directory it writes nothing. Its owner closes it."""

    def __init__(self, run_dir: str, *, is_new: bool = False) -> None:
        """`is_new`: this process begins the run. Raises ConfigError when the file cannot be opened,
        and DataLossError when it tells of a run that this process is to begin.
        """
        self._file: TextIO | None = None
        if not run_dir:
            return
        path = Path(run_dir) / FILE_NAME
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot write {path} ({error.strerror}): set job.run_dir to a folder that exists "
                "and may be written to, or to nothing"
            ) from error
        if is_new and self._file.tell():
            self.close()
            raise DataLossError(
                f"{path} tells of a run whose parameters this shard does not have: begin a new run "
                "with an empty job.run_dir"
            )

    def write(self, entries: Iterable[Entry]) -> None:
        """Append entries; they reach the disk with `flush`."""
        for entry in entries:
            for line in _lines(entry):
                if self._file is not None:
                    self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lines(entry: Entry) -> Iterator[dict[str, Any]]:
    match entry:
        case PassOpened(loader, number, num_samples, dropped):
            yield {
                "kind": "pass",
                "loader": loader,
                "pass": number,
                "num_samples": num_samples,
                "dropped": dropped,
            }
        case PassEnd(loader, number, abandoned):
            ranges = [list(each) for each in abandoned]
            yield {"kind": "pass_end", "loader": loader, "pass": number, "abandoned": ranges}
        case WorkerEvent(worker, incarnation, event, step, reason):
            yield {
                "kind": "worker",
                "time": time.time(),
                "worker": worker,
                "incarnation": str(incarnation),
                "event": event,
                "reason": reason,
                "step": step,
            }
        case Contribution():
            yield from _contribution_lines(entry)


def _contribution_lines(entry: Contribution) -> Iterator[dict[str, Any]]:
    """A line for each pass that the samples come from; one for a script with its own data."""
    by_pass: dict[tuple[int | None, int | None], list[Lease]] = {}
    for lease in entry.leases:
        by_pass.setdefault((lease.loader, lease.number), []).append(lease)
    for (loader, number), leases in (by_pass or {(None, None): []}).items():
        yield {
            "kind": "update",
            "time": time.time(),
            "loader": loader,
            "pass": number,
            "version": entry.version,
            "worker": entry.worker,
            "incarnation": str(entry.incarnation),
            "step": entry.step,
            "samples": entry.samples,
            "weight": entry.weight,
            "state": entry.state,
            "ranges": [[lease.start, lease.start + lease.length] for lease in leases],
        }
