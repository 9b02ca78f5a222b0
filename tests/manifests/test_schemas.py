import copy

import pytest

from tests.manifests.render import Document
from tests.manifests.schemas import problems

SERVICE: Document = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "a"},
    "spec": {"clusterIP": "None", "ports": [{"name": "grpc", "port": 7000}]},
}
POD_MONITOR: Document = {
    "apiVersion": "monitoring.coreos.com/v1",
    "kind": "PodMonitor",
    "metadata": {"name": "a"},
    "spec": {
        "selector": {"matchLabels": {"a": "b"}},
        "podMetricsEndpoints": [
            {
                "port": "metrics",
                "interval": "15s",
                "relabelings": [{"sourceLabels": ["a_b"], "targetLabel": "c", "replacement": "$1"}],
            }
        ],
    },
}
RULE: Document = {
    "apiVersion": "monitoring.coreos.com/v1",
    "kind": "PrometheusRule",
    "metadata": {"name": "a"},
    "spec": {"groups": [{"name": "a", "rules": [{"alert": "A", "expr": "up == 0", "for": "1m"}]}]},
}


@pytest.mark.parametrize("document", [SERVICE, POD_MONITOR, RULE], ids=lambda each: each["kind"])
def test_a_valid_object_has_no_problem(document: Document) -> None:
    assert problems(document) == []


@pytest.mark.parametrize(
    ("document", "path", "value", "expected"),
    [
        (SERVICE, ("spec", "clusterIp"), "None", "clusterIp"),
        (SERVICE, ("spec", "ports"), [{"port": "7000"}], "'7000'"),
        (POD_MONITOR, ("spec", "selectors"), {}, "selectors"),
        (POD_MONITOR, ("spec", "podMetricsEndpoints"), [{"interval": "15 s"}], "'15 s'"),
        (
            POD_MONITOR,
            ("spec", "podMetricsEndpoints"),
            [{"relabelings": [{"sourceLabel": ["a_b"]}]}],
            "'sourceLabel'",
        ),
        (
            POD_MONITOR,
            ("spec", "podMetricsEndpoints"),
            [{"relabelings": [{"sourceLabels": ["a-b"]}]}],
            "'a-b'",
        ),
        (RULE, ("spec", "groups"), [{"rules": []}], "'name'"),
        (RULE, ("status",), {}, "status"),
        (SERVICE, ("kind",), "Servise", "Servise"),
        (SERVICE, ("apiVersion",), "example.com/v9", "Couldn't find schema"),
    ],
)
def test_a_problem_is_named(
    document: Document, path: tuple[str, ...], value: object, expected: str
) -> None:
    broken = copy.deepcopy(document)
    parent = broken
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    assert expected in "\n".join(problems(broken))
