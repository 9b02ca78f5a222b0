import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ps_core import __version__
from ps_core.config import load
from ps_core.settings import ClusterConfig, Config, MetricsConfig
from shardline.local_plan import Launch, plan
from shardline.processes import ProcessSpec
from shardline.program import Program

PORTS = (7000, 7001, 9000, 9001, 9002, 9003, 9004)


def planned(config: Config, num_cpus: int = 8) -> dict[str, ProcessSpec]:
    config = replace(config, cluster=replace(config.cluster, num_workers=3))
    launch = Launch(Program("train.py", ("--lr", "1")), num_shards=2, config=config)
    specs = plan(launch, "train-abc", Path("/runs/x"), PORTS, num_cpus)
    return {str(spec.id): spec for spec in specs}


def loaded(spec: ProcessSpec) -> Config:
    environ = {key: text for key, text in spec.environment.items() if key.startswith("SHARDLINE_")}
    return load(environ=environ)


def test_shards_come_first_and_each_has_its_address() -> None:
    specs = planned(Config())
    assert list(specs) == ["shard 0", "shard 1", "worker 0", "worker 1", "worker 2"]
    addresses = [spec.address for spec in specs.values()]
    assert addresses == ["127.0.0.1:7000", "127.0.0.1:7001", None, None, None]
    assert [loaded(spec).metrics.port for spec in specs.values()] == [9000, 9001, 9002, 9003, 9004]
    assert specs["worker 2"].metrics_url == "http://127.0.0.1:9004/metrics"


def test_each_process_loads_its_own_place_from_its_environment() -> None:
    specs = planned(Config())
    for spec in specs.values():
        config = loaded(spec)
        assert config.job.id == "train-abc"
        assert config.job.run_dir == "/runs/x"
        assert config.cluster.shards == ("127.0.0.1:7000", "127.0.0.1:7001")
        assert config.cluster.num_workers == 3
    assert loaded(specs["shard 1"]).server.index == 1
    assert loaded(specs["worker 2"]).cluster.rank == 2


def test_every_process_knows_how_many_workers_there_may_be() -> None:
    specs = planned(Config(cluster=ClusterConfig(num_workers=3, max_workers=5)))
    assert [name for name in specs if "worker" in name] == ["worker 0", "worker 1", "worker 2"]
    assert {loaded(spec).cluster.num_ranks for spec in specs.values()} == {5}


def test_workers_share_the_cpus_and_shards_need_one_thread() -> None:
    specs = planned(Config(), num_cpus=8)
    assert loaded(specs["worker 0"]).worker.threads == 2
    assert loaded(specs["shard 0"]).worker.threads == 1
    assert specs["worker 0"].environment["OMP_NUM_THREADS"] == "2"
    assert loaded(planned(Config(), num_cpus=2)["worker 0"]).worker.threads == 1


def test_threads_that_were_given_are_kept() -> None:
    specs = planned(load({"worker.threads": "5"}, environ={}))
    assert loaded(specs["worker 0"]).worker.threads == 5
    assert loaded(specs["shard 0"]).worker.threads == 1


def test_what_the_user_set_reaches_every_process() -> None:
    config = load({"job.seed": "7", "consistency.deterministic": "true"}, environ={})
    for spec in planned(config).values():
        assert loaded(spec).job.seed == 7
        assert loaded(spec).consistency.deterministic


def test_without_metrics_there_is_no_url() -> None:
    config = replace(Config(), metrics=MetricsConfig(port=-1))
    for spec in planned(config).values():
        assert spec.metrics_url is None
        assert loaded(spec).metrics.port == -1


def test_variables_of_the_launcher_itself_are_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHARDLINE_CLUSTER_RANK", "2")
    monkeypatch.setenv("PATH_OF_THE_USER", "kept")
    spec = planned(Config())["worker 0"]
    assert loaded(spec).cluster.rank == 0
    assert spec.environment["PATH_OF_THE_USER"] == "kept"


def test_shards_do_not_import_from_the_folder_that_they_are_started_in(tmp_path: Path) -> None:
    for name in ("grpc", "queue", "random", "torch"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    command = [*Launch(Program("x.py"), 1, Config()).shard_command, "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n"), done.stderr


def test_a_job_is_called_as_configured_or_else_like_the_script() -> None:
    launch = Launch(Program("a/train.py"), 1, Config())
    assert launch.job_name == "train"
    named = load({"job.id": "mine"}, environ={})
    assert replace(launch, config=named).job_name == "mine"


def test_sets_have_one_order_in_all_processes_unless_the_user_wants_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load({"job.seed": "7"}, environ={})
    assert planned(config)["worker 0"].environment["PYTHONHASHSEED"] == "7"
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    assert planned(config)["worker 1"].environment["PYTHONHASHSEED"] == "random"
