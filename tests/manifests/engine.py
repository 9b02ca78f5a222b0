"""Pods as containers on a Docker network of their own. Starts, stops and looks; decides nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from tests.integration.shell import run, say
from tests.manifests.containers import Place, docker_run
from tests.manifests.pods import Claim, Files, Pod
from tests.manifests.probes import Kubelet, serves

_LABEL: Final = "shardline-manifests"
_SLACK_SECONDS: Final = 30.0
"""What Docker may need on top of a pod's own grace."""


@dataclass(frozen=True, slots=True)
class Container:
    """A pod that was started."""

    pod: Pod
    name: str
    address: str
    kubelet: Kubelet

    def exit_code(self) -> int | None:
        """None: it runs."""
        template = "{{.State.Running}} {{.State.ExitCode}}"
        running, code = run(["docker", "inspect", "--format", template, self.name]).split()
        return None if running == "true" else int(code)

    def delete(self) -> int:
        """SIGTERM, and SIGKILL when its grace is over; its exit code. Blocks."""
        say(f"deleting {self.name}")
        self.kubelet.close()
        grace_seconds = self.pod.grace_seconds
        command = ["docker", "stop", "--time", str(int(grace_seconds)), self.name]
        run(command, grace_seconds + _SLACK_SECONDS)
        code = self.exit_code()
        assert code is not None, "docker stop returns when the container has ended"
        return code

    def log(self, num_lines: int) -> str:
        """The last lines of what it has written."""
        return run(["docker", "logs", "--tail", str(num_lines), self.name])

    def copy(self, path: str, folder: Path) -> None:
        """Copy what lies in its folder `path` to the host's `folder`."""
        run(["docker", "cp", f"{self.name}:{path}/.", str(folder)])


@dataclass(slots=True)
class Engine:
    """All containers of one run, in the order in which they were started."""

    place: Place
    containers: list[Container] = field(default_factory=list)

    def start(self, pod: Pod) -> Container:
        """Start a pod, once more if there was one before."""
        attempt = sum(each.pod.hostname == pod.hostname for each in self.containers)
        name = f"{self.place.network}-{pod.hostname}-{attempt}"
        self._write_files(pod)
        run(docker_run(pod, name, self.place))
        address = self._address(name)
        say(f"started {name} at {address}")
        kubelet = Kubelet(pod.probes, partial(serves, address))
        container = Container(pod, name, address, kubelet)
        self.containers.append(container)
        return container

    def _write_files(self, pod: Pod) -> None:
        for mount in pod.mounts:
            if isinstance(mount.volume, Files):
                folder = self.place.files(pod, mount)
                folder.mkdir(parents=True, exist_ok=True)
                for name, text in mount.volume.texts.items():
                    (folder / name).write_text(text, encoding="utf-8")

    def _address(self, name: str) -> str:
        template = f'{{{{(index .NetworkSettings.Networks "{self.place.network}").IPAddress}}}}'
        return run(["docker", "inspect", "--format", template, name]).strip()


@contextmanager
def engine(pods: Iterable[Pod]) -> Iterator[Engine]:
    """A network, a volume for each claim of `pods`, and in the end nothing of it any more."""
    claims = {
        mount.volume.name for pod in pods for mount in pod.mounts if isinstance(mount.volume, Claim)
    }
    name = f"{_LABEL}-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # pods have a user of their own
        made = Engine(Place(name, f"{_LABEL}={name}", Path(folder)))
        try:
            run(["docker", "network", "create", "--label", made.place.label, name])
            for claim in sorted(claims):
                volume = made.place.volume(claim)
                run(["docker", "volume", "create", "--label", made.place.label, volume])
            yield made
        finally:
            _remove(made)


def _remove(made: Engine) -> None:
    """Everything that carries the label."""
    say("removing containers, network and volumes")
    for container in made.containers:
        container.kubelet.close()
    kinds = {
        "container": (("ls", "--all", "--quiet"), ("rm", "--force", "--volumes")),
        "network": (("ls", "--quiet"), ("rm",)),
        "volume": (("ls", "--quiet"), ("rm", "--force")),
    }
    for kind, (find, remove) in kinds.items():
        found = run(["docker", kind, *find, "--filter", f"label={made.place.label}"]).split()
        if found:
            run(["docker", kind, *remove, *found])
