import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.integration.shell import wait_for
from tests.manifests.pods import Probe
from tests.manifests.probes import Kubelet, Streak, serves

STARTUP, READINESS, LIVENESS = (Probe(port, period_seconds=0.001) for port in (1, 2, 3))


class Answers:
    """A container that answers each probe as it is told to; asked without end, it repeats."""

    def __init__(self, **answers: list[bool]) -> None:
        self._answers = {int(name[1:]): list(given) for name, given in answers.items()}
        self.asked: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __call__(self, probe: Probe) -> bool:
        given = self._answers[probe.port]
        self.asked.put(probe.port)
        return given.pop(0) if len(given) > 1 else given[0]


@contextmanager
def kubelet(check: Callable[[Probe], bool], **probes: Probe) -> Iterator[Kubelet]:
    made = Kubelet(probes, check)
    try:
        yield made
    finally:
        made.close()


def test_a_probe_has_failed_after_so_many_failures_in_a_row() -> None:
    streak = Streak(Probe(1, failure_threshold=3))
    answers = [False, False, True, False, False, False, False]
    assert [streak.add(each) for each in answers] == [None, None, True, None, None, False, False]


def test_a_probe_has_succeeded_after_so_many_successes_in_a_row() -> None:
    streak = Streak(Probe(1, success_threshold=2, failure_threshold=1))
    assert [streak.add(each) for each in (True, False, True, True)] == [None, False, None, True]


def test_a_container_without_probes_is_ready_at_once() -> None:
    with kubelet(Answers()) as made:
        wait_for("ready", lambda: made.is_ready, 10, pause=0.001)


def test_other_probes_wait_for_the_startup_probe() -> None:
    answers = Answers(_1=[False, False, True], _2=[True])
    with kubelet(answers, startup=STARTUP, readiness=READINESS) as made:
        wait_for("ready", lambda: made.is_ready, 10, pause=0.001)
    assert [answers.asked.get(timeout=10) for _ in range(4)] == [1, 1, 1, 2]
    assert made.failed == ""


def test_a_container_that_never_starts_has_failed() -> None:
    with kubelet(Answers(_1=[False], _2=[True]), startup=STARTUP, readiness=READINESS) as made:
        wait_for("failed", lambda: bool(made.failed), 10, pause=0.001)
        assert (made.failed, made.is_ready) == ("startup", False)


def test_a_container_is_ready_again_when_it_passes_again() -> None:
    answers = Answers(_2=[True, *[False] * 3, True])
    with kubelet(answers, readiness=READINESS) as made:
        for _ in range(6):
            answers.asked.get(timeout=10)
        wait_for("ready again", lambda: made.is_ready, 10, pause=0.001)
        assert made.failed == ""


def test_a_container_is_not_ready_any_more_when_it_passes_no_more() -> None:
    answers = Answers(_2=[True, False])
    with kubelet(answers, readiness=READINESS) as made:
        for _ in range(6):  # three failures are known when the fourth is asked for
            answers.asked.get(timeout=10)
        assert (made.is_ready, made.failed) == (False, "")


def test_a_container_that_is_not_alive_has_failed() -> None:
    answers = Answers(_2=[True], _3=[True, False])
    with kubelet(answers, readiness=READINESS, liveness=LIVENESS) as made:
        wait_for("failed", lambda: bool(made.failed), 10, pause=0.001)
        assert made.failed == "liveness"


def test_a_probe_waits_for_its_initial_delay() -> None:
    answers = Answers(_2=[True])
    with kubelet(answers, readiness=Probe(2, initial_delay_seconds=3600)) as made:
        assert not made.is_ready
    assert answers.asked.empty()


@pytest.mark.parametrize(
    ("service", "status", "expected"),
    [("", "SERVING", True), ("", "NOT_SERVING", False), ("unknown", "SERVING", False)],
)
def test_a_grpc_probe_asks_for_the_health_of_a_service(
    service: str, status: str, expected: bool
) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    checks = health.HealthServicer()
    checks.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert serves("127.0.0.1", Probe(port, service, timeout_seconds=10)) == expected
    finally:
        server.stop(None).wait()


def test_nobody_listening_is_no_health() -> None:
    assert not serves("127.0.0.1", Probe(1, timeout_seconds=0.2))
