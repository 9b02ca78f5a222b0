"""Workers that die, hang, join and are told to go: real processes, real signals.

Whatever is done to a process waits for a line of one, never for time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM

import pytest

from tests.elastic import BATCH_SIZE, NUM_EPOCHS, NUM_SAMPLES, SCRIPT, Account
from tests.processes import Fleet, Process, Proxy


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Two shards, and room for four workers, of which two start."""
    settings = {
        "job.run_dir": str(tmp_path),
        "cluster.max_workers": 4,
        "exchange.part_bytes": 512,
        "rpc.reconnect_seconds": 0.5,
        "membership.heartbeat_seconds": 0.1,
    }
    with Fleet(tmp_path, num_shards=2, num_workers=2, settings=settings) as fleet:
        yield fleet


def start_worker(fleet: Fleet, rank: int, **settings: object) -> Process:
    """Start a worker, and do not wait for it."""
    path = fleet.folder / "train.py"
    if not path.exists():  # another worker may be reading it
        path.write_text(SCRIPT)
    own = {"cluster.rank": rank, **{key.replace("__", "."): v for key, v in settings.items()}}
    return fleet.start(f"worker {rank}", [str(path), str(fleet.folder)], own)


def start(fleet: Fleet, num_workers: int = 2) -> tuple[list[Process], list[Process]]:
    shards = [fleet.start_shard(index) for index in range(len(fleet.addresses))]
    return shards, [start_worker(fleet, rank) for rank in range(num_workers)]


def open_gate(fleet: Fleet) -> None:
    (fleet.folder / "go").touch()


def sums(workers: list[Process]) -> set[str]:
    """What each worker's parameters sum up to in the end."""
    return {worker.wait_for(r"^after the loop, sum (.+)$")[1] for worker in workers}


MODES = [
    {"consistency.mode": "sync"},
    {"consistency.mode": "sync", "consistency.backup_workers": 1},
    {"consistency.mode": "bounded", "consistency.bound": 2},
    {"consistency.mode": "async"},
    {"consistency.mode": "local", "consistency.local_steps": 3},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_a_killed_worker_is_replaced_and_no_sample_is_lost_or_repeated(
    fleet: Fleet, mode: dict[str, object]
) -> None:
    fleet.settings.update(mode)
    shards, workers = start(fleet)
    workers[1].wait_for(r"^step \d+ epoch 1$")
    workers[1].send(SIGKILL)
    workers[1].wait()
    workers[0].wait_for("^waits for go$")  # alone, through the rest of epoch 1
    shards[0].wait_for("worker 1 is evicted: .+ died: its stream to shard . closed")
    again = start_worker(fleet, 1)
    shards[0].wait_for(rf"worker 1 joined \(pid {again.pid} ")
    open_gate(fleet)
    survivors = [workers[0], again]
    assert [process.wait() for process in (*survivors, *shards)] == [0, 0, 0, 0]
    assert len(sums(survivors)) == 1
    account = Account(fleet.folder)
    account.check()
    assert len(account.events("evicted")) == 1
    assert account.in_part() <= BATCH_SIZE * int(mode.get("consistency.local_steps", 1))  # type: ignore[call-overload]  # a number
    assert re.search(r"starts with step [1-9]", again.output)
    incarnations = {u["incarnation"] for u in account.updates() if u["worker"] == 1}
    assert len(incarnations) == 2, "the replacement has contributed"


def test_a_stopped_worker_is_evicted_by_its_silence_and_fenced_when_it_wakes(fleet: Fleet) -> None:
    fleet.settings["membership.heartbeat_deadline_seconds"] = 1
    shards, workers = start(fleet)
    workers[1].wait_for(r"^step \d+ epoch 1$")
    workers[1].send(SIGSTOP)
    shards[0].wait_for(r"worker 1 is evicted: it gave no sign of life for \d")
    workers[0].wait_for("^waits for go$")
    workers[1].send(SIGCONT)
    assert workers[1].wait() == 3
    assert "worker 1 was evicted (it gave no sign of life for" in workers[1].output
    open_gate(fleet)
    assert [process.wait() for process in (workers[0], *shards)] == [0, 0, 0]
    Account(fleet.folder).check()


def test_a_worker_that_only_waits_or_computes_is_not_evicted(fleet: Fleet) -> None:
    fleet.settings["membership.heartbeat_deadline_seconds"] = 0.5
    shards, workers = start(fleet)
    for worker in workers:
        worker.wait_for("^waits for go$")
    late = start_worker(fleet, 2)  # whose start takes several deadlines
    shards[0].wait_for("worker 2 joined")
    open_gate(fleet)
    assert [process.wait() for process in (*workers, late, *shards)] == [0] * 5
    assert not Account(fleet.folder).events("evicted")


def test_with_a_step_deadline_a_worker_that_others_wait_for_is_evicted(fleet: Fleet) -> None:
    fleet.settings["membership.step_deadline_seconds"] = 1
    shards, workers = start(fleet)
    workers[0].wait_for("^waits for go$")
    workers[1].wait_for("^waits for go$")
    workers[1].send(SIGSTOP)
    open_gate(fleet)
    shards[0].wait_for(r"worker 1 is evicted: others have waited \d\.\d s for its step \d+")
    assert [process.wait() for process in (workers[0], *shards)] == [0, 0, 0]
    workers[1].send(SIGCONT)
    assert workers[1].wait() == 3
    Account(fleet.folder).check()


def test_broken_connections_are_opened_again_and_nothing_is_applied_twice(fleet: Fleet) -> None:
    fleet.settings["rpc.reconnect_seconds"] = 60
    shards = fleet.shards()
    with Proxy(fleet.addresses[0]) as lead, Proxy(fleet.addresses[1]) as other:
        seen = f"{lead.address},{other.address}"
        workers = [start_worker(fleet, 0), start_worker(fleet, 1, cluster__shards=seen)]
        for step in (5, 9, 13, 17, 20):
            workers[1].wait_for(rf"^step {step} ")
            lead.cut()
            other.cut()
        workers[1].wait_for("^waits for go$")
        lead.cut()
        open_gate(fleet)
        assert [process.wait() for process in (*workers, *shards)] == [0] * 4
    assert len(sums(workers)) == 1
    assert workers[1].output.count("opening it again") >= 3
    account = Account(fleet.folder)
    account.check()
    assert not account.events("evicted")


def test_workers_join_a_running_job_and_share_its_samples(fleet: Fleet) -> None:
    shards, workers = start(fleet)
    for worker in workers:
        worker.wait_for("^waits for go$")
    joiners = [start_worker(fleet, rank) for rank in (2, 3)]
    for rank in (2, 3):
        shards[0].wait_for(f"worker {rank} joined")
    open_gate(fleet)
    everybody = [*workers, *joiners]
    assert [process.wait() for process in (*everybody, *shards)] == [0] * 6
    assert len(sums(everybody)) == 1
    account = Account(fleet.folder)
    account.check()
    assert set(account.applied_by()) == {0, 1, 2, 3}
    for joiner in joiners:
        step = int(joiner.wait_for(r"^starts with step (\d+)$")[1])
        first = joiner.wait_for(r"^step (\d+) epoch (\d+)$")
        assert int(first[1]) == step + 1
        assert int(first[2]) >= 2, "it goes on in the others' epoch"
        assert "mean 1.5" in joiner.output, "what the others' numbers came to before it joined"


def test_after_everybody_has_died_between_two_passes_the_next_one_follows(fleet: Fleet) -> None:
    shards, workers = start(fleet)
    for worker in workers:
        worker.wait_for("^waits for go$")
    for worker in workers:
        worker.send(SIGKILL)
        worker.wait()
    for rank in range(2):
        shards[0].wait_for(f"worker {rank} is evicted")
    open_gate(fleet)
    again = [start_worker(fleet, rank) for rank in range(2)]
    assert [process.wait() for process in (*again, *shards)] == [0] * 4
    account = Account(fleet.folder)
    account.check()
    assert account.in_part() == 0


def test_a_worker_that_is_told_to_end_leaves_at_its_next_batch_with_75(fleet: Fleet) -> None:
    shards, workers = start(fleet)
    workers[1].wait_for(r"^step \d+ epoch 1$")
    workers[1].send(SIGTERM)
    assert workers[1].wait() == 75
    assert "after the loop" not in workers[1].output
    assert "Traceback" not in workers[1].output
    open_gate(fleet)
    assert [process.wait() for process in (workers[0], *shards)] == [0, 0, 0]
    account = Account(fleet.folder)
    account.check()
    assert len(account.events("preempted")) == 1
    assert not account.events("evicted")
    assert account.in_part() == 0


def test_a_worker_that_is_told_to_end_while_it_waits_for_others_leaves_too(fleet: Fleet) -> None:
    fleet.settings["consistency.mode"] = "async"  # so that one ends its pass while the other waits
    shards, workers = start(fleet)
    workers[1].wait_for("^waits for go$")
    workers[0].wait_for("^waits for go$")
    workers[0].send(SIGSTOP)
    open_gate(fleet)
    workers[1].wait_for(r"^step \d+ epoch 2$")
    workers[1].send(SIGTERM)
    assert workers[1].wait() == 75
    workers[0].send(SIGCONT)
    assert [process.wait() for process in (workers[0], *shards)] == [0, 0, 0]
    Account(fleet.folder).check()


def test_a_worker_stuck_in_a_batch_ends_after_its_grace_time(fleet: Fleet) -> None:
    shards, workers = start(fleet, num_workers=1)
    workers.append(start_worker(fleet, 1, worker__grace_seconds=0.5))
    workers[1].wait_for("^waits for go$")
    workers[1].send(SIGTERM)
    assert workers[1].wait() == 75
    assert "worker.grace_seconds" in workers[1].output
    open_gate(fleet)
    assert [process.wait() for process in (workers[0], *shards)] == [0, 0, 0]
    Account(fleet.folder).check()


def test_below_min_workers_the_job_pauses_until_another_one_comes(fleet: Fleet) -> None:
    fleet.settings["membership.min_workers"] = 2
    shards, workers = start(fleet)
    workers[1].wait_for(r"^step \d+ epoch 1$")
    workers[1].send(SIGKILL)
    shards[0].wait_for("worker 1 is evicted")
    again = start_worker(fleet, 1)
    open_gate(fleet)
    assert [process.wait() for process in (workers[0], again, *shards)] == [0] * 4
    account = Account(fleet.folder)
    account.check()
    # Alone, worker 0 took at most the step that it was in.
    old, *_, last = list(dict.fromkeys(u["incarnation"] for u in account.updates()))
    assert old != last
    versions: dict[int, set[int]] = {}
    for update in account.updates():
        versions.setdefault(update["version"], set()).add(update["worker"])
    alone = sum(who == {0} for version, who in sorted(versions.items()))
    assert alone <= 3


def test_a_pause_that_lasts_too_long_ends_the_job_with_what_to_do(fleet: Fleet) -> None:
    fleet.settings["membership.min_workers"] = 2
    fleet.settings["membership.pause_timeout_seconds"] = 1
    shards, workers = start(fleet)
    workers[1].wait_for(r"^step \d+ epoch 1$")
    workers[1].send(SIGKILL)
    assert workers[0].wait() == 1
    assert "start more, or lower membership.min_workers" in workers[0].output
    assert [shard.wait() for shard in shards] == [1, 1]


def test_a_process_that_takes_the_rank_of_a_living_one_is_refused(fleet: Fleet) -> None:
    shards, workers = start(fleet)
    workers[1].wait_for("^waits for go$")
    impostor = start_worker(fleet, 1)
    assert impostor.wait() == 1
    assert "worker 1 has joined already" in impostor.output
    open_gate(fleet)
    assert [process.wait() for process in (*workers, *shards)] == [0] * 4
    assert sum(Account(fleet.folder).applied_by().values()) == NUM_EPOCHS * NUM_SAMPLES
