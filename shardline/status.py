"""What the shards of a job say about themselves, for people and for programs."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import Message
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ps_core.config import PREFIX
from ps_core.errors import ShardlineError, ShardUnreachableError, printable
from ps_core.settings import Config
from ps_core.v1 import shard_pb2
from ps_worker.calls import describe
from shardline.display import duration, size
from shardline.status_grid import grid_document, grid_table, num_stages

_RUN_DIR: Final = f"{PREFIX}JOB_RUN_DIR"
_FOLDED: Final = ("address", "process")
"""Columns that take two lines on a narrow terminal, rather than lose their ends."""
_NAMES: Final = ("shard", "address", "phase", "worker", "state", "process")


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard's answer, or why there is none."""

    address: str
    answer: shard_pb2.DescribeResponse | None = None
    error: ShardlineError | None = None

    @property
    def is_unreachable(self) -> bool:
        return isinstance(self.error, ShardUnreachableError)


@dataclass(frozen=True, slots=True)
class Report:
    """What a job says about itself."""

    document: dict[str, object]
    """For programs."""
    picture: Group
    """For people."""
    exit_code: int
    job: str = ""
    """Which job was seen."""
    results: str = ""
    """Its run directory."""

    @property
    def farewell(self) -> str:
        """What to say once nothing of the job answers any more."""
        where = Path(self.results) / "summary.json"
        hint = f"; how it ended is in {where}" if self.results and where.parent.is_dir() else ""
        return f"job {self.job} is over: its processes are gone{hint}"


def report(config: Config) -> Report:
    """Ask every shard in `cluster.shards`."""
    shards = ask(config)
    answers = [shard.answer for shard in shards if shard.answer]
    job = next((each.job_id for each in answers if each.job_id), "")
    results = next((each.settings[_RUN_DIR] for each in answers if _RUN_DIR in each.settings), "")
    return Report(document(shards), picture(shards), exit_code(shards), job, results)


def ask(config: Config) -> list[Shard]:
    """Ask every shard in `cluster.shards`, all at the same time; blocks until the last answer."""
    addresses = config.cluster.shards
    with ThreadPoolExecutor(max_workers=max(1, len(addresses))) as pool:
        return list(pool.map(lambda address: _ask(address, config), addresses))


def _ask(address: str, config: Config) -> Shard:
    try:
        answer = describe(address, config.rpc)
    except ShardlineError as exc:
        return Shard(address, error=exc)
    make_printable(answer)
    return Shard(address, answer=answer)


def make_printable(message: Message) -> None:
    """Make every text in it one that no terminal obeys."""
    for field, value in message.ListFields():
        if isinstance(value, str):
            setattr(message, field.name, printable(value))
        elif isinstance(value, MutableMapping):
            value.update({key: printable(text) for key, text in value.items()})
        elif field.is_repeated:
            for item in value:
                make_printable(item)


def exit_code(shards: Sequence[Shard]) -> int:
    """0 if all have answered, else the highest of the errors' codes: 3 for an unreachable one."""
    return max((shard.error.exit_code for shard in shards if shard.error), default=0)


def document(shards: Sequence[Shard]) -> dict[str, object]:
    """The answers for programs, with the names of shard.proto."""
    answers = [shard.answer for shard in shards if shard.answer]
    grid = {"grid": grid_document(answers)} if num_stages(answers) > 1 else {}
    return {"shards": [_entry(shard) for shard in shards], **grid}


def _entry(shard: Shard) -> dict[str, object]:
    if shard.answer is None:
        return {"address": shard.address, "error": str(shard.error), "workers": []}
    return {"address": shard.address} | plain(shard.answer)


def plain(message: Message) -> dict[str, object]:
    """Every field by name, whole numbers as numbers; an enum value as the last word of its name."""
    values: dict[str, object] = {}
    for field in message.DESCRIPTOR.fields:
        value: Any = getattr(message, field.name)
        if field.enum_type is not None:
            values[field.name] = _phase_name(value)
        elif isinstance(value, Mapping):
            values[field.name] = dict(value)
        elif field.is_repeated:
            values[field.name] = [_plain_item(item) for item in value]
        else:
            values[field.name] = _plain_item(value)
    return values


def _plain_item(value: object) -> object:
    return plain(value) if isinstance(value, Message) else value


def _phase_name(number: int) -> str:
    """`training` for PHASE_TRAINING; a number that this version does not know stays one."""
    known = shard_pb2.Phase.DESCRIPTOR.values_by_number
    return known[number].name.removeprefix("PHASE_").lower() if number in known else str(number)


def picture(shards: Sequence[Shard]) -> Group:
    """The answers for people: a row per shard, one per worker or replica, the samples, then what is
    wrong.
    """
    answers = [shard.answer for shard in shards if shard.answer]
    workers = grid_table(answers) if num_stages(answers) > 1 else _worker_table(shards)
    lines = [Text(line, overflow="fold") for line in (*_samples(shards), *_problems(shards))]
    return Group(_shard_table(shards), *([workers] if workers.row_count else []), *lines)


def _samples(shards: Sequence[Shard]) -> Iterator[str]:
    """What has become of the samples, which the lead knows."""
    for shard in shards:
        if shard.answer is not None and shard.answer.HasField("ledger"):
            ledger = shard.answer.ledger
            counts = {
                "applied": ledger.applied,
                "in part": ledger.applied_in_part,
                "with workers": ledger.granted,
                "waiting": ledger.open,
                "came back": ledger.returned,
                "abandoned": ledger.abandoned,
            }
            yield "samples: " + ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _problems(shards: Sequence[Shard]) -> Iterator[str]:
    for shard in shards:
        if shard.error is not None:
            yield f"{shard.address}: {shard.error}"
        elif shard.answer is not None and shard.answer.reason:
            yield f"{shard.address}: {shard.answer.reason}"
        for worker in shard.answer.workers if shard.answer else ():
            if worker.verdict:
                yield f"worker {worker.worker.rank} is a straggler: {worker.verdict}"


def _table(*columns: str) -> Table:
    """Names on the left, numbers on the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_number = column not in _NAMES
        table.add_column(
            column,
            justify="right" if is_number else "left",
            no_wrap=column not in _FOLDED,
            overflow="fold",
        )
    return table


def _shard_table(shards: Sequence[Shard]) -> Table:
    columns = ("shard", "address", "phase", "version", "updates/s", "parameters", "up", "process")
    table = _table(*columns)
    for shard in shards:
        table.add_row(*map(Text, _shard_row(shard)))
    jobs = dict.fromkeys(each.answer.job_id for each in shards if each.answer)
    nothing = "no job yet" if jobs else "no shard answers"
    table.title = ", ".join(f"job {job}" for job in jobs if job) or nothing
    return table


def _shard_row(shard: Shard) -> list[str]:
    answer = shard.answer
    if answer is None:
        return ["?", shard.address, "unreachable" if shard.is_unreachable else "error"]
    return [
        str(answer.shard),
        shard.address,
        _phase_name(answer.phase),
        f"{answer.version:,}",
        f"{answer.updates_per_second:.1f}",
        size(answer.parameter_bytes),
        duration(answer.uptime_seconds),
        f"{answer.host}:{answer.pid}",
    ]


def _worker_table(shards: Sequence[Shard]) -> Table:
    table = _table(
        "worker", "state", "step", "behind", "lag", "pushed", "pushed/s", "pulled", "process"
    )
    by_rank: dict[int, list[shard_pb2.WorkerStatus]] = {}
    for shard in shards:
        for worker in shard.answer.workers if shard.answer else ():
            by_rank.setdefault(worker.worker.rank, []).append(worker)
    for rank in sorted(by_rank):
        table.add_row(*map(Text, _worker_row(rank, by_rank[rank])))
    return table


def _worker_row(rank: int, seen: Sequence[shard_pb2.WorkerStatus]) -> list[str]:
    """One worker as all shards see it: bytes are added, and the slowest shard counts."""
    return [
        str(rank),
        ", ".join(dict.fromkeys(worker.state for worker in seen)),
        f"{min(worker.clock for worker in seen):,}",
        f"{max(worker.staleness for worker in seen):,}",
        f"{max(worker.lag_seconds for worker in seen):.3f} s",
        size(sum(worker.received_bytes for worker in seen)),
        size(sum(worker.received_bytes_per_second for worker in seen)),
        size(sum(worker.sent_bytes for worker in seen)),
        f"{seen[0].host}:{seen[0].pid}",
    ]
