"""The metrics of all-reduce and of pipelines."""

from __future__ import annotations

import itertools

from ps_core.group_metrics import AllReduceMetrics, PipelineMetrics
from ps_core.metrics import REGISTRY

RANKS = itertools.count(7000)


def value(name: str, **labels: object) -> float | None:
    return REGISTRY.get_sample_value(name, {key: str(label) for key, label in labels.items()})


def test_rounds_begin_at_0_and_are_counted_by_phase() -> None:
    rank = next(RANKS)
    metrics = AllReduceMetrics(rank)
    for phase in ("wait", "reduce"):
        assert value("shardline_allreduce_seconds_count", worker=rank, phase=phase) == 0
    assert value("shardline_allreduce_broken_rounds_total", worker=rank) == 0
    metrics.waited("wait", 0.25)
    metrics.lost()
    metrics.formed(3, 5)
    assert value("shardline_allreduce_seconds_sum", worker=rank, phase="wait") == 0.25
    assert value("shardline_allreduce_broken_rounds_total", worker=rank) == 1
    assert value("shardline_allreduce_generation", worker=rank) == 3
    assert value("shardline_allreduce_members", worker=rank) == 5


def test_every_microbatch_of_a_stage_is_observed_in_both_directions() -> None:
    rank = next(RANKS)
    metrics = PipelineMetrics(rank, [1, 3])
    metrics.step({1: [0.5, 0.25], 3: [1.0]}, {1: [2.0], 3: []}, 0.125, 4096)
    name = "shardline_pipeline_stage_seconds"
    seen = {
        (stage, direction): (
            value(f"{name}_count", worker=rank, stage=stage, direction=direction),
            value(f"{name}_sum", worker=rank, stage=stage, direction=direction),
        )
        for stage in (1, 3)
        for direction in ("forward", "backward")
    }
    assert seen == {
        (1, "forward"): (2, 0.75),
        (3, "forward"): (1, 1.0),
        (1, "backward"): (1, 2.0),
        (3, "backward"): (0, 0.0),
    }
    assert value("shardline_pipeline_bubble_ratio", worker=rank) == 0.125
    assert value("shardline_pipeline_activation_bytes", worker=rank) == 4096


def test_what_was_built_twice_is_one_series() -> None:
    rank = next(RANKS)
    for _ in range(2):
        AllReduceMetrics(rank).lost()
    assert value("shardline_allreduce_broken_rounds_total", worker=rank) == 2
