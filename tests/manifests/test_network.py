import pytest

from tests.manifests.network import Peer, allows
from tests.manifests.render import K8S, Document, of_kind, pod_templates
from tests.manifests.rendered import rendered


def _ours(name: str, component: str) -> dict[str, str]:
    labels = {"name": name, "component": component, "part-of": "shardline"}
    return {f"app.kubernetes.io/{key}": value for key, value in labels.items()}


SHARD = Peer(_ours("ps-server", "shard"), ports={"grpc": 7000, "metrics": 9400})
WORKER = Peer(_ours("ps-worker", "worker"), ports={"metrics": 9400, "rendezvous": 29400})
STRANGER = Peer({"app.kubernetes.io/name": "stranger"})
PROMETHEUS = Peer(
    {"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"}
)
IMPOSTOR = Peer({"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "other"})
DNS = Peer({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})


def policies(combination: str) -> list[Document]:
    return list(of_kind(rendered(K8S / "tests" / combination), "NetworkPolicy"))


def test_the_peers_here_are_the_pods_of_the_manifests() -> None:
    documents = rendered(K8S / "tests" / "network-policies")
    labels = [each["metadata"]["labels"] for each in pod_templates(documents)]
    assert [SHARD.labels, WORKER.labels] == labels or [WORKER.labels, SHARD.labels] == labels


@pytest.mark.parametrize(
    ("source", "target", "port", "protocol"),
    [
        (WORKER, SHARD, 7000, "TCP"),
        (SHARD, SHARD, 7000, "TCP"),
        (PROMETHEUS, SHARD, 9400, "TCP"),
        (PROMETHEUS, WORKER, 9400, "TCP"),
        (SHARD, DNS, 53, "UDP"),
        (WORKER, DNS, 53, "TCP"),
    ],
)
def test_what_a_job_needs_is_allowed(source: Peer, target: Peer, port: int, protocol: str) -> None:
    assert allows(policies("network-policies"), source, target, port, protocol)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (STRANGER, SHARD, 7000),
        (STRANGER, SHARD, 9400),
        (STRANGER, WORKER, 9400),
        (PROMETHEUS, SHARD, 7000),
        (IMPOSTOR, SHARD, 9400),
        (WORKER, SHARD, 9400),
        (SHARD, WORKER, 9400),
        (WORKER, WORKER, 29400),
        (WORKER, STRANGER, 443),
        (SHARD, STRANGER, 443),
        (WORKER, DNS, 443),
    ],
)
def test_nothing_else_is(source: Peer, target: Peer, port: int) -> None:
    assert not allows(policies("network-policies"), source, target, port)


@pytest.mark.parametrize("port", [29400, 40000])
def test_workers_that_meet_reach_all_ports_of_each_other(port: int) -> None:
    found = policies("allreduce-network-policies")
    assert allows(found, WORKER, WORKER, port)
    assert not allows(found, STRANGER, WORKER, port)
    assert not allows(found, WORKER, STRANGER, port)


def test_without_policies_everything_is_open() -> None:
    assert allows([], STRANGER, SHARD, 7000)
