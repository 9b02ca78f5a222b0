"""docs/metrics.md: every metric, as the classes that count show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, get_args

from prometheus_client import Metric

from ps_core.group_metrics import AllReduceMetrics, PipelineMetrics
from ps_core.lead_metrics import LeadMetrics
from ps_core.metrics import REGISTRY, WorkerMetrics
from ps_core.settings import ConsistencyConfig
from ps_core.shard_metrics import ShardMetrics

_INTRODUCTION: Final = """\
# Metrics

Every process serves its metrics at `/metrics` in Prometheus' text format; `metrics.host` and
`metrics.port` say where. Units are base units, and part of the name. A series exists, at 0, before
its first event. Labels are bounded: a worker's rank, a shard's index, a stage, and the words in the
tables. With shards and `--stages`, workers call themselves by the rank of their process, and shards
call them by that of their replica, which to a shard is one worker.

All processes of a job are to be scraped under one Prometheus label `job`, on which the rules and
dashboards in `monitoring/` count. Prometheus' library adds what it knows of every process:
`process_resident_memory_bytes`, `process_cpu_seconds_total` and others.

Histograms of seconds have buckets from 100 µs, a small part on one core, to a minute, a step that
waits for the slowest of many workers; each is at most 2.5 times as wide as the one before.
Staleness has a bucket for 0 and one for every power of two up to 256.

**Goodput** is the share of the samples that workers have trained on whose gradients went into an
update: `shardline_applied_samples_total` over `shardline_samples_total`, with shards, without, and
alone. It is defined once, in `monitoring/prometheus/rules/recording.yml`, as
`namespace_job:shardline_goodput:ratio_rate5m`. It falls when steps are refused, and when workers
that all-reduce repeat a round without the gradients that a lost worker has spoiled. It does not see
the step in which a worker dies, since that worker has counted nothing; nor steps with NaN or
infinity, whose samples are in neither counter and which have one of their own. In mode `local` a
worker's own steps count as applied at once. The ledger of all samples is `shardline_leases`.

**Loss** is what the script passes to `session.log(loss=…)`.
[Decision 14](decisions/0014-metrics.md) says why.

Written by `python -m scripts.write_monitoring`.
"""
_UNITS: Final = ("seconds", "bytes", "ratio", "versions")
_MODES: Final = get_args(ConsistencyConfig.__annotations__["mode"])


def metrics_page() -> str:
    """The page. Counts in this process: to be called in one that does nothing else."""
    page, seen = _INTRODUCTION, set[str]()
    for title, begin in _GROUPS.items():
        begin()
        families = [each for each in REGISTRY.collect() if each.samples and each.name not in seen]
        seen.update(each.name for each in families)
        rows = [_row(each) for each in families if each.name.startswith("shardline_")]
        page += (
            f"\n## {title}\n\n| name | type | unit | labels | meaning |\n|---|---|---|---|---|\n"
        )
        page += "".join(rows)
    return page


def _work() -> None:
    WorkerMetrics(0, num_shards=1).logged_loss(0.0)


def _serve() -> None:
    for mode in _MODES:
        shard = ShardMetrics(0, mode)
    shard.set_clock(0, 0)
    shard.lag(0, 0.0)


_GROUPS: Final[dict[str, Callable[[], object]]] = {
    "Every process": lambda: None,
    "Workers": _work,
    "Shards": _serve,
    "The lead (shard 0)": lambda: LeadMetrics().no_straggler(0),
    "Workers that all-reduce": lambda: AllReduceMetrics(0),
    "Workers with a stage of a model": lambda: PipelineMetrics(0, [0]),
}
"""Who shows metrics → makes them all appear. Each group has what those before it do not."""


def _row(family: Metric) -> str:
    name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
    unit = next((unit for unit in _UNITS if family.name.endswith(f"_{unit}")), "")
    labels = "" if family.type == "info" else _labels(family)
    return f"| `{name}` | {family.type} | {unit} | {labels} | {family.documentation} |\n"


def _labels(family: Metric) -> str:
    """Names of the labels; where they are not numbers, with all values."""
    values: dict[str, dict[str, None]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            values.setdefault(label, {})[value] = None
    values.pop("le", None)
    return ", ".join(
        f"`{label}`" if all(map(str.isdigit, known)) else f"`{label}`: {', '.join(known)}"
        for label, known in values.items()
    )
