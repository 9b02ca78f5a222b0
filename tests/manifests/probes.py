"""A kubelet's probes: when a container is started, ready, and no longer alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.manifests.pods import Probe


class Streak:
    """What the last answers to a probe come to."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._passed = False
        self._length = 0

    def add(self, passed: bool) -> bool | None:
        """Whether the probe has succeeded or failed now; None: as before."""
        self._length = self._length + 1 if passed == self._passed else 1
        self._passed = passed
        wanted = self._probe.success_threshold if passed else self._probe.failure_threshold
        return passed if self._length >= wanted else None


def serves(address: str, probe: Probe) -> bool:
    """One gRPC health check, as a kubelet makes it."""
    with grpc.insecure_channel(f"{address}:{probe.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=probe.service)
        try:
            answer = stub.Check(request, timeout=probe.timeout_seconds)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class Kubelet:
    """Probes one container from a thread of its own, until it is closed or a probe that would end
    the container has failed.
    """

    def __init__(self, probes: Mapping[str, Probe], check: Callable[[Probe], bool]) -> None:
        """Begins; `check` asks the container once, and may block."""
        self._probes = probes
        self._check = check
        self._stopped = threading.Event()
        self._ready = threading.Event()
        self.failed = ""
        """The probe after which a kubelet would start the container again."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """It has started, and passes its readiness probe."""
        return self._ready.is_set()

    def close(self) -> None:
        """Probe no more. Idempotent."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        begun = time.monotonic()
        if not self._watch({"startup": self._probes.get("startup")}, begun, self._started):
            return
        others = {kind: self._probes.get(kind) for kind in ("readiness", "liveness")}
        if others["readiness"] is None:
            self._ready.set()
        self._watch(others, begun, self._running)

    def _watch(
        self,
        probes: Mapping[str, Probe | None],
        begun: float,
        decide: Callable[[str, bool], bool | None],
    ) -> bool:
        """Probe until `decide` has an answer, and give it; True when there is nothing to probe."""
        given = {kind: probe for kind, probe in probes.items() if probe is not None}
        streaks = {kind: Streak(probe) for kind, probe in given.items()}
        due = {kind: begun + probe.initial_delay_seconds for kind, probe in given.items()}
        while due:
            kind = min(due, key=due.__getitem__)
            if self._stopped.wait(max(0.0, due[kind] - time.monotonic())):
                return False
            verdict = streaks[kind].add(self._check(given[kind]))
            answer = None if verdict is None else decide(kind, verdict)
            if answer is not None:
                return answer
            due[kind] = max(due[kind], time.monotonic()) + given[kind].period_seconds
        return True

    def _started(self, kind: str, passed: bool) -> bool:
        if not passed:
            self.failed = kind
        return passed

    def _running(self, kind: str, passed: bool) -> bool | None:
        if kind == "readiness":
            (self._ready.set if passed else self._ready.clear)()
            return None
        self.failed = "" if passed else kind
        return None if passed else False
