import os
import subprocess
import sys
from pathlib import Path

import pytest

from ps_core.config import inherited_environment, load, to_environment
from ps_core.errors import ConfigError, JobFailedError, MismatchError, ShardlineError
from ps_core.settings import Config
from ps_core.v1 import shard_pb2
from shardline.joining import described, environment
from shardline.ports import free_ports
from tests.shardline.stand_ins import environment as process_environment

SETTINGS = {
    "SHARDLINE_JOB_ID": "digits-1",
    "SHARDLINE_CLUSTER_SHARDS": "127.0.0.1:7000,127.0.0.1:7001",
    "SHARDLINE_CLUSTER_NUM_WORKERS": "2",
    "SHARDLINE_CLUSTER_MAX_WORKERS": "4",
    "SHARDLINE_CONSISTENCY_MODE": "async",
}
LEAD = "127.0.0.1:7000"


@pytest.fixture(autouse=True)
def _without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - inherited_environment().keys():
        monkeypatch.delenv(name)


def lead(
    settings: dict[str, str] = SETTINGS,
    phase: shard_pb2.Phase = shard_pb2.PHASE_TRAINING,
    **fields: object,
) -> shard_pb2.DescribeResponse:
    return shard_pb2.DescribeResponse(
        job_id="digits-1",
        phase=phase,
        settings=settings,
        **fields,  # type: ignore[arg-type]  # whatever a test gives
    )


def own(**flags: str) -> Config:
    keys = {name.replace("__", "."): text for name, text in flags.items()}
    return load({"cluster.shards": LEAD} | keys, environ={})


def test_a_new_worker_gets_the_settings_of_the_job() -> None:
    mine = described(lead(), own())
    assert to_environment(mine) == SETTINGS
    assert mine.consistency.mode == "async"


def test_what_is_its_own_comes_from_its_own_flags_and_the_rest_does_not() -> None:
    mine = own(
        worker__threads="3",
        worker__device="cpu",
        metrics__port="9100",
        rpc__insecure="true",
        job__id="another",
        job__run_dir="/mine",
        consistency__mode="local",
        cluster__num_workers="9",
    )
    variables = environment(described(lead(), mine))
    assert variables == inherited_environment() | SETTINGS | {
        "SHARDLINE_JOB_RUN_DIR": "/mine",
        "SHARDLINE_WORKER_THREADS": "3",
        "SHARDLINE_WORKER_DEVICE": "cpu",
        "SHARDLINE_METRICS_PORT": "9100",
        "SHARDLINE_RPC_INSECURE": "true",
        "OMP_NUM_THREADS": "3",
    }


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("127.0.0.1:7000", SETTINGS["SHARDLINE_CLUSTER_SHARDS"]),
        ("node:7000,node:7001", "node:7000,node:7001"),
    ],
)
def test_addresses_that_were_all_given_count_or_else_those_that_the_lead_knows(
    given: str, used: str
) -> None:
    mine = described(lead(), own(cluster__shards=given, rpc__insecure="true"))
    assert ",".join(mine.cluster.shards) == used


def test_some_of_the_addresses_are_not_enough() -> None:
    with pytest.raises(ConfigError, match="the job has 2 shards, and --join names 3"):
        described(lead(), own(cluster__shards="a:1,b:1,c:1"))


def test_a_lead_on_this_machine_does_not_send_a_worker_to_another_one_unasked() -> None:
    settings = SETTINGS | {"SHARDLINE_CLUSTER_SHARDS": "10.0.0.4:7000,10.0.0.5:7000"}
    with pytest.raises(ConfigError, match=r"10\.0\.0\.4 is not a loopback address"):
        described(lead(settings), own())


def test_one_worker_is_no_replica_of_a_model_that_is_split() -> None:
    settings = SETTINGS | {"SHARDLINE_PIPELINE_STAGES": "2"}
    with pytest.raises(MismatchError, match="takes 2 workers, and this would be one"):
        described(lead(settings), own())


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (lead(phase=shard_pb2.PHASE_COMPLETE), ShardlineError, "job digits-1 is complete"),
        (
            lead(phase=shard_pb2.PHASE_FAILED, reason="worker 0 died"),
            JobFailedError,
            "job digits-1 has failed: worker 0 died",
        ),
        (lead(shard=1), ConfigError, f"{LEAD} is shard 1: name shard 0 first"),
        (lead(settings={}, release="0.1.0"), MismatchError, f"{LEAD} runs 0.1.0, which cannot say"),
    ],
)
def test_what_cannot_be_joined_is_an_error_that_says_why(
    answer: shard_pb2.DescribeResponse, kind: type[ShardlineError], words: str
) -> None:
    with pytest.raises(ShardlineError, match=words) as refused:
        described(answer, own())
    assert type(refused.value) is kind


JOIN_WITH_A_STAND_IN = """
import sys
from ps_core.v1 import shard_pb2
from ps_worker import calls
from shardline import cli

def describe(address, config):
    print("asked", address, flush=True)
    return shard_pb2.DescribeResponse(settings=SETTINGS)

def reserve(address, config):
    return 3

calls.describe, calls.reserve = describe, reserve
sys.exit(cli.main(["worker", *sys.argv[1:]]))
"""
SCRIPT = """
import os, sys
print(os.getpid(), sys.argv[1:])
for name in sorted(os.environ):
    if "SHARDLINE" in name:
        print(name, os.environ[name])
sys.exit(75)
"""


def started(tmp_path: Path, *arguments: str, run_dir: Path) -> subprocess.Popen[str]:
    settings = SETTINGS | {"SHARDLINE_JOB_RUN_DIR": str(run_dir)}
    code = JOIN_WITH_A_STAND_IN.replace("SETTINGS", repr(settings))
    (tmp_path / "train.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=process_environment() | {"SHARDLINE_JOB_ID": "another", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_becomes_the_worker(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"job_id": "digits-1"}')
    arguments = ("--join", LEAD, "--threads", "2", "train.py", "--threads", "9")
    process = started(tmp_path, *arguments, run_dir=tmp_path)
    out, err = process.communicate(timeout=60)
    assert out.splitlines() == [
        f"asked {LEAD}",
        f"{process.pid} ['--threads', '9']",
        "SHARDLINE_CLUSTER_MAX_WORKERS 4",
        "SHARDLINE_CLUSTER_NUM_WORKERS 2",
        "SHARDLINE_CLUSTER_RANK 3",
        f"SHARDLINE_CLUSTER_SHARDS {SETTINGS['SHARDLINE_CLUSTER_SHARDS']}",
        "SHARDLINE_CONSISTENCY_MODE async",
        "SHARDLINE_JOB_ID digits-1",
        f"SHARDLINE_JOB_RUN_DIR {tmp_path}",
        "SHARDLINE_WORKER_THREADS 2",
    ]
    assert err == "shardline: joining the job as worker 3\n"
    assert process.returncode == 75


def test_the_command_becomes_a_worker_that_runs_a_module(tmp_path: Path) -> None:
    process = started(tmp_path, "--join", LEAD, "-m", "train", "-m", run_dir=tmp_path)
    out, _ = process.communicate(timeout=60)
    assert f"{process.pid} ['-m']" in out.splitlines()
    assert process.returncode == 75


@pytest.mark.parametrize("cluster", [None, '{"job_id": "digits-2"}', '["digits-1"]', "{"], ids=repr)
def test_a_folder_that_is_not_of_the_job_is_not_its_run_directory(
    tmp_path: Path, cluster: str | None
) -> None:
    if cluster is not None:
        (tmp_path / "cluster.json").write_text(cluster)
    mine = described(lead(SETTINGS | {"SHARDLINE_JOB_RUN_DIR": str(tmp_path)}), own())
    assert mine.job.run_dir == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("train.py",), 2, "--join HOST:PORT"),
        (("--join", LEAD, "none.py"), 2, "there is no script none.py"),
        (("--join", "10.0.0.4:7000", "train.py"), 2, "--insecure"),
        (("--join", LEAD), 2, "required: SCRIPT"),
    ],
)
def test_what_cannot_work_ends_before_anybody_is_asked(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    process = started(tmp_path, *arguments, run_dir=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_lead_that_does_not_answer_ends_the_command_with_3(tmp_path: Path) -> None:
    [port] = free_ports(1)
    (tmp_path / "train.py").write_text("")
    command = [sys.executable, "-m", "shardline", "worker", "--join", f"127.0.0.1:{port}"]
    done = subprocess.run(
        [*command, "train.py"],
        cwd=tmp_path,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert f"no answer from shard at 127.0.0.1:{port}" in done.stderr
