"""From a list of panels to the JSON that Grafana reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

_DATASOURCE: Final = {"type": "prometheus", "uid": "$datasource"}
_TAG: Final = "shardline"
_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 2


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and what its series are called, with their labels in double braces."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph."""

    title: str
    meaning: str
    """Shown when the pointer rests on the title."""
    unit: str
    """Of the values, as Grafana names it."""
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "heatmap"] = "timeseries"
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """Panels, two in a row. Links and bookmarks name the `uid`, which therefore never changes."""

    uid: str
    title: str
    meaning: str
    panels: tuple[Panel, ...]


def render(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana reads it from a file."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.meaning,
        "tags": [_TAG],
        "schemaVersion": 41,
        "editable": False,
        "graphTooltip": 1,  # one cross-hair through all panels
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [_links()],
        "templating": {"list": _variables()},
        "panels": [_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }


def _links() -> dict[str, Any]:
    """To the other dashboards, with the same time and variables."""
    return {
        "title": "shardline",
        "type": "dashboards",
        "tags": [_TAG],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
        },
        _variable("job", "Job", "label_values(shardline_build_info, job)"),
        _choice("shard", "Shards", 'label_values(shardline_shard_version{job=~"$job"}, shard)'),
        _choice("worker", "Workers", 'label_values(shardline_steps_total{job=~"$job"}, worker)'),
    ]


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # when the time range changes: workers come and go
        "sort": 3,  # by number
    }


def _choice(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable of which several values can be chosen, at first all."""
    return _variable(name, label, query) | {
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    return {
        "id": number + 1,
        "title": panel.title,
        "description": panel.meaning,
        "type": panel.kind,
        "datasource": _DATASOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "targets": _targets(panel),
        **(_heatmap(panel) if panel.kind == "heatmap" else _lines(panel)),
    }


def _targets(panel: Panel) -> list[dict[str, Any]]:
    return [
        {
            "refId": chr(ord("A") + number),
            "datasource": _DATASOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "format": "heatmap" if panel.kind == "heatmap" else "time_series",
        }
        for number, query in enumerate(panel.queries)
    ]


def _lines(panel: Panel) -> dict[str, Any]:
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.is_stacked:
        custom |= {"fillOpacity": 40, "stacking": {"mode": "normal"}}
    return {
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "table", "placement": "right", "calcs": ["lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _heatmap(panel: Panel) -> dict[str, Any]:
    return {
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {
            "calculate": False,  # the buckets are the metric's own
            "yAxis": {"unit": panel.unit},
            "color": {"mode": "scheme", "scheme": "Blues"},
            "cellGap": 1,
            "tooltip": {"mode": "single"},
        },
    }
