"""What an all-reduce job's rendezvous says of its workers, for people and for programs."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from allreduce.visit import Seen, Visit
from ps_core.config import load_job
from ps_core.errors import printable
from ps_core.settings import Config
from shardline.status import Report


def report(config: Config) -> Report:
    """Ask the rendezvous. Raises ShardUnreachableError, and what Visit.settings raises."""
    visit = Visit(config.cluster.rendezvous, config.rpc.call_timeout_seconds)
    job = load_job(visit.settings(), config.cluster.rendezvous)
    generation, workers = visit.workers()
    document: dict[str, object] = {
        "job_id": job.job.id,
        "generation": generation,
        "workers": [_plain(seen, job.pipeline.stages) for seen in workers],
    }
    picture = _picture(job, generation, workers)
    return Report(document, picture, exit_code=0, job=job.job.id, results=job.job.run_dir)


def _plain(seen: Seen, stages: int) -> dict[str, object]:
    replica, stage = divmod(seen.member.rank, stages)
    return {
        "rank": seen.member.rank,
        "replica": replica,
        "stage": stage,
        "version": seen.version,
        "pid": seen.member.pid,
        "device": seen.member.device,
    }


def _picture(job: Config, generation: int, workers: Sequence[Seen]) -> Group:
    """A row per replica, a column per stage."""
    stages = job.pipeline.stages
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"job {job.job.id}")
    table.add_column("replica" if stages > 1 else "worker", no_wrap=True)
    for stage in range(stages):
        table.add_column(f"stage {stage}" if stages > 1 else "", no_wrap=True)
    rows: dict[int, dict[int, Seen]] = {}
    for seen in workers:
        rows.setdefault(seen.member.rank // stages, {})[seen.member.rank % stages] = seen
    for replica, row in sorted(rows.items()):
        cells = (Text(_cell(row.get(stage))) for stage in range(stages))
        table.add_row(Text(str(replica)), *cells)
    word = "time" if generation == 1 else "times"
    return Group(table, Text(f"the group has formed {generation} {word}"))


def _cell(seen: Seen | None) -> str:
    if seen is None:
        return "-"
    device = printable(seen.member.device)
    return f"version {seen.version:,}, {device}, process {seen.member.pid}"
