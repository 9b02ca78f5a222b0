"""compose.yaml, run for real: under a project name of its own, and removed afterwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.integration.shell import Failure, run, say, wait_for

ALL_PROFILES: Final = ("ps", "allreduce", "pipeline", "monitoring")
_UP_SECONDS: Final = 300.0


def docker_compose() -> list[str]:
    """Version 1, or 2 as docker's own command."""
    return ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]


class Compose:
    """The containers of one project."""

    def __init__(self, extra: Path, variables: Mapping[str, str]) -> None:
        """`extra` is a second compose file, laid over the project's own; the variables are for
        both.
        """
        self.project = f"shardline-test-{os.getpid()}"
        self._files = ["-f", "compose.yaml", "-f", str(extra)]
        self._variables = variables

    def fails_with(self, service: str, what: str) -> None:
        """Start a service that must refuse to run. Raises Failure when it does not say `what`."""
        self.up(service)
        wait_for(f"{service} ends", lambda: self.state(service)["Status"] == "exited", 60)
        if not self.state(service)["ExitCode"] or what not in self.last_lines(service):
            raise Failure(f"{service} did not refuse to run:\n{self.last_lines(service)}")

    def _compose(self, *words: str, seconds: float = 120, **variables: str) -> str:
        profiles = [word for name in ALL_PROFILES for word in ("--profile", name)]
        command = [*docker_compose(), *self._files, "-p", self.project, *profiles, *words]
        return run(command, seconds, {**self._variables, **variables})

    def up(self, *services: str, **variables: str) -> None:
        """Start services, with these variables besides."""
        say(f"starting {', '.join(services)}")
        self._compose("up", "-d", "--no-build", *services, seconds=_UP_SECONDS, **variables)

    def down(self) -> None:
        """Remove containers, networks and volumes."""
        self._compose("down", "--volumes", "--remove-orphans", "--timeout", "5", seconds=300)

    def id_of(self, service: str) -> str:
        """Of a service's only container, running or not."""
        ids = self._compose("ps", "-q", service).split()
        if len(ids) != 1:
            raise Failure(f"{service} has {len(ids)} containers, not 1")
        return ids[0]

    def state(self, service: str) -> Mapping[str, Any]:
        """What the engine knows of its container's process."""
        state: Mapping[str, Any] = self._inspect(service)["State"]
        return state

    def user_and_root(self, service: str) -> tuple[str, bool]:
        """Its user, and whether its root filesystem is read-only."""
        found = self._inspect(service)
        return found["Config"]["User"], found["HostConfig"]["ReadonlyRootfs"]

    def _inspect(self, service: str) -> Mapping[str, Any]:
        found: list[Mapping[str, Any]] = json.loads(run(["docker", "inspect", self.id_of(service)]))
        return found[0]

    def num_restarts(self, service: str) -> int:
        """How often the engine has started its container again by itself."""
        return int(self._inspect(service)["RestartCount"])

    def address(self, service: str) -> str:
        """Of its container on the network."""
        networks = self._inspect(service)["NetworkSettings"]["Networks"]
        address: str = next(iter(networks.values()))["IPAddress"]
        return address

    def kill(self, service: str) -> None:
        """SIGKILL, as when a machine is lost; nobody starts it again."""
        run(["docker", "kill", self.id_of(service)])

    def stop(self, service: str) -> None:
        """SIGTERM, as when a machine is wanted back."""
        run(["docker", "stop", self.id_of(service)], seconds=120)

    def start(self, service: str) -> None:
        """Start its container again, as an orchestrator would."""
        run(["docker", "start", self.id_of(service)])

    def cut_off(self, service: str) -> None:
        """Take its network away."""
        run(["docker", "network", "disconnect", f"{self.project}_training", self.id_of(service)])

    def reconnect(self, service: str, alias: str) -> None:
        """Give its network back."""
        names = ["--alias", service, "--alias", alias]
        network = f"{self.project}_training"
        run(["docker", "network", "connect", *names, network, self.id_of(service)])

    def wait_for_end(self, services: Sequence[str], seconds: float) -> None:
        """Until all have ended with 0. Raises Failure with the last lines of one that has not."""

        def have_ended() -> bool:
            return all(self._has_ended(service) for service in services)

        try:
            wait_for(f"{', '.join(services)} end", have_ended, seconds)
        except Failure as failure:
            last = {service: self.last_lines(service) for service in services}
            told = "\n".join(f"-- {service}\n{lines}" for service, lines in last.items())
            raise Failure(f"{failure}\n{told}") from failure

    def _has_ended(self, service: str) -> bool:
        state = self.state(service)
        return (state["Status"], state["ExitCode"]) == ("exited", 0)

    def last_lines(self, service: str) -> str:
        """What its container has said last."""
        return run(["docker", "logs", "--tail", "20", self.id_of(service)])

    def copy_results(self, service: str, target: Path) -> None:
        """The files of its volume /runs."""
        run(["docker", "cp", f"{self.id_of(service)}:/runs/.", str(target)])


@contextmanager
def composed(extra: Path, variables: Mapping[str, str]) -> Iterator[Compose]:
    """A project that is removed in the end, whatever happens."""
    compose = Compose(extra, variables)
    try:
        yield compose
    finally:
        say("removing containers, networks and volumes")
        compose.down()
