"""The metrics of every process and of a worker, and the endpoint that shows them. Those of a shard,
of the lead, and of workers that speak to each other are in the files named `*_metrics`.

Labels are bounded: a worker's rank, a shard's index, a mode, a phase of a step, the gRPC name of a
refusal. Code that counts holds a `WorkerMetrics`, a `ShardMetrics` or the like. They fill the
labels in when they are built, so that a series exists, at 0, before its first event, and counting
looks nothing up. Any thread may count. docs/metrics.md lists them all.
"""

import platform
import socket
import threading
from importlib.metadata import version
from typing import Final, Literal, get_args
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    make_wsgi_app,
)
from prometheus_client.exposition import ThreadingWSGIServer

from ps_core import __version__
from ps_core.cgroup import memory_limit_bytes
from ps_core.config import join_address, split_address
from ps_core.errors import ConfigError

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

# Not the library's global registry: that one belongs to the user's training script.
REGISTRY: Final = CollectorRegistry()
# Memory, CPU time and open files under the names that dashboards expect: process_*, python_*.
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

_BUILD: Final = Info(
    "shardline_build", "Versions of shardline and of what it runs on.", registry=REGISTRY
)
_MEMORY_LIMIT: Final = Gauge(
    "shardline_memory_limit_bytes",
    "Memory that the process's control group may use; +Inf without a limit.",
    registry=REGISTRY,
)
_MEMORY_LIMIT.set_function(memory_limit_bytes)  # at every scrape: a container may be resized

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
_APPLIED_SAMPLES: Final = Counter(
    "shardline_applied_samples_total",
    "Samples whose gradients went into an update.",
    ["worker"],
    registry=REGISTRY,
)
_LOSS: Final = Gauge(
    "shardline_loss",
    "The latest loss that a worker's script has logged.",
    ["worker"],
    registry=REGISTRY,
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


class WorkerMetrics:
    """Counts what worker `rank` does with shards 0 to `num_shards` - 1."""

    def __init__(self, rank: int, num_shards: int) -> None:
        self._worker = worker = str(rank)
        shards = [str(index) for index in range(num_shards)]
        self._seconds = {phase: _STEP_SECONDS.labels(worker, phase) for phase in get_args(Phase)}
        self._steps = _STEPS.labels(worker)
        self._samples = _SAMPLES.labels(worker)
        self._applied_samples = _APPLIED_SAMPLES.labels(worker)
        self._nonfinite_steps = _NONFINITE_STEPS.labels(worker)
        self._refused_steps = _REFUSED_STEPS.labels(worker)
        self._reconnects = [_RECONNECTS.labels(worker, shard) for shard in shards]
        self._pushed_bytes = [_WORKER_PUSHED_BYTES.labels(worker, shard) for shard in shards]
        self._pulled_bytes = [_WORKER_PULLED_BYTES.labels(worker, shard) for shard in shards]

    def spent(self, phase: Phase, seconds: float) -> None:
        """One step's time in one phase."""
        self._seconds[phase].observe(seconds)

    def finished_step(self, samples: int, *, applied: bool) -> None:
        """A step is done, on `samples` samples; `applied`: its gradients went into an update."""
        self._steps.inc()
        self._samples.inc(samples)
        if applied:
            self._applied_samples.inc(samples)

    def logged_loss(self, loss: float) -> None:
        """The script has logged its loss. There is no series before: a loss of 0 would be wrong."""
        _LOSS.labels(self._worker).set(loss)

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


def start_endpoint(host: str, port: int, *, shared: bool = False) -> Endpoint | None:
    """Serve all metrics over HTTP; port 0 takes a free one, -1 serves nothing and returns None.
    `shared`: another process of this user may hold the port.

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
    host, _ = split_address(join_address(host, port))
    try:
        server = _listen(host, port, shared)
    except OSError as exc:
        key = f"metrics.host and metrics.port: cannot listen on {host}, port {port}"
        raise ConfigError(f"{key}: {exc}; port 0 takes a free one, -1 none") from exc
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    return Endpoint(f"http://{join_address(host, server.server_port)}/metrics", server, thread)


class _Silent(WSGIRequestHandler):
    """Logs no request."""

    def log_message(self, format: str, *args: object) -> None:
        return


def _listen(host: str, port: int, shared: bool) -> WSGIServer:
    """As prometheus_client's own server, which cannot share a port."""
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)

    class Server(ThreadingWSGIServer):
        address_family = places[0][0]
        allow_reuse_port = shared

    return make_server(host, port, make_wsgi_app(REGISTRY), Server, _Silent)
