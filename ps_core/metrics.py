"""Every metric, declared once, and the endpoint that shows them; the lead's are in lead_metrics.

Labels are bounded: a worker's rank, a shard's index, a mode, a phase of a step, the gRPC name of a
refusal. Code that counts holds a `WorkerMetrics` or a `ShardMetrics`. They fill the labels in when
they are built, so that a series exists, at 0, before its first event, and counting looks nothing
up. Any thread may count.
"""

import platform
import threading
from importlib.metadata import version
from typing import Final, Literal, get_args
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from ps_core import __version__
from ps_core.errors import (
    ConfigError,
    DataLossError,
    JobFailedError,
    JoinTimeoutError,
    MismatchError,
    ProtocolError,
    ShardlineError,
    status_of,
)

Phase = Literal["data", "forward", "backward", "exchange"]

# From one small part on one core to a step that waits for the slowest of many workers.
SECONDS: Final = (
    *(0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0),
    *(10.0, 25.0, 60.0),
)
_VERSIONS: Final = (0, *(2**power for power in range(9)))

# Not the library's global registry: that one belongs to the user's training script.
REGISTRY: Final = CollectorRegistry()
# Memory, CPU time and open files under the names that dashboards expect: process_*, python_*.
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

_BUILD: Final = Info(
    "shardline_build", "Versions of shardline and of what it runs on.", registry=REGISTRY
)

_STEP_SECONDS: Final = Histogram(
    "shardline_step_seconds",
    "Time that a worker spent in one phase of a step.",
    ["worker", "phase"],
    buckets=SECONDS,
    registry=REGISTRY,
)
_STEPS: Final = Counter(
    "shardline_steps_total", "Steps that a worker finished.", ["worker"], registry=REGISTRY
)
_SAMPLES: Final = Counter(
    "shardline_samples_total", "Samples that a worker trained on.", ["worker"], registry=REGISTRY
)
_NONFINITE_STEPS: Final = Counter(
    "shardline_nonfinite_steps_total",
    "Steps whose gradients held NaN or infinity.",
    ["worker"],
    registry=REGISTRY,
)
_REFUSED_STEPS: Final = Counter(
    "shardline_refused_steps_total",
    "Steps of a worker whose gradients came too late for their update.",
    ["worker"],
    registry=REGISTRY,
)
_RECONNECTS: Final = Counter(
    "shardline_reconnects_total",
    "Times that a worker opened its broken stream to a shard again.",
    ["worker", "shard"],
    registry=REGISTRY,
)
_WORKER_PUSHED_BYTES: Final = Counter(
    "shardline_worker_pushed_bytes_total",
    "Bytes of gradients that a worker sent to a shard.",
    ["worker", "shard"],
    registry=REGISTRY,
)
_WORKER_PULLED_BYTES: Final = Counter(
    "shardline_worker_pulled_bytes_total",
    "Bytes of parameters that a worker received from a shard.",
    ["worker", "shard"],
    registry=REGISTRY,
)

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
    "Time from the first to the last worker of an update.",
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
        JoinTimeoutError,
        ShardlineError,
    )
)


class WorkerMetrics:
    """Counts what worker `rank` does with shards 0 to `num_shards` - 1."""

    def __init__(self, rank: int, num_shards: int) -> None:
        worker, shards = str(rank), [str(index) for index in range(num_shards)]
        self._seconds = {phase: _STEP_SECONDS.labels(worker, phase) for phase in get_args(Phase)}
        self._steps = _STEPS.labels(worker)
        self._samples = _SAMPLES.labels(worker)
        self._nonfinite_steps = _NONFINITE_STEPS.labels(worker)
        self._refused_steps = _REFUSED_STEPS.labels(worker)
        self._reconnects = [_RECONNECTS.labels(worker, shard) for shard in shards]
        self._pushed_bytes = [_WORKER_PUSHED_BYTES.labels(worker, shard) for shard in shards]
        self._pulled_bytes = [_WORKER_PULLED_BYTES.labels(worker, shard) for shard in shards]

    def spent(self, phase: Phase, seconds: float) -> None:
        """One step's time in one phase."""
        self._seconds[phase].observe(seconds)

    def finished_step(self, samples: int) -> None:
        """A step is done, on `samples` samples."""
        self._steps.inc()
        self._samples.inc(samples)

    def nonfinite_step(self) -> None:
        """A step's gradients held NaN or infinity."""
        self._nonfinite_steps.inc()

    def refused_step(self) -> None:
        """A step's gradients came too late."""
        self._refused_steps.inc()

    def reconnected(self, shard: int) -> None:
        """A broken stream to a shard is open again."""
        self._reconnects[shard].inc()

    def pushed(self, shard: int, num_bytes: int) -> None:
        """Gradients went to a shard."""
        self._pushed_bytes[shard].inc(num_bytes)

    def pulled(self, shard: int, num_bytes: int) -> None:
        """Parameters came from a shard."""
        self._pulled_bytes[shard].inc(num_bytes)


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


class Endpoint:
    """A running `/metrics` endpoint at `url`."""

    def __init__(self, url: str, server: WSGIServer, thread: threading.Thread) -> None:
        self.url = url
        self._server = server
        self._thread = thread

    def close(self) -> None:
        """Stop listening and wait for the endpoint's thread; safe to call again."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_endpoint(host: str, port: int) -> Endpoint | None:
    """Serve all metrics over HTTP; port 0 takes a free one, -1 serves nothing and returns None.

    ConfigError when `host` and `port` cannot be listened on.
    """
    if port == -1:
        return None
    _BUILD.info(
        {
            "version": __version__,
            "torch": version("torch"),
            "grpc": version("grpcio"),
            "python": platform.python_version(),
        }
    )
    try:
        server, thread = start_http_server(port, host, REGISTRY)
    except OSError as exc:
        key = f"metrics.host and metrics.port: cannot listen on {host}, port {port}"
        raise ConfigError(f"{key}: {exc}; port 0 takes a free one, -1 none") from exc
    bracketed = f"[{host}]" if ":" in host else host
    return Endpoint(f"http://{bracketed}:{server.server_port}/metrics", server, thread)
