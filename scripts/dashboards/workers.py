"""Which worker is slow, late or refused?"""

from typing import Final

from scripts.dashboards.panels import Dashboard, Panel, Query

_WORKER: Final = '{job=~"$job", worker=~"$worker"}'
_OF_WORKER: Final = (
    "* on (job, instance) group_left (worker) "
    f"group by (job, instance, worker) (shardline_steps_total{_WORKER})"
)
"""Metrics of a process do not say which worker it is."""


def _rate(metric: str) -> str:
    return f"rate({metric}{_WORKER}[$__rate_interval])"


WORKERS: Final = Dashboard(
    uid="shardline-workers",
    title="shardline / Workers",
    meaning="Which worker is slow, late or refused. To shards a replica of a split model is one "
    "worker.",
    panels=(
        Panel(
            "Steps",
            "Steps per second.",
            "short",
            (Query(_rate("shardline_steps_total"), "worker {{worker}}"),),
        ),
        Panel(
            "Step time by phase",
            "Mean time of each worker.",
            "s",
            (
                Query(
                    f"{_rate('shardline_step_seconds_sum')} / "
                    f"{_rate('shardline_step_seconds_count')}",
                    "worker {{worker}} {{phase}}",
                ),
            ),
        ),
        Panel(
            "Straggler ratio",
            "Step time of a straggler over the median of the others', from 1.5 on; 1 for the "
            "others.",
            "short",
            (
                Query(
                    f"max by (worker) (shardline_straggler_ratio{_WORKER})",
                    "worker {{worker}}",
                ),
            ),
        ),
        Panel(
            "Stragglers by phase",
            "1 while a worker is a straggler, and loses the most time in this phase.",
            "short",
            (
                Query(
                    f"max by (worker, phase) (shardline_straggler{_WORKER})",
                    "worker {{worker}} {{phase}}",
                ),
            ),
        ),
        Panel(
            "Lag",
            "How much later than the first worker's the last part of a step comes, smoothed, on "
            "the shard that sees the most.",
            "s",
            (
                Query(
                    f"max by (worker) (shardline_worker_lag_seconds{_WORKER})",
                    "worker {{worker}}",
                ),
            ),
        ),
        Panel(
            "Steps behind",
            "How many steps a worker is behind the fastest.",
            "short",
            (
                Query(
                    'scalar(max(shardline_worker_clock{job=~"$job"})) - '
                    f"max by (worker) (shardline_worker_clock{_WORKER})",
                    "worker {{worker}}",
                ),
            ),
        ),
        Panel(
            "Staleness",
            "Contributions by the updates between the parameters that they come from and those "
            "that they change. Always 0 in sync mode.",
            "short",
            (
                Query(
                    "sum by (le) (increase(shardline_staleness_versions_bucket"
                    '{job=~"$job", shard=~"$shard"}[$__rate_interval]))',
                    "{{le}}",
                ),
            ),
            kind="heatmap",
        ),
        Panel(
            "Steps not used",
            "Steps per second whose gradients came too late, or held NaN or infinity.",
            "short",
            (
                Query(_rate("shardline_refused_steps_total"), "refused, worker {{worker}}"),
                Query(_rate("shardline_nonfinite_steps_total"), "not finite, worker {{worker}}"),
            ),
        ),
        Panel(
            "Leases",
            "Samples of the passes over the data so far, by what became of them.",
            "short",
            (Query('sum by (state) (shardline_leases{job=~"$job"})', "{{state}}"),),
        ),
        Panel(
            "Reconnects",
            "How often a worker opened a broken stream to a shard again.",
            "short",
            (
                Query(
                    "sum by (worker, shard) (increase(shardline_reconnects_total"
                    '{job=~"$job", worker=~"$worker", shard=~"$shard"}[$__rate_interval]))',
                    "worker {{worker}}, shard {{shard}}",
                ),
            ),
        ),
        Panel(
            "Traffic",
            "Bytes per second to and from all shards.",
            "Bps",
            (
                Query(
                    f"sum by (worker) ({_rate('shardline_worker_pushed_bytes_total')})",
                    "pushed, worker {{worker}}",
                ),
                Query(
                    f"sum by (worker) ({_rate('shardline_worker_pulled_bytes_total')})",
                    "pulled, worker {{worker}}",
                ),
            ),
        ),
        Panel(
            "Memory",
            "Resident memory of each worker.",
            "bytes",
            (
                Query(
                    'process_resident_memory_bytes{job=~"$job"} ' + _OF_WORKER,
                    "worker {{worker}}",
                ),
            ),
        ),
    ),
)
