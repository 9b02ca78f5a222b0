from pathlib import Path
from signal import SIGINT, SIGKILL

import pytest

from ps_core.settings import ClusterConfig, Config
from shardline import report
from shardline.ledger import Balance
from shardline.local_plan import Launch
from shardline.program import Program
from shardline.progress import Totals
from shardline.restarts import Restarts
from shardline.run_directory import RunDirectory
from shardline.supervision import ProcessId, Supervisor

S0, W0, W1 = ProcessId("shard", 0), ProcessId("worker", 0), ProcessId("worker", 1)
TOTALS = Totals(12, 12, 384, 1000.5, 10, 20, {"accuracy": 0.98}, {"loss": 0.1})


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ending(run: Supervisor, last_lines: dict[ProcessId, list[str]] | None = None) -> str:
    return report.ending(run, 12.34, last_lines or {}, RunDirectory(Path.cwd() / "run"))


def supervisor(max_restarts: int = 0) -> Supervisor:
    """Of a job that trains."""
    run = Supervisor([S0, W0, W1], 1.0, Restarts(max_restarts, window_seconds=300))
    run.joined, run.has_trained = {0, 1}, True
    return run


@pytest.mark.parametrize(
    ("max_workers", "words"),
    [(0, "2 workers, 1 shard; "), (2, "2 workers, 1 shard; "), (6, "2 workers (up to 6), 1 ")],
)
def test_the_opening_says_how_many_take_part(max_workers: int, words: str) -> None:
    config = Config(cluster=ClusterConfig(num_workers=2, max_workers=max_workers))
    launch = Launch(Program("x.py"), 1, config)
    opening = report.opening(launch, "x-1", RunDirectory(Path.cwd() / "runs" / "x"))
    assert opening.startswith(f"x-1: {words}")
    assert opening.endswith("logs and results in runs/x")


def test_others_are_told_how_to_join_if_there_is_room() -> None:
    full, roomy = (
        Launch(Program("x.py", ("--name", "a b")), 1, Config(cluster=ClusterConfig((), 2, most)))
        for most in (2, 6)
    )
    assert report.invitation(full, "127.0.0.1:7000") == ""
    assert report.invitation(roomy, "127.0.0.1:7000") == (
        "to add a worker: shardline worker --join 127.0.0.1:7000 x.py --name 'a b'"
    )


def test_the_table_tells_what_became_of_samples_when_the_lead_handed_them_out() -> None:
    directory = RunDirectory(Path.cwd())
    name = "samples lost / repeated / in part"
    without = dict(report.rows(TOTALS, Balance(samples_lost=1), 1.0, directory))
    assert name not in without
    balance = Balance(samples_lost=0, samples_repeated=1200, samples_applied_in_part=32, passes=1)
    assert dict(report.rows(TOTALS, balance, 1.0, directory)) == {
        **without,
        name: "0 / 1,200 / 32",
    }


def test_a_run_that_went_well_needs_no_words() -> None:
    run = supervisor()
    for process in (W0, W1, S0):
        run.exited(process, 0, 0)
    assert ending(run) == ""


def test_the_end_of_a_run_names_who_failed_and_its_last_lines() -> None:
    run = supervisor()
    run.exited(W1, -SIGKILL, 0)
    run.exited(W0, 3, 1)
    assert ending(run, {W1: ["one", "two"], W0: ["lost it", ""]}) == (
        "shardline run: worker 1 was killed by SIGKILL (is the machine out of memory?) after "
        "12.3 s; its last lines (run/worker-1.log):\n"
        "    one\n"
        "    two\n"
        "worker 0 ended with exit code 3: lost it\n"
    )


def test_those_that_failed_alike_are_named_in_one_line() -> None:
    run = supervisor()
    for process in (W1, W0, S0):
        run.exited(process, 1, 0)
    lines = {W1: ["a", "NameError: x"], W0: ["NameError: x", ""], S0: ["no workers"]}
    assert ending(run, lines).splitlines()[1:] == [
        "    a",
        "    NameError: x",
        "shard 0 ended with exit code 1: no workers",
        "worker 0 ended in the same way",
    ]


def test_the_end_of_a_run_says_who_has_never_joined_and_how_it_would() -> None:
    run = supervisor()
    run.joined = {0}
    run.exited(W1, 0, 0)
    assert ending(run, {W1: ["hi"]}) == (
        "shardline run: worker 1 ended with exit code 0 and has never joined the job, which its "
        "script does with `shardline.connect()` and `session.optimizer(...)`, after 12.3 s; its "
        "last lines (run/worker-1.log):\n    hi\n"
    )


def test_the_end_of_a_run_says_how_many_restarts_did_not_help() -> None:
    run = supervisor(max_restarts=1)
    run.exited(W1, 1, 0)
    run.due(1)
    run.exited(W1, 1, 2)
    assert ending(run).splitlines()[0] == (
        "shardline run: worker 1 ended with exit code 1 after 12.3 s and 1 restart within 300 s "
        "(--max-restarts); its last lines (run/worker-1.log):"
    )


def test_an_interrupted_run_says_by_what() -> None:
    run = supervisor()
    run.interrupt(SIGINT, 0)
    assert ending(run) == "shardline run: interrupted by SIGINT after 12.3 s\n"
