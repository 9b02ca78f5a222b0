"""What is read from monitoring/, and the tool that checks it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tests.tools import needed

ROOT: Final = Path(__file__).resolve().parents[2]
RULES: Final = sorted((ROOT / "monitoring/prometheus/rules").glob("*.yml"))
DASHBOARDS: Final = sorted((ROOT / "monitoring/grafana/dashboards").glob("*.json"))
TIMEOUT_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Rule:
    """One alert, or one recording."""

    file: str
    alert: str
    record: str
    expr: str
    labels: dict[str, str]
    annotations: dict[str, str]


def rules() -> Iterator[Rule]:
    for path in RULES:
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            for rule in group["rules"]:
                names = (rule.get("alert", ""), rule.get("record", ""))
                labels, annotations = rule.get("labels", {}), rule.get("annotations", {})
                yield Rule(path.name, *names, rule["expr"], labels, annotations)


def dashboards() -> Iterator[dict[str, Any]]:
    for path in DASHBOARDS:
        yield json.loads(path.read_text(encoding="utf-8"))


def promtool(*arguments: str | Path) -> None:
    """Run it; what it says is the failure."""
    run = subprocess.run(
        [needed("promtool"), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
