"""Prometheus, asked over HTTP, and the queries of the dashboards."""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.integration.shell import ROOT, Failure

DASHBOARDS: Final = ROOT / "monitoring" / "grafana" / "dashboards"
_TIMEOUT_SECONDS: Final = 10.0
_VARIABLES: Final = {
    "$__rate_interval": "20s",
    "$__interval": "5s",
    "$__range": "5m",
    "$job": "shardline",
    "$shard": ".*",
    "$worker": ".*",
}


@dataclass(frozen=True, slots=True)
class Query:
    """What one panel asks for."""

    dashboard: str
    panel: str
    expression: str


class Prometheus:
    """One server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            self._get("query", query="1")
        except Failure:
            return False
        return True

    def value(self, expression: str) -> float:
        """The sum over all series, now; 0 if there are none."""
        result = self._get("query", query=expression)["result"]
        return sum(float(each["value"][1]) for each in result)

    def targets(self) -> dict[str, bool]:
        """Address → whether its last scrape went well."""
        active = self._get("targets", state="active")["activeTargets"]
        return {each["labels"]["instance"]: each["health"] == "up" for each in active}

    def num_series(self, expression: str, start: float, end: float) -> int:
        """How many series have had a number between two times: NaN is none."""
        answer = self._get("query_range", query=expression, start=start, end=end, step=5)
        return sum(
            any(math.isfinite(float(value)) for _, value in series["values"])
            for series in answer["result"]
        )

    def _get(self, what: str, **parameters: object) -> Any:  # noqa: ANN401 - JSON
        url = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310 - http
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise Failure(f"Prometheus refuses {parameters}: {told}") from error
        except OSError as error:
            raise Failure(f"Prometheus does not answer: {error}") from error


def queries(folder: Path = DASHBOARDS) -> Iterator[Query]:
    """Of every panel, with its variables replaced."""
    for path in sorted(folder.glob("*.json")):
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        for panel in _panels(dashboard):
            for target in panel.get("targets", []):
                expression = _replaced(target["expr"])
                yield Query(dashboard["title"], panel["title"], expression)


def _panels(of: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for panel in of.get("panels", []):
        yield panel
        yield from _panels(panel)  # a row that is folded holds its own


def _replaced(expression: str) -> str:
    for name, value in _VARIABLES.items():
        bare = re.escape(name.removeprefix("$"))
        expression = re.sub(rf"\${bare}\b|\${{{bare}}}", value, expression)
    return expression
