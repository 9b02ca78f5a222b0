"""The metrics of a shard.

As in ps_core/metrics.py, labels are bounded and series begin at 0. The lead's are in lead_metrics.
"""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from ps_core.errors import (
    DataLossError,
    EvictedError,
    JobFailedError,
    JobOverError,
    JoinTimeoutError,
    MismatchError,
    ProtocolError,
    ShardlineError,
    status_of,
)
from ps_core.metrics import REGISTRY, SECONDS

_VERSIONS: Final = (0, *(2**power for power in range(9)))

_SHARD_RECEIVED_BYTES: Final = Counter(
    "shardline_shard_received_bytes_total",
    "Bytes of gradients that a shard received.",
    ["shard"],
    registry=REGISTRY,
)
_SHARD_SENT_BYTES: Final = Counter(
    "shardline_shard_sent_bytes_total",
    "Bytes of parameters that a shard sent.",
    ["shard"],
    registry=REGISTRY,
)
_SHARD_PARTS: Final = Counter(
    "shardline_shard_parts_total",
    "Parts with gradients that a shard received, duplicates included.",
    ["shard"],
    registry=REGISTRY,
)
_SHARD_DUPLICATE_PARTS: Final = Counter(
    "shardline_shard_duplicate_parts_total",
    "Parts that a shard had received before and answered without using them again.",
    ["shard"],
    registry=REGISTRY,
)
_SHARD_REFUSED_PARTS: Final = Counter(
    "shardline_shard_refused_parts_total",
    "Parts whose gradients came too late for their update, and were not used.",
    ["shard"],
    registry=REGISTRY,
)
_SHARD_UPDATES: Final = Counter(
    "shardline_shard_updates_total",
    "Versions that a shard completed: each is an update of all its parts.",
    ["shard", "mode"],
    registry=REGISTRY,
)
_SHARD_VERSION: Final = Gauge(
    "shardline_shard_version",
    "Version of the parameters that a shard holds.",
    ["shard"],
    registry=REGISTRY,
)
_SHARD_PARAMETER_BYTES: Final = Gauge(
    "shardline_shard_parameter_bytes",
    "Bytes of the parameters that a shard holds.",
    ["shard"],
    registry=REGISTRY,
)
_APPLY_SECONDS: Final = Histogram(
    "shardline_apply_seconds",
    "Time that the optimizer took for one part.",
    ["shard"],
    buckets=SECONDS,
    registry=REGISTRY,
)
_WORKER_CLOCK: Final = Gauge(
    "shardline_worker_clock",
    "Latest step of which a shard has a worker's gradients.",
    ["shard", "worker"],
    registry=REGISTRY,
)
_WORKER_LAG_SECONDS: Final = Gauge(
    "shardline_worker_lag_seconds",
    "How much later than the first worker's a worker's last part of a step comes, smoothed.",
    ["shard", "worker"],
    registry=REGISTRY,
)
_STALENESS_VERSIONS: Final = Histogram(
    "shardline_staleness_versions",
    "Versions between the parameters that gradients come from and those they update.",
    ["shard"],
    buckets=_VERSIONS,
    registry=REGISTRY,
)
_QUORUM_WAIT_SECONDS: Final = Histogram(
    "shardline_quorum_wait_seconds",
    "Time from the first to the last worker of an update, as the lead sees it.",
    ["shard"],
    buckets=SECONDS,
    registry=REGISTRY,
)
_LIVE_WORKERS: Final = Gauge(
    "shardline_live_workers",
    "Workers that a shard counts as members.",
    ["shard"],
    registry=REGISTRY,
)
_HYPERPARAMETER_DIFFERENCES: Final = Counter(
    "shardline_hyperparameter_differences_total",
    "Steps whose workers did not agree on the hyperparameters.",
    ["shard"],
    registry=REGISTRY,
)
_REFUSED_FRAMES: Final = Counter(
    "shardline_refused_frames_total",
    "Frames that a shard refused, by the gRPC status of the refusal.",
    ["shard", "reason"],
    registry=REGISTRY,
)

# What a shard refuses with; anything else is a bug in the shard, INTERNAL as on the wire.
_REASONS: Final = tuple(
    status_of(kind()).name
    for kind in (
        ProtocolError,
        MismatchError,
        DataLossError,
        JobFailedError,
        JobOverError,
        EvictedError,
        JoinTimeoutError,
        ShardlineError,
    )
)


class ShardMetrics:
    """Counts what shard `index` does in one run of one job."""

    def __init__(self, index: int, mode: str) -> None:
        self._shard = shard = str(index)
        self._received_bytes = _SHARD_RECEIVED_BYTES.labels(shard)
        self._sent_bytes = _SHARD_SENT_BYTES.labels(shard)
        self._parts = _SHARD_PARTS.labels(shard)
        self._duplicate_parts = _SHARD_DUPLICATE_PARTS.labels(shard)
        self._refused_parts = _SHARD_REFUSED_PARTS.labels(shard)
        self._updates = _SHARD_UPDATES.labels(shard, mode)
        self._version = _SHARD_VERSION.labels(shard)
        self._parameter_bytes = _SHARD_PARAMETER_BYTES.labels(shard)
        self._apply_seconds = _APPLY_SECONDS.labels(shard)
        self._staleness = _STALENESS_VERSIONS.labels(shard)
        self._quorum_wait_seconds = _QUORUM_WAIT_SECONDS.labels(shard)
        self._live_workers = _LIVE_WORKERS.labels(shard)
        self._differences = _HYPERPARAMETER_DIFFERENCES.labels(shard)
        self._refused = {reason: _REFUSED_FRAMES.labels(shard, reason) for reason in _REASONS}
        self._last_version = 0
        self._differed = False

    def set_parameters(self, num_bytes: int) -> None:
        """The shard holds `num_bytes` of parameters."""
        self._parameter_bytes.set(num_bytes)

    def set_live_workers(self, count: int) -> None:
        """The shard counts `count` workers as members."""
        self._live_workers.set(count)

    def set_clock(self, rank: int, step: int) -> None:
        """`step` is the latest of which worker `rank` has sent gradients."""
        _WORKER_CLOCK.labels(self._shard, str(rank)).set(step)

    def lag(self, rank: int, seconds: float) -> None:
        """Worker `rank` comes `seconds` after the first worker, smoothed."""
        _WORKER_LAG_SECONDS.labels(self._shard, str(rank)).set(seconds)

    def forget(self, rank: int) -> None:
        """Worker `rank` is gone: show its clock and lag no more."""
        _WORKER_CLOCK.remove(self._shard, str(rank))
        _WORKER_LAG_SECONDS.remove(self._shard, str(rank))

    def received(self, num_bytes: int) -> None:
        """A part with gradients came in."""
        self._parts.inc()
        self._received_bytes.inc(num_bytes)

    def duplicate(self) -> None:
        """The part that came in had come before."""
        self._duplicate_parts.inc()

    def refused_parts(self, count: int) -> None:
        """The gradients of `count` parts came too late."""
        self._refused_parts.inc(count)

    def refused(self, reason: str) -> None:
        """A frame was refused; `reason` is the name of the gRPC status it was refused with."""
        self._refused.get(reason, self._refused["INTERNAL"]).inc()

    def applied(self, seconds: float) -> None:
        """The optimizer updated one part."""
        self._apply_seconds.observe(seconds)

    def stale(self, versions: int) -> None:
        """Gradients went in, `versions` after the parameters they come from."""
        self._staleness.observe(versions)

    def quorum_waited(self, seconds: float) -> None:
        """The last worker of an update came `seconds` after its first."""
        self._quorum_wait_seconds.observe(seconds)

    def updated(self, version: int) -> None:
        """All parts are at `version` now; may be told the same version again."""
        self._updates.inc(max(0, version - self._last_version))
        self._version.set(version)
        self._last_version = version

    def sent(self, num_bytes: int) -> None:
        """Parameters went out."""
        self._sent_bytes.inc(num_bytes)

    def hyperparameters_differ(self) -> bool:
        """Workers disagreed at a step; True the first time, when a warning is due."""
        self._differences.inc()
        first, self._differed = not self._differed, True
        return first
