import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shardline.stand_ins import (
    SHARD,
    WAITING,
    Launched,
    environment,
    interrupt,
    is_running,
    launch,
    wait_until,
)

TRAINS = """
step(1, loss=0.5)
step(2, loss=0.25)
end(accuracy=0.75)
"""
ONCE = ("--max-restarts", "0")
# A worker that waits until the test has seen all of them.
READY = 'mark(f"worker-{rank}"); '


def ready(run: Launched, *names: str) -> None:
    for name in names:
        run.wait_for_file(name)


def test_a_run_ends_with_0_once_all_workers_have_and_leaves_its_results(tmp_path: Path) -> None:
    with launch(tmp_path, TRAINS, "--workers", "2", "--shards", "2") as run:
        code, out, err = run.end()
    assert (code, err) == (0, "")
    assert "accuracy" in out
    summary = run.json("summary.json")
    assert summary["steps"] == 2
    assert summary["samples"] == 128
    assert summary["pushed_bytes"] == 2000
    assert summary["pulled_bytes"] == 4000
    assert summary["reported"] == {"accuracy": 0.75}
    assert (summary["workers"], summary["shards"], summary["exit_code"]) == (2, 2, 0)
    assert (run.run_dir / "training.png").read_bytes().startswith(b"\x89PNG")


def test_lines_are_shown_with_the_name_of_their_process_and_kept_in_its_log(tmp_path: Path) -> None:
    worker = "print(f'I am {rank}'); print('to stderr', file=sys.stderr); end()"
    shard = "print('all quiet'); print('WARNING disk nearly full');" + "wait_for(num_ended)"
    with launch(tmp_path, worker, shard=shard) as run:
        _, out, _ = run.end()
    lines = out.splitlines()
    for line in (
        "[worker 0] I am 0",
        "[worker 1] I am 1",
        "[worker 1] to stderr",
        "[shard 0] WARNING disk nearly full",
    ):
        assert line in lines
    assert "all quiet" not in out
    assert (run.run_dir / "worker-1.log").read_text() == "I am 1\nto stderr\n"
    assert (run.run_dir / "shard-0.log").read_text() == "all quiet\nWARNING disk nearly full\n"


def test_the_script_gets_its_arguments_untouched(tmp_path: Path) -> None:
    after = ("--workers", "9", "-h", "--", "--run-dir=x", "two words", "--mode")
    worker = "print(json.dumps(sys.argv[1:])); end()"
    with launch(tmp_path, worker, "--workers", "1", after=after) as run:
        code, out, _ = run.end()
    assert code == 0
    assert f"[worker 0] {json.dumps(list(after))}" in out.splitlines()


TRY_PORTS = """
import socket
wait_for(lambda: os.path.exists(os.path.join(run_dir, "cluster.json")))
with open(os.path.join(run_dir, "cluster.json")) as file:
    cluster = json.load(file)
rendezvous = cluster["rendezvous"]
own = os.environ["SHARDLINE_METRICS_PORT"]
shards = [each["address"] for each in cluster["processes"] if each["role"] == "shard"]
for address in [*shards, rendezvous, "127.0.0.1:" + own]:
    try:
        socket.create_server(("127.0.0.1", int(address.rpartition(":")[2])))
        print("taken:", address)
    except OSError:
        print("held")
port = int(rendezvous.rpartition(":")[2])
socket.create_connection(("127.0.0.1", port), timeout=30).close()
try:
    socket.create_connection(("127.0.0.2", port), timeout=30)
    print("beyond", rendezvous)
except OSError:
    print("nowhere else")
end()
"""


def test_ports_are_held_until_they_are_used_and_the_rendezvous_is_for_this_machine(
    tmp_path: Path,
) -> None:
    options = ("--workers", "2", "--shards", "2", "--stages", "2")
    with launch(tmp_path, TRY_PORTS, *options) as run:
        code, _, err = run.end()
    assert code == 0, err
    for rank in (0, 1):
        log = (run.run_dir / f"worker-{rank}.log").read_text()
        assert log.split("\n") == ["held"] * 4 + ["nowhere else", ""]


def test_every_process_gets_its_own_place_ports_and_threads(tmp_path: Path) -> None:
    told = "print('ERROR' + json.dumps({k: v for k, v in os.environ.items() if 'SHARDLINE' in k"
    told += " or k == 'OMP_NUM_THREADS'}), flush=True); "
    arguments = ("--workers", "2", "--shards", "2", "--threads", "3", "--seed", "7")
    shard = told + "wait_for(lambda: num_ended() == 2)"
    with launch(tmp_path, told + "end()", *arguments, shard=shard) as run:
        run.end()
    heard = {
        log.stem: json.loads(log.read_text().splitlines()[0].removeprefix("ERROR"))
        for log in run.run_dir.glob("*.log")
    }
    cluster = run.json("cluster.json")
    shards = [each for each in cluster["processes"] if each["role"] == "shard"]
    addresses = ",".join(shard["address"] for shard in shards)
    for variables in heard.values():
        assert variables["SHARDLINE_CLUSTER_SHARDS"] == addresses
        assert variables["SHARDLINE_CLUSTER_NUM_WORKERS"] == "2"
        assert variables["SHARDLINE_JOB_ID"] == cluster["job_id"]
        assert variables["SHARDLINE_JOB_SEED"] == "7"
        assert variables["SHARDLINE_JOB_RUN_DIR"] == str(run.run_dir)
    assert heard["shard-1"]["SHARDLINE_SERVER_INDEX"] == "1"
    assert heard["worker-1"]["SHARDLINE_CLUSTER_RANK"] == "1"
    assert heard["worker-0"]["OMP_NUM_THREADS"] == heard["worker-0"]["SHARDLINE_WORKER_THREADS"]
    assert [heard[f"{role}-0"]["OMP_NUM_THREADS"] for role in ("shard", "worker")] == ["1", "3"]
    ports = {variables["SHARDLINE_METRICS_PORT"] for variables in heard.values()}
    assert len(ports | {address.split(":")[1] for address in addresses.split(",")}) == 6
    assert cluster["job_id"].startswith("train-")


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("print('the reason'); sys.exit(1)", 1, "worker 1 ended with exit code 1"),
        ("print('the reason'); sys.exit(3)", 3, "worker 1 ended with exit code 3"),
        (
            "print('the reason', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
            1,
            "worker 1 was killed by SIGKILL (is the machine out of memory?)",
        ),
    ],
)
def test_a_worker_that_fails_ends_the_run_and_is_named(
    tmp_path: Path, end: str, code: int, words: str
) -> None:
    worker = f"if rank != 1:\n {WAITING}\nprint('before')\n{end}"
    with launch(tmp_path, worker, "--workers", "3", *ONCE, shard=WAITING) as run:
        got, _, err = run.end()
    assert got == code
    assert f"shardline run: {words}" in err
    assert "    before\n    the reason\n" in err
    assert "worker 0" not in err
    assert run.json("summary.json")["exit_code"] == code


def test_the_others_may_say_themselves_what_they_noticed(tmp_path: Path) -> None:
    notices = """
wait_for(lambda: marked("pid"))
wait_for(lambda: not os.path.exists("/proc/" + open(os.path.join(run_dir, "pid")).read()))
sys.exit('lost the other one')
"""
    worker = f"""
if rank == 1:
    with open(os.path.join(run_dir, "part"), "w") as file:
        file.write(str(os.getpid()))
    os.rename(os.path.join(run_dir, "part"), os.path.join(run_dir, "pid"))
    raise ValueError("a bad batch")
{notices}
"""
    with launch(tmp_path, worker, *ONCE, shard=notices, reconnect_seconds=20) as run:
        code, _, err = run.end()
    assert code == 1
    assert "ValueError: a bad batch" in err
    assert "worker 0 ended with exit code 1: lost the other one" in err


def test_who_neither_notices_nor_listens_is_killed(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); mark('deaf'); " + WAITING
    worker = f"step()\nif rank == 0:\n {deaf}\nwait_for(lambda: marked('deaf'))\nsys.exit(5)"
    with launch(tmp_path, worker, *ONCE, shard=WAITING) as run:
        code, out, err = run.end()
    assert code == 1
    assert "worker 1 ended with exit code 5" in err
    assert "shard 0, worker 0 still there 0.6 s after worker 1 ended with exit code 5" in out
    assert "worker 0 did not end within 1.3 s: sending SIGKILL" in out


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("sys.exit(1)", 1, "shard 0 ended with exit code 1"),
        ("sys.exit(3)", 3, "shard 0 ended with exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1, "shard 0 was killed by SIGSEGV"),
        ("sys.exit(0)", 1, "shard 0 ended with exit code 0 before the workers"),
    ],
)
def test_a_shard_that_is_gone_too_early_ends_the_run_and_is_named(
    tmp_path: Path, end: str, code: int, words: str
) -> None:
    shard = f"if index == 1:\n {WAITING}\n{end}"
    with launch(tmp_path, WAITING, "--shards", "2", shard=shard) as run:
        got, _, err = run.end()
    assert got == code
    assert f"shardline run: {words}" in err
    assert "(it wrote nothing)" in err


def test_a_worker_that_is_killed_is_started_again(tmp_path: Path) -> None:
    worker = """
count = num_starts()
print("start", count, sys.argv[1:], rank, flush=True)
step(count)
if rank == 1 and count == 1:
    os.kill(os.getpid(), signal.SIGKILL)
end(rank=rank)
"""
    with launch(tmp_path, worker, after=("--lr", "1")) as run:
        code, out, err = run.end()
    assert (code, err) == (0, "")
    note = "worker 1 was killed by SIGKILL: starting it again (1 of 3 restarts in 300 s)"
    assert note in out.splitlines()
    lines = [f"start {count} ['--lr', '1'] 1" for count in (1, 2)]
    assert (run.run_dir / "worker-1.log").read_text().splitlines() == lines
    summary = run.json("summary.json")
    assert (summary["restarts"], summary["preemptions"]) == (1, 0)
    assert summary["samples"] == 3 * 64  # of three processes
    processes = run.json("cluster.json")["processes"]
    assert [process["restarts"] for process in processes] == [0, 0, 1]


def test_a_worker_that_keeps_failing_ends_the_run_with_the_number_of_its_restarts(
    tmp_path: Path,
) -> None:
    worker = f"step()\nif rank == 0:\n {WAITING}\nprint('try', num_starts())\nsys.exit(4)"
    flags = ("--max-restarts", "2", "--restart-window", "60")
    with launch(tmp_path, worker, *flags, shard=WAITING) as run:
        code, out, err = run.end()
    assert code == 1
    for count in (1, 2):
        assert f"starting it again ({count} of 2 restarts in 60 s)" in out
    assert "shardline run: worker 1 ended with exit code 4 after " in err
    assert "and 2 restarts within 60 s (--max-restarts); its last lines" in err
    assert "    try 3\n" in err
    assert run.json("summary.json")["restarts"] == 2


def test_a_preempted_worker_is_replaced_and_that_does_not_count(tmp_path: Path) -> None:
    worker = """
if rank == 1 and num_starts() <= 2:
    sys.exit(75)
end()
"""
    with launch(tmp_path, worker, *ONCE) as run:
        code, out, err = run.end()
    assert (code, err) == (0, "")
    assert out.count("worker 1 was preempted: starting it again") == 2
    summary = run.json("summary.json")
    assert (summary["restarts"], summary["preemptions"]) == (0, 2)


NAME_ERROR = "NameError: name 'mistake' is not defined"


@pytest.mark.parametrize("arguments", [(), ("--workers", "1")])
def test_a_script_that_fails_at_once_fails_once_and_says_so_once(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    worker = "num_starts(); print('before', flush=True)\nmistake"
    with launch(tmp_path, worker, *arguments, shard=WAITING) as run:
        code, out, err = run.end()
    assert code == 1
    assert "[worker 0] before" in out
    assert err.count("Traceback") == err.count(NAME_ERROR) == 1
    assert (arguments != ()) or "ended in the same way" in err
    assert "Traceback" not in out
    assert (run.run_dir / "starts-0").read_text() == "x"


def test_a_script_that_never_joins_has_failed_and_the_others_do_not_wait_for_it(
    tmp_path: Path,
) -> None:
    worker = f"if rank == 0:\n record('join')\n {WAITING}\nprint('hi')"
    with launch(tmp_path, worker, shard=WAITING) as run:
        code, out, err = run.end()
    assert code == 1
    assert "worker 1 ended with exit code 0 and has never joined the job" in err
    assert "shard 0, worker 0 still there 1 s after worker 1 ended" in out


def test_a_traceback_that_does_not_end_the_run_is_shown_once(tmp_path: Path) -> None:
    worker = """
step()
wait_for(all_have_trained)
if rank == 1 and num_starts() <= 2:
    mistake
end()
"""
    with launch(tmp_path, worker) as run:
        code, out, err = run.end()
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if "mistake" in line or "Traceback" in line]
    assert lines == [
        "[worker 1] Traceback (most recent call last):",
        "[worker 1]     mistake",
        f"[worker 1] {NAME_ERROR}",
        f"[worker 1] (the same traceback as before) {NAME_ERROR}",
    ]


def test_a_worker_that_was_used_wrongly_is_not_started_again(tmp_path: Path) -> None:
    worker = f"num_starts()\nif rank == 0:\n {WAITING}\nsys.exit(2)"
    with launch(tmp_path, worker, shard=WAITING) as run:
        code, out, err = run.end()
    assert code == 1
    assert "worker 1 ended with exit code 2" in err
    assert "--max-restarts" not in err
    assert "starting it again" not in out
    assert (run.run_dir / "starts-1").read_text() == "x"


def test_a_worker_that_hangs_when_the_job_is_complete_is_ended_without_a_failure(
    tmp_path: Path,
) -> None:
    worker = """
if rank == 1:
    mark("hangs")
    os.kill(os.getpid(), signal.SIGSTOP)
wait_for(lambda: marked("hangs"))
end(accuracy=0.5)
"""
    with launch(tmp_path, worker, shard="wait_for(lambda: num_ended() == 1)") as run:
        code, out, err = run.end()
    assert (code, err) == (0, "")
    assert "worker 1 still there, although the job is complete: sending SIGTERM" in out
    assert "worker 1 did not end within 1.3 s: sending SIGKILL" in out
    assert run.json("summary.json")["reported"] == {"accuracy": 0.5}


def test_a_launcher_that_is_killed_takes_those_with_it_that_it_started_again(
    tmp_path: Path,
) -> None:
    worker = f"""
step()
if num_starts() == 1:
    sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
mark(f"worker-{{rank}}")
{WAITING}
"""
    with launch(tmp_path, worker, shard=WAITING) as run:
        ready(run, "worker-0", "worker-1")
        wait_until(lambda: num_restarts(run) == 2)
        pids = run.pids()
        assert all(map(is_running, pids))
        run.process.kill()
        wait_until(lambda: not any(map(is_running, pids)))


def num_restarts(run: Launched) -> int:
    return sum(process["restarts"] for process in run.json("cluster.json")["processes"])


def test_a_worker_that_joined_by_hand_counts_too(tmp_path: Path) -> None:
    worker = """
step(1)
rank += 2
step(1)
end()
rank -= 2
end()
"""
    shard = "wait_for(lambda: num_ended() == 4)"
    with launch(tmp_path, worker, "--workers", "2:3", shard=shard) as run:
        code, out, _ = run.end()
    assert code == 0
    assert "2 workers (up to 3), 1 shard" in out
    assert run.json("summary.json")["samples"] == 3 * 64  # of ranks 0, 1 and 2, not 3


def test_what_the_lead_wrote_about_the_samples_lands_in_the_summary(tmp_path: Path) -> None:
    lines = [
        {"kind": "pass", "loader": 0, "pass": 0, "num_samples": 40, "dropped": 0},
        {"kind": "worker", "time": 1.5, "worker": 0, "incarnation": "1", "event": "joined"},
        {"kind": "pass_end", "loader": 0, "pass": 0, "abandoned": [[8, 40]]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    shard = f"open(os.path.join(run_dir, 'updates.jsonl'), 'w').write({text!r})\n{SHARD}"
    with launch(tmp_path, TRAINS, shard=shard) as run:
        code, out, _ = run.end()
    assert code == 0
    assert re.search(r"^samples lost / repeated / in part +8 / 0 / 0$", out, re.MULTILINE)
    summary = run.json("summary.json")
    assert (summary["samples_lost"], summary["passes"], summary["joins"]) == (8, 1, 1)


def test_shards_may_end_while_scripts_go_on_without_them(tmp_path: Path) -> None:
    worker = "end()\ntime.sleep(1)"  # longer than what counts as too early
    with launch(tmp_path, worker) as run:
        code, _, err = run.end()
    assert (code, err) == (0, "")


def test_a_shard_that_stays_is_told_to_end_which_is_no_failure(tmp_path: Path) -> None:
    with launch(tmp_path, "end()", shard=WAITING) as run:
        code, out, err = run.end()
    assert (code, err) == (0, "")
    assert "shard 0 did not end within 1.3 s after the workers" in out


def test_ctrl_c_ends_workers_then_shards(tmp_path: Path) -> None:
    stays = """
def stop(number, frame):
    time.sleep(0.1)
    with open(os.path.join(run_dir, "order"), "a") as file:
        file.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
mark(name)
time.sleep(60)
"""
    worker = 'step(1, loss=0.5); name = f"worker-{rank}"' + stays
    with launch(tmp_path, worker, shard="name = 'shard-0'" + stays) as run:
        ready(run, "worker-0", "worker-1", "shard-0")
        interrupt(run)
        code, out, err = run.end()
    assert code == 130
    assert (run.run_dir / "training.png").exists()
    assert "SIGINT: ending the run" in out
    assert err.startswith("shardline run: interrupted by SIGINT after ")
    order = (run.run_dir / "order").read_text().split()
    assert sorted(order[:2]) == ["worker-0", "worker-1"]
    assert order[2:] == ["shard-0"]
    assert run.json("summary.json")["exit_code"] == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_end_a_run_as_ctrl_c_does(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with launch(tmp_path, READY + WAITING, shard=WAITING) as run:
        ready(run, "worker-0", "worker-1")
        interrupt(run, number)
        assert run.end()[0] == code


def test_signals_of_a_terminal_stay_ignored_and_ignored_children_are_still_seen(
    tmp_path: Path,
) -> None:
    worker = READY + "wait_for(lambda: marked('go')); end()"
    with launch(tmp_path, worker, ignored="SIGHUP SIGINT SIGCHLD") as run:
        ready(run, "worker-0", "worker-1")
        interrupt(run, signal.SIGHUP)
        interrupt(run, signal.SIGINT)
        (run.run_dir / "go").touch()
        code, out, err = run.end()
    assert (code, err) == (0, "")
    assert "ending the run" not in out


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    worker = deaf + READY + WAITING
    with launch(tmp_path, worker, "--drain-seconds", "100", shard=deaf + WAITING) as run:
        ready(run, "worker-0", "worker-1", "cluster.json")
        interrupt(run)
        assert run.process.stdout is not None
        assert any("SIGINT" in line for line in run.process.stdout)  # reads until there
        interrupt(run)
        code, out, _ = run.end()
    assert code == 130
    assert "killing everything" in out


def test_a_launcher_that_is_killed_takes_its_processes_with_it(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    with launch(tmp_path, deaf + READY + WAITING, "--shards", "2", shard=deaf + WAITING) as run:
        ready(run, "worker-0", "worker-1", "cluster.json")
        pids = run.pids()
        assert len(pids) == 4
        assert all(map(is_running, pids))
        run.process.kill()
        wait_until(lambda: not any(map(is_running, pids)))


def test_nothing_that_a_worker_left_behind_survives_it(tmp_path: Path) -> None:
    worker = """
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("helper", helper.pid)
end()
"""
    with launch(tmp_path, worker, "--workers", "1") as run:
        code, _, _ = run.end()
    assert code == 0
    pid = int((run.run_dir / "worker-0.log").read_text().split()[1])
    wait_until(lambda: not is_running(pid))


def test_the_run_goes_on_when_nobody_reads_its_output_any_more(tmp_path: Path) -> None:
    worker = """
for _ in range(5000):
    print("x" * 100)
end()
"""
    with launch(tmp_path, worker, "--workers", "1") as run:
        assert run.process.stdout is not None
        run.process.stdout.readline()
        run.process.stdout.close()
        assert run.process.wait(20) == 0
    assert (run.run_dir / "worker-0.log").stat().st_size == 5000 * 101


def test_output_without_line_ends_and_without_utf_8_is_kept_as_it_is(tmp_path: Path) -> None:
    worker = """
sys.stdout.buffer.write(b"10%\\r100%\\n\\xff\\xfe" + b"y" * 200000)
sys.stdout.flush()
end()
"""
    with launch(tmp_path, worker, "--workers", "1") as run:
        code, out, _ = run.end()
    assert code == 0
    assert "[worker 0] 100%\n" in out
    log = (run.run_dir / "worker-0.log").read_bytes()
    assert log == b"10%\r100%\n\xff\xfe" + b"y" * 200000


def test_without_matplotlib_a_run_has_no_picture_and_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not installed')")
    with launch(tmp_path, TRAINS) as run:
        code, out, err = run.end()
    assert (code, err) == (0, "")
    assert out.count("pip install 'shardline[plots]'") == 1
    assert not (run.run_dir / "training.png").exists()


def test_a_terminal_shows_how_far_the_run_is(tmp_path: Path) -> None:
    worker = """
step(2, loss=0.5)
print("hello")
time.sleep(0.5)
end()
"""
    terminal, its_other_end = os.openpty()
    with launch(tmp_path, worker, "--workers", "1", stdout=its_other_end) as run:
        os.close(its_other_end)
        shown = read_all(terminal)
        code, _, err = run.end()
    assert (code, err) == (0, "")
    assert "[worker 0] hello" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "loss 0.5" in shown
    assert "samples/s" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is back


def read_all(terminal: int) -> str:
    """What was written until the last process closed the other end, which Linux calls an error."""
    found = b""
    with os.fdopen(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while chunk := file.read(4096):
            found += chunk
    return found.decode()


TRAINING_SCRIPT = """
import torch
import shardline
from .data import data

with shardline.connect() as session:
    model = torch.nn.Linear(64, 8)
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.01), model)
    loader = session.loader(data, batch_size=4)
    for _ in session.epochs(2):
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss.item())
    session.report(rank=session.rank, final=loss.item())
"""


DATA = """
import torch

data = torch.utils.data.TensorDataset(torch.ones(32, 64), torch.ones(32, 8))
"""


@pytest.mark.slow
def test_real_workers_that_run_a_module_train_on_real_shards(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    for name, text in {"train": TRAINING_SCRIPT, "data": DATA}.items():
        (tmp_path / "package" / f"{name}.py").write_text(text)
    flags = ["--shards", "2", "--part-bytes", "512"]  # so that each shard has some
    command = [sys.executable, "-m", "shardline", "run", *flags, "-m", "package.train"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    [run_dir] = (tmp_path / "runs").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 2 * 32 // (4 * 2)
    assert summary["samples"] == 2 * 32
    assert summary["reported"]["rank"] == 0
    assert summary["reported"]["final"] < 1
    assert (run_dir / "model.safetensors").exists()
    assert f"{run_dir.relative_to(tmp_path)}/model.safetensors" in done.stdout
