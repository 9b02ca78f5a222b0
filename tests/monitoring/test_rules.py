"""The alerts and recording rules, checked and tested by Prometheus' own tool."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.monitoring.files import ROOT, RULES, Rule, promtool, rules
from tests.monitoring.promql import OF_EVERY_SERIES, declared, groupings, recorded, selectors

FOLDER: Final = Path(__file__).parent
ALERTS: Final = [rule for rule in rules() if rule.alert]
RUNBOOK: Final = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")


def name(rule: Rule) -> str:
    return rule.alert or rule.record


def test_prometheus_takes_the_rules() -> None:
    promtool("check", "rules", *RULES)


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_the_rules_do_what_their_tests_say(path: Path) -> None:
    promtool("test", "rules", FOLDER / path.name)


def expectations() -> dict[str, set[bool]]:
    """Alert → whether its tests expect it, or expect nothing."""
    found: dict[str, set[bool]] = {}
    document = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))
    for test in document["tests"]:
        for each in test["alert_rule_test"]:
            found.setdefault(each["alertname"], set()).add(bool(each["exp_alerts"]))
    return found


def test_every_alert_fires_in_one_test_and_stays_quiet_in_another() -> None:
    assert expectations() == {rule.alert: {True, False} for rule in ALERTS}


def test_every_recording_is_tested() -> None:
    document = yaml.safe_load((FOLDER / "recording.yml").read_text(encoding="utf-8"))
    used = [each["expr"] for test in document["tests"] for each in test["promql_expr_test"]]
    assert {metric for query in used for metric in selectors(query)} == recorded().keys()


@pytest.mark.parametrize("rule", ALERTS, ids=name)
def test_an_alert_says_what_happens_and_where_to_read_on(rule: Rule) -> None:
    assert re.fullmatch(r"Shardline([A-Z][a-z]+)+", rule.alert)
    assert rule.labels["severity"] in ("critical", "warning")
    assert rule.annotations.keys() == {"summary", "description", "runbook_url"}
    assert all(text.endswith(".") for key, text in rule.annotations.items() if key != "runbook_url")
    # As GitHub names the anchor of a heading of one word.
    assert rule.annotations["runbook_url"] == f"docs/runbook.md#{rule.alert.lower()}"


def test_the_runbook_has_a_heading_for_every_alert_and_no_other() -> None:
    assert re.findall(r"^## (Shardline\w+)$", RUNBOOK, re.MULTILINE) == [r.alert for r in ALERTS]


@pytest.mark.parametrize("rule", list(rules()), ids=name)
def test_a_rule_uses_metrics_and_labels_that_exist(rule: Rule) -> None:
    known = declared() | recorded()
    used = selectors(rule.expr)
    assert used.keys() <= known.keys()
    labels = frozenset[str]().union(*(known[metric] for metric in used))
    assert groupings(rule.expr) <= labels | OF_EVERY_SERIES
