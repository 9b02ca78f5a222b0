from typing import Any

import pytest

from tests.manifests.pods import Claim, Files, Mount, Probe, Scratch, pods
from tests.manifests.samples import claim, config_map, job, service, stateful_set, template


def test_a_stateful_set_makes_pods_with_stable_names() -> None:
    found = pods([stateful_set(), service(), service("all"), claim(), config_map()])
    assert [pod.hostname for pod in found] == ["shard-0", "shard-1"]
    assert [pod.names for pod in found] == [
        ("shards", "shard-0.shards", "all"),
        ("shards", "shard-1.shards", "all"),
    ]
    assert [pod.command for pod in found] == [("serve", "--index=0"), ("serve", "--index=1")]
    assert found[1].environment == {"INDEX": "1"}
    assert {pod.owner for pod in found} == {"StatefulSet/shard"}


def test_an_indexed_job_makes_pods_by_rank() -> None:
    found = pods([job(), service(selector={"app": "other"}), claim(), config_map()])
    assert [pod.hostname for pod in found] == ["worker-0", "worker-1"]
    assert [pod.command for pod in found] == [("serve", "0"), ("serve", "1")]
    assert found[0].names == ()


def test_a_pod_is_what_its_template_says() -> None:
    pod, _ = pods([stateful_set(), claim(), config_map()])
    assert (pod.image, pod.user, pod.group, pod.fs_group) == ("shards:1", 7, 8, 9)
    assert (pod.drops_all_capabilities, pod.may_escalate, pod.read_only_root) == (True, False, True)
    assert (pod.limits, pod.grace_seconds) == ({"memory": 2**20}, 20)
    assert pod.probes == {"readiness": Probe(70, "", 1, 3, 1, 3, 1)}
    assert pod.mounts == (
        Mount("/runs", Claim("runs"), False),
        Mount("/tmp", Scratch(2**20), False),  # noqa: S108 - in a container
        Mount("/etc/texts", Files({"a.toml": "b = 1"}), True),
    )


def test_what_a_pod_does_not_say_is_as_kubernetes_has_it() -> None:
    pod, _ = pods([stateful_set(template(securityContext={})), claim(), config_map()])
    assert (pod.drops_all_capabilities, pod.may_escalate, pod.read_only_root) == (
        False,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ({"lifecycle": {}}, "lifecycle"),
        ({"securityContext": {"privileged": True}}, "privileged"),
        ({"livenessProbe": {"httpGet": {"port": 1}}}, "httpGet"),
        ({"volumeMounts": [{"name": "runs", "mountPath": "/a", "subPath": "b"}]}, "subPath"),
    ],
)
def test_a_container_with_something_unknown_is_refused(
    container: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        pods([stateful_set(template(**container)), claim(), config_map()])


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hostNetwork", True, "hostNetwork"),
        ("automountServiceAccountToken", True, "token"),
        ("enableServiceLinks", True, "links"),
        ("volumes", [{"name": "runs", "hostPath": {"path": "/"}}], "hostPath"),
        ("volumes", [{"name": "runs", "configMap": {"name": "none"}}], "none"),
    ],
)
def test_a_pod_with_something_unknown_is_refused(field: str, value: object, expected: str) -> None:
    pod = template()
    pod["spec"][field] = value
    with pytest.raises(ValueError, match=expected):
        pods([stateful_set(pod), claim(), config_map()])


def test_a_claim_that_nobody_defines_is_refused() -> None:
    with pytest.raises(ValueError, match="claimName"):
        pods([stateful_set(), config_map()])


@pytest.mark.parametrize("spec", [{"clusterIP": "10.0.0.1"}, {"publishNotReadyAddresses": False}])
def test_a_service_whose_names_come_late_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only when they are ready"):
        pods([stateful_set(), service(**spec), claim(), config_map()])


@pytest.mark.parametrize("spec", [{"completionMode": "NonIndexed"}, {"parallelism": 1}])
def test_a_job_that_is_not_all_there_at_a_time_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="indexed"):
        pods([job(**spec), claim(), config_map()])
