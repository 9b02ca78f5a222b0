import itertools
import math
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ps_core import __version__
from ps_core.cgroup import memory_limit_bytes
from ps_core.errors import (
    ConfigError,
    DataLossError,
    EvictedError,
    JobFailedError,
    JobOverError,
    JoinTimeoutError,
    MismatchError,
    NonFiniteError,
    ProtocolError,
    ShardlineError,
    status_of,
)
from ps_core.group_metrics import AllReduceMetrics, PipelineMetrics
from ps_core.lead_metrics import LeadMetrics
from ps_core.metrics import REGISTRY, Endpoint, WorkerMetrics, start_endpoint
from ps_core.shard_metrics import ShardMetrics

LOCAL = "127.0.0.1"
# Metrics belong to the process, so each test counts under a rank and an index of its own.
NUMBERS = itertools.count(1000)

# Name, kind and labels are a promise to dashboards and alerts, so they are written out here.
CONTRACT = {
    ("shardline_build", "info", ()),
    ("shardline_memory_limit_bytes", "gauge", ()),
    ("shardline_step_seconds", "histogram", ("worker", "phase")),
    ("shardline_steps", "counter", ("worker",)),
    ("shardline_samples", "counter", ("worker",)),
    ("shardline_applied_samples", "counter", ("worker",)),
    ("shardline_loss", "gauge", ("worker",)),
    ("shardline_nonfinite_steps", "counter", ("worker",)),
    ("shardline_refused_steps", "counter", ("worker",)),
    ("shardline_reconnects", "counter", ("worker", "shard")),
    ("shardline_worker_pushed_bytes", "counter", ("worker", "shard")),
    ("shardline_worker_pulled_bytes", "counter", ("worker", "shard")),
    ("shardline_shard_received_bytes", "counter", ("shard",)),
    ("shardline_shard_sent_bytes", "counter", ("shard",)),
    ("shardline_shard_parts", "counter", ("shard",)),
    ("shardline_shard_duplicate_parts", "counter", ("shard",)),
    ("shardline_shard_refused_parts", "counter", ("shard",)),
    ("shardline_shard_updates", "counter", ("shard", "mode")),
    ("shardline_shard_version", "gauge", ("shard",)),
    ("shardline_shard_parameter_bytes", "gauge", ("shard",)),
    ("shardline_apply_seconds", "histogram", ("shard",)),
    ("shardline_worker_clock", "gauge", ("shard", "worker")),
    ("shardline_worker_lag_seconds", "gauge", ("shard", "worker")),
    ("shardline_staleness_versions", "histogram", ("shard",)),
    ("shardline_quorum_wait_seconds", "histogram", ("shard",)),
    ("shardline_live_workers", "gauge", ("shard",)),
    ("shardline_hyperparameter_differences", "counter", ("shard",)),
    ("shardline_refused_frames", "counter", ("shard", "reason")),
    # Of workers that all-reduce, and of those that have a stage of a model.
    ("shardline_allreduce_seconds", "histogram", ("worker", "phase")),
    ("shardline_allreduce_members", "gauge", ("worker",)),
    ("shardline_allreduce_generation", "gauge", ("worker",)),
    ("shardline_allreduce_broken_rounds", "counter", ("worker",)),
    ("shardline_pipeline_stage_seconds", "histogram", ("worker", "stage", "direction")),
    ("shardline_pipeline_bubble_ratio", "gauge", ("worker",)),
    ("shardline_pipeline_activation_bytes", "gauge", ("worker",)),
    # Of the lead only.
    ("shardline_evictions", "counter", ("reason",)),
    ("shardline_preemptions", "counter", ()),
    ("shardline_joins", "counter", ()),
    ("shardline_leases", "gauge", ("state",)),
    ("shardline_straggler_ratio", "gauge", ("worker",)),
    ("shardline_straggler", "gauge", ("worker", "phase")),
    ("shardline_membership_epoch", "gauge", ()),
    ("shardline_paused", "gauge", ()),
}


@pytest.fixture
def number() -> int:
    return next(NUMBERS)


def value(name: str, **labels: object) -> float | None:
    """The current value of one series; None when it does not exist."""
    return REGISTRY.get_sample_value(name, {key: str(label) for key, label in labels.items()})


def scrape(endpoint: Endpoint) -> str:
    with urllib.request.urlopen(endpoint.url, timeout=10) as response:  # noqa: S310 - our own http
        assert response.status == 200
        text: str = response.read().decode()
    return text


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    started = start_endpoint(LOCAL, 0)
    assert started is not None
    with closing(started):
        yield started


# Declarations


def test_every_metric_has_our_prefix_a_meaning_and_the_promised_labels() -> None:
    LeadMetrics()
    AllReduceMetrics(0)
    PipelineMetrics(0, [0])
    declared = {
        (family.name, family.type, family.documentation)
        for family in REGISTRY.collect()
        if not family.name.startswith(("process_", "python_"))
    }
    assert {(name, kind) for name, kind, _ in declared} == {row[:2] for row in CONTRACT}
    assert all(name.startswith("shardline_") for name, _, _ in declared)
    assert all(meaning.endswith(".") for _, _, meaning in declared)


def test_series_carry_the_promised_labels(number: int, endpoint: Endpoint) -> None:
    WorkerMetrics(number, num_shards=1).logged_loss(1.0)
    shard = ShardMetrics(number, "sync")
    shard.set_clock(rank=0, step=0)
    shard.lag(rank=0, seconds=0.0)
    LeadMetrics().no_straggler(number)
    AllReduceMetrics(number)
    PipelineMetrics(number, [0])
    promised = {name: set(labels) for name, _, labels in CONTRACT}
    seen: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(scrape(endpoint)):
        name = family.name.removesuffix("_created").removesuffix("_info")
        for sample in family.samples:
            seen.setdefault(name, set()).update(set(sample.labels) - {"le"})
    seen["shardline_build"] = set()
    assert {name: labels for name, labels in seen.items() if name in promised} == promised


def test_names_carry_base_units() -> None:
    for name, kind, _ in CONTRACT:
        if kind == "histogram":
            assert name.endswith(("_seconds", "_versions"))
        assert not name.endswith(("_ms", "_milliseconds", "_mb", "_kilobytes"))


@pytest.mark.parametrize(
    "name",
    ["shardline_step_seconds", "shardline_apply_seconds", "shardline_quorum_wait_seconds"],
)
def test_buckets_reach_from_100_microseconds_to_a_minute(name: str, number: int) -> None:
    WorkerMetrics(number, num_shards=0)
    ShardMetrics(number, "sync")
    [family] = [family for family in REGISTRY.collect() if family.name == name]
    edges = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
    finite = sorted(edges - {float("inf")})
    assert (finite[0], finite[-1]) == (0.0001, 60.0)
    assert all(low < high <= 2.5 * low for low, high in itertools.pairwise(finite))


# Counting


def test_every_series_of_a_worker_starts_at_zero(number: int) -> None:
    WorkerMetrics(number, num_shards=2)
    for name in ("steps", "samples", "applied_samples", "nonfinite_steps", "refused_steps"):
        assert value(f"shardline_{name}_total", worker=number) == 0
    for shard in range(2):
        for name in ("pushed", "pulled"):
            counter = f"shardline_worker_{name}_bytes_total"
            assert value(counter, worker=number, shard=shard) == 0
        assert value("shardline_reconnects_total", worker=number, shard=shard) == 0
    for phase in ("data", "forward", "backward", "exchange"):
        assert value("shardline_step_seconds_count", worker=number, phase=phase) == 0


def test_a_worker_counts_steps_samples_bytes_and_time(number: int) -> None:
    metrics = WorkerMetrics(number, num_shards=2)
    metrics.finished_step(32, applied=True)
    metrics.finished_step(16, applied=False)
    metrics.nonfinite_step()
    metrics.refused_step()
    metrics.refused_step()
    metrics.pushed(1, 100)
    metrics.pushed(1, 20)
    metrics.pulled(0, 7)
    metrics.spent("backward", 0.25)
    metrics.spent("backward", 0.5)
    assert value("shardline_steps_total", worker=number) == 2
    assert value("shardline_samples_total", worker=number) == 48
    assert value("shardline_applied_samples_total", worker=number) == 32
    assert value("shardline_nonfinite_steps_total", worker=number) == 1
    assert value("shardline_refused_steps_total", worker=number) == 2
    assert value("shardline_worker_pushed_bytes_total", worker=number, shard=1) == 120
    assert value("shardline_worker_pushed_bytes_total", worker=number, shard=0) == 0
    assert value("shardline_worker_pulled_bytes_total", worker=number, shard=0) == 7
    assert value("shardline_step_seconds_sum", worker=number, phase="backward") == 0.75
    assert value("shardline_step_seconds_count", worker=number, phase="forward") == 0


def test_a_loss_is_shown_once_the_script_has_logged_one(number: int) -> None:
    metrics = WorkerMetrics(number, num_shards=0)
    assert value("shardline_loss", worker=number) is None
    metrics.logged_loss(2.5)
    metrics.logged_loss(0.5)
    assert value("shardline_loss", worker=number) == 0.5


def test_a_worker_counts_reconnects_per_shard(number: int) -> None:
    metrics = WorkerMetrics(number, num_shards=2)
    for shard in (1, 0, 1):
        metrics.reconnected(shard)
    counts = [value("shardline_reconnects_total", worker=number, shard=s) for s in range(2)]
    assert counts == [1, 2]


def test_every_counter_of_a_shard_starts_at_zero(number: int) -> None:
    ShardMetrics(number, "sync")
    for name in ("received_bytes", "sent_bytes", "parts", "duplicate_parts", "refused_parts"):
        assert value(f"shardline_shard_{name}_total", shard=number) == 0
    for name in ("apply_seconds", "staleness_versions", "quorum_wait_seconds"):
        assert value(f"shardline_{name}_count", shard=number) == 0
    assert value("shardline_shard_updates_total", shard=number, mode="sync") == 0
    assert value("shardline_hyperparameter_differences_total", shard=number) == 0
    for reason in REASONS.values():
        assert value("shardline_refused_frames_total", shard=number, reason=reason) == 0


def test_a_shard_counts_parts_and_bytes_in_and_out(number: int) -> None:
    metrics = ShardMetrics(number, "sync")
    metrics.received(1000)
    metrics.received(24)
    metrics.duplicate()
    metrics.sent(512)
    metrics.applied(0.002)
    assert value("shardline_shard_parts_total", shard=number) == 2
    assert value("shardline_shard_received_bytes_total", shard=number) == 1024
    assert value("shardline_shard_duplicate_parts_total", shard=number) == 1
    assert value("shardline_shard_sent_bytes_total", shard=number) == 512
    assert value("shardline_apply_seconds_count", shard=number) == 1
    assert value("shardline_apply_seconds_sum", shard=number) == 0.002


def test_a_shard_counts_parts_that_came_too_late(number: int) -> None:
    metrics = ShardMetrics(number, "sync")
    metrics.refused_parts(3)
    metrics.refused_parts(0)
    metrics.refused_parts(1)
    assert value("shardline_shard_refused_parts_total", shard=number) == 4


def test_staleness_is_counted_in_powers_of_two(number: int) -> None:
    metrics = ShardMetrics(number, "async")
    for versions in (0, 0, 1, 2, 3, 4, 5, 300):
        metrics.stale(versions)
    upto = {0: 2, 1: 3, 2: 4, 4: 6, 8: 7, 16: 7, 32: 7, 64: 7, 128: 7, 256: 7, math.inf: 8}
    for edge, count in upto.items():
        le = "+Inf" if edge == math.inf else f"{edge:.1f}"
        assert value("shardline_staleness_versions_bucket", shard=number, le=le) == count
    assert value("shardline_staleness_versions_sum", shard=number) == 315


def test_a_shard_counts_how_long_an_update_waited_for_its_last_worker(number: int) -> None:
    metrics = ShardMetrics(number, "sync")
    metrics.quorum_waited(0.0)
    metrics.quorum_waited(0.75)
    assert value("shardline_quorum_wait_seconds_count", shard=number) == 2
    assert value("shardline_quorum_wait_seconds_sum", shard=number) == 0.75


def test_a_worker_that_is_gone_is_shown_no_more_and_may_come_back(number: int) -> None:
    metrics = ShardMetrics(number, "sync")
    for rank in (1, 2):
        metrics.set_clock(rank, 5)
        metrics.lag(rank, 0.5)
    metrics.forget(1)
    metrics.forget(1)
    metrics.forget(3)
    for name in ("shardline_worker_clock", "shardline_worker_lag_seconds"):
        assert value(name, shard=number, worker=1) is None
    assert value("shardline_worker_clock", shard=number, worker=2) == 5
    assert value("shardline_worker_lag_seconds", shard=number, worker=2) == 0.5
    metrics.lag(1, 0.25)
    assert value("shardline_worker_lag_seconds", shard=number, worker=1) == 0.25


def test_a_shard_shows_what_it_holds_and_who_is_there(number: int) -> None:
    metrics = ShardMetrics(number, "sync")
    metrics.set_parameters(4096)
    metrics.set_live_workers(4)
    metrics.set_live_workers(3)
    metrics.set_clock(rank=2, step=17)
    assert value("shardline_shard_parameter_bytes", shard=number) == 4096
    assert value("shardline_live_workers", shard=number) == 3
    assert value("shardline_worker_clock", shard=number, worker=2) == 17


def test_an_update_counts_once_however_often_its_version_is_told(number: int) -> None:
    metrics = ShardMetrics(number, "sync")
    for told in (0, 1, 1, 1, 2, 4):
        metrics.updated(told)
    assert value("shardline_shard_updates_total", shard=number, mode="sync") == 4
    assert value("shardline_shard_version", shard=number) == 4


def test_only_the_first_difference_of_hyperparameters_asks_for_a_warning(number: int) -> None:
    metrics = ShardMetrics(number, "sync")
    assert [metrics.hyperparameters_differ() for _ in range(3)] == [True, False, False]
    assert value("shardline_hyperparameter_differences_total", shard=number) == 3


REASONS = {
    ProtocolError: "INVALID_ARGUMENT",
    MismatchError: "FAILED_PRECONDITION",
    DataLossError: "DATA_LOSS",
    JobFailedError: "ABORTED",
    JobOverError: "OUT_OF_RANGE",
    EvictedError: "PERMISSION_DENIED",
    JoinTimeoutError: "DEADLINE_EXCEEDED",
    NonFiniteError: "INTERNAL",
    ShardlineError: "INTERNAL",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_refused_frame_counts_under_its_status(kind: type[ShardlineError], number: int) -> None:
    ShardMetrics(number, "sync").refused(status_of(kind("why")).name)
    for reason in set(REASONS.values()):
        expected = 1 if reason == REASONS[kind] else 0
        assert value("shardline_refused_frames_total", shard=number, reason=reason) == expected


def test_a_reason_nobody_knows_makes_no_new_series(number: int) -> None:
    ShardMetrics(number, "sync").refused("TEAPOT")
    assert value("shardline_refused_frames_total", shard=number, reason="INTERNAL") == 1
    assert value("shardline_refused_frames_total", shard=number, reason="TEAPOT") is None


def test_threads_lose_no_counts(number: int) -> None:
    metrics = ShardMetrics(number, "sync")

    def receive() -> None:
        for _ in range(1000):
            metrics.received(2)

    threads = [threading.Thread(target=receive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value("shardline_shard_received_bytes_total", shard=number) == 8000


# The endpoint


def test_the_endpoint_shows_current_values(number: int, endpoint: Endpoint) -> None:
    metrics = ShardMetrics(number, "sync")
    metrics.updated(3)
    assert f'shardline_shard_version{{shard="{number}"}} 3.0' in scrape(endpoint)
    metrics.updated(4)
    assert f'shardline_shard_version{{shard="{number}"}} 4.0' in scrape(endpoint)


def test_the_endpoint_shows_versions_and_the_process(endpoint: Endpoint) -> None:
    text = scrape(endpoint)
    [build] = [line for line in text.splitlines() if line.startswith("shardline_build_info{")]
    assert f'version="{__version__}"' in build
    assert f'torch="{version("torch")}"' in build
    assert f'grpc="{version("grpcio")}"' in build
    assert 'python="3.' in build
    [limit] = [line for line in text.splitlines() if line.startswith("shardline_memory_limit")]
    assert float(limit.split()[1]) == memory_limit_bytes()
    assert "\nprocess_cpu_seconds_total " in text
    assert "\npython_info{" in text


def test_port_0_takes_a_free_port_and_the_url_names_it(endpoint: Endpoint) -> None:
    second = start_endpoint(LOCAL, 0)
    assert second is not None
    with closing(second):
        assert endpoint.url.startswith(f"http://{LOCAL}:")
        assert endpoint.url.endswith("/metrics")
        assert endpoint.url != second.url
        assert "shardline_build_info" in scrape(second)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_host_is_written_with_brackets_or_without(host: str) -> None:
    started = start_endpoint(host, 0)
    assert started is not None
    with closing(started):
        assert started.url.startswith("http://[::1]:")
        assert "shardline_build_info" in scrape(started)


def test_a_folder_for_the_metrics_of_several_processes_that_is_not_there_is_ignored() -> None:
    command = [sys.executable, "-c", "import ps_core.metrics, os; print(sorted(os.environ))"]
    environ = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PROMETHEUS_MULTIPROC_DIR": "/nowhere",
    }
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.stderr == (
        "PROMETHEUS_MULTIPROC_DIR is ignored: /nowhere is no folder to write to\n"
    )
    assert "PROMETHEUS" not in done.stdout
    assert done.returncode == 0


def test_port_minus_1_starts_nothing() -> None:
    assert start_endpoint(LOCAL, -1) is None


def test_a_closed_endpoint_is_gone_with_its_thread_and_its_port_is_free() -> None:
    before = set(threading.enumerate())
    first = start_endpoint(LOCAL, 0)
    assert first is not None
    port = int(first.url.split(":")[2].removesuffix("/metrics"))
    first.close()
    first.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape(first)
    again = start_endpoint(LOCAL, port)
    assert again is not None
    again.close()


def test_a_port_in_use_is_named() -> None:
    with closing(socket.create_server((LOCAL, 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"metrics\.port: .* {LOCAL}, port {port}: .*in use"):
            start_endpoint(LOCAL, port)


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.host .* 192\.0\.2\.1, port 0"):
        start_endpoint("192.0.2.1", 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_ipv6_host_is_bracketed_in_the_url() -> None:
    try:
        endpoint = start_endpoint("::1", 0)
    except ConfigError as exc:
        pytest.skip(str(exc))
    assert endpoint is not None
    with closing(endpoint):
        assert endpoint.url.startswith("http://[::1]:")
        assert "shardline_build_info" in scrape(endpoint)
