import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
from rich.console import Group

import ps_core
from ps_core.config import inherited_environment, load
from ps_core.settings import Config
from shardline import cli, launcher, status
from shardline.display import Screen
from shardline.local_plan import Launch
from shardline.ports import free_ports
from shardline.program import Program
from tests.shardline.stand_ins import environment


@pytest.fixture(autouse=True)
def _without_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ.keys() - inherited_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the launcher was asked to run."""
    asked: list[Launch] = []

    def run(launch: Launch, screen: Screen) -> int:
        asked.append(launch)
        return 7

    monkeypatch.setattr(launcher, "run", run)
    return asked


def refused(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_run_has_two_workers_and_one_shard_unless_told_otherwise(launches: list[Launch]) -> None:
    assert cli.main(["run", "train.py"]) == 7
    [launch] = launches
    assert (launch.num_workers, launch.num_shards) == (2, 1)
    assert launch.program == Program("train.py")


def test_a_module_takes_the_place_of_the_script(launches: list[Launch]) -> None:
    cli.main(["run", "--workers", "3", "-m", "package.train", "-m", "--shards", "4"])
    [launch] = launches
    assert (launch.num_workers, launch.num_shards, launch.job_name) == (3, 1, "train")
    assert launch.program == Program("package.train", ("-m", "--shards", "4"), is_module=True)


def test_options_before_the_script_are_ours_and_all_after_it_are_its_own(
    launches: list[Launch],
) -> None:
    own = ["--workers", "9", "-h", "--", "--seed", "1", "-x", "two words", "--mode=y"]
    cli.main(["run", "--workers", "3", "--shards", "2", "--seed", "5", "train.py", *own])
    [launch] = launches
    assert (launch.num_workers, launch.num_shards, launch.config.job.seed) == (3, 2, 5)
    assert launch.program == Program("train.py", tuple(own))


@pytest.mark.parametrize(
    ("text", "started", "allowed"), [("3", 3, 3), ("2:6", 2, 6), ("1:1", 1, 1)]
)
def test_workers_are_a_number_or_a_range(
    launches: list[Launch], text: str, started: int, allowed: int
) -> None:
    cli.main(["run", "--workers", text, "train.py"])
    [launch] = launches
    assert (launch.num_workers, launch.num_ranks) == (started, allowed)


def test_what_depends_on_the_number_of_workers_is_checked_against_it(
    launches: list[Launch], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--workers", "2:4", "--min-workers", "2", "train.py"]) == 7
    assert cli.main(["run", "--workers", "2:4", "--backup-workers", "3", "train.py"]) == 7
    assert cli.main(["run", "--workers", "2:4", "--min-workers", "3", "train.py"]) == 2
    assert "membership.min_workers = 3" in capsys.readouterr().err
    assert cli.main(["run", "--workers", "2", "--backup-workers", "2", "train.py"]) == 2
    assert "consistency.backup_workers = 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--backup-workers", "1"], "consistency.backup_workers", 1),
        (["--mode", "bounded", "--bound", "5"], "consistency.bound", 5),
        (["--mode", "async", "--staleness-scaling"], "consistency.staleness_scaling", True),
        (
            ["--mode", "async", "--delay-compensation", "0.5"],
            "consistency.delay_compensation",
            0.5,
        ),
        (["--mode", "local", "--local-steps", "20"], "consistency.local_steps", 20),
        (["--outer-lr", "0.5"], "consistency.outer_lr", 0.5),
        (["--outer-momentum", "0.5"], "consistency.outer_momentum", 0.5),
        (["--min-workers", "2"], "membership.min_workers", 2),
        (["--step-deadline", "30"], "membership.step_deadline_seconds", 30.0),
        (["--pause-timeout", "60"], "membership.pause_timeout_seconds", 60.0),
        (["--grace-seconds", "5"], "worker.grace_seconds", 5.0),
        (["--max-restarts", "0"], "launch.max_restarts", 0),
        (["--restart-window", "60"], "launch.restart_window_seconds", 60.0),
    ],
)
def test_every_flag_of_a_run_reaches_its_configuration(
    launches: list[Launch], flags: list[str], key: str, value: object
) -> None:
    cli.main(["run", *flags, "train.py"])
    assert attrgetter(key)(launches[0].config) == value


def test_flags_win_over_the_configuration_file(launches: list[Launch], tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("[job]\nseed = 3\n[consistency]\ndeterministic = true\n")
    flags = ["--seed", "4", "--threads", "2", "--run-dir", "out", "--nonfinite", "skip"]
    cli.main(["run", "--config", "job.toml", *flags, "train.py"])
    config = launches[0].config
    assert (config.job.seed, config.job.run_dir) == (4, "out")
    assert (config.worker.threads, config.worker.nonfinite) == (2, "skip")
    assert config.consistency.deterministic


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["run"], "required: SCRIPT"),
        (["run", "--workers", "2"], "required: SCRIPT"),
        (["run", "--workers", "0", "x.py"], "a worker runs SCRIPT"),
        (["run", "--workers", "-1", "x.py"], "-1 is not a count of at least 1"),
        (["run", "--workers", "two", "x.py"], "two is not a count of at least 1"),
        (["run", "--workers", "2:", "x.py"], "nothing is not a count of at least 1"),
        (["run", "--workers", ":2", "x.py"], "nothing is not a count of at least 1"),
        (["run", "--workers", "0:2", "x.py"], "0 is not a count of at least 1"),
        (["run", "--workers", "1:2:3", "x.py"], "2:3 is not a count of at least 1"),
        (["run", "--workers", "4:2", "x.py"], "4:2 starts more workers than it allows"),
        (["worker", "--join", "127.0.0.1:7000"], "required: SCRIPT"),
        (["run", "--shards", "0", "x.py"], "without any, use --strategy allreduce"),
        (["run", "--work", "2", "x.py"], "unknown option --work: did you mean --workers?"),
        (["run", "--shard", "2"], "shardline run: unknown option --shard: did you mean --shards?"),
        (["run", "--shard=2", "x.py"], "did you mean --shards? (see shardline run --help)"),
        (["run", "--xyzzy", "x.py"], "unknown option --xyzzy (see shardline run --help)"),
        (["worker", "--joni", "a:1", "x.py"], "did you mean --join? (see shardline worker"),
        (["status", "--watc"], "did you mean --watch? (see shardline status --help)"),
        (["--versoin", "run", "x.py"], "did you mean --version? (see shardline --help)"),
        (["statsu"], "invalid choice: 'statsu': did you mean status? (choose from run, worker,"),
        (["status", "--json", "--watch"], "not allowed with argument --json"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line_that_helps(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert "--help)" in captured.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "none.py"], "there is no script none.py"),
        (["run", "."], "there is no script ."),
        (["run", "-m", "train.py"], "there is no module train.py"),
        (["run", "--run-dir", "/dev/full", "train.py"], "cannot write to the run directory"),
        (["run", "--mode", "magic", "train.py"], "consistency.mode = 'magic'"),
        (["run", "--part-bytes", "100", "train.py"], "exchange.part_bytes"),
        (["run", "--config", "none.toml", "train.py"], "none.toml"),
        (["run", "--mode", "local", "--stages", "2", "train.py"], "trains in modes sync, bounded"),
        (["run", "--backup-workers", "1", "--stages", "2", "--workers", "4", "train.py"], "stages"),
        (
            [
                "run",
                "--stages",
                "2",
                "--schedule",
                "1f1b",
                "--microbatches",
                "1",
                "train.py",
            ],
            "schedule '1f1b' on 2 workers cannot run 1 microbatches: give 2",
        ),
        (["status"], "--shards HOST:PORT"),
        (["status", "--shards", "nowhere"], "'nowhere'"),
    ],
)
def test_what_cannot_work_ends_with_2_before_anything_is_started(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text("")
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_an_address_that_its_processes_would_refuse_is_refused_before_they_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SHARDLINE_SERVER_HOST", "0.0.0.0")  # noqa: S104  # refused
    (tmp_path / "train.py").touch()
    assert cli.main(["run", "train.py"]) == 2
    assert "0.0.0.0 is not a loopback address" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["run", "--help"], ["worker", "--help"], ["status", "--help"]):
        assert refused(*argv) == 0
        assert "\nexamples:\n  shardline " in capsys.readouterr().out


def test_the_version_is_that_of_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("--version") == 0
    assert capsys.readouterr().out == f"shardline {ps_core.__version__}\n"


def test_the_module_is_the_command_and_any_output_can_show_its_help() -> None:
    command = [sys.executable, "-m", "shardline", "run", "--help"]
    environ = environment() | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: shardline run [OPTION?] SCRIPT")


@pytest.fixture(scope="module")
def shard() -> Iterator[str]:
    """The address of a real shard that nobody has joined."""
    [port] = free_ports(1)
    address = f"127.0.0.1:{port}"
    settings = {"SHARDLINE_CLUSTER_SHARDS": address, "SHARDLINE_METRICS_PORT": "-1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ps_server"],
        env=environment() | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while status.exit_code(status.ask(load({"cluster.shards": address}, environ={}))):
            assert time.monotonic() < deadline
            assert process.poll() is None
        yield address
    finally:
        process.kill()
        process.wait(10)


def test_status_asks_real_shards(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--shards", shard]) == 0
    assert f"{shard}  " in capsys.readouterr().out
    [dead] = free_ports(1)
    assert cli.main(["status", "--json", "--shards", f"{shard},127.0.0.1:{dead}"]) == 3
    captured = capsys.readouterr()
    first, second = json.loads(captured.out)["shards"]
    assert (first["address"], first["phase"], first["workers"]) == (shard, "empty", [])
    assert second["address"] == f"127.0.0.1:{dead}"
    assert str(dead) in second["error"]


def test_status_takes_the_addresses_from_the_environment_too(
    shard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDLINE_CLUSTER_SHARDS", shard)
    assert cli.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"][0]["address"] == shard


def test_watching_goes_on_until_ctrl_c(
    shard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt_the_second(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    pauses: list[float] = []
    monkeypatch.setattr("shardline.cli.time.sleep", interrupt_the_second)
    assert cli.main(["status", "--watch", "--shards", shard]) == 0
    assert capsys.readouterr().out.count(shard) == 2


def test_watching_ends_when_the_job_that_was_seen_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(config: Config) -> status.Report:
        return status.Report({}, Group(f"look {len(pauses)}"), 0, jobs.pop(0))

    pauses: list[float] = []
    jobs = ["", "", "", "", "digits-1", "", "", "digits-1", "", "", "", "another"]
    monkeypatch.setattr(status, "report", report)
    monkeypatch.setattr("shardline.cli.time.sleep", pauses.append)
    assert cli.main(["status", "--watch", "--shards", "127.0.0.1:1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"look {number}" for number in range(11)),
        "job digits-1 is over: its processes are gone",
    ]


def test_status_imports_no_torch(shard: str) -> None:
    program = f"""
import sys
from shardline import cli
code = cli.main(["status", "--shards", "{shard}"])
assert not sys.modules.keys() & {{"torch", "numpy"}}
sys.exit(code)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_answer_that_cannot_be_written_is_an_error_in_one_line(shard: str) -> None:
    command = [sys.executable, "-m", "shardline", "status", "--json", "--shards", shard]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    assert done.returncode == 1
    assert done.stderr == "shardline status: cannot write the answer: No space left on device\n"
