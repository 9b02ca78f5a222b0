"""What users see when something goes wrong: real processes, real signals, real exit codes.

Whatever ends a process waits for a line of another one, never for time.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
from safetensors.torch import load_file

from tests.processes import Fleet, Process, Proxy, occupied_port

HEAD = """
import threading
import torch
import shardline

# Their first calls import torch's compiler, which takes a second that these tests can do without.
for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    method.__wrapped__.__dynamo_disable = method.__wrapped__

torch.manual_seed(0)
model = torch.nn.Linear(32, 32)
with shardline.connect() as session:
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = session.optimizer(sgd, model, max_grad_norm=10.0)

    def step():
        optimizer.zero_grad()
        model(torch.ones(4, 32)).pow(2).mean().backward()
        optimizer.step()
        print(f"step {optimizer.next_step}", flush=True)

"""

TRAIN_ON = "for _ in range(10**6): step()"
"""Longer than any test: somebody ends it."""

STALL = f"""
for _ in range(5): step()
print("stalled", flush=True)
threading.Event().wait(60)
{TRAIN_ON}
"""
"""The others are in the middle of step 6, which waits for this worker."""


def script(body: str) -> str:
    """A training script of one worker; `body` runs once all have joined."""
    return HEAD + textwrap.indent(textwrap.dedent(body), "    ")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Two shards, two workers."""
    with Fleet(tmp_path, num_shards=2, num_workers=2) as fleet:
        yield fleet


@pytest.fixture
def lone_worker(tmp_path: Path) -> Iterator[Fleet]:
    """Two shards, one worker."""
    with Fleet(tmp_path, num_shards=2) as fleet:
        yield fleet


@pytest.fixture
def lone_shard(tmp_path: Path) -> Iterator[Fleet]:
    """One shard, two workers."""
    with Fleet(tmp_path, num_workers=2) as fleet:
        yield fleet


def start(fleet: Fleet, *bodies: str) -> tuple[list[Process], list[Process]]:
    """All shards, and a worker for each body."""
    shards = [fleet.start_shard(index) for index in range(len(fleet.addresses))]
    workers = [fleet.worker(rank, script(body)) for rank, body in enumerate(bodies)]
    return shards, workers


def last_line(process: Process) -> str:
    return process.output.splitlines()[-1]


# -- Starting and ending well ----------------------------------------------------------------------


def test_a_worker_says_that_it_waits_where_nobody_listens_and_gives_up(lone_worker: Fleet) -> None:
    worker = lone_worker.worker(0, script(TRAIN_ON), {"rpc.connect_timeout_seconds": 2.5})
    shard = f"shard 0 at {lone_worker.addresses[0]}"
    worker.wait_for(rf"^waiting up to 2\.5 s for {shard}$")
    assert worker.wait() == 3
    assert last_line(worker) == (
        f"shardline: {shard} did not answer for 2.5 s (rpc.connect_timeout_seconds): check that it "
        "runs and that the address is right"
    )


def test_a_run_waits_for_a_late_shard_writes_the_model_and_ends_by_itself(fleet: Fleet) -> None:
    fleet.settings["job.run_dir"] = str(fleet.folder)
    workers = [fleet.worker(rank, script("for _ in range(20): step()")) for rank in range(2)]
    lead = fleet.start_shard(0)
    for worker in workers:
        worker.wait_for(f"^waiting up to 90 s for shard 1 at {fleet.addresses[1]}$")
    late = fleet.start_shard(1)
    assert lead.wait() == 0
    assert set(load_file(fleet.folder / "model.safetensors")) == {"weight", "bias"}
    assert [process.wait() for process in (late, *workers)] == [0, 0, 0]
    assert "step 20" in workers[0].output


def test_a_stream_without_traffic_outlives_many_keepalive_pings(tmp_path: Path) -> None:
    with Fleet(tmp_path, settings={"rpc.keepalive_seconds": 0.1}) as fleet:
        quiet = "step()\nthreading.Event().wait(2)\nstep()"
        [shard], [worker] = start(fleet, quiet)
        assert [worker.wait(), shard.wait()] == [0, 0]


def test_training_goes_on_when_the_connection_between_shards_breaks(lone_worker: Fleet) -> None:
    lone_worker.settings["rpc.reconnect_seconds"] = 80
    with Proxy(lone_worker.addresses[0]) as proxy:
        known_to_shard_1 = f"{proxy.address},{lone_worker.addresses[1]}"
        lead = lone_worker.start_shard(0)
        other = lone_worker.start_shard(1, {"cluster.shards": known_to_shard_1})
        worker = lone_worker.worker(0, script("for _ in range(600): step()"))
        for step in (5, 200, 400):
            worker.wait_for(f"^step {step}$")
            proxy.cut()
        assert worker.wait() == 0
        assert [lead.wait(), other.wait()] == [0, 0]
    assert other.output.count("connected to the lead") == 4


# -- Death -----------------------------------------------------------------------------------------


def test_a_worker_killed_in_the_middle_of_a_step_is_evicted_by_name_and_the_others_go_on(
    fleet: Fleet,
) -> None:
    shards, workers = start(fleet, "for _ in range(300): step()", STALL)
    workers[0].wait_for("^step 5$")
    workers[1].wait_for("^stalled$")
    workers[1].send(SIGKILL)
    assert [process.wait() for process in (workers[0], *shards)] == [0, 0, 0]
    assert "step 300" in workers[0].output
    died = rf"worker 1 \(pid {workers[1].pid} on .+\) died: its stream to shard [01] closed"
    reasons = {re.findall(f"worker 1 is evicted: ({died})", shard.output)[0] for shard in shards}
    assert len(reasons) == 1


def test_a_job_whose_last_worker_dies_waits_for_another_and_then_fails(lone_worker: Fleet) -> None:
    lone_worker.settings["membership.pause_timeout_seconds"] = 1
    shards, [worker] = start(lone_worker, TRAIN_ON)
    worker.wait_for("^step 5$")
    worker.send(SIGKILL)
    assert [shard.wait() for shard in shards] == [1, 1]
    for shard in shards:
        assert "paused for 1 s with 0 workers, and at least 1 are wanted" in last_line(shard)


@pytest.mark.parametrize(("index", "num_workers"), [(0, 1), (1, 2)])
def test_a_killed_shard_ends_the_workers_and_the_other_shard_with_its_name(
    tmp_path: Path, index: int, num_workers: int
) -> None:
    with Fleet(tmp_path, num_shards=2, num_workers=num_workers) as fleet:
        shards, workers = start(fleet, *[TRAIN_ON] * num_workers)
        workers[0].wait_for("^step 5$")
        shards[index].send(SIGKILL)
        for worker in workers:
            assert worker.wait() == 3
            assert f"shard {index} at {fleet.addresses[index]}" in last_line(worker)
            assert "Traceback" not in worker.output
        assert shards[1 - index].wait() == 1
        assert f"shard {index}" in last_line(shards[1 - index])


def test_a_shard_that_restarts_empty_is_never_filled_again(lone_worker: Fleet) -> None:
    lone_worker.settings["rpc.reconnect_seconds"] = 80  # so that the new process is there in time
    shards, [worker] = start(lone_worker, TRAIN_ON)
    worker.wait_for("^step 5$")
    shards[1].send(SIGKILL)
    restarted = lone_worker.start_shard(1)
    reason = "shard 1 restarted and lost its state: start the job again"
    for process in (restarted, shards[0]):
        assert process.wait() == 1
        assert reason in last_line(process)
    # 1: the worker itself has met the new process, in the moment before the lead sends that away.
    assert worker.wait() in (1, 3)
    assert re.search(
        f"shard 1 at {lone_worker.addresses[1]}.* restarted and lost its state: start the job "
        "again$",
        last_line(worker),
    )


def test_a_lead_that_restarts_before_anybody_has_joined_is_as_good_as_new(
    lone_worker: Fleet,
) -> None:
    lead, other = lone_worker.shards()
    other.wait_for("connected to the lead")
    lead.send(SIGKILL)
    other.wait_for("the stream to the lead broke")
    lead = lone_worker.shard(0)
    worker = lone_worker.worker(0, script("step()"))
    assert [process.wait() for process in (worker, lead, other)] == [0, 0, 0]


def test_shards_may_stay_after_the_end_and_send_away_who_comes_too_late(
    lone_worker: Fleet,
) -> None:
    lone_worker.settings["server.stay"] = "true"
    shards, [worker] = start(lone_worker, "step()")
    assert worker.wait() == 0
    for shard in shards:
        shard.wait_for("stays until it is told to stop")
    late = lone_worker.worker(0, script("step()"))
    assert late.wait() == 0
    assert last_line(late) == "shardline: the job is complete: there is nothing left to do"
    for shard in shards:
        shard.send(SIGTERM)
    assert [shard.wait() for shard in shards] == [0, 0]


@pytest.mark.parametrize("index", [0, 1])
def test_a_stopped_shard_ends_well_and_the_others_say_who_was_stopped(
    lone_worker: Fleet, index: int
) -> None:
    shards, [worker] = start(lone_worker, TRAIN_ON)
    worker.wait_for("^step 5$")
    shards[index].send(SIGTERM)
    assert shards[index].wait() == 0
    assert worker.wait() == 1
    assert last_line(worker) == f"shardline: shard {index} was stopped"
    assert shards[1 - index].wait() == 1
    assert f"shard {index} was stopped" in last_line(shards[1 - index])


# -- Mistakes of a script --------------------------------------------------------------------------


def test_an_exception_in_one_script_is_told_to_the_shards_and_the_others_go_on(
    fleet: Fleet,
) -> None:
    mistake = "for _ in range(5): step()\nraise ValueError('no such image\\n' + 10**5 * '.')"
    shards, workers = start(fleet, "for _ in range(300): step()", mistake)
    assert [process.wait() for process in (*workers, *shards)] == [0, 1, 0, 0]
    assert "\nValueError: no such image\n" in workers[1].output
    assert "step 300" in workers[0].output
    for shard in shards:
        assert "WARNING worker 1 is evicted: ValueError: no such image\\n..." in shard.output


def test_what_any_other_process_would_meet_as_well_ends_all_with_its_text(fleet: Fleet) -> None:
    mistake = "for _ in range(5): step()\nmodel.weight.data.fill_(0)\nstep()"
    shards, workers = start(fleet, TRAIN_ON, mistake)
    reason = "worker 1 failed: UsageError: parameter weight was changed between steps"
    assert [worker.wait() for worker in workers] == [1, 2]
    assert f"shardline: {reason}" in workers[0].output
    assert [shard.wait() for shard in shards] == [1, 1]
    assert all(f"ERROR {reason}" in shard.output for shard in shards)


def test_workers_that_never_join_are_named(tmp_path: Path) -> None:
    settings = {"membership.join_timeout_seconds": 1}
    with Fleet(tmp_path, num_workers=4, settings=settings) as fleet:
        [shard], [worker] = start(fleet, TRAIN_ON)
        assert [worker.wait(), shard.wait()] == [1, 1]
        reason = (
            "3 of 4 workers never joined: 1, 2, 3 (membership.join_timeout_seconds): look into "
            "their logs"
        )
        assert last_line(worker) == f"shardline: {reason}"
        assert last_line(shard) == f"ERROR {reason}"


def test_workers_that_meet_in_different_orders_are_told_so(lone_shard: Fleet) -> None:
    epochs = "for _ in session.epochs(2): step()"
    [shard], workers = start(lone_shard, epochs, f"session.mean(1.0)\n{epochs}")
    met = r"worker (0|1) waits for all workers at '(\w+)' and worker (0|1) at '(\w+)'"
    for worker in workers:
        assert worker.wait() == 1
        [names] = re.findall(met, last_line(worker))
        assert sorted(names) == ["0", "1", "epoch", "mean"]
        assert last_line(worker).endswith(
            ": call session.epochs, session.mean and load_state_dict in the same order on every "
            "worker"
        )
    assert shard.wait() == 1


# -- Wrong settings --------------------------------------------------------------------------------


def test_a_port_in_use_ends_the_shard_with_its_address(tmp_path: Path) -> None:
    with occupied_port() as port, Fleet(tmp_path, settings={"server.port": port}) as fleet:
        shard = fleet.start_shard(0)
        assert shard.wait() == 2
        assert f"cannot listen on 127.0.0.1:{port}: the port is in use" in last_line(shard)


def test_a_metrics_port_in_use_ends_the_shard_with_its_number(tmp_path: Path) -> None:
    with occupied_port() as port, Fleet(tmp_path, settings={"metrics.port": port}) as fleet:
        shard = fleet.start_shard(0)
        assert shard.wait() == 2
        assert f"metrics.port: cannot listen on 127.0.0.1, port {port}" in last_line(shard)


def test_a_shard_listens_beyond_this_machine_when_that_is_allowed(tmp_path: Path) -> None:
    settings = {"server.host": "0.0.0.0", "rpc.insecure": True}  # noqa: S104 - what is tested
    with Fleet(tmp_path, settings=settings) as fleet:
        shard = fleet.shard(0)
        shard.send(SIGTERM)
        assert shard.wait() == 0


INSECURE = (
    "is not a loopback address, and connections are neither encrypted nor authenticated; on a "
    "network that you trust, allow this with --insecure / SHARDLINE_RPC_INSECURE=1"
)
SHARD = ["-m", "ps_server"]
WORKER = ["-c", "import shardline; shardline.connect()"]
WRONG: dict[str, tuple[list[str], dict[str, object], str]] = {
    "a host beyond this machine": (
        SHARD,
        {"server.host": "0.0.0.0"},  # noqa: S104 - what is tested
        f"0.0.0.0 {INSECURE}",
    ),
    "a shard beyond this machine": (
        WORKER,
        {"cluster.shards": "10.1.2.3:7000"},
        f"10.1.2.3 {INSECURE}",
    ),
    "no workers": (SHARD, {"cluster.num_workers": 0}, "cluster.num_workers = 0 "),
    "a rank beyond the workers": (
        WORKER,
        {"cluster.rank": 2, "cluster.num_workers": 2},
        "cluster.rank = 2 must be below the number of workers, 2",
    ),
    "an unknown variable": (
        SHARD,
        {"cluster.num_worker": 2},
        "SHARDLINE_CLUSTER_NUM_WORKER in the environment is not a configuration key; the nearest "
        "is SHARDLINE_CLUSTER_NUM_WORKERS",
    ),
}


@pytest.fixture(scope="module")
def wrongly_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """A process for each of the wrong settings; they start all at once."""
    with Fleet(tmp_path_factory.mktemp("wrong")) as fleet:
        yield {
            what: fleet.start(what, arguments, settings)
            for what, (arguments, settings, _) in WRONG.items()
        }


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings_end_a_process_with_what_is_wrong(
    wrongly_set: dict[str, Process], what: str
) -> None:
    process = wrongly_set[what]
    assert process.wait() == 2
    assert WRONG[what][2] in last_line(process)
    assert "Traceback" not in process.output


@pytest.mark.parametrize("folder", ["/dev/full", "/nowhere/at/all"])
def test_a_run_directory_that_cannot_be_written_ends_the_worker_before_it_trains(
    tmp_path: Path, folder: str
) -> None:
    with Fleet(tmp_path, settings={"job.run_dir": folder, "cluster.shards": ""}) as fleet:
        worker = fleet.start("worker", WORKER)
        assert worker.wait() == 2
        assert folder in last_line(worker)
