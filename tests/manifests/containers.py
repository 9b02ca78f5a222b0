"""A pod as the command that starts it as a container. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.manifests.pods import Claim, Files, Mount, Pod, Scratch


@dataclass(frozen=True, slots=True)
class Place:
    """What the containers of one run share."""

    network: str
    label: str  # marks all that is to be removed in the end
    folder: Path  # of the files of ConfigMaps

    def volume(self, claim: str) -> str:
        """The Docker volume that a claim is bound to."""
        return f"{self.network}-{claim}"

    def files(self, pod: Pod, mount: Mount) -> Path:
        """Where the files of one of its ConfigMaps lie on the host."""
        return self.folder / pod.hostname / mount.path.strip("/").replace("/", "-")


def docker_run(pod: Pod, name: str, place: Place) -> list[str]:
    """The command. Raises ValueError for a device, which only a node has."""
    entry, *arguments = pod.command
    return [
        *("docker", "run", "--detach", "--name", name, "--label", place.label),
        *("--network", place.network, "--hostname", pod.hostname),
        *(word for alias in pod.names for word in ("--network-alias", alias)),
        *_security(pod),
        *_limits(pod),
        *(word for mount in pod.mounts for word in _mount(pod, mount, place)),
        *(word for item in pod.environment.items() for word in ("--env", "=".join(item))),
        "--no-healthcheck",  # a kubelet knows none but its probes
        *("--entrypoint", entry, pod.image, *arguments),
    ]


def _security(pod: Pod) -> Iterator[str]:
    """Docker's default seccomp profile is RuntimeDefault already."""
    yield from ("--user", f"{pod.user}:{pod.group}", "--group-add", str(pod.fs_group))
    if pod.drops_all_capabilities:
        yield from ("--cap-drop", "ALL")
    if not pod.may_escalate:
        yield from ("--security-opt", "no-new-privileges")
    if pod.read_only_root:
        yield "--read-only"


def _limits(pod: Pod) -> tuple[str, ...]:
    if pod.limits.keys() != {"memory"}:
        raise ValueError(f"{pod.hostname}: no container here is given {', '.join(pod.limits)}")
    memory = str(int(pod.limits["memory"]))
    return ("--memory", memory, "--memory-swap", memory)


def _mount(pod: Pod, mount: Mount, place: Place) -> tuple[str, str]:
    end = ",readonly" if mount.read_only else ""
    match mount.volume:
        case Scratch(num_bytes):
            return "--tmpfs", f"{mount.path}:rw,exec,mode=1777,size={num_bytes}"
        case Claim(name):
            return "--mount", f"type=volume,source={place.volume(name)},target={mount.path}{end}"
        case Files():
            source = place.files(pod, mount)
            return "--mount", f"type=bind,source={source},target={mount.path},readonly"
