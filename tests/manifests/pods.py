"""Rendered manifests to the pods that their controllers make. Pure.

Whatever a pod says and nobody here understands is a ValueError: it is never passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Final

from tests.manifests.environment import expand, quantity, variables
from tests.manifests.render import Document, of_kind

INDEX_ANNOTATION: Final = "batch.kubernetes.io/job-completion-index"
INDEX_LABEL: Final = "apps.kubernetes.io/pod-index"

_SCHEDULING: Final = {"affinity", "tolerations", "topologySpreadConstraints"}
"""Says on which node a pod runs."""
_POD_FIELDS: Final = {
    *{"automountServiceAccountToken", "containers", "enableServiceLinks", "restartPolicy"},
    *{"securityContext", "serviceAccountName", "subdomain", "terminationGracePeriodSeconds"},
    *{"volumes", *_SCHEDULING},
}
_CONTAINER_FIELDS: Final = {
    *{"args", "command", "env", "envFrom", "image", "imagePullPolicy", "name", "ports"},
    *{"resources", "securityContext", "volumeMounts"},
    *{"livenessProbe", "readinessProbe", "startupProbe"},
}


@dataclass(frozen=True, slots=True)
class Claim:
    """A PersistentVolumeClaim."""

    name: str


@dataclass(frozen=True, slots=True)
class Scratch:
    """An emptyDir."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Files:
    """A ConfigMap, as files."""

    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume in the container."""

    path: str
    volume: Claim | Scratch | Files
    read_only: bool


@dataclass(frozen=True, slots=True)
class Probe:
    """A gRPC health check, with the defaults of Kubernetes."""

    port: int
    service: str = ""
    initial_delay_seconds: float = 0
    period_seconds: float = 10
    timeout_seconds: float = 1
    failure_threshold: int = 3
    success_threshold: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod of one container, with all that its controller and its kubelet add."""

    owner: str  # kind and name of the controller, such as Job/ps-worker
    index: int  # among the pods of its owner
    hostname: str
    names: tuple[str, ...]  # in DNS, as another pod of the namespace writes them
    image: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: tuple[Mount, ...]
    user: int
    group: int
    fs_group: int
    drops_all_capabilities: bool
    may_escalate: bool
    read_only_root: bool
    limits: Mapping[str, float]
    probes: Mapping[str, Probe]  # by startup, readiness and liveness
    grace_seconds: float  # between SIGTERM and SIGKILL


def pods(documents: Iterable[Document]) -> list[Pod]:
    """Every pod of every StatefulSet and Job. Raises ValueError."""
    return [pod for maker in [_Maker(list(documents))] for pod in maker.pods()]


class _Maker:
    """The controllers, with what a pod refers to."""

    def __init__(self, documents: list[Document]) -> None:
        self._documents = documents
        self._config_maps: dict[str, dict[str, str]] = {
            each["metadata"]["name"]: each["data"] for each in of_kind(documents, "ConfigMap")
        }
        self._claims = {
            each["metadata"]["name"] for each in of_kind(documents, "PersistentVolumeClaim")
        }

    def pods(self) -> Iterator[Pod]:
        for owner in of_kind(self._documents, "StatefulSet"):
            for index in range(owner["spec"]["replicas"]):
                subdomain = owner["spec"]["serviceName"]
                yield self._pod(owner, index, subdomain, {INDEX_LABEL: str(index)}, {})
        for owner in of_kind(self._documents, "Job"):
            spec = owner["spec"]
            if spec["completionMode"] != "Indexed" or spec["parallelism"] != spec["completions"]:
                raise ValueError("a Job must be indexed, and run all of its pods at a time")
            subdomain = spec["template"]["spec"].get("subdomain", "")
            for index in range(spec["completions"]):
                yield self._pod(owner, index, subdomain, {}, {INDEX_ANNOTATION: str(index)})

    def _pod(
        self,
        owner: Document,
        index: int,
        subdomain: str,
        labels: Mapping[str, str],
        annotations: Mapping[str, str],
    ) -> Pod:
        template, name = owner["spec"]["template"], owner["metadata"]["name"]
        hostname = f"{name}-{index}"
        metadata = {
            "labels": {**template["metadata"]["labels"], **labels},
            "annotations": {**template["metadata"].get("annotations", {}), **annotations},
        }
        spec = _checked(template["spec"])
        (container,) = spec["containers"]
        environment = variables(container, metadata, self._config_maps)
        words = [*container["command"], *container.get("args", [])]
        security = container["securityContext"]
        return Pod(
            owner=f"{owner['kind']}/{name}",
            index=index,
            hostname=hostname,
            names=tuple(self._names(metadata["labels"], hostname, subdomain)),
            image=container["image"],
            command=tuple(expand(word, environment) for word in words),
            environment=environment,
            mounts=tuple(self._mounts(spec, container)),
            user=spec["securityContext"]["runAsUser"],
            group=spec["securityContext"]["runAsGroup"],
            fs_group=spec["securityContext"]["fsGroup"],
            drops_all_capabilities=security.get("capabilities") == {"drop": ["ALL"]},
            may_escalate=security.get("allowPrivilegeEscalation", True),
            read_only_root=security.get("readOnlyRootFilesystem", False),
            limits={k: quantity(v) for k, v in container["resources"]["limits"].items()},
            probes=_probes(container),
            grace_seconds=spec["terminationGracePeriodSeconds"],
        )

    def _names(self, labels: Mapping[str, str], hostname: str, subdomain: str) -> Iterator[str]:
        for service in of_kind(self._documents, "Service"):
            spec, name = service["spec"], service["metadata"]["name"]
            if not spec["selector"].items() <= labels.items():
                continue
            if spec.get("clusterIP") != "None" or not spec.get("publishNotReadyAddresses"):
                raise ValueError(f"Service {name}: its pods have names only when they are ready")
            yield name
            if name == subdomain:
                yield f"{hostname}.{name}"

    def _mounts(self, spec: Document, container: Document) -> Iterator[Mount]:
        volumes = {volume["name"]: self._volume(volume) for volume in spec["volumes"]}
        for each in container["volumeMounts"]:
            _only(each, {"name", "mountPath", "readOnly"}, "a volumeMount")
            yield Mount(each["mountPath"], volumes[each["name"]], each.get("readOnly", False))

    def _volume(self, volume: Document) -> Claim | Scratch | Files:
        match volume:
            case {"persistentVolumeClaim": {"claimName": name}} if name in self._claims:
                return Claim(name)
            case {"emptyDir": {"sizeLimit": size}}:
                return Scratch(int(quantity(size)))
            case {"configMap": {"name": name}} if name in self._config_maps:
                return Files(self._config_maps[name])
        raise ValueError(f"a volume from nowhere known: {volume}")


def _checked(spec: Document) -> Document:
    """`spec`, if nothing in it is unknown here, or would add what no container here gets."""
    _only(spec, _POD_FIELDS, "a pod")
    if spec.get("automountServiceAccountToken", True) or spec.get("enableServiceLinks", True):
        raise ValueError("a pod must do without token and service links")
    security = {"fsGroup", "runAsGroup", "runAsNonRoot", "runAsUser", "seccompProfile"}
    _only(spec["securityContext"], security, "a pod's securityContext")
    for container in spec["containers"]:
        _only(container, _CONTAINER_FIELDS, "a container")
        known = {"allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"}
        _only(container["securityContext"], known, "a container's securityContext")
    return spec


def _only(mapping: Mapping[str, Any], known: Set[str], where: str) -> None:
    if unknown := mapping.keys() - known:
        raise ValueError(f"{where} has {', '.join(sorted(unknown))}: unknown here")


def _probes(container: Document) -> dict[str, Probe]:
    kinds = ("startup", "readiness", "liveness")
    return {
        kind: _probe(container[f"{kind}Probe"]) for kind in kinds if f"{kind}Probe" in container
    }


def _probe(document: Document) -> Probe:
    names = {
        "initialDelaySeconds": "initial_delay_seconds",
        "periodSeconds": "period_seconds",
        "timeoutSeconds": "timeout_seconds",
        "failureThreshold": "failure_threshold",
        "successThreshold": "success_threshold",
    }
    _only(document, {"grpc", *names}, "a probe")
    numbers = {names[key]: value for key, value in document.items() if key != "grpc"}
    return Probe(document["grpc"]["port"], document["grpc"].get("service", ""), **numbers)
