"""Where does the time go among workers that speak to each other?"""

from typing import Final

from scripts.dashboards.panels import Dashboard, Panel, Query

_WORKER: Final = '{job=~"$job", worker=~"$worker"}'


def _rate(metric: str) -> str:
    return f"rate({metric}{_WORKER}[$__rate_interval])"


def _mean(metric: str, labels: str) -> str:
    total, count = _rate(f"{metric}_sum"), _rate(f"{metric}_count")
    return f"sum by ({labels}) ({total}) / sum by ({labels}) ({count})"


def _p95(metric: str, labels: str) -> str:
    return f"histogram_quantile(0.95, sum by ({labels}, le) ({_rate(f'{metric}_bucket')}))"


GROUPS: Final = Dashboard(
    uid="shardline-groups",
    title="shardline / Pipeline and all-reduce",
    meaning="Where the time goes among workers that speak to each other.",
    panels=(
        Panel(
            "Bubble",
            "The part of its last step through the pipeline in which a worker computed nothing.",
            "percentunit",
            (Query(f"shardline_pipeline_bubble_ratio{_WORKER}", "worker {{worker}}"),),
        ),
        Panel(
            "Activations",
            "The most bytes of stage inputs and outputs that a worker held at once in its last "
            "step.",
            "bytes",
            (Query(f"shardline_pipeline_activation_bytes{_WORKER}", "worker {{worker}}"),),
        ),
        Panel(
            "Time per stage",
            "Mean time for one microbatch. The slowest stage sets the pace of all.",
            "s",
            (
                Query(
                    _mean("shardline_pipeline_stage_seconds", "stage, direction"),
                    "stage {{stage}} {{direction}}",
                ),
            ),
        ),
        Panel(
            "Time per stage, p0.95",
            "Of the microbatches of all replicas.",
            "s",
            (
                Query(
                    _p95("shardline_pipeline_stage_seconds", "stage, direction"),
                    "stage {{stage}} {{direction}}",
                ),
            ),
        ),
        Panel(
            "Collective time",
            "Mean time of a round that a worker waits for the others to begin it, and for its "
            "sums.",
            "s",
            (Query(_mean("shardline_allreduce_seconds", "phase"), "{{phase}}"),),
            is_stacked=True,
        ),
        Panel(
            "Collective time, p0.95",
            "Of the rounds of all workers.",
            "s",
            (Query(_p95("shardline_allreduce_seconds", "phase"), "{{phase}}"),),
        ),
        Panel(
            "Share of time in rounds",
            "What each worker waits for. The worker that waits least for the others is the one "
            "that they wait for.",
            "percentunit",
            (
                Query(
                    _rate("shardline_allreduce_seconds_sum"),
                    "worker {{worker}} {{phase}}",
                ),
            ),
        ),
        Panel(
            "Group",
            "Workers in the group, how often it was formed, and rounds that were begun again "
            "because a worker was lost.",
            "short",
            (
                Query(f"max(shardline_allreduce_members{_WORKER})", "members"),
                Query(f"max(shardline_allreduce_generation{_WORKER})", "generation"),
                Query(
                    f"max(increase(shardline_allreduce_broken_rounds_total{_WORKER}"
                    "[$__rate_interval]))",
                    "broken rounds",
                ),
            ),
        ),
    ),
)
