"""The metrics of workers that speak to each other: all-reduce, and the stages of a pipeline.

As in ps_core/metrics.py, labels are bounded and series begin at 0. Metrics are declared there only
for workers; a shard never builds these classes, and so never shows them.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ps_core.metrics import REGISTRY, SECONDS

RoundPhase = Literal["wait", "reduce"]
Direction = Literal["forward", "backward"]

_ALLREDUCE: Final = CollectorRegistry()
_PIPELINE: Final = CollectorRegistry()

_ROUND_SECONDS: Final = Histogram(
    "shardline_allreduce_seconds",
    "Time that a worker waited in one round: for the others to begin it, and for its sums.",
    ["worker", "phase"],
    buckets=SECONDS,
    registry=_ALLREDUCE,
)
_MEMBERS: Final = Gauge(
    "shardline_allreduce_members",
    "Workers in the group, as one of them sees it.",
    ["worker"],
    registry=_ALLREDUCE,
)
_GENERATION: Final = Gauge(
    "shardline_allreduce_generation",
    "How often the group was formed, as one of its workers sees it.",
    ["worker"],
    registry=_ALLREDUCE,
)
_LOST: Final = Counter(
    "shardline_allreduce_broken_rounds_total",
    "Rounds that a worker began again because another was lost.",
    ["worker"],
    registry=_ALLREDUCE,
)
_STAGE_SECONDS: Final = Histogram(
    "shardline_pipeline_stage_seconds",
    "Time that a worker computed on one microbatch in one stage.",
    ["worker", "stage", "direction"],
    buckets=SECONDS,
    registry=_PIPELINE,
)
_BUBBLE: Final = Gauge(
    "shardline_pipeline_bubble_ratio",
    "The part of a worker's last step through the pipeline in which it computed nothing.",
    ["worker"],
    registry=_PIPELINE,
)
_ACTIVATION_BYTES: Final = Gauge(
    "shardline_pipeline_activation_bytes",
    "The most bytes of stage inputs and outputs that a worker held at once in its last step.",
    ["worker"],
    registry=_PIPELINE,
)


class AllReduceMetrics:
    """Counts what one worker does in rounds."""

    def __init__(self, rank: int) -> None:
        REGISTRY.register(_ALLREDUCE)  # again changes nothing
        worker = str(rank)
        self._seconds = {
            phase: _ROUND_SECONDS.labels(worker, phase) for phase in get_args(RoundPhase)
        }
        self._members = _MEMBERS.labels(worker)
        self._generation = _GENERATION.labels(worker)
        self._lost = _LOST.labels(worker)

    def waited(self, phase: RoundPhase, seconds: float) -> None:
        """The worker waited in a round."""
        self._seconds[phase].observe(seconds)

    def formed(self, generation: int, num_members: int) -> None:
        """The group has formed, or was formed again."""
        self._generation.set(generation)
        self._members.set(num_members)

    def lost(self) -> None:
        """A round broke."""
        self._lost.inc()


class PipelineMetrics:
    """Counts what one worker does in its stages of the model."""

    def __init__(self, rank: int, stages: Sequence[int]) -> None:
        REGISTRY.register(_PIPELINE)  # again changes nothing
        worker = str(rank)
        self._bubble = _BUBBLE.labels(worker)
        self._activation_bytes = _ACTIVATION_BYTES.labels(worker)
        self._seconds = {
            (stage, direction): _STAGE_SECONDS.labels(worker, str(stage), direction)
            for stage in stages
            for direction in get_args(Direction)
        }

    def step(
        self,
        forward_seconds: Mapping[int, Sequence[float]],
        backward_seconds: Mapping[int, Sequence[float]],
        bubble_fraction: float,
        activation_bytes: int,
    ) -> None:
        """A step is done: seconds per stage and microbatch."""
        self._bubble.set(bubble_fraction)
        self._activation_bytes.set(activation_bytes)
        self._observe("forward", forward_seconds)
        self._observe("backward", backward_seconds)

    def _observe(self, direction: Direction, seconds: Mapping[int, Sequence[float]]) -> None:
        for stage, each in seconds.items():
            for one in each:
                self._seconds[stage, direction].observe(one)
