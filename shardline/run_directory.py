"""The folder of one run: logs, records, who took part, and what came out."""

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Final

from ps_core import __version__
from ps_core.errors import ConfigError
from ps_core.model_files import (
    COMPLETE,
    INTERRUPTED,
    RESCUED,
    read_metadata,
    remove_unfinished,
)
from shardline.ledger import Balance, Ledger
from shardline.local_plan import Launch
from shardline.processes import ProcessSpec
from shardline.progress import Totals
from shardline.records import jsonable

_PARENT: Final = Path("runs")
_FILES: Final = ("cluster.json", "metrics.jsonl", "summary.json", "updates.jsonl")
"""Each is the mark of a run."""
_PACKAGES: Final = {"torch": "torch", "grpc": "grpcio"}


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """One run's folder, absolute."""

    path: Path

    @property
    def metrics(self) -> Path:
        """The file of records that the workers write."""
        return self.path / "metrics.jsonl"

    def log(self, spec: ProcessSpec) -> Path:
        """The file with all that a process writes."""
        return self.path / spec.log_name

    def open_log(self, spec: ProcessSpec) -> IO[bytes]:
        """Its log, to write at the end of it; ConfigError when that is not possible."""
        try:
            return self.log(spec).open("ab")
        except OSError as exc:
            raise _unusable(self.path, exc) from exc

    def balance(self) -> Balance:
        """What became of the samples, as the lead wrote it down; zeros if it wrote nothing."""
        ledger = Ledger()
        try:
            with (self.path / "updates.jsonl").open("rb") as file:
                ledger.read(file)
        except FileNotFoundError:
            pass
        return ledger.balance()

    def write_json(self, name: str, document: Mapping[str, object]) -> None:
        """Put a JSON file in place, whole or not at all; ConfigError when that is not possible."""
        text = json.dumps(jsonable(document), indent=2, allow_nan=False)
        part = self.path / f".{name}.part"
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path / name)
        except OSError as exc:
            raise _unusable(self.path, exc) from exc

    def model(self) -> Path | None:
        """The model that the run has trained to the end, or the newest one that it wrote."""
        if (complete := self.path / COMPLETE).exists():
            return complete
        found = sorted(self.path.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        return found[-1] if found else None

    def model_state(self) -> str | None:
        """`final`, or `interrupted at version 17`; None without a model."""
        if (self.path / COMPLETE).exists():
            return "final"
        when = read_metadata(self.path / RESCUED).get(INTERRUPTED)
        return f"interrupted {when}" if when else None

    def remove_unfinished(self) -> None:
        """Remove what was left of models in whose middle their writers died. Call it at the end."""
        for name in (COMPLETE, RESCUED):
            remove_unfinished(self.path / name)


def create(given: str, name: str, now: float) -> RunDirectory:
    """Make the folder `given`, or one in `runs/` named after the UTC time `now` and the program.

    ConfigError when it cannot be written to, or holds a run already.
    """
    try:
        path = Path(given).absolute() if given else _fresh(f"{_stamp(now)}-{name}")
        path.mkdir(parents=True, exist_ok=True)
        if taken := [name for name in _FILES if (path / name).exists()]:
            raise ConfigError(f"--run-dir {path} holds an earlier run ({taken[0]}): choose another")
        directory = RunDirectory(path)
        directory.metrics.touch()
    except OSError as exc:
        raise _unusable(Path(given or _PARENT), exc) from exc
    return directory


def is_of_job(folder: Path, job_id: str) -> bool:
    """Whether it is this user's folder of the run that has this job, as its `cluster.json` says."""
    try:
        is_mine = folder.stat().st_uid == os.geteuid()
        document = json.loads((folder / "cluster.json").read_bytes())
    except (OSError, ValueError):
        return False
    return is_mine and isinstance(document, dict) and document.get("job_id") == job_id


def _unusable(path: Path, exc: OSError) -> ConfigError:
    return ConfigError(f"cannot write to the run directory {path}: {exc.strerror}; see --run-dir")


def _fresh(name: str) -> Path:
    """A new folder, numbered when several runs start in the same second."""
    parent = _PARENT.absolute()
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _stamp(now: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))


@dataclass(frozen=True, slots=True)
class Running:
    """A process of the run as it is now."""

    spec: ProcessSpec
    pid: int
    num_restarts: int = 0  # how often it was started again


def cluster(
    job_id: str, started: float, rendezvous: str, processes: Iterable[Running]
) -> dict[str, object]:
    """The document `cluster.json`: who takes part; `started` is in seconds since 1970, and
    `rendezvous` empty when workers do not meet.
    """
    entries = [
        {
            "role": each.spec.id.role,
            "index": each.spec.id.index,
            "pid": each.pid,
            "restarts": each.num_restarts,
            "address": each.spec.address,
            "metrics_url": each.spec.metrics_url,
            "log": each.spec.log_name,
        }
        for each in processes
    ]
    moment = datetime.fromtimestamp(started, UTC).isoformat(timespec="milliseconds")
    return {
        "job_id": job_id,
        "started": moment,
        "rendezvous": rendezvous or None,
        "processes": entries,
    }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    wall_seconds: float
    exit_code: int
    num_restarts: int = 0
    num_preemptions: int = 0
    model: str | None = None  # as in RunDirectory.model_state


def summary(
    launch: Launch, totals: Totals, balance: Balance, outcome: Outcome
) -> dict[str, object]:
    """The document `summary.json`: what the run did."""
    return {
        "strategy": launch.strategy,
        "mode": launch.config.consistency.mode,
        "shards": launch.num_shards,
        "workers": launch.num_workers,
        "steps": totals.steps,
        "version": totals.version,
        "wall_seconds": round(outcome.wall_seconds, 3),
        "samples": totals.samples,
        "samples_per_second": round(totals.samples_per_second, 3),
        "pushed_bytes": totals.pushed_bytes,
        "pulled_bytes": totals.pulled_bytes,
        "restarts": outcome.num_restarts,
        "preemptions": outcome.num_preemptions,
        **asdict(balance),
        "versions": versions(),
        "reported": totals.reported,
        "model": outcome.model,
        "exit_code": outcome.exit_code,
    }


def versions() -> dict[str, str]:
    """What the run was made with."""
    others = {name: _version(package) for name, package in _PACKAGES.items()}
    return {"shardline": __version__, **others, "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
