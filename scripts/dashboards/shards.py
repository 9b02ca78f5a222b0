"""Do the shards share the load, and what do they wait for?"""

from typing import Final

from scripts.dashboards.panels import Dashboard, Panel, Query

_OF_SHARD: Final = (
    "* on (job, instance) group_left (shard) "
    'group by (job, instance, shard) (shardline_shard_version{job=~"$job", shard=~"$shard"})'
)
"""Metrics of a process do not say which shard it is."""

SHARDS: Final = Dashboard(
    uid="shardline-shards",
    title="shardline / Shards",
    meaning="Whether the shards share the load, and what they wait for.",
    panels=(
        Panel(
            "Load imbalance",
            "Bytes that the busiest shard receives over the mean of all, over five minutes: 1 is "
            "an even load.",
            "short",
            (
                Query(
                    'namespace_job:shardline_load_imbalance:ratio_rate5m{job=~"$job"}',
                    "busiest / mean",
                ),
            ),
        ),
        Panel(
            "Updates",
            "Versions that each shard completes per second.",
            "short",
            (
                Query(
                    'rate(shardline_shard_updates_total{job=~"$job", shard=~"$shard"}'
                    "[$__rate_interval])",
                    "shard {{shard}}, {{mode}}",
                ),
            ),
        ),
        Panel(
            "Received",
            "Bytes of gradients per second.",
            "Bps",
            (
                Query(
                    'rate(shardline_shard_received_bytes_total{job=~"$job", shard=~"$shard"}'
                    "[$__rate_interval])",
                    "shard {{shard}}",
                ),
            ),
        ),
        Panel(
            "Sent",
            "Bytes of parameters per second.",
            "Bps",
            (
                Query(
                    'rate(shardline_shard_sent_bytes_total{job=~"$job", shard=~"$shard"}'
                    "[$__rate_interval])",
                    "shard {{shard}}",
                ),
            ),
        ),
        Panel(
            "Quorum wait",
            "Time from the first to the last worker of an update, in sync and local mode, as the "
            "lead sees it.",
            "s",
            (
                Query(
                    'sum(rate(shardline_quorum_wait_seconds_sum{job=~"$job"}[$__rate_interval])) / '
                    'sum(rate(shardline_quorum_wait_seconds_count{job=~"$job"}[$__rate_interval]))',
                    "mean",
                ),
                Query(
                    "histogram_quantile(0.95, sum by (le) (rate("
                    'shardline_quorum_wait_seconds_bucket{job=~"$job"}[$__rate_interval])))',
                    "p0.95",
                ),
            ),
        ),
        Panel(
            "Quorum wait, share of time",
            "How much of its time the job spends between the first and the last worker of an "
            "update, over five minutes.",
            "percentunit",
            (Query('namespace_job:shardline_quorum_wait:ratio_rate5m{job=~"$job"}', "waiting"),),
        ),
        Panel(
            "Optimizer time",
            "Mean time for one part.",
            "s",
            (
                Query(
                    'rate(shardline_apply_seconds_sum{job=~"$job", shard=~"$shard"}'
                    "[$__rate_interval]) / "
                    'rate(shardline_apply_seconds_count{job=~"$job", shard=~"$shard"}'
                    "[$__rate_interval])",
                    "shard {{shard}}",
                ),
            ),
        ),
        Panel(
            "CPU",
            "Cores that each shard keeps busy; its event loop has one.",
            "short",
            (
                Query(
                    'rate(process_cpu_seconds_total{job=~"$job"}[$__rate_interval]) ' + _OF_SHARD,
                    "shard {{shard}}",
                ),
            ),
        ),
        Panel(
            "Memory",
            "Resident memory of each shard, and the bytes of the parameters that it holds.",
            "bytes",
            (
                Query(
                    'process_resident_memory_bytes{job=~"$job"} ' + _OF_SHARD,
                    "shard {{shard}}",
                ),
                Query(
                    'shardline_shard_parameter_bytes{job=~"$job", shard=~"$shard"}',
                    "parameters of shard {{shard}}",
                ),
            ),
        ),
        Panel(
            "Parts not used",
            "Parts per second that came too late for their update, or had come before.",
            "short",
            (
                Query(
                    'rate(shardline_shard_refused_parts_total{job=~"$job", shard=~"$shard"}'
                    "[$__rate_interval])",
                    "too late, shard {{shard}}",
                ),
                Query(
                    'rate(shardline_shard_duplicate_parts_total{job=~"$job", shard=~"$shard"}'
                    "[$__rate_interval])",
                    "repeated, shard {{shard}}",
                ),
            ),
        ),
        Panel(
            "Refused frames",
            "Calls per second that a shard ended with an error, by gRPC status: of strangers, of "
            "evicted workers, and when a job fails.",
            "short",
            (
                Query(
                    "sum by (reason) (rate(shardline_refused_frames_total"
                    '{job=~"$job", shard=~"$shard"}[$__rate_interval]))',
                    "{{reason}}",
                ),
            ),
        ),
        Panel(
            "Hyperparameter differences",
            "Steps per second whose workers did not agree: those of the lowest rank are used.",
            "short",
            (
                Query(
                    "rate(shardline_hyperparameter_differences_total"
                    '{job=~"$job", shard=~"$shard"}[$__rate_interval])',
                    "shard {{shard}}",
                ),
            ),
        ),
    ),
)
