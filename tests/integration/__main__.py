"""Run shardline in containers, as its users do, and break things.

    python -m tests.integration            everything; removes what it made

Needs a Docker engine (Debian's docker.io and docker-compose suffice; dockerd is started if it is
installed and does not run) and, where no registry can be reached, debootstrap and Debian's
prometheus. Ends with 0 when all that it checks holds.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.table import Table

from tests.integration.compose import Compose, composed
from tests.integration.engine import engine
from tests.integration.images import CLASSIC, build
from tests.integration.monitoring import Prometheus, Query, queries
from tests.integration.scenarios import Result, Scenario, follow_the_guide
from tests.integration.shell import ROOT, Failure, console, say, wait_for
from tests.manifests.render import K8S
from tests.manifests.run import run_overlay
from tests.processes import free_ports

IMAGE: Final = "shardline:integration"
PROMETHEUS_IMAGE: Final = "prom/prometheus:v3.5.0"
PROFILES: Final = {
    "ps": ("shard-0", "shard-1", "worker-0", "worker-1"),
    "allreduce": ("allreduce-0", "allreduce-1"),
    "pipeline": (
        *("pipeline-shard-0", "pipeline-shard-1"),
        *("pipeline-0", "pipeline-1", "pipeline-2", "pipeline-3"),
    ),
}


def main() -> int:
    """0 when all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    # So that what was made is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with engine():
            build(IMAGE, PROMETHEUS_IMAGE)
            results, panels = _run_compose()
            guide = follow_the_guide(_guide_variables())
            say("starting the pods of k8s/overlays/local")
            run_overlay(K8S / "overlays" / "local", IMAGE)
    except Failure as failure:
        console.print(f"[red]integration: FAILED[/red] {failure}", markup=True)
        return 1
    _summarise(results, panels)
    console.print(guide)
    return 0


def _guide_variables() -> Mapping[str, str]:
    """The guide's commands as they are; images and names are those of this run."""
    return {
        "COMPOSE_PROJECT_NAME": f"shardline-guide-{os.getpid()}",
        "IMAGE": IMAGE,
        "SHARDLINE_IMAGE": IMAGE,
        "WHEELHOUSE": "wheelhouse" if (ROOT / "wheelhouse").is_dir() else "",
        **CLASSIC,
    }


def _run_compose() -> tuple[list[Result], list[Query]]:
    with tempfile.TemporaryDirectory() as folder:
        (port,) = free_ports(1)
        variables = {
            "SHARDLINE_IMAGE": IMAGE,
            "PROMETHEUS_IMAGE": PROMETHEUS_IMAGE,
            "PROMETHEUS_PORT": str(port),
        }
        with composed(_lay_over(Path(folder)), variables) as compose:
            started = time.time()
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            results = _run_profiles(compose, prometheus)
            return results, _check_panels(prometheus, started)


def _run_profiles(compose: Compose, prometheus: Prometheus) -> list[Result]:
    compose.up("prometheus")
    wait_for("Prometheus answers", prometheus.is_up, seconds=60)
    scenarios = {
        name: Scenario(compose, prometheus, name, containers)
        for name, containers in PROFILES.items()
    }
    trained = scenarios["ps"].run(epochs=150, with_faults=True)
    say("starting shard-0 once more, without the run's parameters")
    compose.fails_with("shard-0", "tells of a run whose parameters this shard does not have")
    return [
        trained,
        scenarios["allreduce"].run(epochs=100),
        scenarios["pipeline"].run(epochs=30),
    ]


def _lay_over(folder: Path) -> Path:
    """A compose file that has Prometheus scrape more often."""
    text = (ROOT / "monitoring" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    configuration = folder / "prometheus.yml"
    configuration.write_text(text.replace(": 5s", ": 1s"), encoding="utf-8")
    configuration.chmod(0o644)
    folder.chmod(0o755)
    path = folder / "compose.yaml"
    path.write_text(
        "services:\n  prometheus:\n    volumes:\n"
        f"      - {configuration}:/etc/prometheus/prometheus.yml:ro\n",
        encoding="utf-8",
    )
    return path


def _check_panels(prometheus: Prometheus, started: float) -> list[Query]:
    """Every query of every panel has data over the union of the runs. Raises Failure."""
    asked = list(queries())
    now = time.time()
    empty = [each for each in asked if not prometheus.num_series(each.expression, started, now)]
    if empty or not asked:
        told = "\n".join(f"{each.dashboard} / {each.panel}: {each.expression}" for each in empty)
        raise Failure(f"{len(empty)} of {len(asked)} queries of panels return nothing:\n{told}")
    say(f"all {len(asked)} queries of panels return data")
    return asked


def _summarise(results: Sequence[Result], panels: Sequence[Query]) -> None:
    table = Table(title="integration", title_justify="left")
    for title in ("profile", "containers", "faults", "seconds", "accuracy", "samples", "targets"):
        table.add_column(title)
    for each in results:
        table.add_row(
            each.profile,
            str(len(each.containers)),
            ", ".join(each.faults) or "none",
            f"{each.seconds:.0f}",
            f"{each.accuracy:.3f}",
            each.samples,
            f"{each.num_targets} up",
        )
    console.print(table)
    dashboards = {each.dashboard for each in panels}
    console.print(f"{len(panels)} queries of {len(dashboards)} dashboards, all with data")


if __name__ == "__main__":
    sys.exit(main())
