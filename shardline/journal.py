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

_INTERVAL_SECONDS = 0.1


class Journal:
    """Appends whole lines, at most about ten a second; logged values wait for the next line."""

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
        self._epoch = self._version = self._samples = 0
        self._written_at = 0.0
        self._started = time.monotonic()

    def joined(self) -> None:
        """The worker takes part in the job."""
        self._write(JoinRecord(time.time(), self._rank, self._incarnation))

    def step(self, epoch: int, version: int, samples: int) -> None:
        """A step is done; `samples` is this worker's total."""
        self._epoch, self._version, self._samples = epoch, version, samples
        self._write_when_due()

    def log(self, values: Mapping[str, float]) -> None:
        """Keep values of the script for the next line."""
        self._values.update(values)
        self._write_when_due()

    def end(self, steps: int, reported: Mapping[str, Kept]) -> None:
        """Write the last lines."""
        if self._values:
            self._write_step()
        self._write(
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

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write_when_due(self) -> None:
        if time.monotonic() - self._written_at >= _INTERVAL_SECONDS:
            self._write_step()

    def _write_step(self) -> None:
        self._written_at = time.monotonic()
        values, self._values = self._values, {}
        self._write(
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

    def _write(self, record: Record) -> None:
        if self._file is not None:
            os.write(self._file, record.line().encode())
