"""The dashboards, as Grafana reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.monitoring.files import dashboards
from tests.monitoring.promql import OF_EVERY_SERIES, declared, groupings, recorded, selectors

VARIABLES: Final = ["datasource", "job", "shard", "worker"]


def panels() -> Iterator[Any]:
    for dashboard in dashboards():
        for panel in dashboard["panels"]:
            yield pytest.param(panel, id=f"{dashboard['uid']}: {panel['title']}")


def queries() -> Iterator[Any]:
    for dashboard in dashboards():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                place = f"{dashboard['uid']}: {panel['title']}, {target['refId']}"
                yield pytest.param(target["expr"], id=place)


def test_uids_are_stable() -> None:
    """Links and bookmarks use them: they are written out here."""
    assert sorted(each["uid"] for each in dashboards()) == [
        "shardline-groups",
        "shardline-overview",
        "shardline-shards",
        "shardline-workers",
    ]


@pytest.mark.parametrize("dashboard", list(dashboards()), ids=lambda each: each["uid"])
def test_every_dashboard_has_the_same_variables_and_leads_to_the_others(
    dashboard: dict[str, Any],
) -> None:
    assert [each["name"] for each in dashboard["templating"]["list"]] == VARIABLES
    [link] = dashboard["links"]
    assert set(link["tags"]) <= set(dashboard["tags"])
    assert (link["includeVars"], link["keepTime"]) == (True, True)
    assert "id" not in dashboard  # a number of one Grafana


@pytest.mark.parametrize("dashboard", list(dashboards()), ids=lambda each: each["uid"])
def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [cell for panel in dashboard["panels"] for cell in covered(panel["gridPos"])]
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < 24 for x, _ in cells)


def covered(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


@pytest.mark.parametrize("panel", list(panels()))
def test_a_panel_asks_the_chosen_prometheus_and_says_what_it_shows(panel: dict[str, Any]) -> None:
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert all(each == {"type": "prometheus", "uid": "$datasource"} for each in sources)
    assert panel["description"].endswith(".")
    assert all(target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize("query", list(queries()))
def test_a_query_is_about_the_chosen_job_and_metrics_that_exist(query: str) -> None:
    known = declared() | recorded()
    used = selectors(query)
    assert used.keys() <= known.keys()
    for metric, labels in used.items():
        assert "job" in labels
        assert labels <= known[metric] | OF_EVERY_SERIES
    available = frozenset[str]().union(*(known[metric] for metric in used))
    assert groupings(query) <= available | OF_EVERY_SERIES
    assert query.count('job=~"$job"') >= len(used)
    assert "vector(0)" not in query


@pytest.mark.parametrize("dashboard", list(dashboards()), ids=lambda each: each["uid"])
def test_a_legend_names_labels_that_the_query_returns(dashboard: dict[str, Any]) -> None:
    known = declared() | recorded()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            labels = {part.split("}}")[0] for part in target["legendFormat"].split("{{")[1:]}
            by = groupings(target["expr"])
            [*metrics] = selectors(target["expr"])
            offered = by or known[metrics[0]] | OF_EVERY_SERIES
            assert labels <= offered, panel["title"]
