"""A worker's lines in `metrics.jsonl`: where it stands, what the script logged, and what it
reported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from ps_core.exchange import Traffic
from shardline.records import EndRecord, JoinRecord, Kept, Record, StepRecord
from shardline.streams import tell

_INTERVAL_SECONDS = 0.1


class Journal:
    """Appends whole lines, at most about ten times a second, and at the end. A step without values
    has a line only if it is the last one by then; what was logged at a step has one of its own.
    """

    def __init__(
        self, run_dir: Path | None, rank: int, traffic: Traffic, incarnation: str = ""
    ) -> None:
        """Without `run_dir` nothing is written; `incarnation` tells the processes of a rank apart.
        Raises OSError when the file cannot be opened.
        """
        self._file: int | None = None
        if run_dir is not None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._file = os.open(run_dir / "metrics.jsonl", flags, 0o644)
        self._rank = rank
        self._incarnation = incarnation
        self._traffic = traffic
        self._values: dict[str, float] = {}
        """Logged at the step that was taken last."""
        self._lines: list[bytes] = []
        """To be written."""
        self._has_failed = False
        self._epoch = self._version = self._samples = 0
        self._written_at = 0.0
        self._started = time.monotonic()

    def joined(self) -> None:
        """The worker takes part in the job."""
        self._add(JoinRecord(time.time(), self._rank, self._incarnation))
        self._write()

    def step(self, epoch: int, version: int, samples: int) -> None:
        """A step is done; `samples` is this worker's total."""
        self._close_step()
        self._epoch, self._version, self._samples = epoch, version, samples
        self._write_when_due()

    def log(self, values: Mapping[str, float]) -> None:
        """Keep values of the script, each of them."""
        if values.keys() & self._values.keys():
            self._close_step()
        self._values.update(values)
        self._write_when_due()

    def end(self, steps: int, reported: Mapping[str, Kept]) -> None:
        """Write the last lines."""
        self._close_step()
        self._add(
            EndRecord(
                time=time.time(),
                rank=self._rank,
                incarnation=self._incarnation,
                steps=steps,
                samples=self._samples,
                seconds=time.monotonic() - self._started,
                pushed_bytes=self._traffic.pushed_bytes,
                pulled_bytes=self._traffic.pulled_bytes,
                version=self._version,
                reported=reported,
            )
        )
        self._write()

    def close(self) -> None:
        """Write what is left, and close the file. Idempotent."""
        if self._file is not None:
            self._close_step()
            self._write()
            os.close(self._file)
            self._file = None

    def _write_when_due(self) -> None:
        if time.monotonic() - self._written_at >= _INTERVAL_SECONDS:
            self._add_step()
            self._write()

    def _close_step(self) -> None:
        """What is logged from now on has another line."""
        if self._values:
            self._add_step()

    def _add_step(self) -> None:
        values, self._values = self._values, {}
        self._add(
            StepRecord(
                time=time.time(),
                rank=self._rank,
                incarnation=self._incarnation,
                epoch=self._epoch,
                step=self._version,
                samples=self._samples,
                pushed_bytes=self._traffic.pushed_bytes,
                pulled_bytes=self._traffic.pulled_bytes,
                version=self._version,
                values=values,
            )
        )

    def _add(self, record: Record) -> None:
        if self._file is not None:
            self._lines.append(record.line().encode())

    def _write(self) -> None:
        """One write, so that lines of several workers do not mix. A full disk stops no training."""
        self._written_at = time.monotonic()
        lines, self._lines = self._lines, []
        if self._file is None or not lines:
            return
        try:
            os.write(self._file, b"".join(lines))
        except OSError as error:
            if not self._has_failed:
                tell(f"metrics.jsonl lacks lines: {error.strerror}")
            self._has_failed = True
