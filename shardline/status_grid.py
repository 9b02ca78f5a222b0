"""A job whose model is split: its replicas and stages, as the shards of each stage see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ps_core.config import load_job
from ps_core.errors import MismatchError
from ps_core.v1 import shard_pb2

Answers = Sequence[shard_pb2.DescribeResponse]


def num_stages(answers: Answers) -> int:
    """Into how many stages the job's model is split, as the lead tells; 1: it is not."""
    return max(map(_stages_of, answers), default=1)


def _stages_of(answer: shard_pb2.DescribeResponse) -> int:
    try:
        return load_job(answer.settings, f"shard {answer.shard}").pipeline.stages
    except MismatchError:
        return 1  # another release's, which is shown without a grid


def grid(answers: Answers) -> dict[int, dict[int, list[shard_pb2.WorkerStatus]]]:
    """Replica → stage → what the shards of the stage say of it."""
    stages = num_stages(answers)
    cells: dict[int, dict[int, list[shard_pb2.WorkerStatus]]] = {}
    for answer in answers:
        for seen in answer.workers:
            row = cells.setdefault(seen.worker.rank, {})
            row.setdefault(answer.shard % stages, []).append(seen)
    return dict(sorted(cells.items()))


def grid_table(answers: Answers) -> Table:
    """A row per replica, a column per stage: its step, its lag, and where it runs."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("replica", no_wrap=True)
    for stage in range(num_stages(answers)):
        table.add_column(f"stage {stage}", no_wrap=True)
    for replica, row in grid(answers).items():
        cells = (_cell(row.get(stage, ())) for stage in range(num_stages(answers)))
        table.add_row(str(replica), *map(Text, cells))
    return table


def grid_document(answers: Answers) -> list[dict[str, object]]:
    """The same for programs."""
    return [
        {"replica": replica, "stage": stage, **_plain(seen)}
        for replica, row in grid(answers).items()
        for stage, seen in sorted(row.items())
    ]


def _plain(seen: Sequence[shard_pb2.WorkerStatus]) -> Mapping[str, object]:
    """One worker as all shards of its stage see it; the slowest one counts."""
    return {
        "state": seen[0].state,
        "clock": min(each.clock for each in seen),
        "lag_seconds": max(each.lag_seconds for each in seen),
        "host": seen[0].host,
        "pid": seen[0].pid,
    }


def _cell(seen: Sequence[shard_pb2.WorkerStatus]) -> str:
    if not seen:
        return "-"
    known = _plain(seen)
    place = f"{known['host']}:{known['pid']}"
    return f"{known['state']}, step {known['clock']:,}, lag {known['lag_seconds']:.3f} s, {place}"
