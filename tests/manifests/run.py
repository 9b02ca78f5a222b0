"""Run the pods of an overlay as containers: train digits, and delete a worker on the way.

    python -m tests.manifests.run                                   k8s/overlays/local
    python -m tests.manifests.run --image shardline:test            with another image

Containers get what the rendered manifests say: names, environment, command, user, volumes, limits
and probes. Controllers are imitated as far as they start, start again and delete. Whatever was made
is removed in the end. Ends with 0 when all that it checks holds.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from ps_core.config import load
from tests.integration.engine import engine as docker
from tests.integration.results import accuracy, balance
from tests.integration.shell import Failure, console, say, wait_for
from tests.manifests.engine import Container, Engine, engine
from tests.manifests.job_rules import action, starts_again
from tests.manifests.pods import Pod, pods
from tests.manifests.render import K8S, Document, of_kind, render

_READY_SECONDS: Final = 120.0
_STEPS_SECONDS: Final = 120.0
_TRAIN_SECONDS: Final = 480.0
_STEPS_BEFORE_DELETION: Final = 30
_LAST_LINES: Final = 30


class Run:
    """The shards of a StatefulSet and the workers of a Job."""

    def __init__(self, engine: Engine, job: Document, all_pods: list[Pod]) -> None:
        self._engine = engine
        self._job = job
        self._shards = [engine.start(pod) for pod in all_pods if pod.owner.startswith("Stateful")]
        self._workers = {
            pod.index: engine.start(pod) for pod in all_pods if pod.owner.startswith("Job/")
        }
        self._num_failures: Counter[int] = Counter()

    def train(self) -> None:
        """From the first pod to the end of the Job, with a worker deleted on the way."""
        wait_for("every shard is ready", self._is_ready, _READY_SECONDS)
        say("every shard is ready")
        last = max(self._workers)
        wait_for(f"worker {last} trains", lambda: self._trains(last), _STEPS_SECONDS)
        self._replace(last, self._workers[last].delete())
        wait_for("the Job is complete", self._is_complete, _TRAIN_SECONDS)
        say("the Job is complete")

    def judge(self, folder: Path) -> None:
        """What the volume holds. `folder` is empty. Raises Failure."""
        self._look_at_shards()
        self._workers[0].copy("/runs", folder)
        share, sums = accuracy(folder), balance(folder)
        config = load(environ=self._workers[0].pod.environment).by_replica()
        if sums.joins <= config.cluster.num_workers:
            raise Failure("the worker in place of the deleted one never joined: train longer")
        say(f"accuracy {share:.3f}; {sums.samples_applied} samples, 0 lost, 0 repeated")

    def delete_shards(self) -> None:
        """As `kubectl delete` does. Raises Failure when one does not end well."""
        for shard in self._shards:
            if code := shard.delete():
                raise Failure(f"{shard.name} was told to end, and ended with {code}")

    def _is_ready(self) -> bool:
        self._look_at_shards()
        return all(shard.kubelet.is_ready for shard in self._shards)

    def _look_at_shards(self) -> None:
        """A StatefulSet would start a shard again that has ended, without its parameters."""
        for shard in self._shards:
            if shard.kubelet.failed:
                raise Failure(f"{shard.name} failed its {shard.kubelet.failed} probe")
            if (code := shard.exit_code()) is not None:
                raise Failure(f"{shard.name} ended with {code}")

    def _trains(self, index: int) -> bool:
        worker = self._workers[index]
        if (code := worker.exit_code()) is not None:
            raise Failure(f"{worker.name} ended with {code} before it could be deleted")
        return _num_steps(worker) >= _STEPS_BEFORE_DELETION

    def _is_complete(self) -> bool:
        self._look_at_shards()
        codes = {index: worker.exit_code() for index, worker in self._workers.items()}
        for index, code in codes.items():
            if code:
                self._replace(index, code)
        return all(code == 0 for code in codes.values())

    def _replace(self, index: int, code: int) -> None:
        name = self._workers[index].name
        if code == 0:
            raise Failure(f"{name} was complete before it was deleted: train longer")
        if not starts_again(self._job, code, self._num_failures[index]):
            raise Failure(f"{name} ended with {code}, and the Job with it")
        say(f"{name} ended with {code}: another takes its place")
        self._num_failures[index] += action(self._job, code) == "Count"
        self._workers[index] = self._engine.start(self._workers[index].pod)


def _num_steps(worker: Container) -> float:
    """Steps that it has finished, as it says at its port for metrics; 0 before it listens."""
    port = load(environ=worker.pod.environment).metrics.port
    connection = HTTPConnection(worker.address, port, timeout=5)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    except (OSError, HTTPException):
        return 0
    finally:
        connection.close()
    families = text_string_to_metric_families(text)
    samples = (sample for family in families for sample in family.samples)
    return sum(each.value for each in samples if each.name == "shardline_steps_total")


@contextmanager
def _logs_on_failure(engine: Engine) -> Iterator[None]:
    try:
        yield
    except Failure:
        for container in engine.containers:
            say(f"-- {container.name}")
            console.print(container.log(_LAST_LINES), markup=False)
        raise


def run_overlay(folder: Path, image: str) -> None:
    """Train digits on the overlay's pods. `image` takes the place of theirs. Raises Failure."""
    documents = render(folder)
    (job,) = of_kind(documents, "Job")
    all_pods = [replace(pod, image=image or pod.image) for pod in pods(documents)]
    with (
        tempfile.TemporaryDirectory() as results,
        engine(all_pods) as made,
        _logs_on_failure(made),
    ):
        run = Run(made, job, all_pods)
        run.train()
        run.judge(Path(results))
        run.delete_shards()


def main() -> int:
    """0 when all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=K8S / "overlays" / "local")
    parser.add_argument("--image", default="", help="instead of the overlay's")
    arguments = parser.parse_args()
    # So that what was made is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with docker():
            run_overlay(arguments.folder, arguments.image)
    except Failure as failure:
        console.print(f"manifests: FAILED {failure}", style="red", markup=False)
        return 1
    say("manifests: all well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
