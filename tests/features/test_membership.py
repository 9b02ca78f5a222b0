"""Workers that leave a job, and workers that join one."""

from __future__ import annotations

import json
import os
import signal
import time
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest
import torch
from torch.optim import lr_scheduler

from ps_core.config import load
from ps_core.errors import (
    MismatchError,
    NonFiniteError,
    Preempted,
    ShardlineError,
    ShardUnreachableError,
    UsageError,
)
from ps_core.exchange import Farewell
from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster
from tests.features.book import Book, assert_trained_as_one
from tests.features.three_ways import (
    LR,
    NUM_STEPS,
    SIZES,
    Returned,
)
from tests.host import Result
from tests.reference import (
    JOB_SEED,
    Net,
    assert_close,
    concatenated,
    initial_net,
    loss_of,
    plain_optimizer,
    shares,
    train,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)


def leave_in_the_loop(session: Session, *, how: str) -> Returned:
    """In the middle of its second batch worker 1 fails, or is told to end."""
    book = Book(session, 30, batch_size=4)
    for _ in session.epochs(1):
        for number, (rows,) in enumerate(book.loader):
            if session.rank == 1 and number == 1:
                if how == "fails":
                    raise RuntimeError("no such image")
                os.kill(os.getpid(), signal.SIGTERM)
            book.train(rows)
            if session.rank == 1:
                (Path(session.config.job.run_dir) / f"rows-{number}").write_text(str(book.seen[-1]))
    return book.returned()


@pytest.mark.parametrize(
    ("how", "error", "event", "num_own"),
    [
        ("fails", "RuntimeError: no such image", "failed", 1),
        ("is told to end", "Preempted: 75", "preempted", 2),
    ],
)
def test_the_others_train_on_what_a_worker_leaves(
    cluster: Cluster, how: str, error: str, event: str, num_own: int, tmp_path: Path
) -> None:
    environ = {**JOB_SEED, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    result, told = cluster.run_losing(leave_in_the_loop, environ=environ, how=how)
    assert told == error
    assert isinstance(result, Result)
    own = [literal_eval((tmp_path / f"rows-{n}").read_text()) for n in range(num_own)]
    assert not (tmp_path / f"rows-{num_own}").exists()
    other = Result({"seen": own}, result.tensors)
    assert_trained_as_one([result, other], 30)
    entries = [json.loads(line) for line in (tmp_path / "updates.jsonl").read_text().splitlines()]
    assert event in [each["event"] for each in entries if each["kind"] == "worker"]


def log_a_step(session: Session) -> Returned:
    model = Net()
    optimizer = session.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model)
    optimizer.zero_grad()
    loss_of(model, shares(SIZES, 0)[session.rank]).backward()
    optimizer.step(samples=SIZES[session.rank])
    session.log(step=1)
    return {}


@pytest.mark.parametrize("num_shards", [2, 0])
def test_both_records_of_a_job_name_a_process_by_the_same_number(
    cluster: Cluster, num_shards: int, tmp_path: Path
) -> None:
    environ = {**JOB_SEED, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    environ["SHARDLINE_JOB_STRATEGY"] = "parameter-server" if num_shards else "allreduce"
    cluster.run(log_a_step, num_shards=num_shards, num_workers=2, environ=environ)
    files = (tmp_path / name for name in ("metrics.jsonl", "updates.jsonl"))
    metrics, updates = ([json.loads(line) for line in f.read_text().splitlines()] for f in files)
    known = {each["rank"]: each["incarnation"] for each in metrics}
    assert known.keys() == {0, 1}
    told = [(each["worker"], each["incarnation"]) for each in updates if "incarnation" in each]
    assert set(told) == set(known.items())
    assert {(each["rank"], each["incarnation"]) for each in metrics} == set(known.items())


def leave_without_a_loader(session: Session, *, waits: bool) -> Returned:
    """Worker 1 is told to end in its second step, or while it waits for worker 0."""
    model = Net()
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model)
    log = Path(session.config.job.run_dir) / "updates.jsonl"
    for _ in session.epochs(1):
        if session.rank == 0 and waits:
            wait_until(lambda: '"event":"preempted"' in log.read_text())
        for step in range(0 if session.rank and waits else NUM_STEPS):
            x, y = shares(SIZES, step)[session.rank]
            optimizer.zero_grad()
            loss_of(model, (x, y)).backward()
            if session.rank == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            optimizer.step(samples=len(x))
        if session.rank == 1:
            Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return model.state_dict()


@pytest.mark.parametrize(("waits", "num_shared"), [(False, 2), (True, 0)])
def test_a_worker_without_a_loader_leaves_after_its_step_or_while_it_waits(
    cluster: Cluster, waits: bool, num_shared: int, tmp_path: Path
) -> None:
    environ = {**JOB_SEED, "SHARDLINE_JOB_RUN_DIR": str(tmp_path)}
    result, told = cluster.run_losing(leave_without_a_loader, environ=environ, waits=waits)
    assert told == "Preempted: 75"
    assert isinstance(result, Result)
    steps = [shares(SIZES, step) for step in range(NUM_STEPS)]
    model = initial_net()
    batches = [
        concatenated(batches) if step < num_shared else batches[0]
        for step, batches in enumerate(steps)
    ]
    train(model, plain_optimizer("AdamW", model, lr=LR), batches)
    assert_close(result.tensors, model.state_dict(), 1e-10)


@pytest.mark.parametrize(
    ("error", "farewell"),
    [
        (Preempted(), Farewell.PREEMPTED),
        (RuntimeError("out of memory"), Farewell.FAILED),
        (KeyboardInterrupt(), Farewell.FAILED),
        (SystemExit(3), Farewell.FAILED),
        (ShardUnreachableError("shard 1 is gone"), Farewell.FAILED),
        (UsageError("step(samples=0)"), Farewell.FATAL),
        (NonFiniteError("the gradient of x"), Farewell.FATAL),
        (MismatchError("another model"), Farewell.FATAL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value.name,
)
def test_the_others_are_told_whether_a_new_process_could_do_better(
    error: BaseException, farewell: Farewell, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Farewell, str]] = []
    session = Session(load(environ={"SHARDLINE_METRICS_PORT": "-1"}))
    monkeypatch.setattr(session.exchange, "close", lambda *last_word: told.append(last_word))
    is_ours = isinstance(error, ShardlineError)
    with pytest.raises(SystemExit if is_ours else type(error)), session:
        raise error
    assert told == [(farewell, f"{type(error).__name__}: {error}")]


def test_a_script_that_exits_well_has_ended_well(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[object, ...]] = []
    session = Session(load(environ={"SHARDLINE_METRICS_PORT": "-1"}))
    monkeypatch.setattr(session.exchange, "close", lambda *last_word: told.append(last_word))
    with pytest.raises(SystemExit), session:
        raise SystemExit(0)
    assert told == [(Farewell.FINISHED,)]


def join_late(session: Session, *, folder: str) -> Returned:
    """Worker 2 joins in the second epoch, when the others have seen that it is coming."""
    comes, enters = Path(folder) / "comes", Path(folder) / "enters"
    if session.rank == 2:
        wait_until(comes.exists)
        enters.touch()
    book = Book(session, 64, batch_size=4)
    schedule = session.scheduler(lambda each: lr_scheduler.LambdaLR(each, lambda n: 1 / (1 + n)))
    begins = [book.optimizer.next_step, schedule.last_epoch, book.optimizer.param_groups[0]["lr"]]
    epochs = []
    for epoch in session.epochs(4):
        epochs.append(epoch)
        for (rows,) in session.loader(book.dataset, 4):
            if session.rank == 0 and epoch == 1:
                comes.touch()
                wait_until(enters.exists)
            book.train(rows)
            schedule.step()
    return {"epochs": epochs, "begins": begins, **book.returned()}


def wait_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_that_joins_begins_at_the_others_epoch_and_learning_rate(
    cluster: Cluster, tmp_path: Path
) -> None:
    results = cluster.run(
        join_late, num_workers=3, num_joiners=1, environ=JOB_SEED, folder=str(tmp_path)
    )
    first, second, joiner = (result.values for result in results)
    assert first["epochs"] == second["epochs"] == [0, 1, 2, 3]
    assert joiner["epochs"] == [1, 2, 3]
    step, count, rate = joiner["begins"]
    assert 8 < step < 16
    assert (count, rate) == (step, LR * (1 / (1 + step)))  # as LambdaLR multiplies
    assert joiner["seen"][0][0] == step
    seen = [n for result in results for _, rows in result.values["seen"] for n in rows]
    assert sorted(seen) == sorted([*range(64)] * 4)
    for result in results:
        assert_close(result.tensors, results[0].tensors, 0)
