"""Is the job well, and how fast is it?"""

from typing import Final

from scripts.dashboards.panels import Dashboard, Panel, Query

OVERVIEW: Final = Dashboard(
    uid="shardline-overview",
    title="shardline / Overview",
    meaning="Whether a job is well, and how fast it is.",
    panels=(
        Panel(
            "Throughput",
            "Samples per second that workers have trained on, and those that went into updates.",
            "short",
            (
                Query(
                    'sum(rate(shardline_samples_total{job=~"$job"}[$__rate_interval]))',
                    "trained on",
                ),
                Query(
                    'sum(rate(shardline_applied_samples_total{job=~"$job"}[$__rate_interval]))',
                    "in updates",
                ),
            ),
        ),
        Panel(
            "Goodput",
            "Of the samples that workers have trained on, the share that went into updates, over "
            "five minutes.",
            "percentunit",
            (Query('namespace_job:shardline_goodput:ratio_rate5m{job=~"$job"}', "goodput"),),
        ),
        Panel(
            "Loss",
            "What each worker's script has logged last as `loss`.",
            "short",
            (Query('shardline_loss{job=~"$job", worker=~"$worker"}', "worker {{worker}}"),),
        ),
        Panel(
            "Versions",
            "Updates that are in the parameters of each shard. A line that is flat is a job that "
            "makes no progress.",
            "short",
            (Query('shardline_shard_version{job=~"$job", shard=~"$shard"}', "shard {{shard}}"),),
        ),
        Panel(
            "Live workers",
            "Members as the shards or the workers of a group count them, and processes that "
            "Prometheus sees. Members of a split model are its replicas.",
            "short",
            (
                Query('max(shardline_live_workers{job=~"$job"})', "members, with shards"),
                Query('max(shardline_allreduce_members{job=~"$job"})', "members, all-reduce"),
                Query('count(shardline_steps_total{job=~"$job"})', "processes"),
                Query('max(shardline_paused{job=~"$job"})', "paused (1: waits for workers)"),
            ),
        ),
        Panel(
            "Comings and goings",
            "Workers that joined, were preempted, or were evicted and why, as the lead counts.",
            "short",
            (
                Query(
                    'sum(increase(shardline_joins_total{job=~"$job"}[$__rate_interval]))', "joined"
                ),
                Query(
                    'sum(increase(shardline_preemptions_total{job=~"$job"}[$__rate_interval]))',
                    "preempted",
                ),
                Query(
                    "sum by (reason) "
                    '(increase(shardline_evictions_total{job=~"$job"}[$__rate_interval]))',
                    "evicted: {{reason}}",
                ),
            ),
        ),
        Panel(
            "Step time by phase",
            "Mean time of a step over all workers. Exchange is what a worker waits for the others "
            "and for the network.",
            "s",
            (
                Query(
                    "sum by (phase) "
                    '(rate(shardline_step_seconds_sum{job=~"$job"}[$__rate_interval])) / '
                    "sum by (phase) "
                    '(rate(shardline_step_seconds_count{job=~"$job"}[$__rate_interval]))',
                    "{{phase}}",
                ),
            ),
            is_stacked=True,
        ),
        Panel(
            "Step time, quantiles",
            "Of the steps of all workers, over five minutes.",
            "s",
            (
                Query(
                    'namespace_job_phase:shardline_step_seconds:quantile_rate5m{job=~"$job"}',
                    "{{phase}} p{{quantile}}",
                ),
            ),
        ),
        Panel(
            "Memory",
            "Resident memory of every process.",
            "bytes",
            (Query('process_resident_memory_bytes{job=~"$job"}', "{{instance}}"),),
        ),
        Panel(
            "Memory, share of the limit",
            "0 where no limit is set. A container is killed at 100 %.",
            "percentunit",
            (
                Query(
                    'process_resident_memory_bytes{job=~"$job"} / '
                    'shardline_memory_limit_bytes{job=~"$job"}',
                    "{{instance}}",
                ),
            ),
        ),
    ),
)
