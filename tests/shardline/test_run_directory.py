import json
import math
import os
import re
from importlib import metadata
from pathlib import Path

import pytest
from safetensors.torch import save_file

from ps_core.errors import ConfigError
from ps_core.settings import ClusterConfig, Config
from shardline import run_directory
from shardline.ledger import Balance
from shardline.local_plan import Launch
from shardline.processes import ProcessSpec
from shardline.program import Program
from shardline.progress import Totals
from shardline.run_directory import Outcome, RunDirectory, Running
from shardline.supervision import ProcessId

NAME = "digits"
NOW = 1795251662.7  # 2026-11-21 09:01:02.7 UTC


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_new_folder_is_named_after_time_and_script(tmp_path: Path) -> None:
    made = run_directory.create("", NAME, NOW)
    assert made.path == tmp_path / "runs" / "20261121T090102Z-digits"
    assert made.metrics.read_bytes() == b""


def test_runs_that_start_in_the_same_second_get_different_folders() -> None:
    names = {run_directory.create("", NAME, NOW).path.name for _ in range(3)}
    first = "20261121T090102Z-digits"
    assert names == {first, f"{first}-2", f"{first}-3"}


def test_a_given_folder_is_made_with_its_parents_or_used_as_it_is(tmp_path: Path) -> None:
    assert run_directory.create("a/b", NAME, NOW).path == tmp_path / "a" / "b"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert run_directory.create("mine", NAME, NOW).path == tmp_path / "mine"
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("name", ["cluster.json", "metrics.jsonl", "summary.json", "updates.jsonl"])
def test_a_folder_with_an_earlier_run_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / name).write_text("old")
    with pytest.raises(ConfigError, match=f"holds an earlier run .{name}.: choose another"):
        run_directory.create("old", NAME, NOW)
    assert [(each.name, each.read_text()) for each in (tmp_path / "old").iterdir()] == [
        (name, "old")
    ]


@pytest.mark.parametrize("given", ["/dev/full", "/dev/full/x", "/proc/x", "file", "file/x"])
def test_what_cannot_be_a_folder_is_refused(tmp_path: Path, given: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"cannot write to the run directory .*{given}"):
        run_directory.create(given, NAME, NOW)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        run_directory.create("locked", NAME, NOW)


def test_json_is_put_in_place_whole_or_not_at_all(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_json("x.json", {"a": 1, "loss": math.nan})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1, "loss": "NaN"}
    with pytest.raises(TypeError):
        directory.write_json("x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text())["a"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_json_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write to the run directory .*gone"):
        RunDirectory(tmp_path / "gone").write_json("x.json", {})


def test_cluster_json_says_who_takes_part() -> None:
    shard = ProcessSpec(ProcessId("shard", 0), ("s",), {}, "127.0.0.1:1", "http://x/metrics")
    worker = ProcessSpec(ProcessId("worker", 0), ("w",), {})
    processes = [Running(shard, 11), Running(worker, 12, num_restarts=2)]
    document = run_directory.cluster("digits-3f2a91", NOW, "127.0.0.1:29500", processes)
    assert document == {
        "job_id": "digits-3f2a91",
        "started": "2026-11-21T09:01:02.700+00:00",
        "rendezvous": "127.0.0.1:29500",
        "processes": [
            {
                "role": "shard",
                "index": 0,
                "pid": 11,
                "restarts": 0,
                "address": "127.0.0.1:1",
                "metrics_url": "http://x/metrics",
                "log": "shard-0.log",
            },
            {
                "role": "worker",
                "index": 0,
                "pid": 12,
                "restarts": 2,
                "address": None,
                "metrics_url": None,
                "log": "worker-0.log",
            },
        ],
    }


def test_summary_json_says_what_was_done_and_with_what() -> None:
    launch = Launch(Program(NAME), 2, Config(cluster=ClusterConfig(num_workers=4)))
    totals = Totals(12, 12, 384, 1000.5, 10, 20, {"accuracy": 0.98}, {"loss": 0.1})
    balance = Balance(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    document = run_directory.summary(launch, totals, balance, Outcome(12.3456, 1, 11, 12, "final"))
    versions = document.pop("versions")
    assert document == {
        "strategy": "parameter-server",
        "mode": "sync",
        "shards": 2,
        "workers": 4,
        "steps": 12,
        "version": 12,
        "wall_seconds": 12.346,
        "samples": 384,
        "samples_per_second": 1000.5,
        "pushed_bytes": 10,
        "pulled_bytes": 20,
        "restarts": 11,
        "preemptions": 12,
        "samples_lost": 1,
        "samples_repeated": 2,
        "samples_applied": 3,
        "samples_applied_in_part": 4,
        "samples_abandoned": 5,
        "updates_duplicated": 6,
        "passes": 7,
        "joins": 8,
        "evictions": 9,
        "malformed_ledger_lines": 10,
        "reported": {"accuracy": 0.98},
        "model": "final",
        "exit_code": 1,
    }
    assert isinstance(versions, dict)
    assert list(versions) == ["shardline", "torch", "grpc", "python"]
    assert versions["grpc"] == metadata.version("grpcio")
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())


def test_what_became_of_the_samples_is_read_from_the_folder(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.balance() == Balance()
    (tmp_path / "updates.jsonl").write_text(
        '{"kind":"pass","loader":0,"pass":0,"num_samples":10,"dropped":0}\n'
        '{"kind":"pass_end","loader":0,"pass":0,"abandoned":[[0,4]]}\n'
        '{"kind":"pass","loader":0,"pass":1,"num_sam'
    )
    assert directory.balance() == Balance(samples_lost=6, samples_abandoned=4, passes=1)


def test_the_log_of_a_process_goes_on_where_it_was(tmp_path: Path) -> None:
    spec = ProcessSpec(ProcessId("worker", 3), ("w",), {})
    for text in (b"first\n", b"second\n"):
        with RunDirectory(tmp_path).open_log(spec) as log:
            log.write(text)
    assert (tmp_path / "worker-3.log").read_text() == "first\nsecond\n"


def test_the_newest_model_is_found(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.model() is None
    for age, name in enumerate(["b.safetensors", "a.safetensors", "c.safetensors"]):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (100 - age, 100 - age))
    assert directory.model() == tmp_path / "b.safetensors"


def test_the_complete_model_comes_before_one_that_was_interrupted(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert (directory.model(), directory.model_state()) == (None, None)
    complete, rescued = tmp_path / "model.safetensors", tmp_path / "interrupted.safetensors"
    save_file({}, rescued, {"interrupted": "at version 17"})
    assert (directory.model(), directory.model_state()) == (rescued, "interrupted at version 17")
    save_file({}, complete)
    os.utime(complete, (1, 1))
    assert (directory.model(), directory.model_state()) == (complete, "final")


def test_what_dead_writers_have_left_is_removed(tmp_path: Path) -> None:
    for name in (".model.safetensors.0123", ".interrupted.safetensors.4567", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    RunDirectory(tmp_path).remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
