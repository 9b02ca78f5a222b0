"""What network policies let through. Pure, and only as far as the manifests use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.manifests.render import Document


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod, as a policy sees it: its labels, its namespace's, and its named ports."""

    labels: Mapping[str, str]
    namespace: Mapping[str, str] | None = None  # None: the one of the policies
    ports: Mapping[str, int] = field(default_factory=dict)


def allows(
    policies: Iterable[Document], source: Peer, target: Peer, port: int, protocol: str = "TCP"
) -> bool:
    """Whether `source` reaches `port` of `target`: both ends must allow it."""
    policies = list(policies)
    out = _is_open(policies, "Egress", source, target, target, port, protocol)
    return out and _is_open(policies, "Ingress", target, source, target, port, protocol)


def _is_open(
    policies: Iterable[Document],
    direction: str,
    own: Peer,
    other: Peer,
    target: Peer,
    port: int,
    protocol: str,
) -> bool:
    specs = [each["spec"] for each in policies]
    mine = [
        spec
        for spec in specs
        if own.namespace is None
        and direction in spec["policyTypes"]
        and _selects(spec["podSelector"], own.labels)
    ]
    rules = [rule for spec in mine for rule in spec.get(direction.lower(), [])]
    word = "to" if direction == "Egress" else "from"
    return not mine or any(
        any(_is_peer(peer, other) for peer in rule[word])
        and any(_is_port(each, target, port, protocol) for each in rule["ports"])
        for rule in rules
    )


def _is_peer(rule: Mapping[str, Any], peer: Peer) -> bool:
    if rule.keys() - {"podSelector", "namespaceSelector"}:
        raise ValueError(f"unknown here: {rule}")
    if "namespaceSelector" in rule:
        is_there = peer.namespace is not None
        in_namespace = is_there and _selects(rule["namespaceSelector"], peer.namespace or {})
    else:
        in_namespace = peer.namespace is None
    return in_namespace and _selects(rule["podSelector"], peer.labels)


def _is_port(rule: Mapping[str, Any], target: Peer, port: int, protocol: str) -> bool:
    named = rule.get("port", port)
    number = target.ports.get(named) if isinstance(named, str) else named
    return bool(rule["protocol"] == protocol and number == port)


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if selector.keys() - {"matchLabels", "matchExpressions"}:
        raise ValueError(f"unknown here: {selector}")
    for each in selector.get("matchExpressions", []):
        if each["operator"] != "In":
            raise ValueError(f"unknown here: {each}")
        if labels.get(each["key"]) not in each["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
