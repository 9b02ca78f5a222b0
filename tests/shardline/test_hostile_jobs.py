"""Commands that ask a stranger: its answer reaches no environment and no terminal unchecked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import (  # type: ignore[attr-defined]  # it exports them without a list
    PrefixStore,
    TCPStore,
)

from allreduce.store import store_prefix
from ps_core.config import inherited_environment
from ps_core.listening import listen
from ps_core.v1 import shard_pb2
from shardline import cli
from tests.ps_worker.fake_shard import FakeShard
from tests.shardline.stand_ins import environment as process_environment

JOB = {
    "SHARDLINE_JOB_ID": "digits-1",
    "SHARDLINE_CLUSTER_NUM_WORKERS": "2",
    "SHARDLINE_CLUSTER_MAX_WORKERS": "4",
}
HOSTILE: list[dict[str, str]] = [
    {"PYTHONWARNINGS": "all:0:antigravity.x:0:0", "BROWSER": "/bin/sh -c 'touch owned'"},
    {"LD_PRELOAD": "/evil.so"},
    {"PATH": "/evil"},
    {"PYTHONPATH": "/evil"},
    {"OMP_NUM_THREADS": "1"},
    {"SHARDLINE_CONFIG": "/evil.toml"},
    {"SHARDLINE_CLUSTER_RANK": "0"},
    {"SHARDLINE_CLUSTER_SERVE_RENDEZVOUS": "true"},
    {"SHARDLINE_WORKER_DEVICE": "cpu"},
    {"SHARDLINE_METRICS_HOST": "10.0.0.4"},
    {"SHARDLINE_RPC_INSECURE": "true"},
    {"SHARDLINE_JOB_SEED": "x"},
    {"SHARDLINE_JOB_SEED": "-1"},
    {"SHARDLINE_CLUSTER_NUM_WORKERS": "0"},
    {"SHARDLINE_CONSISTENCY_MODE": "sync; reboot"},
    {"SHARDLINE_JOB_ID": "a\nLD_PRELOAD=/evil.so"},
    {"SHARDLINE_JOB_ID": "a\0b"},
    {"SHARDLINE_JOB_ID": "\x1b]0;owned\x07"},
    {"SHARDLINE_JOB_ID": "a" * 100_000},
    {"\x1b[2J": ""},
    {"": "1"},
]


@pytest.fixture(autouse=True)
def _without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - inherited_environment().keys():
        monkeypatch.delenv(name)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """It writes down its environment."""
    file = tmp_path / "train.py"
    file.write_text(
        "import json, os, sys\n"
        "with open(os.path.join(os.path.dirname(__file__), 'seen'), 'w') as file:\n"
        "    json.dump(dict(os.environ), file)\n"
    )
    return file


Ask = Callable[[Mapping[str, str]], AbstractContextManager[list[str]]]
"""Starts a process that says this of its job; the options with which a command asks it."""


@contextmanager
def coordinator(settings: Mapping[str, str]) -> Iterator[list[str]]:
    with FakeShard() as shard:
        shard.description = shard_pb2.DescribeResponse(
            phase=shard_pb2.PHASE_TRAINING, settings=settings
        )
        yield ["--join", shard.address]


@contextmanager
def store(settings: Mapping[str, str]) -> Iterator[list[str]]:
    listener = listen("127.0.0.1:0")
    host, port = listener.getsockname()
    root = TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    lines = (f"{name}={value}" for name, value in settings.items())
    PrefixStore(store_prefix(0), root).set("settings", "\n".join(lines))
    yield ["--rendezvous", f"{host}:{port}"]


@pytest.mark.parametrize("ask", [coordinator, store])
def test_the_worker_gets_known_and_checked_keys_beside_its_own_environment(
    ask: Ask, script: Path, tmp_path: Path
) -> None:
    given = {**process_environment(), "PATH": os.environ["PATH"]}
    with ask({**JOB, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}) as place:
        command = [sys.executable, "-m", "shardline", "worker", *place, str(script)]
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen").read_text())
    kind = "SHARDS" if ask is coordinator else "RENDEZVOUS"
    own = {
        f"SHARDLINE_CLUSTER_{kind}": place[1],
        "SHARDLINE_CLUSTER_RANK": seen["SHARDLINE_CLUSTER_RANK"],
    }
    seen.pop("LC_CTYPE", None)  # which Python itself may have set
    assert seen == {**given, **JOB, **own}


@pytest.mark.parametrize("ask", [coordinator, store])
def test_one_hostile_setting_is_enough_for_no_worker_to_start(
    ask: Ask, script: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(*arguments: object) -> None:
        raise AssertionError(f"it became {arguments}")

    monkeypatch.setattr(os, "execve", start)
    for hostile in HOSTILE:
        with ask(JOB | hostile) as place:
            code = cli.main(["worker", *place, str(script)])
        lines = capfd.readouterr().err.splitlines()  # gRPC may tell of the server's end, too
        [said] = (line for line in lines if line.startswith("shardline worker: "))
        assert (code, said.isprintable(), len(said) < 600) == (1, True, True), said
        assert place[1] in said
        assert any(key in said for name in hostile for key in (repr(name), _key(name))) or (
            "LD_PRELOAD" in said  # which in a store is a setting of its own
        )


def _key(variable: str) -> str:
    """`job.id` for SHARDLINE_JOB_ID."""
    return variable.removeprefix("SHARDLINE_").lower().replace("_", ".", 1)


def test_status_obeys_no_escape_of_a_shard(capfd: pytest.CaptureFixture[str]) -> None:
    escape = "\x1b]0;owned\x07\n"
    with FakeShard() as shard:
        shard.description = shard_pb2.DescribeResponse(
            phase=shard_pb2.PHASE_FAILED,
            reason=escape,
            job_id=escape,
            host=escape,
            settings={
                "SHARDLINE_PIPELINE_STAGES": "9" * 99,
                "SHARDLINE_JOB_RUN_DIR": escape,
                escape: "",
            },
            workers=[shard_pb2.WorkerStatus(host=escape, state=escape, verdict=escape)],
        )
        for option in ([], ["--json"]):
            assert cli.main(["status", "--shards", shard.address, *option]) == 0
    shown = capfd.readouterr().out
    assert "owned" in shown
    assert all(line.isprintable() for line in shown.splitlines())


@pytest.mark.parametrize("text", ["0 1 ab \x1b]0;owned\x07", "0 x ab cpu", "0", "\udcff"])
def test_status_obeys_no_escape_of_a_store(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with store(JOB) as place:
        host, port = place[1].split(":")
        root = TCPStore(host, int(port), is_master=False)
        workers = PrefixStore("workers", PrefixStore(store_prefix(0), root))
        value: Any = text.encode(errors="surrogateescape")
        workers.set("sealed/1", value)
        code = cli.main(["status", *place])
    shown = capfd.readouterr()
    assert (code, "owned" in shown.out) in ((0, True), (1, False))
    assert all(line.isprintable() for line in (shown.out + shown.err).splitlines())
