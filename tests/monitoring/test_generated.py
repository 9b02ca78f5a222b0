"""What scripts/write_monitoring.py writes is what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts import write_monitoring
from tests.monitoring.files import ROOT, RULES, TIMEOUT_SECONDS


def test_the_files_are_those_that_the_code_writes() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "scripts.write_monitoring", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_what_is_missing_different_or_left_over_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_monitoring, "ROOT", tmp_path)
    folder = tmp_path / "monitoring/grafana/dashboards"
    folder.mkdir(parents=True)
    (folder / "changed.json").write_text("{}")
    (folder / "old.json").write_text("{}")
    (folder / "same.json").write_text("[]")
    wanted = {"changed": "[]", "new": "[]", "same": "[]"}
    files = {f"monitoring/grafana/dashboards/{name}.json": text for name, text in wanted.items()}
    assert sorted(write_monitoring.differences(files)) == [
        "monitoring/grafana/dashboards/changed.json: differs",
        "monitoring/grafana/dashboards/new.json: missing",
        "monitoring/grafana/dashboards/old.json: nothing makes it",
    ]


def test_the_resource_of_the_operator_has_the_groups_of_the_rule_files() -> None:
    resource = yaml.safe_load((ROOT / "monitoring/prometheus-rule.yaml").read_text("utf-8"))
    assert (resource["kind"], resource["metadata"]) == ("PrometheusRule", {"name": "shardline"})
    groups = [
        group for path in RULES for group in yaml.safe_load(path.read_text("utf-8"))["groups"]
    ]
    assert resource["spec"] == {"groups": groups}


def test_kubernetes_takes_every_dashboard() -> None:
    text = (ROOT / "monitoring/kustomization.yaml").read_text("utf-8")
    folder = yaml.safe_load(text)
    assert folder["resources"] == ["prometheus-rule.yaml"]
    assert folder["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}
    listed = [file for each in folder["configMapGenerator"] for file in each["files"]]
    there = (ROOT / "monitoring/grafana/dashboards").glob("*.json")
    assert sorted(listed) == sorted(f"grafana/dashboards/{path.name}" for path in there)
