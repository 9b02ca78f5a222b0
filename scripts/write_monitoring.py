"""Writes docs/metrics.md and what monitoring/ has in other words: dashboards as JSON, and the rules
as a PrometheusRule. With --check it writes nothing and fails where a file is not what it would be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from scripts.dashboards.groups import GROUPS
from scripts.dashboards.overview import OVERVIEW
from scripts.dashboards.panels import render
from scripts.dashboards.shards import SHARDS
from scripts.dashboards.workers import WORKERS
from scripts.metrics_page import metrics_page

ROOT: Final = Path(__file__).resolve().parent.parent
DASHBOARDS: Final = {
    "overview": OVERVIEW,
    "shards": SHARDS,
    "workers": WORKERS,
    "pipeline-and-allreduce": GROUPS,
}
_RULE_HEADER: Final = """\
# Written by `python -m scripts.write_monitoring` from monitoring/prometheus/rules.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: shardline
spec:
  groups:
"""

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--check", action="store_true", help="only compare")


def generated() -> dict[str, str]:
    """Path below the project → what belongs there."""
    dashboards = {
        f"monitoring/grafana/dashboards/{name}.json": json.dumps(render(each), indent=2) + "\n"
        for name, each in DASHBOARDS.items()
    }
    return dashboards | {
        "docs/metrics.md": metrics_page(),
        "monitoring/prometheus-rule.yaml": prometheus_rule(),
    }


def prometheus_rule() -> str:
    """All rule files as one resource for Prometheus' operator, as they are but for the indent."""
    lines: list[str] = []
    for path in sorted((ROOT / "monitoring/prometheus/rules").glob("*.yml")):
        head, found, groups = path.read_text(encoding="utf-8").partition("\ngroups:\n")
        assert found, f"{path} has no line `groups:`"
        assert all(line.startswith("#") for line in head.splitlines()), f"{path}: more than rules"
        lines += (f"  {line}".rstrip() for line in groups.splitlines())
    return _RULE_HEADER + "\n".join(lines) + "\n"


def differences(files: dict[str, str]) -> Iterator[str]:
    """One line for each file that is missing, left over or different."""
    for name, text in files.items():
        path = ROOT / name
        if not path.exists():
            yield f"{name}: missing"
        elif path.read_text(encoding="utf-8") != text:
            yield f"{name}: differs"
    for path in (ROOT / "monitoring/grafana/dashboards").iterdir():
        name = path.relative_to(ROOT).as_posix()
        if name not in files:
            yield f"{name}: nothing makes it"


def main() -> int:
    """Write or compare, and return the exit status."""
    files = generated()
    if not parser.parse_args().check:
        for name, text in files.items():
            (ROOT / name).write_text(text, encoding="utf-8")
        return 0
    lines = sorted(differences(files))
    for line in lines:
        print(line, file=sys.stderr)
    if lines:
        print("Run python -m scripts.write_monitoring", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
