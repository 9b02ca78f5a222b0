"""Which metrics and labels a query uses, and which there are."""

from __future__ import annotations

from functools import cache
from typing import Final

import promql_parser
from promql_parser import AggregateExpr, BinaryExpr, Expr, VectorSelector

from ps_core.group_metrics import AllReduceMetrics, PipelineMetrics
from ps_core.lead_metrics import LeadMetrics
from ps_core.metrics import REGISTRY, WorkerMetrics
from ps_core.shard_metrics import ShardMetrics
from tests.monitoring.files import rules

_NUMBER: Final = 9999
"""A rank and an index that no other test of this process counts under."""
OF_EVERY_SERIES: Final = {"namespace", "job", "instance"}
"""Labels that Prometheus adds; the first one where there are namespaces."""


@cache
def declared() -> dict[str, frozenset[str]]:
    """Series of all processes → the labels that they carry."""
    WorkerMetrics(_NUMBER, num_shards=1).logged_loss(0.0)
    shard = ShardMetrics(_NUMBER, "sync")
    shard.set_clock(_NUMBER, 0)
    shard.lag(_NUMBER, 0.0)
    LeadMetrics().no_straggler(_NUMBER)
    AllReduceMetrics(_NUMBER)
    PipelineMetrics(_NUMBER, [_NUMBER])
    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    return {sample.name: frozenset(sample.labels) for sample in samples}


def recorded() -> dict[str, frozenset[str]]:
    """Series that rules record → the labels that they carry, but for those of every series."""
    found = {}
    for rule in rules():
        if rule.record:
            level = set(rule.record.split(":")[0].split("_")) - OF_EVERY_SERIES
            found[rule.record] = frozenset(level | rule.labels.keys())
    return found


def selectors(query: str) -> dict[str, set[str]]:
    """Metric → the labels by which it is selected."""
    found: dict[str, set[str]] = {}
    for node in _nodes(query):
        if isinstance(node, VectorSelector):
            assert node.name, f"a selector names its metric: {query}"
            labels = {matcher.name for matcher in node.matchers.matchers}
            found.setdefault(node.name, set()).update(labels)
    return found


def groupings(query: str) -> set[str]:
    """All labels after `by`, `on` and `group_left`."""
    found: set[str] = set()
    for node in _nodes(query):
        if isinstance(node, AggregateExpr) and node.modifier:
            found.update(node.modifier.labels)
        if isinstance(node, BinaryExpr) and node.modifier:
            found.update(node.modifier.matching.labels if node.modifier.matching else ())
            found.update(node.modifier.group_labels or ())
    return found


def _nodes(query: str) -> list[Expr]:
    nodes: list[Expr] = []
    expr = promql_parser.parse(query.replace("$__rate_interval", "1m"))
    promql_parser.walk(expr, nodes.append)
    return nodes
