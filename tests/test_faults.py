"""What users see when something goes wrong: real processes, real signals, real exit codes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
from safetensors.torch import load_file

from tests.processes import Fleet, Process, free_ports, occupied_port

HEAD = """
import threading
import torch
import shardline

torch.manual_seed(0)
model = torch.nn.Linear(32, 32)
with shardline.connect() as session:
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=0.01), model)
    print("joined", flush=True)

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
    with Fleet(tmp_path, num_shards=2, num_workers=2) as fleet:
        yield fleet


@pytest.fixture
def small_fleet(tmp_path: Path) -> Iterator[Fleet]:
    """One shard, one worker."""
    with Fleet(tmp_path) as fleet:
        yield fleet


def start(fleet: Fleet, *bodies: str) -> tuple[list[Process], list[Process]]:
    """All shards, and a worker for each body."""
    shards = [fleet.start_shard(index) for index in range(len(fleet.addresses))]
    workers = [fleet.worker(rank, script(body)) for rank, body in enumerate(bodies)]
    return shards, workers


def last_line(process: Process) -> str:
    return process.output.splitlines()[-1]


# -- Starting --------------------------------------------------------------------------------------


def test_a_worker_waits_for_an_address_where_nobody_listens_then_names_it(
    small_fleet: Fleet,
) -> None:
    settings = {"rpc.connect_timeout_seconds": 2.5}
    worker = small_fleet.worker(0, script(TRAIN_ON), settings)
    shard = f"shard 0 at {small_fleet.addresses[0]}"
    worker.wait_for(rf"^waiting up to 2\.5 s for {shard}$")
    assert worker.wait() == 3
    assert last_line(worker) == (
        f"shardline: {shard} did not answer for 2.5 s: check that it runs and that the address is "
        "right"
    )


def test_a_worker_trains_once_a_late_shard_is_up(small_fleet: Fleet) -> None:
    worker = small_fleet.worker(0, script("step()"))
    worker.wait_for(f"^waiting up to 30 s for shard 0 at {small_fleet.addresses[0]}$")
    shard = small_fleet.start_shard(0)
    worker.wait_for("^step 1$")
    assert (worker.wait(), shard.wait()) == (0, 0)


def test_a_complete_run_writes_the_model_and_ends_every_process_by_itself(fleet: Fleet) -> None:
    fleet.settings["job.run_dir"] = str(fleet.folder)
    body = "for _ in range(20): step()"
    report = "torch.save"
    shards, workers = start(fleet, body, body)
    model = fleet.folder / "model.safetensors"
    assert shards[0].wait() == 0
    assert set(load_file(model)) == {"weight", "bias"}  # before anybody waited for the workers
    assert [process.wait() for process in (*workers, *shards)] == [0, 0, 0, 0]


# -- Death -----------------------------------------------------------------------------------------


def test_a_worker_killed_in_the_middle_of_a_step_ends_all_others_with_its_name(
    fleet: Fleet,
) -> None:
    shards, workers = start(fleet, TRAIN_ON, STALL)
    workers[0].wait_for("^step 5$")
    workers[1].wait_for("^stalled$")
    workers[1].send(SIGKILL)
    assert workers[0].wait() == 1
    reason = rf"worker 1 \(pid {workers[1].pid} on .+\) died: its stream to shard [01] closed"
    assert re.fullmatch(f"shardline: {reason}", last_line(workers[0]))
    assert [shard.wait() for shard in shards] == [1, 1]
    reasons = {re.findall(reason, last_line(shard))[0] for shard in shards}
    assert len(reasons) == 1, reasons


@pytest.mark.parametrize("index", [0, 1])
def test_a_killed_shard_ends_the_workers_and_the_other_shard_with_its_name(
    fleet: Fleet, index: int
) -> None:
    shards, workers = start(fleet, TRAIN_ON, TRAIN_ON)
    workers[0].wait_for("^step 5$")
    shards[index].send(SIGKILL)
    for worker in workers:
        assert worker.wait() == 3
        assert f"shard {index} at {fleet.addresses[index]}" in last_line(worker)
        assert "Traceback" not in worker.output
    assert shards[1 - index].wait() == 1
    assert f"shard {index}" in last_line(shards[1 - index])


def test_a_shard_that_restarts_empty_is_never_filled_again(fleet: Fleet) -> None:
    fleet.settings["rpc.reconnect_seconds"] = 30  # so that the new process is there in time
    shards, workers = start(fleet, TRAIN_ON, TRAIN_ON)
    workers[0].wait_for("^step 5$")
    shards[1].send(SIGKILL)
    reason = "shard 1 restarted and lost its state: start the job again"
    restarted = fleet.start_shard(1)
    assert restarted.wait() == 1
    assert reason in last_line(restarted)
    for worker in workers:
        assert worker.wait() in (1, 3)  # 1: it has met the new process before the lead refused that
        assert reason in last_line(worker)
    assert shards[0].wait() == 1
    assert reason in last_line(shards[0])


@pytest.mark.parametrize("index", [0, 1])
def test_a_stopped_shard_ends_well_and_the_others_say_who_was_stopped(
    fleet: Fleet, index: int
) -> None:
    shards, workers = start(fleet, TRAIN_ON, TRAIN_ON)
    workers[0].wait_for("^step 5$")
    shards[index].send(SIGTERM)
    assert shards[index].wait() == 0
    for worker in workers:
        assert worker.wait() == 1
        assert last_line(worker) == f"shardline: shard {index} was stopped"
    assert shards[1 - index].wait() == 1
    assert f"shard {index} was stopped" in last_line(shards[1 - index])


# -- Mistakes of a script --------------------------------------------------------------------------


def test_an_exception_in_one_script_ends_all_others_with_its_text(fleet: Fleet) -> None:
    mistake = "for _ in range(5): step()\nraise ValueError('no such image')"
    shards, workers = start(fleet, TRAIN_ON, mistake)
    assert workers[1].wait() == 1
    assert last_line(workers[1]) == "ValueError: no such image"
    reason = "worker 1 failed: ValueError: no such image"
    assert workers[0].wait() == 1
    assert last_line(workers[0]) == f"shardline: {reason}"
    assert [shard.wait() for shard in shards] == [1, 1]
    assert all(reason in last_line(shard) for shard in shards)


def test_workers_that_never_join_are_named(tmp_path: Path) -> None:
    settings = {"membership.join_timeout_seconds": 1}
    with Fleet(tmp_path, num_workers=4, settings=settings) as fleet:
        shard = fleet.start_shard(0)
        workers = [fleet.worker(rank, script(TRAIN_ON)) for rank in (0, 2)]
        reason = "2 of 4 workers never joined: 1, 3"
        for worker in workers:
            assert worker.wait() == 1
            assert last_line(worker) == f"shardline: {reason}"
        assert shard.wait() == 1
        assert reason in last_line(shard)


def test_workers_that_meet_in_different_orders_are_told_so(tmp_path: Path) -> None:
    with Fleet(tmp_path, num_workers=2) as fleet:
        body = "for _ in session.epochs(2): step()"
        shards, workers = start(fleet, body, f"session.mean(1.0)\n{body}")
        codes = [worker.wait() for worker in workers]
        advice = (
            r"call session\.epochs, session\.mean and load_state_dict in the same order on every "
            "worker"
        )
        pattern = (
            r"worker (0|1) waits for all workers at '(epoch|mean)' and worker (0|1) at "
            rf"'(epoch|mean)': {advice}"
        )
        assert codes == [1, 1]
        assert all(re.search(pattern, last_line(worker)) for worker in workers)
        assert shards[0].wait() == 1


# -- Wrong settings --------------------------------------------------------------------------------


def test_a_port_in_use_ends_the_shard_with_its_address(small_fleet: Fleet) -> None:
    with occupied_port() as port:
        shard = small_fleet.start_shard(0, {"server.port": port})
        assert shard.wait() == 2
        assert f"cannot listen on 127.0.0.1:{port}: the port is in use" in last_line(shard)


def test_a_metrics_port_in_use_ends_the_shard_with_its_number(small_fleet: Fleet) -> None:
    with occupied_port() as port:
        shard = small_fleet.start_shard(0, {"metrics.port": port})
        assert shard.wait() == 2
        assert f"metrics.port: cannot listen on 127.0.0.1, port {port}" in last_line(shard)
