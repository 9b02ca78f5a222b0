"""What is run in containers, and what happens to it on the way."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.documents import DEPLOY, commands
from tests.integration.compose import Compose, docker_compose
from tests.integration.monitoring import Prometheus
from tests.integration.results import accuracy, balance
from tests.integration.shell import Failure, run, say, wait_for

_PATIENCE_SECONDS: Final = 120.0
_TRAINING_SECONDS: Final = 600.0
_PREEMPTED: Final = 75
_USER: Final = "65532:65532"


@dataclass(frozen=True, slots=True)
class Result:
    """One profile's run, for the summary."""

    profile: str
    containers: tuple[str, ...]
    faults: tuple[str, ...]
    seconds: float
    accuracy: float
    samples: str
    num_targets: int


class Scenario:
    """A profile of compose.yaml that is trained to the end."""

    def __init__(
        self, compose: Compose, prometheus: Prometheus, profile: str, containers: Sequence[str]
    ) -> None:
        self._compose = compose
        self._prometheus = prometheus
        self._profile = profile
        self._containers = tuple(containers)
        self._faults: list[str] = []
        self._evicted: Counter[str] = Counter()
        """Containers that find themselves evicted, and so fail once."""

    def run(self, epochs: int, with_faults: bool = False) -> Result:
        """Train digits for so many epochs. Raises Failure."""
        started = time.monotonic()
        script = f"python /examples/digits.py --epochs {epochs}"
        self._compose.up(*self._containers, SHARDLINE_SCRIPT=script)
        self._check_hardening()
        num_targets = self._wait_for_targets()
        if with_faults:
            self._wait_for_updates(20)
            self._lose_a_worker()
            self._cut_a_worker_off()
            self._preempt_a_worker()
        self._compose.wait_for_end(self._containers, _TRAINING_SECONDS)
        self._check_restarts()
        seconds = time.monotonic() - started
        with tempfile.TemporaryDirectory() as folder:
            self._compose.copy_results(self._containers[0], Path(folder))
            share, sums = accuracy(Path(folder)), balance(Path(folder))
        told = f"{sums.samples_applied} applied, {sums.samples_applied_in_part} in part"
        say(f"{self._profile}: accuracy {share:.3f}, samples: {told}, none lost or repeated")
        faults = tuple(self._faults)
        return Result(self._profile, self._containers, faults, seconds, share, told, num_targets)

    def _check_restarts(self) -> None:
        """Nobody has failed but who was cut off: it was evicted, and comes again."""
        counts = {name: self._compose.num_restarts(name) for name in self._containers}
        wrong = {name: count for name, count in counts.items() if count != self._evicted[name]}
        if wrong:
            raise Failure(f"containers were started again so often: {wrong}")

    def _check_hardening(self) -> None:
        for container in self._containers:
            user, is_read_only = self._compose.user_and_root(container)
            if user != _USER or not is_read_only:
                raise Failure(f"{container} runs as {user}, read-only root: {is_read_only}")

    def _wait_for_targets(self) -> int:
        """Until Prometheus scrapes every container of the profile; how many it scrapes."""
        own = {f"{self._compose.address(name)}:9400" for name in self._containers}

        def are_up() -> bool:
            targets = self._prometheus.targets()
            return own <= targets.keys() and all(targets.values())

        wait_for("every target is up", are_up, _PATIENCE_SECONDS)
        return len(own)

    # -- Faults ------------------------------------------------------------------------------------

    def _wait_for_updates(self, count: int) -> None:
        """Until so many more updates are there."""
        wanted = self._version() + count

        def are_there() -> bool:
            return self._version() >= wanted

        wait_for(f"{count} more updates", are_there, _PATIENCE_SECONDS)

    def _version(self) -> float:
        return self._prometheus.value("max(shardline_shard_version)")

    def _wait_for_workers(self, count: int) -> None:
        def are_there() -> bool:
            return self._prometheus.value("max(shardline_live_workers)") == count

        wait_for(f"{count} workers", are_there, _PATIENCE_SECONDS)

    def _evictions(self) -> float:
        return self._prometheus.value("sum(shardline_evictions_total)")

    def _lose_a_worker(self) -> None:
        say("docker kill worker-1")
        self._compose.kill("worker-1")
        self._wait_for_workers(1)
        self._wait_for_updates(10)
        self._compose.start("worker-1")
        self._wait_for_workers(2)
        self._wait_for_updates(10)
        self._faults.append("worker-1 killed")

    def _cut_a_worker_off(self) -> None:
        say("docker network disconnect worker-0")
        before = self._evictions()
        self._compose.cut_off("worker-0")
        self._evicted["worker-0"] += 1

        def is_evicted() -> bool:
            return self._evictions() > before

        wait_for("worker-0 is evicted", is_evicted, _PATIENCE_SECONDS)
        self._wait_for_updates(10)
        say("docker network connect worker-0")
        self._compose.reconnect("worker-0", alias="workers")
        self._wait_for_workers(2)
        self._wait_for_updates(10)
        self._faults.append("worker-0 cut off")

    def _preempt_a_worker(self) -> None:
        say("docker stop worker-1")
        self._compose.stop("worker-1")
        code = self._compose.state("worker-1")["ExitCode"]
        if code != _PREEMPTED:
            raise Failure(f"worker-1 ended with {code}, {_PREEMPTED} was expected")
        self._wait_for_updates(10)
        self._compose.start("worker-1")
        self._wait_for_workers(2)
        self._faults.append("worker-1 preempted")


def follow_the_guide(variables: Mapping[str, str]) -> str:
    """Type what docs/deploy.md tells people with an engine to type; what it came to."""
    say("following docs/deploy.md")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for text in commands(DEPLOY, "engine"):
                # Not over what whoever follows the guide here has got.
                elsewhere = text.replace("runs/compose", folder)
                run(["bash", "-euo", "pipefail", "-c", elsewhere], _TRAINING_SECONDS, variables)
            share = accuracy(Path(folder))
    finally:
        run([*docker_compose(), "--profile", "ps", "down", "--volumes"], 300, variables)
    say(f"docs/deploy.md: accuracy {share:.3f}")
    return f"docs/deploy.md for people with an engine: accuracy {share:.3f}"
