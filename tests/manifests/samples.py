"""A small set of objects for tests."""

from typing import Any

from tests.manifests.render import Document

LABELS = {"app": "shards"}


def config_map() -> Document:
    return {"kind": "ConfigMap", "metadata": {"name": "texts"}, "data": {"a.toml": "b = 1"}}


def claim() -> Document:
    return {"kind": "PersistentVolumeClaim", "metadata": {"name": "runs"}}


def service(name: str = "shards", **spec: object) -> Document:
    headless = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": LABELS}
    return {"kind": "Service", "metadata": {"name": name}, "spec": headless | spec}


def template(**container: object) -> dict[str, Any]:
    """Of a pod that says everything once; `container` replaces fields of its container."""
    return {
        "metadata": {"labels": LABELS},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 20,
            "securityContext": {"runAsUser": 7, "runAsGroup": 8, "fsGroup": 9},
            "containers": [_container() | container],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}},
                {"name": "tmp", "emptyDir": {"sizeLimit": "1Mi"}},
                {"name": "texts", "configMap": {"name": "texts"}},
            ],
        },
    }


def _container() -> dict[str, Any]:
    index = {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
    return {
        "name": "shard",
        "image": "shards:1",
        "command": ["serve"],
        "args": ["--index=$(INDEX)"],
        "env": [{"name": "INDEX", "valueFrom": index}],
        "resources": {"limits": {"memory": "1Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "readinessProbe": {"grpc": {"port": 70}, "periodSeconds": 3, "initialDelaySeconds": 1},
        "volumeMounts": [
            {"name": "runs", "mountPath": "/runs"},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - in a container
            {"name": "texts", "mountPath": "/etc/texts", "readOnly": True},
        ],
    }


def stateful_set(pod: dict[str, Any] | None = None) -> Document:
    spec = {"replicas": 2, "serviceName": "shards", "template": pod or template()}
    return {"kind": "StatefulSet", "metadata": {"name": "shard"}, "spec": spec}


def job(**spec: object) -> Document:
    counts = {"completionMode": "Indexed", "completions": 2, "parallelism": 2}
    rank = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    pod = template(args=["$(RANK)"], env=[{"name": "RANK", "valueFrom": {"fieldRef": rank}}])
    whole = counts | {"backoffLimitPerIndex": 2, "template": pod} | spec
    return {"kind": "Job", "metadata": {"name": "worker"}, "spec": whole}
