"""The words of the launcher: what starts, what is interrupted, what failed and what came out."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Final

from shardline.display import Row, duration, named, pace, size
from shardline.ledger import Balance
from shardline.local_plan import Launch
from shardline.progress import Totals
from shardline.run_directory import RunDirectory
from shardline.supervision import SPARE_SECONDS, Exit, ProcessId, Supervisor

_OUT_OF_MEMORY: Final = " (is the machine out of memory?)"
_NEVER_JOINED: Final = (
    " and has never joined the job, which its script does with `shardline.connect()` and "
    "`session.optimizer(...)`,"
)
_HINTS: Final = {
    ("shard", 0): " before the workers",
    ("worker", 0): _NEVER_JOINED,
    ("shard", -SIGKILL): _OUT_OF_MEMORY,
    ("worker", -SIGKILL): _OUT_OF_MEMORY,
}


def opening(launch: Launch, job_id: str, directory: RunDirectory) -> str:
    """What is about to run."""
    workers, shards = counted(launch.num_workers, "worker"), counted(launch.num_shards, "shard")
    if launch.strategy == "allreduce":
        shards = "all-reduce"
    if launch.num_ranks > launch.num_workers:
        workers += f" (up to {launch.num_ranks})"
    return f"{job_id}: {workers}, {shards}; logs and results in {short(directory.path)}"


def invitation(launch: Launch, lead: str | None) -> str:
    """How others can join, if there is room for them; `lead` is the address of shard 0, if any."""
    if launch.num_ranks == launch.num_workers or launch.config.pipeline.stages > 1:
        return ""
    place = ["--join", lead] if lead else ["--rendezvous", launch.config.cluster.rendezvous]
    command = shlex.join(["shardline", "worker", *place, *launch.program.command])
    return f"to add a worker: {command}"


def counted(count: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def short(path: Path) -> str:
    """`path` from the working directory, if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def interruption(number: Signals, supervisor: Supervisor) -> str:
    """What follows from a signal that the supervisor has not been told yet."""
    if supervisor.interrupted is not None:
        return f"{number.name} again: killing everything"
    seconds = 2 * supervisor.drain_seconds + SPARE_SECONDS
    return f"{number.name}: ending the run within {seconds:g} s (once more: at once)"


def rows(
    totals: Totals, balance: Balance, wall_seconds: float, directory: RunDirectory
) -> list[Row]:
    """The summary that people read."""
    model, state = directory.model(), directory.model_state()
    note = f" ({state})" if state != "final" and state else ""
    return [
        *named({**totals.values, **totals.reported}),
        ("steps", f"{totals.steps:,}"),
        ("wall time", duration(wall_seconds)),
        pace(totals),
        ("pushed", size(totals.pushed_bytes)),
        ("pulled", size(totals.pulled_bytes)),
        *([("samples lost / repeated / in part", _samples(balance))] if balance.passes else []),
        ("run directory", short(directory.path)),
        *([("model", short(model) + note)] if model else []),
    ]


def _samples(balance: Balance) -> str:
    counts = (balance.samples_lost, balance.samples_repeated, balance.samples_applied_in_part)
    return " / ".join(f"{count:,}" for count in counts)


def ending(
    supervisor: Supervisor,
    wall_seconds: float,
    last_lines: Mapping[ProcessId, Sequence[str]],
    directory: RunDirectory,
) -> str:
    """Why the run did not end well, in whole lines; empty if it did."""
    after = f"after {duration(wall_seconds)}"
    if supervisor.interrupted is not None:
        return f"shardline run: interrupted by {supervisor.interrupted.name} {after}\n"
    if supervisor.num_spent_restarts:
        after += f" and {_restarts(supervisor)}"
    failure = supervisor.failure
    if failure is None:
        return ""
    process = failure.process
    log = short(directory.path / f"{process.role}-{process.index}.log")
    hint = _HINTS.get((process.role, failure.code), "")
    lines = [f"shardline run: {failure}{hint} {after}; its last lines ({log}):"]
    lines += [f"    {line}" for line in last_lines.get(process, ())] or ["    (it wrote nothing)"]
    return "\n".join([*lines, *_others(supervisor, failure, last_lines)]) + "\n"


def _others(
    supervisor: Supervisor, failure: Exit, last_lines: Mapping[ProcessId, Sequence[str]]
) -> Iterator[str]:
    """How other processes have ended by themselves, in a line each; those alike in one."""
    alike: list[str] = []
    cause = failure.code, _last_word(last_lines.get(failure.process, ()))
    for other in supervisor.exits.values():
        # A worker that ended with 0 was done; a shard was stopped by somebody.
        unexpected = other.code != 0 or other.process.role == "shard"
        if other is failure or not unexpected or other.told:
            continue
        last_word = _last_word(last_lines.get(other.process, ()))
        if (other.code, last_word) == cause:
            alike.append(str(other.process))
        else:
            yield f"{other}: {last_word}"
    if alike:
        yield f"{', '.join(alike)} ended in the same way"


def _restarts(supervisor: Supervisor) -> str:
    count = counted(supervisor.num_spent_restarts, "restart")
    return f"{count} within {supervisor.restarts.window_seconds:g} s (--max-restarts)"


def _last_word(lines: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
