from typing import Any

import pytest

from tests.manifests.environment import expand, quantity, variables

METADATA = {"labels": {"a/b": "3"}, "annotations": {"c": "4"}}
MAPS = {"settings": {"A": "1", "B": "2"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("500m", 0.5), ("2", 2), ("64Mi", 67108864), ("1.5Gi", 1610612736), ("3k", 3000)],
)
def test_a_quantity_has_a_suffix(text: str, expected: float) -> None:
    assert quantity(text) == expected


@pytest.mark.parametrize("text", ["", "5 Mi", "5mi", "-1", "Gi"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        quantity(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("a$(X)b", "a7b"), ("$$(X)", "$(X)"), ("$X $", "$X $"), ("", "")]
)
def test_references_are_replaced_as_a_kubelet_does(text: str, expected: str) -> None:
    assert expand(text, {"X": "7"}) == expected


def test_a_reference_to_what_is_defined_later_is_refused() -> None:
    env = [{"name": "A", "value": "$(B)"}, {"name": "B", "value": "1"}]
    with pytest.raises(ValueError, match="refers to B"):
        variables({"env": env}, METADATA, {})


def test_own_variables_win_over_those_of_the_configmap_and_may_refer_to_them() -> None:
    container = {
        "envFrom": [{"configMapRef": {"name": "settings"}}],
        "env": [{"name": "B", "value": "$(A)0"}, {"name": "C", "value": "$(B)"}],
    }
    assert variables(container, METADATA, MAPS) == {"A": "1", "B": "10", "C": "10"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"fieldRef": {"fieldPath": "metadata.labels['a/b']"}}, "3"),
        ({"fieldRef": {"fieldPath": "metadata.annotations['c']"}}, "4"),
        ({"resourceFieldRef": {"resource": "requests.cpu"}}, "2"),
        ({"resourceFieldRef": {"resource": "limits.memory"}}, "1024"),
    ],
)
def test_a_variable_may_come_from_the_pod(source: dict[str, Any], expected: str) -> None:
    container = {
        "env": [{"name": "A", "valueFrom": source}],
        "resources": {"requests": {"cpu": "1500m"}, "limits": {"memory": "1Ki"}},
    }
    assert variables(container, METADATA, {}) == {"A": expected}


@pytest.mark.parametrize(
    "container",
    [
        {"envFrom": [{"configMapRef": {"name": "none"}}]},
        {"envFrom": [{"secretRef": {"name": "settings"}}]},
        {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]},
        {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['d']"}}}]},
        {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]},
    ],
)
def test_what_comes_from_nowhere_known_is_refused(container: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"none|secretRef|podIP|'d'|nowhere"):
        variables(container, METADATA, MAPS)
