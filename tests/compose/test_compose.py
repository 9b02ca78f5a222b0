"""compose.yaml without an engine: its schema, what it tells processes, and how it confines them.
`make integration` runs it.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import yaml

from ps_core.config import load, split_address
from ps_core.settings import Config
from tests.documents import ROOT
from tests.tools import needed

COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
OURS: Final = sorted(name for name in SERVICES if SERVICES[name]["profiles"] != ["monitoring"])
SHARDS: Final = [name for name in OURS if "ps_server" in SERVICES[name]["command"]]
WORKERS: Final = [name for name in OURS if name not in SHARDS]
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text("utf-8")
PROMETHEUS: Final = yaml.safe_load(
    (ROOT / "monitoring" / "prometheus" / "prometheus.yml").read_text("utf-8")
)


def image_environment() -> dict[str, str]:
    """What the image sets of our variables."""
    return dict(re.findall(r"(SHARDLINE_\w+)=(\S+)", DOCKERFILE))


def configured(service: str) -> Config:
    """What its process is told. Raises ConfigError for a variable that nobody knows."""
    return load(environ=image_environment() | SERVICES[service]["environment"])


def test_shards_import_nothing_from_a_folder_that_workers_write_to() -> None:
    command = ["python", "-P", "-m", "ps_server"]
    assert SHARDS
    for service in SHARDS:
        assert SERVICES[service]["command"] == command
    for program in ("ps_server", "ps_server.probe"):
        assert f"CMD {json.dumps([*command[:-1], program])}" in DOCKERFILE


def test_it_is_what_the_specification_says() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text("utf-8"))
    jsonschema.validate(COMPOSE, schema, jsonschema.Draft201909Validator)


@pytest.mark.parametrize("change", [{"restarts": "always"}, {"read_only": "yes, please"}])
def test_the_schema_refuses_what_is_not_in_it(change: dict[str, str]) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text("utf-8"))
    wrong = COMPOSE | {"services": {"shard-0": SERVICES["shard-0"] | change}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema, jsonschema.Draft201909Validator)


def test_docker_compose_takes_it() -> None:
    profiles = [f"--profile={name}" for name in ("ps", "allreduce", "pipeline", "monitoring")]
    done = subprocess.run(
        [needed("docker-compose"), *profiles, "config", "--services"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(SERVICES)


@pytest.mark.parametrize("service", OURS)
def test_processes_are_confined(service: str) -> None:
    each = SERVICES[service]
    assert each["read_only"] is True
    assert each["cap_drop"] == ["ALL"]
    assert each["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in each, "nothing is published: connections are not encrypted"


def test_the_image_has_an_ordinary_user() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["65532:65532"]


def test_monitoring_is_published_on_loopback_only() -> None:
    ports = [port for name in ("prometheus", "grafana") for port in SERVICES[name]["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("service", OURS)
def test_every_process_is_told_what_it_understands(service: str) -> None:
    config = configured(service)
    assert config.job.run_dir == "/runs"
    assert f"{config.metrics.host}:{config.metrics.port}" == "0.0.0.0:9400"


@pytest.mark.parametrize("service", SHARDS)
def test_a_shard_is_where_the_others_look_for_it(service: str) -> None:
    config = configured(service)
    assert split_address(config.cluster.shards[config.server.index]) == (service, 7000)


@pytest.mark.parametrize("service", WORKERS)
def test_there_are_as_many_workers_as_they_are_told(service: str) -> None:
    profile = SERVICES[service]["profiles"]
    configs = [configured(name) for name in WORKERS if SERVICES[name]["profiles"] == profile]
    assert sorted(each.cluster.rank for each in configs) == list(range(len(configs)))
    assert configured(service).cluster.num_workers == len(configs)


@pytest.mark.parametrize("service", OURS)
def test_there_is_time_to_leave(service: str) -> None:
    config = configured(service)
    seconds = float(SERVICES[service]["stop_grace_period"].removesuffix("s"))
    assert seconds > config.worker.grace_seconds
    assert seconds > 2 * config.rpc.drain_seconds


def test_prometheus_looks_for_every_process() -> None:
    (scraped,) = PROMETHEUS["scrape_configs"]
    (found,) = scraped["dns_sd_configs"]
    aliases = {name: SERVICES[name]["networks"]["training"]["aliases"] for name in OURS}
    assert set(found["names"]) == {alias for (alias,) in aliases.values()}
    assert found["port"] == 9400


def test_grafana_finds_what_is_provisioned() -> None:
    folder = ROOT / "monitoring" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text("utf-8"))[
        "datasources"
    ]
    (provider,) = yaml.safe_load((folder / "dashboards" / "shardline.yaml").read_text("utf-8"))[
        "providers"
    ]
    assert source["url"] == "http://prometheus:9090"
    targets = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert targets == ["/etc/grafana/provisioning", provider["options"]["path"]]
